"""Build a data set of Hutto and Gilbert's rated tweets, from the sdist `vaderSentiment`."""

import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

from quickstart.fetch import Archive, QuickstartError, fill_card, hash_of

LABELS = ("negative", "neutral", "positive")
LABEL_COUNTS = {"negative": 1087, "neutral": 768, "positive": 2345}


class Tweet(NamedTuple):
    """A rated tweet; the rating is the mean over at least 20 people, from -4 to 4."""

    number: int
    rating: float
    text: str


TWEETS_SDIST = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
# 200 of the tweets are contrived: a real one with other case, more "!", or one of these words added or removed.
DEGREE_WORDS = frozenset("absolutely especially extremely fucking major really seriously super uber very".split())

GROUND_TRUTH_SHA256 = "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"


def card(table: str) -> str:
    """Return the data set's card; `table` has a line for each split."""
    text = fill_card("dataset_card.md", TWEETS_SDIST, ground_truth_sha256=GROUND_TRUTH_SHA256, table="TABLE")
    return text.replace("TABLE\n", table)


def read_hutto(sdist: Path) -> list[Tweet]:
    """Read the rated tweets in file order; a line is number, rating and text, tab-separated, in UTF-8 with CRLF."""
    with tarfile.open(sdist) as outer:
        inner_file = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner_file) as inner:
            member: Any = inner.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt")
            text = member.read().decode("utf-8")
    rows = [line.split("\t") for line in text.removesuffix("\r\n").split("\r\n")]
    return [Tweet(int(number), float(rating), text) for number, rating, text in rows]


def label_of(rating: float) -> str:
    """Return the label of a mean rating: negative up to -0.5, positive from 0.5 (70 tweets are on a boundary)."""
    if rating <= -0.5:
        return "negative"
    return "positive" if rating >= 0.5 else "neutral"


def count_labels(rows: Sequence[Tweet]) -> dict[str, int]:
    """Count the rows of each label, in the order of the label ids."""
    counts = Counter(label_of(row.rating) for row in rows)
    return {label: counts[label] for label in LABELS}


def family_key(text: str) -> str:
    """Return a key that copies of a tweet share: its words, sorted, without mentions, links and degree words.

    "@anonymous Wow, it's AMAZING!! Great work!!" and "Wow, it's really amazing. Really great work." both give
    "amazing great it s work wow". A tweet without words is its own key: ":)" gives ":)".
    """
    plain = re.sub(r"https?://\S+|@\w+", " ", unescape(text).lower())
    return " ".join(sorted(set(re.findall(r"[^\W_]+", plain)) - DEGREE_WORDS)) or plain.strip()


def split_rows(rows: Sequence[Tweet], test_rows: int = 800, validation_rows: int = 400) -> dict[str, list[Tweet]]:
    """Assign whole families, in the order of their hash, to test, validation and train; then shuffle each by hash.

    The last family of a split may exceed its size by a few rows.
    """
    families: dict[str, list[Tweet]] = {}
    for row in rows:
        families.setdefault(family_key(row.text), []).append(row)
    train: list[Tweet] = []
    validation: list[Tweet] = []
    test: list[Tweet] = []
    for key in sorted(families, key=hash_of):
        split = test if len(test) < test_rows else validation if len(validation) < validation_rows else train
        split.extend(families[key])
    for split in (train, validation, test):
        split.sort(key=lambda row: hash_of(f"{row.number} {row.text}"))
    return {"train": train, "validation": validation, "test": test}


def build_dataset(sdist: Path, folder: Path) -> None:
    """Write the tweets in `sdist` as a folder for `load_dataset`, print a summary, and check it by loading it."""
    rows = read_hutto(sdist)
    label_counts = count_labels(rows)
    if label_counts != LABEL_COUNTS:
        raise QuickstartError(f"{sdist} gives {label_counts}, expected {LABEL_COUNTS}. Delete it and try again.")
    from datasets import ClassLabel, Dataset, Features, Value, load_dataset

    splits = split_rows(rows)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    written, table = {}, ""
    for name, split in splits.items():
        columns = {"text": [row.text for row in split], "label": [label_of(row.rating) for row in split]}
        written[name] = Dataset.from_dict(columns, features=features)
        written[name].to_parquet(folder / f"{name}.parquet")
        table += f"| {name} | {len(split)} | {' | '.join(map(str, count_labels(split).values()))} |\n"
    (folder / "README.md").write_text(card(table), encoding="utf-8")
    sizes = Counter(family_key(row.text) for row in rows).values()
    copies = [size for size in sizes if size > 1]
    print(
        f"    {len(rows)} rows in {len(sizes)} families; {sum(copies)} rows in {len(copies)} families of more than one"
    )
    print("    | split | rows | negative | neutral | positive |\n" + indent(table, "    "), end="", flush=True)
    with tempfile.TemporaryDirectory() as cache_dir:
        loaded = load_dataset(str(folder), cache_dir=cache_dir)
        assert loaded.keys() == written.keys(), loaded
        for name, split in written.items():
            assert loaded[name].features == features and loaded[name].to_dict() == split.to_dict(), name
