"""What the model card says, as texts for model_card_template.md, each taken from the records of a run."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import yaml

from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.data import Rows, make_rows
from tweetdora.evaluation import format_p
from tweetdora.prompts import PromptFormat
from tweetdora.records import without_folders

_METHOD_NAMES = {"dora": "DoRA", "lora": "LoRA"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TWEETEVAL_SENTIMENT = ("cardiffnlp/tweet_eval", "sentiment")
_TWEETEVAL_TEST_ROWS = 12284
# Scores of others on the test split of TweetEval sentiment: model, source, macro-F1, macro recall.
_PUBLISHED = (
    ("linear SVM", "[TweetEval](https://arxiv.org/abs/2010.12421)", "", "0.629"),
    ("RoBERTa-base", "[TweetEval](https://arxiv.org/abs/2010.12421)", "", "0.713"),
    ("BERTweet", "[TweetEval's leaderboard](https://github.com/cardiffnlp/tweeteval)", "", "0.734"),
    ("first llm-course-hw3-dora of liuhailin0123", "its card then", "0.46", ""),
    ("LoRA model of the same owner", "its card", "0.51", ""),
)
_SAMPLES_RULE = (
    "For each label, the first row of the split that the model answers rightly and the first that it answers wrongly "
    "(✗), in the split's order; a line break in an answer is shown as ⏎."
)
_SHOWN_MISTAKES, _SHOWN_UNPARSED = 3, 3


@dataclass(frozen=True)
class Records:
    """What train.py and evaluate.py left of one run."""

    run: dict[str, Any]
    evaluation: dict[str, Any]
    predictions: list[dict[str, Any]]

    def rows(self) -> Rows:
        """The rows that were measured, as the predictions hold them: the data set itself need not be at hand."""
        words = self.evaluation["label_words"]
        classes = [words.index(row["label"]) if row["label"] in words else -1 for row in self.predictions]
        return make_rows([row["text"] for row in self.predictions], classes, self.evaluation["data"])


@dataclass(frozen=True)
class Publication:
    """What is made of the run: under which name, from which commands, merged or the adapter alone."""

    hub_model_id: str | None
    folder: str
    license: str | None
    commands: list[str]
    adapter_only: bool = False

    @property
    def model_id(self) -> str:
        """What a user loads; the folder where nothing is published."""
        return self.hub_model_id or self.folder


def card_facts(
    records: Records, publication: Publication, check: dict[str, Any], answers: Sequence[str]
) -> dict[str, Any]:
    """Every value that the template shows, formatted.

    `check` is what comparing the saved model showed, `answers` what it answered to the first rows.
    """
    run, evaluation, predictions = records.run, records.evaluation, records.predictions
    git = run["environment"]["git"] or {}
    return {
        "title": title(run, publication.hub_model_id),
        "model_id": publication.model_id,
        "adapter_only": publication.adapter_only,
        **_task_facts(run, evaluation),
        **_result_facts(evaluation, run["task"]["label_words"]),
        **_failure_facts(evaluation, predictions, run["task"]["label_words"]),
        **_training_facts(run),
        **_data_facts(run, evaluation),
        "example": _example(run, predictions, answers),
        "samples_rule": _SAMPLES_RULE,
        "samples": choose_samples(predictions, run["task"]["label_words"]),
        "check": {**check, "max_logit_difference": f"{check['max_logit_difference']:.1e}"},
        "commands": publication.commands,
        "changes": run["changes"],
        "recipe": yaml.safe_dump(recipe(run), sort_keys=False, allow_unicode=True, width=1_000_000),
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "versions": ", ".join(f"{name} {version}" for name, version in run["environment"]["packages"].items()),
    }


def hub_id(data: dict[str, Any]) -> str | None:
    """A data set's name if it came from the Hub, not from a folder or a file, wherever that is now."""
    return data["name"] if _HUB_ID.fullmatch(data["name"]) and not data["local"] else None


def title(run: dict[str, Any], hub_model_id: str | None) -> str:
    """The model's name without its owner."""
    return hub_model_id.rsplit("/", 1)[-1] if hub_model_id else run["name"]


def base_id(run: dict[str, Any]) -> str | None:
    """The base model's Hub id; for a local folder the one that its card says it is a conversion of."""
    if not run["base"]["weights_sha256"]:  # recorded of a local folder only
        return run["base"]["name_or_path"]
    name = str(run["base_card"].get("converted_from"))
    return name if _HUB_ID.fullmatch(name) else None


def card_base_name(run: dict[str, Any]) -> str:
    """The base model's Hub id, or its folder's name where it has none."""
    return base_id(run) or os.path.basename(os.path.normpath(run["base"]["name_or_path"]))


def data_name(data: dict[str, Any]) -> str:
    """A data set's name for people: Hub id or folder name, and its configuration."""
    name = data["name"] if hub_id(data) else os.path.basename(os.path.normpath(data["name"]))
    return f"{name} ({data['config']})" if data["config"] else name


def recipe(run: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, defaults included, as train.py --config reads them; base and data by their commits."""
    settings = {**run["task"], **run["model"], **run["training"]}
    settings |= {"model_revision": run["base"]["revision"], "dataset_revision": run["train_data"]["revision"]}
    del settings["world_size"]  # accelerate launch --num_processes; the result does not hang on it
    plain = {name: without_folders(value) if isinstance(value, str) else value for name, value in settings.items()}
    defaults = {item.name: item.default for item in (*fields(TaskConfig), *fields(ModelConfig))}
    return {name: value for name, value in plain.items() if value is not None or defaults.get(name) is not None}


def _task_facts(run: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Base model, labels and prompt."""
    task, base, words, data = run["task"], run["base"], run["task"]["label_words"], evaluation["data"]
    name, known_id = card_base_name(run), base_id(run)
    is_sentiment = (data["name"], data["config"]) == _TWEETEVAL_SENTIMENT
    is_whole_test = data["split"] == task["test_split"] and data["rows"] == _TWEETEVAL_TEST_ROWS
    return {
        "base_name": name,
        "base_link": f"[{name}](https://huggingface.co/{known_id})" if known_id else f"`{name}`",
        "converted_file": run["base_card"].get("converted_file") if base["weights_sha256"] else None,
        "base_parameters": f"{base['parameters']:,}",
        "base_revision": base["revision"],
        "method_name": _METHOD_NAMES[run["model"]["method"]],
        "is_dora": run["model"]["method"] == "dora",
        "label_list": ", ".join(f"`{word}`" for word in words),
        "label_words": words,
        "label_count": len(words),
        "system_prompt": task["system_prompt"].replace("\n", "\n> "),
        "system_in_user_turn": run["prompt_format"]["system_in_user_turn"],
        "is_tweeteval_sentiment": is_sentiment,
        "published": _PUBLISHED if is_sentiment and is_whole_test else (),
        "stop_token": run["prompt_format"]["stop_token"],
    }


def _result_facts(evaluation: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What evaluate.py measured."""
    after, difference, data = evaluation["after"], evaluation["difference"], evaluation["data"]
    return {
        "evaluation_rows": f"{after['n']:,}",
        "evaluation_data": f"{data_name(data)}, {data['split']}",
        "before": _score_texts(evaluation["before"]),
        "after": _score_texts(after),
        "uniform": _score_texts(evaluation["reference_lines"]["uniform"]),
        "majority": _score_texts(evaluation["reference_lines"]["majority"]),
        "difference": {
            "value": f"{difference['macro_f1']['difference']:+.3f}",
            "interval": _interval(difference["macro_f1"]["interval"], "+.3f"),
            "fixed": f"{difference['mcnemar']['fixed']:,}",
            "broken": f"{difference['mcnemar']['broken']:,}",
            "p_value": format_p(difference["mcnemar"]["p_value"]),
        },
        "bootstrap_samples": f"{evaluation['bootstrap']['samples']:,}",
        "precision": evaluation["precision"],
        "max_new_tokens": evaluation["max_new_tokens"],
        "classes": _class_rows(evaluation, words),
    }


def _failure_facts(evaluation: dict[str, Any], predictions: list[dict[str, Any]], words: list[str]) -> dict[str, Any]:
    """Where the tuned model goes wrong: between which classes, at which lengths, and what names no label word."""
    after = evaluation["after"]
    present = [word for word in words if after["per_class"][word]["support"]]
    weakest = min(present, key=lambda word: after["per_class"][word]["recall"])
    unparsed = [row["after"]["answer"] for row in predictions if row["after"]["predicted"] is None]
    return {
        "weakest": {
            "word": weakest,
            "recall": f"{after['per_class'][weakest]['recall']:.3f}",
            "recall_percent": f"{after['per_class'][weakest]['recall']:.0%}",
        },
        "mistakes": _mistakes(after["confusion_matrix"], words),
        "by_length": [
            {
                "characters": "{:,} to {:,}".format(*part["characters"]),
                "n": f"{part['n']:,}",
                "accuracy": f"{part['accuracy']:.3f}",
                "interval": _interval(part["interval"]),
            }
            for part in after["by_length"]
        ],
        "unparsed_after": f"{len(unparsed):,}" if unparsed else None,
        "unparsed_answers": unparsed[:_SHOWN_UNPARSED],
    }


def _mistakes(matrix: list[list[int]], words: list[str]) -> list[dict[str, str]]:
    """The most frequent wrong label words."""
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


def _training_facts(run: dict[str, Any]) -> dict[str, Any]:
    """Settings of the adapter and of the training, and what it took."""
    training, result, trainable = run["training"], run["result"], run["adapter"]["trainable_parameters"]
    return {
        "settings": run["model"],
        "training": training,
        "target_modules": ", ".join(run["model"]["target_modules"]),
        "trainable_parameters": f"{trainable:,}",
        "trainable_share": f"{trainable / run['base']['parameters']:.3%}",
        "steps": f"{result['steps']:,}",
        "epochs": _epochs(result["steps"] * training["global_batch_size"] / run["train_data"]["rows"]),
        "learning_rate": f"{training['learning_rate']:g}",
        "warmup": _warmup(training["warmup_steps"]),
        "train_loss": f"{result['train_loss']:.3f}",
        "duration": _duration(result["seconds"]),
        "hardware": _hardware(run),
        "peak_memory": _peak_memory(run),
        "tracker_url": (run.get("tracker") or {}).get("url"),
    }


def _data_facts(run: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The rows that were trained on, validated and measured."""
    train = run["train_data"]
    validation = [run["validation_data"]] if run["validation_data"] else []
    return {
        "data": [_data_row(data) for data in (train, *validation, evaluation["data"])],
        "dataset_link": _dataset_link(train),
        "dataset_config": train["config"],
        "dataset_revision": train["revision"],
        "text_examples": train["examples"],
        "supervised_tokens": f"{train['supervised_tokens']:,}",
        "tokens": f"{train['tokens']:,}",
        "row_tokens": {name: f"{count:,}" for name, count in train["row_tokens"].items()},
        "cut_texts": train["cut_texts"],
        "max_length": run["task"]["max_length"],
    }


def _score_texts(figures: dict[str, Any]) -> dict[str, str]:
    texts = {name: f"{figures[name]:.3f}" for name in ("macro_f1", "macro_recall", "accuracy")}
    texts |= {name: f"{figures[name]:.1%}" for name in ("parse_rate", "exact_rate", "stop_rate") if name in figures}
    if "intervals" in figures:
        texts |= {f"{name}_interval": _interval(figures["intervals"][name]) for name in ("macro_f1", "macro_recall")}
    return texts | ({"label": figures["label"]} if "label" in figures else {})


def _interval(bounds: list[float], form: str = ".3f") -> str:
    low, high = bounds
    return f"[{low:{form}}, {high:{form}}]"


def _class_rows(evaluation: dict[str, Any], words: list[str]) -> list[dict[str, str]]:
    rows = []
    for word, interval in zip(words, evaluation["after"]["intervals"]["per_class_f1"], strict=True):
        after, before = evaluation["after"]["per_class"][word], evaluation["before"]["per_class"][word]
        texts = {name: f"{after[name]:.3f}" for name in ("precision", "recall", "f1")}
        texts |= {"interval": _interval(interval), "f1_before": f"{before['f1']:.3f}"}
        rows.append({"word": word, "support": f"{after['support']:,}", **texts})
    return rows


def choose_samples(predictions: list[dict[str, Any]], words: list[str]) -> list[dict[str, Any]]:
    """The rows that _SAMPLES_RULE names."""
    chosen = []
    for word in words:
        for wrong in (False, True):
            of_kind = (p for p in predictions if p["label"] == word and (p["after"]["predicted"] != word) == wrong)
            if (found := next(of_kind, None)) is not None:
                before, after = found["before"]["answer"], found["after"]["answer"]
                chosen.append({"text": found["text"], "label": word, "before": before, "after": after, "wrong": wrong})
    return chosen


def widget_examples(run: dict[str, Any], predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the page's widget: the first exact, right answer of each label, with the prompt that led to it."""
    prompt_format, task = PromptFormat(**run["prompt_format"]), run["task"]
    examples = []
    for word in task["label_words"]:
        right = (row for row in predictions if row["label"] == row["after"]["answer"] == word)
        if (row := next(right, None)) is not None:
            messages = prompt_format.messages(task["system_prompt"], row["text"])
            examples.append({"example_title": word, "messages": messages, "output": {"text": word}})
    return examples


def _example(run: dict[str, Any], predictions: list[dict[str, Any]], answers: Sequence[str]) -> dict[str, Any]:
    """The first row with an exact, right answer of the saved model; the first row of all where there is none."""
    answered = list(zip(predictions, answers, strict=False))  # answers of the first rows only
    row, answer = next((pair for pair in answered if pair[0]["label"] == pair[1]), answered[0])
    messages = PromptFormat(**run["prompt_format"]).messages(run["task"]["system_prompt"], row["text"])
    return {"messages": messages, "answer": answer}


def _data_row(data: dict[str, Any]) -> dict[str, Any]:
    counts = [f"{count:,}" for count in data["class_counts"].values()]
    return {"name": f"`{data['split']}`", "rows": f"{data['rows']:,}", "counts": counts}


def _dataset_link(data: dict[str, Any]) -> str:
    if known_id := hub_id(data):
        return f"[{known_id}](https://huggingface.co/datasets/{known_id})"
    return f"`{os.path.basename(os.path.normpath(data['name']))}`"


def _epochs(passes: float) -> str:
    passes_text = "one pass" if abs(passes - 1) < 0.01 else f"{passes:.2f} passes"
    return f"{passes_text} over the training rows"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _warmup(steps: float) -> str | None:
    """The Trainer reads a number below 1 as a share of all steps (transformers 5.23)."""
    if not steps:
        return None
    return f"{steps:g} warm-up steps" if steps >= 1 else f"warm-up over the first {steps * 100:g} % of the steps"


def _hardware(run: dict[str, Any]) -> str:
    """What the run computed on, one GPU for each process; the machine may have more."""
    hardware = run["environment"]["hardware"]
    if run["device"] == "cuda":
        return f"{run['training']['world_size']} x {hardware['gpus'][0]}"
    return f"{hardware['cores']} cores of {hardware['cpu']}"


def _peak_memory(run: dict[str, Any]) -> str:
    """The peak of the process that used most."""
    peak = run["result"]["peak_memory_bytes"]
    if run["device"] == "cuda":
        used = max(size for name, size in peak.items() if name != "process")
        return f"{used / 1e9:.1f} GB of one GPU's memory"
    return f"{peak['process'] / 1e9:.1f} GB of one process's memory"
