"""Tokenised examples in Arrow arrays and in the cache: the same rows, tokenised once."""

import dataclasses
import gc
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from tweetdora import tokenized
from tweetdora.config import TaskConfig
from tweetdora.data import Examples, load_examples, make_examples
from tweetdora.prompts import IGNORE_INDEX, PromptTokenizer
from tweetdora.tokenized import Features, TokenizedExamples, tokenize_examples

TEXTS = [f"What a {word} day {number}" for number in range(5) for word in ("bad", "plain <|im_end|>", "good")]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, used from the fourth example on, with blocks of 4 examples."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(tokenized, "CACHE_FROM", 4)
    monkeypatch.setattr(tokenized, "BLOCK", 4)
    return tmp_path / "tokenized"


def rows(count: int = 15) -> Examples:
    examples = make_examples(TEXTS, [number % 3 for number in range(15)])
    return examples.select(range(1, count))  # example ids from 1


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def expected(examples: Examples, prompt_tokenizer: PromptTokenizer) -> list[dict[str, Any]]:
    """The second way: one text at a time."""
    found = []
    for number, text, label in zip(examples.example_ids, examples.texts, examples.labels, strict=True):
        prompt, completion = prompt_tokenizer.prompt_ids([text])[0][0], prompt_tokenizer.completion_ids[label]
        labels = [IGNORE_INDEX] * len(prompt) + completion
        found.append({"input_ids": prompt + completion, "labels": labels, "example_id": number})
    return found


@pytest.mark.parametrize("count", [3, 5, 9, 15])
def test_the_rows_are_the_same_in_memory_in_the_cache_and_read_again(count, cache, prompt_tokenizer):
    """With 2 examples, they stay in memory; with 4 and 8, the last block is full; with 14 it is not."""
    examples = rows(count)
    first, again = tokenize_examples(examples, prompt_tokenizer), tokenize_examples(examples, prompt_tokenizer)
    wanted = expected(examples, prompt_tokenizer)
    assert (first.from_cache, again.from_cache) == (False, count > 4) and cache.exists() == (count > 4)
    for found in (first, again):
        assert list(found.features) == wanted and found.features[-1] == wanted[-1] and found.features[1:] == wanted[1:]
        assert found.tokens == sum(len(row["input_ids"]) for row in wanted)
        assert found.supervised_tokens == sum(label != IGNORE_INDEX for row in wanted for label in row["labels"])
        assert found.largest_id == max(max(row["input_ids"]) for row in wanted)
        with pytest.raises(IndexError):
            found.features[len(wanted)]


def of_lengths(lengths: list[int], supervised: list[int]) -> TokenizedExamples:
    count = len(lengths)
    batch = tokenized.record_batch([[5] * length for length in lengths], supervised, [*range(count)], [False] * count)
    return TokenizedExamples(Features([batch]), truncated=0, largest_id=5)


def test_tokens_are_counted_over_all_rows():
    encoded = of_lengths([4, 4], [2, 3])
    assert (encoded.tokens, encoded.supervised_tokens) == (8, 5)


def test_lengths_of_rows_are_those_of_the_sorted_rows():
    """21 rows of 1 to 21 tokens: the place of 95 % is the 20th."""
    encoded = of_lengths([*range(21, 11, -1), *range(1, 12)], [1] * 21)
    assert encoded.sequence_lengths == {"shortest": 1, "median": 11, "95_percent": 20, "longest": 21}


def test_what_is_in_the_cache_is_not_tokenised_again(cache, prompt_tokenizer, monkeypatch):
    tokenize_examples(rows(), prompt_tokenizer)
    monkeypatch.setattr(tokenized, "_batches", lambda *_: pytest.fail("tokenised again"))
    assert tokenize_examples(rows(), prompt_tokenizer).from_cache


def test_truncated_texts_are_counted_in_the_cache_too(cache, prompt_tokenizer):
    longer = make_examples([*TEXTS, "so " * 600 + "good"], [number % 3 for number in range(16)])
    assert [tokenize_examples(longer, prompt_tokenizer).truncated for _ in range(2)] == [1, 1]


def test_whatever_changes_the_tokens_makes_another_file(cache, prompt_tokenizer, make_tokenizer):
    """A change that were not part of the name would train on the old tokens without a word."""
    examples, form = rows(), prompt_tokenizer.format
    tokenizer = prompt_tokenizer.tokenizer
    grown = make_tokenizer()
    grown.add_tokens(["day"])
    lower = make_tokenizer()
    lower.backend_tokenizer.normalizer = tokenized.tokenizers.normalizers.Lowercase()
    others = [
        (dataclasses.replace(examples, texts=[*examples.texts[:-1], "What a great day"]), prompt_tokenizer),
        (dataclasses.replace(examples, labels=[*examples.labels[:-1], 0]), prompt_tokenizer),
        (dataclasses.replace(examples, example_ids=[*examples.example_ids[:-1], 99]), prompt_tokenizer),
        (examples, PromptTokenizer(tokenizer, dataclasses.replace(form, head=form.head.replace("day", "trip")), 512)),
        (examples, PromptTokenizer(tokenizer, dataclasses.replace(form, completions=form.completions[::-1]), 512)),
        (examples, PromptTokenizer(tokenizer, form, 60)),
        (examples, PromptTokenizer(grown, form, 512)),
        (examples, PromptTokenizer(lower, form, 512)),
    ]
    kept = make_tokenizer()
    kept.split_special_tokens = True  # no part of the text that tokenizers writes
    others.append((examples, PromptTokenizer(kept, form, 512)))
    tokenize_examples(examples, prompt_tokenizer)
    for count, (other, encoder) in enumerate(others, 2):
        found = tokenize_examples(other, encoder)
        assert not found.from_cache and len(files(cache)) == count
        assert list(found.features) == expected(other, encoder)


@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "another"])
def test_a_damaged_file_is_made_again(damage, cache, prompt_tokenizer):
    tokenize_examples(rows(), prompt_tokenizer)
    path = cache / files(cache)[0]
    whole = path.read_bytes()
    tokenize_examples(rows(9), prompt_tokenizer)
    (another,) = set(files(cache)) - {path.name}
    damaged = {"empty": b"", "cut": whole[: len(whole) // 2], "noise": b"x" * len(whole)}
    path.write_bytes({**damaged, "another": (cache / another).read_bytes()}[damage])
    found = tokenize_examples(rows(), prompt_tokenizer)
    assert not found.from_cache and list(found.features) == expected(rows(), prompt_tokenizer)
    assert tokenize_examples(rows(), prompt_tokenizer).from_cache


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["full disk", "a file for a folder", "not mapped"])
def test_without_a_cache_the_examples_stay_in_memory(fault, cache, prompt_tokenizer, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        if fault == "full disk":
            patch.setattr(tokenized.os, "replace", full_disk)
        elif fault == "a file for a folder":
            cache.write_text("")
        else:
            patch.setattr(tokenized.pyarrow, "memory_map", full_disk)
        with caplog.at_level("INFO", logger="tweetdora"):
            found = tokenize_examples(rows(), prompt_tokenizer)
    assert list(found.features) == expected(rows(), prompt_tokenizer) and not found.from_cache
    assert found.largest_id == max(max(row["input_ids"]) for row in found.features)
    (note,) = [line.getMessage() for line in caplog.records if line.name == "tweetdora.tokenized"]
    assert note.startswith("note: 14 tokenised examples stay in memory") and "Set HF_DATASETS_CACHE" in note
    assert fault == "a file for a folder" or [name for name in files(cache) if name.endswith(".part")] == []


def test_a_bad_example_leaves_no_file(cache, prompt_tokenizer, monkeypatch):
    monkeypatch.setattr(prompt_tokenizer, "stop_token_id", 5)
    with pytest.raises(tokenized.InputError, match="expected the stop token"):
        tokenize_examples(rows(), prompt_tokenizer)
    assert files(cache) == []


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_texts_of_a_large_file_take_no_python_objects(name, tmp_path, cache):
    """Only the label is an object of Python, and the same one for all rows that have it."""
    count = 20_000
    frame = {"text": [f"What a good day {number}" for number in range(count)], "label": ["good", "bad"] * (count // 2)}
    table = datasets.Dataset.from_dict(frame).to_pandas()
    writers = {
        "rows.csv": lambda path: table.to_csv(path, index=False),
        "rows.jsonl": lambda path: table.to_json(path, orient="records", lines=True),
        "rows.parquet": table.to_parquet,
    }
    writers[name](tmp_path / name)
    task = TaskConfig(dataset_name=str(tmp_path / name), label_words=["bad", "good"], max_train_samples=0)
    load_examples(task, "train", None).head(10)
    gc.collect()
    tracemalloc.start()
    arrow = pyarrow.total_allocated_bytes()
    examples = load_examples(task, "train", None)
    gc.collect()
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(examples) == count and examples.texts[-1] == "What a good day 19999"
    assert python / count < 12, "8 bytes for the label"
    assert (pyarrow.total_allocated_bytes() - arrow) / count < 40, "the text and its offset"


def test_two_processes_with_one_cache_do_not_disturb_each_other(cache, prompt_tokenizer, monkeypatch):
    """As of two machines whose processes have one number: the second writes all of it while the first one writes."""
    batches, written, parts = tokenized._batches, [], []

    def first(*arguments: Any) -> Any:
        for number, batch in enumerate(batches(*arguments)):
            if number == 1 and not parts:
                parts.append(files(cache))
                written.append(tokenize_examples(rows(), prompt_tokenizer))
            elif number == 1:
                parts.append(files(cache))
            yield batch

    monkeypatch.setattr(tokenized, "_batches", first)
    written.append(tokenize_examples(rows(), prompt_tokenizer))
    again = tokenize_examples(rows(), prompt_tokenizer)
    assert [len(names) for names in parts] == [1, 2], "each has a file of its own while it writes"
    assert again.from_cache and len(written) == 2 and len(files(cache)) == 1
    for found in (*written, again):
        assert list(found.features) == expected(rows(), prompt_tokenizer)


def test_what_killed_processes_left_is_removed_after_a_day(cache, prompt_tokenizer):
    cache.mkdir()
    for name, age in (("old.part", 25), ("new.part", 1), ("old.arrow", 99)):
        (cache / name).write_bytes(b"rest")
        os.utime(cache / name, (0, time.time() - age * 3600))
    tokenize_examples(rows(), prompt_tokenizer)
    assert {"new.part", "old.arrow"} < set(files(cache)) and "old.part" not in files(cache)


def test_a_file_does_not_depend_on_the_size_of_blocks(cache, prompt_tokenizer, monkeypatch):
    tokenize_examples(rows(), prompt_tokenizer)
    for block in (3, 8):
        monkeypatch.setattr(tokenized, "BLOCK", block)
        found = tokenize_examples(rows(), prompt_tokenizer)
        assert found.from_cache and list(found.features) == expected(rows(), prompt_tokenizer)


def test_a_tokenizer_that_cannot_be_written_as_text_is_not_cached(cache, make_tokenizer, prompt_tokenizer):
    tokenizer = make_tokenizer()

    class Own:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda _, part: [part])

    tokenizer.backend_tokenizer.pre_tokenizer = tokenized.tokenizers.pre_tokenizers.PreTokenizer.custom(Own())
    encoder = PromptTokenizer(tokenizer, prompt_tokenizer.format, 512)
    assert list(tokenize_examples(rows(), encoder).features) == expected(rows(), encoder)
    assert not cache.exists()
