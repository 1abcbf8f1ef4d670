"""What a model is compared with: TF-IDF with logistic regression, and VADER."""

import importlib.util

import forked
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


@pytest.mark.parametrize(
    ("bad", "good", "others"),
    [
        ("\u7cdf\u7cd5", "\u5f88\u597d", "\u4eca\u5929\u7684\u7535\u5f71\u98df\u7269\u670b\u53cb"),
        ("\u0e41\u0e22\u0e48", "\u0e14\u0e35\u0e21\u0e32\u0e01", "\u0e27\u0e31\u0e19\u0e19\u0e35\u0e49"),
    ],
    ids=["Chinese", "Thai"],
)
def test_tfidf_finds_words_where_no_space_is_between_them(bad, good, others):
    """Taken as one token, no text of the second half has been seen before."""
    texts = [others[start:] + word + others[:start] for start in range(4) for word in (bad, good)]
    train, test = (make_examples(part, [0, 1] * 2) for part in (texts[:4], texts[4:]))
    (one,), _ = other_classifiers(train, test, ["a", "b"], BOOTSTRAP)
    assert one.accuracy == 1.0


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\u4eba\u3005\u30fb\u4eca\u3002AI", ["\u4eba", "\u3005", "\u4eca", "AI"]),
        (
            "\u0e41\u0e22\u0e48\u0e3f5",
            ["\u0e41", "\u0e22\u0e48"],
        ),  # a tone mark stays with its letter, a currency sign is none
        ("\uff76\uff9e\uff77", ["\uff76\uff9e", "\uff77"]),  # narrow katakana
    ],
)
def test_letters_are_tokens_with_their_marks_and_signs_are_none(text, tokens):
    from sklearn.feature_extraction.text import TfidfVectorizer

    assert TfidfVectorizer(token_pattern=module._TOKEN).build_tokenizer()(text) == tokens


def test_in_other_scripts_tokens_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    for text in [
        "It's 20 below, @user_1!",
        "d\u00e9j\u00e0-vu \u00e9t\u00e9",
        "\u043d\u043e\u0432\u044b\u0439 \u0434\u0435\u043d\u044c",
        "\uc88b\uc740 \ub0a0",
        "\u064a\u0648\u0645 \u062c\u0645\u064a\u0644",
    ]:
        ours = TfidfVectorizer(token_pattern=module._TOKEN).build_tokenizer()
        assert ours(text) == TfidfVectorizer().build_tokenizer()(text)


@pytest.mark.parametrize(
    ("texts", "labels", "why"),
    [(["a bad day"] * 4, [1] * 4, "at least 2 classes"), (["!", "?"] * 2, [0, 1] * 2, "empty vocabulary")],
)
def test_what_cannot_be_learned_is_left_out_with_the_reason(texts, labels, why):
    found, (said,) = other_classifiers(make_examples(texts, labels), TEST, ["a", "b", "c"], BOOTSTRAP)
    assert found == [] and said.startswith(f"{TFIDF} was not measured for comparison: ") and why in said


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


def test_nothing_is_imported_before_it_is_asked_for(tmp_path):
    """The server of forked scripts has imported evaluate.py's modules, and nothing else."""
    script = tmp_path / "look.py"
    script.write_text(
        "import sys; print('tweetdora.other_classifiers' in sys.modules, 'sklearn.linear_model' in sys.modules)\n"
    )
    assert forked.start([script], tmp_path).end() == "True False\n"
