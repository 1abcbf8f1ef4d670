"""Checkpoints as files: whole or not there, whatever is killed or damaged; test_survival.py has whole runs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sample_records import write_run

from tweetdora import checkpoints
from tweetdora.checkpoints import (
    CHECKSUMS,
    SAVING_DIR,
    all_checkpoints,
    checkpoint_step,
    clear_unfinished,
    find_damage,
    last_whole_checkpoint,
    publish_checkpoint,
    saved_run,
)

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


def write(run_dir: Path, step: int, keep: int | None = None) -> Path:
    """A checkpoint as the Trainer leaves it beside, put in its place."""
    beside = run_dir / SAVING_DIR / f"checkpoint-{step}"
    beside.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (beside / name).write_text(json.dumps({"global_step": step, "file": name}))
    return Path(publish_checkpoint(str(run_dir), step, keep))


def names(run_dir: Path) -> list[str]:
    return [os.path.basename(folder) for folder in all_checkpoints(str(run_dir))]


def test_a_checkpoint_is_put_in_its_place_with_its_sums_and_its_run(tmp_path):
    run = write_run(tmp_path, status="started", result=None)
    folder = write(tmp_path, 40)
    assert sorted(os.listdir(folder)) == sorted([*FILES, CHECKSUMS, "run.json"])
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-40", "run.json"]
    assert find_damage(str(folder)) is None
    assert saved_run(str(folder)) == run and checkpoint_step(str(folder)) == 40


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [*FILES, CHECKSUMS])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_noticed_and_the_checkpoint_before_is_used(file, damage, tmp_path):
    before, folder = write(tmp_path, 20), write(tmp_path, 40)
    damage(folder / file)
    found, damaged = last_whole_checkpoint(str(tmp_path))
    assert found == str(before) and list(damaged) == [str(folder)]
    # A flipped bit in the sums is found where they do not fit: at another file.
    assert file in damaged[str(folder)] or (file, damage) == (CHECKSUMS, flip)


def test_a_manifest_that_names_too_little_is_no_manifest(tmp_path):
    folder = write(tmp_path, 20)
    (folder / CHECKSUMS).write_text("{}")
    assert find_damage(str(folder)) == f"{CHECKSUMS} is incomplete"
    (folder / CHECKSUMS).write_text("[]")
    assert find_damage(str(folder)) == f"{CHECKSUMS} is incomplete"


def test_all_damaged_is_none(tmp_path):
    (write(tmp_path, 20) / CHECKSUMS).unlink()
    found, damaged = last_whole_checkpoint(str(tmp_path))
    assert found is None and len(damaged) == 1


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [40, 30]), (None, [40, 30, 20, 10]), (9, [40, 30, 20, 10])])
def test_only_the_newest_are_kept_by_step_not_by_name(keep, left, tmp_path):
    for step in (10, 20, 30, 40):
        write(tmp_path, step, keep)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]
    write(tmp_path, 100, 1)
    assert names(tmp_path) == ["checkpoint-100"]


def test_a_damaged_checkpoint_takes_no_place_and_the_one_just_written_stays(tmp_path):
    """A run that went on from 40, because 60 is damaged, saves step 50."""
    write(tmp_path, 40), cut(write(tmp_path, 60) / FILES[0])
    write(tmp_path, 50, 1)
    assert names(tmp_path) == ["checkpoint-50"]
    write(tmp_path, 60), write(tmp_path, 70), cut(tmp_path / "checkpoint-70" / FILES[0])
    write(tmp_path, 55, 2)
    assert names(tmp_path) == ["checkpoint-60", "checkpoint-55"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    (tmp_path / "checkpoint-40-copy").mkdir()
    write(tmp_path, 50, 1)
    assert names(tmp_path) == ["checkpoint-50"] and (tmp_path / "checkpoint-40-copy").is_dir()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    cut(write(tmp_path, 20) / FILES[0])
    assert find_damage(str(write(tmp_path, 20))) is None


# Killed at each moment of a save


def survive(run_dir: Path, patch: Callable[[int], None]) -> int:
    """Save step 40 in a child process that ends, as by kill -9, at its n-th change of the disk, for n = 1, 2, …

    Returns how many such moments there are.
    """
    for moment in range(1, 100):
        case = run_dir / str(moment)
        case.mkdir()
        (case / "run.json").write_text("{}")
        write(case, 20, 2), write(case, 30, 2)
        child = os.fork()
        if child == 0:
            try:
                patch(moment)
                write(case, 40, 2)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        found, damaged = last_whole_checkpoint(str(case))
        assert not damaged, f"moment {moment}: a partial checkpoint under a checkpoint's name"
        assert [find_damage(folder) for folder in all_checkpoints(str(case))] == [None] * len(names(case)), moment
        assert found is not None and checkpoint_step(found) in (30, 40), moment
        assert len(names(case)) >= 2, moment
        clear_unfinished(str(case))
        write(case, 50, 2)
        assert names(case)[0] == "checkpoint-50" and len(names(case)) == 2 and not (case / SAVING_DIR).exists()
        if os.waitstatus_to_exitcode(status) == 0:
            return moment - 1
    raise AssertionError("it never ended")


def test_a_kill_at_any_moment_of_a_save_leaves_whole_checkpoints_only(tmp_path):
    def patch(moment: int) -> None:
        """End the process before the n-th call that changes the disk."""
        calls = 0

        def counted(original: Callable) -> Callable:
            def call(*arguments, **more):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os._exit(9)
                return original(*arguments, **more)

            return call

        for module, name in (
            *((os, name) for name in ("rename", "replace", "unlink", "rmdir", "fsync", "mkdir")),
            *((shutil, name) for name in ("copyfile", "rmtree")),
            (checkpoints.json, "dump"),
        ):
            setattr(module, name, counted(getattr(module, name)))

    assert survive(tmp_path, patch) > 15
