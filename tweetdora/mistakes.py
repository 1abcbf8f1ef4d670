"""List the most confident mistakes of a run, which show what the model or its data set gets wrong.

    python -m tweetdora.mistakes runs/quickstart                                      # a summary
    python -m tweetdora.mistakes runs/quickstart --output mistakes.csv --count 50     # also the examples, with texts

A mistake is an example whose most likely label word is not its label. Its confidence is that word's probability.
"""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch

from tweetdora.card_facts import evaluation_path
from tweetdora.cli import parse_with_target, run_script
from tweetdora.config import AT_LEAST_1, Flag, check_ranges
from tweetdora.errors import InputError
from tweetdora.metrics import accuracy_by_length
from tweetdora.record_files import read_predictions, read_record
from tweetdora.records import PREDICTIONS, EvaluationRecord, GenerationRecord, LengthBand, PredictionRecord
from tweetdora.tables import ENDINGS, RowWriter

log = logging.getLogger("tweetdora.mistakes")


@dataclass(frozen=True)
class MistakesConfig:
    """Flags, in addition to the run folder."""

    split: Literal["train", "validation", "test"] = field(
        default="test", metadata={"help": "Split that evaluate.py has measured the run on."}
    )
    count: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=50, metadata={"help": "Number of mistakes, most confident first."}
    )
    output: str | None = field(
        default=None,
        metadata={"help": "File for the examples, .csv, .tsv or .jsonl. If unset, only the summary is printed."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.output is not None and os.path.splitext(self.output)[1].lower() not in ENDINGS:
            raise InputError(f"--output is {self.output}; expected a name that ends in {', '.join(ENDINGS)}.")


@dataclass(frozen=True)
class Mistake:
    """A misclassified example; `probability` is that of the predicted label."""

    example_id: int
    label: str
    predicted: str
    probability: float
    characters: int
    text: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    config, run_dir = parse_with_target(argv, MistakesConfig, __doc__.partition("\n")[0], "Run folder.")

    # load
    path = evaluation_path(run_dir, config.split)
    record = read_record(EvaluationRecord, path)
    lines = read_predictions(os.path.join(path.removesuffix(".json"), PREDICTIONS))

    # work
    probabilities = label_probabilities(lines)
    found = find_mistakes(lines, record.label_words, probabilities)
    labels = [record.label_words.index(line.label) for line in lines]
    likeliest = [measured_answer(line).likeliest_id(record.label_words) for line in lines]
    bands = accuracy_by_length([line.text for line in lines], labels, likeliest)
    log.info("%s", format_mistakes(found, len(lines), found[: config.count], bands))

    # save
    if config.output is not None:
        with open(config.output, "w", encoding="utf-8", newline="") as stream:
            form = os.path.splitext(config.output)[1].lower()[1:]
            writer = RowWriter(stream, form, list(Mistake.__dataclass_fields__))
            writer.write([asdict(one) for one in found[: config.count]])
            writer.close()
        log.info("Wrote %s.", config.output)
    return 0


def find_mistakes(
    lines: Sequence[PredictionRecord], label_words: Sequence[str], probabilities: np.ndarray
) -> list[Mistake]:
    """Find all mistakes, given the label words' probabilities (N, C); most confident first."""
    found = []
    for line, row in zip(lines, probabilities, strict=True):
        number = measured_answer(line).likeliest_id(label_words)
        predicted, probability = label_words[number], round(float(row[number]), 4)
        if predicted != line.label:
            found.append(Mistake(line.example_id, line.label, predicted, probability, len(line.text), line.text))
    return sorted(found, key=lambda one: (-one.probability, one.example_id))


def measured_answer(line: PredictionRecord) -> GenerationRecord:
    """What the fine-tuned model said if it was measured, else what the base said."""
    return line.finetuned or line.base


def label_probabilities(lines: Sequence[PredictionRecord]) -> np.ndarray:
    """The label words' probabilities (N, C).

    Raises:
        InputError: the likelihoods were not measured.
    """
    rows = [measured_answer(line).log_likelihoods for line in lines]
    if any(row is None for row in rows):
        raise InputError(
            "these predictions have no likelihoods, because they are of record version 3. Measure the run again."
        )
    return np.asarray(torch.tensor(rows, dtype=torch.float64).softmax(-1))


def format_mistakes(
    found: Sequence[Mistake], count: int, shown: Sequence[Mistake], bands: Sequence[LengthBand]
) -> str:
    """Format the summary for the log."""
    pairs, confident = (Counter((one.label, one.predicted) for one in some) for some in (found, shown))
    lines = [f"{len(found):,} of {count:,} examples were misclassified."]
    if not shown:
        return lines[0]
    lines += [
        f"The {len(shown)} most confident: probability {shown[-1].probability:.3f} to {shown[0].probability:.3f}.",
        "",
        f"{'label':<16}{'predicted':<16}{'mistakes':>9}{'of these shown':>16}",
        *(
            f"{label:<16}{predicted:<16}{number:>9,}{confident[label, predicted]:>16,}"
            for (label, predicted), number in pairs.most_common()
        ),
        "",
        f"{'characters':<16}{'examples':>9}{'accuracy':>10}",
    ]
    for band in bands:
        low, high = band.characters
        lines.append(f"{f'{low} to {high}':<16}{band.num_examples:>9,}{band.accuracy:>10.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, "tweetdora.mistakes")
