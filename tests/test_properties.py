"""What must hold for any input: the parser of answers, the packer, recipes, records, and data files of any bytes."""

import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tweetdora.cli import parse_train, read_task
from tweetdora.config import TaskConfig
from tweetdora.data import load_examples
from tweetdora.errors import InputError
from tweetdora.files import read_json, write_json
from tweetdora.generation import UNPARSED, LabelParser
from tweetdora.packing import PackedCollator, pack

WORDS = ["negative", "neutral", "positive"]
# One folder serves all examples of a test: each writes its file anew.
settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("here")
plain_words = st.text(string.ascii_lowercase, min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


# Answers


@given(st.text())
@example("İnegative")
@example("neutralitive")
def test_any_answer_is_a_class_or_unparsed(text):
    assert LabelParser(WORDS)(text) in (UNPARSED, 0, 1, 2)


@given(st.text(string.whitespace + string.punctuation.replace("_", "")), st.sampled_from(WORDS), st.text())
def test_the_first_label_word_counts_whatever_follows_it_apart(before, word, after):
    for shown in (word, word.upper(), word.capitalize()):
        assert LabelParser(WORDS)(f"{before}{shown} {after}") == WORDS.index(word)


@given(st.text(), st.sampled_from(WORDS), plain_words)
def test_a_label_word_inside_another_word_is_none(before, word, more):
    assert LabelParser([word])(f"{more}{word}{more}") == UNPARSED


@given(st.lists(plain_words, min_size=2, max_size=5, unique=True), st.data())
def test_each_label_word_is_parsed_as_itself(words, data):
    word = data.draw(st.sampled_from(words))
    assert LabelParser(words)(f" {word}.") == words.index(word)


# Packing


rows_behind_a_prefix = st.tuples(
    st.lists(st.integers(1, 9), max_size=4),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=5),
)


@given(rows_behind_a_prefix)
def test_a_packed_batch_holds_each_row_once_and_the_prefix_once(case):
    prefix, tails = case
    batch, starts = pack([[*prefix, *tail] for tail in tails], len(prefix))
    ids, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    assert len(ids) == len(positions) == len(prefix) + sum(map(len, tails))
    for start, tail in zip(starts, tails, strict=True):
        assert ids[start : start + len(tail)] == tail
        assert positions[start : start + len(tail)] == list(range(len(prefix), len(prefix) + len(tail)))


@given(rows_behind_a_prefix)
def test_padded_places_lead_to_the_rows_tokens_and_back(case):
    prefix, tails = case
    batch, _ = pack([[*prefix, *tail] for tail in tails], len(prefix))
    packing, longest = batch["packing"], max(map(len, tails))
    own = batch["input_ids"][0, len(prefix) :]
    padded = own[packing["to_padded"]].view(len(tails), longest)
    hidden = packing["is_padding"].view(len(tails), longest)
    for row, mask, tail in zip(padded.tolist(), hidden.tolist(), tails, strict=True):
        assert [token for token, padding in zip(row, mask, strict=True) if not padding] == tail
    assert padded.flatten()[packing["to_packed"]].tolist() == own.tolist()


@given(rows_behind_a_prefix.filter(lambda case: case[0]), st.data())
def test_the_supervised_tokens_of_a_packed_batch_are_those_of_the_rows(case, data):
    """And each is predicted from the token before it, which no other row's is."""
    prefix, tails = case
    examples, expected = [], []
    for number, tail in enumerate(tails):
        ids, count = [*prefix, *tail], data.draw(st.integers(1, len(tail)))
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - count) + ids[-count:], "example_id": number})
        expected += [(ids[place - 1], ids[place]) for place in range(len(ids) - count, len(ids))]
    batch = PackedCollator()(examples)
    kept = batch["input_ids"][0, batch["logits_to_keep"]].tolist()
    assert list(zip(kept, batch["labels"].tolist(), strict=True)) == expected
    assert batch["example_ids"].tolist() == list(range(len(tails)))


# Recipes


@given(
    recipe=st.dictionaries(
        st.text(max_size=12) | st.sampled_from(["r", "label_words", "seed"]), json_values, max_size=4
    )
)
def test_any_recipe_is_read_or_refused_by_its_name(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    try:
        task, _, training = parse_train(["--config", str(path), "--output_dir", str(tmp_path / "run")], "")
    except InputError as error:
        assert str(error)
    else:
        assert isinstance(task, TaskConfig) and training.output_dir == str(tmp_path / "run")


@given(content=st.binary(max_size=60))
@example(content=b"!!python/object/apply:os.system ['true']")
@example(content=b"label_words: !!python/tuple [a, b]")
@example(content=b"a: &a [*a]")
@example(content=b"\x00")
def test_any_bytes_for_a_recipe_are_read_or_refused(content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    try:
        read_task(str(path))
    except InputError as error:
        assert str(path) in str(error) or str(error).startswith("--")


# Records


@given(value=json_values)
def test_a_record_is_read_as_it_was_written(value, tmp_path):
    path = str(tmp_path / "record.json")
    write_json(path, value)
    assert read_json(path) == value
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


@given(content=st.binary(max_size=40))
def test_any_bytes_for_a_record_are_read_or_refused(content, tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    try:
        expected = json.loads(content.decode())
    except ValueError:
        with pytest.raises(InputError, match="is not readable JSON"):
            read_json(str(path))
    else:
        assert read_json(str(path)) == expected or expected != expected


# Data files


def loaded(path: Path) -> list[tuple[str, int]] | str:
    """Texts and classes of a file, or what was said of it."""
    task = TaskConfig(dataset_name=str(path), dataset_config=None, max_train_samples=None)
    try:
        rows = load_examples(task, "train", None)
    except InputError as error:
        return str(error)
    return list(zip(rows.texts, rows.labels, strict=True))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@settings(max_examples=25)
@given(content=st.binary(max_size=80))
@example(content=b"text,label\n\x00,0\n")
@example(content=b'{"text": "\\u0000", "label": 0}\n')
@example(content=b'text,label\n"never closed,0\n')
@example(content=b"\xff\xfe")
def test_any_bytes_for_a_data_file_are_read_or_refused_by_its_name(kind, content, tmp_path):
    path = tmp_path / f"{abs(hash(content))}.{kind}"
    path.write_bytes(content)
    found = loaded(path)
    if isinstance(found, str):
        assert str(path) in found
    else:
        assert all(isinstance(text, str) and label in (0, 1, 2) for text, label in found)


any_text = st.text(st.characters(codec="utf-8"), max_size=20).filter(str.strip)  # a row needs a text
texts = st.lists(st.tuples(any_text, st.integers(0, 2)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(rows=texts)
@example(rows=[("\x00\x01\x1b[31m", 0), ("\u202eright to left\u2066", 1), ("a\u2028b\x85c", 2)])
def test_texts_of_any_characters_come_through_a_json_lines_file(rows, tmp_path):
    path = tmp_path / f"{abs(hash(tuple(rows)))}.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    assert loaded(path) == [(text.strip(), label) for text, label in rows]
