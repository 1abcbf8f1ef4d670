"""Scripts in processes forked from one that has already imported what they need, which saves four seconds each.

Python's own "forkserver" forks them. Each has a working folder, environment, output and process group of its own, and
`launch` sets what `accelerate launch` sets. Unlike the scripts that a user starts, they share the server's modules,
hash seed and random state, leave Python by os._exit, and have no launcher that ends the others when one has failed.
What depends on these is tested with new Pythons and launchers (launchers.py, and in test_scripts.py, test_package.py
and test_publish.py).
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
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_port_in_use
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent
_ENVIRONMENT = dict(os.environ)  # before any test changes it
_CONTEXT: Any = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked", "tweetdora.evaluation", "tweetdora.training", "tweetdora.compare"])
_LIMIT = 240.0  # seconds; the scripts take a few
_running: list["Script"] = []
# Below those that the system gives away; other test processes begin elsewhere.
_PORTS = itertools.count(20_000 + os.getpid() * 37 % 10_000)


class Script:
    """A script that is running; what tests need of subprocess.Popen."""

    def __init__(self, words: Sequence[Any], folder: Path, environment: Mapping[str, str]) -> None:
        output, writer = _CONTEXT.Pipe(duplex=False)
        given = ([str(word) for word in words], str(folder), dict(environment), writer)
        self._process = _CONTEXT.Process(target=_run, args=given)
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

    @property
    def said(self) -> str:
        """What it has printed, standard output and error together."""
        return "".join(self._said)

    def wait_for(self, words: str) -> None:
        """Wait for a line with these words.

        Raises:
            AssertionError: it has ended without one, or takes too long.
        """
        limit = time.monotonic() + _LIMIT
        while True:
            more = self._reader.is_alive() and time.monotonic() < limit
            if words in self.said:
                return
            assert more, f"no line with {words!r}:\n{self.said}"
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still running."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> str:
        """All that it printed, once it has ended by itself."""
        return finish(self)[0]

    def join(self, seconds: float) -> bool:
        """Wait for its end; False if it does not come."""
        self._process.join(max(0.0, seconds))
        return self.returncode is not None

    def kill(self) -> None:
        """End it and what it started, by kill -9."""
        if self in _running:
            _running.remove(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()  # if it has no group of its own yet
        self._process.join()
        self._reader.join(30)  # something outside the group may hold its output


def start(words: Sequence[Any], folder: Path, environment: Mapping[str, str] | None = None) -> Script:
    """Start a script, or -m and a module, with its flags, in a working folder."""
    _ensure_server()
    _running.append(Script(words, folder, {**os.environ, **(environment or {})}))
    return _running[-1]


def finish(*scripts: Script) -> list[str]:
    """What each printed, once all have ended by themselves.

    Raises:
        AssertionError: one did not end; with the stacks of all.
    """
    limit = time.monotonic() + _LIMIT
    try:
        if not all([script.join(limit - time.monotonic()) for script in scripts]):
            for script in scripts:
                script.send_signal(signal.SIGABRT)  # faulthandler prints the stack of each thread
            for script in scripts:
                script.join(10)
            raise AssertionError("a script did not end:\n" + "\n".join(script.said for script in scripts))
    finally:
        for script in scripts:
            script.kill()
    assert not any(script._reader.is_alive() for script in scripts), "a script's output has no end"
    return [script.said for script in scripts]


def kill_all() -> None:
    """End what a test that failed has left running."""
    for script in [*_running]:
        script.kill()


def launch(count: int, words: Sequence[Any], folder: Path, file: str = "cpu") -> list[Script]:
    """Start a script in several processes of one machine, as `accelerate launch` does with this launch file."""
    return [start(words, folder, environment) for environment in environments(count, file)]


def environments(count: int, file: str = "cpu", machines: int = 1) -> list[dict[str, str]]:
    """What Accelerate, torch and our scripts read of `accelerate launch` with this launch file, for each process."""
    flags = ["--config_file", str(ROOT / f"recipes/accelerate/{file}.yaml"), "--num_processes", str(count)]
    options = launch_command_parser().parse_args([*flags, "--main_process_port", str(free_port()), "script.py"])
    common = prepare_multi_gpu_env(_validate_launch_command(options)[0])
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": options.master_port, "WORLD_SIZE": str(count)}
    share = count // machines
    common |= {"LOCAL_WORLD_SIZE": str(share), "GROUP_WORLD_SIZE": str(machines)}
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % share), "GROUP_RANK": str(rank // share)}
        for rank in range(count)
    ]


def free_port() -> int:
    """A port that nobody uses, and that nothing else here will be given."""
    return next(port for port in _PORTS if not is_port_in_use(port))


def _ensure_server() -> None:
    """Start the server, the first time, in the environment that was there before any test."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [_ENVIRONMENT.get("PYTHONPATH")])]
    with patch.dict(os.environ, {**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)}, clear=True):
        forkserver.ensure_running()


def _run(words: list[str], folder: str, environment: dict[str, str], output: Connection) -> None:
    """Become the script: in the forked process."""
    gc.freeze()  # the Trainer collects garbage when it starts; what is imported by now is none
    multiprocessing.set_start_method(None, force=True)  # not "forkserver"
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
    assert "tweetdora.training" in sys.modules, "the server has imported nothing"
    assert "trackio" not in sys.modules, "it reads its environment when it is imported"
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
