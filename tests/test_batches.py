"""Batches of several processes: against those of one process, for every number of rows and processes."""

import itertools

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from tweetdora.batches import EvenBatches, WithFiller
from tweetdora.packing import FILLER_ID, PackedCollator, PaddedCollator


@pytest.mark.parametrize(
    ("rows", "size", "processes"), list(itertools.product([1, 2, 5, 8, 9, 16], [1, 2, 4], [2, 3, 4]))
)
def test_a_step_of_all_processes_has_the_rows_of_a_step_of_one(rows, size, processes):
    def sampler(batch_size: int) -> BatchSampler:
        return BatchSampler(SequentialSampler(range(rows)), batch_size, drop_last=False)

    even = EvenBatches(sampler(size), processes, filler=rows)
    shares = [list(BatchSamplerShard(even, processes, rank)) for rank in range(processes)]
    assert {len(share) for share in shares} == {len(even) // processes}, "all take part in every step"
    assert all(len(batch) == size for share in shares for batch in share)
    steps = [[row for batch in step for row in batch if row != rows] for step in zip(*shares, strict=True)]
    assert steps == list(sampler(size * processes))


def test_without_it_accelerate_takes_rows_twice():
    """The reason for it; if this fails, Accelerate has another way, and EvenBatches may go."""
    inner = BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)
    taken = [row for rank in (0, 1) for batch in BatchSamplerShard(inner, 2, rank) for row in batch]
    assert len(taken) == 8 and len(set(taken)) == 5


FEATURES = [
    {"input_ids": [5, 6, 1, 8, 2], "labels": [-100, -100, -100, 8, 2], "example_id": 4},
    {"input_ids": [5, 6, 7, 3, 9, 2], "labels": [-100, -100, -100, -100, 9, 2], "example_id": 7},
]


def test_the_filler_is_a_copy_of_the_first_example_and_not_one_of_them():
    data = WithFiller(FEATURES)
    assert (len(data), list(data), data[1], data[-1]) == (2, FEATURES, FEATURES[1], FEATURES[1])
    assert data[2] == {**FEATURES[0], "example_id": FILLER_ID}
    with pytest.raises(IndexError):
        data[3]


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator(pad_token_id=0)])
def test_a_filler_carries_no_loss(collator):
    data = WithFiller(FEATURES)
    batch = collator([data[1], data[2]])
    assert batch["labels"].reshape(-1).tolist() == [9, 2, -100, -100]
    assert batch["example_ids"].tolist() == [7, FILLER_ID]
    all_filler = collator([data[2], data[2]])
    assert set(all_filler["labels"].reshape(-1).tolist()) == {-100} and torch.all(
        all_filler["example_ids"] == FILLER_ID
    )
