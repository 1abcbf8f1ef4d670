"""Going on with an interrupted run: from which checkpoint, and only as the run that it was."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tweetdora.checkpoints import all_checkpoints, find_damage, last_whole_checkpoint, saved_run
from tweetdora.config import ROUNDING_ARGUMENTS, ModelConfig, TaskConfig, TrainConfig
from tweetdora.errors import InputError
from tweetdora.files import held_lock
from tweetdora.hub import pin_revision
from tweetdora.records import RunRecord, run_status

# What a resumed run may have otherwise, where the user says so, and what that does to it. All else makes another run:
# its adapter would be neither the one that was begun nor the one that the new settings give.
_ROUNDING = "sums are taken in another order, so the last digits differ; dropout, if there is any, drops other values"
MAY_DIFFER = {
    **{f"training.{name}": _ROUNDING for name in ROUNDING_ARGUMENTS},
    "code": "another state of this repository; what changed in it is not known here",
    "packages": "other versions of libraries; what changed in them is not known here",
}


@dataclass(frozen=True)
class ResumePlan:
    """Where a run begins.

    `checkpoint` is None for a new run; `saved` is the record that lies in the checkpoint; `notes` are lines for the
    user, one for each damaged checkpoint that is passed over.
    """

    checkpoint: str | None = None
    saved: RunRecord | None = None
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def only_training_in(folder: str, is_main_process: bool) -> Iterator[None]:
    """Hold a lock on a run folder while it is trained in; of several processes the first holds it.

    Raises:
        InputError: another process on this machine trains in it.
    """
    if not is_main_process:
        yield
        return
    name = hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:16]
    found = f"another process is training in {folder}"
    with held_lock(f"run-{name}", found, "Wait for it, stop it, or give another --output_dir."):
        yield


@dataclass(frozen=True)
class Commits:
    """The commits on the Hub that everything is loaded from; None for what is local."""

    base: str | None
    data: str | None


def plan_resume(training: TrainConfig) -> ResumePlan:
    """Find the checkpoint to go on from, if the run is to go on.

    Raises:
        InputError: the run folder is taken, there is nothing to go on from, or something that is allowed to differ
            cannot be.
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
    if asked in ("true", "True"):
        # A kill before the first checkpoint costs those steps only; a scheduler that restarts the same command needs
        # no second case.
        if status and not all_checkpoints(folder):
            return ResumePlan(
                notes=[f"note: the run in {folder} was stopped before its first checkpoint; it begins again."]
            )
        checkpoint, notes = _newest_checkpoint(folder)
        return ResumePlan(checkpoint, saved_run(checkpoint), notes)
    _check_named_checkpoint(asked, folder, status)
    return ResumePlan(asked, saved_run(asked))


def _check_folder_is_free(folder: str, status: str | None) -> None:
    """Refuse to begin a run where there is one: its checkpoints and records would be mixed with the new one's."""
    if status or all_checkpoints(folder):
        resume = {"finished": "Choose", "diverged": "Lower --learning_rate and choose"}.get(
            status or "", "Go on with it by --resume_from_checkpoint true, or choose"
        )
        raise InputError(
            f"--output_dir {folder} already holds a run ({status or 'unfinished'}). {resume} another "
            "--output_dir, or delete the folder."
        )


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


def _check_named_checkpoint(checkpoint: str, folder: str, status: str | None) -> None:
    if not os.path.isdir(checkpoint):
        raise InputError(f"--resume_from_checkpoint {checkpoint}: there is no such checkpoint.")
    if (damage := find_damage(checkpoint)) is not None:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: {damage}. Name another, or give `true` for the newest."
        )
    # Another run's checkpoint may begin this one, as a fork; then its own folder must be empty.
    elsewhere = os.path.dirname(os.path.abspath(checkpoint)) != os.path.abspath(folder)
    if elsewhere and (status or all_checkpoints(folder)):
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another run than --output_dir {folder}, which holds one "
            "already. Choose an empty --output_dir."
        )


def pin_commits(task: TaskConfig, model: ModelConfig, saved: RunRecord | None) -> Commits:
    """The commits of base and data set: those that the run was begun with, whatever the Hub has now.

    A run that goes on under other names is refused later, by check_same_run; what they name is looked up here.
    """
    base, data = (model.model_name_or_path, model.model_revision), (task.dataset_name, task.dataset_revision)
    kept_base = kept_data = None
    if saved is not None:
        if base == (saved.model.model_name_or_path, saved.model.model_revision):
            kept_base = saved.base_model.revision
        if data == (saved.task.dataset_name, saved.task.dataset_revision):
            kept_data = saved.train_data.revision
    return Commits(kept_base or pin_revision(*base), kept_data or pin_revision(*data, "dataset"))


def continue_record(saved: RunRecord, planned: RunRecord, allowed: Sequence[str]) -> tuple[RunRecord, list[str]]:
    """The planned run's record, going on where the interrupted run's was; and what is otherwise and was allowed.

    Raises:
        InputError: it is another run.
    """
    mismatches = check_same_run(saved, planned, allowed)
    record = dataclasses.replace(
        planned,
        created=saved.created,
        command=saved.command,
        tracker=saved.tracker,
        mismatches=[*saved.mismatches, *mismatches],
    )
    return record, mismatches


def check_same_run(saved: RunRecord, planned: RunRecord, allowed: Sequence[str] = ()) -> list[str]:
    """Refuse to resume a run under other settings, data, base or code; the mismatches that were allowed by name.

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
            refused.append(text + (f" (--allow_mismatch {kind} goes on all the same)" if kind else ""))
    if refused:
        raise InputError(
            "--resume_from_checkpoint: this is not the run that was interrupted. " + "; ".join(refused) + ". "
            "Give the settings of the first command, or start anew in another --output_dir."
        )
    return mismatches


def find_mismatches(saved: RunRecord, planned: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of all that makes a run's result and is not the same."""
    for part in ("task", "model", "training", "base_model", "train_data", "prompt_format"):
        yield from _unequal(f"{part}.", vars(getattr(saved, part)), vars(getattr(planned, part)))
    # The commit alone does not tell: code that is not committed trains too.
    code_before, code_now = (_code(run) for run in (saved, planned))
    if code_before != code_now:
        yield "code", code_before, code_now
    # How many examples are validated changes no weight, so it may differ; other ones would make the curve two curves.
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
