"""Resume an interrupted run: choose its checkpoint, and refuse to continue it as a different run."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tweetdora.checkpoints import all_checkpoints, checkpoint_step, find_damage, last_whole_checkpoint, saved_run
from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.errors import InputError
from tweetdora.files import held_lock
from tweetdora.hub import pin_revision
from tweetdora.record_files import run_status
from tweetdora.records import RunRecord
from tweetdora.train_config import ROUNDING_ARGUMENTS, TrainConfig

# What may differ in a resumed run if the user allows it, and the effect. Any other difference makes it another run,
# whose adapter would match neither the old settings nor the new ones.
_ROUNDING = "sums are taken in another order, so the last digits differ; dropout, if any, drops other values"
MAY_DIFFER = {
    **{f"training.{name}": _ROUNDING for name in ROUNDING_ARGUMENTS},
    "code": "another state of this repository; the effect of its changes is unknown",
    "packages": "other library versions; the effect of their changes is unknown",
}


@dataclass(frozen=True)
class ResumePlan:
    """Where a run starts.

    `checkpoint` is None for a new run; `saved` is the record stored in the checkpoint; `notes` are lines for the user,
    such as one for each damaged checkpoint that was skipped; a fork starts from another run folder's checkpoint.
    """

    checkpoint: str | None = None
    saved: RunRecord | None = None
    notes: list[str] = field(default_factory=list)
    is_fork: bool = False


_NEWEST = ("true", "True")  # --resume_from_checkpoint: the newest intact checkpoint


@contextlib.contextmanager
def only_training_in(folder: str, is_main_process: bool) -> Iterator[None]:
    """Hold a lock on a run folder during training; with several processes, the main process holds it.

    Raises:
        InputError: another process on this machine is training in it.
    """
    if not is_main_process:
        yield
        return
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    found = f"another process is training in {folder}"
    with held_lock(f"run-{name}", found, "Wait for it, stop it, or give another --output_dir."):
        yield


def check_unchanged(training: TrainConfig, planned: ResumePlan) -> None:
    """Check, once the lock on the run folder is held, that the folder is as it was when the resume was planned.

    Another process may have held the lock until now: a stopped training finishes its step and writes a checkpoint.

    Raises:
        InputError: it is not.
    """
    if plan_resume(training) != planned:
        raise InputError(
            f"another process has changed the run in {training.output_dir} since this command started. Repeat it."
        )


def set_aside_newer(training: TrainConfig, checkpoint: str | None) -> list[str]:
    """Rename the checkpoints of a run that are newer than the one that is resumed by name; return notes on them.

    Otherwise a later --resume_from_checkpoint true would take one of them, which belongs to what is now given up.
    """
    folder = training.output_dir
    by_name = training.resume_from_checkpoint not in _NEWEST
    if checkpoint is None or not by_name or _is_elsewhere(checkpoint, folder):
        return []
    step, notes = checkpoint_step(checkpoint), []
    for path in all_checkpoints(folder):
        number = int(path.rpartition("-")[2])
        if number > step and not os.path.samefile(path, checkpoint):
            names = (os.path.join(folder, f"set-aside-{number}-{count}") for count in itertools.count(1))
            away = next(name for name in names if not os.path.exists(name))
            os.rename(path, away)
            notes.append(f"note: {path} is newer than {checkpoint}; it was renamed to {away}.")
    return notes


@dataclass(frozen=True)
class Commits:
    """The Hub commits that base and data set are loaded from; None for local ones."""

    base: str | None
    data: str | None


def plan_resume(training: TrainConfig) -> ResumePlan:
    """Find the checkpoint to resume from, if the run is to be resumed.

    Raises:
        InputError: the run folder already holds a run, there is nothing to resume from, or --allow_mismatch names
            something that must not differ.
    """
    if unknown := sorted(set(training.allow_mismatch) - MAY_DIFFER.keys()):
        raise InputError(f"--allow_mismatch {' '.join(unknown)}: expected some of {', '.join(MAY_DIFFER)}.")
    asked, folder = training.resume_from_checkpoint, training.output_dir
    status = run_status(folder)
    if asked in (None, "", "false", "False"):
        _check_folder_is_free(folder, status)
        return ResumePlan()
    if status == "finished":
        raise InputError(f"the run in {folder} is finished; there is nothing to resume. Choose another --output_dir.")
    if asked in _NEWEST:
        # A run that was killed before its first checkpoint loses only those steps, so it starts over. A scheduler can
        # then always restart the same command.
        if status and not all_checkpoints(folder):
            return ResumePlan(
                notes=[f"note: the run in {folder} was stopped before its first checkpoint; it starts over."]
            )
        checkpoint, notes = _newest_checkpoint(folder)
        return ResumePlan(checkpoint, saved_run(checkpoint), notes)
    _check_named_checkpoint(asked, folder, status)
    return ResumePlan(asked, saved_run(asked), is_fork=_is_elsewhere(asked, folder))


def _check_folder_is_free(folder: str, status: str | None) -> None:
    """Refuse to start a run in a folder that already holds one: their checkpoints and records would be mixed."""
    if status or all_checkpoints(folder):
        resume = {"finished": "Choose", "diverged": "Lower --learning_rate and choose"}.get(
            status or "", "Resume it with --resume_from_checkpoint true, or choose"
        )
        raise InputError(
            f"--output_dir {folder} already holds a run ({status or 'unfinished'}). {resume} another "
            "--output_dir, or delete the folder."
        )


def _newest_checkpoint(folder: str) -> tuple[str, list[str]]:
    """The newest intact checkpoint, and a note for each newer, damaged one."""
    checkpoint, damaged = last_whole_checkpoint(folder)
    if checkpoint is None:
        found = "; ".join(f"{path} is damaged, {damage}" for path, damage in damaged.items())
        raise InputError(
            f"--resume_from_checkpoint true: found no {'intact ' if found else ''}checkpoint in {folder}"
            f"{f' ({found})' if found else ''}. To start over, omit the flag (and delete the folder if it holds an "
            "unfinished run)."
        )
    return checkpoint, [
        f"note: skipped {path}, which is damaged ({damage}); resuming from {checkpoint}."
        for path, damage in damaged.items()
    ]


def _check_named_checkpoint(checkpoint: str, folder: str, status: str | None) -> None:
    if not os.path.isdir(checkpoint):
        raise InputError(f"--resume_from_checkpoint {checkpoint}: there is no such checkpoint.")
    if (damage := find_damage(checkpoint)) is not None:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: {damage}. Name another, or give `true` for the newest."
        )
    # A run may start from another run's checkpoint, as a fork; then its own folder must be empty.
    if _is_elsewhere(checkpoint, folder) and (status or all_checkpoints(folder)):
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} belongs to another run than --output_dir {folder}, which already "
            "holds one. Choose an empty --output_dir."
        )


def _is_elsewhere(checkpoint: str, folder: str) -> bool:
    return os.path.dirname(os.path.abspath(checkpoint)) != os.path.abspath(folder)


def pin_commits(task: TaskConfig, model: ModelConfig, saved: RunRecord | None) -> Commits:
    """The commits of base and data set: for a resumed run those it was started with, whatever the Hub has now.

    If the run is resumed with another base or data set, its current commit is looked up here, and check_same_run later
    refuses the run.
    """
    base, data = (model.model_name_or_path, model.model_revision), (task.dataset_name, task.dataset_revision)
    kept_base = kept_data = None
    if saved is not None:
        if base == (saved.model.model_name_or_path, saved.model.model_revision):
            kept_base = saved.base_model.revision
        if data == (saved.task.dataset_name, saved.task.dataset_revision):
            kept_data = saved.train_data.revision
    return Commits(kept_base or pin_revision(*base), kept_data or pin_revision(*data, "dataset"))


def continue_record(
    saved: RunRecord, planned: RunRecord, allowed: Sequence[str], hub_model_id: str | None, is_fork: bool
) -> tuple[RunRecord, list[str]]:
    """The planned run's record, which continues the interrupted run's; and the mismatches that were allowed.

    Args:
        hub_model_id: What this command gives; None: the run keeps its own.
        is_fork: It starts from a checkpoint of another run folder. Then tracker and repository are its own.

    Raises:
        InputError: it is a different run.
    """
    mismatches = check_same_run(saved, planned, allowed)
    record = dataclasses.replace(
        planned,
        created=saved.created,
        command=saved.command,
        tracker=planned.tracker if is_fork else saved.tracker,
        hub_model_id=hub_model_id or (planned if is_fork else saved).hub_model_id,
        mismatches=[*saved.mismatches, *mismatches],
    )
    return record, mismatches


def check_same_run(saved: RunRecord, planned: RunRecord, allowed: Sequence[str] = ()) -> list[str]:
    """Refuse to resume a run with other settings, data, base or code; return the mismatches that `allowed` names.

    Raises:
        InputError: names every setting that differs and was not allowed.
    """
    refused, mismatches = [], []
    for name, before, now in find_mismatches(saved, planned):
        kind = next((kind for kind in MAY_DIFFER if name == kind or name.startswith(f"{kind}.")), None)
        text = f"{name}: was {before!r}, now {now!r}"
        if kind is not None and kind in allowed:
            mismatches.append(f"{text} ({MAY_DIFFER[kind]})")
        else:
            refused.append(text + (f" (--allow_mismatch {kind} resumes anyway)" if kind else ""))
    if refused:
        raise InputError(
            "--resume_from_checkpoint: this is not the run that was interrupted. " + "; ".join(refused) + ". "
            "Use the settings of the first command, or start a new run in another --output_dir."
        )
    return mismatches


def find_mismatches(saved: RunRecord, planned: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    """Name, old value and new value of everything that affects a run's result and has changed."""
    for part in ("task", "model", "training", "base_model", "train_data", "prompt_format"):
        yield from _unequal(f"{part}.", vars(getattr(saved, part)), vars(getattr(planned, part)))
    # The commit alone is not enough: uncommitted changes affect training too.
    code_before, code_now = (_code(run) for run in (saved, planned))
    if code_before != code_now:
        yield "code", code_before, code_now
    # The number of validation examples affects no weights, so it may differ. The same number of other examples would
    # join two different curves into one.
    before, now = saved.validation_data, planned.validation_data
    if before and now and before.num_examples == now.num_examples and before.sha256 != now.sha256:
        yield "validation_data.sha256", before.sha256, now.sha256
    yield from _unequal("packages.", saved.environment.packages, planned.environment.packages)


def _code(run: RunRecord) -> list[str | None] | None:
    git = run.environment.git
    return [git.commit, git.changes_sha256] if git else None


def _unequal(prefix: str, saved: dict[str, Any], planned: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*saved, *planned}):
        if saved.get(name) != planned.get(name):
            yield prefix + name, saved.get(name), planned.get(name)
