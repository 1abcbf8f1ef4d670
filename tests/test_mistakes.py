"""The most confident mistakes of a run."""

import csv
import dataclasses
import io
import math
from pathlib import Path

import pytest
from sample_records import sample_evaluation

from tweetdora.errors import InputError
from tweetdora.mistakes import MistakesConfig, find_mistakes, label_probabilities, main
from tweetdora.record_files import write_predictions, write_record
from tweetdora.records import GenerationRecord, PredictionRecord

WORDS = ["bad", "good"]
# label, probability of "bad"; wrong are the second, third and fifth
ROWS = [("bad", 0.9), ("bad", 0.2), ("good", 0.7), ("good", 0.4), ("good", 0.95)]


def line(number: int, label: str, bad: float) -> PredictionRecord:
    answer = GenerationRecord(label, label, True, [math.log(bad) - 3, math.log(1 - bad) - 3])
    base = GenerationRecord("", None, True, [math.log(0.5), math.log(0.5)])
    return PredictionRecord(number, "x" * (number + 1), label, base, answer)


LINES = [line(number, *row) for number, row in enumerate(ROWS)]


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run/evaluation/test").mkdir(parents=True)
    write_predictions(str(tmp_path / "run/evaluation/test/predictions.jsonl"), LINES)
    write_record(str(tmp_path / "run/evaluation/test.json"), sample_evaluation(label_words=WORDS))
    return tmp_path / "run"


def test_mistakes_come_by_the_probability_of_the_wrong_label():
    found = find_mistakes(LINES, WORDS, label_probabilities(LINES))
    assert [(one.example_id, one.label, one.predicted, one.probability) for one in found] == [
        (4, "good", "bad", 0.95),
        (1, "bad", "good", 0.8),
        (2, "good", "bad", 0.7),
    ]


def test_of_words_that_rounding_made_equally_likely_the_one_that_the_scores_count_is_the_label():
    tied = line(0, "bad", 0.5)
    assert tied.finetuned is not None
    assert find_mistakes([tied], WORDS, label_probabilities([tied])) == []
    other = dataclasses.replace(tied, finetuned=dataclasses.replace(tied.finetuned, likeliest="good"))
    (found,) = find_mistakes([other], WORDS, label_probabilities([other]))
    assert (found.predicted, found.probability) == ("good", 0.5)


def test_the_summary_counts_by_label_and_length_and_the_file_has_the_texts(run, capsys):
    assert main([str(run), "--count", "2", "--output", str(run / "m.csv")]) == 0
    said = capsys.readouterr().out
    assert "3 of 5 examples were misclassified." in said
    assert "The 2 most confident: probability 0.800 to 0.950." in said
    cells = [text.split() for text in said.splitlines()]
    assert ["good", "bad", "2", "1"] in cells and ["bad", "good", "1", "1"] in cells
    assert ["1", "to", "2", "2", "0.500"] in cells and ["5", "to", "5", "1", "0.000"] in cells
    rows = list(csv.DictReader(io.StringIO((run / "m.csv").read_text(encoding="utf-8"))))
    assert [(row["example_id"], row["text"]) for row in rows] == [("4", "xxxxx"), ("1", "xx")]


def test_a_model_without_a_mistake_has_none_to_show(run, capsys):
    write_predictions(str(run / "evaluation/test/predictions.jsonl"), [LINES[0], LINES[3]])
    main([str(run)])
    assert "0 of 2 examples were misclassified.\n" in capsys.readouterr().out


def test_predictions_without_likelihoods_are_refused():
    answer = LINES[0].finetuned
    assert answer is not None
    old = dataclasses.replace(LINES[0], finetuned=dataclasses.replace(answer, log_likelihoods=None))
    with pytest.raises(InputError, match="these predictions have no likelihoods"):
        label_probabilities([old])


def test_another_form_of_output_is_refused():
    with pytest.raises(InputError, match=r"--output is m\.xlsx; expected a name that ends in"):
        MistakesConfig(output="m.xlsx")
