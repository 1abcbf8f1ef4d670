"""Atomic checkpoints: written to a temporary folder, checksummed, then renamed, and verified before use.

runs/demo/.saving/checkpoint-40/      being written; if the process is killed, it stays here and is never read
runs/demo/checkpoint-40/              complete: adapter, optimizer, scheduler, random states, trainer_state.json,
                                      run.json (the settings it belongs to) and checksums.json
"""

import glob
import json
import os
import shutil

from tweetdora.errors import InputError
from tweetdora.files import file_sha256, read_json
from tweetdora.record_files import read_record
from tweetdora.records import RUN_FILE, RunRecord

CHECKSUMS = "checksums.json"
SAVING_DIR = ".saving"
_STATE = "trainer_state.json"


def publish_checkpoint(run_dir: str, step: int, keep: int | None) -> str:
    """Checksum the checkpoint in .saving, rename it into place, then remove all but the `keep` newest intact ones.

    No checkpoint of another step is removed before this one is in place. Returns the checkpoint's folder.
    """
    name = f"checkpoint-{step}"
    beside, folder = os.path.join(run_dir, SAVING_DIR, name), os.path.join(run_dir, name)
    run_file = os.path.join(run_dir, RUN_FILE)
    if os.path.isfile(run_file):
        shutil.copyfile(run_file, os.path.join(beside, RUN_FILE))
    sums = {file: file_sha256(os.path.join(beside, file)) for file in sorted(os.listdir(beside))}
    with open(os.path.join(beside, CHECKSUMS), "w", encoding="utf-8") as stream:
        json.dump(sums, stream, indent=2)
    for file in (*sums, CHECKSUMS):
        _to_disk(os.path.join(beside, file))
    _remove(run_dir, folder)  # same step: damaged, or the run was resumed from an older checkpoint
    os.rename(beside, folder)
    _to_disk(run_dir)
    if keep:
        others = [path for path in all_checkpoints(run_dir) if path != folder]
        whole = [path for path in others if find_damage(path) is None]
        for old in set(others) - set(whole[: keep - 1]):
            _remove(run_dir, old)
    clear_unfinished(run_dir)
    return folder


def _remove(run_dir: str, folder: str) -> None:
    """Move a checkpoint away in one rename before deleting it, so that a kill never leaves half of it in place."""
    if os.path.isdir(folder):
        away = os.path.join(run_dir, SAVING_DIR, f"{os.path.basename(folder)}.old")
        os.rename(folder, away)
        shutil.rmtree(away, ignore_errors=True)  # leftovers in .saving are removed by the next save


def _to_disk(path: str) -> None:
    """Wait until a file, or a folder's list of names, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_unfinished(run_dir: str) -> None:
    """Remove the remains of a checkpoint that was being written or removed when the process was killed."""
    shutil.rmtree(os.path.join(run_dir, SAVING_DIR), ignore_errors=True)


def all_checkpoints(run_dir: str) -> list[str]:
    """The run's checkpoint folders, newest first."""
    folders = glob.glob(os.path.join(glob.escape(run_dir), "checkpoint-*"))
    steps = {folder: folder.rpartition("-")[2] for folder in folders}
    return sorted((folder for folder in steps if steps[folder].isdigit()), key=lambda folder: -int(steps[folder]))


def find_damage(folder: str) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file exists and matches its checksum."""
    try:
        sums = read_json(os.path.join(folder, CHECKSUMS))
    except (InputError, OSError) as error:
        return str(error).rstrip(".")
    if not isinstance(sums, dict) or _STATE not in sums:
        return f"{CHECKSUMS} is incomplete"
    for file, expected in sums.items():
        try:
            if file_sha256(os.path.join(folder, file)) != expected:
                return f"{file} has changed since it was written, its SHA-256 differs"
        except OSError as error:
            return f"{file} cannot be read ({error.strerror})"
    return None


def last_whole_checkpoint(run_dir: str) -> tuple[str | None, dict[str, str]]:
    """The newest intact checkpoint, and what is wrong with each newer one, by folder."""
    damaged: dict[str, str] = {}
    for folder in all_checkpoints(run_dir):
        if (damage := find_damage(folder)) is None:
            return folder, damaged
        damaged[folder] = damage
    return None, damaged


def saved_run(checkpoint: str) -> RunRecord | None:
    """The record of the run that a checkpoint belongs to, as it was when the checkpoint was written.

    Raises:
        InputError: the record has another version: a run must be resumed with the code that started it.
    """
    path = os.path.join(checkpoint, RUN_FILE)
    return read_record(RunRecord, path, oldest_version=3) if os.path.isfile(path) else None


def checkpoint_step(checkpoint: str) -> int:
    """The number of steps completed at a checkpoint."""
    return read_json(os.path.join(checkpoint, _STATE))["global_step"]
