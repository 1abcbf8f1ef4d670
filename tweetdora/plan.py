"""What a training run is: checked and described before it starts. The description is the beginning of its record."""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import PeftModel

from tweetdora.checkpoints import all_checkpoints, find_damage, last_whole_checkpoint
from tweetdora.config import (
    PUBLISHED_REPO,
    RECIPE_ARGUMENTS,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    is_published_run,
)
from tweetdora.data import Rows, class_counts, first_of_each_class
from tweetdora.errors import InputError
from tweetdora.modeling import trainable_parameters
from tweetdora.prompts import EncodedRows, Encoder
from tweetdora.records import (
    RECORD_VERSION,
    RUN_FILE,
    command_line,
    environment,
    read_json,
    tensors_sha256,
    utc_now,
)
from tweetdora.tracking import wandb_mode

# Trainer arguments that change the result of a run, if only by rounding; the record names them, and a resumed run must
# have the same.
RESULT_ARGUMENTS = (
    *RECIPE_ARGUMENTS,
    "gradient_accumulation_steps",
    "world_size",
    "precision",
    "tf32",
    "batching",
    "full_determinism",
)


# What a resumed run may have otherwise, where the user says so, and what that does to it.
_ROUNDING = "sums are taken in another order, so the last digits differ; dropout, if there is any, drops other values"
_MAY_DIFFER = {
    "training.world_size": _ROUNDING,
    "training.gradient_accumulation_steps": _ROUNDING,
    "training.batching": _ROUNDING,
    "code": "another state of this repository; what changed in it is not known here",
    "packages": "other versions of libraries; what changed in them is not known here",
}


def find_checkpoint(training: TrainConfig) -> tuple[str | None, list[str]]:
    """The checkpoint to go on from, None for a new run; and a line for each damaged one that is passed over.

    Raises:
        InputError: the run folder is taken, there is nothing to go on from, or something that is allowed to differ
            cannot be.
    """
    if unknown := sorted(set(training.allow_changes) - _MAY_DIFFER.keys()):
        raise InputError(f"--allow_changes {' '.join(unknown)}: expected some of {', '.join(_MAY_DIFFER)}.")
    asked = training.resume_from_checkpoint
    folder = training.output_dir
    run_file = os.path.join(folder, RUN_FILE)
    status = read_json(run_file)["status"] if os.path.exists(run_file) else None
    if asked in (None, "", "false", "False"):
        training.resume_from_checkpoint = None
        if status or all_checkpoints(folder):
            resume = {"finished": "Choose", "diverged": "Lower --learning_rate and choose"}.get(
                status or "", "Go on with it by --resume_from_checkpoint true, or choose"
            )
            raise InputError(
                f"--output_dir {folder} already holds a run ({status or 'unfinished'}). {resume} another "
                "--output_dir, or delete the folder."
            )
        return None, []
    if status == "finished":
        raise InputError(f"the run in {folder} is finished; there is nothing to resume. Choose another --output_dir.")
    if asked in ("true", "True"):
        if status and not all_checkpoints(folder):
            training.resume_from_checkpoint = None
            return None, [f"note: the run in {folder} was stopped before its first checkpoint; it begins again."]
        return _newest_checkpoint(folder)
    if not os.path.isdir(asked):
        raise InputError(f"--resume_from_checkpoint {asked}: there is no such checkpoint.")
    if (damage := find_damage(asked)) is not None:
        raise InputError(f"--resume_from_checkpoint {asked}: {damage}. Name another, or give `true` for the newest.")
    elsewhere = os.path.dirname(os.path.abspath(asked)) != os.path.abspath(folder)
    if elsewhere and (status or all_checkpoints(folder)):
        raise InputError(
            f"--resume_from_checkpoint {asked} is of another run than --output_dir {folder}, which holds one already. "
            "Choose an empty --output_dir."
        )
    return asked, []


def _newest_checkpoint(folder: str) -> tuple[str, list[str]]:
    """The newest checkpoint that is whole, and what is to be said of newer ones."""
    checkpoint, damaged = last_whole_checkpoint(folder)
    if checkpoint is None:
        found = "; ".join(f"{path} is damaged, {damage}" for path, damage in damaged.items())
        raise InputError(
            f"--resume_from_checkpoint true: found no {'whole ' if found else ''}checkpoint in {folder}"
            f"{f' ({found})' if found else ''}. Leave the flag out to start anew (and delete the folder if it holds "
            "an unfinished run)."
        )
    return checkpoint, [
        f"note: {path} is damaged and passed over ({damage}); going on from {checkpoint}."
        for path, damage in damaged.items()
    ]


def check_disk(training: TrainConfig, trainable: int) -> None:
    """Refuse to start where the checkpoints will not fit.

    A checkpoint is the adapter and AdamW's two moments in float32; one more than --save_total_limit exists while a
    new one is written.

    Raises:
        InputError: too little room, or the folder cannot be written.
    """
    needed = trainable * 4 * 3 * ((training.save_total_limit or 10) + 1) + 50_000_000
    try:
        os.makedirs(training.output_dir, exist_ok=True)
        free = shutil.disk_usage(training.output_dir).free
        writable = os.access(training.output_dir, os.W_OK)
    except OSError as error:
        raise InputError(f"--output_dir {training.output_dir} cannot be made: {error}") from error
    if not writable:
        raise InputError(f"--output_dir {training.output_dir} is not writable; choose another folder.")
    if free < needed:
        raise InputError(
            f"--output_dir {training.output_dir}: {free / 1e6:,.0f} MB free, but adapter, checkpoints and plots need "
            f"about {needed / 1e6:,.0f} MB. Make room, choose another folder, or lower --save_total_limit."
        )


def describe_run(
    *,
    task: TaskConfig,
    model_config: ModelConfig,
    training: TrainConfig,
    base: dict[str, Any],
    base_card: dict[str, Any],
    model: PeftModel,
    encoder: Encoder,
    train_rows: Rows,
    encoded: EncodedRows,
    validation_rows: Rows | None,
) -> dict[str, Any]:
    """Everything that is known of a run before its first step, as the record keeps it."""
    arguments = {name: getattr(training, name) for name in RESULT_ARGUMENTS}
    arguments = {name: getattr(value, "value", value) for name, value in arguments.items()}
    adapter_start = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    hub_model_id = training.hub_model_id or (
        PUBLISHED_REPO if is_published_run(task, model_config, training) else None
    )
    return {
        "record_version": RECORD_VERSION,
        "name": training.run_name,
        "status": "planned",
        "created": utc_now(),
        "command": command_line(),
        "task": dataclasses.asdict(task),
        "model": dataclasses.asdict(model_config),
        "training": arguments,
        "device": training.device.type,
        "precision_reason": training.precision_reason,
        "max_new_tokens": training.max_new_tokens,
        "hub_model_id": hub_model_id,
        "base": base,
        "base_card": base_card,
        "prompt_format": encoder.format.to_dict(),
        "adapter": {
            "trainable_parameters": trainable_parameters(model),
            "start_sha256": tensors_sha256(adapter_start),
        },
        "train_data": {
            **train_rows.source,
            "class_counts": class_counts(train_rows, task),
            "tokens": encoded.tokens,
            "supervised_tokens": encoded.supervised_tokens,
            "row_tokens": encoded.row_tokens,
            "cut_texts": encoded.cut_texts,
            "examples": first_of_each_class(train_rows, task),
        },
        "validation_data": validation_rows
        and {**validation_rows.source, "class_counts": class_counts(validation_rows, task)},
        "steps": count_steps(training, len(train_rows)),
        "changes": [],  # what was otherwise when the run was resumed
        "environment": environment(),
    }


def count_steps(training: TrainConfig, rows: int) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    if training.max_steps > 0:
        return training.max_steps
    batches = rows / (training.world_size * training.per_device_train_batch_size)
    batches = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    steps_per_epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    return math.ceil(training.num_train_epochs * steps_per_epoch)


def format_plan(run: dict[str, Any], training: TrainConfig) -> str:
    """The plan as a person reads it before the first step."""
    data, base, validation = run["train_data"], run["base"], run["validation_data"]
    adapter, settings = run["adapter"]["trainable_parameters"], run["model"]
    device = training.device.type if training.device.type == "cpu" else torch.cuda.get_device_name(training.device)
    threads = f", {training.cpu_threads} threads each" if training.device.type == "cpu" else ""
    counts = ", ".join(f"{count:,} {word}" for word, count in data["class_counts"].items())
    name = "/".join(filter(None, (data["name"], data["config"])))
    lines = [
        ("base model", f"{base['name_or_path']} ({base['architecture']}, {base['parameters']:,} parameters)"),
        (
            "adapter",
            f"{settings['method']} on {', '.join(settings['target_modules'])}, r {settings['r']}, "
            f"alpha {settings['lora_alpha']}: {adapter:,} trainable parameters ({adapter / base['parameters']:.3%})",
        ),
        ("training rows", f"{data['rows']:,} of {name}, {data['split']}: {counts}"),
        (
            "tokens",
            f"{data['tokens']:,}, of which {data['supervised_tokens']:,} carry loss; {data['cut_texts']:,} texts cut "
            f"to --max_length {run['task']['max_length']}",
        ),
        (
            "validation",
            f"{validation['rows']:,} rows {_every(training.eval_steps)} and at the end" if validation else "none",
        ),
        (
            "steps",
            f"{run['steps']:,} of {training.global_batch_size} rows = {training.world_size} process(es) x "
            f"{training.gradient_accumulation_steps} x {training.per_device_train_batch_size}; "
            f"learning rate {training.learning_rate:g}, {run['training']['lr_scheduler_type']}",
        ),
        ("device", f"{device}{threads}"),
        ("precision", f"{training.precision}: {training.precision_reason}"),
        ("tracker", _tracker_line(training)),
        ("run folder", training.output_dir),
    ]
    if training.visible_gpus > 1:
        number = training.visible_gpus
        lines.append(
            ("note", f"{number} GPUs are visible, 1 is used: accelerate launch --multi_gpu train.py uses all")
        )
    if run["prompt_format"]["system_in_user_turn"]:
        lines.append(("note", "the chat template takes no system message: the prompt heads the user's turn"))
    return "\n".join(f"  {label:<14} {text}" for label, text in lines)


def _every(steps: float) -> str:
    """How often something happens; below 1 the Trainer takes it for a share of all steps."""
    return f"every {100 * steps:g} % of the steps" if steps < 1 else f"every {steps:g} steps"


def _tracker_line(training: TrainConfig) -> str:
    trackers = []
    for name in training.report_to or ["none"]:
        mode, reason = wandb_mode() if name == "wandb" else ("", "")
        trackers.append(f"wandb, {mode}: {reason}" if name == "wandb" else name)
    return "; ".join(trackers)


def check_same_run(saved: dict[str, Any], planned: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Refuse to resume a run under other settings, data, base or code; the differences that were allowed by name.

    Raises:
        InputError: names every setting that differs and was not allowed.
    """
    refused, changes = [], []
    for name, before, now in _differences(saved, planned):
        kind = next((kind for kind in _MAY_DIFFER if name == kind or name.startswith(f"{kind}.")), None)
        text = f"{name}: was {before!r}, now {now!r}"
        if kind in allowed:
            changes.append(f"{text} ({_MAY_DIFFER[kind]})")
        else:
            refused.append(text + (f" (--allow_changes {kind} goes on all the same)" if kind else ""))
    if refused:
        raise InputError(
            "--resume_from_checkpoint: this is not the run that was interrupted. " + "; ".join(refused) + ". "
            "Give the settings of the first command, or start anew in another --output_dir."
        )
    return changes


def _differences(saved: dict[str, Any], planned: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of all that makes a run's result and is not the same."""
    for part in ("task", "model", "training", "base", "train_data", "prompt_format"):
        for key in sorted({*saved[part], *planned[part]}):
            before, now = saved[part].get(key), planned[part].get(key)
            if before != now:
                yield f"{part}.{key}", before, now
    before, now = (run["environment"]["git"] or {} for run in (saved, planned))
    before, now = ([state.get("commit"), state.get("changes_sha256")] for state in (before, now))
    if before != now:
        yield "code", before, now
    before, now = (run["validation_data"] or {} for run in (saved, planned))
    if before.get("rows") == now.get("rows") and before.get("sha256") != now.get("sha256"):
        yield "validation_data.sha256", before.get("sha256"), now.get("sha256")
    before, now = (run["environment"]["packages"] for run in (saved, planned))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            yield f"packages.{name}", before.get(name), now.get(name)
