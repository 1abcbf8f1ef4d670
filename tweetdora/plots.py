"""Plots of a run: curves of the training, and confusion matrices and calibration of base and fine-tuned model."""

import itertools
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


def plot_groups(
    groups: Sequence[tuple[str, Any, Sequence[float], float, tuple[float, float]]],
    path: str,
    title: str,
    x: str | None,
) -> None:
    """Groups of runs: name, value of the setting `x`, macro-F1 of each run, mean, 95 % interval.

    With `x` a line for each name over the setting, on a logarithmic axis where it is a number that grows by factors;
    without, a row for each group, the best one on top.
    """
    with plt.rc_context(_STYLE):
        if x is None:
            _rows_of_groups(groups, path, title)
        else:
            _lines_of_groups(groups, path, title, x)


def _rows_of_groups(groups: Any, path: str, title: str) -> None:
    ranked = sorted(groups, key=lambda group: group[3])
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.38 * len(ranked)), layout="constrained")
    for place, (_, _, values, mean, (low, high)) in enumerate(ranked):
        axis.plot([low, high], [place, place], "-", color=_BLUE, linewidth=5, alpha=0.25, solid_capstyle="butt")
        axis.plot(values, [place] * len(values), "o", color=_ORANGE, markersize=4, alpha=0.7)
        axis.plot([mean], [place], "|", color=_BLUE, markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(ranked)), [group[0] for group in ranked])
    axis.set(xlabel="macro-F1: runs, their mean, 95 % interval of it", title=title, ylim=(-0.6, len(ranked) - 0.4))
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path)
    plt.close(figure)


def _lines_of_groups(groups: Any, path: str, title: str, x: str) -> None:
    names = list(dict.fromkeys(group[0] for group in groups))
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name, colour in zip(names, itertools.cycle((_BLUE, _ORANGE, _GREY, "#1b7837", "#762a83")), strict=False):
        own = sorted((group for group in groups if group[0] == name), key=lambda group: group[1])
        places = [group[1] for group in own]
        low, high = ([group[4][side] for group in own] for side in (0, 1))
        axis.fill_between(places, low, high, color=colour, alpha=0.15)
        axis.plot(places, [group[3] for group in own], "-", color=colour, label=name)
        for place, group in zip(places, own, strict=True):
            axis.plot([place] * len(group[2]), group[2], "o", color=colour, markersize=4)
    values = [group[1] for group in groups]
    if min(values) > 0 and max(values) >= 8 * min(values):
        axis.set_xscale("log")
        axis.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
        axis.minorticks_off()
    axis.set(xlabel=x, ylabel="macro-F1", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)
