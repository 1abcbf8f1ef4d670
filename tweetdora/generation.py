"""Answers by greedy generation, and the label that an answer names."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tweetdora.attention import is_packable
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
    inner = model.get_base_model() if isinstance(model, PeftModel) else model  # adapter layers stay in it
    way = generate_sharing_prefix if is_packable(inner) else generate_plainly
    generate = partial(way, inner, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    answers: list[Answer | None] = [None] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(longest_first), batch_size):
            batch = longest_first[start : start + batch_size]
            new_ids = generate([prompts[index] for index in batch])
            for index, ids in zip(batch, new_ids, strict=True):
                answers[index] = _read_answer(ids, stop_ids, tokenizer, parse)
            on_progress(len(batch))
    finally:
        model.train(was_training)
    return answers


@torch.no_grad()
def generate_sharing_prefix(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """New token ids for each prompt, greedily; what all prompts begin with is computed once for all of them.

    The keys and values of the prefix are repeated for each prompt, then the rest of each prompt follows, padded on
    its left:

        prefix | <pad> great day |        attention_mask  1 1 1 0 1 1
        prefix | what a sad  day |                        1 1 1 1 1 1

    A row that has written a stop token leaves the batch.
    """
    prefix = _prefix_length(model.config, prompts, max_new_tokens)
    own = [prompt[prefix:] for prompt in prompts]
    longest = max(map(len, own))
    cache = DynamicCache(config=model.config)
    if prefix:
        first = torch.tensor([prompts[0][:prefix]], device=model.device)
        model(input_ids=first, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.batch_repeat_interleave(len(prompts))
    padding = [longest - len(ids) for ids in own]
    rows = list(zip(own, padding, strict=True))
    input_ids = torch.tensor([[stop_ids[0]] * pad + ids for ids, pad in rows], device=model.device)  # (B, L)
    mask = torch.tensor([[1] * prefix + [0] * pad + [1] * len(ids) for ids, pad in rows], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, prefix:]  # (B, L)
    new_ids: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    while True:
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (B, V)
        chosen = logits.argmax(-1)  # (B,)
        for row, token in zip(alive, chosen.tolist(), strict=True):
            new_ids[row].append(token)
        going = [index for index, row in enumerate(alive) if new_ids[row][-1] not in stop_ids]
        if not going or len(new_ids[alive[0]]) == max_new_tokens:
            return new_ids
        if len(going) < len(alive):
            alive = [alive[index] for index in going]
            keep = torch.tensor(going, device=model.device)
            cache.batch_select_indices(keep)
            mask, positions, chosen = mask[keep], positions[keep], chosen[keep]
        input_ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _prefix_length(config: PretrainedConfig, prompts: list[list[int]], max_new_tokens: int) -> int:
    """How many tokens all prompts begin with, one token at least left to each."""
    window = getattr(config, "sliding_window", None)
    if window is not None and max(map(len, prompts)) + max_new_tokens > window:
        return 0  # a window counts places, and the padding behind the prefix would take some of them
    limit = min(map(len, prompts)) - 1
    return next(
        (place for place in range(limit) if any(prompt[place] != prompts[0][place] for prompt in prompts)), limit
    )


@torch.no_grad()
def generate_plainly(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """New token ids for each prompt by transformers' own generate(), for models that the other way does not fit."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    rows = list(zip(prompts, padding, strict=True))
    # generate() fills what `config` leaves open from the model's own generation config: a repetition penalty shipped
    # with a base model would make the answers something else than greedy.
    shipped, model.generation_config = model.generation_config, config
    try:
        output = model.generate(
            input_ids=torch.tensor([[stop_ids[0]] * pad + prompt for prompt, pad in rows], device=model.device),
            attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding], device=model.device),
        )  # (B, T + new)
    finally:
        model.generation_config = shipped
    return output[:, length:].tolist()


def _read_answer(
    ids: list[int], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, parse: LabelParser
) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=False)
    return Answer(text=text, stopped=end is not None, predicted=parse(text))
