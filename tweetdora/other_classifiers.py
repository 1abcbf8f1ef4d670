"""Simple classifiers on the same examples, which a model of this size has to beat.

Each needs a package that nothing else here needs. If the package is missing, the classifier is left out.
"""

import importlib.metadata
import importlib.util
from collections.abc import Sequence

from tweetdora.config import LABEL_WORDS, normalize_label
from tweetdora.data import Examples
from tweetdora.metrics import INTERVAL_METRICS, bootstrap_intervals, confusion_matrix, scores
from tweetdora.records import Bootstrap, OtherClassifier

TFIDF, VADER = "TF-IDF and logistic regression", "VADER"
_PACKAGES = {TFIDF: ("sklearn", "scikit-learn"), VADER: ("vaderSentiment", "vaderSentiment")}  # module, distribution
_VADER_NEUTRAL = 0.05  # the thresholds of its README
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters; and their marks.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
_MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece"
    "\u102b-\u103e\u17b4-\u17d3\u3099\u309a\uff9e\uff9f"
)
# Two or more letters or digits, as in scikit-learn, but each letter of such a script by itself: pairs stand for words.
_TOKEN = rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|[^\W{_UNSPACED}]{{2,}}"


def other_classifiers(
    train: Examples | None, examples: Examples, label_words: Sequence[str], bootstrap: Bootstrap
) -> tuple[list[OtherClassifier], list[str]]:
    """Score the classifiers that fit the task and are installed; for the others, return why they are missing.

    `train` holds the run's training examples; None if they are unknown.
    """
    wanted = [TFIDF] * (train is not None) + [VADER] * _is_sentiment(label_words)
    found, missing = [], []
    for name in wanted:
        module, distribution = _PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            missing.append(f"{name} was not measured for comparison; to add it: pip install {distribution}")
            continue
        if name == TFIDF and train is not None:
            try:
                predictions = _tfidf(train, examples)
            except ValueError as error:  # training examples of one label, or without words
                missing.append(f"{name} was not measured for comparison: {error}")
                continue
        else:
            predictions = _vader(examples, label_words)
        matrix = confusion_matrix(examples.labels, predictions, len(label_words))
        intervals = bootstrap_intervals(examples.labels, predictions, len(label_words), bootstrap)
        found.append(
            OtherClassifier(
                **{metric: float(scores(matrix)[metric]) for metric in INTERVAL_METRICS},
                name=name,
                version=f"{distribution} {importlib.metadata.version(distribution)}",
                macro_f1_interval=intervals.macro_f1,
            )
        )
    return found, missing


def _is_sentiment(label_words: Sequence[str]) -> bool:
    return {normalize_label(word) for word in label_words} == set(LABEL_WORDS)


def _tfidf(train: Examples, examples: Examples) -> list[int]:
    """Logistic regression with balanced class weights on TF-IDF of words and word pairs.

    C and the weights were chosen on the validation split of the quickstart's tweets (LOG.md).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    pipeline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=_TOKEN),
        LogisticRegression(C=10, max_iter=1000, class_weight="balanced"),
    )
    pipeline.fit(train.texts, train.labels)
    return [int(label) for label in pipeline.predict(examples.texts)]


def _vader(examples: Examples, label_words: Sequence[str]) -> list[int]:
    """VADER, an English sentiment lexicon built for tweets (Hutto and Gilbert, ICWSM 2014); nothing is trained."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    numbers = {normalize_label(word): number for number, word in enumerate(label_words)}

    def label(text: str) -> str:
        """The normalized label word."""
        compound = analyzer.polarity_scores(text)["compound"]
        return "positive" if compound >= _VADER_NEUTRAL else "negative" if compound <= -_VADER_NEUTRAL else "neutral"

    return [numbers[label(text)] for text in examples.texts]
