"""forked.py, which other tests rely on: its scripts end as those of a new Python do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest

FORKED = str(Path(forked.__file__))


@pytest.mark.parametrize(
    "code",
    [
        "print('said')",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('why')",
        "import sys; sys.exit()",
        "raise ValueError('wrong')",
        "raise KeyboardInterrupt",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.3), print('late'))).start()",
        "import sys; print(sys.argv[1:], sys.stdin.read())",
        "import os; print(os.environ['GIVEN'], os.getcwd())",
    ],
)
def test_a_script_ends_as_in_a_new_python(code, tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIVEN", "here")
    words = [str(path), "--a", "b c"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    new = subprocess.run([sys.executable, *words], **pipes)
    stand_in = subprocess.run([sys.executable, FORKED, forked.server_address(), *words], **pipes)
    script = forked.start(words, tmp_path)
    said = script.end()
    assert script.returncode == stand_in.returncode == new.returncode
    assert said.splitlines()[-1:] == stand_in.stdout.splitlines()[-1:] == new.stdout.splitlines()[-1:]


def test_a_script_whose_stand_in_is_killed_ends_too(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    words = [sys.executable, FORKED, forked.server_address(), str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as stand_in:
        pid = int(stand_in.stdout.readline())
        assert psutil.pid_exists(pid) and pid != stand_in.pid
        os.kill(stand_in.pid, signal.SIGKILL)
    limit = time.monotonic() + 60
    while psutil.pid_exists(pid):
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_server_that_died_is_started_again(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("print('said')")
    server = forked.Server(os.environ, modules=())
    for _ in range(2):
        assert forked.start([path], tmp_path, server=server).end() == "said\n"
        server._process.kill()
        server._process.wait()
    server.close()
