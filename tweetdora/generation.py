"""Answers by greedy generation, and the label that an answer names."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.data import Rows
from tweetdora.prompts import Encoder, stop_token_ids

UNPARSED = -1  # the class of an answer that names no label word


@dataclass
class Answer:
    """What the model wrote for one row: new tokens only, the stop token not part of the text."""

    text: str
    stopped: bool  # by a stop token, before max_new_tokens ran out
    predicted: int  # class number, or UNPARSED

    def to_dict(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


class LabelParser:
    """Finds the first label word in an answer: whole word, upper or lower case.

    >>> parse = LabelParser(["negative", "neutral", "positive"])
    >>> parse("Neutral, not positive."), parse("neutralitive"), parse("")
    (1, -1, -1)
    """

    def __init__(self, label_words: Sequence[str]) -> None:
        self._classes = {word.strip().casefold(): number for number, word in enumerate(label_words)}
        # Longer words first: of "not funny" and "funny" the one that begins earlier is meant, and at the same place
        # the longer one.
        words = "|".join(re.escape(word) for word in sorted(self._classes, key=len, reverse=True))
        self._pattern = re.compile(rf"(?<!\w)(?:{words})(?!\w)")

    def __call__(self, text: str) -> int:
        """The class number of the first label word, or UNPARSED."""
        found = self._pattern.search(text.casefold())
        return self._classes[found[0]] if found else UNPARSED


def answer_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    rows: Rows,
    label_words: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Answer], float]:
    """Answer every row greedily; the answers in the rows' order, and the seconds it took.

    Prompts of like length are batched together, padded on the left, and only new tokens are read back. With several
    processes each answers a share of the rows, and all of them get all answers.
    """
    started = time.perf_counter()
    with PartialState().split_between_processes(list(range(len(rows)))) as share:
        texts = [rows.texts[index] for index in share]
        answers = _answer_texts(model, tokenizer, encoder, texts, label_words, batch_size, max_new_tokens, on_progress)
    return gather_object(answers), time.perf_counter() - started


def _answer_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    texts: Sequence[str],
    label_words: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None],
) -> list[Answer]:
    parse = LabelParser(label_words)
    prompts, _ = encoder.prompt_ids(texts)
    stop_ids = stop_token_ids(model, tokenizer, encoder.stop_token_id)
    # pad only fills the left of a prompt and what follows a stop token; both are masked or cut off.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
    )
    answers: list[Answer | None] = [None] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            new_ids = _generate(model, [prompts[index] for index in batch], config)
            for index, ids in zip(batch, new_ids, strict=True):
                answers[index] = _read_answer(ids, stop_ids, tokenizer, parse)
            on_progress(len(batch))
    finally:
        model.train(was_training)
    return answers


@torch.no_grad()
def _generate(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """New token ids for each prompt."""
    length = max(map(len, prompts))
    pad = config.pad_token_id
    input_ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])  # (B, T)
    attention_mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # (B, T)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model  # adapter layers stay in it
    # generate() fills what `config` leaves open from the model's own generation config: a repetition penalty shipped
    # with a base model would make the answers something else than greedy.
    shipped, inner.generation_config = inner.generation_config, config
    try:
        output = inner.generate(
            input_ids=input_ids.to(inner.device), attention_mask=attention_mask.to(inner.device)
        )  # (B, T + new)
    finally:
        inner.generation_config = shipped
    return output[:, length:].tolist()


def _read_answer(
    ids: list[int], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, parse: LabelParser
) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=False)
    return Answer(text=text, stopped=end is not None, predicted=parse(text))
