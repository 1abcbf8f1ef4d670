"""Benchmark generation: generate_all against transformers' generate with left padding, base and tuned model."""

import tempfile
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.settings import Settings
from bench.sides import CPU, our_side, time_in_turn
from tweetdora.data import Examples, make_examples
from tweetdora.generation import Generation, generate_all, generate_packed, generate_padded
from tweetdora.modeling import DTYPES, load_base
from tweetdora.prompts import PromptTokenizer, stop_token_ids

MAX_NEW_TOKENS = 16
EVALUATE_BATCH = 128  # evaluate.py's default


def measure_generation(settings: Settings) -> dict[str, Any]:
    """Measure base and tuned model in float32 and bf16, both ways interleaved; then time a whole validation set."""
    prompt_tokenizer, examples = settings.prompt_tokenizer(), settings.load("validation", settings.generation_examples)
    measured: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS}
    with tempfile.TemporaryDirectory() as tuned:
        measured["tuning_losses"] = save_tuned(settings, tuned)
        for name, folder in (("base", settings.model), ("tuned", tuned)):
            for precision in ("fp32", "bf16"):
                measured[f"{name}_{precision}"] = compare_generations(
                    settings, folder, precision, prompt_tokenizer, examples
                )
        model = load_base(tuned, None, DTYPES["bf16"], CPU)
    examples = settings.load("validation", settings.validation_examples)
    answer_ours(model, prompt_tokenizer, examples.head(EVALUATE_BATCH), settings, EVALUATE_BATCH)  # warm-up
    started = time.perf_counter()
    answer_ours(model, prompt_tokenizer, examples, settings, EVALUATE_BATCH)
    measured["validation"] = {
        "num_examples": len(examples),
        "seconds": time.perf_counter() - started,
        "batch": EVALUATE_BATCH,
    }
    return measured


def save_tuned(settings: Settings, folder: str) -> list[float]:
    """Train an adapter for a few steps, merge it, save the model, and return the losses."""
    side = our_side(settings, "fp32", learning_rate=5e-4)
    losses = [side.step(batch) for batch in settings.batches(settings.tune_steps)]
    model: Any = side.model
    model.merge_and_unload(safe_merge=True).save_pretrained(folder)
    settings.prompt_tokenizer().tokenizer.save_pretrained(folder)
    return losses


def compare_generations(
    settings: Settings, folder: str, precision: str, prompt_tokenizer: PromptTokenizer, examples: Examples
) -> dict[str, list[Any] | int]:
    """Time both ways on every batch, and count the answers that are equal token for token.

    Both sides batch prompts of similar length, as generate_all does by itself. This order is the faster one for both.
    """
    ours = load_base(folder, None, DTYPES[precision], CPU)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    stop_ids = stop_token_ids(plain, prompt_tokenizer.tokenizer, prompt_tokenizer.stop_token_id)
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    longest_first = sorted(range(len(examples)), key=lambda index: -len(prompts[index]))
    size = settings.generation_batch
    chunks = [longest_first[start : start + size] for start in range(0, len(examples), size)]
    chunks = [chunks[0], *chunks]  # an extra one for the warm-up
    batches = [
        make_examples([examples.texts[i] for i in chunk], [examples.labels[i] for i in chunk]) for chunk in chunks
    ]
    measured = time_in_turn(
        {
            "plain": lambda number: answer_plainly(plain, prompt_tokenizer, batches[number], stop_ids),
            "ours": lambda number: answer_ours(ours, prompt_tokenizer, batches[number], settings, size),
        },
        rounds=len(chunks) - 1,
        warmup=1,
    )
    same = 0
    for chunk, answers in zip(chunks[1:], measured["plain"]["results"][1:], strict=True):
        # generate_all returns text without ids, so the ids are generated again, untimed.
        ids = generate_packed(ours, [prompts[i] for i in chunk], stop_ids, MAX_NEW_TOKENS)
        same += sum(until_stop(own, stop_ids) == answer for own, (answer, _) in zip(ids, answers, strict=True))
    texts = {
        "plain": [text for answers in measured["plain"]["results"][1:] for _, text in answers],
        "ours": [answer.text for answers in measured["ours"]["results"][1:] for answer in answers],
    }
    return {
        "plain_attention": plain.config._attn_implementation,
        "num_examples": [len(chunk) for chunk in chunks[1:]],
        "plain_seconds": measured["plain"]["seconds"],
        "our_seconds": measured["ours"]["seconds"],
        "same_tokens": same,
        "same_texts": sum(first == second for first, second in zip(texts["plain"], texts["ours"], strict=True)),
        "first_answers": texts["ours"][:8],
    }


def answer_ours(
    model: PreTrainedModel, prompt_tokenizer: PromptTokenizer, examples: Examples, settings: Settings, size: int
) -> list[Generation]:
    """Generate answers as evaluate.py does."""
    words = settings.task().label_words
    answers, _ = generate_all(
        model,
        prompt_tokenizer.tokenizer,
        prompt_tokenizer,
        examples,
        words,
        batch_size=size,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return [answer for answer in answers if answer is not None]


@torch.no_grad()
def answer_plainly(
    model: PreTrainedModel, prompt_tokenizer: PromptTokenizer, examples: Examples, stop_ids: list[int]
) -> list[tuple[list[int], str]]:
    """Generate ids and text of each answer with a user's usual code: tokenize, model.generate, decode."""
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    answers = [until_stop(ids, stop_ids) for ids in generate_padded(model, prompts, stop_ids, MAX_NEW_TOKENS)]
    return [(ids, str(prompt_tokenizer.tokenizer.decode([i for i in ids if i not in stop_ids]))) for ids in answers]


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """Cut the ids after the first stop token; the rest is padding.

    >>> until_stop([7, 2, 2, 2], [2])
    [7, 2]
    """
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]
