"""Write and read the files of records.py."""

import dataclasses
import json
import os
import types
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tweetdora.config import RUNS_DIR
from tweetdora.errors import InputError
from tweetdora.files import file_sha256, read_json, write_json
from tweetdora.record_versions import OLDEST_VERSION, RECORD_VERSION, to_current_prediction, to_current_version
from tweetdora.records import ADAPTER_DIR, ADAPTER_WEIGHTS, RUN_FILE, PredictionRecord, RunRecord

Record = TypeVar("Record")


def write_record(path: str, record: Any) -> None:
    """Write a record atomically: a reader finds either the old file or the complete new one."""
    write_json(path, {"record_version": RECORD_VERSION, **dataclasses.asdict(record)})


def read_record(kind: type[Record], path: str, oldest_version: int = OLDEST_VERSION) -> Record:
    """Read a record.

    Raises:
        InputError: the file is missing, is not JSON, has a version that cannot be read, or does not match `kind`.
    """
    value = read_json(path)
    version = value.pop("record_version", None) if isinstance(value, dict) else None
    if not isinstance(version, int) or not oldest_version <= version <= RECORD_VERSION:
        older = [str(number) for number in range(oldest_version, RECORD_VERSION)]
        read = f"{', '.join(older)} and {RECORD_VERSION}" if older else RECORD_VERSION
        raise InputError(
            f"{path} has record version {version}; this code reads version {read}. Use the version of "
            "tweetdora that wrote it, or create the record again."
        )
    return decode(kind, to_current_version(kind, value, version, path), path)


def write_predictions(path: str, predictions: Iterable[PredictionRecord]) -> None:
    """Write one JSON line per example."""
    with open(path, "w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(dataclasses.asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: str) -> list[PredictionRecord]:
    """Read the lines that write_predictions wrote, in order.

    Raises:
        InputError: the file is missing, or a line is invalid.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [json.loads(line) for line in stream]
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} has a line that is not JSON ({error}); the file was cut off.") from None
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [
        decode(PredictionRecord, to_current_prediction(line, where), where)
        for line, where in zip(lines, places, strict=True)
    ]


def read_run(run_dir: str) -> RunRecord:
    """Read the record of a finished run.

    Raises:
        InputError: the folder is not a run folder, its training did not finish, or its adapter is missing or changed.
    """
    path = os.path.join(run_dir, RUN_FILE)
    if not os.path.isfile(path):
        runs = sorted(name for name in _folders(RUNS_DIR) if os.path.isfile(os.path.join(RUNS_DIR, name, RUN_FILE)))
        known = f"Run folders here: {', '.join(os.path.join(RUNS_DIR, name) for name in runs)}." if runs else ""
        why = f"it has no {RUN_FILE}" if os.path.isdir(run_dir) else "the folder does not exist"
        raise InputError(f"{run_dir} is not a run folder: {why}. Train first with train.py. {known}".rstrip())
    run = read_record(RunRecord, path)
    if run.status != "finished" or run.result is None:
        raise InputError(
            f"the run in {run_dir} is {run.status}, not finished. Resume it with its train.py command and "
            "--resume_from_checkpoint true."
        )
    weights = os.path.join(run_dir, ADAPTER_DIR, ADAPTER_WEIGHTS)
    if not os.path.isfile(weights):
        raise InputError(f"{weights} is missing, but the run record says that the run finished.")
    if file_sha256(weights) != run.adapter.sha256:
        raise InputError(f"{weights} is not the adapter that {path} describes: its SHA-256 differs.")
    return run


def run_status(run_dir: str) -> str | None:
    """The status of the run in a folder, for any record version; None if there is no record."""
    path = os.path.join(run_dir, RUN_FILE)
    return read_json(path)["status"] if os.path.exists(path) else None


def _folders(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def decode(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to an object of type `kind`.

    >>> from tweetdora.records import Bootstrap
    >>> decode(Bootstrap, {"samples": 10, "seed": 0}, "test.json")
    Bootstrap(samples=10, seed=0)

    Raises:
        InputError: a field is missing, unknown or of the wrong type; the message names it by `where` and its path.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return decode(options[0], value, where)
        for option in options:
            if isinstance(value, get_origin(option) or option):
                return decode(option, value, where)
    elif origin is list and isinstance(value, list):
        return [decode(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    elif origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(decode(part, item, where) for part, item in zip(arguments, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif (
        kind is Any or (origin is Literal and value in arguments) or type(value) is kind
    ):  # type(), because True is an instance of int
        return value
    elif kind is float and type(value) is int:  # other programs write 1.0 as 1
        return float(value)
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise InputError(f"{where} is {value!r}; expected {expected}. The file was changed, or other code wrote it.")


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, names = get_type_hints(kind), [item.name for item in dataclasses.fields(kind)]
    for what, wrong in (("no", [*filter(lambda n: n not in value, names)]), ("unknown", [*value.keys() - {*names}])):
        if wrong:
            raise InputError(
                f"{where} has {what} {', '.join(sorted(wrong))}; expected exactly the fields of {kind.__name__}. The "
                "file was changed, or other code wrote it."
            )
    return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names})
