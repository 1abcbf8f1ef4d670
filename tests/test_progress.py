"""What a training prints."""

import dataclasses
import io

import pytest
from sample_records import sample_run
from transformers import TrainerState

from tweetdora import progress
from tweetdora.progress import ProgressLines, format_step, format_time, format_validation, print_line, print_summary

LOGS = {"loss": 0.3541, "learning_rate": 4.1e-4, "grad_norm": 1.234, "samples_per_second": 22.4}
SCORES = {"eval_macro_f1": 0.61, "eval_accuracy": 0.7, "eval_loss": 0.5, "eval_parse_rate": 0.995}


def test_a_line_has_place_loss_rate_gradient_speed_and_the_time_left():
    assert format_step(LOGS, 40, 120, 65) == "step  40/120  loss 0.354  lr 4.1e-04  grad 1.23  22 ex/s  ETA 1:05"
    assert format_step({"loss": 2}, 7, 9, None) == "step 7/9  loss 2.000"
    assert "  3.7 ex/s" in format_step({**LOGS, "samples_per_second": 3.66}, 1, 9, None)


def test_a_validation_has_its_scores():
    shown = "==> step 60/120  validation  macro-F1 0.610  accuracy 0.700  loss 0.500  parse rate 99.5 %"
    assert format_validation(SCORES, 60, 120).replace("step  60", "step 60") == shown


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (65, "1:05"), (605, "10:05"), (36_000, "10:00:00")])
def test_a_time_has_minutes_and_seconds(seconds, shown):
    assert format_time(seconds) == shown


def state(step: int, main: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=100, is_world_process_zero=main)


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_alone(monkeypatch, capsys):
    """20 of its own steps took 10 seconds; 40 are left."""
    now = 1000.0
    monkeypatch.setattr(progress, "time", type("clock", (), {"monotonic": staticmethod(lambda: now)}))
    lines = ProgressLines()
    lines.on_train_begin(None, state(40), None)
    now = 1010.0
    lines.on_log(None, state(60), None, logs=LOGS)
    assert capsys.readouterr().out == "step  60/100  loss 0.354  lr 4.1e-04  grad 1.23  22 ex/s  ETA 0:20\n"


def test_the_main_process_alone_prints_and_the_trainers_own_summary_is_left_out(capsys):
    lines = ProgressLines()
    lines.on_train_begin(None, state(0), None)
    lines.on_log(None, state(1, main=False), None, logs=LOGS)
    lines.on_log(None, state(1), None, logs={"train_loss": 1.0, "train_runtime": 3.0})
    assert capsys.readouterr().out == ""
    lines.on_log(None, state(1), None, logs=SCORES)
    assert capsys.readouterr().out.startswith("==> step   1/100  validation  macro-F1 0.610")


def test_a_line_is_coloured_in_a_terminal_alone_and_never_broken(monkeypatch, capsys):
    line = "word " * 60
    print_line(line, style="bold green")
    assert capsys.readouterr().out == f"{line}\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    print_line("validation", style="bold green")
    assert terminal.getvalue() == "\x1b[1;32mvalidation\x1b[0m\n"


def test_the_end_of_a_run_is_a_table_of_its_validations(capsys):
    run = sample_run()
    assert run.result is not None
    history = [{"step": 5, "loss": 1.0}, {"step": 10, **SCORES}, {"step": 20, **SCORES, "eval_macro_f1": 0.725}]
    result = dataclasses.replace(run.result, log_history=history, steps=1200, seconds=65.0, train_loss=0.5)
    result = dataclasses.replace(result, peak_memory_bytes={"process": 1_500_000_000, "gpu0": 2e9})
    print_summary(dataclasses.replace(run, result=result))
    said = capsys.readouterr().out
    cells = [line.split() for line in said.splitlines()]
    assert ["10", "0.610", "0.700", "0.500", "99.5", "%"] in cells and ["20", "0.725", "0.700"] in [
        row[:3] for row in cells
    ]
    speed = 1200 * run.training.global_batch_size / 65
    assert f"1,200 steps in 1:05, {speed:.0f} ex/s with validations, mean loss 0.500, peak memory" in said
    assert said.endswith("peak memory 1.5 GB, 2.0 GB of gpu0\n")
    print_summary(dataclasses.replace(run, result=dataclasses.replace(result, log_history=history[:1])))
    assert "Validation" not in capsys.readouterr().out
