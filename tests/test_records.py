"""Records: written whole or not at all, read with reasons, and nothing in them that names a user or a machine."""

import getpass
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tweetdora import records
from tweetdora.errors import InputError
from tweetdora.records import (
    command_line,
    cpu_cores,
    environment,
    file_sha256,
    git_state,
    hardware,
    peak_memory_bytes,
    read_json,
    read_run,
    tensors_sha256,
    use_cpu_threads,
    utc_now,
    write_json,
)

# Writing


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    record = {"text": "größer 🌞", "number": 0.1, "none": None, "list": [1, [True]]}
    write_json(str(tmp_path / "run.json"), record)
    assert read_json(str(tmp_path / "run.json")) == record


def test_a_record_is_readable_text_with_a_newline_at_its_end(tmp_path):
    write_json(str(tmp_path / "run.json"), {"word": "größer", "steps": 3})
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == '{\n  "word": "größer",\n  "steps": 3\n}\n'


def test_missing_folders_are_made(tmp_path):
    write_json(str(tmp_path / "new" / "folder" / "run.json"), {})
    assert read_json(str(tmp_path / "new" / "folder" / "run.json")) == {}


def test_a_name_without_a_folder_is_written_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json("run.json", {"steps": 3})
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": 3}


def test_a_dump_that_fails_leaves_the_old_record(tmp_path):
    """The list is written before the set, which JSON has no form for, is met."""
    path = tmp_path / "run.json"
    write_json(str(path), {"status": "started"})
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_json(str(path), {"history": list(range(100_000)), "bad": set()})
    assert read_json(str(path)) == {"status": "started"}


def test_a_process_killed_while_writing_leaves_the_old_record(tmp_path, monkeypatch):
    """All is written but the new file is not yet in the old one's place."""
    path = tmp_path / "run.json"
    write_json(str(path), {"status": "started"})

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(str(path), {"status": "finished"})
    assert read_json(str(path)) == {"status": "started"}


def test_the_new_record_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """Else a machine that loses power may have neither."""
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    write_json(str(tmp_path / "run.json"), {})
    assert order == ["fsync", "replace"]


def test_a_written_record_leaves_no_part_behind(tmp_path):
    write_json(str(tmp_path / "run.json"), {})
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_dump_that_fails_leaves_no_part_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(str(tmp_path / "run.json"), {"bad": set()})
    assert os.listdir(tmp_path) == []


# Reading


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/run.json is missing.$"):
        read_json(str(tmp_path / "run.json"))


@pytest.mark.parametrize("content", [b'{"steps": ', b"", b"\xff\xfe"])
def test_a_broken_record_is_named(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/run.json is not readable JSON \(.*\); it was changed or cut.$"
    ):
        read_json(str(tmp_path / "run.json"))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run as far as read_run looks."""
    folder = tmp_path / "runs" / "mine"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    # printf weights | sha256sum
    sha256 = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    run = {"record_version": records.RECORD_VERSION, "status": "finished", "adapter": {"sha256": sha256}}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def change(run_dir: Path, **changes: Any) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, **changes}))


def test_a_finished_run_is_read(run_dir):
    assert read_run(str(run_dir))["status"] == "finished"


def test_a_folder_that_is_no_run_is_refused_with_the_run_folders_there_are(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parents[1])
    (run_dir.parent / "empty").mkdir()
    (run_dir.parent / "another").mkdir()
    (run_dir.parent / "another" / "run.json").write_text("{}")
    with pytest.raises(
        InputError,
        match="^nowhere is not a run folder: there is no such folder. Train first with train.py. "
        "Run folders here: runs/another, runs/mine.$",
    ):
        read_run("nowhere")


def test_a_folder_that_is_no_run_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^runs/x is not a run folder: there is no such folder. Train first"):
        read_run("runs/x")


@pytest.mark.parametrize("status", ["planned", "started", "interrupted", "diverged"])
def test_an_unfinished_run_is_refused_with_its_status_and_the_way_on(status, run_dir):
    change(run_dir, status=status)
    with pytest.raises(
        InputError,
        match=f"^the run in {run_dir} is {status}, not finished. Go on with its train.py command and "
        "--resume_from_checkpoint true.$",
    ):
        read_run(str(run_dir))


@pytest.mark.parametrize("version", [0, 1, None])
def test_a_record_of_another_version_is_refused(version, run_dir):
    change(run_dir, record_version=version)
    message = f"^{run_dir}/run.json has record version {version}; this code reads version {records.RECORD_VERSION}.$"
    with pytest.raises(InputError, match=message):
        read_run(str(run_dir))


def test_a_run_without_its_adapter_is_refused(run_dir):
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        InputError, match="adapter_model.safetensors is missing; the run record says that the run fini"
    ):
        read_run(str(run_dir))


def test_a_run_whose_adapter_was_changed_is_refused(run_dir):
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        InputError,
        match=f"adapter_model.safetensors is not the adapter that {run_dir}/run.json describes: its SHA-256",
    ):
        read_run(str(run_dir))


# Hashes


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"weights" * 100_000)
    assert file_sha256(str(tmp_path / "file")) == hashlib.sha256(b"weights" * 100_000).hexdigest()


TENSORS = [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3.0]]))]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("a", torch.tensor([1.0, 2.5])), TENSORS[1]], id="value"),
        pytest.param([("aa", TENSORS[0][1]), TENSORS[1]], id="name"),
        pytest.param([("a", torch.tensor([[1.0, 2.0]])), TENSORS[1]], id="shape"),
        pytest.param([("a", torch.tensor([1.0, 2.0]).view(torch.int32)), TENSORS[1]], id="kind of number"),
        pytest.param(TENSORS[:1], id="one less"),
        pytest.param([("a", TENSORS[0][1]), ("b", torch.tensor([[-3.0]]))], id="sign"),
    ],
)
def test_hash_of_tensors_changes_with(other):
    assert tensors_sha256(other) != tensors_sha256(TENSORS)


def test_hash_of_tensors_does_not_depend_on_their_order():
    assert tensors_sha256(TENSORS[::-1]) == tensors_sha256(TENSORS)


def test_hash_of_tensors_does_not_depend_on_how_they_lie_in_memory():
    matrix = torch.arange(6.0).view(2, 3)
    assert tensors_sha256([("a", matrix.T.contiguous().T)]) == tensors_sha256([("a", matrix)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hash_of_tensors_takes_every_kind_of_number(dtype):
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    assert len(tensors_sha256([("a", weight)])) == 64


# What a record says of machine and command


def test_environment_names_neither_user_nor_machine_nor_path():
    said = json.dumps(environment())
    for secret in {getpass.getuser(), socket.gethostname(), platform.node(), os.path.expanduser("~"), os.getcwd()}:
        assert f'"{secret}' not in said and f"{secret}/" not in said, secret
    assert not [word for word in said.split('"') if word.startswith("/")]


def test_environment_has_versions_hardware_and_state_of_the_code():
    found = environment()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["packages"]) == {
        *("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "wandb"),
    }
    assert set(found) == {"python", "platform", "packages", "hardware", "git"}


def test_hardware_is_this_machines():
    found = hardware()
    assert found["cores"] == cpu_cores() == len(os.sched_getaffinity(0))
    assert found["cpu"]
    with open("/proc/meminfo") as stream:
        kibibytes = int(stream.readline().split()[1])
    assert found["memory_bytes"] == pytest.approx(kibibytes * 1024, rel=0.01)
    assert found["gpus"] == []


PLAIN = dict.fromkeys(("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))


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
        ([], {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "4"}, "accelerate launch --num_processes 4 train.py"),
        (
            [],
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 train.py",
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
    """A git checkout in which records.py seems to lie."""
    (tmp_path / "tweetdora").mkdir()
    (tmp_path / "tweetdora" / "records.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "Start")
    monkeypatch.setattr(records, "__file__", str(tmp_path / "tweetdora" / "records.py"))
    return tmp_path


def test_git_state_is_the_commit(checkout):
    assert git_state() == {"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False, "changes_sha256": None}


def test_git_state_knows_that_the_work_tree_differs(checkout):
    (checkout / "tweetdora" / "records.py").write_text("changed")
    first = git_state()
    assert first["dirty"] is True and re.fullmatch("[0-9a-f]{64}", first["changes_sha256"])
    (checkout / "tweetdora" / "records.py").write_text("changed again")
    assert git_state()["changes_sha256"] != first["changes_sha256"]


def test_outside_a_checkout_there_is_no_git_state(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(records, "__file__", str(tmp_path / "tweetdora" / "records.py"))
    assert git_state() is None


def test_without_git_there_is_no_git_state(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state() is None


def test_peak_memory_is_at_least_what_was_used():
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_bytes()["process"] > 300_000_000


def test_peak_memory_is_the_largest_of_all_processes(monkeypatch):
    monkeypatch.setattr(
        records,
        "gather_object",
        lambda own: [{"process": 5, "gpu0": 7, "gpu1": 0}, {"process": 6, "gpu0": 0, "gpu1": 8}],
    )
    assert peak_memory_bytes() == {"process": 6, "gpu0": 7, "gpu1": 8}


def test_time_is_utc_to_the_second(monkeypatch):
    monkeypatch.setattr("time.gmtime", lambda: (2026, 3, 4, 5, 6, 7, 2, 63, 0))
    assert utc_now() == "2026-03-04T05:06:07Z"


# Threads


@pytest.mark.parametrize(
    ("cores", "processes", "local", "threads", "expected"),
    [
        (8, 1, None, 0, 8),
        (8, 2, None, 0, 4),
        (8, 16, "4", 0, 2),  # 16 processes on several machines, four of them here
        (3, 2, None, 0, 1),
        (2, 4, None, 0, 1),
        (8, 2, None, 3, 3),  # asked for
    ],
)
def test_processes_share_the_cores(cores, processes, local, threads, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.setattr(records, "cpu_cores", lambda: cores)
    assert use_cpu_threads(torch.device("cpu"), processes, threads) == expected
    assert torch.get_num_threads() == expected


def test_on_a_gpu_the_threads_are_left_alone(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(records, "cpu_cores", lambda: before + 5)
    assert use_cpu_threads(torch.device("cuda"), 1) == before
