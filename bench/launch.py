"""Benchmark train.py as a process: from `accelerate launch` to the first step, and the whole published recipe."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from bench.settings import Settings
from tweetdora.record_files import read_record
from tweetdora.records import RUN_FILE, RunRecord

PLAN_MARK = "the-plan-begins"  # the run's name; train.py prints it as the plan's first line, after it has loaded all
# A training line of the log: ours, or the Trainer's own dictionary.
LOG_LINE = re.compile(r"^step +\d+/\d+ +loss |'loss'")
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)")  # python -X importtime: own microseconds, module


def measure_launch(settings: Settings) -> dict[str, Any]:
    """Time a launch to the end of the first step, twice (the first warms the disk cache), and break the time down."""
    launcher = [os.path.join(os.path.dirname(sys.executable), "accelerate"), "launch"]
    launcher += ["--config_file", "accelerate_config.yaml"]
    runs = [first_step(launcher, settings) for _ in range(2)]
    plain = first_step([sys.executable, "-X", "importtime"], settings)
    imports = import_seconds(plain.pop("lines"))
    for run in runs:
        del run["lines"]
    return {
        "runs": runs,
        "spent": {
            "launcher": runs[1]["to_plan"] - plain["to_plan"],
            "imports": sum(imports.values()),
            "imports_by_package": dict(imports.most_common(12)),
            "data_tokens_and_model": plain["to_plan"] - sum(imports.values()),
            "trainer_and_first_step": plain["to_first_step"] - plain["to_plan"],
        },
        "spent_note": "from python -X importtime train.py, which is a little slower; launcher is a difference",
    }


def first_step(launcher: list[str], settings: Settings) -> dict[str, Any]:
    """Time a launch until the plan is printed (all is loaded) and until the first training log (a step is done)."""
    with tempfile.TemporaryDirectory() as folder:
        flags = train_flags(settings, os.path.join(folder, "run"))
        flags += ["--max_steps", "1", "--logging_steps", "1", "--run_name", PLAN_MARK]
        lines, seconds = run_timed([*launcher, "train.py", *flags])
    return {
        "to_plan": next(when for when, line in lines if line == PLAN_MARK),
        "to_first_step": next(when for when, line in lines if LOG_LINE.search(line)),
        "to_exit": seconds,
        "lines": [line for _, line in lines],
    }


def import_seconds(lines: list[str]) -> Counter[str]:
    """Sum the seconds of imports by top-level package.

    >>> import_seconds(["import time:   1500000 |    2000000 |   torch.nn", "import time: 500000 | 500000 | torch"])
    Counter({'torch': 2.0})
    """
    seconds: Counter[str] = Counter()
    for line in lines:
        if found := _IMPORT.match(line):
            seconds.update({found[2].partition(".")[0]: int(found[1]) / 1e6})
    return seconds


def measure_full(settings: Settings) -> dict[str, Any]:
    """Time train.py with the published settings in bf16, without validation: the whole process, and training alone."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = os.path.join(folder, "run")
        _, seconds = run_timed([sys.executable, "train.py", *train_flags(settings, run_dir)])
        result = read_record(RunRecord, os.path.join(run_dir, RUN_FILE)).result
    if result is None:
        raise AssertionError("train.py succeeded, but its record has no result")
    return {
        "seconds": seconds,
        "training_seconds": result.seconds,
        "steps": result.steps,
        "train_loss": result.train_loss,
    }


def train_flags(settings: Settings, run_dir: str, precision: str = "bf16") -> list[str]:
    """Return train.py's flags: the published recipe on the bench's data, without validation or tracker."""
    task = settings.task()
    flags = ["--model_name_or_path", settings.model, "--dataset_name", task.dataset_name]
    flags += ["--dataset_config", task.dataset_config] if task.dataset_config else []
    flags += ["--max_train_samples", str(settings.train_examples), "--precision", precision]
    return [*flags, "--max_eval_samples", "0", "--report_to", "none", "--output_dir", run_dir]


def run_timed(
    command: list[str], folder: str | None = None, variables: Mapping[str, str] | None = None
) -> tuple[list[tuple[float, str]], float]:
    """Run a process, in a folder and with more environment variables.

    Return its lines, each with the seconds until it was printed, and the seconds until it ended.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(variables or {})}
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as process:
        lines = [(time.perf_counter() - started, line.rstrip()) for line in process.stdout or ()]
    seconds = time.perf_counter() - started
    if process.returncode:
        tail = "\n".join(line for _, line in lines[-20:])
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{tail}")
    return lines, seconds
