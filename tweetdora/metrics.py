"""What is measured on answers: macro-F1 and its company, with intervals, against the lines that guessing reaches."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch  # noqa: F401  (before datasets, which evaluate imports)

# This repository's script evaluate.py has the library's name, and Python puts the folder of the running script first
# on sys.path, so `import evaluate` would find the script. Folders that hold an evaluate.py therefore go last.
sys.path.sort(key=lambda folder: os.path.isfile(os.path.join(folder, "evaluate.py")))
import datasets
import evaluate

from tweetdora.generation import UNPARSED, Answer

# What the bootstrap gives an interval to; all of them follow from the confusion matrix.
INTERVAL_METRICS = ("macro_f1", "macro_recall", "accuracy")


def confusion_matrix(references: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """Counts by true class (rows) and answer (columns); the last column counts unparsed answers.

    >>> confusion_matrix([0, 1, 1], [0, 1, -1], 2)
    array([[1, 0, 0],
           [0, 1, 1]])
    """
    matrix = np.zeros((classes, classes + 1), dtype=np.int64)
    np.add.at(matrix, (np.asarray(references), np.asarray(predictions) % (classes + 1)), 1)  # -1 is the last column
    return matrix


def scores(matrix: np.ndarray) -> dict[str, np.ndarray]:
    """Scores from confusion matrices of shape (..., C, C + 1); each score has shape (...) or (..., C).

    An unparsed answer is a wrong one: it lowers recall and accuracy, and gives no class a false positive. Macro
    averages run over the C fixed classes; one with neither rows nor predictions counts as 0, as in scikit-learn.
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


class AnswerScores(evaluate.Metric):
    """Macro-F1, macro recall and accuracy of answers, -1 standing for one that names no label word.

    A subclass, because evaluate.load() fetches a script from the Hub each time the cache is cold.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Scores of generated answers; an answer that names no label word is wrong, not dropped.",
            citation="",
            inputs_description="predictions: class numbers, -1 for none; references: class numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int], classes: int) -> dict[str, Any]:
        matrix = confusion_matrix(references, predictions, classes)
        return {name: value.tolist() for name, value in scores(matrix).items()} | {"confusion_matrix": matrix.tolist()}


def measure(references: Sequence[int], answers: Sequence[Answer], label_words: Sequence[str]) -> dict[str, Any]:
    """All figures of one set of answers, by name, ready for a record."""
    metric = AnswerScores(experiment_id=f"{os.getpid()}")
    predictions = [answer.predicted for answer in answers]
    computed = metric.compute(predictions=predictions, references=list(references), classes=len(label_words))
    per_class = {
        word: {name: computed[name][number] for name in ("precision", "recall", "f1")}
        | {"support": sum(computed["confusion_matrix"][number])}
        for number, word in enumerate(label_words)
    }
    count = len(answers)
    return {
        "n": count,
        **{name: computed[name] for name in INTERVAL_METRICS},
        "parse_rate": sum(answer.predicted != UNPARSED for answer in answers) / count,
        "exact_rate": sum(answer.text.removeprefix(" ") in label_words for answer in answers) / count,
        "stop_rate": sum(answer.stopped for answer in answers) / count,
        "per_class": per_class,
        "confusion_matrix": computed["confusion_matrix"],
    }


def bootstrap_intervals(
    references: Sequence[int], predictions: Sequence[int], classes: int, samples: int, seed: int
) -> dict[str, Any]:
    """95 % percentile intervals of INTERVAL_METRICS, and of each class's F1, when rows are drawn with replacement.

    Drawing n rows with replacement and counting them by (class, answer) is one multinomial draw of the confusion
    matrix's cells, so no row is ever copied (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, ch. 6).
    """
    matrix = confusion_matrix(references, predictions, classes)
    drawn = _draw(matrix, samples, seed)
    values = scores(drawn)
    per_class = [_interval(values["f1"][:, number]) for number in range(classes)]
    return {name: _interval(values[name]) for name in INTERVAL_METRICS} | {"per_class_f1": per_class}


def accuracy_by_length(
    texts: Sequence[str], references: Sequence[int], predictions: Sequence[int]
) -> list[dict[str, Any]]:
    """Accuracy in quarters of the rows, from the shortest texts to the longest, with Wilson's interval.

    >>> accuracy_by_length(["aaa", "b", "cc", "dddd"], [0, 1, 0, 1], [0, 1, 0, 0])[-1]["characters"]
    [4, 4]
    """
    lengths = np.array([len(text) for text in texts])
    right = np.asarray(references) == np.asarray(predictions)
    quarters = [part for part in np.array_split(np.argsort(lengths, kind="stable"), 4) if len(part)]
    return [
        {
            "characters": [int(lengths[part].min()), int(lengths[part].max())],
            "n": len(part),
            "accuracy": float(right[part].mean()),
            "interval": proportion_interval(int(right[part].sum()), len(part)),
        }
        for part in quarters
    ]


def proportion_interval(hits: int, count: int) -> list[float]:
    """95 % score interval of a proportion (Wilson, JASA 22, 1927); it keeps its meaning at 0 and at 1.

    >>> [round(bound, 3) for bound in proportion_interval(9, 10)]
    [0.596, 0.982]
    """
    z = 1.959963984540054  # the normal distribution's 97.5 % point
    share, weight = hits / count, z * z / count
    middle, half = share + weight / 2, z * (share * (1 - share) / count + weight / (4 * count)) ** 0.5
    return [max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))]


def paired_difference(
    references: Sequence[int], before: Sequence[int], after: Sequence[int], classes: int, samples: int, seed: int
) -> dict[str, Any]:
    """After minus before on the same rows: difference and interval of each metric, and McNemar's exact test.

    Rows are drawn in pairs, so that what both sets of answers share cancels out.
    """
    cells = np.zeros((classes, classes + 1, classes + 1), dtype=np.int64)
    np.add.at(cells, (np.asarray(references), np.asarray(before), np.asarray(after)), 1)  # index -1 is the last one
    drawn = _draw(cells, samples, seed)  # (S, C, C + 1, C + 1)
    drawn_before, drawn_after = scores(drawn.sum(-1)), scores(drawn.sum(-2))
    point_before, point_after = scores(cells.sum(-1)), scores(cells.sum(-2))
    result: dict[str, Any] = {
        name: {
            "difference": float(point_after[name] - point_before[name]),
            "interval": _interval(drawn_after[name] - drawn_before[name]),
        }
        for name in INTERVAL_METRICS
    }
    right_before = np.asarray(before) == np.asarray(references)
    right_after = np.asarray(after) == np.asarray(references)
    fixed, broken = int((~right_before & right_after).sum()), int((right_before & ~right_after).sum())
    result["mcnemar"] = {"fixed": fixed, "broken": broken, "p_value": mcnemar_p_value(fixed, broken)}
    return result


def mcnemar_p_value(fixed: int, broken: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the changed rows is if both were a coin's toss.

    Twice the smaller tail of Binomial(fixed + broken, 1/2), at most 1 (McNemar, Psychometrika 12, 1947).
    """
    changed = fixed + broken
    if changed == 0:
        return 1.0
    # Summed in logarithms: the binomial coefficients of thousands of rows overflow a float.
    tail = np.arange(min(fixed, broken) + 1)
    steps = np.log((changed - tail[:-1]) / (tail[:-1] + 1))
    log_terms = np.concatenate([[0.0], np.cumsum(steps)]) - changed * np.log(2.0)
    return float(min(1.0, 2.0 * np.exp(np.logaddexp.reduce(log_terms))))


def reference_lines(references: Sequence[int], label_words: Sequence[str]) -> dict[str, Any]:
    """What guessing scores on these rows: the expected macro-F1 of uniform guesses, and always the largest class.

    For uniform guesses the expected confusion matrix is scored, which for thousands of rows is the expected score to
    three digits.
    """
    classes = len(label_words)
    support = np.bincount(np.asarray(references), minlength=classes)
    uniform = np.zeros((classes, classes + 1))
    uniform[:, :classes] = support[:, None] / classes
    majority = int(support.argmax())
    always = np.zeros((classes, classes + 1))
    always[:, majority] = support
    return {
        "uniform": {name: float(scores(uniform)[name]) for name in INTERVAL_METRICS},
        "majority": {
            "label": label_words[majority],
            **{name: float(scores(always)[name]) for name in INTERVAL_METRICS},
        },
    }


def _draw(cells: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """`samples` multinomial redraws of integer `cells`, shape (samples, *cells.shape)."""
    count = int(cells.sum())
    drawn = np.random.default_rng(seed).multinomial(count, cells.ravel() / count, size=samples)
    return drawn.reshape(samples, *cells.shape)


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, [0.025, 0.975])]
