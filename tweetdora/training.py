"""The stages of a training after its flags are parsed: load, record, train, save."""

import contextlib
import dataclasses
import datetime
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler, set_seed

from tweetdora.block import write_out
from tweetdora.callbacks import EvaluationStopped, LogGenerations, StopOnSignal
from tweetdora.checkpoints import checkpoint_step
from tweetdora.config import (
    LABEL_WORDS,
    SYSTEM_PROMPT,
    ModelConfig,
    TaskConfig,
    make_system_prompt,
    normalize_label,
)
from tweetdora.data import Examples, check_trainable, data_record, load_examples
from tweetdora.data_notes import notes_on_splits
from tweetdora.errors import DivergedError, InputError, UserError
from tweetdora.extras import check_installed
from tweetdora.files import file_sha256, tensors_sha256
from tweetdora.generation import LabelParser
from tweetdora.modeling import (
    DTYPES,
    attach_adapter,
    base_identity,
    check_ids_fit,
    load_base,
    load_tokenizer,
    save_adapter,
    trainable_parameters,
)
from tweetdora.plan import count_steps, default_hub_model_id
from tweetdora.processes import check_same
from tweetdora.prompts import PromptTokenizer, read_prompt_format, use_template
from tweetdora.provenance import command_line, environment, utc_now
from tweetdora.record_files import write_record
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    RUN_FILE,
    AdapterRecord,
    PromptFormat,
    RunRecord,
    TrainingResult,
    training_settings,
)
from tweetdora.resume import Commits
from tweetdora.source_cards import read_base_card, read_dataset_card
from tweetdora.tokenized import TokenizedExamples, tokenize_examples, train_data_record
from tweetdora.tracking import finish_wandb, start_wandb
from tweetdora.train_config import TrainConfig
from tweetdora.trainer import ClassificationTrainer, mean_loss, training_seconds


@dataclass(frozen=True)
class Loaded:
    """Everything that a training needs: model, tokenizers and examples."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PromptTokenizer
    tokenized: TokenizedExamples
    validation_examples: Examples | None


def load(
    task: TaskConfig,
    model_config: ModelConfig,
    training: TrainConfig,
    commits: Commits,
    state: PartialState,
    saved: RunRecord | None = None,
) -> tuple[Loaded, RunRecord]:
    """Load examples, tokenizer and model, and create the run's record, which describes them.

    `saved` is the record of the run that is being resumed.
    """
    check_prompt(task)
    check_4bit(model_config, training)
    name = model_config.model_name_or_path
    with state.main_process_first():  # the other processes then read from the cache
        train_examples = load_examples(task, "train", commits.data)
        validation_examples = None
        if training.max_eval_samples:
            validation_examples = load_examples(task, "validation", commits.data).head(training.max_eval_samples)
        # evaluate.py will need it; if it is missing, fail now and not after the training.
        test_examples = load_examples(task, "test", commits.data)
        tokenizer = load_tokenizer(name, commits.base)
    check_trainable(train_examples, task)
    splits = {"train": train_examples, "validation": validation_examples, "test": test_examples}
    prompt_format = trained_format(tokenizer, task, saved) or read_prompt_format(tokenizer, task)
    use_template(tokenizer, task)  # the tokenizer is saved with it
    prompt_tokenizer = PromptTokenizer(tokenizer, prompt_format, task.max_length)
    check_label_words(prompt_tokenizer, task)
    check_budget(prompt_tokenizer, task, training)
    with state.local_main_process_first():  # the other processes of the machine then read a large set from the cache
        tokenized = tokenize_examples(train_examples, prompt_tokenizer)
    base = _load_base(model_config, commits.base, training, state)
    base_model = base_identity(base, name, commits.base)  # before attach_adapter, which adds parameters
    check_ids_fit(base, tokenizer, [tokenized.largest_id])
    check_positions(base, tokenized)
    model = _with_adapter(base, model_config, training)
    adapter_start = [(name, weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad]
    run = RunRecord(
        name=training.run_name or "",
        status="planned",
        created=utc_now(),
        command=command_line(),
        task=task,
        model=model_config,
        training=training_settings(training),
        device=training.device.type,
        precision_reason=training.precision_reason,
        max_new_tokens=training.max_new_tokens,
        hub_model_id=default_hub_model_id(task, model_config, training),
        base_model=base_model,
        base_model_card=read_base_card(name, commits.base),
        prompt_format=prompt_tokenizer.format,
        adapter=AdapterRecord(trainable_parameters(model), tensors_sha256(adapter_start)),
        train_data=train_data_record(train_examples, tokenized, task.label_words),
        validation_data=data_record(validation_examples, task.label_words) if validation_examples else None,
        steps=count_steps(training, len(train_examples)),
        environment=environment(),
        dataset_card=read_dataset_card(task.dataset_name, commits.data, task.label_words, task.label_values),
        notes=notes_on_splits({name: found for name, found in splits.items() if found}, task.label_words),
    )
    return Loaded(model, tokenizer, prompt_tokenizer, tokenized, validation_examples), run


def _with_adapter(base: PreTrainedModel, model_config: ModelConfig, training: TrainConfig) -> PeftModel:
    """Put a new adapter on the base, and let the layers run as one function each where they can."""
    set_seed(training.seed)  # before the adapter's random initialization
    model = attach_adapter(base, model_config)
    if training.batching == "shared_prefix" and training.precision != "fp16":  # fp16 trains under autocast
        write_out(model)
    return model


def _load_base(
    model_config: ModelConfig, revision: str | None, training: TrainConfig, state: PartialState
) -> PreTrainedModel:
    """Load the base, or this process's part of it."""
    name, in_4bit = model_config.model_name_or_path, model_config.load_in_4bit
    shards = training.world_size if training.shard_base else 1
    # The other processes then read from the cache. The parts of a base that is sharded are loaded by all at once.
    with state.main_process_first() if shards == 1 else contextlib.nullcontext():
        return load_base(name, revision, DTYPES[training.precision], training.device, shards, in_4bit)


def check_4bit(model_config: ModelConfig, training: TrainConfig) -> None:
    """Check that a base can be quantised to 4 bits here, if it is asked for.

    Raises:
        InputError: bitsandbytes is missing, or the base is to be sharded.
    """
    if not model_config.load_in_4bit:
        return
    check_installed("--load_in_4bit true", "4bit", ["bitsandbytes"])
    if training.shard_base:
        raise InputError(
            "--load_in_4bit true and --shard_base true cannot be combined: it was not tested. Choose one. In 4 bits, "
            "a 70B base takes about 40 GB on each GPU."
        )


# Settings that may differ between machines, or are objects of the process.
_OF_A_PROCESS = (
    *("cpu_threads", "disable_tqdm", "local_rank", "deepspeed_plugin", "distributed_state"),
    "precision_reason",  # it may name the GPU; the precision itself is compared
)


def check_processes(run: RunRecord, training: TrainConfig, checkpoint: str | None) -> None:
    """Check that all processes of the launch have loaded the same run, and resume the same checkpoint. Collective.

    Raises:
        InputError: names the process, and what differs.
    """
    flags = {name: value for name, value in vars(training).items() if name[0] != "_" and name not in _OF_A_PROCESS}
    parts = (vars(run.task), vars(run.model), flags)
    settings = {f"--{name}": _plain(value) for part in parts for name, value in part.items()}
    data = {"train": run.train_data, "validation": run.validation_data}
    check_same(
        {
            **settings,
            "checkpoint": checkpoint,
            "base model": run.base_model,
            "prompt": run.prompt_format,
            **{f"SHA-256 of the {split} data": record and record.sha256 for split, record in data.items()},
            "packages": run.environment.packages,
            "code": run.environment.git,
        }
    )


def _plain(value: Any) -> Any:
    """A setting that can be compared with that of another process."""
    value = getattr(value, "value", value)  # an enumeration
    return value if isinstance(value, str | int | float | list | dict | None) else repr(value)


def check_prompt(task: TaskConfig) -> None:
    """Refuse a system prompt that asks for other words than the label words: a base would never answer with these.

    Raises:
        InputError: includes a --system_prompt to use.
    """
    words = [normalize_label(word) for word in task.label_words]
    asked = normalize_label(task.system_prompt)
    others = task.system_prompt == SYSTEM_PROMPT and set(words) != set(LABEL_WORDS)
    if others or not any(word in asked for word in words):
        which = f"{task.system_prompt[:60]!r}, which names none of"
        if task.system_prompt == SYSTEM_PROMPT:
            which = f"the published run's, which asks for {', '.join(LABEL_WORDS)} instead of"
        line = make_system_prompt(task.label_words)
        raise InputError(
            f"--system_prompt is {which} --label_words {' '.join(task.label_words)}. Omit it, or use one that names "
            f"them, such as --system_prompt {shlex.quote(line)}"
        )


def check_label_words(prompt_tokenizer: PromptTokenizer, task: TaskConfig) -> None:
    """Refuse label words that cannot be found in the completions that the model is trained to write.

    A tokenizer may normalise its input, or have no token for a letter: then a perfect model would score 0.

    Raises:
        InputError: names the word, and what the tokenizer turns it into.
    """
    parse = LabelParser(task.label_words)
    for number, (word, ids) in enumerate(zip(task.label_words, prompt_tokenizer.completion_ids, strict=True)):
        written = str(prompt_tokenizer.tokenizer.decode(ids[:-1], skip_special_tokens=False))
        if parse(written) != number:
            raise InputError(
                f"--label_words: {word!r} becomes {written!r} in the tokens of "
                f"{prompt_tokenizer.tokenizer.name_or_path}, where it is no longer found. Choose another word."
            )


def check_positions(base: PreTrainedModel, tokenized: TokenizedExamples) -> None:
    """Refuse examples that are longer than the model's position limit.

    Raises:
        InputError: names the length and the limit.
    """
    positions = getattr(base.config, "max_position_embeddings", None)
    longest = tokenized.sequence_lengths["longest"]
    if positions is not None and longest > positions:
        raise InputError(
            f"the longest example has {longest} tokens, but {base.name_or_path} supports only {positions} positions. "
            f"Use --max_length {positions} or less."
        )


def check_budget(prompt_tokenizer: PromptTokenizer, task: TaskConfig, training: TrainConfig) -> None:
    """Refuse a --max_new_tokens that is too small for some label word: validation would count right answers as wrong.

    Raises:
        InputError: names the longest label word and the number of tokens it needs.
    """
    lengths = [len(ids) for ids in prompt_tokenizer.completion_ids]
    if max(lengths) > training.max_new_tokens:
        word = task.label_words[lengths.index(max(lengths))]
        raise InputError(
            f"--max_new_tokens is {training.max_new_tokens}, but {word!r} and its stop token are {max(lengths)} "
            f"tokens. Use --max_new_tokens {max(lengths)} or more, or shorter --label_words."
        )


def trained_format(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, saved: RunRecord | None
) -> PromptFormat | None:
    """The prompt format that a run was started with, if the template differs from it only in the date."""
    if saved is None:
        return None
    begun = datetime.date.fromisoformat(saved.created[:10])  # in UTC; the local date may have differed by a day
    dates = [begun + datetime.timedelta(days=days) for days in (0, -1, 1)]
    same = any(read_prompt_format(tokenizer, task, date) == saved.prompt_format for date in dates)
    return saved.prompt_format if same else None


def check_optimizer(training: TrainConfig, model: PeftModel, steps: int) -> None:
    """Refuse an optimizer or a schedule that cannot be created, before the tracker starts and the run is recorded.

    Raises:
        InputError: names the flag and quotes the library's error.
    """
    name = getattr(training.optim, "value", training.optim)
    with _errors_of(f"--optim {name} and its settings"):
        kind, settings = ClassificationTrainer.get_optimizer_cls_and_kwargs(training, cast(PreTrainedModel, model))
        optimizer: torch.optim.Optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
        if kind.__module__.startswith("torch.optim"):  # others may need the model itself, or a GPU
            group = {"params": [nn.Parameter(torch.zeros(1))], "weight_decay": training.weight_decay}
            optimizer = kind([group], **settings)
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    with _errors_of(f"--lr_scheduler_type {schedule} with --lr_scheduler_kwargs {training.lr_scheduler_kwargs}"):
        get_scheduler(  # as the Trainer does it
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=training.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=cast(dict[str, Any] | None, training.lr_scheduler_kwargs),
        )


@contextlib.contextmanager
def _errors_of(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # such as a missing package, or a value out of range
        raise InputError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def make_trainer(task: TaskConfig, training: TrainConfig, loaded: Loaded, stop: StopOnSignal) -> ClassificationTrainer:
    """Create the trainer with its callbacks."""
    check_optimizer(training, loaded.model, count_steps(training, len(loaded.tokenized.features)))
    trainer = ClassificationTrainer(
        task=task,
        args=training,
        model=loaded.model,
        processing_class=loaded.tokenizer,
        prompt_tokenizer=loaded.prompt_tokenizer,
        train_dataset=loaded.tokenized.features,
        validation_examples=loaded.validation_examples,
        callbacks=[stop],
    )
    trainer.add_callback(LogGenerations(trainer))
    return trainer


def begin_record(run: RunRecord, training: TrainConfig) -> RunRecord:
    """Open the W&B run, if requested, and write the record of a run that has started."""
    if "wandb" in training.report_to:
        config = dataclasses.asdict(run)
        run = dataclasses.replace(run, tracker=start_wandb(training.output_dir, run.name, config, tracker=run.tracker))
    return write_run(dataclasses.replace(run, status="started"), training.output_dir)


def write_run(run: RunRecord, run_dir: str) -> RunRecord:
    """Write a run's record and return it."""
    write_record(os.path.join(run_dir, RUN_FILE), run)
    return run


def run_trainer(trainer: ClassificationTrainer, checkpoint: str | None, run: RunRecord, state: PartialState) -> None:
    """Train to the end or to a stop.

    Raises:
        DivergedError: the training diverged; the record's status says so.
        ResourceError: a checkpoint could not be written.
    """
    try:
        if (
            checkpoint and checkpoint_step(checkpoint) >= run.steps
        ):  # stopped after its last step, before it was finished
            trainer.restore_finished(checkpoint)
        else:
            # Stopped in a validation before the first step: the checkpoint that was resumed is still the newest.
            with contextlib.suppress(EvaluationStopped):
                trainer.train(resume_from_checkpoint=checkpoint)
    except UserError as error:
        if state.is_main_process:
            if isinstance(error, DivergedError):
                write_run(dataclasses.replace(run, status="diverged"), trainer.args.output_dir)
            finish_wandb(exit_code=1)
        raise


def is_unfinished(trainer: ClassificationTrainer) -> bool:
    """True if steps or the last validation remain to be done."""
    return trainer.state.global_step < trainer.state.max_steps or trainer.evaluation_is_due()


def save_run(trainer: ClassificationTrainer, run: RunRecord, peak_memory: dict[str, int]) -> RunRecord:
    """Write adapter, tokenizer and training plot, and finally the record that marks the run as finished."""
    from tweetdora.plots import plot_training  # matplotlib takes a second, which the first step need not wait for

    run_dir, history = trainer.args.output_dir, trainer.state.log_history
    adapter_dir = os.path.join(run_dir, ADAPTER_DIR)
    save_adapter(trainer.model, adapter_dir)
    trainer.processing_class.save_pretrained(adapter_dir)
    sha256 = file_sha256(os.path.join(adapter_dir, ADAPTER_WEIGHTS))
    plot_training(history, os.path.join(run_dir, "training.png"), run.name)
    result = TrainingResult(
        finished=utc_now(),
        steps=trainer.state.global_step,
        seconds=training_seconds(history),
        train_loss=mean_loss(history),
        peak_memory_bytes=peak_memory,
        log_history=history,
    )
    adapter = dataclasses.replace(run.adapter, sha256=sha256)
    return write_run(dataclasses.replace(run, status="finished", adapter=adapter, result=result), run_dir)
