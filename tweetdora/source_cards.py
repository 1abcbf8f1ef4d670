"""Read the cards of the base model and the data set: licence, languages, origin, paper, citation, labels.

All of it is optional. A card that is missing or unreadable gives empty fields, never an error.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import DatasetCard as HubDatasetCard
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from tweetdora.records import BaseModelCard, DatasetCard

_PAPER = re.compile(r"https?://(?:arxiv\.org/abs/[\w./-]+|aclanthology\.org/[\w./-]+|doi\.org/[^\s)>\]}\"']+)")
_LONGEST_ENTRY, _LONGEST_QUOTE = 2_000, 400


def read_base_card(name_or_path: str, revision: str | None) -> BaseModelCard:
    """Read the base model's own card; empty if there is no readable card."""
    metadata, text = _read_card(name_or_path, revision, ModelCard)
    named = [item.name for item in dataclasses.fields(BaseModelCard)]
    if "language" in metadata:
        metadata["language"] = _languages(metadata["language"])
    found = {name: _as_words(metadata.get(name) or None) for name in named}
    return BaseModelCard(**{**found, "paper": find_paper(text), "citation": find_citation(text)})


def read_dataset_card(
    name_or_path: str, revision: str | None, label_words: Sequence[str], label_values: Sequence[str] | None
) -> DatasetCard:
    """Read the data set's own card; empty if there is no readable card."""
    metadata, text = _read_card(name_or_path, revision, HubDatasetCard)
    # Numbers alone would be found in any sentence.
    are_words = label_values and all(any(map(str.isalpha, value)) for value in label_values)
    values = find_labels(text, label_values) if label_values and are_words else None
    return DatasetCard(
        license=_as_words(metadata.get("license") or None),
        paper=find_paper(text),
        citation=find_citation(text),
        labels=values or find_labels(text, label_words),
    )


def _read_card(name_or_path: str, revision: str | None, kind: type[Any]) -> tuple[dict[str, Any], str]:
    """Return metadata and text of the README.md in a local folder or on the Hub; both empty if there is none."""
    path = os.path.join(name_or_path, "README.md")
    try:
        if not os.path.exists(name_or_path):
            path = hf_hub_download(name_or_path, "README.md", revision=revision, repo_type=kind.repo_type)
        elif not os.path.isfile(path):
            return {}, ""  # load() would take the path for a Hub id
        card = kind.load(path, ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError, LocalEntryNotFoundError):
        return {}, ""
    return card.data.to_dict(), card.text


def _languages(value: Any) -> Any:
    """Return a card's languages with Norwegian's code, `no`, which YAML 1.1 reads as False and the Hub as a word."""
    if isinstance(value, list):
        return [_languages(item) for item in value]
    return "no" if value is False else value


def _as_words(value: Any) -> Any:
    """Return a card's value as a string or a list of strings: YAML parses some as numbers or dates."""
    if isinstance(value, list):
        return [str(item) for item in value]
    return value if value is None else str(value)


def find_paper(text: str) -> str | None:
    """Return the first link to arXiv, the ACL Anthology or a DOI.

    >>> find_paper("See [the paper](https://arxiv.org/abs/2010.12421).")
    'https://arxiv.org/abs/2010.12421'
    """
    found = _PAPER.search(text)
    return found[0].rstrip(".,;") if found else None


def find_citation(text: str) -> str | None:
    """Return the first BibTeX entry, up to its closing brace.

    >>> find_citation("Cite: @misc{a, title={The {B}}, year=2020} and more")
    '@misc{a, title={The {B}}, year=2020}'
    """
    start = re.search(r"@(?!string|comment)[A-Za-z]+\s*\{", text)
    if start is None:
        return None
    depth = 0
    for place, sign in enumerate(text[start.start() : start.start() + _LONGEST_ENTRY]):
        depth += (sign == "{") - (sign == "}")
        if sign == "}" and depth == 0:
            return text[start.start() : start.start() + place + 1]
    return None


def find_labels(text: str, names: Sequence[str]) -> str | None:
    """Return the shortest run of sentences and list items that names all labels; None if it would be long.

    >>> find_labels("Rated by 20 people. Below 0 is bad, else good. Bad luck is not rated.", ["bad", "good"])
    'Below 0 is bad, else good.'
    """
    body = re.sub(r"```.*?```|<!--.*?-->", "\n", text, flags=re.DOTALL)
    lines = [line.strip() for line in body.splitlines()]
    prose = "\n".join("" if line.startswith(("#", "|", "---", "@")) else line for line in lines)
    # A sentence may go on in the next line; a list item ends with its line.
    parts = re.split(r"\n\s*\n|\n(?=[-*`\d])|(?<=[.!?])\s+", prose)
    units = [" ".join(part.split()) for part in parts if part.strip()]
    wanted = [re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE) for name in names]
    best = None
    for first in range(len(units)):
        run = ""
        for unit in units[first:]:
            run = f"{run} {unit}".strip()
            if len(run) > _LONGEST_QUOTE:
                break
            if all(pattern.search(run) for pattern in wanted):
                best = run if best is None or len(run) < len(best) else best
                break
    return best
