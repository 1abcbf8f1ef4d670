"""`import evaluate` is the library in every process, although the script evaluate.py has its name.

No test may import it by itself: tweetdora.metrics does, behind the guard.
"""

import ast
import importlib.metadata
import importlib.util
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

import tweetdora
from tweetdora import metrics

REPO_DIR = Path(__file__).resolve().parents[1]
GUARD = 'sys.path.sort(key=lambda folder: os.path.isfile(os.path.join(folder, "evaluate.py")))\n'
TRAP = "this is the script evaluate.py; to get the library here, import tweetdora.metrics first"


def is_library(file: str) -> bool:
    path = Path(file).resolve()
    return path.name == "__init__.py" and path.parent.name == "evaluate" and REPO_DIR not in path.parents[:2]


# OpenMP


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_by_sleeping_unless_the_user_has_said_how(monkeypatch, set_by_user, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the package sets is undone
        monkeypatch.delenv(name)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    importlib.reload(tweetdora)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "push_to_hub.py"])
def test_the_scripts_import_the_package_first(script):
    """torch reads OpenMP's settings when it is imported, and every other import may lead to torch."""
    tree = ast.parse((REPO_DIR / script).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [name.name for name in imports[0].names] == ["tweetdora"]


# In this process


def test_here_it_is_the_library():
    assert is_library(metrics.evaluate.__file__)
    assert sys.modules["evaluate"] is metrics.evaluate
    assert metrics.evaluate.__version__ == importlib.metadata.version("evaluate")
    assert issubclass(metrics.ClassificationScores, metrics.evaluate.Metric)


def test_the_folder_with_the_script_comes_last_on_the_path_and_the_others_keep_their_order(monkeypatch, tmp_path):
    (tmp_path / "evaluate.py").touch()
    with_script = [str(tmp_path), os.path.relpath(tmp_path)]
    monkeypatch.setattr(sys, "path", ["/b", with_script[0], "/a", with_script[1], "/c", with_script[0]])
    for _ in range(2):  # running it again changes nothing
        exec(GUARD, {"sys": sys, "os": os})
        assert sys.path == ["/b", "/a", "/c", with_script[0], with_script[1], with_script[0]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "/a"])
    exec(GUARD, {"sys": sys, "os": os})
    assert sys.path == ["/a", ""]


def test_the_guard_stands_in_the_package():
    """The tests above and below use this very line."""
    assert (REPO_DIR / "tweetdora" / "metrics.py").read_text(encoding="utf-8").count(GUARD) == 1


@pytest.mark.filterwarnings(
    "ignore:.*use of fork:DeprecationWarning"
)  # Python 3.12 on, where this process has threads
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_child_of_this_process_meets_the_library(method):
    """The child says what its name leads to, without the seconds that importing takes."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        found = pool.submit(importlib.util.find_spec, "evaluate").result(timeout=120)
    assert found.origin == metrics.evaluate.__file__


# Other processes: all started at once, since most of their time goes into imports


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Processes by name; one runs in a copy of package and script that goes without the guard."""
    unguarded = tmp_path_factory.mktemp("unguarded")
    shutil.copytree(REPO_DIR / "tweetdora", unguarded / "tweetdora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO_DIR / "evaluate.py", unguarded)
    module = unguarded / "tweetdora" / "metrics.py"
    module.write_text(module.read_text(encoding="utf-8").replace(GUARD, ""), encoding="utf-8")

    pytest_command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    commands = {
        "script": (["evaluate.py", "--help"], REPO_DIR),
        "importlib": ([*pytest_command, "-k", "here_it_is_the_library", __file__], REPO_DIR / "tests"),
        "unguarded": (["-c", "import tweetdora.metrics"], unguarded),
        "bare": (["-c", "import evaluate"], REPO_DIR),
    }
    # The folder stands on the path a second time, as with `export PYTHONPATH=.`.
    environment = {**os.environ, "PYTHONPATH": ".", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    processes = {
        name: subprocess.Popen([sys.executable, *command], cwd=folder, **pipes)
        for name, (command, folder) in commands.items()
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_the_script_runs_by_its_path(started):
    stdout, stderr = started["script"].communicate(timeout=300)
    assert started["script"].returncode == 0, stderr
    assert stdout.startswith("usage: evaluate.py ")


def test_pytests_other_import_mode_meets_the_library(started):
    stdout, stderr = started["importlib"].communicate(timeout=300)
    assert started["importlib"].returncode == 0, stdout + stderr
    assert "1 passed" in stdout


def test_without_the_guard_it_is_not(started):
    """The companion: one line less in the package, and the same import meets the script."""
    _, stderr = started["unguarded"].communicate(timeout=300)
    assert started["unguarded"].returncode == 1
    assert TRAP in stderr and "metrics.py" in stderr


def test_a_bare_import_before_the_package_speaks(started):
    _, stderr = started["bare"].communicate(timeout=300)
    assert started["bare"].returncode == 1
    assert stderr.endswith(f"ImportError: {TRAP}\n")


def test_the_script_can_be_loaded_by_its_path_without_running(capsys):
    script = runpy.run_path(str(REPO_DIR / "evaluate.py"), run_name="evaluate_script")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as ended:
        script["main"](["--help"])
    assert ended.value.code == 0
    assert "Measure a run, an adapter or a model" in capsys.readouterr().out
    assert is_library(sys.modules["evaluate"].__file__)


def test_the_script_refuses_to_be_taken_for_the_library():
    with pytest.raises(ImportError, match=TRAP):
        runpy.run_path(str(REPO_DIR / "evaluate.py"), run_name="evaluate")


# The files


def imports_library(source: str) -> bool:
    """Whether a syntax tree holds an import of `evaluate`, in whatever form."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [word.value for word in node.args if isinstance(word, ast.Constant)]
        if any(str(name).split(".")[0] == "evaluate" for name in names):
            return True
    return False


def test_only_the_guarded_module_imports_the_library():
    folders = [path for path in REPO_DIR.iterdir() if path.is_dir() and path.name not in ("runs", "assets")]
    folders = [path for path in folders if not path.name.startswith(".")]
    files = sorted({*REPO_DIR.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))})
    assert {"evaluate.py", "train.py", "metrics.py", "test_metrics.py"} <= {file.name for file in files}
    importing = [file.relative_to(REPO_DIR) for file in files if imports_library(file.read_text(encoding="utf-8"))]
    assert importing == [Path("tweetdora/metrics.py")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import evaluate", True),
        ("import os, evaluate as e", True),
        ("import evaluate.module", True),
        ("def load():\n    from evaluate import Metric", True),
        ("from evaluate.module import Metric", True),
        ("importlib.import_module('evaluate')", True),
        ("__import__('evaluate')", True),
        ("import tweetdora.evaluation", False),
        ("from tweetdora.metrics import evaluate", False),
        ("from . import evaluate", False),
        ("import evaluated", False),
        ("# import evaluate\ntext = 'import evaluate'", False),
    ],
)
def test_an_import_of_the_library_is_seen_in_every_form(source, expected):
    """The companion of the test above: it can fail."""
    assert imports_library(source) is expected


def test_nothing_else_at_the_root_has_a_librarys_name():
    """The root comes last on the path: a library would shadow the package, and a folder may shadow a library."""
    installed = set(importlib.metadata.packages_distributions()) - {"tests"}
    here = {path.stem if path.suffix == ".py" else path.name for path in REPO_DIR.iterdir()}
    assert "tweetdora" in here
    assert here & installed == {"evaluate"}
