"""Rows of a file, read and written one after the other: CSV, TSV, JSON lines, Parquet, plain text.

The reader says of each row what is wrong with it and goes on, so that all bad rows of a file can be shown together,
each with the line that it begins on.
"""

import codecs
import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import pyarrow
from pyarrow import parquet

from tweetdora.errors import InputError

ENDINGS = (".csv", ".tsv", ".jsonl")
_PARQUET_ROWS = 4096
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Row:
    """A row of a file: the number of its first line, from 1, and its values by column.

    `problem` says why it could not be read; then it has no values, or None in each column.
    """

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def is_table(path: str) -> bool:
    """Whether the file's name ends as those of data sets that are read here."""
    return os.path.splitext(path)[1].lower() in ENDINGS


def read_any_rows(path: str, delimiter: str | None = None, encoding: str | None = None) -> Iterator[Row]:
    """The rows of a file as read_rows gives them; of Parquet too, and of plain text, a row for each line.

    Raises:
        InputError: there is no such file, it cannot be read, or its name ends otherwise.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (*ENDINGS, ".parquet", ".txt"):
        raise InputError(f"{path}: expected a file whose name ends in {', '.join(ENDINGS)}, .parquet or .txt.")
    if ending == ".parquet":
        return _parquet_rows(path)
    return read_rows(path, delimiter, encoding)


def read_stream(stream: TextIO, form: str, delimiter: str | None = None) -> Iterator[Row]:
    """The rows of an open stream in the form txt, csv, tsv or jsonl.

    Raises:
        InputError: a header is missing.
    """
    if form == "txt":
        return _text_rows(stream)
    if form == "jsonl":
        return _json_rows(stream)
    return _csv_rows(stream, "standard input", delimiter or ("\t" if form == "tsv" else ","))


def read_rows(path: str, delimiter: str | None = None, encoding: str | None = None) -> Iterator[Row]:
    """The rows of a file, blank lines left out; in CSV and TSV the first line names the columns.

    `delimiter` None: a tab in .tsv, a comma in .csv. `encoding` None: UTF-8, with or without a byte order mark.

    Raises:
        InputError: there is no such file, it is in another encoding, or it has no header.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file.")
    ending = os.path.splitext(path)[1].lower()
    try:
        with open(path, encoding=encoding or "utf-8-sig", newline="") as stream:
            if ending == ".jsonl":
                yield from _json_rows(stream)
            elif ending == ".txt":
                yield from _text_rows(stream)
            else:
                yield from _csv_rows(stream, path, delimiter or ("\t" if ending == ".tsv" else ","))
    except UnicodeError as error:  # of UTF-16 without its mark too, which is no UnicodeDecodeError
        raise InputError(
            f"{path} is not in the encoding {encoding or 'utf-8'} ({' '.join(str(error).split())}). Give its own by "
            f"--encoding{_guess_encoding(path)}."
        ) from error


def _text_rows(stream: TextIO) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        yield Row(number, {"text": line.rstrip("\r\n")})


def _parquet_rows(path: str) -> Iterator[Row]:
    if not os.path.isfile(path):
        raise InputError(f"{path}: there is no such file.")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} is not readable Parquet ({' '.join(str(error).split())[:200]}).") from error


def _json_rows(stream: TextIO) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield Row(number, problem=f"is no JSON ({error})")
            continue
        if isinstance(values, dict):
            yield Row(number, values)
        else:
            yield Row(number, problem="is no JSON object")


def _csv_rows(stream: TextIO, path: str, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a text may be longer than the 128 KiB that csv allows otherwise
    lines = _Lines(stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if not header:  # above all quoted names between other delimiters
                hint = hint_for_columns(path, [lines.last])
                raise InputError(f"{path}: its header, {lines.last!r}, cannot be read ({error}). {hint}") from error
            yield Row(line, problem=_csv_problem(line, reader.line_num, error))
            continue
        if not fields:
            continue
        if not header:
            header = _check_header([name.strip() for name in fields], path)
        elif len(fields) != len(header):
            yield Row(
                line,
                dict.fromkeys(header),
                problem=f"has {len(fields)} fields, the header {len(header)} (a text that holds the delimiter needs "
                "quotes)",
            )
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))
    if not header:
        raise InputError(f"{path} is empty; expected a header line with the columns' names, and rows.")


class _Lines:
    """A stream's lines, of which the last one is kept."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.last = stream, ""

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.last = line.rstrip("\r\n")
            yield line


def _csv_problem(first: int, last: int, error: csv.Error) -> str:
    until = f" up to line {last}" if last > first else ""
    return f"has a quote that is not closed, or not at the end of its field{until} ({error})"


def _check_header(header: list[str], path: str) -> list[str]:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path}: its header names {', '.join(map(repr, twice))} more than once.")
    return header


def hint_for_columns(path: str, columns: list[str]) -> str:
    """What may be wrong with a file whose columns are not those that were expected; empty where nothing is known."""
    if any("\0" in name for name in columns):
        return f"Its encoding is another one: give --encoding{_guess_encoding(path)}."
    if len(columns) == 1:
        found = max(_DELIMITERS, key=columns[0].count)
        if found in columns[0]:
            shown = "$'\\t'" if found == "\t" else f'"{found}"'
            return f"Its fields look separated by {_DELIMITERS[found]}: give --csv_delimiter {shown}."
    return ""


def _guess_encoding(path: str) -> str:
    """The end of a sentence that says which encoding to name."""
    if not os.path.isfile(path):  # a folder's files, or standard input
        return ""
    with open(path, "rb") as stream:
        start = stream.read(4096)
    for mark, name in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return f" {name}"
    if b"\0" in start:
        return " utf-16-le" if b"\0" in start[1::2] else " utf-16-be"
    return ", such as latin-1 or cp1252"


class RowWriter:
    """Writes rows to an open file, in the form csv, tsv, jsonl or parquet; rows of one file have the same columns.

    In CSV and TSV what is missing is an empty field, and lists and mappings are JSON.
    """

    def __init__(
        self,
        stream: Any,
        form: str,
        columns: Sequence[str],
        delimiter: str | None = None,
        schema: pyarrow.Schema | None = None,
    ) -> None:
        self._stream, self._form, self._columns, self._schema = stream, form, list(columns), schema
        self._parquet: parquet.ParquetWriter | None = None
        if form in ("csv", "tsv"):
            self._csv = csv.writer(
                stream, delimiter=delimiter or ("\t" if form == "tsv" else ","), lineterminator="\n"
            )
            self._csv.writerow(self._columns)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write some rows."""
        if self._form == "jsonl":
            self._stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif self._form == "parquet":
            self._write_parquet(rows)
        else:
            self._csv.writerows([_as_field(row.get(name)) for name in self._columns] for row in rows)

    def _write_parquet(self, rows: Sequence[dict[str, Any]]) -> None:
        whole = [{name: row.get(name) for name in self._columns} for row in rows]
        try:
            table = pyarrow.Table.from_pylist(whole, schema=self._schema)
        except pyarrow.ArrowException as error:
            raise InputError(
                "Parquet has one type in a column, and these rows have several "
                f"({' '.join(str(error).split())[:200]}). Write .jsonl instead."
            ) from error
        if self._parquet is None:
            self._schema = table.schema
            self._parquet = parquet.ParquetWriter(self._stream, table.schema)
        self._parquet.write_table(table)

    def close(self) -> None:
        """End the file; the stream stays open."""
        if self._parquet is not None:
            self._parquet.close()


def _as_field(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict, bool)) else value
