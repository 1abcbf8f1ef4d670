"""Real launchers, which start scripts in new Pythons; forked.py is for tests that are not about these."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
_running: list[subprocess.Popen] = []


def start(words: Sequence[Any], folder: Path, **environment: str) -> subprocess.Popen:
    """A process with its children, both streams together."""
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _running.append(process)
    return process


def finish(*processes: subprocess.Popen) -> list[str]:
    """What each printed until its end; nothing they started is left over. If one hangs, it says where."""
    said: list[str] = []
    try:
        limit = time.monotonic() + 240
        for process in processes:
            said.append(process.communicate(timeout=max(1, limit - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        for process in processes:
            _signal_pythons(process)
        for process in processes[len(said) :]:
            try:
                said.append(process.communicate(timeout=30)[0])
            except subprocess.TimeoutExpired as error:  # something that is no child any more holds the pipe
                said.append((error.output or b"").decode(errors="replace"))
        pytest.fail("a launch did not end:\n" + "\n".join(said))
    finally:
        for process in processes:
            _kill(process)
    return said


def read_until(process: subprocess.Popen, words: str) -> str:
    """What it printed until a line with these words."""
    said = ""
    for line in process.stdout or ():
        said += line
        if words in line:
            return said
    raise AssertionError(said)


def second_of(process: subprocess.Popen) -> psutil.Process:
    """The process of rank 1 that a launcher has started."""
    (second,) = (child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1")
    return second


def kill_all() -> None:
    """End what a test that failed has left running."""
    for process in [*_running]:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """kill -9 of a launcher and of its workers, each of which has a group of its own."""
    _running.remove(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    if process.stdout is not None:
        process.stdout.close()


def _signal_pythons(process: subprocess.Popen) -> None:
    """End a process and what it started; each Python process prints the stack of its threads."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid)
        for one in [*started.children(recursive=True), started]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "python" in one.exe():  # a launcher calls itself pt_elastic
                    one.send_signal(signal.SIGABRT)
