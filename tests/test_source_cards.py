"""The cards of base model and data set: what is found in them, and what is not."""

from pathlib import Path

import pytest

from tweetdora.records import BaseModelCard, DatasetCard
from tweetdora.source_cards import find_citation, find_labels, find_paper, read_base_card, read_dataset_card

CARD = """---
license: [cc-by-4.0]
license_name: x
---
# Tweets

From [the paper](https://arxiv.org/abs/2010.12421), see also https://doi.org/10.1/x.

A score of 4 or more is
positive, of 2 or less negative, else neutral. Twenty people rated each.

| split | negative | neutral | positive |
|---|---|---|---|

```bibtex
@inproceedings{a2020,
  title = {{Tweet}Eval},
}
@misc{b}
```
"""


@pytest.fixture
def folder(tmp_path) -> str:
    (tmp_path / "README.md").write_text(CARD)
    return str(tmp_path)


def test_a_data_sets_card_tells_licence_paper_citation_and_what_its_labels_mean(folder):
    words = ["negative", "neutral", "positive"]
    assert read_dataset_card(folder, None, words, None) == DatasetCard(
        ["cc-by-4.0"],
        "https://arxiv.org/abs/2010.12421",
        "@inproceedings{a2020,\n  title = {{Tweet}Eval},\n}",
        "A score of 4 or more is positive, of 2 or less negative, else neutral.",
    )


def test_the_columns_own_values_are_looked_for_before_the_label_words(folder):
    assert read_dataset_card(folder, None, ["bad", "good"], ["Negative", "positive"]).labels is not None
    assert read_dataset_card(folder, None, ["negative", "neutral"], ["1", "5"]).labels is not None
    assert read_dataset_card(folder, None, ["bad", "good"], None).labels is None


def test_values_that_are_numbers_say_nothing_about_a_sentence(tmp_path):
    (tmp_path / "README.md").write_text("# Reviews\n\nVersion 1.5 has 2,000 rows.\n")
    assert read_dataset_card(str(tmp_path), None, ["bad", "good"], ["1", "5"]).labels is None


@pytest.mark.parametrize(
    ("written", "found"), [("[no, en]", ["no", "en"]), ("no", "no"), ("en", "en"), ("[]", None), ("", None)]
)
def test_norwegian_is_a_language(written, found, tmp_path):
    """YAML 1.1, which Python reads, takes an unquoted `no` for false."""
    (tmp_path / "README.md").write_text(f"---\nlanguage: {written}\n---\n# A model\n")
    assert read_base_card(str(tmp_path), None).language == found


def test_a_base_models_card_has_paper_and_citation_too(folder):
    card = read_base_card(folder, None)
    assert (card.license, card.license_name, card.paper) == (["cc-by-4.0"], "x", "https://arxiv.org/abs/2010.12421")
    assert card.citation is not None and card.citation.startswith("@inproceedings{a2020,")


@pytest.mark.parametrize("content", [None, "---\nlicense: [\n---\n", "no metadata", b"\xff\xfe"])
def test_a_card_that_is_missing_or_unreadable_is_empty(tmp_path, content):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "README.md").write_bytes(data)
    assert read_base_card(str(tmp_path), None) == BaseModelCard()
    assert read_dataset_card(str(tmp_path), None, ["a", "b"], None) == DatasetCard()


def test_a_data_file_and_a_name_that_the_hub_does_not_have_have_no_card(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    assert read_dataset_card(str(tmp_path / "rows.csv"), None, ["a", "b"], None) == DatasetCard()
    assert read_dataset_card("someone/rows", None, ["a", "b"], None) == DatasetCard()  # the tests are offline


def test_a_list_of_labels_is_taken_as_it_stands_and_a_long_way_between_them_is_not():
    mapping = "- `label`: one of\n\n    `0`: negative\n\n    `1`: neutral\n\n    `2`: positive\n\nOther: negative."
    assert find_labels(mapping, ["negative", "neutral", "positive"]) == "`0`: negative `1`: neutral `2`: positive"
    assert find_labels(f"bad. {'Filler. ' * 60} good.", ["bad", "good"]) is None
    assert find_labels("```\nbad good\n```", ["bad", "good"]) is None
    assert find_labels("badly good", ["bad", "good"]) is None


def test_what_is_no_paper_and_no_entry_is_none():
    assert find_paper("https://example.org/abs/1") is None
    assert find_citation("mail a@b.c {x}") is None
    assert find_citation("@misc{never closed") is None


def test_the_quickstarts_own_card_says_what_its_labels_mean():
    text = (Path(__file__).parents[1] / "quickstart/dataset_card.md").read_text(encoding="utf-8")
    found = find_labels(text, ["negative", "neutral", "positive"])
    assert found == "A mean of -0.5 or less is negative, of 0.5 or more positive, else neutral."
