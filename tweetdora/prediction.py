"""The work of predict.py after its flags are read: read rows, classify them, write the predictions.

Rows are read and written in chunks, so that memory does not grow with the file. Each chunk's predictions are saved to
<output>.part before the next chunk is computed. At the end, the output is built from the input and the .part file. If
a command is interrupted, running it again resumes after the last complete chunk. The lines of a .part file:

    {"command": {...}}                           the command that made these predictions
    [2, 0.01, 0.03, 0.96]                        a row: its label id, and the labels' probabilities
    null                                         a row without a text
    {"rows": 2, "truncated": 0}                  the end of a chunk, which is now complete
"""

import codecs
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from pyarrow import parquet
from tqdm import tqdm

from tweetdora.classifier import Classifier, Prediction, make_prediction
from tweetdora.config import PredictConfig
from tweetdora.errors import InputError
from tweetdora.files import file_sha256
from tweetdora.priors import correct, corrected_labels, estimate_shares
from tweetdora.processes import check_same
from tweetdora.tables import Row, RowWriter, hint_for_columns, is_table, read_any_rows, read_stream
from tweetdora.texts import is_text

_CHUNK_BATCHES = 8  # batches per process in a chunk; within a chunk, texts of similar length are batched together
_SHOWN_BAD_ROWS = 5


@dataclass(frozen=True)
class Table:
    """What one pass over an input file found: its columns, the number of rows, and the rows that cannot be read."""

    path: str
    columns: list[str]
    num_rows: int
    bad: dict[int, str]  # problem by line number
    no_text: dict[str, str] = field(default_factory=dict)  # column: where it first holds something that is no text


@dataclass
class Summary:
    """Counts to log at the end."""

    labels: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    truncated: int = 0
    skipped: int = 0
    corrected: dict[str, tuple[float, float]] = field(default_factory=dict)  # share: estimated, in training

    def add(self, prediction: Prediction) -> None:
        """Count a row."""
        if prediction.label is None:
            self.empty += 1
        else:
            self.labels[prediction.label] += 1

    def lines(self, max_length: int) -> list[str]:
        """The counts, in sentences."""
        total = sum(self.labels.values()) + self.empty
        counts = ", ".join(f"{count:,} {label}" for label, count in self.labels.most_common())
        notes = [f"{total:,} rows: {counts or 'none has a text'}"]
        if self.empty:
            notes.append(f"rows without a text, left without a label: {self.empty:,}")
        if self.truncated:
            notes.append(f"texts truncated to fit {max_length} tokens: {self.truncated:,}")
        if self.skipped:
            notes.append(f"unreadable rows skipped: {self.skipped:,}")
        if self.corrected:
            shares = ", ".join(
                f"{share:.1%} {word} (in training {before:.1%})" for word, (share, before) in self.corrected.items()
            )
            notes.append(f"probabilities corrected for estimated shares of {shares}")
            if gone := [word for word, (share, _) in self.corrected.items() if share * total < 1]:
                notes.append(
                    f"the estimate leaves no row for {', '.join(gone)}: this model's probabilities are too uncertain "
                    "for it. Compare with --prior_correction none"
                )
        return notes


def rows_of(path: str, config: PredictConfig) -> Iterator[Row]:
    """The rows of a file, those that could not be written again with their problem.

    Raises:
        InputError: the file cannot be read.
    """
    rows = read_any_rows(path, config.csv_delimiter, config.encoding)
    return map(_checked, rows) if path.lower().endswith(".jsonl") else rows


def _checked(row: Row) -> Row:
    """The row, with a problem if it holds half of a surrogate pair, which only JSON can."""
    if is_text(json.dumps(row.values, ensure_ascii=False)):
        return row
    return Row(row.line, dict.fromkeys(filter(is_text, row.values)), "holds half of a surrogate pair")


def scan(path: str, config: PredictConfig) -> Table:
    """Read a file once, so that bad rows are reported before any text is classified.

    Raises:
        InputError: the file or one of its rows cannot be read.
    """
    columns: dict[str, None] = {}
    bad: dict[int, str] = {}
    no_text: dict[str, str] = {}
    count = 0
    for row in rows_of(path, config):
        columns.update(dict.fromkeys(row.values))
        if row.problem is None:
            count += 1
            for name, value in row.values.items():
                if name not in no_text and not isinstance(value, (str, int, float, type(None))):
                    no_text[name] = _no_text(row, name)
        else:
            bad[row.line] = row.problem
    if not columns and not bad:
        raise InputError(f"{path} has no rows; the first line of a .csv names the columns.")
    if bad and not config.skip_bad_rows:
        shown = "; ".join(f"line {line}: {problem}" for line, problem in list(bad.items())[:_SHOWN_BAD_ROWS])
        more = f"; and {len(bad) - _SHOWN_BAD_ROWS:,} more" if len(bad) > _SHOWN_BAD_ROWS else ""
        hint = hint_for_columns(path, list(columns)) if is_table(path) else ""
        raise InputError(
            f"{path}: {len(bad):,} rows cannot be read: {shown}{more}. "
            f"{hint or '--skip_bad_rows true skips and counts such rows.'}"
        )
    return Table(path, list(columns), count, bad, no_text)


def find_text_column(columns: list[str], config: PredictConfig, of_the_model: str, path: str) -> str:
    """The column that holds the texts: --text_column, else the model's own, else `text`, else the only column.

    Raises:
        InputError: there is no such column; the message names the existing ones.
    """
    wanted = [config.text_column] if config.text_column else [of_the_model, "text"]
    for name in wanted:
        if name in columns:
            return name
    if config.text_column is None and len(columns) == 1 and not hint_for_columns(path, columns):
        return columns[0]
    hint = hint_for_columns(path, columns) if is_table(path) else ""
    raise InputError(
        f"{path} has no column {wanted[0]!r}; its columns are {', '.join(columns)}. "
        f"{hint or 'Name one with --text_column.'}"
    )


def added_columns(columns: Iterable[str], label_words: list[str]) -> list[str]:
    """Names of the added columns: label, a probability per label word, margin; `predicted_…` if one of them is taken.

    >>> added_columns(["text", "label"], ["bad", "good"])
    ['predicted_label', 'predicted_probability_bad', 'predicted_probability_good', 'predicted_margin']
    """
    names = ["label", *(f"probability_{word}" for word in label_words), "margin"]
    taken = set(columns)
    while taken & set(names):
        names = [f"predicted_{name}" for name in names]
    return names


def with_prediction(values: dict[str, Any], prediction: Prediction, names: list[str]) -> dict[str, Any]:
    """A row with its prediction added in columns `names`."""
    probabilities: list[float | None] = list(prediction.probabilities.values())
    probabilities = probabilities or [None] * (len(names) - 2)
    return {**values, **dict(zip(names, [prediction.label, *probabilities, prediction.margin], strict=True))}


def chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """The rows, `size` at a time."""
    while chunk := list(islice(rows, size)):
        yield chunk


def text_of(row: Row, column: str, config: PredictConfig) -> str:
    """A row's text; empty if it has none. A number is taken as it would be written.

    Raises:
        InputError: it holds something else, such as a list, and bad rows are not skipped.
    """
    value = row.values.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        if config.skip_bad_rows:
            return ""
        raise InputError(f"{_no_text(row, column)}; expected text. --skip_bad_rows true leaves such rows unlabelled.")
    return str(value)


def _no_text(row: Row, column: str) -> str:
    return f"line {row.line}: column {column!r} holds {row.values[column]!r:.60}"


# To a file


def predict_file(classifier: Classifier, table: Table, config: PredictConfig, column: str) -> Summary:
    """Classify the rows of a file, skipping those that an interrupted command has already done; write the output.

    Raises:
        InputError: the .part file is another command's, or --prior_correction needs label shares that are unknown.
    """
    state = PartialState()
    train_shares = classifier.target.label_shares if config.prior_correction == "em" else None
    if config.prior_correction == "em" and train_shares is None:
        raise InputError(
            f"--prior_correction em: the label shares in the training data of {classifier.target.name} are not "
            "known. Models published with push_to_hub.py have them in task.json. Leave the flag out."
        )
    output = str(config.output)
    part = f"{output}.part"
    command = {
        "model": classifier.identity,
        "input": [os.path.basename(table.path), file_sha256(table.path)],
        "text_column": column,
        "skipped": sorted(table.bad),
    }
    if config.encoding or config.csv_delimiter:
        command["read_as"] = [config.encoding, config.csv_delimiter]
    check_same(command)
    done = _begin_part(part, command) if state.is_main_process else 0
    done = _from_main_process(done)
    rows = (row for row in rows_of(table.path, config) if row.problem is None)
    rest = islice(rows, done, None)
    size = config.batch_size * _CHUNK_BATCHES * state.num_processes
    bar = tqdm(total=table.num_rows, initial=done, unit="row", disable=not state.is_main_process)
    with bar:
        for chunk in chunks(rest, size):
            predictions, truncated = classifier.predict([text_of(row, column, config) for row in chunk])
            bar.update(len(chunk))
            lines = [_as_line(found, classifier.label_words) for found in predictions]
            if state.is_main_process:
                _append(part, [*lines, json.dumps({"rows": len(chunk), "truncated": truncated})])
    state.wait_for_everyone()
    if not state.is_main_process:
        return Summary()
    correction = None if train_shares is None else _estimate_correction(part, train_shares)
    return _write_output(part, table, config, classifier.label_words, correction)


@dataclass(frozen=True)
class Correction:
    """The labels' shares (C,) in training, and as estimated among the file's texts."""

    train_shares: list[float]
    shares: np.ndarray


def _estimate_correction(part: str, train_shares: list[float]) -> Correction | None:
    """Estimate the shares from the predictions in a .part file; None if no row has a text. Holds C numbers per row."""
    with open(part, encoding="utf-8") as stream:
        stream.readline()
        rows = [found[1:] for line in stream if isinstance(found := json.loads(line), list)]
    if not rows:
        return None
    return Correction(train_shares, estimate_shares(np.array(rows), train_shares))


def _append(part: str, lines: list[str]) -> None:
    with open(part, "a", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _as_line(prediction: Prediction, label_words: list[str]) -> str:
    if prediction.label is None:
        return "null"
    return json.dumps([label_words.index(prediction.label), *prediction.probabilities.values()])


def _from_main_process(value: int) -> int:
    values = [value]
    broadcast_object_list(values)
    return values[0]


def _begin_part(part: str, command: dict[str, Any]) -> int:
    """Create the .part file, or truncate it after its last complete chunk; return the number of its rows."""
    os.makedirs(os.path.dirname(part) or os.curdir, exist_ok=True)
    head = json.dumps({"command": command}) + "\n"
    if not os.path.isfile(part):
        with open(part, "w", encoding="utf-8") as stream:
            stream.write(head)
        return 0
    rows, whole = 0, len(head.encode())
    with open(part, "rb") as binary:
        if binary.readline() != head.encode():
            raise InputError(
                f"{part} holds predictions of another command: another model, input, text column or encoding. Run "
                "that command again to finish it, delete the file, or choose another --output."
            )
        for line in binary:
            if line.startswith(b'{"rows"') and line.endswith(b"\n"):
                rows, whole = rows + json.loads(line)["rows"], binary.tell()
    os.truncate(part, whole)
    return rows


def _read_part(
    part: str, label_words: list[str], summary: Summary, correction: Correction | None
) -> Iterator[Prediction]:
    with open(part, encoding="utf-8") as stream:
        stream.readline()
        for line in stream:
            found = json.loads(line)
            if isinstance(found, dict):
                summary.truncated += found["truncated"]
                continue
            prediction = Prediction(None, {}, None)
            if found and correction is not None:
                before, priors = np.array([found[1:]]), (correction.train_shares, correction.shares)
                (label,) = corrected_labels(np.array(found[:1]), before, *priors).tolist()
                prediction = make_prediction(label, correct(before, *priors)[0].tolist(), label_words)
            elif found:
                prediction = make_prediction(found[0], found[1:], label_words)
            summary.add(prediction)
            yield prediction


def _write_output(
    part: str, table: Table, config: PredictConfig, label_words: list[str], correction: Correction | None
) -> Summary:
    """Build the output from the input and the .part file, and delete that file only when this has succeeded."""
    output, summary = str(config.output), Summary(skipped=len(table.bad))
    if correction is not None:
        shares = zip(correction.shares.tolist(), correction.train_shares, strict=True)
        summary.corrected = dict(zip(label_words, shares, strict=True))
    form = os.path.splitext(output)[1].lower()[1:]
    names = added_columns(table.columns, label_words)
    rows = (row for row in rows_of(table.path, config) if row.problem is None)
    predictions = _read_part(part, label_words, summary, correction)
    beside = f"{output}.{os.getpid()}.new"
    try:
        text: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""}
        mode = {"mode": "wb"} if form == "parquet" else text
        with open(beside, **mode) as stream:
            delimiter = config.csv_delimiter if form == "csv" else None
            writer = RowWriter(stream, form, [*table.columns, *names], delimiter, _schema(table, names, form))
            for chunk in chunks(rows, 4096):
                found = islice(predictions, len(chunk))
                writer.write([with_prediction(row.values, one, names) for row, one in zip(chunk, found, strict=True)])
            writer.close()
        list(predictions)  # reads the end of the last chunk too, for its count
        os.replace(beside, output)
    finally:
        if os.path.exists(beside):
            os.remove(beside)
    os.remove(part)
    return summary


def _schema(table: Table, names: list[str], form: str) -> pyarrow.Schema | None:
    """The column types of a Parquet output, if they are known beforehand."""
    if form != "parquet" or table.path.lower().endswith(".jsonl"):
        return None
    fields = [pyarrow.field(name, pyarrow.string()) for name in table.columns]
    if table.path.lower().endswith(".parquet"):
        fields = list(parquet.read_schema(table.path))
    numbers = [pyarrow.field(name, pyarrow.float64()) for name in names[1:]]
    return pyarrow.schema([*fields, pyarrow.field(names[0], pyarrow.string()), *numbers])


# From and to streams


def predict_stream(
    classifier: Classifier, rows: Iterator[Row], form: str, config: PredictConfig, columns: list[str], column: str
) -> Summary:
    """Classify rows as they arrive and print them. Nothing is saved, so an interrupted command cannot be resumed."""
    names, summary = added_columns(columns, classifier.label_words), Summary()
    is_main = PartialState().is_main_process
    writer = RowWriter(sys.stdout, form, [*columns, *names]) if is_main else None
    for chunk in chunks(rows, config.batch_size * PartialState().num_processes):
        good = [row for row in chunk if row.problem is None]
        summary.skipped += len(chunk) - len(good)
        if len(good) < len(chunk) and not config.skip_bad_rows:
            first = next(row for row in chunk if row.problem is not None)
            raise InputError(f"line {first.line}: {first.problem}. --skip_bad_rows true skips and counts such rows.")
        for row in good:
            if taken := sorted(set(names) & set(row.values)):
                raise InputError(
                    f"line {row.line} has a column {taken[0]!r}, which the first line lacks, so the prediction would "
                    "replace it. Name it in the first line too, or use a file."
                )
        predictions, truncated = classifier.predict([text_of(row, column, config) for row in good])
        summary.truncated += truncated
        for prediction in predictions:
            summary.add(prediction)
        if writer is not None:
            pairs = zip(good, predictions, strict=True)
            writer.write([with_prediction(row.values, found, names) for row, found in pairs])
            sys.stdout.flush()
    return summary


def read_input(config: PredictConfig) -> tuple[Iterator[Row], list[str]]:
    """Read the rows of standard input, and their columns.

    Raises:
        InputError: standard input is empty or in another encoding.
    """
    encoding = config.encoding or getattr(sys.stdin, "encoding", None) or "utf-8"
    if isinstance(sys.stdin, io.TextIOWrapper):  # in some locales, it would take other encodings without an error
        # As for files, a byte order mark, which Excel writes, is no text.
        marked = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        sys.stdin.reconfigure(encoding=marked, errors="strict")
    stream = read_stream(sys.stdin, config.input_format, config.csv_delimiter)
    rows = _decoded(stream, encoding)
    rows = map(_checked, rows) if config.input_format == "jsonl" else rows
    first = next(rows, None)
    if first is None:
        raise InputError("standard input is empty; expected one text per line (--input_format for other formats).")

    def again() -> Iterator[Row]:
        """All rows, including the first."""
        yield first
        yield from rows

    return again(), list(first.values)


def _decoded(rows: Iterator[Row], encoding: str) -> Iterator[Row]:
    """The rows, with an error that names the flag if they are in another encoding."""
    try:
        yield from rows
    except UnicodeError as error:
        raise InputError(
            f"standard input is not in the encoding {encoding} ({error}). Set it with --encoding."
        ) from error
