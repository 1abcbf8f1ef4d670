"""The parts of a training between its flags and its end: load, describe, train, save."""

import contextlib
import dataclasses
import os
from dataclasses import dataclass

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from tweetdora.callbacks import EvaluationStopped, LogGenerations, StopOnSignal
from tweetdora.checkpoints import checkpoint_step
from tweetdora.config import ModelConfig, TaskConfig, TrainConfig
from tweetdora.data import Examples, check_trainable, data_record, load_examples
from tweetdora.errors import DivergedError, ResourceError
from tweetdora.files import file_sha256, tensors_sha256
from tweetdora.modeling import (
    DTYPES,
    attach_adapter,
    base_identity,
    load_base,
    load_tokenizer,
    read_base_card,
    save_adapter,
    trainable_parameters,
)
from tweetdora.plan import count_steps, default_hub_model_id
from tweetdora.plots import plot_training
from tweetdora.prompts import (
    PromptTokenizer,
    TokenizedExamples,
    read_prompt_format,
    tokenize_examples,
    train_data_record,
)
from tweetdora.provenance import command_line, environment, utc_now
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    RUN_FILE,
    AdapterRecord,
    RunRecord,
    TrainingResult,
    training_settings,
    write_record,
)
from tweetdora.resume import Commits
from tweetdora.tracking import finish_wandb, start_wandb
from tweetdora.trainer import ClassificationTrainer, mean_loss, training_seconds


@dataclass(frozen=True)
class Loaded:
    """What a training is made of."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prompt_tokenizer: PromptTokenizer
    tokenized: TokenizedExamples
    validation_examples: Examples | None


def load(
    task: TaskConfig, model_config: ModelConfig, training: TrainConfig, commits: Commits, state: PartialState
) -> tuple[Loaded, RunRecord]:
    """Examples, tokenizer and model; and the record of the run so far, which says what they are."""
    name = model_config.model_name_or_path
    with state.main_process_first():  # the others find it in the cache
        train_examples = load_examples(task, "train", commits.data)
        validation_examples = None
        if training.max_eval_samples:
            validation_examples = load_examples(task, "validation", commits.data).head(training.max_eval_samples)
        tokenizer = load_tokenizer(name, commits.base)
    check_trainable(train_examples, task)
    prompt_tokenizer = PromptTokenizer(tokenizer, read_prompt_format(tokenizer, task), task.max_length)
    tokenized = tokenize_examples(train_examples, prompt_tokenizer)
    with state.main_process_first():
        base = load_base(name, commits.base, DTYPES[training.precision], training.device)
    base_model = base_identity(base, name, commits.base)  # before the adapter, which adds parameters
    set_seed(training.seed)  # before the adapter's random start
    model = attach_adapter(base, model_config)
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
    )
    return Loaded(model, tokenizer, prompt_tokenizer, tokenized, validation_examples), run


def make_trainer(task: TaskConfig, training: TrainConfig, loaded: Loaded, stop: StopOnSignal) -> ClassificationTrainer:
    """The trainer, with its callbacks."""
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
    """Open the W&B run, if one is asked for, and write the record of a run that has started."""
    if "wandb" in training.report_to:
        config = dataclasses.asdict(run)
        run = dataclasses.replace(run, tracker=start_wandb(training.output_dir, run.name, config, tracker=run.tracker))
    return write_run(dataclasses.replace(run, status="started"), training.output_dir)


def write_run(run: RunRecord, run_dir: str) -> RunRecord:
    """Write a run's record; it is returned."""
    write_record(os.path.join(run_dir, RUN_FILE), run)
    return run


def run_trainer(trainer: ClassificationTrainer, checkpoint: str | None, run: RunRecord, state: PartialState) -> None:
    """Train to the end or to a stop.

    Raises:
        DivergedError: the training diverged; the record says so.
        ResourceError: a checkpoint could not be written.
    """
    try:
        if checkpoint and checkpoint_step(checkpoint) >= run.steps:  # stopped between its last step and its end
            trainer.restore_finished(checkpoint)
        else:
            with contextlib.suppress(EvaluationStopped):  # before the first step; its checkpoint is the one resumed
                trainer.train(resume_from_checkpoint=checkpoint)
    except (DivergedError, ResourceError) as error:
        if state.is_main_process:
            if isinstance(error, DivergedError):
                write_run(dataclasses.replace(run, status="diverged"), trainer.args.output_dir)
            finish_wandb(exit_code=1)
        raise


def is_unfinished(trainer: ClassificationTrainer) -> bool:
    """Whether steps, or the last validation, are left to do."""
    return trainer.state.global_step < trainer.state.max_steps or trainer.evaluation_is_due()


def save_run(trainer: ClassificationTrainer, run: RunRecord, peak_memory: dict[str, int]) -> RunRecord:
    """Write adapter, tokenizer, curves, and last the record that declares the run finished."""
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
