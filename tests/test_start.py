"""What a script imports before it answers --help; a timed test would depend on the machine."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "peft", "accelerate", "datasets", "pandas", "evaluate", "wandb", "matplotlib"}
CODE = """
import atexit, runpy, sys
atexit.register(lambda: print("IMPORTED", *sys.modules))
script = sys.argv[1]
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def imported(*words: str, status: int) -> set[str]:
    """The modules that a script has imported when it ends."""
    done = subprocess.run([sys.executable, "-c", CODE, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return set(done.stdout.partition("IMPORTED ")[2].split())


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py", "push_to_hub.py"])
def test_help_and_wrong_flags_are_answered_before_the_heavy_imports(script):
    assert imported(script, "--help", status=0) & HEAVY == set()
    assert imported(script, "--no_such_flag", "1", status=2) & HEAVY == set()


def test_train_answers_help_before_the_imports_that_flags_do_without():
    found = imported("train.py", "--help", status=0)
    assert found & {"datasets", "pandas", "evaluate", "matplotlib", "peft.auto", "tweetdora.training"} == set()
    assert imported("train.py", "--learning_rate", "abc", "--help", status=2) & {"datasets", "peft.auto"} == set()


def test_a_dry_run_needs_no_plots_and_no_metrics(teachable_dir, data_dir, tmp_path):
    words = ["--model_name_or_path", teachable_dir, "--dataset_name", data_dir, "--output_dir", str(tmp_path / "run")]
    words += ["--system_prompt", "Say how the day is: negative, neutral or positive.", "--report_to", "none"]
    found = imported("train.py", *words, "--precision", "fp32", "--dry_run", "true", status=0)
    assert found & {"evaluate", "matplotlib"} == set() and "torch" in found  # transformers' trackers import wandb
