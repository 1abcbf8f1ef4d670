"""Measure a base model and what was tuned from it: what evaluate.py does between reading its flags and its end."""

import os
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, repeat
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.cli import read_task
from tweetdora.config import MAX_NEW_TOKENS, RUNS_DIR, EvaluateConfig, TaskConfig
from tweetdora.data import Examples, data_record, load_examples
from tweetdora.data_notes import notes_on_splits
from tweetdora.device import Precision, can_compute, decide_precision
from tweetdora.errors import InputError, UserError
from tweetdora.files import file_sha256
from tweetdora.generation import UNPARSED, Generation, generate_all
from tweetdora.metrics import (
    INTERVAL_METRICS,
    accuracy_by_length,
    baselines,
    bootstrap_intervals,
    compute_metrics,
    paired_difference,
)
from tweetdora.modeling import (
    DTYPES,
    adapter_folder,
    base_identity,
    check_ids_fit,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    read_adapter_config,
    read_published_task,
    tokenizer_folder,
)
from tweetdora.plots import SHOWN_NAMES, confusion_title, plot_confusion
from tweetdora.prompts import PromptTokenizer, read_prompt_format
from tweetdora.provenance import command_line, environment, utc_now
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    PREDICTIONS,
    RUN_FILE,
    TASK_FILE,
    BaseModelRecord,
    Bootstrap,
    DataNote,
    EvaluationRecord,
    GenerationRecord,
    ModelMetrics,
    PredictionRecord,
    PromptFormat,
    RunRecord,
    read_run,
    write_predictions,
    write_record,
)
from tweetdora.tracking import finish_wandb, log_generations, start_wandb


@dataclass(frozen=True)
class EvalTarget:
    """What is measured: a base model, and an adapter on it where there is one."""

    name: str
    kind: Literal["run", "adapter", "model"]
    base: str
    base_revision: str | None
    adapter_dir: str | None
    tokenizer: str | None  # the adapter's own, which was trained with; None: the base's
    task: TaskConfig
    prompt_format: PromptFormat | None  # None: read it off the chat template
    max_new_tokens: int | None  # that the target was trained for; None: not known
    run: RunRecord | None
    results_dir: str
    corrections: list[str] = field(default_factory=list)  # what of the task's data is replaced
    notes: list[str] = field(default_factory=list)  # for a person


@dataclass(frozen=True)
class Measured:
    """The generations of base and, where there is an adapter, finetuned, with the seconds they took; of which models.

    Generations and seconds are by the names of the models.
    """

    generations: dict[str, list[Generation]]
    seconds: dict[str, float]
    base_model: BaseModelRecord
    prompt_format: PromptFormat
    adapter_sha256: str | None


def find_eval_target(name: str, config: EvaluateConfig) -> EvalTarget:
    """Tell a run folder from an adapter from a model, with the task that is measured.

    Raises:
        InputError: a recipe is given for a run, whose record already holds a task, or the run is not finished.
    """
    target = _find_target(name, config)
    task, corrections = correct_task(target.task, config.corrections)
    return replace(target, task=task, corrections=corrections)


def correct_task(task: TaskConfig, given: dict[str, Any]) -> tuple[TaskConfig, list[str]]:
    """The task with other data, and what is otherwise, in the form of a record's mismatches."""
    changes = dict(given)
    if given.get("dataset_name", task.dataset_name) != task.dataset_name:  # these belong to the data set
        changes = {"dataset_config": None, "dataset_revision": None, **changes}
    for split in ("validation", "test"):
        if f"{split}_split" in given:
            changes[f"{split}_share"] = 0.0
    corrected = replace(task, **changes)
    before, now = asdict(task), asdict(corrected)
    return corrected, [f"{name}: was {before[name]!r}, now {now[name]!r}" for name in now if before[name] != now[name]]


def _find_target(name: str, config: EvaluateConfig) -> EvalTarget:
    if _is_run(name):
        run = read_run(name)
        if config.config is not None:
            raise InputError(f"--config {config.config}: the task of {name} stands in its {RUN_FILE}; leave it out.")
        return EvalTarget(
            name=name,
            kind="run",
            base=run.base_model.name_or_path,
            base_revision=run.base_model.revision,
            adapter_dir=os.path.join(name, ADAPTER_DIR),
            tokenizer=tokenizer_folder(os.path.join(name, ADAPTER_DIR)),
            task=run.task,
            prompt_format=run.prompt_format,
            max_new_tokens=run.max_new_tokens,
            run=run,
            results_dir=config.output_dir or os.path.join(name, "evaluation"),
        )
    published, notes = None, []
    if config.config is None:
        published = read_published_task(name)
        if published is None:
            default = TaskConfig()
            notes = [
                f"note: no {TASK_FILE} was found with {name}: it is asked the published run's question, on "
                f"{default.dataset_name}. --config names a recipe with another task."
            ]
    target = EvalTarget(
        name=name,
        kind="model",
        base=name,
        base_revision=None,
        adapter_dir=None,
        tokenizer=None,
        task=published.task if published else read_task(config.config),
        prompt_format=published.prompt_format if published else None,
        max_new_tokens=published.max_new_tokens if published else None,
        run=None,
        results_dir=config.output_dir or _results_dir(name),
        notes=notes,
    )
    adapter = read_adapter_config(name)
    if adapter is None:
        return target
    base, folder = adapter.base_model_name_or_path or "", adapter_folder(name)  # it is not empty: it was read
    return replace(
        target,
        kind="adapter",
        base=base,
        base_revision=adapter.revision,
        adapter_dir=folder,
        tokenizer=tokenizer_folder(folder),
    )


@dataclass(frozen=True)
class Decoding:
    """How the answers of a measurement are generated, and what is to be said of it."""

    precision: Precision
    reason: str
    max_new_tokens: int
    notes: list[str]


def decide_decoding(target: EvalTarget, config: EvaluateConfig, device_type: str) -> Decoding:
    """Precision and budget: what was asked for, else what the run was trained and validated with, else the defaults.

    Raises:
        InputError: the device cannot compute in the precision that was asked for.
    """
    launcher, run = os.environ.get("ACCELERATE_MIXED_PRECISION"), target.run
    notes = []
    precision, reason = decide_precision(config.precision, set(), launcher, device_type)
    if run is not None and precision != run.training.precision:
        if not reason.startswith("asked for") and can_compute(run.training.precision, device_type):
            precision, reason = run.training.precision, "as the run was trained"
        else:
            notes.append(f"note: answers in {precision} ({reason}); the run was trained in {run.training.precision}.")
    elif run is not None and not reason.startswith("asked for"):
        reason = "as the run was trained"
    trained_with = target.max_new_tokens
    budget = config.max_new_tokens or trained_with or MAX_NEW_TOKENS
    if trained_with is not None and budget != trained_with:
        notes.append(f"note: --max_new_tokens {budget}; {target.name} was trained for {trained_with}.")
    return Decoding(precision, reason, budget, notes)


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


def load_eval_examples(
    target: EvalTarget, config: EvaluateConfig, revision: str | None, trained_on: str | None
) -> tuple[Examples, list[DataNote]]:
    """The examples to answer, of the data set at its commit `revision`, and what is to be known of them.

    `trained_on` is the commit that a run was trained on: its texts are looked for among the examples.

    Raises:
        InputError: the data are not what the task says.
        HubError: the Hub cannot be reached.
    """
    examples = load_examples(target.task, config.split, revision).head(config.max_eval_samples)
    splits: dict[str, Examples] = {config.split: examples}
    if target.run is None or config.split == "train":
        return examples, notes_on_splits(splits, target.task.label_words)
    try:
        train = load_examples(target.run.task, "train", trained_on)
    except UserError as error:
        train, why = None, f"cannot be read any more ({error})"
    if train is not None and train.sha256 != target.run.train_data.sha256:
        train, why = None, "are others now than those that were trained on"
    if train is None:
        unknown = DataNote(config.split, f"texts in common with the training examples were not counted: these {why}")
        return examples, [*notes_on_splits(splits, target.task.label_words), unknown]
    notes = notes_on_splits({"train": train, **splits}, target.task.label_words)
    return examples, [note for note in notes if note.split == config.split]


def describe(
    target: EvalTarget, split: str, examples: Examples, decoding: Decoding, notes: list[DataNote]
) -> list[str]:
    """What is about to be measured, in lines for a person."""
    return [
        f"{target.name}: {len(examples):,} {split} examples, {decoding.precision} ({decoding.reason})",
        *target.notes,
        *decoding.notes,
        *(f"note: measured with another {correction}" for correction in target.corrections),
        *(f"note: {note.split}: {note.text}" for note in notes),
    ]


def generate_base_and_finetuned(
    target: EvalTarget, revision: str | None, examples: Examples, config: EvaluateConfig, decoding: Decoding
) -> Measured:
    """Answer all examples with the base at its commit `revision`, and with the adapter on it, if there is one.

    The tuned model is measured as it is published: the adapter merged into the base in float32, then cast to the
    precision of the measurement.
    """
    task, device, dtype = target.task, PartialState().device, DTYPES[decoding.precision]
    tokenizer = load_tokenizer(*((target.tokenizer, None) if target.tokenizer else (target.base, revision)))
    prompt_format = target.prompt_format or read_prompt_format(tokenizer, task)
    prompt_tokenizer = PromptTokenizer(tokenizer, prompt_format, task.max_length)
    model: Any = load_base(target.base, revision, torch.float32 if target.adapter_dir else dtype, device)
    identity = base_identity(model, target.base, revision)
    if target.run is not None and identity != target.run.base_model:
        raise InputError(
            f"{target.base} is not the base model that {target.name} was trained on: found {asdict(identity)}, the "
            f"run's record says {asdict(target.run.base_model)}."
        )
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    check_ids_fit(model, tokenizer, chain.from_iterable(prompts))
    generations, seconds, adapter_sha256 = {}, {}, None
    # The fine-tuned model first: what is wrong with an adapter shows before any example is answered.
    if target.adapter_dir:
        model = nn.Module.to(merge(load_adapter(model, target.adapter_dir)), dtype)
        adapter_sha256 = file_sha256(os.path.join(target.adapter_dir, ADAPTER_WEIGHTS))
        generations["finetuned"], seconds["finetuned"] = _generate(
            "finetuned", model, tokenizer, prompt_tokenizer, examples, task, config, decoding
        )
        del model  # room for the other
        model = load_base(target.base, revision, dtype, device)
    generations["base"], seconds["base"] = _generate(
        "base", model, tokenizer, prompt_tokenizer, examples, task, config, decoding
    )
    return Measured(generations, seconds, identity, prompt_format, adapter_sha256)


def _generate(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokenizer: PromptTokenizer,
    examples: Examples,
    task: TaskConfig,
    config: EvaluateConfig,
    decoding: Decoding,
) -> tuple[list[Generation], float]:
    state = PartialState()
    shown = SHOWN_NAMES[name]
    with tqdm(total=len(examples), desc=shown, unit="example", disable=not state.is_main_process) as progress:
        found, seconds = generate_all(
            model,
            tokenizer,
            prompt_tokenizer,
            examples,
            task.label_words,
            batch_size=config.batch_size,
            max_new_tokens=decoding.max_new_tokens,
            on_progress=lambda done: progress.update(done * state.num_processes),
        )
    return [generation for generation in found if generation is not None], seconds  # nothing stops it


def evaluation_record(
    target: EvalTarget,
    examples: Examples,
    measured: Measured,
    config: EvaluateConfig,
    decoding: Decoding,
    notes: list[DataNote],
) -> EvaluationRecord:
    """The scores of what was generated, with intervals, and the difference where there are two models."""
    words, bootstrap = target.task.label_words, Bootstrap(config.bootstrap_samples, config.seed)
    predicted = {name: [generation.predicted for generation in found] for name, found in measured.generations.items()}
    metrics = {
        name: ModelMetrics(
            **vars(compute_metrics(examples.labels, found, words)),
            intervals=bootstrap_intervals(examples.labels, predicted[name], len(words), bootstrap),
            by_length=accuracy_by_length(examples.texts, examples.labels, predicted[name]),
            seconds=round(measured.seconds[name], 2),
            samples_per_second=round(len(examples) / measured.seconds[name], 2),
        )
        for name, found in measured.generations.items()
    }
    difference = None
    if "finetuned" in predicted:
        difference = paired_difference(
            examples.labels, predicted["base"], predicted["finetuned"], len(words), bootstrap
        )
    return EvaluationRecord(
        created=utc_now(),
        command=command_line(),
        kind=target.kind,
        split=config.split,
        data=data_record(examples, words),
        label_words=words,
        precision=decoding.precision,
        max_new_tokens=decoding.max_new_tokens,
        bootstrap=bootstrap,
        base_model=measured.base_model,
        prompt_format=measured.prompt_format,
        adapter_sha256=measured.adapter_sha256,
        base=metrics["base"],
        finetuned=metrics.get("finetuned"),
        difference=difference,
        baselines=baselines(examples.labels, words),
        environment=environment(),
        notes=notes,
        corrections=target.corrections,
    )


def save_generations(examples: Examples, measured: Measured, target: EvalTarget, split: str) -> None:
    """Write the generations, which took the time, before anything is computed from them; an older record goes."""
    record, folder = os.path.join(target.results_dir, f"{split}.json"), os.path.join(target.results_dir, split)
    path = os.path.join(folder, PREDICTIONS)
    os.makedirs(folder, exist_ok=True)
    write_predictions(f"{path}.part", predictions_of(examples, measured.generations, target.task.label_words))
    if os.path.isfile(record):  # a full disk has left it where it was, with the older generations
        os.remove(record)
    os.replace(f"{path}.part", path)


def predictions_of(
    examples: Examples, generations: dict[str, list[Generation]], label_words: list[str]
) -> list[PredictionRecord]:
    """For each example its text and label, and for each model what it wrote and the label word found in it."""

    def as_record(generation: Generation) -> GenerationRecord:
        """A generation, its label as a word."""
        predicted = None if generation.predicted == UNPARSED else label_words[generation.predicted]
        return GenerationRecord(generation.text, predicted, generation.stopped)

    finetuned = generations.get("finetuned") or repeat(None, len(examples))
    rows = zip(examples.example_ids, examples.texts, examples.labels, generations["base"], finetuned, strict=True)
    return [
        PredictionRecord(
            example_id, text, label_words[label], as_record(base), None if tuned is None else as_record(tuned)
        )
        for example_id, text, label, base, tuned in rows
    ]


def save_results(record: EvaluationRecord, target: EvalTarget) -> None:
    """Draw the confusion matrices, then write the record."""
    folder = os.path.join(target.results_dir, record.split)
    for name, metrics in record.models.items():
        path = os.path.join(folder, f"confusion_{name}.png")
        title = confusion_title(name, metrics.macro_f1)
        plot_confusion(metrics.confusion_matrix, record.label_words, path, title)
    write_record(os.path.join(target.results_dir, f"{record.split}.json"), record)


def track_results(record: EvaluationRecord, examples: Examples, measured: Measured, target: EvalTarget) -> None:
    """Add the results to the W&B run of the training, if there is one."""
    run = target.run
    if run is None or run.tracker is None or run.result is None:
        return
    start_wandb(target.name, run.name, {}, tracker=run.tracker)
    generations = measured.generations["finetuned"]
    log_generations(record.split, examples, generations, record.label_words, run.result.steps)
    names = ("macro_f1", "macro_recall", "accuracy", "parse_rate", "exact_match", "eos_rate")
    finish_wandb(
        {
            f"{record.split}/{model}/{name}": getattr(metrics, name)
            for model, metrics in record.models.items()
            for name in names
        }
    )


def format_results(record: EvaluationRecord) -> str:
    """The results as a table for a person."""
    header = f"{'':<18}{'macro-F1':>9}  {'95 % interval':<16}{'macro recall':>13}{'accuracy':>10}"
    lines = [header + f"{'parse rate':>12}{'exact match':>13}{'EOS rate':>10}{'samples/s':>11}"]
    for name, metrics in record.models.items():
        low, high = metrics.intervals.macro_f1
        rates = f"{metrics.parse_rate:>12.1%}{metrics.exact_match:>13.1%}{metrics.eos_rate:>10.1%}"
        scores = f"{metrics.macro_f1:>9.3f}  {f'[{low:.3f}, {high:.3f}]':<16}"
        others = f"{metrics.macro_recall:>13.3f}{metrics.accuracy:>10.3f}"
        lines.append(f"{SHOWN_NAMES[name]:<18}{scores}{others}{rates}{metrics.samples_per_second:>11.1f}")
    majority = f"always {record.baselines.majority.label}"
    for label, guesses in (("uniform guess", record.baselines.uniform), (majority, record.baselines.majority)):
        values = [getattr(guesses, metric) for metric in INTERVAL_METRICS]
        lines.append(f"{label:<18}{values[0]:>9.3f}  {'':<16}{values[1]:>13.3f}{values[2]:>10.3f}")
    if record.difference is not None:
        gain, test = record.difference.macro_f1, record.difference.mcnemar
        low, high = gain.interval
        lines.append(
            f"difference in macro-F1 {gain.difference:+.3f} [{low:+.3f}, {high:+.3f}]; became right: "
            f"{test.fixed}, wrong: {test.broken} (McNemar p {format_p(test.p_value)})"
        )
    return "\n".join(lines)


def no_better_than_guessing(record: EvaluationRecord) -> str | None:
    """A sentence, if what was measured last is no better than guessing; None where it is better."""
    name, metrics = list(record.models.items())[-1]
    guesses = {"uniform guessing": record.baselines.uniform, "always the same label": record.baselines.majority}
    best = max(guesses, key=lambda guess: guesses[guess].macro_f1)
    if metrics.macro_f1 > guesses[best].macro_f1:
        return None
    return (
        f"The {SHOWN_NAMES[name]} model's macro-F1, {metrics.macro_f1:.3f}, is not above that of {best}, "
        f"{guesses[best].macro_f1:.3f}."
    )


def format_p(value: float) -> str:
    """A p-value as one writes it: three digits, or a bound where it is too small to tell."""
    return "< 1e-300" if value < 1e-300 else f"= {value:.2g}"
