"""Scripts in processes forked from one that has imported what they need, which takes a new Python four seconds.

Python's own "forkserver" does the forking. A process is otherwise as a shell starts it: a working folder, environment
and output of its own, and a group for its children. Nor does it take a launcher to start several: `launch` sets what
`accelerate launch` would set. Launchers, and scripts in a new Python, are tested as well, but not in every test.
"""

import atexit
import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked", "tweetdora.evaluation", "tweetdora.training", "tweetdora.compare"])


class Script:
    """A script that is running; what a test needs of subprocess.Popen."""

    def __init__(self, words: list[str], folder: Path, environment: dict[str, str]) -> None:
        output, writer = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run, args=(words, str(folder), environment, writer))
        self._process.start()
        writer.close()
        self.pid: int = self._process.pid
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: Connection) -> None:
        with output, open(output.fileno(), encoding="utf-8", errors="replace", closefd=False) as stream:
            for line in stream:
                self._said.append(line)

    @property
    def returncode(self) -> int | None:
        """The exit status, negative after a signal; None while it is running."""
        return self._process.exitcode

    def lines(self) -> Iterator[str]:
        """What it prints, line by line as it comes, until it ends."""
        for number in itertools.count():
            while number == len(self._said) and self._reader.is_alive():
                time.sleep(0.02)
            if number == len(self._said):
                return
            yield self._said[number]

    def end(self, limit: float = 240) -> str:
        """All that it printed, once it has ended. What it started ends with it.

        Raises:
            AssertionError: it did not end within so many seconds; says where it was.
        """
        self._process.join(limit)
        if hung := self.returncode is None:
            os.kill(self.pid, signal.SIGABRT)  # faulthandler prints the stack of each thread
            self._process.join(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        self._reader.join(10)
        said = "".join(self._said)
        assert not hung, f"a script did not end:\n{said}"
        return said

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start(words: list[Any], folder: Path, **environment: str) -> Script:
    """Start a script, or -m and a module, with its flags; folder: where."""
    with pytest.MonkeyPatch.context() as patch:  # for the server's own imports, the first time
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        forkserver.ensure_running()
    return Script([str(word) for word in words], folder, {**os.environ, **environment})


def launch(count: int, words: list[Any], folder: Path, file: str = "cpu") -> list[Script]:
    """Start a script in several processes of one machine, as `accelerate launch` does with this launch file."""
    return [start(words, folder, **environment) for environment in environments(count, file)]


def environments(count: int, file: str = "cpu", machines: int = 1) -> list[dict[str, str]]:
    """What `accelerate launch` with this launch file sets for each of several processes on one machine or more."""
    flags = ["--config_file", str(ROOT / f"recipes/accelerate/{file}.yaml"), "--num_processes", str(count)]
    options = launch_command_parser().parse_args([*flags, "--main_process_port", "0", "script.py"])
    common = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    share = count // machines
    common |= {"LOCAL_WORLD_SIZE": str(share), "GROUP_WORLD_SIZE": str(machines)}
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % share), "GROUP_RANK": str(rank // share)}
        for rank in range(count)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _run(words: list[str], folder: str, environment: dict[str, str], output: Connection) -> None:
    """Become the script: in the forked process."""
    gc.freeze()  # the Trainer collects garbage when it starts; what is imported by now is none
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out
