"""Classify texts with a run folder, a published model or adapter, or a model from the Hub.

>>> from tweetdora import Classifier
>>> classify = Classifier("runs/quickstart")
>>> classify(["What a day!"])
[Prediction(label='positive', probabilities={'negative': 0.01, 'neutral': 0.03, 'positive': 0.96}, margin=0.93)]
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from tweetdora.config import EvaluateConfig, Precision
from tweetdora.device import compute_state, use_cpu_threads
from tweetdora.hub import pin_revision, use_cache_if_unreachable
from tweetdora.modeling import check_ids_fit
from tweetdora.processes import check_same
from tweetdora.provenance import environment
from tweetdora.scoring import score_all
from tweetdora.targets import adapter_sha256, decide_decoding, find_eval_target, load_finetuned, load_prompts

log = logging.getLogger("tweetdora.classifier")
_DIGITS = 6


@dataclass(frozen=True)
class Prediction:
    """The most likely label word, each label word's probability, and the margin between the two most likely ones.

    An empty text has no label and no probabilities.
    """

    label: str | None
    probabilities: dict[str, float]
    margin: float | None


class Classifier:
    """Classifies texts by the likelihood of each label word after the prompt that the model was trained with.

    `name_or_path` is a run folder, or a model or adapter in a folder or on the Hub. With several processes
    (accelerate launch), each computes part of the texts, and all of them get all predictions.

    Raises:
        InputError: the model does not exist, or the device cannot compute in that precision.
        HubError: the Hub cannot be reached.
    """

    def __init__(self, name_or_path: str, *, precision: Precision = "auto", batch_size: int = 128) -> None:
        state = compute_state()
        use_cpu_threads(state.device, state.num_processes)
        use_cache_if_unreachable(name_or_path)
        config = EvaluateConfig(precision=precision, batch_size=batch_size)
        self.target = find_eval_target(name_or_path, config)
        self.decoding = decide_decoding(self.target, config, state.device.type)
        use_cache_if_unreachable(self.target.base)
        if state.is_main_process:
            for note in (*self.target.notes, *self.decoding.notes):
                log.warning("%s", note)
        revision = pin_revision(self.target.base, self.target.base_revision)
        tokenizer, self._prompt_tokenizer = load_prompts(self.target, revision)
        self._model, identity = load_finetuned(self.target, revision, self.decoding.precision, state.device)
        check_ids_fit(self._model, tokenizer, self._prompt_tokenizer.prompt_ids(["a"])[0][0])
        self._batch_size = batch_size
        self.label_words = self.target.task.label_words
        self._lock = Lock()  # a web page calls it from several threads, and tokenizers are not thread-safe
        adapter = self.target.adapter_dir
        # Distinguishes these predictions from another model's.
        self.identity: dict[str, Any] = {
            "base": [identity.name_or_path, identity.revision, identity.weights_sha256],
            "adapter": adapter_sha256(adapter) if adapter else None,
            "prompt": [self._prompt_tokenizer.format.head, self._prompt_tokenizer.format.tail, self.label_words],
            "max_length": self.target.task.max_length,
            "precision": self.decoding.precision,
        }
        check_same({**self.identity, "packages": environment().packages})

    def __call__(
        self, texts: str | Sequence[str], on_progress: Callable[[int], None] = lambda done: None
    ) -> list[Prediction]:
        """Predict each text, in order; `on_progress` is called with the size of each finished batch.

        Several threads may call it; their calls run one after the other.
        """
        return self.predict(texts, on_progress)[0]

    def predict(
        self, texts: str | Sequence[str], on_progress: Callable[[int], None] = lambda done: None
    ) -> tuple[list[Prediction], int]:
        """Return the predictions, and the number of texts that were truncated to fit."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        full = [place for place, text in enumerate(texts) if text.strip()]
        found = [Prediction(None, {}, None)] * len(texts)
        if not full:
            return found, 0
        with self._lock:
            scores = score_all(
                self._model,
                self._prompt_tokenizer,
                [texts[place].strip() for place in full],
                batch_size=self._batch_size,
                on_progress=on_progress,
            )
        rows = zip(full, scores.labels.tolist(), scores.probabilities.tolist(), strict=True)
        for place, label, row in rows:
            found[place] = make_prediction(label, row, self.label_words)
        return found, scores.truncated


def make_prediction(label: int, row: Sequence[float], label_words: Sequence[str]) -> Prediction:
    """Build a prediction from a label id and the probabilities, in the order of the label words.

    >>> make_prediction(1, [0.25, 0.75], ["bad", "good"])
    Prediction(label='good', probabilities={'bad': 0.25, 'good': 0.75}, margin=0.5)
    """
    others = max(value for number, value in enumerate(row) if number != label)
    shown = {word: round(value, _DIGITS) for word, value in zip(label_words, row, strict=True)}
    return Prediction(label_words[label], shown, round(max(row[label] - others, 0.0), _DIGITS))
