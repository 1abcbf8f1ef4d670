"""Classify the texts of a file, with the probability of each label.

    python predict.py runs/quickstart tweets.csv --output labelled.csv
    python predict.py liuhailin0123/llm-course-hw3-dora tweets.parquet --output labelled.parquet
    cat tweets.txt | python predict.py runs/quickstart          # one text per line; CSV on standard output
    accelerate launch predict.py runs/quickstart tweets.csv --output labelled.csv       # split over all GPUs

Adds the columns label, probability_<label word> and margin; keeps all other columns and the row order. If it is
interrupted, the same command resumes where it stopped.
"""

import tweetdora  # noqa: F401  (before torch, because it sets torch's threads)

# isort: split
import logging
import os
from functools import partial

from tweetdora.cli import check_flags, parse_predict, run_script, show_log
from tweetdora.config import PredictConfig

parse = partial(parse_predict, description=__doc__.partition("\n")[0])
check_flags(__name__, parse, "predict.py")  # before the other imports, which take seconds

# isort: split
from accelerate import PartialState

from tweetdora.classifier import Classifier
from tweetdora.device import compute_state
from tweetdora.errors import InputError
from tweetdora.prediction import (
    Summary,
    Table,
    find_text_column,
    predict_file,
    predict_stream,
    read_input,
    rows_of,
    scan,
)

log = logging.getLogger("tweetdora.predict")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    config, model, path = parse(argv)
    show_log(standard_error=True)
    if path is None and config.output is not None:
        raise InputError(
            f"--output {config.output} needs an input file; rows of standard input are answered on standard output."
        )
    if config.output is not None and os.path.exists(config.output) and not config.overwrite:
        raise InputError(f"--output {config.output} already exists; choose another file, or pass --overwrite true.")
    table = scan(path, config) if path is not None else None
    if table is None and compute_state().num_processes > 1:
        raise InputError(
            "standard input can be read by one process only, and this launch has several. "
            "Name a file, or start one process."
        )

    # load
    classifier = Classifier(model, precision=config.precision, batch_size=config.batch_size)
    say = log.info if PartialState().is_main_process else log.debug

    # work and save
    of_the_model = classifier.target.task.text_column
    if table is not None and config.output is not None:
        column = find_text_column(table.columns, config, of_the_model, table.path)
        if column in table.no_text and not config.skip_bad_rows:
            raise InputError(
                f"{table.path}, {table.no_text[column]}; expected text. --text_column names another column; "
                "--skip_bad_rows true leaves such rows unlabelled."
            )
        summary = predict_file(classifier, table, config, column)
    else:
        summary = _to_standard_output(classifier, table, config, of_the_model)
    for line in summary.lines(classifier.target.task.max_length):
        say("%s", line)
    if config.output is not None:
        say("Wrote %s", config.output)
    return 0


def _to_standard_output(
    classifier: Classifier, table: Table | None, config: PredictConfig, of_the_model: str
) -> Summary:
    """Classify a file or standard input to standard output, in the input's format; plain text becomes CSV."""
    if table is None:
        rows, columns = read_input(config)
        form = str(config.input_format)
    else:
        rows, columns = rows_of(table.path, config), table.columns
        form = os.path.splitext(table.path)[1].lower()[1:]
    column = find_text_column(columns, config, of_the_model, table.path if table else "standard input")
    form = form if form in ("tsv", "jsonl") else "csv"
    return predict_stream(classifier, rows, form, config, columns, column)


if __name__ == "__main__":
    run_script(main, "predict.py")
