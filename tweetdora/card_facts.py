"""The facts of a model card, formatted for model_card_template.md and taken from the records of a run.

The template holds words and layout; this module formats the numbers. A number that is not in a record cannot get on a
card.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.data import Examples, make_examples
from tweetdora.errors import InputError
from tweetdora.evaluation import format_p, no_better_than_guessing
from tweetdora.files import folder_name
from tweetdora.provenance import without_folders
from tweetdora.record_files import read_predictions, read_record
from tweetdora.records import (
    PREDICTIONS,
    Baseline,
    Comparison,
    Conversion,
    DataRecord,
    Difference,
    EvaluationRecord,
    Interval,
    LikelihoodMetrics,
    ModelMetrics,
    PredictionRecord,
    RunRecord,
    TrainDataRecord,
    TrainingResult,
)
from tweetdora.screening import unsuitable
from tweetdora.seeds import Group, summarise

_METHOD_NAMES = {"dora": "DoRA", "lora": "LoRA"}
_TWEETEVAL_SENTIMENT = ("cardiffnlp/tweet_eval", "sentiment")
_TWEETEVAL_TEST_EXAMPLES = 12284
# Scores of others on the test split of TweetEval sentiment: model, source, macro-F1, macro recall.
_PUBLISHED = (
    ("linear SVM", "[TweetEval](https://arxiv.org/abs/2010.12421)", "", "0.629"),
    ("RoBERTa-base", "[TweetEval](https://arxiv.org/abs/2010.12421)", "", "0.713"),
    ("BERTweet", "[TweetEval's leaderboard](https://github.com/cardiffnlp/tweeteval)", "", "0.734"),
    ("first llm-course-hw3-dora of liuhailin0123", "its card then", "0.46", ""),
    ("LoRA model of the same owner", "its card", "0.51", ""),
)
_SAMPLES_RULE = (
    "For each label, the first example that the model answers correctly and the first that it answers incorrectly "
    "(✗), in the order of the split; ⏎ stands for a line break."
)
_CHOSEN_SAMPLES_RULE = "Chosen by the publisher; ✗ marks a wrong answer, ⏎ stands for a line break."
_PLACEHOLDER = "the text to classify"  # where no example may be shown
_CITATIONS = {
    "dora": """@inproceedings{liu2024dora,
  title     = {{DoRA}: Weight-Decomposed Low-Rank Adaptation},
  author    = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and Wang, Yu-Chiang Frank and
               Cheng, Kwang-Ting and Chen, Min-Hung},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2402.09353}
}""",
    "lora": """@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and
               Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  url       = {https://arxiv.org/abs/2106.09685}
}""",
}
_SHOWN_MISTAKES, _SHOWN_UNPARSED = 3, 3


@dataclass(frozen=True)
class Records:
    """The records of one finished run and its evaluation.

    `result`, `finetuned` and `difference` repeat fields of these records, which may be None for other runs.
    """

    run: RunRecord
    result: TrainingResult
    evaluation: EvaluationRecord
    finetuned: ModelMetrics
    difference: Difference
    predictions: list[PredictionRecord]
    sisters: Group | None = None  # the run and those that differ from it in the seed alone

    def examples(self) -> Examples:
        """Return the evaluated examples from the predictions, so that the data set is not needed."""
        words = self.evaluation.label_words
        labels = [words.index(row.label) if row.label in words else -1 for row in self.predictions]
        return make_examples([row.text for row in self.predictions], labels)


def make_records(run: RunRecord, evaluation: EvaluationRecord, predictions: list[PredictionRecord]) -> Records:
    """Combine the records of a run.

    Raises:
        InputError: the evaluation is not of a finished run.
    """
    if run.result is None or evaluation.finetuned is None or evaluation.difference is None:
        raise InputError(
            f"the evaluation is of a {evaluation.kind}; expected one of a run. Run evaluate.py on the run folder."
        )
    return Records(run, run.result, evaluation, evaluation.finetuned, evaluation.difference, predictions)


def evaluation_path(run_dir: str, split: str) -> str:
    """Return the path of a run's evaluation record."""
    return os.path.join(run_dir, "evaluation", f"{split}.json")


def read_records(run: RunRecord, run_dir: str, split: str) -> Records:
    """Read the run's evaluation and combine it with the run's record.

    Raises:
        InputError: the run was not evaluated on that split, or its files are incomplete.
    """
    again = f"Evaluate it first: python evaluate.py {run_dir} --split {split}"
    path = evaluation_path(run_dir, split)
    try:
        evaluation = read_record(EvaluationRecord, path)
        return make_records(run, evaluation, read_predictions(os.path.join(path.removesuffix(".json"), PREDICTIONS)))
    except InputError as error:
        raise InputError(f"{error} {again}") from error


@dataclass(frozen=True)
class Publication:
    """What is published of a run: its name, the commands that made it, merged model or adapter alone."""

    hub_model_id: str | None
    folder: str
    license: str | None
    commands: list[str]
    adapter_only: bool = False
    sample_ids: Sequence[int] = ()
    repository_url: str | None = None

    @property
    def model_id(self) -> str:
        """The id that a user loads; the folder if nothing is published, without what is this machine's."""
        return self.hub_model_id or without_folders(self.folder)


def card_facts(
    records: Records,
    publication: Publication,
    dtype: str,
    check: Comparison,
    generations: Sequence[str],
    read_by: str,
    conversions: Sequence[Conversion] = (),
) -> dict[str, Any]:
    """Return every value that the template shows, formatted.

    `read_by` comes from portable.supported_versions; `conversions` are the model's other formats; `check` is the
    comparison of the saved model, in `dtype`, with the trained one; `generations` are its first answers.
    """
    run, evaluation = records.run, records.evaluation
    git, words = run.environment.git, run.task.label_words
    chosen, left_out = choose_samples(records.predictions, words, publication.sample_ids)
    return {
        "name": title(run, publication.hub_model_id),
        "title": f"{folder_name(run.base_display_name)} fine-tuned on {run.train_data.display_name}",
        "model_id": publication.model_id,
        "adapter_only": publication.adapter_only,
        **_task_facts(run, evaluation),
        **_result_facts(records, words),
        **_failure_facts(records, words),
        **_training_facts(run, records.result),
        **_data_facts(run, evaluation),
        "example": _example(run, records.predictions, generations, publication.sample_ids),
        "samples_rule": _CHOSEN_SAMPLES_RULE if publication.sample_ids else _SAMPLES_RULE,
        "samples": chosen,
        "left_out": left_out,
        "citations": _citations(run),
        "repository_url": publication.repository_url,
        "dtype": dtype,
        "read_by": read_by,
        "gguf": next((found for found in conversions if found.format.startswith("GGUF")), None),
        "onnx": [found for found in conversions if found.format.startswith("ONNX")],
        "check": {**vars(check), "max_logit_difference": f"{check.max_logit_difference:.1e}"},
        "commands": publication.commands,
        "mismatches": run.mismatches,
        "corrections": evaluation.corrections,
        "notes": _notes(run, evaluation),
        "guessing": no_better_than_guessing(evaluation),
        "recipe": yaml.safe_dump(recipe(run), sort_keys=False, allow_unicode=True, width=1_000_000),
        "git_commit": git.commit if git else None,
        "git_dirty": git.dirty if git else None,
        "versions": ", ".join(f"{name} {version}" for name, version in run.environment.packages.items()),
    }


def _notes(run: RunRecord, evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """Return the notes on the data; those on the evaluated split come from its own record."""
    of_the_run = [note for note in run.notes if note.split != evaluation.split]
    names = {"train": run.train_data.split, evaluation.split: evaluation.data.split}
    if run.validation_data and evaluation.split != "validation":
        names["validation"] = run.validation_data.split
    notes = [*of_the_run, *evaluation.notes]
    return [{"split": names.get(note.split, note.split), "text": note.text} for note in notes]


def title(run: RunRecord, hub_model_id: str | None) -> str:
    """Return the model's name without its owner."""
    return hub_model_id.rsplit("/", 1)[-1] if hub_model_id else run.name


def recipe(run: RunRecord) -> dict[str, Any]:
    """Return the settings of a run, including defaults, for train.py --config; base and data are pinned to commits."""
    settings = {**vars(run.task), **vars(run.model), **vars(run.training)}
    settings |= {"model_revision": run.base_model.revision, "dataset_revision": run.train_data.revision}
    del settings["world_size"]  # accelerate launch --num_processes; the result does not depend on it
    plain = {name: without_folders(value) if isinstance(value, str) else value for name, value in settings.items()}
    # Write None only where it is not the default (max_train_samples: all), as an empty key is no setting.
    defaults = {item.name: item.default for kind in (TaskConfig, ModelConfig) for item in dataclasses.fields(kind)}
    return {name: value for name, value in plain.items() if value is not None or defaults.get(name) is not None}


def _task_facts(run: RunRecord, evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return facts about base model, labels and prompt."""
    task, base, words, data = run.task, run.base_model, run.task.label_words, evaluation.data
    name, known_id = run.base_display_name, run.base_hub_id
    is_sentiment = (data.name, data.config) == _TWEETEVAL_SENTIMENT
    # Others' scores are for the whole test split; next to a part of it, or another split, they would mislead.
    is_whole_test = evaluation.split == data.split == "test" and data.num_examples == _TWEETEVAL_TEST_EXAMPLES
    return {
        "base_name": name,
        "base_link": f"[{name}](https://huggingface.co/{known_id})" if known_id else f"`{name}`",
        "converted_file": run.base_model_card.converted_file if base.weights_sha256 else None,
        "base_parameters": f"{base.parameters:,}",
        "base_revision": base.revision,
        "method_name": _METHOD_NAMES[run.model.method],
        "is_dora": run.model.method == "dora",
        "label_list": ", ".join(f"`{word}`" for word in words),
        "label_words": words,
        "label_count": len(words),
        "system_prompt": task.system_prompt,
        "system_in_user_turn": run.prompt_format.system_in_user_turn,
        "is_tweeteval_sentiment": is_sentiment,
        "published": _PUBLISHED if is_sentiment and is_whole_test else (),
        "stop_token": run.prompt_format.stop_token,
    }


def _result_facts(records: Records, words: list[str]) -> dict[str, Any]:
    """Return the scores."""
    evaluation, difference, data = records.evaluation, records.difference, records.evaluation.data
    majority = evaluation.baselines.majority
    return {
        "num_examples": f"{records.finetuned.num_examples:,}",
        "evaluation_data": f"{data.display_name}, {data.split}",
        "base": _model_texts(evaluation.base),
        "finetuned": _model_texts(records.finetuned),
        "uniform": _score_texts(evaluation.baselines.uniform),
        "majority": {**_score_texts(majority), "label": majority.label},
        "others": [
            {
                **_score_texts(other),
                "name": f"{other.name} ({other.version})",
                "interval": _interval(other.macro_f1_interval),
            }
            for other in evaluation.baselines.others
        ],
        "likelihoods": {name: _likelihood_texts(found) for name, found in evaluation.likelihoods.items()},
        "difference": {
            "value": f"{difference.macro_f1.difference:+.3f}",
            "interval": _interval(difference.macro_f1.interval, "+.3f"),
            "fixed": f"{difference.mcnemar.fixed:,}",
            "broken": f"{difference.mcnemar.broken:,}",
            "p_value": format_p(difference.mcnemar.p_value),
        },
        "seeds": _seed_texts(records.sisters) if records.sisters and len(records.sisters.runs) > 1 else None,
        "diverged_seeds": _diverged_seeds(records.sisters) if records.sisters else None,
        "seed": records.run.training.seed,
        "bootstrap_samples": f"{evaluation.bootstrap.samples:,}",
        "precision": evaluation.precision,
        "max_new_tokens": evaluation.max_new_tokens,
        "answer_tokens": records.run.max_new_tokens,
        "per_label": _label_rows(records, words),
    }


def _seed_texts(group: Group) -> dict[str, str]:
    """Return macro-F1 over runs that differ only in the seed."""
    found = summarise(group)
    return {
        "count": str(len(group.runs)),
        "list": _listed(group.seeds),
        "macro_f1": f"{found.mean:.3f}",
        "deviation": f"{found.deviation:.3f}",
        "interval": _interval(found.interval),
    }


def _diverged_seeds(group: Group) -> str | None:
    """Return "seed 45" or "seeds 45 and 46"; None if no run diverged."""
    return f"seed{'s' if len(group.diverged) > 1 else ''} {_listed(group.diverged)}" if group.diverged else None


def _listed(seeds: Sequence[int]) -> str:
    """Return seeds as a list in words: 42, 43 and 44."""
    *first, last = map(str, seeds)
    return f"{', '.join(first)} and {last}" if first else last


def _failure_facts(records: Records, words: list[str]) -> dict[str, Any]:
    """Return where the fine-tuned model fails: labels it confuses, text lengths, answers without a label word."""
    metrics = records.finetuned
    present = [word for word in words if metrics.per_label[word].support]  # recall is undefined without examples
    weakest = min(present, key=lambda word: metrics.per_label[word].recall)
    answers = [row.finetuned for row in records.predictions if row.finetuned]
    unparsed = [answer.text for answer in answers if answer.predicted is None]
    recall = metrics.per_label[weakest].recall
    return {
        "weakest": {"word": weakest, "recall": f"{recall:.3f}", "recall_percent": f"{recall:.0%}"}
        if recall < 1
        else None,
        "mistakes": _mistakes(metrics.confusion_matrix, words),
        "by_length": [
            {
                "characters": "{:,} to {:,}".format(*band.characters),
                "num_examples": f"{band.num_examples:,}",
                "accuracy": f"{band.accuracy:.3f}",
                "interval": _interval(band.interval),
            }
            for band in metrics.by_length
        ],
        "some_unparsed": any(found.parse_rate < 1 for found in records.evaluation.models.values()),
        "unparsed_finetuned": f"{len(unparsed):,}" if unparsed else None,
        "unparsed_answers": [answer for answer in unparsed if not unsuitable(answer)][:_SHOWN_UNPARSED],
    }


def _mistakes(matrix: list[list[int]], words: list[str]) -> list[dict[str, str]]:
    """Return the most frequent confusions."""
    found = [
        (count, word, words[column], sum(row))
        for number, (word, row) in enumerate(zip(words, matrix, strict=True))
        for column, count in enumerate(row[:-1])  # the last column counts answers without a label word
        if column != number and count
    ]
    return [
        {"count": f"{count:,}", "label": label, "answer": answer, "of": f"{of:,}", "share": f"{count / of:.1%}"}
        for count, label, answer, of in sorted(found, key=lambda entry: -entry[0])[:_SHOWN_MISTAKES]
    ]


def _training_facts(run: RunRecord, result: TrainingResult) -> dict[str, Any]:
    """Return the settings of adapter and training, and what training took."""
    training, trainable = run.training, run.adapter.trainable_parameters
    return {
        "settings": run.model,
        "training": training,
        "target_modules": ", ".join(run.model.target_modules),
        "trainable_parameters": f"{trainable:,}",
        "trainable_share": f"{trainable / run.base_model.parameters:.3%}",
        "steps": f"{result.steps:,}",
        "epochs": _epochs(_passes(result.steps, training, run.train_data.num_examples)),
        "learning_rate": f"{training.learning_rate:g}",
        "warmup": _warmup(training.warmup_steps),
        "train_loss": f"{result.train_loss:.3f}",
        "duration": _duration(result.seconds),
        "hardware": _hardware(run),
        "peak_memory": _peak_memory(run, result),
        "tracker_url": run.tracker.url if run.tracker else None,
    }


def _data_facts(run: RunRecord, evaluation: EvaluationRecord) -> dict[str, Any]:
    """Return facts about the training, validation and evaluation data."""
    train = run.train_data
    validation, measured = run.validation_data, evaluation.data
    known = [train] if validation is None else [train, validation]
    if evaluation.split == "validation" and validation is not None:
        if (validation.name, validation.split) == (measured.name, measured.split):
            known = [train]  # the run's validation may have had some of these examples only
    return {
        "data": [_data_row(data) for data in (*known, measured)],
        "dataset_link": _dataset_link(train),
        "dataset_url": f"https://huggingface.co/datasets/{train.hub_id}" if train.hub_id else None,
        "dataset_config": train.config,
        "dataset_revision": train.revision,
        "first_texts": {word: text for word, text in train.first_texts.items() if not unsuitable(text)},
        "dataset_card": run.dataset_card,
        "base_card": run.base_model_card,
        "supervised_tokens": f"{train.supervised_tokens:,}",
        "tokens": f"{train.tokens:,}",
        "sequence_lengths": {name: f"{count:,}" for name, count in train.sequence_lengths.items()},
        "truncated": train.truncated,
        "max_length": run.task.max_length,
    }


def _likelihood_texts(found: LikelihoodMetrics) -> dict[str, str]:
    return _score_texts(found) | {
        "macro_f1_interval": _interval(found.intervals.macro_f1),
        "log_loss": f"{found.log_loss:.3f}",
        "log_loss_interval": _interval(found.log_loss_interval),
        "calibration_error": f"{found.calibration_error:.3f}",
        "calibration_error_interval": _interval(found.calibration_error_interval),
    }


def _score_texts(scores: Baseline | ModelMetrics | LikelihoodMetrics) -> dict[str, str]:
    return {name: f"{getattr(scores, name):.3f}" for name in ("macro_f1", "macro_recall", "accuracy")}


def _model_texts(metrics: ModelMetrics) -> dict[str, str]:
    rates = {name: f"{getattr(metrics, name):.1%}" for name in ("parse_rate", "exact_match", "eos_rate")}
    intervals = {
        f"{name}_interval": _interval(getattr(metrics.intervals, name)) for name in ("macro_f1", "macro_recall")
    }
    return _score_texts(metrics) | rates | intervals


def _interval(bounds: Interval, form: str = ".3f") -> str:
    low, high = bounds
    return f"[{low:{form}}, {high:{form}}]"


def _label_rows(records: Records, words: list[str]) -> list[dict[str, str]]:
    rows = []
    for word, interval in zip(words, records.finetuned.intervals.per_label_f1, strict=True):
        scores, base = records.finetuned.per_label[word], records.evaluation.base.per_label[word]
        texts = {name: f"{getattr(scores, name):.3f}" for name in ("precision", "recall", "f1")}
        texts |= {"interval": _interval(interval), "f1_base": f"{base.f1:.3f}"}
        rows.append({"word": word, "support": f"{scores.support:,}", **texts})
    return rows


def choose_samples(
    predictions: list[PredictionRecord], words: list[str], sample_ids: Sequence[int] = ()
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return the samples that the user named or _SAMPLES_RULE chooses, and how many the rule skipped for which reason.

    Raises:
        InputError: there is no example of that id.
    """
    if sample_ids:
        by_id = {row.example_id: row for row in predictions}
        if unknown := [number for number in sample_ids if number not in by_id]:
            raise InputError(
                f"--sample_ids {unknown[0]}: the evaluation has no such example. predictions.jsonl lists the ids."
            )
        return [_sample(by_id[number]) for number in sample_ids], {}
    chosen, left_out = {}, Counter[str]()
    wanted = {(word, wrong) for word in words for wrong in (False, True)}
    for row in predictions:
        if not wanted:
            break
        sample = _sample(row)
        kind = (row.label, sample["wrong"])
        if kind in wanted:
            if reason := unsuitable(sample["text"], sample["base"], sample["finetuned"]):
                left_out[reason] += 1
            else:
                chosen[kind] = sample
                wanted.remove(kind)
    return [chosen[kind] for word in words for kind in ((word, False), (word, True)) if kind in chosen], dict(left_out)


def _sample(row: PredictionRecord) -> dict[str, Any]:
    """Return an example with the answers of base and fine-tuned model."""
    answer = row.finetuned or row.base
    texts = {"text": row.text, "base": row.base.text, "finetuned": answer.text}
    return {**texts, "label": row.label, "wrong": answer.predicted != row.label}


def widget_examples(
    run: RunRecord, predictions: list[PredictionRecord], sample_ids: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Return examples for the page's widget: for each label the first exact, correct answer that may be shown.

    If the user named samples, only these are used.
    """
    examples = []
    shown = [row for row in predictions if (row.example_id in sample_ids if sample_ids else not unsuitable(row.text))]
    for word in run.task.label_words:
        right = (row for row in shown if row.finetuned and row.label == row.finetuned.text == word)
        if (row := next(right, None)) is not None:
            messages = run.prompt_format.messages(run.task.system_prompt, row.text)
            examples.append({"example_title": word, "messages": messages, "output": {"text": word}})
    return examples


def _example(
    run: RunRecord, predictions: list[PredictionRecord], generations: Sequence[str], sample_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the first example that may be shown and that the saved model answers exactly right, else the first shown.

    If none may be shown, a placeholder takes the place of its text, and the answer is None. If the user named samples,
    only these may be shown.
    """
    answered = zip(predictions, generations, strict=False)  # only the first examples have answers
    shown = [
        (row.label, row.text, answer)
        for row, answer in answered
        if (row.example_id in sample_ids if sample_ids else not unsuitable(row.text, answer))
    ]
    exact = (one for one in shown if one[0] == one[2])
    _, text, answer = next(exact, shown[0] if shown else ("", _PLACEHOLDER, None))
    return {"messages": run.prompt_format.messages(run.task.system_prompt, text), "answer": answer}


def _data_row(data: DataRecord) -> dict[str, Any]:
    counts = [f"{count:,}" for count in data.label_counts.values()]
    return {"name": f"`{data.split}`", "num_examples": f"{data.num_examples:,}", "counts": counts}


def _dataset_link(data: TrainDataRecord) -> str:
    if data.hub_id:
        return f"[{data.hub_id}](https://huggingface.co/datasets/{data.hub_id})"
    return f"`{folder_name(data.name)}`"


def _citations(run: RunRecord) -> str:
    """BibTeX of the method, the data set and the base model; of those whose card has none, its address."""
    sources = [
        ("dataset", run.dataset_card.citation, run.train_data.hub_id, "https://huggingface.co/datasets/"),
        ("base_model", run.base_model_card.citation, run.base_hub_id, "https://huggingface.co/"),
    ]
    entries = [_CITATIONS[run.model.method]]
    for key, citation, hub_id, address in sources:
        if citation is None and hub_id is not None:
            citation = f"@misc{{{key},\n  title = {{{hub_id}}},\n  url   = {{{address}{hub_id}}}\n}}"
        entries += [citation] if citation else []
    return "\n\n".join(entries)


def _passes(steps: int, training: Any, num_examples: int) -> float:
    """Passes over the examples. The last batch of each is smaller, or left out."""
    size = training.global_batch_size
    if training.dataloader_drop_last:
        return steps * size / num_examples
    full, rest = divmod(steps, math.ceil(num_examples / size))
    return full + rest * size / num_examples


def _epochs(passes: float) -> str:
    passes_text = "one pass" if abs(passes - 1) < 0.01 else f"{passes:.2f} passes"
    return f"{passes_text} over the training examples"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _warmup(steps: float) -> str | None:
    """Format the warm-up; the Trainer reads a number below 1 as a fraction of all steps (transformers 5.23)."""
    if not steps:
        return None
    return f"{steps:g} warm-up steps" if steps >= 1 else f"warm-up over the first {steps * 100:g} % of the steps"


def _hardware(run: RunRecord) -> str:
    """Return the hardware that the run used, one GPU per process; the machine may have more."""
    hardware = run.environment.hardware
    if run.device == "cuda":
        return f"{run.training.world_size} x {hardware.gpus[0]}"
    return f"{hardware.cores} cores of {hardware.cpu}"


def _peak_memory(run: RunRecord, result: TrainingResult) -> str:
    """Return the peak memory of the process that used most."""
    peak = result.peak_memory_bytes
    if run.device == "cuda":  # a reader needs the GPU's memory, not the process's
        used = max(size for name, size in peak.items() if name != "process")
        return f"{used / 1e9:.1f} GB of one GPU's memory"
    return f"{peak['process'] / 1e9:.1f} GB of one process's memory"
