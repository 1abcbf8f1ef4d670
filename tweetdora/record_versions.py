"""Convert records of older versions: each step leads from one version to the next."""

import dataclasses
from collections.abc import Callable
from typing import Any

from tweetdora.errors import InputError
from tweetdora.records import (
    BaseModelCard,
    DatasetCard,
    EvaluationRecord,
    PredictionRecord,
    PublishedTask,
    PublishRecord,
    RunRecord,
)

OLDEST_VERSION = 2  # that can be read


def to_current_version(kind: type, value: dict[str, Any], version: int, where: str) -> dict[str, Any]:
    """Convert the JSON of a record from `version` to RECORD_VERSION.

    where: the file, for messages.

    Raises:
        InputError: the record lacks what a record of its version has.
    """
    try:
        for convert in _CONVERSIONS[version - OLDEST_VERSION :]:
            value = convert(kind, value)
    except (KeyError, TypeError) as error:  # a field is missing, unknown or of the wrong type
        raise InputError(
            f"{where} does not hold the fields of {kind.__name__} in version {version} ({type(error).__name__}: "
            f"{error}). The file was changed, or other code wrote it."
        ) from error
    return value


def to_current_prediction(line: Any, where: str) -> Any:
    """Convert a line of predictions.jsonl; as it holds no version, its names tell it.

    Raises:
        InputError: as for to_current_version.
    """
    if not isinstance(line, dict):
        return line
    if "row" in line:  # version 2 called example_id so
        return to_current_version(PredictionRecord, line, 2, where)
    if isinstance(line.get("base"), dict) and "log_likelihoods" not in line["base"]:
        return to_current_version(PredictionRecord, line, 3, where)
    if isinstance(line.get("base"), dict) and "likeliest" not in line["base"]:
        return to_current_version(PredictionRecord, line, 10, where)
    return line  # predictions have not changed since version 11


# Names of record version 2 that have been renamed.
_RENAMED = {
    "after": "finetuned",
    "answer": "text",
    "answers": "completions",
    "base": "base_model",
    "base_card": "base_model_card",
    "before": "base",
    "changes": "mismatches",
    "class_counts": "label_counts",
    "cut_texts": "truncated",
    "equal_answers": "equal_generations",
    "eval_exact_rate": "eval_exact_match",
    "eval_stop_rate": "eval_eos_rate",
    "exact_rate": "exact_match",
    "examples": "first_texts",
    "n": "num_examples",
    "per_class": "per_label",
    "per_class_f1": "per_label_f1",
    "reference_lines": "baselines",
    "row": "example_id",
    "row_tokens": "sequence_lengths",
    "rows": "num_examples",
    "stop_rate": "eos_rate",
    "tweets_per_second": "samples_per_second",
}
_KEYED_BY_LABEL = ("class_counts", "examples", "per_class")  # whose keys are label words, and may equal a name above


def _from_version_2(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 2 to version 3: rename its fields, and fill those that it left out with None."""

    def rename(found: Any, by_label: bool = False) -> Any:
        """Rename the keys at every depth of `found`."""
        if isinstance(found, list):
            return [rename(item) for item in found]
        if not isinstance(found, dict):
            return found
        return {
            name if by_label else _RENAMED.get(name, name): rename(item, not by_label and name in _KEYED_BY_LABEL)
            for name, item in found.items()
        }

    new = rename(value)
    if kind is RunRecord:
        new = {"tracker": None, "result": None, **new}
        new["adapter"] = {"sha256": None, **new["adapter"]}
        new["base_model_card"] = dataclasses.asdict(BaseModelCard(**new["base_model_card"]))
        if new["training"]["batching"] == "packed":
            new["training"]["batching"] = "shared_prefix"
    if kind in (EvaluationRecord, PredictionRecord):
        if "base" not in new:  # version 2 called a model alone `after`
            new["base"] = new.pop("finetuned")
        new = {"finetuned": None, **({"difference": None} if kind is EvaluationRecord else {}), **new}
    return new


# Fields added to a task in version 4, with the values that older records imply; those of version 5 follow.
_NEW_IN_4 = {
    "csv_delimiter": None,
    "encoding": None,
    "validation_share": 0.0,
    "test_share": 0.0,
    "split_seed": 42,
    "skip_bad_rows": False,
    "chat_template": None,
    "chat_template_kwargs": None,
}
_NEW_IN_5: dict[str, dict[str, Any]] = {"task": {"balance_labels": False}, "model": {"use_rslora": False}}


def _from_version_3(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 3 to version 4: add the new fields."""
    if kind is RunRecord:
        data = {name: value[name] and {"skipped": {}, **value[name]} for name in ("train_data", "validation_data")}
        return {"notes": [], **value, **data, "task": {**_NEW_IN_4, **value["task"]}}
    if kind is EvaluationRecord:
        models = {name: value[name] and {"likelihood": None, **value[name]} for name in ("base", "finetuned")}
        baselines = {"others": [], **value["baselines"]}
        data = {"skipped": {}, **value["data"]}
        return {"notes": [], "corrections": [], **value, **models, "baselines": baselines, "data": data}
    if kind is PredictionRecord:
        return value | {
            name: value[name] and {"log_likelihoods": None, **value[name]} for name in ("base", "finetuned")
        }
    return value


def _from_version_4(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 4 to version 5: add the new fields."""
    if kind is EvaluationRecord:
        return {"base_measured": None, **value}
    if kind is PublishRecord:
        return {"space": None, **value}
    return value | {name: {**new, **value[name]} for name, new in _NEW_IN_5.items() if name in value}


def _from_version_5(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 5 to version 6: add the new fields."""
    if kind is EvaluationRecord:
        return {"prior_corrected": None, **value}
    if kind is PublishedTask:
        return {"label_shares": None, **value}
    return value


def _from_version_6(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 6 to version 7: add the new fields."""
    if kind is RunRecord:
        card = {"paper": None, "citation": None, **value["base_model_card"]}
        return {"dataset_card": dataclasses.asdict(DatasetCard()), **value, "base_model_card": card}
    return value


def _from_version_7(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 7 to version 8: add the new field."""
    if kind is RunRecord:
        return {**value, "training": {"shard_base": False, **value["training"]}}
    return value


def _from_version_8(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 8 to version 9: add the new field."""
    if kind is RunRecord:
        return {**value, "model": {**value["model"], "load_in_4bit": False}}
    return value


def _from_version_9(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 9 to version 10: add the new field."""
    if kind is EvaluationRecord:
        return {"max_length": None, **value}
    return value


def _from_version_10(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 10 to version 11: add the new field."""
    if kind is PredictionRecord:
        return value | {name: value[name] and {"likeliest": None, **value[name]} for name in ("base", "finetuned")}
    return value


# From OLDEST_VERSION on.
_CONVERSIONS: tuple[Callable[[type, dict[str, Any]], dict[str, Any]], ...] = (
    _from_version_2,
    _from_version_3,
    _from_version_4,
    _from_version_5,
    _from_version_6,
    _from_version_7,
    _from_version_8,
    _from_version_9,
    _from_version_10,
)

RECORD_VERSION = OLDEST_VERSION + len(_CONVERSIONS)
