"""Columns of a data set as sequences whose values stay in Arrow arrays, memory-mapped where the data set is.

A list would hold every text as a Python string, which takes more memory than the text itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow

BLOCK = 4096  # rows that are converted at once


class Column(Sequence[Any]):
    """The values of a column; those that do not fit its Arrow type are in `others`, by row."""

    def __init__(self, values: pyarrow.ChunkedArray, others: dict[int, Any] | None = None) -> None:
        self.values, self.others = values, others or {}

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        return self.others[row] if row in self.others else self.values[row].as_py()

    def part(self, parts: Sequence[range], rows: Sequence[int]) -> "Column":
        """Return these rows, without a copy; `rows` names them one by one, if there are `others`."""
        chunks = [chunk for part in parts for chunk in self.values.slice(part.start, len(part)).chunks]
        others = {number: self.others[row] for number, row in enumerate(rows) if row in self.others}
        return Column(pyarrow.chunked_array(chunks, type=self.values.type), others)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), BLOCK):
            block = self.values.slice(start, BLOCK).to_pylist()
            yield from (self.others.get(row, value) for row, value in enumerate(block, start))


class Texts(Sequence[str]):
    """The stripped texts of a column, or of those rows of it that `rows` names, in that order."""

    def __init__(self, column: Column, rows: Sequence[int] | np.ndarray | None = None) -> None:
        self._column = column
        self._rows = None if rows is None else np.asarray(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._column) if self._rows is None else len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._column[place if self._rows is None else int(self._rows[place])].strip()

    def __iter__(self) -> Iterator[str]:
        texts = iter(self._column) if self._rows is None else (self._column[int(row)] for row in self._rows)
        return (text.strip() for text in texts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(ours == theirs for ours, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self):,} texts: {self[:3]!r}…>"

    def select(self, places: Sequence[int]) -> "Texts":
        """Return the texts at these positions, in this order."""
        chosen = np.asarray(places, dtype=np.int64)
        return Texts(self._column, chosen if self._rows is None else self._rows[chosen])


def select_texts(texts: Sequence[str], places: Sequence[int]) -> Sequence[str]:
    """Return the texts at these positions, in this order."""
    return texts.select(places) if isinstance(texts, Texts) else [texts[place] for place in places]


class ColumnBuilder:
    """Collects the values of a column of texts one by one."""

    def __init__(self) -> None:
        self._chunks: list[pyarrow.Array] = []
        self._block: list[str | None] = []
        self._others: dict[int, Any] = {}

    def append(self, value: Any) -> None:
        """Add a value; one that is no valid text is kept as it is."""
        if value is not None and not is_text(value):
            self._others[len(self._chunks) * BLOCK + len(self._block)] = value
            value = None
        self._block.append(value)
        if len(self._block) == BLOCK:
            self._flush()

    def _flush(self) -> None:
        self._chunks.append(pyarrow.array(self._block, type=pyarrow.string()))
        self._block = []

    def column(self) -> Column:
        """Return the column; nothing can be added afterwards."""
        if self._block:
            self._flush()
        return Column(pyarrow.chunked_array(self._chunks, type=pyarrow.string()), self._others)


def is_text(value: Any) -> bool:
    """True for a string that has an encoding; half of a surrogate pair, which JSON can hold, has none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class Sharer:
    """Returns one object for all equal values of one type, so that a column of labels takes 8 bytes a row."""

    def __init__(self) -> None:
        self._seen: dict[tuple[type, Any], Any] = {}

    def __call__(self, value: Any) -> Any:
        """Return the first value that equals this one."""
        try:
            return self._seen.setdefault((type(value), value), value)
        except TypeError:  # a list or an object, which is no label
            return value
