"""Plots: training curves, confusion matrices, calibration, and comparisons of runs."""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # files only: a training machine has no screen
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from tweetdora.records import SHOWN_NAMES, LikelihoodMetrics

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",  # a transparent picture would be unreadable on a dark page
    "savefig.dpi": 150,
    "axes.titlesize": 11,
    "text.parse_math": False,  # a "$" in a label is a dollar
}
_FONT = "DejaVu Sans"  # comes with matplotlib
_BLUE, _LIGHT_BLUE, _ORANGE, _GREY = "#2166ac", "#92c5de", "#d95f02", "#767676"
BAR_COLOURS = {"base": _GREY, "other": "#c7c7c7", "finetuned": _ORANGE}


@functools.cache
def _font_with(character: str) -> str | None:
    """Return an installed font family that can draw a character, matplotlib's own first; None if there is none."""
    fonts = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name != _FONT, font.name))
    for font in fonts:
        try:
            face = font_manager.get_font(font.fname)
        except (OSError, RuntimeError):  # a broken file, or a format that matplotlib cannot read
            continue
        # It cannot draw bitmap fonts, as of emoji. The Last Resort font has a placeholder for every character.
        if face.scalable and ord(character) in face.get_charmap() and "Last Resort" not in font.name:
            return font.name
    return None


def _style(texts: Iterable[str]) -> Any:
    """Return the style for a plot with these texts, and the fonts that they need."""
    families = dict.fromkeys([_FONT, *filter(None, map(_font_with, sorted(set("".join(texts)))))])
    return {**_STYLE, "font.family": [*families]}


def drawable(text: str) -> str:
    """Return a text with its code points in place of characters that no installed font has.

    >>> drawable("good \u0378")
    'good <U+0378>'
    """
    return "".join(sign if sign.isspace() or _font_with(sign) else f"<U+{ord(sign):04X}>" for sign in text)


def plot_training(log_history: Sequence[dict[str, Any]], path: str, title: str) -> None:
    """Plot training and validation loss over steps and, if there are validations, macro-F1 and rates next to it."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [entry for entry in log_history if "eval_loss" in entry]
    title = drawable(title)
    with plt.rc_context(_style([title])):
        columns = 2 if validation else 1
        figure, axes = plt.subplots(1, columns, figsize=(4 * columns, 3.4), squeeze=False, layout="constrained")
        _curve(axes[0, 0], train, _BLUE, "training", "-")
        _curve(axes[0, 0], [(entry["step"], entry["eval_loss"]) for entry in validation], _ORANGE, "validation", "o-")
        axes[0, 0].set(xlabel="step", ylabel="loss per supervised token", ylim=(0, None), title=title)
        if train or validation:
            axes[0, 0].legend(frameon=False)
        if validation:
            # Both rates are often 100 %: a thin line on a broad one.
            for name, colour, label, style, width in (
                ("eval_parse_rate", _LIGHT_BLUE, "parse rate", "-", 6),
                ("eval_eos_rate", _GREY, "EOS rate", "--", 1.5),
                ("eval_macro_f1", _ORANGE, "macro-F1", "o-", 1.5),
            ):
                _curve(axes[0, 1], [(entry["step"], entry[name]) for entry in validation], colour, label, style, width)
            axes[0, 1].set(xlabel="step", ylim=(0, 1.05), title="validation, by generation")
            axes[0, 1].legend(frameon=False)  # where the curves leave space
        figure.savefig(path)
        plt.close(figure)


def _curve(
    axis: Any, points: Sequence[tuple[float, float]], colour: str, label: str, style: str, width: float = 1.5
) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        marker = {} if "o" in style or len(points) > 1 else {"marker": "o"}  # a line through one point has no length
        axis.plot(steps, values, style, color=colour, label=label, linewidth=width, markersize=4, **marker)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))  # no step 2.85


def confusion_title(model: str, macro_f1: float) -> str:
    """Return the title of a confusion matrix; `model` is "base" or "finetuned"."""
    return f"{SHOWN_NAMES[model]}: macro-F1 {macro_f1:.3f}"


def plot_confusion(matrix: Sequence[Sequence[int]], label_words: Sequence[str], path: str, title: str) -> None:
    """Plot counts by label (rows) and answer (columns; the last is unparsed), coloured by their share of the row."""
    counts = np.asarray(matrix)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    words, title = [drawable(word) for word in label_words], drawable(title)
    with plt.rc_context(_style([*words, title])):
        size = 1.8 + 0.7 * len(words)
        figure, axis = plt.subplots(figsize=(size + 0.7, size), layout="constrained")
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(counts.shape[1]), [*words, "unparsed"], rotation=25)
        axis.set_yticks(range(counts.shape[0]), words)
        axis.set(xlabel="answer", ylabel="label", title=title)
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if shares[row, column] > 0.55 else "black"
            text = f"{counts[row, column]:,}\n{shares[row, column]:.0%}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
        axis.spines[:].set_visible(False)
        figure.savefig(path)
        plt.close(figure)


def plot_reliability(models: dict[str, LikelihoodMetrics], path: str, title: str) -> None:
    """Plot accuracy over the probability of the most likely label, one line per model and one point per bin.

    A larger point stands for more examples.
    """
    title = drawable(title)
    with plt.rc_context(_style([title])):
        figure, axis = plt.subplots(figsize=(7.4, 3.4), layout="constrained")
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
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
        figure.savefig(path)
        plt.close(figure)


def plot_groups(
    groups: Sequence[tuple[str, Any, Sequence[float], float, tuple[float, float]]],
    path: str,
    title: str,
    x: str | None,
) -> None:
    """Plot groups of runs: name, value of the setting `x`, macro-F1 of each run, mean, 95 % interval.

    With `x`, one line per name over the setting, on a logarithmic axis if its values span a factor of 8 or more.
    Without `x`, one row per group, the best on top.
    """
    title, groups = drawable(title), [(drawable(name), *others) for name, *others in groups]
    with plt.rc_context(_style([title, *(group[0] for group in groups)])):
        if x is None:
            _rows_of_groups(groups, path, title)
        else:
            _lines_of_groups(groups, path, title, x)


def plot_bars(
    bars: Sequence[tuple[str, float, tuple[float, float] | None, str]], path: str, title: str, label: str
) -> None:
    """Plot horizontal bars, top to bottom: name, value, 95 % interval or None, and kind (a key of BAR_COLOURS)."""
    title, names = drawable(title), [drawable(bar[0]) for bar in bars]
    with plt.rc_context(_style([title, *names])):
        figure, axis = plt.subplots(figsize=(7, 0.8 + 0.36 * len(bars)), layout="constrained")
        for place, (_, value, interval, kind) in enumerate(bars):
            axis.barh(place, value, 0.72, color=BAR_COLOURS[kind])
            if interval is not None:
                axis.plot(interval, [place, place], "-", color="black", linewidth=1.5)
            end = max(value, interval[1] if interval else 0)
            axis.text(end + 0.012, place, f"{value:.2f}", va="center", fontsize=10)
        axis.set_yticks(range(len(bars)), names)
        axis.tick_params(axis="y", length=0)
        axis.set(xlabel=label, title=title, xlim=(0, 1))
        axis.invert_yaxis()
        figure.savefig(path)
        plt.close(figure)


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
