"""Measure a base model and the fine-tuned model: the work of evaluate.py after its flags are read."""

import os
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.config import EvaluateConfig, TaskConfig
from tweetdora.data import Examples, data_record, load_examples
from tweetdora.data_notes import notes_on_splits
from tweetdora.errors import InputError, UserError
from tweetdora.generation import UNPARSED, Generation, generate_all
from tweetdora.metrics import (
    INTERVAL_METRICS,
    accuracy_by_length,
    baselines,
    bootstrap_intervals,
    compute_metrics,
    likelihood_metrics,
    paired_difference,
)
from tweetdora.modeling import DTYPES, check_ids_fit, load_base
from tweetdora.other_classifiers import other_classifiers
from tweetdora.priors import correct, corrected_labels, estimate_shares
from tweetdora.processes import check_same
from tweetdora.prompts import PromptTokenizer
from tweetdora.provenance import command_line, environment, utc_now
from tweetdora.record_files import read_predictions, read_record, write_predictions, write_record
from tweetdora.records import (
    PREDICTIONS,
    SHOWN_NAMES,
    BaseModelRecord,
    Bootstrap,
    DataNote,
    EvaluationRecord,
    GenerationRecord,
    Interval,
    LikelihoodMetrics,
    ModelMetrics,
    PredictionRecord,
    PriorCorrected,
    PromptFormat,
)
from tweetdora.scoring import Scores, score_all
from tweetdora.targets import (
    Decoding,
    EvalTarget,
    adapter_sha256,
    load_prompts,
    load_target_base,
    merge_adapter,
)
from tweetdora.tracking import finish_wandb, log_generations, start_wandb


@dataclass(frozen=True)
class Answers:
    """A model's generations for the examples, the seconds they took, and the scores of the label words."""

    generations: list[Generation]
    seconds: float
    scores: Scores


@dataclass(frozen=True)
class BaseResults:
    """The base's results from an earlier evaluation: its record, and its generations in the order of the examples."""

    record: EvaluationRecord
    generations: list[GenerationRecord]

    def predicted(self, label_words: list[str]) -> list[int]:
        """The predicted label ids."""
        return [UNPARSED if one.predicted is None else label_words.index(one.predicted) for one in self.generations]


@dataclass(frozen=True)
class Measured:
    """The answers of each model, by name, and the identity of the models.

    `answers` has the key `finetuned` if there is an adapter. It has the key `base` unless an earlier evaluation
    measured the base: then `earlier` holds its results.
    """

    answers: dict[str, Answers]
    base_model: BaseModelRecord
    prompt_format: PromptFormat
    adapter_sha256: str | None
    earlier: BaseResults | None = None


@dataclass(frozen=True)
class EvalData:
    """The examples to measure on, notes on them, and the training examples if they can be read."""

    examples: Examples
    notes: list[DataNote]
    train: Examples | None = None


def load_eval_data(
    target: EvalTarget, config: EvaluateConfig, revision: str | None, trained_on: str | None
) -> EvalData:
    """Load the examples to measure on from the data set at commit `revision`.

    `trained_on` is the data set's commit that a run was trained on. Its training texts are loaded to find those that
    also occur among the examples.

    Raises:
        InputError: the data do not match the task.
        HubError: the Hub cannot be reached.
    """
    examples = load_examples(target.task, config.split, revision).head(config.max_eval_samples)
    splits: dict[str, Examples] = {config.split: examples}
    if target.run is None or config.split == "train":
        return EvalData(examples, notes_on_splits(splits, target.task.label_words))
    try:
        train = load_examples(target.run.task, "train", trained_on)
    except UserError:  # without the error's text: it names local folders, and notes are published on the card
        train, why = None, "can no longer be read"
    if train is not None and train.sha256 != target.run.train_data.sha256:
        train, why = None, "have changed since the run was trained"
    if train is None:
        unknown = DataNote(config.split, f"texts shared with the training examples were not counted: these {why}")
        return EvalData(examples, [*notes_on_splits(splits, target.task.label_words), unknown])
    notes = notes_on_splits({"train": train, **splits}, target.task.label_words)
    return EvalData(examples, [note for note in notes if note.split == config.split], train)


def describe(target: EvalTarget, split: str, data: EvalData, decoding: Decoding) -> list[str]:
    """Describe the measurement that is about to start, as lines of the log."""
    return [
        f"{target.name}: {len(data.examples):,} {split} examples, {decoding.precision} ({decoding.reason})",
        *target.notes,
        *decoding.notes,
        *(f"note: measured with another {correction}" for correction in target.corrections),
        *(f"note: {note.split}: {note.text}" for note in data.notes),
    ]


def read_base_results(
    folder: str, target: EvalTarget, examples: Examples, config: EvaluateConfig, decoding: Decoding
) -> BaseResults:
    """Read the base's answers from an earlier evaluation in `folder`, if they are what would be measured now.

    Raises:
        InputError: there is no evaluation, or it differs; the message names the differences.
    """
    if target.run is None:
        raise InputError(f"--base_results {folder} needs a run folder; {target.name} is not one. Leave the flag out.")
    record = read_record(EvaluationRecord, os.path.join(folder, f"{config.split}.json"))
    known, run = record.environment.packages, target.run
    found = {
        "base model": record.base_model,
        "prompt": record.prompt_format,
        "examples": record.data.sha256,
        "label words": record.label_words,
        "precision": record.precision,
        "max_length": record.max_length or target.task.max_length,  # an older record does not name it
        "max_new_tokens": record.max_new_tokens,
        "bootstrap": record.bootstrap,
    }
    expected = {
        "base model": run.base_model,
        "prompt": run.prompt_format,
        "examples": examples.sha256,
        "label words": target.task.label_words,
        "precision": decoding.precision,
        "max_length": target.task.max_length,
        "max_new_tokens": decoding.max_new_tokens,
        "bootstrap": _bootstrap(config),
    }
    packages = environment().packages
    for name in ("torch", "transformers"):
        found[name], expected[name] = known[name], packages[name]
    if differ := [name for name in found if found[name] != expected[name]]:
        what = "; ".join(f"{name}: {found[name]}, expected {expected[name]}" for name in differ)
        raise InputError(
            f"--base_results {folder} does not match this measurement: {what}. Leave the flag out to measure the base "
            "again."
        )
    lines = read_predictions(os.path.join(folder, config.split, PREDICTIONS))
    if [line.text for line in lines] != examples.texts:
        raise InputError(
            f"--base_results {folder}: its {PREDICTIONS} does not hold the examples that its record names."
        )
    return BaseResults(record, [line.base for line in lines])


def _bootstrap(config: EvaluateConfig) -> Bootstrap:
    return Bootstrap(config.bootstrap_samples, config.seed)


def measure_base_and_finetuned(
    target: EvalTarget,
    revision: str | None,
    examples: Examples,
    config: EvaluateConfig,
    decoding: Decoding,
    earlier: BaseResults | None = None,
) -> Measured:
    """Answer all examples with the base at commit `revision`, and with the fine-tuned model if there is an adapter.

    If `earlier` holds the base's answers, they are reused.

    The fine-tuned model is measured as it is published: the adapter is merged into the base in float32, and the result
    is cast to the precision of the measurement.
    """
    device, dtype = PartialState().device, DTYPES[decoding.precision]
    tokenizer, prompt_tokenizer = load_prompts(target, revision)
    model, identity = load_target_base(target, revision, dtype, device)
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    check_ids_fit(model, tokenizer, chain.from_iterable(prompts))
    answers, sha256 = {}, adapter_sha256(target.adapter_dir) if target.adapter_dir else None
    check_same(
        {
            **{f"--{name}": value for name, value in vars(config).items()},
            "base model": identity,
            "SHA-256 of the adapter": sha256,
            "prompt": prompt_tokenizer.format,
            "SHA-256 of the examples": examples.sha256,
            "precision": decoding.precision,
            "packages": environment().packages,
        }
    )
    # The fine-tuned model comes first, so that a faulty adapter fails before any example is answered.
    if target.adapter_dir:
        model = merge_adapter(model, target.adapter_dir, dtype)
        answers["finetuned"] = _answer(
            "finetuned", model, tokenizer, prompt_tokenizer, examples, target.task, config, decoding
        )
        if earlier is not None:
            return Measured(answers, identity, prompt_tokenizer.format, sha256, earlier)
        del model  # frees memory for the base
        model = load_base(target.base, revision, dtype, device)
    answers["base"] = _answer("base", model, tokenizer, prompt_tokenizer, examples, target.task, config, decoding)
    return Measured(answers, identity, prompt_tokenizer.format, sha256)


def _answer(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokenizer: PromptTokenizer,
    examples: Examples,
    task: TaskConfig,
    config: EvaluateConfig,
    decoding: Decoding,
) -> Answers:
    state = PartialState()
    shown = SHOWN_NAMES[name]

    def bar(what: str) -> tqdm:
        """A progress bar, shown by the main process only."""
        words = f"{shown}, {what}"
        return tqdm(total=len(examples), desc=words, unit="example", disable=not state.is_main_process)

    with bar("generating") as progress:
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
    with bar("scoring") as progress:
        scores = score_all(
            model,
            prompt_tokenizer,
            examples.texts,
            batch_size=config.batch_size,
            on_progress=lambda done: progress.update(done * state.num_processes),
        )
    generations = [generation for generation in found if generation is not None]  # none is None: no `stop` was passed
    return Answers(generations, seconds, scores)


def evaluation_record(
    target: EvalTarget, data: EvalData, measured: Measured, config: EvaluateConfig, decoding: Decoding
) -> tuple[EvaluationRecord, list[str]]:
    """Score the answers, with intervals and, for two models, their difference.

    Also returns sentences to be logged: which other classifiers could not be measured, and how many texts were
    truncated.
    """
    examples = data.examples
    words, bootstrap, earlier = target.task.label_words, _bootstrap(config), measured.earlier
    predicted = {
        name: [generation.predicted for generation in answers.generations]
        for name, answers in measured.answers.items()
    }
    metrics = {
        name: _model_metrics(examples, answers, predicted[name], words, bootstrap)
        for name, answers in measured.answers.items()
    }
    if earlier is not None:
        metrics["base"], predicted["base"] = earlier.record.base, earlier.predicted(words)
    difference = None
    if "finetuned" in predicted:
        difference = paired_difference(
            examples.labels, predicted["base"], predicted["finetuned"], len(words), bootstrap
        )
    others, missing = other_classifiers(data.train, examples, words, bootstrap)
    truncated = _truncation_notes(measured, config.split, target.task.max_length)
    record = EvaluationRecord(
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
        baselines=replace(baselines(examples.labels, words), others=others),
        environment=environment(),
        notes=[*data.notes, *truncated],
        corrections=target.corrections,
        base_measured=earlier.record.created if earlier else None,
        prior_corrected=_prior_corrected(target, measured, examples, bootstrap),
        max_length=target.task.max_length,
    )
    return record, [*missing, *(f"{note.split}: {note.text}" for note in truncated)]


def _model_metrics(
    examples: Examples, answers: Answers, predicted: list[int], words: list[str], bootstrap: Bootstrap
) -> ModelMetrics:
    """Score a model's answers, `predicted` among them, and its likelihoods."""
    scores = answers.scores
    probabilities = scores.probabilities.numpy()
    return ModelMetrics(
        **vars(compute_metrics(examples.labels, answers.generations, words)),
        intervals=bootstrap_intervals(examples.labels, predicted, len(words), bootstrap),
        by_length=accuracy_by_length(examples.texts, examples.labels, predicted),
        seconds=round(answers.seconds, 2),
        samples_per_second=round(len(examples) / answers.seconds, 2),
        likelihood=likelihood_metrics(
            examples.labels, scores.labels.tolist(), probabilities, bootstrap, scores.seconds
        ),
    )


def _truncation_notes(measured: Measured, split: str, max_length: int) -> list[DataNote]:
    count = next(iter(measured.answers.values())).scores.truncated
    return [DataNote(split, f"texts truncated to fit {max_length} tokens: {count:,}")] if count else []


def _prior_corrected(
    target: EvalTarget, measured: Measured, examples: Examples, bootstrap: Bootstrap
) -> PriorCorrected | None:
    """The fine-tuned model's likelihood scores after prior correction with shares that its probabilities suggest."""
    train, words = target.label_shares, target.task.label_words
    if train is None:
        return None
    scores = measured.answers["finetuned" if target.adapter_dir else "base"].scores
    probabilities = scores.probabilities.numpy()
    shares = estimate_shares(probabilities, train)
    corrected = correct(probabilities, train, shares)
    likeliest = scores.labels.tolist()
    predicted = corrected_labels(scores.labels.numpy(), probabilities, train, shares).tolist()
    return PriorCorrected(
        train_shares=dict(zip(words, train, strict=True)),
        estimated_shares=dict(zip(words, shares.tolist(), strict=True)),
        scores=likelihood_metrics(examples.labels, predicted, corrected, bootstrap, scores.seconds),
        difference=paired_difference(examples.labels, likeliest, predicted, len(words), bootstrap),
    )


def save_generations(examples: Examples, measured: Measured, target: EvalTarget, split: str) -> None:
    """Write the generations, which are slow to make, before computing from them; delete an older record."""
    record, folder = os.path.join(target.results_dir, f"{split}.json"), os.path.join(target.results_dir, split)
    path = os.path.join(folder, PREDICTIONS)
    os.makedirs(folder, exist_ok=True)
    write_predictions(f"{path}.part", predictions_of(examples, measured, target.task.label_words))
    if os.path.isfile(record):  # only now, so that a full disk leaves it and the older generations in place
        os.remove(record)
    os.replace(f"{path}.part", path)


def predictions_of(examples: Examples, measured: Measured, label_words: list[str]) -> list[PredictionRecord]:
    """One record per example: its text and label, and each model's generation and label word likelihoods."""

    def as_records(found: Answers) -> list[GenerationRecord]:
        """Records of the generations, with label words instead of label ids."""
        return [
            GenerationRecord(
                text=generation.text,
                predicted=None if generation.predicted == UNPARSED else label_words[generation.predicted],
                stopped=generation.stopped,
                log_likelihoods=[round(score, 4) for score in scores],
                likeliest=label_words[label],
            )
            for generation, scores, label in zip(
                found.generations, found.scores.log_likelihoods.tolist(), found.scores.labels.tolist(), strict=True
            )
        ]

    answers = measured.answers
    base = measured.earlier.generations if measured.earlier else as_records(answers["base"])
    finetuned = as_records(answers["finetuned"]) if "finetuned" in answers else repeat(None, len(examples))
    rows = zip(examples.example_ids, examples.texts, examples.labels, base, finetuned, strict=True)
    return [PredictionRecord(number, text, label_words[label], one, other) for number, text, label, one, other in rows]


def save_results(record: EvaluationRecord, target: EvalTarget) -> None:
    """Draw the confusion matrices, then write the record."""
    # matplotlib takes a second, which --help and mistakes in the flags need not wait for.
    from tweetdora.plots import confusion_title, plot_confusion, plot_reliability

    folder = os.path.join(target.results_dir, record.split)
    for name, metrics in record.models.items():
        path = os.path.join(folder, f"confusion_{name}.png")
        title = confusion_title(name, metrics.macro_f1)
        plot_confusion(metrics.confusion_matrix, record.label_words, path, title)
    plot_reliability(record.likelihoods, os.path.join(folder, "reliability.png"), f"{target.name}, {record.split}")
    write_record(os.path.join(target.results_dir, f"{record.split}.json"), record)


def track_results(record: EvaluationRecord, examples: Examples, measured: Measured, target: EvalTarget) -> None:
    """Add the results to the training's W&B run, if there is one."""
    run = target.run
    if run is None or run.tracker is None or run.result is None:
        return
    start_wandb(target.name, run.name, {}, tracker=run.tracker)
    generations = measured.answers["finetuned"].generations
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
    """Format the results as a table for the log."""
    header = f"{'':<25}{'macro-F1':>9}  {'95 % interval':<16}{'macro recall':>13}{'accuracy':>10}"
    lines = [header + f"{'parse rate':>12}{'exact match':>13}{'EOS rate':>10}{'samples/s':>11}"]
    for name, metrics in record.models.items():
        rates = f"{metrics.parse_rate:>12.1%}{metrics.exact_match:>13.1%}{metrics.eos_rate:>10.1%}"
        lines.append(_scores_line(SHOWN_NAMES[name], metrics, metrics.intervals.macro_f1) + rates)
        lines[-1] += f"{metrics.samples_per_second:>11.1f}"
    for name, metrics in record.models.items():
        if (found := metrics.likelihood) is not None:
            label = f"{SHOWN_NAMES[name]}, most likely"
            lines.append(_likelihood_line(label, found))
    if (corrected := record.prior_corrected) is not None:
        shares = (f"{share:.1%} {word}" for word, share in corrected.estimated_shares.items())
        lines.append(_likelihood_line("… prior corrected", corrected.scores))
        lines.append(f"  for estimated label shares of {', '.join(shares)}")
    majority = f"always {record.baselines.majority.label}"
    for label, guesses in (("uniform guess", record.baselines.uniform), (majority, record.baselines.majority)):
        lines.append(_scores_line(label, guesses, None))
    for other in record.baselines.others:
        lines.append(_scores_line(other.name.partition(" and ")[0], other, other.macro_f1_interval))
    if record.difference is not None:
        gain, test = record.difference.macro_f1, record.difference.mcnemar
        low, high = gain.interval
        lines.append(
            f"difference in macro-F1 {gain.difference:+.3f} [{low:+.3f}, {high:+.3f}]; examples fixed: "
            f"{test.fixed}, broken: {test.broken} (McNemar p {format_p(test.p_value)})"
        )
    return "\n".join(lines)


def _likelihood_line(label: str, found: LikelihoodMetrics) -> str:
    calibration = f"  log loss {found.log_loss:.3f}, calibration error {found.calibration_error:.3f}"
    return _scores_line(label, found, found.intervals.macro_f1) + calibration


def _scores_line(label: str, found: Any, interval: Interval | None) -> str:
    """A line of the table: INTERVAL_METRICS, with the interval of the first."""
    first, *others = (getattr(found, metric) for metric in INTERVAL_METRICS)
    shown = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{label:<25}{first:>9.3f}  {shown:<16}" + "".join(
        f"{value:>{width}.3f}" for value, width in zip(others, (13, 10), strict=True)
    )


def no_better_than_guessing(record: EvaluationRecord) -> str | None:
    """A warning if the last model measured is no better than guessing, else None."""
    name, metrics = list(record.models.items())[-1]
    guesses = {"uniform guessing": record.baselines.uniform, "always predicting one label": record.baselines.majority}
    best = max(guesses, key=lambda guess: guesses[guess].macro_f1)
    if metrics.macro_f1 > guesses[best].macro_f1:
        return None
    return (
        f"The {SHOWN_NAMES[name]} model's macro-F1, {metrics.macro_f1:.3f}, is not above that of {best}, "
        f"{guesses[best].macro_f1:.3f}."
    )


def format_p(value: float) -> str:
    """Format a p-value: two significant digits, or a bound if it is too small."""
    return "< 1e-300" if value < 1e-300 else f"= {value:.2g}"
