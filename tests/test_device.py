"""The machine: its hardware, the threads that are used of it, and the memory that was needed."""

import os
import sys

import pytest
import torch

from tweetdora import device
from tweetdora.device import cpu_cores, hardware, peak_memory_bytes, use_cpu_threads


def test_hardware_is_this_machines():
    found = hardware()
    assert found.cores == cpu_cores() == len(os.sched_getaffinity(0))
    assert found.cpu
    with open("/proc/meminfo") as stream:
        kibibytes = int(stream.readline().split()[1])
    assert found.memory_bytes == pytest.approx(kibibytes * 1024, rel=0.01)
    assert found.gpus == []


def test_peak_memory_is_at_least_what_was_used():
    held = bytearray(300_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory_bytes({})["process"] > 300_000_000


def test_peak_memory_is_the_largest_of_all_processes(monkeypatch):
    monkeypatch.setattr(
        device,
        "gather_object",
        lambda own: [{"process": 5, "gpu0": 7, "gpu1": 0}, {"process": 6, "gpu0": 0, "gpu1": 8}],
    )
    assert peak_memory_bytes({}) == {"process": 6, "gpu0": 7, "gpu1": 8}
    assert peak_memory_bytes({"process": 9, "gpu0": 1}) == {"process": 9, "gpu0": 7, "gpu1": 8}


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
    monkeypatch.setattr(device, "cpu_cores", lambda: cores)
    assert use_cpu_threads(torch.device("cpu"), processes, threads) == expected
    assert torch.get_num_threads() == expected


def test_on_a_gpu_the_threads_are_left_alone(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "cpu_cores", lambda: before + 5)
    assert use_cpu_threads(torch.device("cuda"), 1) == before


def test_a_limit_of_a_control_group_counts(tmp_path):
    """The innermost group has no limit, the one above leaves 500 bytes, the outermost 300."""
    groups = {"": (800, 550, 50), "job": (1000, 600, 100), "job/step": ("max", 500, 0)}
    for path, (limit, used, inactive) in groups.items():
        folder = tmp_path / path
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\nactive_file 9\n")
    (tmp_path / "own").write_text("0::/job/step\n")
    assert device._left_of_the_cgroup(str(tmp_path), str(tmp_path / "own")) == 300
    (tmp_path / "own").write_text("5:memory:/job\n")
    assert device._left_of_the_cgroup(str(tmp_path), str(tmp_path / "own")) == sys.maxsize
    assert device._left_of_the_cgroup(str(tmp_path), str(tmp_path / "none")) == sys.maxsize
