"""Batches of both forms, pinned to values worked out by hand on rows of a few ids."""

import random
from typing import Any

import pytest
import torch

from tweetdora.packing import PackedCollator, PaddedCollator, shared_prefix_length, token_count


def row(prompt: list[int], answer: list[int], example_id: int = 0) -> dict[str, Any]:
    """A row as tokenize_examples makes it: loss on the answer only."""
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer, "example_id": example_id}


def as_lists(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its tensors as lists."""
    return {
        name: as_lists(value) if isinstance(value, dict) else value.tolist() if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def unpack(batch: dict[str, Any]) -> list[list[int]]:
    """The rows' own tokens from a packed batch, read through `to_packed`, which `to_padded` does not touch."""
    packing = batch["packing"]
    own = batch["input_ids"][0, packing["prefix_length"] :].tolist()
    longest = packing["to_padded"].numel() // packing["row_count"]
    rows: list[list[int]] = [[] for _ in range(packing["row_count"])]
    for token, place in zip(own, packing["to_packed"].tolist(), strict=True):
        rows[place // longest].append(token)
    return rows


# Packed


def test_packed_batch_is_the_one_of_the_docstring():
    batch = PackedCollator()([row([5, 6, 1], [8, 2], 4), row([5, 6, 7, 3], [9, 2], 7)])
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 1, 8, 7, 3, 9]],
        "position_ids": [[0, 1, 2, 3, 2, 3, 4]],
        "attention_mask": [[[[1.0]]]],
        "logits_to_keep": [2, 3, 5, 6],
        "labels": [8, 2, 9, 2],
        "example_ids": [4, 7],
        "packing": {
            "prefix_length": 2,
            "row_count": 2,
            "to_padded": [0, 1, 0, 2, 3, 4],
            "is_padding": [False, False, True, False, False, False],
            "to_packed": [0, 1, 3, 4, 5],
            "kept": [2, 3, 5, 6],
        },
    }


def test_packed_rows_that_share_nothing_have_no_prefix():
    batch = PackedCollator()([row([5, 6], [8, 2]), row([7, 6], [9, 2])])
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 8, 7, 6, 9]],
        "position_ids": [[0, 1, 2, 0, 1, 2]],
        "attention_mask": [[[[1.0]]]],
        "logits_to_keep": [1, 2, 4, 5],
        "labels": [8, 2, 9, 2],
        "example_ids": [0, 0],
        "packing": {
            "prefix_length": 0,
            "row_count": 2,
            "to_padded": [0, 1, 2, 3, 4, 5],
            "is_padding": [False] * 6,
            "to_packed": [0, 1, 2, 3, 4, 5],
            "kept": [1, 2, 4, 5],
        },
    }


def test_packed_single_row_keeps_the_token_before_its_answer_out_of_the_prefix():
    batch = PackedCollator()([row([5, 6, 7], [8, 2], 3)])
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8]],
        "position_ids": [[0, 1, 2, 3]],
        "attention_mask": [[[[1.0]]]],
        "logits_to_keep": [2, 3],
        "labels": [8, 2],
        "example_ids": [3],
        "packing": {
            "prefix_length": 2,
            "row_count": 1,
            "to_padded": [0, 1],
            "is_padding": [False] * 2,
            "to_packed": [0, 1],
            "kept": [2, 3],
        },
    }


def test_packed_identical_rows_each_keep_the_token_before_their_answer():
    batch = PackedCollator()([row([5, 6, 7], [8, 2])] * 2)
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 7, 8]],
        "position_ids": [[0, 1, 2, 3, 2, 3]],
        "attention_mask": [[[[1.0]]]],
        "logits_to_keep": [2, 3, 4, 5],
        "labels": [8, 2, 8, 2],
        "example_ids": [0, 0],
        "packing": {
            "prefix_length": 2,
            "row_count": 2,
            "to_padded": [0, 1, 2, 3],
            "is_padding": [False] * 4,
            "to_packed": [0, 1, 2, 3],
            "kept": [2, 3, 4, 5],
        },
    }


def test_packed_answers_of_different_lengths_each_keep_their_own_loss():
    batch = PackedCollator()([row([5, 6], [8, 2]), row([5, 7], [9, 4, 3, 2])])
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 8, 7, 9, 4, 3]],
        "position_ids": [[0, 1, 2, 1, 2, 3, 4]],
        "attention_mask": [[[[1.0]]]],
        "logits_to_keep": [1, 2, 3, 4, 5, 6],
        "labels": [8, 2, 9, 4, 3, 2],
        "example_ids": [0, 0],
        "packing": {
            "prefix_length": 1,
            "row_count": 2,
            "to_padded": [0, 1, 0, 0, 2, 3, 4, 5],
            "is_padding": [False] * 2 + [True] * 2 + [False] * 4,
            "to_packed": [0, 1, 4, 5, 6, 7],
            "kept": [1, 2, 3, 4, 5, 6],
        },
    }


def test_packed_labels_are_the_tokens_behind_the_kept_columns():
    """Second way: what a kept column predicts stands behind it, or is the row's last token, which is left out."""
    batch = PackedCollator()([row([5, 6, 1], [8, 2]), row([5, 6, 7, 3], [9, 4, 2]), row([5, 6], [8, 2])])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"].tolist()
    for column, label in zip(batch["logits_to_keep"].tolist(), labels, strict=True):
        assert label == 2 or label == ids[column + 1]
    assert len(labels) == 7


def test_packed_rows_leave_out_the_stop_token_from_which_nothing_is_predicted():
    batch = PackedCollator()([row([5, 6, 1], [8, 2]), row([5, 6, 7, 3], [9, 4, 2])])
    assert 2 not in batch["input_ids"] and batch["labels"].tolist().count(2) == 2


@pytest.mark.parametrize("seed", range(5))
def test_packed_rows_can_be_read_back_whole(seed):
    """Second way: prefix and own tokens, put together again, are the rows that went in but for their last token."""
    draw = random.Random(seed)
    rows = [
        row([1, 2, 3, *draw.choices(range(4, 9), k=draw.randint(0, 6))], draw.choices(range(9, 12), k=2))
        for _ in range(6)
    ]
    batch = PackedCollator()(rows)
    prefix = batch["input_ids"][0, : batch["packing"]["prefix_length"]].tolist()
    assert [prefix + own for own in unpack(batch)] == [example["input_ids"][:-1] for example in rows]


@pytest.mark.parametrize("seed", range(5))
def test_packed_indices_there_and_back_are_the_identity(seed):
    draw = random.Random(seed)
    rows = [row([1, 2, *draw.choices(range(4, 9), k=draw.randint(0, 6))], [9, 2]) for _ in range(6)]
    packing = PackedCollator()(rows)["packing"]
    there_and_back = packing["to_padded"][packing["to_packed"]]
    assert there_and_back.tolist() == list(range(len(packing["to_packed"])))


# The prefix


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[5, 6, 7], [5, 6, 8]], 2),  # up to the first token that differs
        ([[5, 6, 7], [5, 6, 7, 8]], 2),  # 7 is what the first row's answer is predicted from
        ([[5, 6], [5, 6, 7, 8]], 1),  # a short row limits all
        ([[5, 6, 7, 8], [5, 6]], 1),  # whichever comes first
        ([[5, 6, 7], [4, 6, 7]], 0),
        ([[5], [5]], 0),  # nothing is left over to share
        ([[5, 6, 7]], 2),
    ],
)
def test_prefix_ends_before_the_first_difference_and_before_the_last_prompt_token(prompts, expected):
    assert shared_prefix_length([row(prompt, [9, 2]) for prompt in prompts]) == expected


def test_prefix_looks_at_every_row():
    rows = [row([5, 6, 7, 1], [9, 2]), row([5, 6, 7, 2], [9, 2]), row([5, 4, 7, 3], [9, 2])]
    assert shared_prefix_length(rows) == 1


def test_prefix_does_not_reach_into_equal_answers():
    """Rows that are equal to the last token share no more than rows that differ in the answer."""
    assert shared_prefix_length([row([5, 6, 7], [8, 2])] * 3) == shared_prefix_length(
        [row([5, 6, 7], [8, 2]), row([5, 6, 7], [9, 2])]
    )


# Padded


def test_padded_batch_is_the_one_of_the_docstring():
    batch = PaddedCollator(pad_token_id=0)([row([5, 6], [8, 2], 4), row([5, 6, 7], [9, 2], 7)])
    assert as_lists(batch) == {
        "input_ids": [[0, 5, 6, 8, 2], [5, 6, 7, 9, 2]],
        "attention_mask": [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        "position_ids": [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]],
        "logits_to_keep": [2, 3],
        "labels": [[8, 2], [9, 2]],
        "example_ids": [4, 7],
    }


def test_padded_single_row_has_no_padding():
    batch = PaddedCollator(pad_token_id=0)([row([5, 6, 7], [8, 2], 3)])
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8, 2]],
        "attention_mask": [[1, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4]],
        "logits_to_keep": [2, 3],
        "labels": [[8, 2]],
        "example_ids": [3],
    }


def test_padded_shorter_answer_has_no_loss_in_the_columns_of_the_longer():
    batch = PaddedCollator(pad_token_id=0)([row([5, 6], [8, 2]), row([5, 7], [9, 4, 2])])
    assert as_lists(batch) == {
        "input_ids": [[0, 5, 6, 8, 2], [5, 7, 9, 4, 2]],
        "attention_mask": [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]],
        "position_ids": [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]],
        "logits_to_keep": [1, 2, 3],
        "labels": [[-100, 8, 2], [9, 4, 2]],
        "example_ids": [0, 0],
    }


def test_padded_stop_token_keeps_its_loss_where_it_is_the_pad_token_too():
    """The base model's tokenizer has one id for both; a collator that hides the pad id would hide the stop token."""
    batch = PaddedCollator(pad_token_id=2)([row([5], [8, 2]), row([5, 6], [9, 2])])
    assert batch["labels"].tolist() == [[8, 2], [9, 2]]


def test_padded_stop_token_stays_visible_where_it_is_the_pad_token_too():
    batch = PaddedCollator(pad_token_id=2)([row([5, 2], [8, 2]), row([5, 6, 7], [9, 2])])
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


# Both


def test_collators_agree_on_the_supervised_tokens():
    rows = [row([5, 6, 1], [8, 2]), row([5, 6, 7, 3], [9, 4, 2]), row([5, 6], [8, 2])]
    padded = PaddedCollator(pad_token_id=0)(rows)["labels"].flatten()
    assert padded[padded != -100].tolist() == PackedCollator()(rows)["labels"].tolist()


def test_collators_leave_the_rows_as_they_were():
    rows = [row([5, 6], [8, 2], 4), row([5, 6, 7], [9, 2], 7)]
    PackedCollator()(rows)
    PaddedCollator(pad_token_id=0)(rows)
    assert rows == [row([5, 6], [8, 2], 4), row([5, 6, 7], [9, 2], 7)]


def test_token_count_of_a_packed_batch_has_the_prefix_once():
    assert token_count(PackedCollator()([row([5, 6, 1], [8, 2]), row([5, 6, 7, 3], [9, 2])])) == 2 + 2 + 3


def test_token_count_of_a_padded_batch_leaves_the_padding_out():
    assert token_count(PaddedCollator(pad_token_id=0)([row([5, 6], [8, 2]), row([5, 6, 7], [9, 2])])) == 4 + 5
