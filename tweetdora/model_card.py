"""The model card: facts from the records of a run, rendered by model_card_template.md."""

import html
import json
import os
import re
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tweetdora.errors import InputError
from tweetdora.evaluation import format_p
from tweetdora.prompts import PromptFormat

TEMPLATE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model_card_template.md")
METHOD_NAMES = {"dora": "DoRA", "lora": "LoRA"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SAMPLES_RULE = (
    "For each label, the first row of the split that the model answers rightly and the first that it answers wrongly "
    "(✗), in the split's order; a line break in an answer is shown as ⏎."
)


def render_card(
    run: dict[str, Any],
    evaluation: dict[str, Any],
    predictions: list[dict[str, Any]],
    merge_check: dict[str, Any],
    hub_model_id: str | None,
    folder: str,
    license: str | None,
    commands: list[str],
) -> str:
    """The whole card as text, metadata in front; its code loads the Hub's model, or the folder where there is none.

    Raises:
        InputError: the records contradict one another.
    """
    check_records(run, evaluation, predictions)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(cell=table_cell, code=inline_code, columns=keep_columns, pystr=_python_string)
    with open(TEMPLATE, encoding="utf-8") as stream:
        template = environment.from_string(stream.read())
    facts = card_facts(run, evaluation, predictions, merge_check, hub_model_id, folder, commands)
    metadata = card_metadata(run, evaluation, hub_model_id, license)
    text = template.render(**facts, metadata=metadata.to_yaml(line_break="\n"))
    ModelCard(text)  # parses its own metadata back, or raises
    return text


def _python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def check_records(run: dict[str, Any], evaluation: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    """Refuse records that are not of one and the same run.

    Raises:
        InputError: names what differs.
    """
    pairs = (
        ("adapter", run["adapter"]["sha256"], evaluation["adapter_sha256"]),
        ("base model", run["base"], evaluation["base"]),
        ("label words", run["task"]["label_words"], evaluation["label_words"]),
        ("prompt", run["prompt_format"], evaluation["prompt_format"]),
        ("number of predictions", evaluation["data"]["rows"], len(predictions)),
    )
    for name, expected, found in pairs:
        if expected != found:
            raise InputError(
                f"the evaluation is not of this run: its {name} is {found!r}, the run's {expected!r}. "
                "Run evaluate.py on the run folder again."
            )


def card_metadata(
    run: dict[str, Any], evaluation: dict[str, Any], hub_model_id: str | None, license: str | None
) -> ModelCardData:
    """The front matter. What is not known, or is a local folder and so no Hub id, is left out."""
    data = evaluation["data"]
    dataset = _hub_id(data["name"])
    metrics = (("f1", "macro_f1", "macro-F1"), ("recall", "macro_recall", "macro recall"))
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification by generation",
            dataset_type=data["name"] if dataset else os.path.basename(os.path.normpath(data["name"])),
            dataset_name=data_name(data),
            dataset_config=data["config"],
            dataset_split=data["split"],
            dataset_revision=data["revision"],
            metric_type=kind,
            metric_name=name,
            metric_value=round(evaluation["after"][key], 4),
        )
        for kind, key, name in (*metrics, ("accuracy", "accuracy", "accuracy"))
    ]
    card = run["base_card"]
    return ModelCardData(
        model_name=_title(run, hub_model_id),
        base_model=_base_id(run),
        base_model_relation="finetune",
        datasets=[dataset] if dataset else None,
        language=card.get("language"),
        library_name="transformers",
        license=license,
        metrics=["f1", "recall", "accuracy"],
        pipeline_tag="text-generation",
        tags=[run["model"]["method"], "peft", "text-classification", "conversational", "tweetdora"],
        eval_results=results,
    )


def _hub_id(name: str) -> str | None:
    return name if _HUB_ID.fullmatch(name) and not os.path.exists(name) and not name.startswith("assets/") else None


def _title(run: dict[str, Any], hub_model_id: str | None) -> str:
    return hub_model_id.rsplit("/", 1)[-1] if hub_model_id else run["name"]


def _base_id(run: dict[str, Any]) -> str | None:
    """The base model's Hub id; for a local folder the one that its card says it is a conversion of."""
    if not run["base"]["weights_sha256"]:  # recorded of a local folder only
        return run["base"]["name_or_path"]
    name = str(run["base_card"].get("converted_from"))
    return name if _HUB_ID.fullmatch(name) else None


def card_base_name(run: dict[str, Any]) -> str:
    """The base model's Hub id, or its folder's name where it has none."""
    return _base_id(run) or os.path.basename(os.path.normpath(run["base"]["name_or_path"]))


def data_name(data: dict[str, Any]) -> str:
    """A data set's name for people: Hub id or folder name, and its configuration."""
    name = data["name"] if _hub_id(data["name"]) else os.path.basename(os.path.normpath(data["name"]))
    return f"{name} ({data['config']})" if data["config"] else name


def card_facts(
    run: dict[str, Any],
    evaluation: dict[str, Any],
    predictions: list[dict[str, Any]],
    merge_check: dict[str, Any],
    hub_model_id: str | None,
    folder: str,
    commands: list[str],
) -> dict[str, Any]:
    """Every value that the template shows, formatted."""
    git = run["environment"]["git"] or {}
    return {
        "title": _title(run, hub_model_id),
        "model_id": hub_model_id or folder,
        **_task_facts(run, evaluation),
        **_result_facts(evaluation, run["task"]["label_words"]),
        **_training_facts(run),
        **_data_facts(run, evaluation),
        "example": _example(run, predictions),
        "samples_rule": _SAMPLES_RULE,
        "samples": choose_samples(predictions, run["task"]["label_words"]),
        "merge": {**merge_check, "max_logit_difference": f"{merge_check['max_logit_difference']:.1e}"},
        "commands": commands,
        "git_commit": git.get("commit"),
        "git_dirty": git.get("dirty"),
        "versions": ", ".join(f"{name} {version}" for name, version in run["environment"]["packages"].items()),
    }


def _task_facts(run: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Base model, labels and prompt."""
    task, base, words, data = run["task"], run["base"], run["task"]["label_words"], evaluation["data"]
    base_id, base_name = _base_id(run), card_base_name(run)
    return {
        "base_name": base_name,
        "base_link": f"[{base_name}](https://huggingface.co/{base_id})" if base_id else f"`{base_name}`",
        "converted_file": run["base_card"].get("converted_file") if base["weights_sha256"] else None,
        "base_parameters": f"{base['parameters']:,}",
        "base_revision": base["revision"],
        "method_name": METHOD_NAMES[run["model"]["method"]],
        "is_dora": run["model"]["method"] == "dora",
        "label_list": ", ".join(f"`{word}`" for word in words),
        "label_words": words,
        "label_count": len(words),
        "system_prompt": task["system_prompt"].replace("\n", "\n> "),
        "system_in_user_turn": run["prompt_format"]["system_in_user_turn"],
        "is_tweeteval_sentiment": (data["name"], data["config"]) == ("cardiffnlp/tweet_eval", "sentiment"),
        "stop_token": run["prompt_format"]["stop_token"],
    }


def _result_facts(evaluation: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What evaluate.py measured."""
    after, difference, data = evaluation["after"], evaluation["difference"], evaluation["data"]
    weakest = min(words, key=lambda word: after["per_class"][word]["recall"])
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
        "weakest": {
            "word": weakest,
            "recall": f"{after['per_class'][weakest]['recall']:.3f}",
            "recall_percent": f"{after['per_class'][weakest]['recall']:.0%}",
        },
        "unparsed_after": sum(row[-1] for row in after["confusion_matrix"]),
    }


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
    }


def _data_facts(run: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """The rows that were trained on, validated and measured."""
    train = run["train_data"]
    validation = [run["validation_data"]] if run["validation_data"] else []
    return {
        "data": [_data_row(data) for data in (train, *validation, evaluation["data"])],
        "dataset_link": _dataset_link(train["name"]),
        "dataset_config": train["config"],
        "dataset_revision": train["revision"],
        "supervised_tokens": f"{train['supervised_tokens']:,}",
        "tokens": f"{train['tokens']:,}",
        "cut_texts": train["cut_texts"],
        "max_length": run["task"]["max_length"],
    }


def _score_texts(figures: dict[str, Any]) -> dict[str, str]:
    texts = {name: f"{figures[name]:.3f}" for name in ("macro_f1", "macro_recall", "accuracy")}
    texts |= {name: f"{figures[name]:.1%}" for name in ("parse_rate", "exact_rate", "stop_rate") if name in figures}
    if "intervals" in figures:
        texts["interval"] = _interval(figures["intervals"]["macro_f1"])
    return texts | ({"label": figures["label"]} if "label" in figures else {})


def _interval(bounds: list[float], form: str = ".3f") -> str:
    low, high = bounds
    return f"[{low:{form}}, {high:{form}}]"


def _class_rows(evaluation: dict[str, Any], words: list[str]) -> list[dict[str, str]]:
    rows = []
    for word in words:
        after, before = evaluation["after"]["per_class"][word], evaluation["before"]["per_class"][word]
        texts = {name: f"{after[name]:.3f}" for name in ("precision", "recall", "f1")}
        rows.append({"word": word, "support": f"{after['support']:,}", **texts, "f1_before": f"{before['f1']:.3f}"})
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


def _example(run: dict[str, Any], predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row with an exact, right answer; the first row of all where there is none."""
    right = (row for row in predictions if row["after"]["answer"] == row["label"])
    row = next(right, predictions[0])
    messages = PromptFormat(**run["prompt_format"]).messages(run["task"]["system_prompt"], row["text"])
    return {"messages": messages, "answer": row["after"]["answer"]}


def _data_row(data: dict[str, Any]) -> dict[str, Any]:
    counts = [f"{count:,}" for count in data["class_counts"].values()]
    return {"name": f"`{data['split']}`", "rows": f"{data['rows']:,}", "counts": counts}


def _dataset_link(name: str) -> str:
    if hub_id := _hub_id(name):
        return f"[{hub_id}](https://huggingface.co/datasets/{hub_id})"
    return f"`{os.path.basename(os.path.normpath(name))}`"


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


def table_cell(text: str) -> str:
    """Text as one cell of a Markdown table: no markup, no column or line breaks."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escaped)
    return re.sub(r"\s+", " ", escaped).strip()


def keep_columns(text: str) -> str:
    """Inline code inside a table: a bar would begin the next column."""
    return text.replace("|", "\\|")


def inline_code(text: str) -> str:
    """Text as inline code, whatever it holds; a line break is shown as a sign."""
    if not text.strip():
        return "(empty)"
    shown = re.sub(r"\s", " ", text.replace("\n", "⏎"))
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {shown} {fence}" if longest else f"`{shown}`"
