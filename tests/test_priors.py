"""Prior correction: by hand, and against labels that are drawn anew."""

from dataclasses import replace

import numpy as np
import pytest
from sample_records import sample_run

from tweetdora.priors import correct, corrected_labels, estimate_shares, label_shares

WORDS = ["bad", "good"]


def test_probabilities_are_weighted_by_the_change_of_the_shares():
    """0.4 * 0.75 / 0.5 = 0.6 and 0.6 * 0.25 / 0.5 = 0.3: 2 to 1."""
    found = correct(np.array([[0.4, 0.6], [0.5, 0.5]]), [0.5, 0.5], np.array([0.75, 0.25]))
    assert found == pytest.approx(np.array([[2 / 3, 1 / 3], [0.75, 0.25]]))


def test_the_shares_of_training_change_nothing():
    rows = np.array([[0.4, 0.6], [0.9, 0.1]])
    assert correct(rows, [0.2, 0.8], np.array([0.2, 0.8])) == pytest.approx(rows)


def test_a_label_that_won_a_tie_stays_unless_the_correction_decides():
    """Greedy generation decides the tie of row 0 for label 1. In row 1, the correction can make label 1 likelier."""
    probabilities = np.array([[0.41, 0.4, 0.19], [0.6, 0.4, 0.0]])
    labels, train = np.array([1, 0]), [0.5, 0.3, 0.2]
    assert corrected_labels(labels, probabilities, train, np.array(train)).tolist() == [1, 0]
    assert corrected_labels(labels, probabilities, train, np.array([0.2, 0.6, 0.2])).tolist() == [1, 1]
    assert corrected_labels(labels, probabilities, train, np.array([0.8, 0.1, 0.1])).tolist() == [0, 0]


def test_certain_probabilities_are_counted():
    rows = np.array([[1.0, 0.0]] * 3 + [[0.0, 1.0]])
    assert estimate_shares(rows, [0.1, 0.9]) == pytest.approx([0.75, 0.25])


def test_the_estimate_is_the_maximum_of_the_likelihood():
    """Second way: a search over a grid for the share that makes the texts likeliest (the paper's equation 2.7)."""
    rows = np.random.default_rng(0).dirichlet([1.0, 2.0], 300)
    train = [0.3, 0.7]
    grid = np.linspace(0.001, 0.999, 9_981)
    weights = np.stack([grid / train[0], (1 - grid) / train[1]])  # (2, G)
    best = grid[np.log(rows @ weights).sum(0).argmax()]
    assert estimate_shares(rows, train)[0] == pytest.approx(best, abs=2e-4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_shares_and_accuracy_come_back_where_only_the_shares_differ(share):
    """Two classes of texts, each a normal of its own; a classifier that knows them and expects other shares."""
    generator, train = np.random.default_rng(1), [0.3, 0.7]
    labels = (generator.random(20_000) >= share).astype(int)
    values = generator.normal(2.0 * labels)
    densities = np.exp(-0.5 * (values[:, None] - np.array([0.0, 2.0])) ** 2)
    weighted = densities * train
    probabilities = weighted / weighted.sum(-1, keepdims=True)
    shares = estimate_shares(probabilities, train)
    assert shares[0] == pytest.approx((labels == 0).mean(), abs=0.01)
    right_before = (probabilities.argmax(-1) == labels).mean()
    assert (correct(probabilities, train, shares).argmax(-1) == labels).mean() > right_before


def test_the_shares_are_those_that_were_drawn():
    data = replace(sample_run().train_data, label_counts={"bad": 3, "good": 9})
    assert label_shares(data, WORDS, balanced=False) == [0.25, 0.75]
    assert label_shares(data, ["good", "bad"], balanced=False) == [0.75, 0.25]
    assert label_shares(data, WORDS, balanced=True) == [0.5, 0.5]
    assert label_shares(replace(data, label_counts={"bad": 3, "good": 0}), WORDS, balanced=False) is None
