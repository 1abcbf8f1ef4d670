"""Prior correction: what a model's probabilities become where labels are as frequent as the texts themselves suggest.

A model that was trained where 15 % of the texts are negative expects that share everywhere. Where it is another one,
the label's probabilities are multiplied by new share / share in training (Saerens, Latinne and Decaestecker, Adjusting
the Outputs of a Classifier to New a Priori Probabilities, 2002, equation 2.4). The new shares are not known; the same
paper's EM finds them from the probabilities of all texts, without a label (equation 2.9). It holds where only the
shares differ, not what a label's texts are like, and as far as the probabilities are calibrated.
"""

from collections.abc import Sequence

import numpy as np

from tweetdora.records import DataRecord

_STEPS = 10_000
_CLOSE = 1e-9


def label_shares(data: DataRecord, label_words: Sequence[str], balanced: bool) -> list[float] | None:
    """The share of each label among the training examples, as they were drawn; None where one is missing.

    >>> label_shares(record_of_3_bad_and_9_good, ["bad", "good"], balanced=False)    # doctest: +SKIP
    [0.25, 0.75]
    """
    counts = [data.label_counts.get(word, 0) for word in label_words]
    if not all(counts):
        return None
    return [1 / len(counts)] * len(counts) if balanced else [count / sum(counts) for count in counts]


def estimate_shares(probabilities: np.ndarray, train_shares: Sequence[float]) -> np.ndarray:
    """The labels' shares (C,) among texts with these probabilities (N, C), by EM from the shares in training."""
    shares = before = np.asarray(train_shares, dtype=np.float64)
    for _ in range(_STEPS):
        new = correct(probabilities, before, shares).mean(0)
        if np.abs(new - shares).max() < _CLOSE:
            return new
        shares = new
    return shares


def correct(probabilities: np.ndarray, train_shares: Sequence[float] | np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The probabilities (N, C) for other shares of the labels than those in training."""
    weighted = probabilities * (shares / np.asarray(train_shares))
    return weighted / weighted.sum(-1, keepdims=True)
