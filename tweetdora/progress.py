"""What a training prints: one line for each log step, validation scores that stand out, and a table at the end."""

import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tweetdora.records import RunRecord

# Column title and log name of the validation scores, in the order shown.
_SCORES = {
    "macro-F1": "eval_macro_f1",
    "accuracy": "eval_accuracy",
    "loss": "eval_loss",
    "parse rate": "eval_parse_rate",
    "EOS rate": "eval_eos_rate",
}


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without its log lines, which ProgressLines prints."""

    def on_log(self, *arguments: Any, **keywords: Any) -> None:
        """Print nothing."""


class ProgressLines(TrainerCallback):
    """One line for each log step; the main process prints it."""

    def __init__(self) -> None:
        self._started_at, self._first_step = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock for the time left. A resumed run has fewer steps to do."""
        self._started_at, self._first_step = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line; the last one, the Trainer's summary, is left to format_summary."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            passed, done = time.monotonic() - self._started_at, state.global_step - self._first_step
            left = passed / done * (state.max_steps - state.global_step) if done else None
            print_line(format_step(logs, state.global_step, state.max_steps, left))
        elif "eval_loss" in logs:
            print_line(format_validation(logs, state.global_step, state.max_steps), style="bold green")


def print_line(line: str, style: str = "") -> None:
    """Print above a progress bar; with the style in a terminal, plain anywhere else."""
    with tqdm.external_write_mode():
        Console(soft_wrap=True).print(Text(line, style=style))


def format_step(logs: dict[str, Any], step: int, steps: int, seconds_left: float | None) -> str:
    """Return the line for a log step of the training.

    >>> logs = {"loss": "0.354", "learning_rate": 4.1e-4, "grad_norm": 1.234, "samples_per_second": 22.4}
    >>> format_step(logs, 40, 120, 65)
    'step  40/120  loss 0.354  lr 4.1e-04  grad 1.23  22 ex/s  ETA 1:05'
    """
    parts = [_place(step, steps), f"loss {float(logs['loss']):.3f}"]
    for word, name, form in (("lr", "learning_rate", ".1e"), ("grad", "grad_norm", ".2f")):
        if name in logs:
            parts.append(f"{word} {float(logs[name]):{form}}")
    if "samples_per_second" in logs:
        parts.append(f"{_speed(float(logs['samples_per_second']))} ex/s")
    if seconds_left is not None:
        parts.append(f"ETA {format_time(seconds_left)}")
    return "  ".join(parts)


def format_validation(logs: dict[str, Any], step: int, steps: int) -> str:
    """Return the line for a validation.

    >>> format_validation({"eval_macro_f1": 0.61, "eval_loss": 0.5, "eval_parse_rate": 1.0}, 60, 120)
    '==> step  60/120  validation  macro-F1 0.610  loss 0.500  parse rate 100.0 %'
    """
    scores = [f"{title} {_score(title, logs[name])}" for title, name in _SCORES.items() if name in logs]
    return "  ".join([f"==> {_place(step, steps)}", "validation", *scores])


def print_summary(run: RunRecord) -> None:
    """Print what a finished run took, and its validations as a table."""
    if run.result is None:
        raise AssertionError("a finished run has a result")
    result = run.result
    validations = [line for line in result.log_history if "eval_loss" in line]
    if validations:
        shown = {title: name for title, name in _SCORES.items() if name in validations[0]}
        table = Table(box=box.SIMPLE_HEAD, title="Validation", title_justify="left", pad_edge=False)
        for title in ("step", *shown):
            table.add_column(title, justify="right")
        for line in validations:
            table.add_row(str(line["step"]), *(_score(title, line[name]) for title, name in shown.items()))
        Console().print("", table)
    speed = result.steps * run.training.global_batch_size / result.seconds
    memory = ", ".join(
        f"{count / 1e9:.1f} GB" + ("" if name == "process" else f" of {name}")
        for name, count in result.peak_memory_bytes.items()
    )
    print_line(
        f"{result.steps:,} steps in {format_time(result.seconds)}, {_speed(speed)} ex/s with validations, "
        f"mean loss {result.train_loss:.3f}, peak memory {memory}"
    )


def _place(step: int, steps: int) -> str:
    return f"step {step:>{len(str(steps))}}/{steps}"


def _score(title: str, value: float) -> str:
    return f"{100 * value:.1f} %" if title.endswith("rate") else f"{value:.3f}"


def _speed(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def format_time(seconds: float) -> str:
    """Return minutes and seconds, and hours if there are any.

    >>> format_time(65), format_time(3665)
    ('1:05', '1:01:05')
    """
    return str(tqdm.format_interval(seconds)).removeprefix("0")
