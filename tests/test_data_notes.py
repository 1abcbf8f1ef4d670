"""What is noted on the data, for splits made by hand."""

import dataclasses

import pytest

from tweetdora.data import Examples, make_examples
from tweetdora.data_notes import notes_on_splits
from tweetdora.records import DataNote, DataSource

WORDS = ["bad", "fair", "good"]
CURE = "--validation_share and --test_share draw a split at random"


def examples(name: str, labels: list[int], split: str = "split", **fields) -> Examples:
    """Examples whose texts begin with `name`, and so differ from those of another name."""
    source = DataSource("data", None, None, True, split)
    made = make_examples([f"{name} {number}" for number in range(len(labels))], labels, source)
    return dataclasses.replace(made, **fields)


def said(**splits: Examples) -> list[tuple[str, str]]:
    return [(note.split, note.text) for note in notes_on_splits(splits, WORDS)]


MIXED = [0, 1, 2] * 40


def test_ordinary_splits_have_no_note():
    assert said(train=examples("a", MIXED), validation=examples("b", MIXED), test=examples("c", MIXED)) == []


def test_texts_in_two_splits_are_counted():
    train = examples("a", MIXED)
    test = examples("b", MIXED, split="test")
    shared = dataclasses.replace(test, texts=[*train.texts[:7], *test.texts[7:]])
    assert notes_on_splits({"train": train, "test": shared}, WORDS) == [
        DataNote("test", "7 of 120 texts are in the train split too")
    ]
    often = dataclasses.replace(test, texts=[*[train.texts[0]] * 7, *test.texts[7:]])
    assert said(train=train, test=often) == [("test", "7 of 120 texts are in the train split too")]
    validation = dataclasses.replace(test, texts=["x", *test.texts[1:]])
    found = said(train=train, validation=validation, test=shared)
    assert found == [
        ("test", "7 of 120 texts are in the train split too"),
        ("test", "113 of 120 texts are in the validation split too"),
    ]


def test_the_same_split_twice_is_said():
    same = examples("a", MIXED)
    assert said(validation=same, test=same) == [("test", "these are the same examples as in the validation split")]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0, 2] * 60, f"no example has the label fair; {CURE}"),
        ([1] * 120, f"all 120 examples have the label fair; {CURE}"),
    ],
)
def test_labels_that_are_not_there_are_named(labels, text):
    assert said(test=examples("a", labels)) == [("test", text)]


@pytest.mark.parametrize(("number", "noted"), [(99, True), (100, False)])
def test_few_test_examples_are_said(number, noted):
    labels = ([0, 1, 2] * 40)[:number]
    expected = [("test", "only 99 examples, so the intervals are wide")] if noted else []
    assert said(test=examples("a", labels)) == expected
    assert said(validation=examples("a", labels)) == []


@pytest.mark.parametrize(
    ("is_sorted", "is_part", "noted"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_part_of_rows_that_come_label_by_label_is_said(is_sorted, is_part, noted):
    found = said(train=examples("a", sorted(MIXED), is_sorted=is_sorted, is_part=is_part))
    text = f"the rows are sorted by label, so a part of them in that order is not a representative sample; {CURE}"
    assert found == ([("train", text)] if noted else [])


def test_skipped_rows_are_counted_by_reason():
    found = said(train=examples("a", MIXED, skipped={"no text": 1_200, "unknown label": 1}))
    assert found == [("train", "1,201 rows were skipped: 1,200 with no text, 1 with unknown label")]
