"""Batches for several processes: the last step of an epoch has the examples that one process would take, no others.

Where the examples do not fill a last batch for every process, Accelerate completes it with examples from the beginning
of the epoch. These would be trained on twice, and the step would differ from that of one process. Here the gap is
filled with copies of an example that carry no loss.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, Dataset

from tweetdora.packing import FILLER_ID


class WithFiller(Dataset[dict[str, Any]]):
    """Tokenized examples, and one more at index len(self): a copy of the first that carries no loss."""

    def __init__(self, features: Sequence[dict[str, Any]]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.features[0], "example_id": FILLER_ID} if index == len(self) else self.features[index]


class EvenBatches(BatchSampler):
    """Complete the batches of `inner` with the index `filler`, to full batches and a multiple of `processes` of them.

    >>> list(EvenBatches(BatchSampler(range(5), 2, drop_last=False), processes=4, filler=5))
    [[0, 1], [2, 3], [4, 5], [5, 5]]
    """

    def __init__(self, inner: BatchSampler, processes: int, filler: int) -> None:
        super().__init__(inner.sampler, inner.batch_size, drop_last=False)
        self._processes, self._filler = processes, filler

    def __len__(self) -> int:
        return -(-super().__len__() // self._processes) * self._processes

    def __iter__(self) -> Iterator[list[int]]:
        count = 0
        for batch in super().__iter__():
            count += 1
            yield batch + [self._filler] * (self.batch_size - len(batch))
        for _ in range(len(self) - count):
            yield [self._filler] * self.batch_size
