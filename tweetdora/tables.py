"""Read and write files row by row: CSV, TSV, JSON lines, Parquet, plain text.

The reader reports what is wrong with a row and continues, so that all bad rows of a file can be shown together, each
with the line that it starts on.
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

    `problem` says why it could not be read; it then has no values, or None in each column.
    """

    line: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def is_table(path: str) -> bool:
    """True if the file name has one of the endings that this module reads."""
    return os.path.splitext(path)[1].lower() in ENDINGS


def read_any_rows(path: str, delimiter: str | None = None, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file like read_rows, also of Parquet and plain text (one row per line).

    Raises:
        InputError: the file is missing or cannot be read, or its name has another ending.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in (*ENDINGS, ".parquet", ".txt"):
        raise InputError(f"{path}: expected a file name that ends in {', '.join(ENDINGS)}, .parquet or .txt.")
    if ending == ".parquet":
        return _parquet_rows(path)
    return read_rows(path, delimiter, encoding)


def read_stream(stream: TextIO, form: str, delimiter: str | None = None) -> Iterator[Row]:
    """Yield the rows of an open stream in the format txt, csv, tsv or jsonl.

    Raises:
        InputError: the header is missing.
    """
    if form == "txt":
        return _text_rows(stream)
    if form == "jsonl":
        return _json_rows(stream)
    return _csv_rows(stream, "standard input", delimiter or ("\t" if form == "tsv" else ","))


def read_rows(path: str, delimiter: str | None = None, encoding: str | None = None) -> Iterator[Row]:
    """Yield the rows of a file without blank lines; in CSV and TSV the first line names the columns.

    `delimiter` None: a tab in .tsv, a comma in .csv. `encoding` None: UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file is missing, is in another encoding, or has no header.
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
    except UnicodeError as error:  # UTF-16 without its mark is not a UnicodeDecodeError
        raise InputError(
            f"{path} is not in the encoding {encoding or 'utf-8'} ({' '.join(str(error).split())}). Set it with "
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
    csv.field_size_limit(sys.maxsize)  # by default csv refuses texts of more than 128 KiB
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
            if not header:  # typically quoted names between other delimiters
                hint = hint_for_columns(path, [lines.last])
                raise InputError(f"{path}: its header, {lines.last!r}, cannot be read ({error}). {hint}") from error
            if reader.line_num > line and "end of data" in str(error):  # skipping it would skip all that follows
                raise InputError(
                    f"{path}, line {line}: a quote is opened and not closed until the end of the file, line "
                    f"{reader.line_num:,}. Close it. If it is part of the text, put the field in quotes and double "
                    "the quotes in it."
                ) from error
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
                problem=f"has {len(fields)} fields, the header {len(header)} (a text that contains the delimiter "
                "needs quotes)",
            )
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))
    if not header:
        raise InputError(f"{path} is empty; expected a header line with the column names, and rows.")


class _Lines:
    """Iterate over a stream's lines and keep the last one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.last = stream, ""

    def __iter__(self) -> Iterator[str]:
        for line in self._stream:
            self.last = line.rstrip("\r\n")
            yield line


def _csv_problem(first: int, last: int, error: csv.Error) -> str:
    until = f" up to line {last}" if last > first else ""
    return f"has a quote that is not closed, or that closes before the end of its field{until} ({error})"


def _check_header(header: list[str], path: str) -> list[str]:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise InputError(f"{path}: its header names {', '.join(map(repr, twice))} more than once.")
    return header


def hint_for_columns(path: str, columns: list[str]) -> str:
    """Guess why a file has unexpected columns; empty if there is no guess."""
    if any("\0" in name for name in columns):
        return f"It has another encoding: set --encoding{_guess_encoding(path)}."
    if len(columns) == 1:
        found = max(_DELIMITERS, key=columns[0].count)
        if found in columns[0]:
            shown = "$'\\t'" if found == "\t" else f'"{found}"'
            return f"Its fields seem to be separated by {_DELIMITERS[found]}: set --csv_delimiter {shown}."
    return ""


def _guess_encoding(path: str) -> str:
    """Return the end of a sentence that suggests an encoding."""
    if not os.path.isfile(path):  # files of a folder, or standard input
        return ""
    with open(path, "rb") as stream:
        start = stream.read(4096)
    for mark, name in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            return f" {name}"
    if b"\0" in start:
        return " utf-16-le" if b"\0" in start[1::2] else " utf-16-be"
    return ", such as latin-1 or cp1252"


class _UnixLines:
    """A stream for csv.writer, which calls it once a row, that ends the rows with "\\n"."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, row: str) -> int:
        """Write a row."""
        return self._stream.write(row.removesuffix("\r\n") + "\n")


class RowWriter:
    """Write rows to an open file as csv, tsv, jsonl or parquet; all rows of a file have the same columns.

    In CSV and TSV, missing values are empty fields, and lists and mappings are JSON. In JSON, what it has no form for,
    such as a time, is a string.
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
            # Before Python 3.11.9, csv quotes a field with "\r" only if lines end with it.
            self._csv = csv.writer(
                _UnixLines(stream), delimiter=delimiter or ("\t" if form == "tsv" else ","), lineterminator="\r\n"
            )
            self._csv.writerow(self._columns)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows."""
        if self._form == "jsonl":
            self._stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
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
                "Parquet allows one type per column, but these rows have several "
                f"({' '.join(str(error).split())[:200]}). Write .jsonl instead."
            ) from error
        if self._parquet is None:
            self._schema = table.schema
            self._parquet = parquet.ParquetWriter(self._stream, table.schema)
        self._parquet.write_table(table)

    def close(self) -> None:
        """Finish the file; the stream stays open."""
        if self._parquet is not None:
            self._parquet.close()


def _as_field(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict, bool)) else value
