"""The plan of a training run: checked and shown before the run starts."""

import math
import os
import shutil

import torch

from tweetdora.block import LayerCount
from tweetdora.config import PUBLISHED_REPO, ModelConfig, TaskConfig, normalize_label
from tweetdora.errors import InputError, ResourceError
from tweetdora.records import BaseModelRecord, RunRecord
from tweetdora.tracking import wandb_mode
from tweetdora.train_config import TrainConfig, is_published_run

# Below both limits, an adapter barely changes: README's own recipe for another task once trained 3 steps at 3e-5, and
# the answers stayed the same.
_FEW_STEPS, _LOW_RATE = 50, 1e-4


def check_disk(training: TrainConfig, trainable: int) -> None:
    """Refuse to start if the checkpoints will not fit on the disk.

    A checkpoint holds the adapter and AdamW's two moments in float32. While a new checkpoint is written, one more than
    --save_total_limit exists.

    Raises:
        ResourceError: too little disk space, or the folder is not writable.
    """
    # Without a limit, the checkpoints of a long run cannot be counted here; space for ten detects a nearly full disk.
    # 50 MB for the rest: trainer_state, plots, and W&B's files, whose size is unknown beforehand.
    needed = trainable * 4 * 3 * ((training.save_total_limit or 10) + 1) + 50_000_000
    try:
        os.makedirs(training.output_dir, exist_ok=True)
        free = shutil.disk_usage(training.output_dir).free
        writable = os.access(training.output_dir, os.W_OK)  # fail now, not at the first checkpoint
    except OSError as error:
        raise ResourceError(f"--output_dir {training.output_dir} cannot be created: {error}") from error
    if not writable:
        raise ResourceError(f"--output_dir {training.output_dir} is not writable; choose another folder.")
    if free < needed:
        raise ResourceError(
            f"--output_dir {training.output_dir}: {free / 1e6:,.0f} MB free, but adapter, checkpoints and plots need "
            f"about {needed / 1e6:,.0f} MB. Free disk space, choose another folder, or lower --save_total_limit."
        )


def default_hub_model_id(task: TaskConfig, model: ModelConfig, training: TrainConfig) -> str | None:
    """The repository that push_to_hub.py uses for a run unless a flag names another; None if there is no default."""
    # Other recipes have no default repository: a push without a flag would overwrite the published model.
    return training.hub_model_id or (PUBLISHED_REPO if is_published_run(task, model, training) else None)


def count_steps(training: TrainConfig, num_examples: int) -> int:
    """Number of optimizer steps of a run, as the Trainer counts them.

    The Trainer itself reports this number only once it trains. The plan is shown before that, and the record of a run
    that is killed in its first step needs the number too.

    Raises:
        InputError: --dataloader_drop_last leaves no batch.
    """
    # Each process gets a share of the examples; a last, partial batch counts as a batch.
    batches = num_examples / (training.world_size * training.per_device_train_batch_size)
    batches = math.floor(batches) if training.dataloader_drop_last else math.ceil(batches)
    if not batches:
        raise InputError(
            f"--dataloader_drop_last true leaves no batch of the {num_examples} training examples. Leave it out, or "
            "lower --global_batch_size."
        )
    if training.max_steps > 0:
        return training.max_steps
    # The last passes of an epoch form one step, however few they are.
    steps_per_epoch = math.ceil(batches / training.gradient_accumulation_steps)
    return math.ceil(training.num_train_epochs * steps_per_epoch)


def format_plan(run: RunRecord, training: TrainConfig, threads: int, layers: LayerCount) -> str:
    """Format the plan that is shown before the first step; `threads` is the number of CPU threads per process."""
    data, base, validation, adapter = run.train_data, run.base_model, run.validation_data, run.model
    on_cpu = training.device.type == "cpu"
    device = f"cpu, {threads} threads each" if on_cpu else torch.cuda.get_device_name(training.device)
    counts = ", ".join(f"{count:,} {word}" for word, count in data.label_counts.items())
    name, trainable = "/".join(filter(None, (data.name, data.config))), run.adapter.trainable_parameters
    lines = [
        ("base model", _base_line(base, adapter.load_in_4bit)),
        (
            "adapter",
            f"{adapter.method} on {', '.join(adapter.target_modules)}, r {adapter.r}, alpha {adapter.lora_alpha}: "
            f"{trainable:,} trainable parameters ({trainable / base.parameters:.3%})",
        ),
        ("training data", f"{data.num_examples:,} examples of {name}, {data.split}: {counts}"),
        (
            "tokens",
            f"{data.tokens:,}, {data.supervised_tokens:,} of them supervised; {data.truncated:,} texts truncated "
            f"to --max_length {run.task.max_length}",
        ),
        (
            "validation",
            f"{validation.num_examples:,} examples {_every(training.eval_steps)} and at the end"
            if validation
            else "none",
        ),
        (
            "steps",
            f"{run.steps:,} of {training.global_batch_size} examples = {training.world_size} process(es) x "
            f"{training.gradient_accumulation_steps} x {training.per_device_train_batch_size}; "
            f"learning rate {training.learning_rate:g}, {run.training.lr_scheduler_type}",
        ),
        ("device", f"{device}; the base is sharded over the processes (FSDP2)" if training.shard_base else device),
        ("precision", f"{training.precision}: {training.precision_reason}"),
        ("batching", _batching_line(training, layers)),
        ("system prompt", run.task.system_prompt),
        ("tracker", _tracker_line(training)),
        ("run folder", training.output_dir),
    ]
    # Answers to likely questions: why is one GPU idle, why is the prompt not in the template's system message?
    if training.visible_gpus > 1:
        number = training.visible_gpus
        lines.append(
            ("note", f"{number} GPUs are visible, 1 is used: accelerate launch --multi_gpu train.py uses them all")
        )
    if run.prompt_format.system_in_user_turn:
        lines.append(("note", "the chat template has no system role: the system prompt starts the user's turn"))
    lines += [("note", f"{note.split}: {note.text}") for note in run.notes]
    if unnamed := _unnamed_words(run.task):
        lines.append(("note", f"the system prompt does not name {', '.join(unnamed)}"))
    if run.steps < _FEW_STEPS and training.learning_rate < _LOW_RATE:
        lines.append(
            (
                "note",
                f"{run.steps} steps at a learning rate of {training.learning_rate:g} will change almost nothing; use "
                "more examples or epochs, or a higher --learning_rate",
            )
        )
    return "\n".join(f"  {label:<14} {text}" for label, text in lines)


def _base_line(base: BaseModelRecord, in_4bit: bool) -> str:
    quantised = ", quantised to 4 bits for the training" if in_4bit else ""
    return f"{base.name_or_path} ({base.architecture}, {base.parameters:,} parameters){quantised}"


def _batching_line(training: TrainConfig, layers: LayerCount) -> str:
    if training.batching == "padded":
        return "padded: each example with its whole prompt"
    line = "shared_prefix: the prompts' common start once per batch; "
    line += f"{layers.written_out} of {layers.total} layers run as one function"
    if training.precision == "fp16":
        return f"{line}: fp16 trains under autocast, with the model's own code"
    at_once = training.train_batch_size
    if layers.written_out == 0 or layers.examples >= at_once:
        return line
    if layers.examples == 0:
        return f"{line}, but not for texts as long as most"
    line += f", but not for most batches of {at_once}"
    if training.device.type != "cpu":  # not measured there
        return line
    total = training.gradient_accumulation_steps * at_once  # of a process
    parts = next(parts for parts in range(1, total + 1) if total % parts == 0 and total // parts <= layers.examples)
    return f"{line}. --gradient_accumulation_steps {parts} makes them {total // parts}: less time and memory"


def _unnamed_words(task: TaskConfig) -> list[str]:
    asked = normalize_label(task.system_prompt)
    return [word for word in task.label_words if normalize_label(word) not in asked]


def _every(steps: float) -> str:
    """How often something happens; if below 1, the Trainer treats `steps` as a fraction of all steps."""
    return f"every {100 * steps:g} % of the steps" if steps < 1 else f"every {steps:g} steps"


def _tracker_line(training: TrainConfig) -> str:
    trackers = []
    for name in training.report_to or ["none"]:
        mode, reason = wandb_mode() if name == "wandb" else ("", "")
        trackers.append(f"wandb, {mode}: {reason}" if name == "wandb" else name)
    return "; ".join(trackers)
