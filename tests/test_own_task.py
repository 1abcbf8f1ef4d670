"""README's commands as they stand, on the real small model and real tweets: a task of the user's own, and predictions.

`make demo` and `make test` are what CI runs; the commands of the published run are run by test_publish.py.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tweetdora.device import cpu_cores

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = 100  # of each label


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section of README."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(command: str, folder: Path) -> str:
    """Run a command as in a shell whose environment is activated; its output, both streams together."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": "", "OMP_NUM_THREADS": str(cpu_cores())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The repository's files in a folder of their own, with its assets, README's recipe and a reviews.csv."""
    folder = tmp_path_factory.mktemp("own") / "tweetdora"
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "my-task.yaml").write_text(*blocks("Train on your own data", "yaml"))
    write_reviews(folder / "reviews.csv")
    return folder


def write_reviews(path: Path) -> None:
    """Tweets of the quickstart that are negative or positive, with 1 or 5 stars, one after the other."""
    table = datasets.load_dataset(str(ROOT / "assets/hutto_tweets"), split="train")
    names = table.features["label"].names
    texts = {
        name: [row["text"] for row in table if names[row["label"]] == name][:ROWS] for name in ("negative", "positive")
    }
    assert all(len(found) == ROWS for found in texts.values())
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["review", "stars"])
        for negative, positive in zip(*texts.values(), strict=True):
            writer.writerows([[negative, 1], [positive, 5]])


def test_the_commands_as_they_stand_make_a_model_that_has_learned(checkout):
    (block,) = blocks("Train on your own data", "bash")
    commands = block.splitlines()
    assert len(commands) == 4
    printed = [run(command, checkout) for command in commands]
    assert 'one of these words: "bad" or "good"' in printed[0] and "will change almost nothing" not in printed[0]
    record = json.loads((checkout / "runs/my-task/evaluation/test.json").read_text())
    assert record["data"]["label_counts"] == {"bad": 20, "good": 20}
    assert record["finetuned"]["macro_f1"] > record["baselines"]["uniform"]["macro_f1"] + 0.2
    assert record["finetuned"]["intervals"]["macro_f1"][0] > record["base"]["macro_f1"]
    task = json.loads((checkout / "runs/my-task/publish/task.json").read_text())
    assert (task["task"]["label_words"], task["task"]["label_column"]) == (["bad", "good"], "stars")


def test_the_commands_that_predict_label_a_file_its_lines_and_a_text(checkout):
    """On the run that was trained above, in the place of make demo's."""
    (checkout / "runs/demo").symlink_to("my-task")
    texts = ["I hate this, it is awful", "I love it, what a great day", "What a day!"]  # README's own comes last
    (checkout / "tweets.txt").write_text("".join(f"{text}\n" for text in texts))
    with open(checkout / "tweets.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["id", "text"], *enumerate(texts)])
    (block,) = blocks("Predict", "bash")
    to_file, to_stream = block.splitlines()
    run(to_file, checkout)
    with open(checkout / "labelled.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows][:2] == ["bad", "good"]
    said = run(to_stream, checkout)
    printed = list(csv.DictReader(said[said.index("text,label,") :].splitlines()))[:3]
    assert [(row["text"], row["label"]) for row in printed] == [(row["text"], row["label"]) for row in rows]
    (code,) = blocks("Predict", "python")
    (checkout / "readme.py").write_text(code)
    assert f"label='{rows[2]['label']}'" in run("python readme.py", checkout)
