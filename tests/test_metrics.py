"""Scores against hand and scikit-learn, intervals against resampling row by row, tests against scipy."""

import json
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, f1_score, log_loss, precision_score, recall_score

from tweetdora import metrics
from tweetdora.generation import UNPARSED, Generation
from tweetdora.metrics import (
    INTERVAL_METRICS,
    ClassificationScores,
    accuracy_by_length,
    baselines,
    bootstrap_intervals,
    compute_metrics,
    confusion_matrix,
    likelihood_metrics,
    mcnemar_p_value,
    paired_difference,
    proportion_interval,
    scores,
)
from tweetdora.record_files import decode
from tweetdora.records import Bootstrap, Intervals, LikelihoodMetrics, McNemar, MetricDifference, Metrics

WORDS = ["negative", "neutral", "positive"]


def answers_with(predictions: list[int]) -> list[Generation]:
    return [Generation(WORDS[label] if label >= 0 else "?", True, label) for label in predictions]


def random_answers(seed: int, rows: int, num_labels: int = 3, unparsed: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """True classes, and predictions that are right in about half of the rows; some are unparsed."""
    draw = np.random.default_rng(seed)
    references = draw.choice(
        num_labels, size=rows, p=np.arange(1, num_labels + 1) / np.arange(1, num_labels + 1).sum()
    )
    predictions = np.where(draw.random(rows) < 0.4, references, draw.integers(0, num_labels, rows))
    return references, np.where(draw.random(rows) < unparsed, UNPARSED, predictions)


# Scores


def test_an_example_by_hand():
    """Rows: two negative, two neutral, two positive. One negative is called neutral, one positive is unparsed.

    negative  1 hit, 1 called so, 2 there: precision 1,   recall 1/2, F1 2/3
    neutral   2 hits, 3 called so, 2 there: precision 2/3, recall 1,   F1 4/5
    positive  1 hit, 1 called so, 2 there: precision 1,   recall 1/2, F1 2/3
    """
    answers = [
        Generation("negative", True, 0),
        Generation("neutral", True, 1),
        Generation("Neutral", True, 1),
        Generation("neutral", True, 1),
        Generation("positive, I think", False, 2),
        Generation("no idea", True, UNPARSED),
    ]
    computed = compute_metrics([0, 0, 1, 1, 2, 2], answers, WORDS)
    assert computed.confusion_matrix == [[1, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 1]]
    assert computed.macro_f1 == pytest.approx((2 / 3 + 4 / 5 + 2 / 3) / 3)
    assert computed.macro_recall == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    assert computed.accuracy == pytest.approx(4 / 6)
    assert {w: asdict(s) for w, s in computed.per_label.items()} == {
        "negative": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
        "neutral": {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(4 / 5), "support": 2},
        "positive": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
    }
    assert computed.num_examples == 6
    assert computed.parse_rate == pytest.approx(5 / 6)
    assert computed.exact_match == pytest.approx(3 / 6)
    assert computed.eos_rate == pytest.approx(5 / 6)


def test_the_metrics_are_ready_for_a_record():
    computed = compute_metrics([0, 1, 2], answers_with([0, 1, UNPARSED]), WORDS)
    assert decode(Metrics, json.loads(json.dumps(asdict(computed))), "x") == computed


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_scores_are_scikit_learns_with_the_classes_fixed(seed, num_labels):
    references, predictions = random_answers(seed, 60, num_labels)
    found = scores(confusion_matrix(references, predictions, num_labels))
    fixed = {"labels": list(range(num_labels)), "zero_division": 0}
    assert UNPARSED in predictions
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert found[name] == pytest.approx(score(references, predictions, average=None, **fixed)), name
    assert found["macro_f1"] == pytest.approx(f1_score(references, predictions, average="macro", **fixed))
    assert found["macro_recall"] == pytest.approx(recall_score(references, predictions, average="macro", **fixed))
    assert found["accuracy"] == pytest.approx(accuracy_score(references, predictions))


def test_a_class_without_rows_and_answers_counts_as_zero_as_in_scikit_learn():
    references, predictions = [0, 0, 1], [0, 1, 1]
    found = scores(confusion_matrix(references, predictions, 3))
    assert found["f1"].tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    expected = f1_score(references, predictions, labels=[0, 1, 2], average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(expected) == pytest.approx(4 / 9)


def test_an_unparsed_answer_is_wrong_and_not_dropped():
    """Dropped, the rest would be perfect."""
    references, right = [0, 1, 2, 0, 1, 2], [0, 1, 2, 0, 1, 2]
    unparsed = [0, 1, 2, UNPARSED, UNPARSED, UNPARSED]
    assert scores(confusion_matrix(references, right, 3))["macro_f1"] == 1
    found = scores(confusion_matrix(references, unparsed, 3))
    # Every class: 1 hit, 1 called so, 2 there.
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert (found["macro_recall"], found["accuracy"]) == (0.5, 0.5)
    assert found["precision"].tolist() == [1, 1, 1], "no class is blamed for an unparsed answer"
    assert compute_metrics(references, answers_with(unparsed), WORDS).accuracy == 0.5


def test_nothing_parsed_scores_nothing():
    computed = compute_metrics([0, 1, 2], answers_with([UNPARSED] * 3), WORDS)
    assert [getattr(computed, name) for name in (*INTERVAL_METRICS, "parse_rate", "exact_match")] == [0, 0, 0, 0, 0]
    assert computed.confusion_matrix == [[0, 0, 0, 1]] * 3


def test_the_confusion_matrix_has_true_classes_in_rows_and_unparsed_last():
    matrix = confusion_matrix([0, 1, 1, 1], [1, 0, -1, 0], 2)
    assert matrix.tolist() == [[0, 1, 0], [2, 0, 1]]


def test_stacked_matrices_are_scored_one_by_one():
    matrices = np.stack([confusion_matrix(*random_answers(seed, 40), 3) for seed in range(6)]).reshape(2, 3, 3, 4)
    together = scores(matrices)
    assert together["macro_f1"].shape == (2, 3) and together["f1"].shape == (2, 3, 3)
    for row, column in np.ndindex(2, 3):
        alone = scores(matrices[row, column])
        for name, value in alone.items():
            assert together[name][row, column] == pytest.approx(value), name


# The evaluate library


def test_the_metric_is_the_librarys_and_computes_without_the_network():
    """conftest.py refuses every connection; evaluate.load would need one."""
    assert issubclass(ClassificationScores, metrics.evaluate.Metric)
    computed = ClassificationScores().compute(predictions=[0, 1, -1], references=[0, 0, 2], num_labels=3)
    # negative: 1 hit, 1 called so, 2 there; neutral: 1 called so, none there; positive: none called so.
    assert computed["confusion_matrix"] == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert computed["macro_f1"] == pytest.approx(2 / 9)


def test_the_metric_can_be_fed_in_batches():
    references, predictions = random_answers(3, 50)
    whole = ClassificationScores(experiment_id="whole").compute(
        predictions=predictions, references=references, num_labels=3
    )
    metric = ClassificationScores(experiment_id="batches")
    for start in range(0, 50, 20):
        part = slice(start, start + 20)
        metric.add_batch(predictions=predictions[part], references=references[part])
    assert metric.compute(num_labels=3) == whole
    assert whole["macro_f1"] == pytest.approx(
        f1_score(references, predictions, labels=[0, 1, 2], average="macro", zero_division=0)
    )


# Intervals


def plain_scores(truth: np.ndarray, answers: np.ndarray, num_labels: int) -> list[float]:
    """INTERVAL_METRICS, counted class by class."""
    f1, recall = [], []
    for label in range(num_labels):
        hits, there, called = (
            ((truth == label) & (answers == label)).sum(),
            (truth == label).sum(),
            (answers == label).sum(),
        )
        recall.append(hits / there if there else 0.0)
        f1.append(2 * hits / (there + called) if there + called else 0.0)
    return [sum(f1) / num_labels, sum(recall) / num_labels, (truth == answers).mean()]


def naive_bootstrap(references, predictions, num_labels: int, samples: int, seed: int) -> dict[str, np.ndarray]:
    """The second way: draw rows with replacement, and score each draw."""
    draw = np.random.default_rng(seed)
    picked = draw.integers(0, len(references), (samples, len(references)))
    drawn = np.array([plain_scores(references[rows], predictions[rows], num_labels) for rows in picked])
    return dict(zip(INTERVAL_METRICS, drawn.T, strict=True))


def quantile_error(values: np.ndarray) -> float:
    """Four standard errors of a 2.5 % quantile of that many draws from a normal distribution of that spread."""
    density = math.exp(-(1.96**2) / 2) / math.sqrt(2 * math.pi) / values.std()
    return 4 * math.sqrt(0.025 * 0.975 / len(values)) / density


def test_intervals_agree_with_drawing_row_by_row():
    references, predictions = random_answers(0, 80)
    found = bootstrap_intervals(references, predictions, 3, Bootstrap(20_000, 1))
    naive = naive_bootstrap(references, predictions, 3, samples=1500, seed=2)
    for name in INTERVAL_METRICS:
        expected = np.quantile(naive[name], [0.025, 0.975])
        # Accuracy moves in steps of 1/80.
        tolerance = quantile_error(naive[name]) + 1 / 160
        low, high = getattr(found, name)
        assert (low, high) == pytest.approx(expected, abs=tolerance), name
        assert high - low > 3 * tolerance, "the tolerance must not swallow the interval"


def test_intervals_of_each_class_agree_with_drawing_row_by_row():
    references, predictions = random_answers(0, 80)
    found = bootstrap_intervals(references, predictions, 3, Bootstrap(20_000, 1)).per_label_f1
    picked = np.random.default_rng(2).integers(0, 80, (1500, 80))
    every = {"labels": [0, 1, 2], "average": None}
    drawn = np.array([f1_score(references[rows], predictions[rows], **every) for rows in picked])
    for label in range(3):
        expected, tolerance = np.quantile(drawn[:, label], [0.025, 0.975]), quantile_error(drawn[:, label])
        assert found[label] == pytest.approx(expected, abs=tolerance)
        assert found[label][1] - found[label][0] > 3 * tolerance


def test_the_interval_of_a_share_is_wilsons():
    for hits, count in ((0, 10), (1, 7), (37, 40), (800, 800)):
        expected = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
        assert proportion_interval(hits, count) == pytest.approx([expected.low, expected.high], abs=1e-12)
    assert all(proportion_interval(0, n)[0] >= 0 and proportion_interval(n, n)[1] <= 1 for n in range(1, 3000))


def test_accuracy_by_length_takes_the_rows_in_quarters_from_short_to_long():
    texts = ["x" * length for length in (9, 1, 4, 4, 2, 30, 7, 5, 3)]  # sorted: 1 2 3 | 4 4 | 5 7 | 9 30
    wrong = {9: False, 1: True, 30: True}
    predictions = [1 if wrong.get(len(text)) else 0 for text in texts]
    parts = accuracy_by_length(texts, [0] * 9, predictions)
    assert [(part.characters, part.num_examples) for part in parts] == [
        ((1, 3), 3),
        ((4, 4), 2),
        ((5, 7), 2),
        ((9, 30), 2),
    ]
    assert [part.accuracy for part in parts] == [pytest.approx(2 / 3), 1.0, 1.0, 0.5]
    assert parts[3].interval == proportion_interval(1, 2)


def test_accuracy_by_length_of_fewer_than_four_rows_has_no_empty_part():
    assert [part.num_examples for part in accuracy_by_length(["a", "bb"], [0, 0], [0, -1])] == [1, 1]


def test_an_interval_of_the_accuracy_is_that_of_a_share():
    """By the normal approximation: 0.7 of 4,000 rows has a standard error of sqrt(0.7 · 0.3 / 4000) = 0.00725."""
    references = [0] * 2000 + [1] * 2000
    predictions = ([0] * 1400 + [1] * 600) + ([1] * 1400 + [0] * 600)
    low, high = bootstrap_intervals(references, predictions, 2, Bootstrap(20_000, 0)).accuracy
    assert (low, high) == (pytest.approx(0.7 - 1.96 * 0.007246, abs=0.001), pytest.approx(0.7142, abs=0.001))


def test_intervals_are_the_seeds():
    references, predictions = random_answers(0, 50)
    first = bootstrap_intervals(references, predictions, 3, Bootstrap(200, 3))
    assert bootstrap_intervals(references, predictions, 3, Bootstrap(200, 3)) == first
    assert bootstrap_intervals(references, predictions, 3, Bootstrap(200, 4)) != first


def test_perfect_answers_have_no_spread():
    found = bootstrap_intervals([0, 1, 2] * 20, [0, 1, 2] * 20, 3, Bootstrap(500, 0))
    assert found == Intervals(**{name: (1.0, 1.0) for name in INTERVAL_METRICS}, per_label_f1=[(1.0, 1.0)] * 3)


def test_nineteen_of_twenty_intervals_hold_the_true_value():
    """300 data sets from a known source; the share inside has a standard error of 1.3 %."""
    true_matrix = np.array([[50, 20, 20, 10], [15, 60, 15, 10], [10, 20, 60, 10]]) / 300
    truth = scores(true_matrix)
    cells = [(row, column if column < 3 else UNPARSED) for row in range(3) for column in range(4)]
    draw, inside = np.random.default_rng(0), dict.fromkeys(INTERVAL_METRICS, 0)
    for seed in range(300):
        rows = [cells[cell] for cell in draw.choice(12, size=400, p=true_matrix.ravel())]
        references, predictions = zip(*rows, strict=True)
        intervals = bootstrap_intervals(references, predictions, 3, Bootstrap(300, seed))
        for name in INTERVAL_METRICS:
            low, high = getattr(intervals, name)
            inside[name] += low <= truth[name] <= high
    for name, count in inside.items():
        assert 0.90 < count / 300 < 0.99, name


# Before against after


def test_the_difference_agrees_with_drawing_pairs_of_rows():
    references, before = random_answers(0, 80)
    _, other = random_answers(1, 80)
    after = np.where(np.random.default_rng(5).random(80) < 0.5, references, np.where(before >= 0, before, other))
    found = paired_difference(references, before, after, 3, Bootstrap(20_000, 1))
    naive_before = naive_bootstrap(references, before, 3, samples=1500, seed=2)
    naive_after = naive_bootstrap(references, after, 3, samples=1500, seed=2)  # the same seed draws the same rows
    for name, score in (("macro_f1", f1_score), ("macro_recall", recall_score)):
        fixed = {"labels": [0, 1, 2], "average": "macro", "zero_division": 0}
        point = score(references, after, **fixed) - score(references, before, **fixed)
        assert getattr(found, name).difference == pytest.approx(point)
    point = accuracy_score(references, after) - accuracy_score(references, before)
    assert found.accuracy.difference == pytest.approx(point)
    for name in INTERVAL_METRICS:
        differences = naive_after[name] - naive_before[name]
        expected = np.quantile(differences, [0.025, 0.975])
        tolerance = quantile_error(differences) + 1 / 160
        assert getattr(found, name).interval == pytest.approx(expected, abs=tolerance), name
        unpaired = np.quantile(naive_after[name] - np.roll(naive_before[name], 1), [0.025, 0.975])
        assert np.diff(unpaired) > 1.2 * np.diff(getattr(found, name).interval), "pairs share what makes rows hard"


def test_fixed_and_broken_rows_are_counted_by_hand():
    references = [0, 0, 1, 1, 2, 2, 0]
    before = [0, 1, 1, UNPARSED, 0, 2, 1]
    after = [0, 0, 2, 1, UNPARSED, 2, 2]
    # Rows 1 and 3 are fixed, row 2 is broken; rows 4 and 6 stay wrong, 0 and 5 right.
    found = paired_difference(references, before, after, 3, Bootstrap(50, 0))
    assert found.mcnemar == McNemar(fixed=2, broken=1, p_value=1.0)
    assert found.accuracy.difference == pytest.approx(1 / 7)


def test_unparsed_answers_before_and_after_keep_their_columns_apart():
    """Before: all unparsed. After: all right. Every draw then has the difference 1, in every metric."""
    references = [0, 1, 2] * 20
    found = paired_difference(references, [UNPARSED] * 60, references, 3, Bootstrap(200, 0))
    assert found.mcnemar.fixed == 60
    for name in INTERVAL_METRICS:
        assert getattr(found, name) == MetricDifference(1.0, (1.0, 1.0))
    back = paired_difference(references, references, [UNPARSED] * 60, 3, Bootstrap(200, 0))
    assert back.accuracy == MetricDifference(-1.0, (-1.0, -1.0))


def test_the_same_answers_differ_in_nothing():
    references, predictions = random_answers(0, 50)
    found = paired_difference(references, predictions, predictions, 3, Bootstrap(100, 0))
    assert found.mcnemar == McNemar(fixed=0, broken=0, p_value=1.0)
    assert found.macro_f1 == MetricDifference(0.0, (0.0, 0.0))


def test_differences_are_the_seeds():
    references, before = random_answers(0, 50)
    _, after = random_answers(1, 50)
    first = paired_difference(references, before, after, 3, Bootstrap(100, 3))
    assert paired_difference(references, before, after, 3, Bootstrap(100, 3)) == first
    assert paired_difference(references, before, after, 3, Bootstrap(100, 4)) != first


def test_a_few_resamples_at_a_time_are_those_of_all_at_once(monkeypatch):
    """Also with the last cell empty, and most others."""
    generator = np.random.default_rng(5)
    references, before, after = generator.integers(0, 6, (3, 50)).tolist()
    cells = np.zeros((6, 7, 7), dtype=int)
    np.add.at(cells, (references, before, after), 1)
    expected = np.random.default_rng(3).multinomial(50, cells.ravel() / 50, size=20).reshape(20, 6, 7, 7)
    for at_once in (10**9, 7 * cells.size):
        monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", at_once)
        found = metrics._resample(cells, lambda drawn: {"drawn": drawn}, Bootstrap(20, 3))["drawn"]
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("fixed", "broken", "expected"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (5, 0, 1 / 16),  # 2 · 1/32
        (0, 5, 1 / 16),
        (4, 1, 3 / 8),  # 2 · (1 + 5)/32
        (3, 3, 1.0),  # 2 · (1 + 6 + 15 + 20)/64 is more than 1
        (8, 2, 7 / 64),  # 2 · (1 + 10 + 45)/1024
    ],
)
def test_mcnemar_by_hand(fixed, broken, expected):
    assert mcnemar_p_value(fixed, broken) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fixed", "broken"), [(10, 3), (30, 31), (100, 60), (2500, 2300), (6000, 400), (7000, 5284), (12284, 0)]
)
def test_mcnemar_is_the_exact_binomial_test_also_where_coefficients_overflow(fixed, broken):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(fixed, fixed + broken).pvalue
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mcnemar_p_value(fixed, broken)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-300)
    assert mcnemar_p_value(broken, fixed) == found


# What guessing reaches


def test_always_the_largest_class_by_hand():
    """TweetEval's test split: 5,937 of 12,284 are neutral, so F1 of neutral is 2 · 5937 / (12284 + 5937) = 0.6517."""
    references = np.repeat([0, 1, 2], [3972, 5937, 2375])
    lines = baselines(references, WORDS)
    majority = lines.majority
    assert majority.label == "neutral"
    assert majority.macro_f1 == pytest.approx(2 * 5937 / (12284 + 5937) / 3) == pytest.approx(0.217, abs=5e-4)
    assert (majority.macro_recall, majority.accuracy) == (pytest.approx(1 / 3), pytest.approx(5937 / 12284))
    # Uniform guesses call 12284 / 3 rows each class, and a third of its own rows are hits.
    by_hand = [2 * support / 3 / (support + 12284 / 3) for support in (3972, 5937, 2375)]
    assert lines.uniform.macro_f1 == pytest.approx(sum(by_hand) / 3) == pytest.approx(0.3225, abs=5e-5)


def test_the_line_of_the_largest_class_is_what_such_answers_score():
    references, _ = random_answers(0, 200)
    largest = int(np.bincount(references).argmax())
    computed = compute_metrics(references.tolist(), answers_with([largest] * 200), WORDS)
    line = baselines(references, WORDS).majority
    assert vars(line) == {
        "label": WORDS[largest],
        **{name: pytest.approx(getattr(computed, name)) for name in INTERVAL_METRICS},
    }


def test_the_line_of_uniform_guesses_is_what_guesses_score_on_average():
    """2,000 simulated guessers on 1,500 rows; their mean has a standard error below 0.0003."""
    references = np.repeat([0, 1, 2], [300, 700, 500])
    guesses = np.random.default_rng(0).integers(0, 3, (2000, 1500))
    simulated = scores(np.stack([confusion_matrix(references, guess, 3) for guess in guesses]))
    line = baselines(references, WORDS).uniform
    for name in INTERVAL_METRICS:
        assert getattr(line, name) == pytest.approx(simulated[name].mean(), abs=1e-3), name
    assert line.macro_recall == pytest.approx(1 / 3) == pytest.approx(line.accuracy)


def test_a_class_without_rows_has_its_place_in_the_lines():
    """Rows: two negative, one neutral. Uniform guesses call one row each class: F1 4/9, 1/3 and 0."""
    lines = baselines([0, 0, 1], WORDS)
    assert lines.uniform.macro_f1 == pytest.approx((2 * (2 / 3) / 3 + 2 * (1 / 3) / 2 + 0) / 3)
    # Always negative: 2 hits, 3 called so, 2 there.
    assert lines.majority.label == "negative"
    assert lines.majority.macro_f1 == pytest.approx(4 / 5 / 3)


# Probabilities


def likelihoods_of(probabilities: list[list[float]], labels: list[int], samples: int = 200) -> LikelihoodMetrics:
    rows = np.array(probabilities)
    return likelihood_metrics(labels, rows.argmax(-1).tolist(), rows, Bootstrap(samples, 0), seconds=2.0)


def test_log_loss_and_calibration_error_are_those_worked_out_by_hand():
    """Bins 0.6 to 0.7 (two rows, one right, mean 0.64) and 0.9 to 1.0 (two rows, both right, mean 0.95)."""
    found = likelihoods_of([[0.61, 0.39], [0.33, 0.67], [0.05, 0.95], [0.95, 0.05]], [0, 0, 1, 0])
    assert found.log_loss == pytest.approx(-(np.log(0.61) + np.log(0.33) + 2 * np.log(0.95)) / 4)
    assert found.calibration_error == pytest.approx((2 * abs(0.64 - 0.5) + 2 * abs(0.95 - 1.0)) / 4)
    assert (found.accuracy, found.samples_per_second) == (0.75, 2.0)
    assert [(part.num_examples, part.accuracy) for part in found.bins] == [(2, 0.5), (2, 1.0)]
    assert [part.confidence for part in found.bins] == pytest.approx([0.64, 0.95])
    assert [part.probabilities for part in found.bins] == [(0.6, 0.7), (0.9, 1.0)]


def test_the_scores_of_the_most_likely_labels_are_scikit_learns():
    random = np.random.default_rng(0)
    rows = random.dirichlet([1, 1, 1], 300)
    labels = random.integers(0, 3, 300).tolist()
    found = likelihoods_of(rows.tolist(), labels)
    predictions = rows.argmax(-1)
    assert found.macro_f1 == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert found.accuracy == pytest.approx(accuracy_score(labels, predictions))
    assert found.log_loss == pytest.approx(log_loss(labels, rows))


def test_the_intervals_are_those_of_redrawn_examples():
    """Second way: draw rows, and compute both scores of each draw from the start."""
    random = np.random.default_rng(1)
    rows, labels = random.dirichlet([2, 1], 120), random.integers(0, 2, 120)
    found = likelihoods_of(rows.tolist(), labels.tolist(), samples=3000)
    drawn = []
    for _ in range(3000):
        picked = random.integers(0, 120, 120)
        again = likelihoods_of(rows[picked].tolist(), labels[picked].tolist(), samples=1)
        drawn.append((again.log_loss, again.calibration_error))
    expected = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    assert found.log_loss_interval == pytest.approx(tuple(expected[:, 0]), abs=0.03)
    assert found.calibration_error_interval == pytest.approx(tuple(expected[:, 1]), abs=0.02)


def test_a_label_without_any_probability_costs_much_and_not_all():
    found = likelihoods_of([[1.0, 0.0], [0.5, 0.5]], [1, 0])
    assert 300 < found.log_loss < 400 and np.isfinite(found.log_loss_interval).all()


def test_an_answer_with_a_space_behind_the_word_is_exact():
    """Llama 2's template writes one in front of the stop token."""
    generations = [Generation("good ", 1, True), Generation(" bad", 0, True), Generation("good\n", 1, True)]
    assert compute_metrics([1, 0, 1], generations, ["bad", "good"]).exact_match == pytest.approx(2 / 3)
