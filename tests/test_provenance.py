"""Where a result comes from: told so that it can be done again, and without what names a user or a machine."""

import getpass
import json
import os
import platform
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tweetdora import provenance
from tweetdora.provenance import command_line, environment, git_state, utc_now
from tweetdora.records import GitState


def test_environment_names_neither_user_nor_machine_nor_path():
    said = json.dumps(asdict(environment()))
    for secret in {getpass.getuser(), socket.gethostname(), platform.node(), os.path.expanduser("~"), os.getcwd()}:
        assert f'"{secret}' not in said and f"{secret}/" not in said, secret
    assert not [word for word in said.split('"') if word.startswith("/")]


def test_environment_has_versions_hardware_and_state_of_the_code():
    found = environment()
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["torch"] == torch.__version__
    assert set(found.packages) == {
        *("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "wandb"),
    }


PLAIN = dict.fromkeys(
    (
        "ACCELERATE_MIXED_PRECISION",
        "TORCHELASTIC_RUN_ID",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_WORLD_SIZE",
        "FSDP_VERSION",
    )
)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--r", "4"], {}, "python train.py --r 4"),
        (["--system_prompt", 'It\'s $1, "now"'], {}, "python train.py --system_prompt 'It'\"'\"'s $1, \"now\"'"),
        (["--output_dir", f"{os.getcwd()}/runs/x"], {}, "python train.py --output_dir runs/x"),
        (["--output_dir=/home/somebody/x/", "a/b"], {}, "python train.py --output_dir=x a/b"),
        (["--system_prompt", "/s = sarcasm"], {}, "python train.py --system_prompt '/s = sarcasm'"),
        ([], {"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch train.py"),
        (
            [],
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "1"},
            "accelerate launch --mixed_precision bf16 train.py",
        ),
        (
            [],
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "4"},
            "accelerate launch --multi_gpu --num_processes 4 train.py",
        ),
        (
            [],
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 train.py",
        ),
        (
            [],
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"},
            "torchrun --nnodes 2 --nproc_per_node 2 train.py",
        ),
        (
            [],
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2"},
            "accelerate launch --multi_gpu --num_processes 4 --num_machines 2 train.py",
        ),
        (
            ["--r", "4"],
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "FSDP_VERSION": "2"},
            "accelerate launch --multi_gpu --num_processes 2 train.py --r 4 --shard_base true",
        ),
    ],
)
def test_command_is_one_that_can_be_typed_again_without_the_paths_to_the_programs(
    arguments, environment, expected, monkeypatch
):
    for name, value in {**PLAIN, **environment}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["/home/somebody/tweetdora/train.py", *arguments])
    assert command_line() == expected


def git(folder: Path, *words: str) -> str:
    settings = ["-c", "user.name=T", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", folder, *settings, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A git checkout in which provenance.py seems to lie."""
    (tmp_path / "tweetdora").mkdir()
    (tmp_path / "tweetdora" / "provenance.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Start")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tweetdora" / "provenance.py"))
    return tmp_path


def test_git_state_is_the_commit(checkout):
    assert git_state() == GitState(git(checkout, "rev-parse", "HEAD"), dirty=False, changes_sha256=None)


def test_git_state_knows_that_the_work_tree_differs(checkout):
    (checkout / "tweetdora" / "provenance.py").write_text("changed")
    first = git_state()
    assert first.dirty is True and re.fullmatch("[0-9a-f]{64}", first.changes_sha256)
    (checkout / "tweetdora" / "provenance.py").write_text("changed again")
    assert git_state().changes_sha256 != first.changes_sha256


def test_outside_a_checkout_there_is_no_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tweetdora" / "provenance.py"))
    assert git_state() is None


def test_without_git_there_is_no_git_state(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_time_is_utc_to_the_second(monkeypatch):
    monkeypatch.setattr("time.gmtime", lambda: (2026, 3, 4, 5, 6, 7, 2, 63, 0))
    assert utc_now() == "2026-03-04T05:06:07Z"
