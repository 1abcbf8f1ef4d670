"""Pictures: files that can be opened, of a size to look at, and other ones for other data."""

import hashlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from sample_records import sample_likelihood

from tweetdora.plots import drawable, plot_bars, plot_confusion, plot_reliability, plot_training

WORDS = ["negative", "neutral", "positive"]
MATRIX = [[5, 1, 0, 0], [2, 3, 1, 1], [0, 0, 9, 0]]
LOSSES = [{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}]
VALIDATION = {"step": 20, "eval_loss": 1.5, "eval_macro_f1": 0.5, "eval_parse_rate": 0.9, "eval_eos_rate": 0.8}


def picture(path: Path) -> np.ndarray:
    """Its points; checked to be a PNG by what is in it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def training(tmp_path: Path, history: list[dict[str, Any]], title: str = "a run") -> np.ndarray:
    plot_training(history, str(tmp_path / "training.png"), title)
    return picture(tmp_path / "training.png")


def confusion(tmp_path: Path, matrix: Any, words: list[str] = WORDS, title: str = "finetuned") -> np.ndarray:
    plot_confusion(matrix, words, str(tmp_path / "confusion.png"), title)
    return picture(tmp_path / "confusion.png")


def digest(points: np.ndarray) -> str:
    return hashlib.sha256(points.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict[str, str]:
    """Digests of the pictures that the others are compared with."""
    folder = tmp_path_factory.mktemp("usual")
    history = [*LOSSES, VALIDATION]
    return {"training": digest(training(folder, history)), "confusion": digest(confusion(folder, MATRIX))}


def test_training_curves_are_eight_by_three_inches_at_150_dots(tmp_path):
    """A card is about 700 points wide: 10-point text is 12 points high there."""
    assert training(tmp_path, [*LOSSES, VALIDATION]).shape == (510, 1200, 3)


def test_without_validation_there_is_one_panel(tmp_path):
    assert training(tmp_path, LOSSES).shape == (510, 600, 3)


def test_a_confusion_matrix_grows_with_its_classes(tmp_path):
    three = confusion(tmp_path, MATRIX)
    five = confusion(tmp_path, np.eye(5, 6, dtype=int), list("abcde"))
    assert three.shape == (585, 690, 3)
    assert five.shape == (795, 900, 3)


@pytest.mark.parametrize("make", [lambda path: training(path, LOSSES), lambda path: confusion(path, MATRIX)])
def test_pictures_are_neither_empty_nor_transparent(make, tmp_path):
    points = make(tmp_path)
    (path,) = tmp_path.glob("*.png")
    with Image.open(path) as image:
        assert image.convert("RGBA").getextrema()[3] == (255, 255)
    assert (points[0, 0] == 255).all(), "the corner is white"
    assert 0.01 < (points != 255).any(-1).mean() < 0.9


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([LOSSES[0], {"step": 20, "loss": 1.2}, VALIDATION], id="loss"),
        pytest.param([*LOSSES, {**VALIDATION, "eval_loss": 1.4}], id="validation loss"),
        pytest.param([*LOSSES, {**VALIDATION, "eval_macro_f1": 0.6}], id="macro-F1"),
        pytest.param([*LOSSES, {**VALIDATION, "eval_parse_rate": 0.6}], id="parse rate"),
        pytest.param([*LOSSES, {**VALIDATION, "eval_eos_rate": 0.6}], id="stop rate"),
        pytest.param([*LOSSES, {**VALIDATION, "step": 15}], id="step"),
    ],
)
def test_training_curves_show_another(history, usual, tmp_path):
    assert digest(training(tmp_path, history)) != usual["training"]


def test_training_curves_show_the_name_of_the_run(usual, tmp_path):
    assert digest(training(tmp_path, [*LOSSES, VALIDATION], "another run")) != usual["training"]


@pytest.mark.parametrize("cell", [(0, 0), (1, 3)])
def test_a_confusion_matrix_shows_every_count(cell, usual, tmp_path):
    other = np.array(MATRIX)
    other[cell] += 1
    assert digest(confusion(tmp_path, other)) != usual["confusion"]


def test_a_confusion_matrix_shows_counts_and_not_only_shares(usual, tmp_path):
    assert digest(confusion(tmp_path, 2 * np.array(MATRIX))) != usual["confusion"]


def test_a_confusion_matrix_shows_its_label_words(usual, tmp_path):
    assert digest(confusion(tmp_path, MATRIX, ["bad", "neutral", "positive"])) != usual["confusion"]


def test_the_same_data_give_the_same_picture(usual, tmp_path):
    """The companion: what differs above is the data, not the drawing."""
    assert digest(confusion(tmp_path, MATRIX)) == usual["confusion"]
    assert digest(training(tmp_path, [*LOSSES, VALIDATION])) == usual["training"]


def test_a_single_logged_step_is_seen(tmp_path):
    """A line through one point has no length."""
    blue = np.array([0x21, 0x66, 0xAC])
    panel = training(tmp_path, LOSSES[:1])[40:430, 120:400]  # without its legend
    assert (np.abs(panel.astype(int) - blue).sum(-1) < 60).any()


@pytest.mark.parametrize("history", [[], [VALIDATION], [{"step": 3, "train_loss": 1.0, "train_runtime": 2.0}]])
def test_a_run_too_short_to_log_a_loss_is_drawn_all_the_same(history, tmp_path):
    assert training(tmp_path, history).shape[0] == 510


def test_a_class_without_rows_is_drawn_without_dividing_by_its_zero(tmp_path):
    confusion(tmp_path, [[0, 0, 0, 0], [1, 2, 0, 0], [0, 0, 3, 1]])


def test_a_rate_is_seen_behind_another_that_equals_it(tmp_path):
    """Light blue and grey dashes, both at 100 %."""
    whole = {"eval_parse_rate": 1.0, "eval_eos_rate": 1.0, "eval_macro_f1": 0.5}
    panel = training(tmp_path, [*LOSSES, {**VALIDATION, **whole, "step": 10}, {**VALIDATION, **whole}])[:100, 650:]
    for colour in ((0x92, 0xC5, 0xDE), (0x76, 0x76, 0x76)):
        assert (np.abs(panel.astype(int) - np.array(colour)).sum(-1) < 30).sum() > 100, colour


def test_a_character_that_no_font_has_is_shown_by_its_code_point(tmp_path):
    assert drawable("a $ é \u0378") == "a $ é <U+0378>"
    other = confusion(tmp_path, MATRIX, ["\u0378", "neutral", "positive"])  # without matplotlib's warning
    assert digest(other) != digest(confusion(tmp_path, MATRIX, ["\u0379", "neutral", "positive"]))


def test_a_dollar_in_a_label_is_a_dollar(tmp_path):
    """Not the beginning of a formula, which could also be a wrong one."""
    with_dollars = confusion(tmp_path, MATRIX, ["$x_{$", "$a$", "a"])
    assert digest(with_dollars) != digest(confusion(tmp_path, MATRIX, ["$x_{$", "a", "a"]))


def test_bars_show_values_intervals_and_kinds(tmp_path):
    def bars(*changed: Any) -> str:
        name, value, interval, kind = changed
        given = [("before", 0.05, (0.04, 0.06), "base"), (name, value, interval, kind)]
        plot_bars(given, str(tmp_path / "bars.png"), "a title", "macro-F1")
        return digest(picture(tmp_path / "bars.png"))

    usual = bars("after", 0.7, (0.69, 0.71), "finetuned")
    assert picture(tmp_path / "bars.png").shape == (228, 1050, 3)
    others = [("then", 0.7, (0.69, 0.71), "finetuned"), ("after", 0.6, (0.69, 0.71), "finetuned")]
    others += [("after", 0.7, (0.6, 0.71), "finetuned"), ("after", 0.7, (0.69, 0.71), "other")]
    assert usual not in [bars(*other) for other in others]
    assert bars("after", 0.7, (0.69, 0.71), "finetuned") == usual


def test_plots_are_closed(tmp_path):
    plt.close("all")
    training(tmp_path, LOSSES)
    confusion(tmp_path, MATRIX)
    assert plt.get_fignums() == []


def test_pictures_need_no_screen():
    assert matplotlib.get_backend().lower() == "agg"


def test_the_reliability_of_two_models_is_drawn(tmp_path):
    path = tmp_path / "reliability.png"
    plot_reliability({"base": sample_likelihood(0.3), "finetuned": sample_likelihood(0.6)}, str(path), "small, test")
    assert path.read_bytes().startswith(b"\x89PNG")
