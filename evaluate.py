"""Measure a run, an adapter or a model by greedy generation, before and after tuning.

    python evaluate.py                                    # the published run's folder
    python evaluate.py runs/quickstart                    # any other run folder
    python evaluate.py runs/quickstart --split validation --max_samples 200
    python evaluate.py liuhailin0123/llm-course-hw3-dora  # a model, or an adapter, from the Hub or a folder
    accelerate launch evaluate.py runs/quickstart         # the rows shared out over all GPUs

Leaves <run folder>/evaluation/<split>.json, and in <run folder>/evaluation/<split>/ predictions.jsonl and the
confusion matrices; for a model or an adapter the same in runs/evaluations/owner--name.
"""

if __name__ == "evaluate":
    raise ImportError("this is the script evaluate.py; to get the library here, import tweetdora.metrics first")

import tweetdora  # noqa: F401  (before torch, whose threads it sets up)

# isort: split
import os
from typing import Any

from tweetdora.cli import parse_with_target, run_script
from tweetdora.config import EvaluateConfig
from tweetdora.data import Rows, class_counts, load_rows
from tweetdora.evaluation import (
    Target,
    answer_target,
    find_target,
    format_results,
    measure_answers,
    write_predictions,
)
from tweetdora.generation import Answer
from tweetdora.hub import use_cache_if_unreachable
from tweetdora.metrics import reference_lines
from tweetdora.plots import plot_confusion
from tweetdora.precision import compute_state, decide_precision
from tweetdora.records import RECORD_VERSION, command_line, environment, use_cpu_threads, utc_now, write_json
from tweetdora.tracking import finish_wandb, log_answers, start_wandb


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit status."""
    # parse
    config = parse_with_target(
        argv, EvaluateConfig, __doc__.partition("\n")[0], "Run folder, adapter, or model id; see the top of this file."
    )
    state = compute_state()
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    config.precision, reason = decide_precision(config.precision, set(), launcher, state.device.type)
    use_cpu_threads(state.device, state.num_processes)

    # load
    use_cache_if_unreachable(config.target)
    target = find_target(config)
    use_cache_if_unreachable(target.task.dataset_name, target.base)
    rows = load_rows(target.task, config.split).head(config.max_samples)
    state.print(f"{config.target}: {len(rows):,} {config.split} rows, {config.precision} ({reason})", flush=True)

    # work
    answers, facts = answer_target(target, rows, config, state.device)
    if not state.is_main_process:
        return 0
    save_answers(rows, answers, target, config.split)
    figures = measure_answers(rows, answers, facts, target.task.label_words, config)
    record = {
        "record_version": RECORD_VERSION,
        "created": utc_now(),
        "command": command_line(),
        "kind": target.kind,
        "split": config.split,
        "data": {**rows.source, "class_counts": class_counts(rows, target.task)},
        "label_words": target.task.label_words,
        "precision": config.precision,
        "max_new_tokens": config.max_new_tokens,
        "bootstrap": {"samples": config.bootstrap_samples, "seed": config.seed},
        **figures,
        "reference_lines": reference_lines(rows.classes, target.task.label_words),
        "environment": environment(),
    }

    # save
    save_results(record, list(answers), target)
    if config.report_to == "wandb":
        track_results(record, rows, answers, target, config.target)
    print(f"\n{format_results(record)}\n\nWrote {target.results_dir}.")
    if target.kind == "run" and config.output_dir is None:  # push_to_hub.py reads the run folder
        split = "" if config.split == "test" else f" --split {config.split}"
        print(f"Next: python push_to_hub.py {config.target}{split} --dry_run true")
    return 0


def save_answers(rows: Rows, answers: dict[str, list[Answer]], target: Target, split: str) -> None:
    """Write the answers, which took the time, before anything is computed from them; an older record goes."""
    record, folder = os.path.join(target.results_dir, f"{split}.json"), os.path.join(target.results_dir, split)
    path = os.path.join(folder, "predictions.jsonl")
    os.makedirs(folder, exist_ok=True)
    write_predictions(f"{path}.part", rows, answers, target.task.label_words)  # a full disk leaves the older ones
    if os.path.isfile(record):
        os.remove(record)  # it is of other answers
    os.replace(f"{path}.part", path)


def save_results(record: dict[str, Any], names: list[str], target: Target) -> None:
    """Draw the confusion matrices, then write the record."""
    words, split = record["label_words"], record["split"]
    for name in names:
        title = f"{name}: macro-F1 {record[name]['macro_f1']:.3f}"
        path = os.path.join(target.results_dir, split, f"confusion_{name}.png")
        plot_confusion(record[name]["confusion_matrix"], words, path, title)
    write_json(os.path.join(target.results_dir, f"{split}.json"), record)


def track_results(
    record: dict[str, Any], rows: Rows, answers: dict[str, list[Answer]], target: Target, run_dir: str
) -> None:
    """Add the results to the W&B run of the training, if there is one."""
    tracker = (target.run or {}).get("tracker")
    if tracker is None:
        return
    start_wandb(run_dir, target.run["name"], {}, tracker=tracker)
    split = record["split"]
    log_answers(split, rows, answers["after"], record["label_words"], target.run["result"]["steps"])
    scores = ("macro_f1", "macro_recall", "accuracy", "parse_rate", "exact_rate", "stop_rate")
    finish_wandb({f"{split}/{when}/{name}": record[when][name] for when in answers for name in scores})


if __name__ == "__main__":
    run_script(main, "evaluate.py")
