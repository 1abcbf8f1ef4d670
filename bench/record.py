"""The bench's record: for each part, how, on what and with which code it was measured, and every raw sample."""

import os
from dataclasses import asdict, dataclass
from typing import Any

from bench.settings import Settings
from tweetdora.errors import InputError
from tweetdora.files import read_json, write_json
from tweetdora.record_files import decode
from tweetdora.records import DataSource, Environment

BENCH_VERSION = 2


@dataclass(frozen=True)
class BenchData(DataSource):
    """The examples that were trained on or answered."""

    num_examples: int
    sha256: str


@dataclass(frozen=True)
class BenchPart:
    """One part, such as training; `samples` are keyed by variant, such as bf16."""

    created: str
    command: str
    settings: Settings
    data: BenchData
    openmp: dict[str, str | None]
    environment: Environment
    stolen_share: float | None  # share of the cores' time that the host gave to others
    samples: dict[str, Any]


@dataclass(frozen=True)
class BenchRecord:
    """The parts, which may have been measured at different times."""

    parts: dict[str, BenchPart]


def write_bench(path: str, record: BenchRecord) -> None:
    """Write the record atomically."""
    write_json(path, {"record_version": BENCH_VERSION, **asdict(record)})


def read_bench(path: str) -> BenchRecord:
    """Read a record; return an empty one if there is no file.

    Raises:
        InputError: The record's version is not supported, or its fields are not those of BenchRecord.
    """
    if not os.path.isfile(path):
        return BenchRecord({})
    value = read_json(path)
    version = value.pop("record_version", None)
    if version not in (1, BENCH_VERSION):
        raise InputError(f"{path} has record version {version}; python -m bench reads 1 and {BENCH_VERSION}.")
    return decode(BenchRecord, value if version == BENCH_VERSION else _from_version_1(value), path)


_RENAMED = {
    "answer_batch": "generation_batch",
    "answer_rows": "generation_examples",
    "row_tokens": "sequence_lengths",
    "rows": "num_examples",
    "train_rows": "train_examples",
    "validation_rows": "validation_examples",
}


def _from_version_1(value: Any) -> Any:
    """Convert a record of version 1 to current names; its data was local, and changes of its code have no hash."""
    if isinstance(value, list):
        return [_from_version_1(item) for item in value]
    if not isinstance(value, dict):
        return value
    new = {_RENAMED.get(name, name): _from_version_1(item) for name, item in value.items()}
    if "environment" in new:  # a part
        new["data"] = {"local": True, **new["data"]}
        if new["environment"]["git"]:
            new["environment"]["git"] = {"changes_sha256": None, **new["environment"]["git"]}
    return new
