"""Plots of a run: curves of the training, and confusion matrices and calibration of base and fine-tuned model."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: a training machine has no screen
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from tweetdora.records import LikelihoodMetrics

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # a transparent picture would be unreadable on a dark page
    "savefig.dpi": 150,
    "axes.titlesize": 11,
}
SHOWN_NAMES = {"base": "base", "finetuned": "fine-tuned"}  # of the measured models, for people
_BLUE, _ORANGE, _GREY = "#2166ac", "#d95f02", "#767676"


def plot_training(log_history: Sequence[dict[str, Any]], path: str, title: str) -> None:
    """Training and validation loss over steps; beside it, where they were measured, validation macro-F1 and rates."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    with plt.rc_context(_STYLE):
        columns = 2 if validation else 1
        figure, axes = plt.subplots(1, columns, figsize=(5 * columns, 3.4), squeeze=False, layout="constrained")
        _curve(axes[0, 0], train, _BLUE, "training", "." if len(train) == 1 else "-")
        _curve(axes[0, 0], [(entry["step"], entry["eval_loss"]) for entry in validation], _ORANGE, "validation", "o-")
        axes[0, 0].set(xlabel="step", ylabel="loss per supervised token", ylim=(0, None), title=title)
        if train or validation:
            axes[0, 0].legend(frameon=False)
        if validation:
            shown = (("eval_macro_f1", _ORANGE, "macro-F1"), ("eval_parse_rate", _BLUE, "parse rate"))
            for name, colour, label in (*shown, ("eval_eos_rate", _GREY, "EOS rate")):
                _curve(axes[0, 1], [(entry["step"], entry[name]) for entry in validation], colour, label, "o-")
            axes[0, 1].set(xlabel="step", ylim=(0, 1.03), title="validation examples, answered by generation")
            axes[0, 1].legend(frameon=False)  # where the curves leave room
        figure.savefig(path)
        plt.close(figure)


def _curve(axis: Any, points: Sequence[tuple[float, float]], colour: str, label: str, style: str = "-") -> None:
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, style, color=colour, label=label, markersize=4)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 2.85


def confusion_title(model: str, macro_f1: float) -> str:
    """The title of a confusion matrix; `model` is "base" or "finetuned"."""
    return f"{SHOWN_NAMES[model]}: macro-F1 {macro_f1:.3f}"


def plot_confusion(matrix: Sequence[Sequence[int]], label_words: Sequence[str], path: str, title: str) -> None:
    """Counts by label (rows) and answer (columns, the last for unparsed), coloured by the share of the row."""
    counts = np.asarray(matrix)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    with plt.rc_context(_STYLE):
        size = 2.4 + 0.8 * len(label_words)
        figure, axis = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(counts.shape[1]), [*label_words, "unparsed"], rotation=25)
        axis.set_yticks(range(counts.shape[0]), label_words)
        axis.set(xlabel="answer", ylabel="label", title=title)
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = f"{counts[row, column]:,}\n{shares[row, column]:.0%}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
        axis.spines[:].set_visible(False)
        figure.savefig(path)
        plt.close(figure)


def plot_reliability(models: dict[str, LikelihoodMetrics], path: str, title: str) -> None:
    """Accuracy over the probability of the most likely label, for each model by its name; a point for each bin.

    The larger a point, the more examples it stands for.
    """
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
        axis.plot([0, 1], [0, 1], ":", color=_GREY, label="perfectly calibrated")
        for (name, found), colour in zip(models.items(), (_GREY, _ORANGE), strict=False):
            total = sum(part.num_examples for part in found.bins)
            confidence, accuracy = (
                [getattr(part, what) for part in found.bins] for what in ("confidence", "accuracy")
            )
            sizes = [15 + 250 * part.num_examples / total for part in found.bins]
            label = f"{SHOWN_NAMES[name]}: calibration error {found.calibration_error:.3f}"
            axis.plot(confidence, accuracy, "-", color=colour, linewidth=1, label=label)
            axis.scatter(confidence, accuracy, sizes, color=colour, alpha=0.6)
        axis.set(xlabel="probability of the most likely label", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.03))
        axis.set_title(title)
        axis.legend(frameon=False, loc="upper left", fontsize=9)
        figure.savefig(path)
        plt.close(figure)
