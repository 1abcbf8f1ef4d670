"""Measure answers before and after: what evaluate.py does between reading its flags and writing its files."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.cli import read_task
from tweetdora.config import RUNS_DIR, EvaluateConfig, TaskConfig
from tweetdora.data import Rows
from tweetdora.errors import InputError
from tweetdora.generation import UNPARSED, Answer, answer_rows
from tweetdora.hub import pin_revision
from tweetdora.metrics import (
    INTERVAL_METRICS,
    accuracy_by_length,
    bootstrap_intervals,
    measure,
    paired_difference,
)
from tweetdora.modeling import (
    DTYPES,
    adapter_folder,
    base_identity,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    read_adapter_config,
)
from tweetdora.prompts import Encoder, PromptFormat
from tweetdora.records import ADAPTER_DIR, ADAPTER_WEIGHTS, RUN_FILE, file_sha256, read_run


@dataclass
class Target:
    """What is measured: a base model, and an adapter on it where there is one."""

    kind: str  # "run", "adapter" or "model"
    base: str
    base_revision: str | None
    adapter_dir: str | None
    task: TaskConfig
    prompt_format: PromptFormat | None  # None: read it off the base's chat template
    run: dict[str, Any] | None
    results_dir: str


def find_target(config: EvaluateConfig) -> Target:
    """Tell a run folder from an adapter from a model.

    Raises:
        InputError: a task is given for a run, whose record already holds one, or the run is not finished.
    """
    name = config.target
    if _is_run(name):
        run = read_run(name)
        if config.config is not None:
            raise InputError(f"--config {config.config}: the task of {name} stands in its {RUN_FILE}; leave it out.")
        return Target(
            kind="run",
            base=run["base"]["name_or_path"],
            base_revision=run["base"]["revision"],
            adapter_dir=os.path.join(name, ADAPTER_DIR),
            task=TaskConfig(**run["task"]),
            prompt_format=PromptFormat(**run["prompt_format"]),
            run=run,
            results_dir=config.output_dir or os.path.join(name, "evaluation"),
        )
    task = read_task(config.config)
    results_dir = config.output_dir or _results_dir(name)
    adapter = read_adapter_config(name)
    if adapter is None:
        return Target("model", name, None, None, task, None, None, results_dir)
    base = adapter.base_model_name_or_path
    return Target("adapter", base, adapter.revision, adapter_folder(name), task, None, None, results_dir)


def _is_run(name: str) -> bool:
    if os.path.isdir(name):
        return not any(os.path.isfile(os.path.join(name, file)) for file in ("config.json", "adapter_config.json"))
    return os.path.normpath(name).startswith(RUNS_DIR + os.sep)  # a run folder with a slip of the pen, no Hub id


def _results_dir(name: str) -> str:
    """Where the results of a model or adapter go: runs/evaluations/owner--name, so that a/x and b/x lie apart.

    A folder of its own, because owner/name may also be what a run in runs/name was published as.
    """
    path = os.path.relpath(name)
    if path == os.curdir or path.startswith(os.pardir):
        path = os.path.abspath(name)
    return os.path.join(RUNS_DIR, "evaluations", path.strip(os.sep).replace(os.sep, "--"))


def answer_target(
    target: Target, rows: Rows, config: EvaluateConfig, device: torch.device
) -> tuple[dict[str, list[Answer]], dict[str, Any]]:
    """Answer all rows before and after; the answers by these names, and what the record says of models and speed.

    The tuned model is measured as it is published: the adapter merged into the base in float32, then cast to the
    precision of the measurement.
    """
    task, revision = target.task, pin_revision(target.base, target.base_revision)
    tokenizer = load_tokenizer(target.base, revision)
    encoder = Encoder(tokenizer, target.prompt_format or PromptFormat.from_template(tokenizer, task), task.max_length)
    dtype = DTYPES[config.precision]
    model = load_base(target.base, revision, dtype, device)
    identity = base_identity(model, target.base, revision)
    if target.run is not None and identity != target.run["base"]:
        raise InputError(
            f"{target.base} is not the base model that {config.target} was trained on: found {identity}, the run's "
            f"record says {target.run['base']}."
        )
    answers: dict[str, list[Answer]] = {}
    facts: dict[str, Any] = {"base": identity, "prompt_format": encoder.format.to_dict(), "adapter_sha256": None}
    first = "before" if target.adapter_dir else "after"
    answers[first], facts[first] = _answer(first, model, tokenizer, encoder, rows, task, config)
    if target.adapter_dir:
        del model
        base = load_base(target.base, revision, torch.float32, device)
        model = merge(load_adapter(base, target.adapter_dir)).to(dtype)
        facts["adapter_sha256"] = file_sha256(os.path.join(target.adapter_dir, ADAPTER_WEIGHTS))
        answers["after"], facts["after"] = _answer("after", model, tokenizer, encoder, rows, task, config)
    return answers, facts


def _answer(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    rows: Rows,
    task: TaskConfig,
    config: EvaluateConfig,
) -> tuple[list[Answer], dict[str, float]]:
    state = PartialState()
    with tqdm(total=len(rows), desc=name, unit="row", disable=not state.is_main_process) as progress:
        answers, seconds = answer_rows(
            model,
            tokenizer,
            encoder,
            rows,
            task.label_words,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            on_progress=lambda done: progress.update(done * state.num_processes),
        )
    return answers, {"seconds": round(seconds, 2), "tweets_per_second": round(len(rows) / seconds, 2)}


def measure_answers(
    rows: Rows,
    answers: dict[str, list[Answer]],
    facts: dict[str, Any],
    label_words: list[str],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """`facts` with scores and intervals of the answers before and after, and the difference where there are both."""
    samples, seed = config.bootstrap_samples, config.seed
    predictions = {name: [answer.predicted for answer in given] for name, given in answers.items()}
    figures = dict(facts)
    for name, given in answers.items():
        intervals = bootstrap_intervals(rows.classes, predictions[name], len(label_words), samples, seed)
        by_length = accuracy_by_length(rows.texts, rows.classes, predictions[name])
        scores = measure(rows.classes, given, label_words)
        figures[name] = {**scores, "intervals": intervals, "by_length": by_length, **facts[name]}
    if "before" in answers:
        figures["difference"] = paired_difference(
            rows.classes, predictions["before"], predictions["after"], len(label_words), samples, seed
        )
    return figures


def write_predictions(path: str, rows: Rows, answers: dict[str, list[Answer]], label_words: list[str]) -> None:
    """One JSON line a row: text, label, and for each model the raw answer and the label word found in it."""
    with open(path, "w", encoding="utf-8") as stream:
        for index, (row_id, text, label) in enumerate(zip(rows.ids, rows.texts, rows.classes, strict=True)):
            line: dict[str, Any] = {"row": row_id, "text": text, "label": label_words[label]}
            for name, given in answers.items():
                answer = given[index]
                predicted = None if answer.predicted == UNPARSED else label_words[answer.predicted]
                line[name] = {"answer": answer.text, "predicted": predicted, "stopped": answer.stopped}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def format_results(record: dict[str, Any]) -> str:
    """The results as a table for a person."""
    header = f"{'':<18}{'macro-F1':>9}  {'95 % interval':<16}{'macro recall':>13}{'accuracy':>10}"
    lines = [header + f"{'parsed':>9}{'exact':>8}{'stopped':>9}{'tweets/s':>10}"]
    for name in ("before", "after"):
        if figures := record.get(name):
            low, high = figures["intervals"]["macro_f1"]
            rates = f"{figures['parse_rate']:>9.1%}{figures['exact_rate']:>8.1%}{figures['stop_rate']:>9.1%}"
            scores = f"{figures['macro_f1']:>9.3f}  {f'[{low:.3f}, {high:.3f}]':<16}"
            others = f"{figures['macro_recall']:>13.3f}{figures['accuracy']:>10.3f}"
            lines.append(f"{name:<18}{scores}{others}{rates}{figures['tweets_per_second']:>10.1f}")
    for figures in record["reference_lines"].values():
        label = f"always {figures['label']}" if "label" in figures else "uniform guess"
        values = [figures[metric] for metric in INTERVAL_METRICS]
        lines.append(f"{label:<18}{values[0]:>9.3f}  {'':<16}{values[1]:>13.3f}{values[2]:>10.3f}")
    if difference := record.get("difference"):
        gain, test = difference["macro_f1"], difference["mcnemar"]
        low, high = gain["interval"]
        lines.append(
            f"difference in macro-F1 {gain['difference']:+.3f} [{low:+.3f}, {high:+.3f}]; {test['fixed']} rows became "
            f"right, {test['broken']} wrong (McNemar p {format_p(test['p_value'])})"
        )
    return "\n".join(lines)


def format_p(value: float) -> str:
    """A p-value as one writes it: three digits, or a bound where it is too small to tell."""
    return "< 1e-300" if value < 1e-300 else f"= {value:.2g}"
