"""Find and load the target of a script: a run folder, a published model, an adapter or any other model."""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.cli import read_revision, read_task
from tweetdora.config import MAX_NEW_TOKENS, RUNS_DIR, EvaluateConfig, Precision, TaskConfig
from tweetdora.device import can_compute, decide_precision
from tweetdora.errors import InputError
from tweetdora.files import file_sha256
from tweetdora.modeling import (
    DTYPES,
    adapter_folder,
    base_identity,
    load_adapter,
    load_base,
    load_for_merge,
    load_tokenizer,
    merge,
    read_adapter_config,
    read_published_task,
    tokenizer_folder,
)
from tweetdora.priors import label_shares
from tweetdora.prompts import PromptTokenizer, read_prompt_format
from tweetdora.provenance import without_folders
from tweetdora.record_files import read_run
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    RUN_FILE,
    TASK_FILE,
    BaseModelRecord,
    PromptFormat,
    RunRecord,
)


@dataclass(frozen=True)
class EvalTarget:
    """The model to measure: a base model, and the adapter on it if there is one."""

    name: str
    kind: Literal["run", "adapter", "model"]
    base: str
    base_revision: str | None
    adapter_dir: str | None
    tokenizer: str | None  # the one saved with the adapter; None: the base's
    task: TaskConfig
    prompt_format: PromptFormat | None  # None: derive it from the chat template
    max_new_tokens: int | None  # the value the target was trained for; None: unknown
    run: RunRecord | None
    results_dir: str
    label_shares: list[float] | None = None  # in its training data; None: unknown
    corrections: list[str] = field(default_factory=list)  # settings of the task's data that were replaced
    notes: list[str] = field(default_factory=list)  # to be logged


def find_eval_target(name: str, config: EvaluateConfig) -> EvalTarget:
    """Tell whether `name` is a run folder, an adapter or a model, and find its task.

    Raises:
        InputError: a recipe is given for a run, whose record already holds the task, or the run is not finished.
    """
    target = _find_target(name, config)
    task, corrections = correct_task(target.task, config.corrections)
    return replace(target, task=task, corrections=corrections)


def correct_task(task: TaskConfig, given: dict[str, Any]) -> tuple[TaskConfig, list[str]]:
    """The task with its data settings replaced, and the changes in the form of a record's mismatches."""
    changes = dict(given)
    if given.get("dataset_name", task.dataset_name) != task.dataset_name:  # these belong to the old data set
        changes = {"dataset_config": None, "dataset_revision": None, **changes}
        if not _is_moved(task.dataset_name, given["dataset_name"]):
            changes |= {"validation_share": 0.0, "test_share": 0.0}
    for split in ("validation", "test"):
        if f"{split}_split" in given:
            changes[f"{split}_share"] = 0.0
    corrected = replace(task, **changes)
    # The corrections are published on the card, so local folders are removed from them.
    before, now = (
        {name: without_folders(value) if isinstance(value, str) else value for name, value in asdict(found).items()}
        for found in (task, corrected)
    )
    return corrected, [f"{name}: was {before[name]!r}, now {now[name]!r}" for name in now if before[name] != now[name]]


def _is_moved(before: str, now: str) -> bool:
    """True if two names seem to be of one folder or file in two places."""
    is_file = bool(os.path.splitext(now)[1])  # a relative path to a file can look like a Hub id
    names = (os.path.basename(before), os.path.basename(now))
    return without_folders(before) == without_folders(now) or (is_file and names[0] == names[1])


def _find_target(name: str, config: EvaluateConfig) -> EvalTarget:
    if _is_run(name):
        return _run_target(name, config)
    published, notes = None, []
    if config.config is None:
        published = read_published_task(name)
        if published is None:
            default = TaskConfig()
            notes = [
                f"note: no {TASK_FILE} was found with {name}, so the published run's task is used, on "
                f"{default.dataset_name}. --config names a recipe with another task."
            ]
    task = published.task if published else read_task(config.config)
    prompt_format = published.prompt_format if published else None
    if config.prompt_of is not None:
        prompt_format = _prompt_of(config.prompt_of, name, task)
    target = EvalTarget(
        name=name,
        kind="model",
        base=name,
        base_revision=read_revision(config.config, name),
        adapter_dir=None,
        tokenizer=None,
        task=task,
        prompt_format=prompt_format,
        max_new_tokens=published.max_new_tokens if published else None,
        run=None,
        label_shares=published.label_shares if published else None,
        results_dir=config.output_dir or _results_dir(name),
        notes=notes,
    )
    adapter = read_adapter_config(name)
    if adapter is None:
        return target
    base, folder = (
        adapter.base_model_name_or_path or "",
        adapter_folder(name),
    )  # not empty: read_adapter_config checks it
    return replace(
        target,
        kind="adapter",
        base=base,
        base_revision=adapter.revision,
        adapter_dir=folder,
        tokenizer=tokenizer_folder(folder),
    )


def _run_target(name: str, config: EvaluateConfig) -> EvalTarget:
    """The target of a finished run, whose record holds task and prompt."""
    run = read_run(name)
    if config.config is not None:
        raise InputError(f"--config {config.config}: the task of {name} is in its {RUN_FILE}; leave the flag out.")
    if config.prompt_of is not None:
        raise InputError(f"--prompt_of {config.prompt_of}: {name} has its own prompt; leave the flag out.")
    return EvalTarget(
        name=name,
        kind="run",
        base=run.base_model.name_or_path,
        base_revision=run.base_model.revision,
        adapter_dir=os.path.join(name, ADAPTER_DIR),
        tokenizer=tokenizer_folder(os.path.join(name, ADAPTER_DIR)),
        task=run.task,
        prompt_format=run.prompt_format,
        max_new_tokens=run.max_new_tokens,
        run=run,
        label_shares=label_shares(run.train_data, run.task.label_words, run.task.balance_labels),
        results_dir=config.output_dir or os.path.join(name, "evaluation"),
    )


def _prompt_of(run_dir: str, name: str, task: TaskConfig) -> PromptFormat:
    """The prompt format of a run with the same question as the task of the model `name`."""
    run = read_run(run_dir)
    if (task.system_prompt, task.label_words) != (run.task.system_prompt, run.task.label_words):
        raise InputError(
            f"--prompt_of {run_dir}: that run has another system prompt or other label words than the task of {name}. "
            "Name the run's recipe with --config."
        )
    return run.prompt_format


def _is_run(name: str) -> bool:
    if os.path.isdir(name):
        return not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json"))
    return os.path.normpath(name).startswith(RUNS_DIR + os.sep)  # a mistyped run folder, not a Hub id


def _results_dir(name: str) -> str:
    """The results folder of a model or adapter: runs/evaluations/owner--name, so that a/x and b/x do not collide.

    It is not runs/name, because that run may have been published as owner/name.
    """
    path = os.path.relpath(name)
    if path == os.curdir or path.startswith(os.pardir):
        path = os.path.abspath(name)
    return os.path.join(RUNS_DIR, "evaluations", path.strip(os.sep).replace(os.sep, "--"))


@dataclass(frozen=True)
class Decoding:
    """How a measurement generates its answers, and notes to log about it."""

    precision: Precision
    reason: str
    max_new_tokens: int
    notes: list[str]


def decide_decoding(target: EvalTarget, config: EvaluateConfig, device_type: str) -> Decoding:
    """Choose the precision and token budget: from the flags, else as the run was trained, else the defaults.

    Raises:
        InputError: the device cannot compute in the requested precision.
    """
    launcher, run = os.environ.get("ACCELERATE_MIXED_PRECISION"), target.run
    notes = []
    precision, reason = decide_precision(config.precision, set(), launcher, device_type)
    if run is not None and precision != run.training.precision:
        if not reason.startswith("asked for") and can_compute(run.training.precision, device_type):
            precision, reason = run.training.precision, "as the run was trained"
        else:
            notes.append(f"note: answers in {precision} ({reason}); the run was trained in {run.training.precision}.")
    elif run is not None and not reason.startswith("asked for"):
        reason = "as the run was trained"
    trained_with = target.max_new_tokens
    budget = config.max_new_tokens or trained_with or MAX_NEW_TOKENS
    if trained_with is not None and budget != trained_with:
        notes.append(f"note: --max_new_tokens {budget}; {target.name} was trained for {trained_with}.")
    return Decoding(precision, reason, budget, notes)


# Loading


def load_prompts(target: EvalTarget, revision: str | None) -> tuple[PreTrainedTokenizerBase, PromptTokenizer]:
    """Load the target's tokenizer, and the prompt tokenizer built on it; `revision` is the base's commit.

    Raises:
        InputError: the model does not exist, or its chat template does not fit.
        HubError: the Hub cannot be reached.
    """
    tokenizer = load_tokenizer(*((target.tokenizer, None) if target.tokenizer else (target.base, revision)))
    prompt_format = target.prompt_format or read_prompt_format(tokenizer, target.task)
    return tokenizer, PromptTokenizer(tokenizer, prompt_format, target.task.max_length)


def load_target_base(
    target: EvalTarget, revision: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, BaseModelRecord]:
    """Load the target's base model at commit `revision`, and return it with its identity.

    It is in `dtype`; or, if there is an adapter, ready for a merge with a result in `dtype`.

    Raises:
        InputError: it is not the base that the run was trained on.
        HubError: the Hub cannot be reached.
    """
    load = load_for_merge if target.adapter_dir else load_base
    model = load(target.base, revision, dtype, device)
    identity = base_identity(model, target.base, revision)
    if target.run is not None and identity != target.run.base_model:
        raise InputError(
            f"{target.base} is not the base model that {target.name} was trained on: found {asdict(identity)}; the "
            f"run's record has {asdict(target.run.base_model)}."
        )
    return model, identity


def merge_adapter(model: PreTrainedModel, adapter_dir: str, dtype: torch.dtype) -> PreTrainedModel:
    """Merge the adapter into a base of `load_target_base`, with a result in `dtype`, as publishing does."""
    return merge(load_adapter(model, adapter_dir), dtype)


def adapter_sha256(adapter_dir: str) -> str:
    """SHA-256 of the adapter's weights."""
    return file_sha256(os.path.join(adapter_dir, ADAPTER_WEIGHTS))


def load_finetuned(
    target: EvalTarget, revision: str | None, precision: Precision, device: torch.device
) -> tuple[PreTrainedModel, BaseModelRecord]:
    """Load the model that answers, with the adapter merged if there is one, and the base's identity."""
    dtype = DTYPES[precision]
    model, identity = load_target_base(target, revision, dtype, device)
    return merge_adapter(model, target.adapter_dir, dtype) if target.adapter_dir else model, identity
