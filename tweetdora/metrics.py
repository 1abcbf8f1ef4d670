"""Metrics of generated answers: macro-F1, recall, accuracy and others, with intervals and chance baselines."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch  # noqa: F401  (before datasets, which evaluate imports)

# This repository's script evaluate.py has the same name as the library, and Python puts the running script's folder
# first on sys.path, so `import evaluate` would find the script. Therefore, folders that hold an evaluate.py go last.
sys.path.sort(key=lambda folder: os.path.isfile(os.path.join(folder, "evaluate.py")))
import datasets
import evaluate

from tweetdora.generation import UNPARSED, Generation
from tweetdora.records import (
    Baseline,
    Baselines,
    Bootstrap,
    Difference,
    Interval,
    Intervals,
    LabelMetrics,
    LengthBand,
    LikelihoodMetrics,
    MajorityBaseline,
    McNemar,
    MetricDifference,
    Metrics,
    ReliabilityBin,
)

# The metrics with bootstrap intervals; all of them can be computed from the confusion matrix.
INTERVAL_METRICS = ("macro_f1", "macro_recall", "accuracy")
_BINS = 10  # of equal width, for the calibration error
_AT_ONCE = 200  # resamples per step
_CELLS_AT_ONCE = 10_000_000  # 80 MB


def confusion_matrix(references: Sequence[int], predictions: Sequence[int], num_labels: int) -> np.ndarray:
    """Count examples by label (rows) and prediction (columns); the last column counts unparsed answers.

    >>> confusion_matrix([0, 1, 1], [0, 1, -1], 2)
    array([[1, 0, 0],
           [0, 1, 1]])
    """
    matrix = np.zeros((num_labels, num_labels + 1), dtype=np.int64)
    np.add.at(matrix, (np.asarray(references), np.asarray(predictions) % (num_labels + 1)), 1)  # -1 is the last column
    return matrix


def scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Compute scores from confusion matrices of shape (..., C, C + 1); each score has shape (...) or (..., C).

    An unparsed answer counts as wrong: it lowers recall and accuracy, but is no label's false positive. Macro averages
    are over the C fixed labels; a label with neither examples nor predictions counts as 0, as in scikit-learn.
    """
    hits = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)  # (..., C)
    support = matrix.sum(-1)  # (..., C)
    predicted = matrix[..., :-1].sum(-2)  # (..., C)
    precision = _ratio(hits, predicted)
    recall = _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    return {
        "macro_f1": f1.mean(-1),
        "macro_recall": recall.mean(-1),
        "accuracy": _ratio(hits.sum(-1), support.sum(-1)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


class ClassificationScores(evaluate.Metric):
    """Macro-F1, macro recall and accuracy of answers, where -1 marks an answer that names no label word.

    This is a subclass because evaluate.load() fetches a script from the Hub whenever the cache is cold.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Scores of generated answers; an answer that names no label word is wrong, not dropped.",
            citation="",
            inputs_description="predictions: label ids, -1 for none; references: label ids.",
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], num_labels: int) -> dict[str, Any]:
        matrix = confusion_matrix(references, predictions, num_labels)
        return {name: value.tolist() for name, value in scores(matrix).items()} | {"confusion_matrix": matrix.tolist()}


def compute_metrics(
    references: Sequence[int], generations: Sequence[Generation], label_words: Sequence[str]
) -> Metrics:
    """Compute all scores of one set of generations."""
    metric = ClassificationScores(experiment_id=f"{os.getpid()}")
    predictions = [generation.predicted for generation in generations]
    computed = metric.compute(predictions=predictions, references=list(references), num_labels=len(label_words))
    matrix = computed["confusion_matrix"]
    per_label = {
        word: LabelMetrics(
            **{name: computed[name][number] for name in ("precision", "recall", "f1")}, support=sum(matrix[number])
        )
        for number, word in enumerate(label_words)
    }
    count = len(generations)
    return Metrics(
        num_examples=count,
        **{name: computed[name] for name in INTERVAL_METRICS},
        parse_rate=sum(generation.predicted != UNPARSED for generation in generations) / count,
        exact_match=sum(generation.text.strip(" ") in label_words for generation in generations) / count,
        eos_rate=sum(generation.stopped for generation in generations) / count,
        per_label=per_label,
        confusion_matrix=matrix,
    )


def bootstrap_intervals(
    references: Sequence[int], predictions: Sequence[int], num_labels: int, bootstrap: Bootstrap
) -> Intervals:
    """95 % percentile bootstrap intervals of INTERVAL_METRICS and of each label's F1, over the examples.

    Drawing n examples with replacement and counting them by (label, answer) is the same as one multinomial draw of the
    confusion matrix's cells, so no example is copied (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    ch. 6).
    """
    values = _resample(confusion_matrix(references, predictions, num_labels), scores, bootstrap)
    return Intervals(
        **{name: interval_of(values[name]) for name in INTERVAL_METRICS},
        per_label_f1=[interval_of(values["f1"][:, number]) for number in range(num_labels)],
    )


def likelihood_metrics(
    references: Sequence[int],
    predicted: Sequence[int],
    probabilities: np.ndarray,
    bootstrap: Bootstrap,
    seconds: float,
) -> LikelihoodMetrics:
    """Compute all scores of the most likely labels and of the labels' probabilities (N, C), scored in `seconds`."""
    labels, predictions, num_labels = np.asarray(references), np.asarray(predicted), probabilities.shape[1]
    confidence = probabilities[np.arange(len(labels)), predictions]
    right = predictions == labels
    losses = -np.log(probabilities[np.arange(len(labels)), labels].clip(min=np.finfo(np.float64).tiny))
    found = scores(confusion_matrix(labels.tolist(), predictions.tolist(), num_labels))
    places = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    sums = np.stack([np.bincount(places, weights, _BINS) for weights in (np.ones(len(labels)), confidence, right)])
    drawn_loss, drawn_error = _resample_probabilities(losses, confidence, right, places, bootstrap)
    return LikelihoodMetrics(
        **{name: float(found[name]) for name in INTERVAL_METRICS},
        intervals=bootstrap_intervals(labels.tolist(), predictions.tolist(), num_labels, bootstrap),
        log_loss=float(losses.mean()),
        log_loss_interval=interval_of(drawn_loss),
        calibration_error=float(_calibration_error(sums)),
        calibration_error_interval=interval_of(drawn_error),
        bins=[
            ReliabilityBin(
                probabilities=(number / _BINS, (number + 1) / _BINS),
                num_examples=int(sums[0, number]),
                confidence=float(sums[1, number] / sums[0, number]),
                accuracy=float(sums[2, number] / sums[0, number]),
            )
            for number in range(_BINS)
            if sums[0, number]
        ],
        seconds=round(seconds, 2),
        samples_per_second=round(len(labels) / seconds, 2),
    )


def _calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error from an array (..., 3, bins) of each bin's count, summed confidence and hits.

    It is the mean over examples of the distance between a bin's accuracy and its mean confidence (Guo et al., 2017,
    equation 3).
    """
    count = sums[..., 0, :].sum(-1)
    return np.abs(sums[..., 1, :] - sums[..., 2, :]).sum(-1) / count


def _resample_probabilities(
    losses: np.ndarray, confidence: np.ndarray, right: np.ndarray, places: np.ndarray, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """Log loss and calibration error of each bootstrap resample of the examples, a few resamples at a time."""
    generator, number = np.random.default_rng(bootstrap.seed), len(losses)
    in_bin = np.eye(_BINS)[places]  # (N, bins)
    columns = np.concatenate(
        [in_bin, in_bin * confidence[:, None], in_bin * right[:, None], losses[:, None]], axis=1
    )  # (N, 3 * bins + 1)
    drawn = []
    for start in range(0, bootstrap.samples, _AT_ONCE):
        picked = generator.integers(0, number, (min(_AT_ONCE, bootstrap.samples - start), number))
        counts = np.stack([np.bincount(row, minlength=number) for row in picked])
        drawn.append(counts @ columns)
    sums = np.concatenate(drawn)
    return sums[:, -1] / number, _calibration_error(sums[:, :-1].reshape(-1, 3, _BINS))


def accuracy_by_length(
    texts: Sequence[str], references: Sequence[int], predictions: Sequence[int]
) -> list[LengthBand]:
    """Accuracy per quarter of the examples, from the shortest texts to the longest, with Wilson's interval.

    >>> accuracy_by_length(["aaa", "b", "cc", "dddd"], [0, 1, 0, 1], [0, 1, 0, 0])[-1].characters
    (4, 4)
    """
    lengths = np.array([len(text) for text in texts])
    right = np.asarray(references) == np.asarray(predictions)
    quarters = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 4) if len(part)]
    return [
        LengthBand(
            characters=(int(lengths[part].min()), int(lengths[part].max())),
            num_examples=len(part),
            accuracy=float(right[part].mean()),
            interval=proportion_interval(int(right[part].sum()), len(part)),
        )
        for part in quarters
    ]


def proportion_interval(hits: int, count: int) -> Interval:
    """95 % score interval of a proportion (Wilson, JASA 22, 1927); it remains valid at 0 and 1.

    >>> [round(bound, 3) for bound in proportion_interval(9, 10)]
    [0.596, 0.982]
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share, weight = hits / count, z * z / count
    middle, half = share + weight / 2, z * (share * (1 - share) / count + weight / (4 * count)) ** 0.5
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def paired_difference(
    references: Sequence[int],
    base: Sequence[int],
    finetuned: Sequence[int],
    num_labels: int,
    bootstrap: Bootstrap,
) -> Difference:
    """Fine-tuned minus base on the same examples: difference and interval of each metric, and McNemar's exact test.

    Both models' answers to an example are drawn together, so that variation that they share cancels out.
    """
    cells = np.zeros((num_labels, num_labels + 1, num_labels + 1), dtype=np.int64)
    np.add.at(cells, (np.asarray(references), np.asarray(base), np.asarray(finetuned)), 1)  # index -1 is the last one

    def difference(drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Of redraws, shape (S, C, C + 1, C + 1)."""
        drawn_base, drawn_finetuned = scores(drawn.sum(-1)), scores(drawn.sum(-2))
        return {name: drawn_finetuned[name] - drawn_base[name] for name in INTERVAL_METRICS}

    drawn = _resample(cells, difference, bootstrap)
    point_base, point_finetuned = scores(cells.sum(-1)), scores(cells.sum(-2))
    right_base = np.asarray(base) == np.asarray(references)
    right_finetuned = np.asarray(finetuned) == np.asarray(references)
    fixed, broken = int((~right_base & right_finetuned).sum()), int((right_base & ~right_finetuned).sum())
    return Difference(
        **{
            name: MetricDifference(float(point_finetuned[name] - point_base[name]), interval_of(drawn[name]))
            for name in INTERVAL_METRICS
        },
        mcnemar=McNemar(fixed, broken, mcnemar_p_value(fixed, broken)),
    )


def mcnemar_p_value(fixed: int, broken: int) -> float:
    """Two-sided exact McNemar test: the probability of a split of changed examples at least this uneven by chance.

    Twice the smaller tail of Binomial(fixed + broken, 1/2), at most 1 (McNemar, Psychometrika 12, 1947).
    """
    changed = fixed + broken
    if changed == 0:
        return 1.0
    # Summed in log space, because the binomial coefficients of thousands of examples overflow a float.
    tail = np.arange(min(fixed, broken) + 1)
    steps = np.log((changed - tail[:-1]) / (tail[:-1] + 1))
    log_terms = np.concatenate([[0.0], np.cumsum(steps)]) - changed * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(np.logaddexp.reduce(log_terms))))


def baselines(references: Sequence[int], label_words: Sequence[str]) -> Baselines:
    """Chance baselines on these examples: uniform guesses (expected scores), and always the most frequent label.

    For uniform guesses, the expected confusion matrix is scored. For thousands of examples, this equals the expected
    score to three digits.
    """
    num_labels = len(label_words)
    support = np.bincount(np.asarray(references), minlength=num_labels)
    uniform = np.zeros((num_labels, num_labels + 1))
    uniform[:, :num_labels] = support[:, None] / num_labels
    majority = int(support.argmax())
    always = np.zeros((num_labels, num_labels + 1))
    always[:, majority] = support
    return Baselines(
        uniform=Baseline(**{name: float(scores(uniform)[name]) for name in INTERVAL_METRICS}),
        majority=MajorityBaseline(
            **{name: float(scores(always)[name]) for name in INTERVAL_METRICS}, label=label_words[majority]
        ),
        others=[],
    )


def _resample(
    cells: np.ndarray, score: Callable[[np.ndarray], dict[str, np.ndarray]], bootstrap: Bootstrap
) -> dict[str, np.ndarray]:
    """Scores of multinomial redraws of integer `cells`, a few redraws at a time; each has the samples first.

    With many labels, most cells are empty. An empty cell draws no random number, except possibly the last.
    """
    flat, count = cells.ravel(), int(cells.sum())
    kept = flat > 0
    kept[-1] = True
    generator, found = np.random.default_rng(bootstrap.seed), []
    at_once = max(1, _CELLS_AT_ONCE // flat.size)
    for start in range(0, bootstrap.samples, at_once):
        size = min(at_once, bootstrap.samples - start)
        drawn = np.zeros((size, flat.size), dtype=np.int64)
        drawn[:, kept] = generator.multinomial(count, flat[kept] / count, size=size)
        found.append(score(drawn.reshape(size, *cells.shape)))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def interval_of(values: np.ndarray) -> Interval:
    """The 95 % percentile interval of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
