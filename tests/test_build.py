"""The publishable folder: what a build may replace."""

import math
import os
import re
from pathlib import Path

import pytest
import torch

from tweetdora.build import Outputs, check_output_dir, compare_outputs, staged_folder
from tweetdora.errors import InputError


def fill(folder: Path, *names: str) -> Path:
    """Make a folder with files of these names, each holding its own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


BUILT = ("README.md", "config.json", "model.safetensors", "adapter/adapter_config.json", "plots/training.png")


# What a build may replace


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with the run folder runs/demo and a folder of the user's own; it is the current folder."""
    fill(tmp_path / "work/runs/demo", "run.json", "adapter/adapter_config.json")
    fill(tmp_path / "work/thesis", "chapter.tex")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("runs/demo", "--output_dir runs/demo is the run folder or contains it. Choose a separate folder."),
        ("runs/demo/", "is the run folder or contains it"),
        ("runs/demo/adapter/..", "is the run folder or contains it"),
        ("runs", "is the run folder or contains it"),
        ("link", "is the run folder or contains it"),
        (".", "is the run folder or contains it"),
        ("..", "is the run folder or contains it"),
        ("/", "is the run folder or contains it"),
        ("thesis/chapter.tex", "is a file. Choose a folder"),
        (
            "thesis",
            "thesis would be replaced, but it is not an earlier build of push_to_hub.py: it holds chapter.tex. Choose",
        ),
        ("runs/demo/adapter", "it holds adapter_config.json. Choose another --output_dir"),
        ("clone", "it holds .git, README.md, adapter, config.json, model.safetensors. Choose another --output_dir"),
    ],
)
def test_a_folder_that_a_build_must_not_replace_is_refused(place, folder, message):
    (place / "link").symlink_to("runs/demo")
    fill(place / "clone", *BUILT, ".git/config")
    with pytest.raises(InputError, match=re.escape(message)):
        check_output_dir(folder, "runs/demo")


def test_the_working_folder_is_refused_where_the_run_lies_elsewhere(place, tmp_path):
    run_dir = fill(tmp_path / "elsewhere", "run.json")
    for folder in (".", "..", str(place)):
        with pytest.raises(InputError, match=r"is the (run|working) folder or contains it"):
            check_output_dir(folder, str(run_dir))


@pytest.mark.parametrize("folder", ["runs/demo/publish", "out/publish", "empty", "built", "built/", "older"])
def test_a_new_or_empty_folder_and_an_earlier_build_are_taken(place, folder):
    (place / "empty").mkdir()
    fill(place / "built", *BUILT)
    fill(place / "older", *(name.replace("plots/", "figures/") for name in BUILT))
    check_output_dir(folder, "runs/demo")
    assert files_of(place / "runs") == ["demo/adapter/adapter_config.json", "demo/run.json"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_build_takes_the_place_of_the_old_one_and_leaves_nothing_beside(tmp_path, slash):
    folder = fill(tmp_path / "publish", "old")
    with staged_folder(f"{folder}{slash}") as beside:
        fill(Path(beside), "new")
    assert files_of(tmp_path) == ["publish/new"]
    assert os.listdir(tmp_path) == ["publish"]


@pytest.mark.parametrize("error", [InputError, KeyboardInterrupt])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_build_that_fails_leaves_the_old_one(tmp_path, slash, error):
    folder = fill(tmp_path / "publish", "old")

    with pytest.raises(error), staged_folder(f"{folder}{slash}") as beside:
        fill(Path(beside), "new")
        raise error("no")
    assert files_of(tmp_path) == ["publish/old"] and os.listdir(tmp_path) == ["publish"]


def test_the_old_build_is_there_until_the_new_one_is_in_its_place(tmp_path, monkeypatch):
    """If the last step fails, both are still on the disk."""
    folder, rename = fill(tmp_path / "publish", "old"), os.rename

    def fail_to_publish(source: str, target: str) -> None:
        if target == str(folder):
            raise PermissionError(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    with pytest.raises(PermissionError), staged_folder(str(folder)) as beside:
        fill(Path(beside), "new")
    assert [Path(name).name for name in files_of(tmp_path)] == ["old", "new"]


# What is compared


def test_embeddings_that_peft_adds_are_left_out_of_a_comparison():
    """AutoPeftModel adds some if a tokenizer has more tokens than the base."""
    expected = Outputs([torch.tensor([1.0, 2.0])], ["good"])
    found = compare_outputs(expected, Outputs([torch.tensor([1.0, 2.5, 9.0])], ["good"]))
    assert (found.max_logit_difference, found.equal_generations) == (0.5, 1)
    assert math.isnan(
        compare_outputs(expected, Outputs([torch.tensor([1.0, math.nan])], ["bad"])).max_logit_difference
    )
    assert compare_outputs(expected, Outputs([torch.tensor([1.0])], ["good"])).max_logit_difference == math.inf
