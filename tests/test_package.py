"""`pip install .`: the wheel holds what the commands need, and they run where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "tweetdora-train": "train.py",
    "tweetdora-evaluate": "evaluate.py",
    "tweetdora-predict": "predict.py",
    "tweetdora-push": "push_to_hub.py",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder into which the wheel of these files was installed; what it needs comes from this environment."""
    setuptools = pytest.importorskip("setuptools", reason="pip builds wheels with setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("setuptools 77 and later know the licence field of pyproject.toml")
    folder = tmp_path_factory.mktemp("package")
    words = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.py",
        "*.toml",
        "*.md",
        "*.txt",
        "LICENSE",
    ]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "source")]
    subprocess.run(wheel, check=True, timeout=300)
    (path,) = folder.glob("tweetdora-*.whl")
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(folder / "site"), path], check=True)
    return folder / "site"


def run(installed: Path, command: str, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    script = [sys.executable, str(installed / "bin" / command), *words]
    return subprocess.run(script, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_shows_the_help_of_its_script(installed, command):
    done = run(installed, command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: {command} " in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--no_such_flag", "1"]])
def test_a_command_answers_flags_before_the_heavy_imports_as_its_script_does(installed, words):
    script = [sys.executable, "-X", "importtime", str(installed / "bin/tweetdora-evaluate"), *words]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(script, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "tweetdora.cli" in imported and not imported & {"torch", "datasets", "accelerate", "tweetdora.evaluation"}
    if words == ["--help"]:
        assert done.returncode == 0 and done.stdout.startswith("usage: tweetdora-evaluate ")
    else:
        said = [line for line in lines if not line.startswith("import time:")]
        assert done.returncode == 2 and said[0].startswith("tweetdora-evaluate: unknown argument '--no_such_flag'")


def test_a_refusal_bears_the_commands_name(installed):
    done = run(installed, "tweetdora-predict", "runs/nix", "nix.csv")
    assert (done.returncode, done.stderr) == (2, "tweetdora-predict: nix.csv: there is no such file.\n")


def test_the_cards_template_and_the_classifier_are_in_it(installed):
    code = (
        "import os, tweetdora.model_card as m; assert os.path.isfile(m.TEMPLATE), m.TEMPLATE; from tweetdora import "
    )
    code += "Classifier; from tweetdora.provenance import git_state; print(m.TEMPLATE, git_state())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "tweetdora/scripts/model_card_template.md"), "None"]


def test_the_wheel_holds_nothing_else(installed):
    (path,) = installed.parent.glob("tweetdora-*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(path).namelist()}
    assert names == {"tweetdora", "tweetdora-0.1.0.dist-info"}
