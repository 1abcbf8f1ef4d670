"""Generate answers greedily, and find the label that an answer names."""

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tweetdora.attention import ATTENTION, PackedKVCache
from tweetdora.config import normalize_label
from tweetdora.data import Examples
from tweetdora.packing import pack, prefix_length
from tweetdora.prompts import PromptTokenizer, stop_token_ids

_LEAVE = 0.75  # stopped rows leave a batch once at most this share of it is unfinished
# Prefixes of the letters' Unicode names. Korean has spaces, but endings are attached to words.
_SCRIPTS_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
UNPARSED = -1  # the label id of a generation that names no label word


@dataclass(frozen=True)
class Generation:
    """What the model wrote for one example: only new tokens, without the stop token."""

    text: str
    stopped: bool  # by a stop token, before max_new_tokens ran out
    predicted: int  # label id, or UNPARSED


class LabelParser:
    """Find the first label word in a text: as a whole word, in upper or lower case, in any encoding of accents.

    >>> parse = LabelParser(["negative", "neutral", "positive"])
    >>> parse("Neutral, not positive."), parse("neutralitive"), parse("")
    (1, -1, -1)
    >>> LabelParser(["否定", "肯定"])("这是肯定的。")  # this script puts nothing between words
    1
    """

    def __init__(self, label_words: Sequence[str]) -> None:
        self._label_ids = {normalize_label(word): number for number, word in enumerate(label_words)}
        # Longer words first. Of "not funny" and "funny", the one that starts earlier wins, and at the same position
        # the longer one.
        self._words = sorted(self._label_ids, key=len, reverse=True)
        self._start = re.compile("|".join(re.escape(word) for word in self._words))

    def __call__(self, text: str) -> int:
        """The label id of the first label word, or UNPARSED."""
        text = normalize_label(text)
        found = self._start.search(text)
        while found:
            for word in self._words:
                if text.startswith(word, found.start()) and _is_whole(text, found.start(), found.start() + len(word)):
                    return self._label_ids[word]
            found = self._start.search(text, found.start() + 1)
        return UNPARSED


def _is_whole(text: str, start: int, end: int) -> bool:
    """True if text[start:end] is not part of a longer word."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (_joins(before, text[start]) or _joins(text[end - 1], after))


def _joins(left: str, right: str) -> bool:
    """True if two neighbouring characters belong to one word, as letters, digits and the marks on them do.

    In scripts that put no space between words, or none before an ending, neighbouring letters prove nothing.
    """
    if right and unicodedata.category(right).startswith("M"):
        return True  # an accent or vowel sign on the letter before it
    letters = bool(left) and bool(right) and _is_of_a_word(left) and _is_of_a_word(right)
    return letters and not (_has_no_spaces(left) or _has_no_spaces(right))


def _is_of_a_word(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _has_no_spaces(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_SCRIPTS_WITHOUT_SPACES)


def generate_all(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokenizer: PromptTokenizer,
    examples: Examples,
    label_words: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
    together: bool = False,
) -> tuple[list[Generation | None], float]:
    """Answer every example greedily; return the generations in the examples' order, and the seconds it took.

    Prompts of similar length are batched together, and only new tokens are read back. With several processes, each
    answers a share of the examples, and all of them get all generations. A model that is sharded over them answers
    `together`: each process computes all examples. `stop` is called before each batch; once it returns True, the
    remaining examples get None.
    """
    started = time.perf_counter()

    def answer(texts: Sequence[str]) -> list[Generation | None]:
        """This process's generations for some texts."""
        return _generate_texts(
            model, tokenizer, prompt_tokenizer, texts, label_words, batch_size, max_new_tokens, on_progress, stop
        )

    if together:
        return answer(examples.texts), time.perf_counter() - started
    with PartialState().split_between_processes(list(range(len(examples)))) as share:
        generations = answer([examples.texts[index] for index in share])
    return gather_object(generations), time.perf_counter() - started


def _generate_texts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokenizer: PromptTokenizer,
    texts: Sequence[str],
    label_words: Sequence[str],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None],
    stop: Callable[[], bool],
) -> list[Generation | None]:
    parse = LabelParser(label_words)
    prompts, _ = prompt_tokenizer.prompt_ids(texts)
    stop_ids = stop_token_ids(model, tokenizer, prompt_tokenizer.stop_token_id)
    inner: Any = (
        model.get_base_model() if isinstance(model, PeftModel) else model
    )  # it still contains the adapter layers
    way = generate_packed if inner.config._attn_implementation == ATTENTION else generate_padded
    generate = partial(way, inner, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    generations: list[Generation | None] = [None] * len(prompts)
    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(longest_first), batch_size):
            if stop():
                break
            batch = longest_first[start : start + batch_size]
            new_ids = generate([prompts[index] for index in batch])
            for index, ids in zip(batch, new_ids, strict=True):
                generations[index] = _decode_generation(ids, stop_ids, tokenizer, parse)
            on_progress(len(batch))
    finally:
        model.train(was_training)
    return generations


@torch.no_grad()
def generate_packed(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Generate new token ids for each prompt greedily; the prompts' shared prefix is computed only once.

    The prompts form one packed batch, as in training (see packing.PackedCollator), and so do the new tokens of a step,
    one per row:

        prompts   [<system prompt> great day <answer:> what a sad day <answer:>]      1 x T
        step 1    [positive negative]                                                 1 x N
        step 2    [<stop> <stop>]

    Rows that have written a stop token leave the batch, at least a quarter of it at a time, because the other rows'
    keys and values are copied then.
    """
    logits, cache, positions = prefill(model, prompts)
    new_ids: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt number of each row in the batch
    while True:
        chosen = _argmax(logits)  # (N,)
        going = _append_tokens(new_ids, rows, chosen.tolist(), stop_ids)
        if not going or len(new_ids[rows[going[0]]]) == max_new_tokens:
            return new_ids
        if len(going) <= _LEAVE * len(rows):
            rows = [rows[place] for place in going]
            keep = torch.tensor(going, device=model.device)
            cache.keep(keep)
            positions, chosen = positions[:, keep], chosen[keep]
        logits = _decode_step(model, chosen, positions, cache)
        positions = positions + 1


def prefill(model: PreTrainedModel, prompts: list[list[int]]) -> tuple[torch.Tensor, PackedKVCache, torch.Tensor]:
    """Logits (N, V) of each prompt's first new token, the prompts' keys and values, and that position (1, N)."""
    prefix = prefix_length(prompts)
    own = [prompt[prefix:] for prompt in prompts]
    cache = PackedKVCache()
    batch, starts = pack(prompts, prefix)
    batch = send_to_device(batch, model.device)
    batch["packing"]["cache"] = cache
    last = torch.tensor([start + len(ids) - 1 for start, ids in zip(starts, own, strict=True)], device=model.device)
    logits = model(**batch, logits_to_keep=last, use_cache=False).logits[0]
    longest = max(map(len, own))
    lengths = torch.tensor([[prefix + len(ids)] for ids in own], device=model.device)  # (N, 1)
    cache.seen = torch.arange(prefix + longest, device=model.device) < lengths  # (N, P + L)
    return logits, cache, lengths.T


def _append_tokens(
    new_ids: list[list[int]], rows: Sequence[int], tokens: Sequence[int], stop_ids: Sequence[int]
) -> list[int]:
    """Append its token to each row that has not stopped; return the places in the batch that are unfinished after it.

    A row that has stopped may still be in the batch; the model's output for it is discarded.
    """
    going = []
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if not new_ids[row] or new_ids[row][-1] not in stop_ids:
            new_ids[row].append(token)
            going += [place] * (token not in stop_ids)
    return going


def _decode_step(
    model: PreTrainedModel, tokens: torch.Tensor, positions: torch.Tensor, cache: PackedKVCache
) -> torch.Tensor:
    """Logits (N, V) after one more token (N,) of each row, at its position (1, N); the cache grows by that token."""
    return model(
        input_ids=tokens[None],
        position_ids=positions,
        attention_mask=torch.ones(1, 1, 1, 1, device=tokens.device),  # a placeholder, as in packing.pack
        packing={"cache": cache, "decoding": True},
        use_cache=False,
    ).logits[0]


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first largest column of each row; on a CPU, NumPy finds it in a seventh of the time that torch needs."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.float().numpy().argmax(-1))


@torch.no_grad()
def generate_padded(
    model: PreTrainedModel, prompts: list[list[int]], stop_ids: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """New token ids for each prompt by transformers' own generate(), for models that do not support packing."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    rows = list(zip(prompts, padding, strict=True))
    # generate() fills what `config` leaves unset from the model's own generation config: with a repetition penalty
    # shipped with a base model, the answers would no longer be greedy.
    shipped, model.generation_config = model.generation_config, config
    try:
        output = cast(Any, model).generate(
            input_ids=torch.tensor([[stop_ids[0]] * pad + prompt for prompt, pad in rows], device=model.device),
            attention_mask=torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding], device=model.device),
        )  # (B, T + new)
    finally:
        model.generation_config = shipped
    return output[:, length:].tolist()


def _decode_generation(
    ids: list[int], stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, parse: LabelParser
) -> Generation:
    end = next((position for position, token in enumerate(ids) if token in stop_ids), None)
    text = str(tokenizer.decode(ids[:end], skip_special_tokens=False))
    return Generation(text=text, stopped=end is not None, predicted=parse(text))
