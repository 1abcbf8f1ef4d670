"""What a model is compared with: TF-IDF with logistic regression, and VADER."""

import importlib.util
import sys

import pytest

from tweetdora import other_classifiers as module
from tweetdora.data import make_examples
from tweetdora.other_classifiers import TFIDF, VADER, other_classifiers
from tweetdora.records import Bootstrap

BOOTSTRAP = Bootstrap(100, 0)
SENTIMENT = ["negative", "neutral", "positive"]
TRAIN = make_examples(["a bad day", "the plain news", "a good trip"] * 5, [0, 1, 2] * 5)
TEST = make_examples(["what a bad trip", "plain news", "so good", "good"], [0, 1, 2, 0])


def test_tfidf_learns_from_the_training_examples():
    found, missing = other_classifiers(TRAIN, TEST, ["a", "b", "c"], BOOTSTRAP)
    (one,) = found
    assert (one.name, missing) == (TFIDF, []) and one.version.startswith("scikit-learn 1.")
    assert one.accuracy == 0.75, "the last one is labelled otherwise"
    assert one.macro_f1_interval[0] <= one.macro_f1 <= one.macro_f1_interval[1]


def test_vader_is_asked_for_sentiment_in_whatever_order_the_words_come():
    pytest.importorskip("vaderSentiment")
    texts = ["I love this great day", "the table is brown", "this is horrible"]
    for words in (SENTIMENT, ["Positive", "neutral", "negative"]):
        labels = [[word.lower() for word in words].index(word) for word in ("positive", "neutral", "negative")]
        found, _ = other_classifiers(None, make_examples(texts, labels), words, BOOTSTRAP)
        assert [(one.name, one.accuracy) for one in found] == [(VADER, 1.0)]


def test_of_a_model_whose_training_is_not_known_nothing_is_learned():
    assert other_classifiers(None, TEST, ["a", "b", "c"], BOOTSTRAP) == ([], [])


def test_what_is_not_installed_is_said(monkeypatch):
    original = importlib.util.find_spec
    hidden = ("sklearn", "vaderSentiment")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name in hidden else original(name))
    found, missing = other_classifiers(TRAIN, TEST, SENTIMENT, BOOTSTRAP)
    assert found == []
    assert missing == [
        "TF-IDF and logistic regression was not measured for comparison; to add it: pip install scikit-learn",
        "VADER was not measured for comparison; to add it: pip install vaderSentiment",
    ]


def test_nothing_is_imported_before_it_is_asked_for():
    import subprocess

    code = "import sys, tweetdora.other_classifiers; assert 'sklearn.linear_model' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
