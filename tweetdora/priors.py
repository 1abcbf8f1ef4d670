"""Prior correction: adjust a model's probabilities to label shares estimated from the texts themselves.

A model trained on data where 15 % of the texts are negative expects that share everywhere. If the share differs, each
label's probabilities are multiplied by new share / share in training (Saerens, Latinne and Decaestecker, Adjusting the
Outputs of a Classifier to New a Priori Probabilities, 2002, equation 2.4). The new shares are unknown; the same
paper's EM estimates them from the probabilities of all texts, without labels (equation 2.9). This holds if only the
shares differ, not what a label's texts are like, and as far as the probabilities are calibrated.
"""

from collections.abc import Sequence

import numpy as np

from tweetdora.records import DataRecord

_STEPS = 10_000
_CLOSE = 1e-9


def label_shares(data: DataRecord, label_words: Sequence[str], balanced: bool) -> list[float] | None:
    """The share of each label among the training examples, as they were drawn; None if a label has no example.

    >>> label_shares(record_of_3_bad_and_9_good, ["bad", "good"], balanced=False)    # doctest: +SKIP
    [0.25, 0.75]
    """
    counts = [data.label_counts.get(word, 0) for word in label_words]
    if not all(counts):
        return None
    return [1 / len(counts)] * len(counts) if balanced else [count / sum(counts) for count in counts]


def estimate_shares(probabilities: np.ndarray, train_shares: Sequence[float]) -> np.ndarray:
    """Estimate the labels' shares (C,) among texts with these probabilities (N, C) by EM, from the training shares."""
    shares = before = np.asarray(train_shares, dtype=np.float64)
    for _ in range(_STEPS):
        new = correct(probabilities, before, shares).mean(0)
        if np.abs(new - shares).max() < _CLOSE:
            return new
        shares = new
    return shares


def correct(probabilities: np.ndarray, train_shares: Sequence[float] | np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Correct probabilities (N, C) from the training shares to `shares`."""
    weighted = probabilities * (shares / np.asarray(train_shares))
    return weighted / weighted.sum(-1, keepdims=True)


def corrected_labels(
    labels: np.ndarray, probabilities: np.ndarray, train_shares: Sequence[float] | np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """The most likely label ids (N,) after correction of probabilities (N, C).

    `labels` are the ids before it. Some are the choice between labels that rounding made equally likely
    (scoring.choose_labels), so each counts as the most likely of its row, and stays unless another is now likelier.
    """
    rows, raised = np.arange(len(labels)), probabilities.copy()
    raised[rows, labels] = probabilities.max(-1)
    found = correct(raised, train_shares, shares)
    now = found.argmax(-1)
    return np.where(found[rows, labels] >= found[rows, now], labels, now)
