"""Scripts in processes forked from one that has already imported what they need, which saves five seconds each.

A `Server` forks them. Each script has a working folder, environment, output and process group of its own, but what
libraries read when they are imported is the server's environment. `launch` sets what `accelerate launch` sets. Unlike
the scripts that a user starts, they share the server's modules, hash seed and random state, leave Python by os._exit,
and have no launcher that ends the others when one has failed. What depends on these is tested with new Pythons and
launchers (launchers.py, and in test_scripts.py, test_package.py and test_publish.py).

    python tests/forked.py SOCKET train.py --max_steps 3     # run a script from the server with this socket
"""

import atexit
import contextlib
import faulthandler
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
_IMPORTED = ("tweetdora.evaluation", "tweetdora.training", "tweetdora.compare", "tweetdora.publish", "tweetdora.build")
_LIMIT = 240.0  # seconds; most scripts take a few
_running: list["Script"] = []
# Below those that the system gives away; other test processes begin elsewhere.
_PORTS = itertools.count(20_000 + os.getpid() * 37 % 10_000)


class Server:
    """A process that has imported the scripts' libraries. It ends with the one that started it, or by `close`."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = _IMPORTED) -> None:
        self.environment = dict(environment)
        self._modules = modules
        self._process: subprocess.Popen | None = None
        self._folder = ""

    @property
    def address(self) -> str:
        """The path of its socket; the server is started the first time, and if it has died."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            self._folder = tempfile.mkdtemp(prefix="forked-")
            path = os.pathsep.join(
                [str(ROOT), str(ROOT / "tests"), *filter(None, [self.environment.get("PYTHONPATH")])]
            )
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.join(self._folder, "socket"))
                listener.listen()
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "import forked; forked.serve()", str(listener.fileno()), *self._modules],
                    cwd=ROOT,
                    env={**self.environment, "PYTHONPATH": path},
                    pass_fds=[listener.fileno()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the tests
                )
            atexit.register(self.close)
        return os.path.join(self._folder, "socket")

    def close(self) -> None:
        """End it. The scripts that it forked go on."""
        if self._process is not None:
            self._process.communicate()
            shutil.rmtree(self._folder)
            self._process = None


_server = Server(os.environ)  # as it is before any test changes it


class Script:
    """A script that is running; what tests need of subprocess.Popen.

    Args:
        address: The socket of its server.
        words: The script, or -m and a module, and its flags.
        output: The file descriptor to print to; None: to `said`.
    """

    def __init__(
        self,
        address: str,
        words: Sequence[Any],
        folder: Path,
        environment: Mapping[str, str],
        output: int | None = None,
    ) -> None:
        reader, writer = os.pipe() if output is None else (None, output)
        self._keeper = socket.socket(socket.AF_UNIX)
        self._keeper.connect(address)
        socket.send_fds(self._keeper, [b"."], [writer])
        if reader is not None:
            os.close(writer)
        given = {"words": [str(word) for word in words], "folder": str(folder), "environment": dict(environment)}
        self._keeper.sendall(json.dumps(given).encode() + b"\n")
        self._answers = self._keeper.makefile("r")
        said = self._answers.readline()
        assert said, "the server of forked scripts has ended"
        self.pid = int(said)
        self.returncode: int | None = None  # the exit status, negative after a signal; None while it is running
        self._said: list[str] = []
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()
        self._reading = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._reading.start()

    def _wait(self) -> None:
        said = self._answers.readline()
        self.returncode = int(said) if said else -signal.SIGKILL  # the keeper was killed, and its script is unknown

    def _read(self, reader: int | None) -> None:
        if reader is not None:
            with open(reader, encoding="utf-8", errors="replace") as stream:
                for line in stream:
                    self._said.append(line)

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
            more = self._reading.is_alive() and time.monotonic() < limit
            if words in self.said:
                return
            assert more, f"no line with {words!r}:\n{self.said}"
            time.sleep(0.02)

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still running."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self, seconds: float = _LIMIT) -> str:
        """All that it printed, once it has ended by itself."""
        return finish(self, seconds=seconds)[0]

    def join(self, seconds: float | None = None) -> bool:
        """Wait for its end; False if it does not come."""
        self._waiting.join(None if seconds is None else max(0.0, seconds))
        return self.returncode is not None

    def kill(self) -> None:
        """End it and what it started, by kill -9."""
        if self in _running:
            _running.remove(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.send_signal(signal.SIGKILL)  # if it has no group of its own yet
        self._waiting.join(30)
        self._reading.join(30)  # something outside the group may hold its output
        with contextlib.suppress(OSError):  # the keeper may have closed it
            self._keeper.shutdown(socket.SHUT_RDWR)
        self._answers.close()
        self._keeper.close()


def start(
    words: Sequence[Any],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    server: Server | None = None,
) -> Script:
    """Start a script, or -m and a module, with its flags, in a working folder.

    Args:
        environment: What it has beside the server's environment; without a server, beside that of this process.
    """
    given = {**(server.environment if server else os.environ), **(environment or {})}
    _running.append(Script((server or _server).address, words, folder, given))
    return _running[-1]


def server_address() -> str:
    """The socket of the server in the environment of the tests, for `python tests/forked.py SOCKET SCRIPT`."""
    return _server.address


def finish(*scripts: Script, seconds: float = _LIMIT) -> list[str]:
    """What each printed, once all have ended by themselves.

    Raises:
        AssertionError: one did not end; with the stacks of all.
    """
    limit = time.monotonic() + seconds
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
    assert not any(script._reading.is_alive() for script in scripts), "a script's output has no end"
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
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

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
    from accelerate.utils import is_port_in_use

    return next(port for port in _PORTS if not is_port_in_use(port))


# In the server and what it forks


def serve() -> None:
    """Import the modules, and fork a script for each connection to the socket, until standard input ends."""
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.freeze()  # the Trainer collects garbage when it starts; what is imported by now is none
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    with socket.socket(fileno=int(sys.argv[1])) as listener:
        while 0 not in select.select([listener, 0], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> NoReturn:
    """Run one script, and say its process id and exit status; end it if nobody listens any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, (output,), *_ = socket.recv_fds(connection, 1, 1)
    with connection.makefile("r") as stream:
        given = json.loads(stream.readline())
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(output=output, **given)
    os.close(output)
    with contextlib.suppress(OSError):  # nobody listens any more
        connection.sendall(b"%d\n" % pid)
    ended = 0
    while not ended:
        if select.select([connection], [], [], 0.01)[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(words: list[str], folder: str, environment: dict[str, str], output: int) -> NoReturn:
    """Become the script, in the forked process, and end as Python does."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # TMPDIR may be another
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable()
    assert "trackio" not in sys.modules, "it reads its environment when it is imported"
    status, interrupted = 1, False
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        interrupted = isinstance(error, KeyboardInterrupt)
    finally:
        threading._shutdown()  # waits for threads, as Python does before it ends
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(status & 0xFF)


def main(address: str, *words: str) -> None:
    """Stand for `python`: run a script from a server, pass signals on, and end as it does."""
    script = Script(address, words, Path.cwd(), os.environ, output=1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: script.send_signal(number))
    script.join()
    if script.returncode < 0:
        with contextlib.suppress(OSError):  # that of SIGKILL cannot be set
            signal.signal(-script.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -script.returncode)
    sys.exit(script.returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
