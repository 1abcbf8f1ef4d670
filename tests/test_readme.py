"""README is true: its commands parse, its recipe is one, and its tree is the repository's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tweetdora.cli import parse_train, parse_with_target, read_task
from tweetdora.config import EvaluateConfig, PushConfig
from tweetdora.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = re.compile(r"(?:accelerate launch|python) [^`\n#|]*?(?:train|evaluate|push_to_hub)\.py[^`\n#|]*")
COMMANDS = sorted({found.strip() for found in SCRIPT.findall(README) if "--help" not in found})


def parse(command):
    """Read a command's flags as its script would."""
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place], words[place + 1 :]
    if script == "train.py":
        return parse_train(flags, "")
    return parse_with_target(flags, EvaluateConfig if script == "evaluate.py" else PushConfig, "", "")


def test_the_readme_has_the_three_commands_of_the_published_run():
    assert {"accelerate launch train.py", "python evaluate.py", "python push_to_hub.py"} <= set(COMMANDS)
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command):
    parse(command)


def test_a_wrong_command_would_not_pass():
    with pytest.raises(InputError, match="unknown argument '--spilt'"):
        parse("python evaluate.py runs/demo --spilt test")


def test_make_knows_the_readmes_words():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)", README)) - {"s", "is"} <= targets


def test_the_recipe_of_the_readme_is_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    task = read_task(str(recipe))
    assert (task.label_words, task.label_values, task.text_column) == (["bad", "good"], ["1", "2"], "review")


def test_the_tree_is_the_repositorys():
    """Every tracked file at the root and every module stands in the tree, and everything in the tree exists."""
    tree = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"[\w./-]+\.(?:py|md|txt|lock|yaml|yml)|(?<=^)[\w.]+/(?:\w+)?", tree, re.MULTILINE))
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = done.stdout.split()
    modules = {Path(path).name for path in tracked if path.startswith("tweetdora/")} - {"__init__.py"}
    known = {
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "Makefile",
        "pyproject.toml",
        ".gitignore",
        ".pre-commit-config.yaml",
    }
    top = {path for path in tracked if "/" not in path} - known
    assert modules | top <= {Path(name).name for name in named}
    missing = [
        name
        for name in named
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "tweetdora", ROOT / "recipes"))
    ]
    assert missing == []


def test_the_package_imports_only_downwards():
    """The floors of README's tree: a module imports only modules that stand below it."""
    tree = re.search(r"tweetdora/ .*?\n(.*?)tests/", README, re.DOTALL)[1]
    floors = [re.findall(r"(\w+)\.py", line) for line in tree.splitlines()]
    floor_of = {name: number for number, names in enumerate(floors) for name in names}
    for name, floor in floor_of.items():
        source = (ROOT / "tweetdora" / f"{name}.py").read_text(encoding="utf-8")
        for imported in re.findall(r"^from tweetdora\.(\w+) import", source, re.MULTILINE):
            assert floor_of[imported] >= floor, f"{name} imports {imported}"
