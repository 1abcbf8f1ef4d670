"""The model card: model_card_template.md, filled with card_facts.py's texts, and metadata that the Hub reads."""

import difflib
import html
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from tweetdora.card_facts import (
    Publication,
    Records,
    base_id,
    card_facts,
    data_name,
    hub_id,
    title,
    widget_examples,
)
from tweetdora.errors import InputError

TEMPLATE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "model_card_template.md")
# What the Hub knows (huggingface.co/docs/hub/repositories-licenses); its validator refuses any other.
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
""".split()


def render_card(records: Records, publication: Publication, check: dict[str, Any], answers: Sequence[str]) -> str:
    """The whole card as text, metadata in front; its code loads the Hub's model, or the folder where there is none.

    `check` is what comparing the saved model showed, `answers` what it answered to the first rows.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(
        cell=table_cell, code=inline_code, columns=keep_columns, pystr=_python_string, fence=fence
    )
    with open(TEMPLATE, encoding="utf-8") as stream:
        template = environment.from_string(stream.read())
    facts = card_facts(records, publication, check, answers)
    text = template.render(**facts, metadata=front_matter(records, publication))
    ModelCard(text)  # parses its own metadata back, or raises
    return text


def check_records(records: Records) -> None:
    """Refuse records that are not of one and the same run.

    Raises:
        InputError: names what differs.
    """
    run, evaluation = records.run, records.evaluation
    version = evaluation.get("record_version")
    if version != run["record_version"]:
        raise InputError(
            f"the evaluation was written by another version of this code: record version {version}, the run's is "
            f"{run['record_version']}. Run evaluate.py on the run folder again."
        )
    data, found = evaluation["data"], records.rows()
    pairs = (
        ("adapter", run["adapter"]["sha256"], evaluation["adapter_sha256"]),
        ("base model", run["base"], evaluation["base"]),
        ("label words", run["task"]["label_words"], evaluation["label_words"]),
        ("prompt", run["prompt_format"], evaluation["prompt_format"]),
        ("number of predictions", data["rows"], len(found)),
        ("hash of the predictions' texts and labels", data["sha256"], found.source["sha256"]),
    )
    for name, expected, other in pairs:
        if expected != other:
            raise InputError(
                f"the evaluation is not of this run: its {name} is {other!r}, the run's {expected!r}. "
                "Run evaluate.py on the run folder again."
            )


def check_license(license: str | None, base_card: dict[str, Any]) -> None:
    """Refuse a licence that the Hub does not know, or one of a kind that it asks a name of.

    Raises:
        InputError: names the nearest ones that are known.
    """
    if license is None:
        return
    if license not in LICENSES:  # a card may even hold a list
        near = difflib.get_close_matches(str(license).lower(), LICENSES, n=3, cutoff=0.4)
        raise InputError(
            f"the Hub knows no licence {license!r}; expected one of its identifiers"
            f"{', such as ' + ', '.join(near) if near else ''} (huggingface.co/docs/hub/repositories-licenses). Give "
            "it with --license."
        )
    if license == "other" and not (base_card.get("license_name") and base_card.get("license_link")):
        raise InputError(
            "the licence is `other`, which on the Hub needs license_name and license_link, and the base model's card "
            "gives none. Give an identifier with --license."
        )


def front_matter(records: Records, publication: Publication) -> str:
    """The metadata as YAML. What is not known, or is a local folder and so no Hub id, is left out."""
    run, evaluation = records.run, records.evaluation
    data, card = evaluation["data"], run["base_card"]
    dataset = hub_id(data)
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
    other_license = {name: card.get(name) for name in ("license_name", "license_link")}
    metadata = ModelCardData(
        model_name=title(run, publication.hub_model_id),
        base_model=base_id(run),
        base_model_relation="adapter" if publication.adapter_only else "finetune",
        datasets=[dataset] if dataset else None,
        language=card.get("language"),
        library_name="peft" if publication.adapter_only else "transformers",
        license=publication.license,
        **(other_license if publication.license == "other" else {}),
        metrics=["f1", "recall", "accuracy"],
        pipeline_tag="text-generation",
        tags=[run["model"]["method"], "peft", "text-classification", "conversational", "tweetdora"],
        widget=widget_examples(run, records.predictions) or None,
        eval_results=results,
    )
    return metadata.to_yaml(line_break="\n")


def _python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


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
    marks = "`" * (_longest_ticks(shown) + 1)
    return f"{marks} {shown} {marks}" if len(marks) > 1 else f"`{shown}`"


def fence(text: str, language: str = "") -> str:
    """Text as a block of code, whatever it holds."""
    marks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
