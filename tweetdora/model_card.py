"""Render the model card: model_card_template.md with the facts of card_facts.py, and the metadata for the Hub."""

import difflib
import html
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from tweetdora.card_facts import Publication, Records, card_facts, choose_samples, title, widget_examples
from tweetdora.config import PushConfig
from tweetdora.errors import InputError
from tweetdora.evaluation import no_better_than_guessing
from tweetdora.files import folder_name
from tweetdora.portable import supported_versions
from tweetdora.provenance import command_line
from tweetdora.records import BaseModelCard, Comparison, Conversion

_PACKAGE = os.path.dirname(os.path.abspath(__file__))
# At the top of the repository, or next to the scripts of an installed package (pyproject.toml).
_PLACES = [
    os.path.join(folder, "model_card_template.md") for folder in (os.path.dirname(_PACKAGE), f"{_PACKAGE}/scripts")
]
TEMPLATE = next(filter(os.path.isfile, _PLACES), _PLACES[0])
SOURCES = os.path.dirname(TEMPLATE)
# The licences that the Hub accepts (huggingface.co/docs/hub/repositories-licenses).
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


def render_card(
    records: Records,
    publication: Publication,
    dtype: str,
    check: Comparison,
    generations: Sequence[str],
    model_type: str | None = None,
    conversions: Sequence[Conversion] = (),
    base_dtype: str = "float32",
) -> str:
    """Render the whole card, metadata first. Its code loads the model from the Hub, or from the folder if unpublished.

    `model_type` is that of the saved configuration; `conversions` are the model's other formats; `check` is the
    comparison of the saved model, in `dtype`, with the trained one, whose base was in `base_dtype`; `generations` are
    its first answers.
    """
    # StrictUndefined: a name that card_facts does not define is an error, not a gap in a sentence. No HTML escaping:
    # each filter below escapes for the place in Markdown where it is used.
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters.update(
        words=_as_list, cell=table_cell, code=inline_code, columns=keep_columns, pystr=_python_string, fence=fence
    )
    with open(TEMPLATE, encoding="utf-8") as stream:
        template = environment.from_string(stream.read())
    read_by = supported_versions(model_type)
    facts = card_facts(records, publication, dtype, check, generations, read_by, conversions)
    text = template.render(**facts, base_dtype=base_dtype, metadata=front_matter(records, publication))
    ModelCard(text)  # parses the metadata, or raises
    return text


def check_records(records: Records) -> None:
    """Refuse records of different runs.

    Raises:
        InputError: names what differs.
    """
    run, evaluation, found = records.run, records.evaluation, records.examples()
    # The hash ties the predictions to the evaluation: a line changed by hand would otherwise show on the card.
    pairs = (
        ("adapter", run.adapter.sha256, evaluation.adapter_sha256),
        ("base model", run.base_model, evaluation.base_model),
        ("label words", run.task.label_words, evaluation.label_words),
        ("prompt", run.prompt_format, evaluation.prompt_format),
        ("number of predictions", evaluation.data.num_examples, len(found)),
        ("hash of the predictions' texts and labels", evaluation.data.sha256, found.sha256),
    )
    for name, expected, other in pairs:
        if expected != other:
            raise InputError(
                f"the evaluation is not of this run: its {name} is {other!r}, the run's {expected!r}. "
                "Run evaluate.py on the run folder again."
            )


def check_skill(records: Records, config: PushConfig) -> str | None:
    """Refuse to publish a model that is no better than guessing, unless a flag allows it; return a warning or None.

    Raises:
        InputError: gives its score.
    """
    found = no_better_than_guessing(records.evaluation)
    if found is not None and not config.allow_chance_level and not config.dry_run:
        raise InputError(
            f"{found} Train with more examples or a higher --learning_rate, or publish it anyway with "
            "--allow_chance_level true."
        )
    return found


def plan_publication(records: Records, config: PushConfig, folder: str) -> Publication:
    """Decide what to publish of the run.

    Raises:
        InputError: a flag is missing or does not fit the run.
    """
    run = records.run
    hub_model_id = config.hub_model_id or (None if config.adapter_only else run.hub_model_id)
    if hub_model_id is None and not config.dry_run:
        why = "an adapter needs its own repository" if config.adapter_only else "the run names no repository"
        raise InputError(f"{why}; give --hub_model_id owner/name, or --dry_run true.")
    license = check_license(config.license or run.base_model_card.license, run.base_model_card)
    if config.adapter_only and run.base_model.weights_sha256:
        raise InputError(
            f"--adapter_only true: the base model of this run is the local folder {run.base_model.name_or_path}, "
            "which nobody else has. Leave the flag out to publish the merged model."
        )
    commands = [run.command, records.evaluation.command, command_line()]
    more: dict[str, Any] = {"sample_ids": config.sample_ids, "repository_url": config.repository_url}
    publication = Publication(hub_model_id, folder, license, commands, config.adapter_only, **more)
    choose_samples(records.predictions, run.task.label_words, config.sample_ids)  # an unknown id is refused now
    return publication


def check_license(license: str | list[str] | None, card: BaseModelCard) -> str | None:
    """Return the licence if the Hub accepts it.

    Raises:
        InputError: the Hub does not know it; the message names similar ones. Or it needs a name and a link.
    """
    if license is None:
        return None
    if not isinstance(license, str) or license not in LICENSES:  # a card may even hold a list
        near = difflib.get_close_matches(str(license).lower(), LICENSES, n=3, cutoff=0.4)
        raise InputError(
            f"the Hub knows no licence {license!r}; expected one of its identifiers"
            f"{', such as ' + ', '.join(near) if near else ''} (huggingface.co/docs/hub/repositories-licenses). Set "
            "it with --license."
        )
    if license == "other" and not (card.license_name and card.license_link):
        raise InputError(
            "the licence is `other`, which on the Hub needs license_name and license_link, but the base model's card "
            "gives neither. Set an identifier with --license."
        )
    return license


def front_matter(records: Records, publication: Publication) -> str:
    """Return the metadata as YAML, without unknown values and local folders, which have no Hub id."""
    run, data, card = records.run, records.evaluation.data, records.run.base_model_card
    dataset, trained_on = data.hub_id, run.train_data.hub_id
    metrics = (("f1", "macro_f1", "macro-F1"), ("recall", "macro_recall", "macro recall"))
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="Text classification by generation",
            dataset_type=dataset or folder_name(data.name),
            dataset_name=data.display_name,
            dataset_config=data.config,
            dataset_split=data.split,
            dataset_revision=data.revision,
            metric_type=kind,
            metric_name=name,
            metric_value=round(getattr(records.finetuned, key), 4),
        )
        for kind, key, name in (*metrics, ("accuracy", "accuracy", "accuracy"))
    ]
    other_license: dict[str, Any] = {"license_name": card.license_name, "license_link": card.license_link}
    metadata = ModelCardData(
        model_name=title(run, publication.hub_model_id),
        base_model=run.base_hub_id,
        base_model_relation="adapter" if publication.adapter_only else "finetune",
        datasets=[trained_on] if trained_on else None,
        language=card.language,
        library_name="peft" if publication.adapter_only else "transformers",
        license=publication.license,
        **(other_license if publication.license == "other" else {}),
        metrics=["f1", "recall", "accuracy"],
        pipeline_tag="text-generation",
        tags=[run.model.method, "peft", "text-classification", "conversational", "tweetdora"],
        widget=widget_examples(run, records.predictions, publication.sample_ids) or None,
        eval_results=results,
    )
    return to_yaml(metadata.to_dict())


def eval_results_file(records: Records) -> str | None:
    """Return macro-F1 in the Hub's newer format, .eval_results/*.yaml; None if the data set is not on the Hub.

    The Hub shows it on the page of a data set that is registered as a benchmark; model-index is for everything else.
    """
    data, metrics = records.evaluation.data, records.finetuned
    if data.hub_id is None:
        return None
    low, high = metrics.intervals.macro_f1
    entry = EvalResultEntry(
        dataset_id=data.hub_id,
        task_id=data.config or "default",
        dataset_revision=data.revision,
        value=round(metrics.macro_f1, 4),
        date=records.evaluation.created,
        notes=f"macro-F1 by greedy generation, {data.split}, n = {metrics.num_examples}, 95 % [{low:.3f}, {high:.3f}]",
    )
    return to_yaml(eval_result_entries_to_yaml([entry])) + "\n"


class _Dumper(yaml.SafeDumper):
    """Write YAML that means the same in version 1.1, which Python reads, and 1.2, which the Hub reads."""


def _as_scalar(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Inside double quotes, characters that only one version treats as a line break are escaped.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _as_scalar)
# Also quote plain texts that are numbers only in 1.2 (core schema, section 10.3.2), such as 1e3 and 0o14.
_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+"),
    list("-+.0123456789"),
)


def to_yaml(metadata: Any) -> str:
    """Return a card's metadata as YAML; YAML 1.1 and 1.2 read every text back unchanged."""
    return yaml.dump(metadata, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf")).strip()


def _python_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _as_list(words: str | list[str]) -> str:
    return words if isinstance(words, str) else ", ".join(words)


def table_cell(text: str) -> str:
    """Escape text for one cell of a Markdown table: no markup, no column or line breaks."""
    escaped = html.escape(text, quote=False)
    escaped = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", escaped)
    return re.sub(r"\s+", " ", escaped).strip()


def keep_columns(text: str) -> str:
    """Escape inline code inside a table, where a bar would start the next column."""
    return text.replace("|", "\\|")


def inline_code(text: str) -> str:
    """Return any text as inline code; a sign stands for a line break."""
    if not text.strip():
        return "(empty)"
    shown = re.sub(r"\s", " ", text.replace("\n", "⏎"))
    marks = "`" * (_longest_ticks(shown) + 1)
    return f"{marks} {shown} {marks}" if len(marks) > 1 else f"`{shown}`"


def fence(text: str, language: str = "") -> str:
    """Return any text as a code block."""
    marks = "`" * max(3, _longest_ticks(text) + 1)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _longest_ticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
