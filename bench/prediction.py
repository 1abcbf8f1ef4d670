"""Benchmark classification: by likelihood, as predict.py does, by generation, and by transformers' pipeline."""

import tempfile
import time
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, pipeline

from bench.generation import EVALUATE_BATCH, MAX_NEW_TOKENS, answer_ours, save_tuned
from bench.settings import Settings
from bench.sides import CPU, time_in_turn
from tweetdora.data import Examples
from tweetdora.modeling import DTYPES, load_base
from tweetdora.prompts import PromptTokenizer, freeze_template
from tweetdora.scoring import score_all

PIPELINE_BATCHES = (1, 8, 32, 128)
_TRIED, _ROUNDS = 64, 5  # examples for choosing the pipeline's batch size; rounds over all examples


def measure_prediction(settings: Settings, precision: str) -> dict[str, Any]:
    """Measure the three ways on the same tuned model and validation examples, interleaved."""
    prompt_tokenizer = settings.prompt_tokenizer()
    examples = settings.load("validation", settings.generation_examples)
    words = settings.task().label_words
    with tempfile.TemporaryDirectory() as folder:
        losses = save_tuned(settings, folder)
        ours = load_base(folder, None, DTYPES[precision], CPU)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    answer, chats, order = make_pipeline(plain, prompt_tokenizer, settings, examples)
    answer(chats[:_TRIED], 1)  # a warm-up
    tried = {}
    for size in PIPELINE_BATCHES:
        started = time.perf_counter()
        answer(chats[:_TRIED], size)
        tried[size] = time.perf_counter() - started
    best = min(tried, key=lambda size: tried[size])
    measured = time_in_turn(
        {
            "scores": lambda number: score_all(ours, prompt_tokenizer, examples.texts, batch_size=EVALUATE_BATCH),
            "generation": lambda number: answer_ours(ours, prompt_tokenizer, examples, settings, EVALUATE_BATCH),
            "pipeline": lambda number: answer(chats, best),
        },
        rounds=min(_ROUNDS, settings.steps),
        warmup=1,
    )
    labels = [words[number] for number in measured["scores"]["results"][-1].labels.tolist()]
    generations = measured["generation"]["results"][-1]
    exact = [place for place, found in enumerate(generations) if found.text.strip(" ") in words]
    written = dict(zip(order, measured["pipeline"]["results"][-1], strict=True))
    return {
        "tuning_losses": losses,
        "num_examples": len(examples),
        "pipeline_seconds_by_batch": {str(size): seconds for size, seconds in tried.items()},
        "pipeline_batch": best,
        **{f"{name}_seconds": found["seconds"] for name, found in measured.items()},
        "exact": len(exact),
        "equal_to_generation": sum(labels[place] == generations[place].text.strip(" ") for place in exact),
        "pipeline_equal_to_generation": sum(written[place] == generations[place].text for place in exact),
    }


def make_pipeline(model: Any, prompt_tokenizer: PromptTokenizer, settings: Settings, examples: Examples) -> Any:
    """Build transformers' text-generation pipeline as a user would call it.

    Also returns the conversations, longest first, and the places of their texts among the examples.
    """
    task, tokenizer = settings.task(), prompt_tokenizer.tokenizer
    freeze_template(tokenizer, prompt_tokenizer.format, task)
    tokenizer.padding_side = "left"
    stop = prompt_tokenizer.stop_token_id
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = stop
    made: Any = pipeline("text-generation", model=model, tokenizer=cast(Any, tokenizer))
    # By length, as score_all and generate_all batch by themselves.
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    chats = [prompt_tokenizer.format.messages(task.system_prompt, examples.texts[place]) for place in order]

    @torch.no_grad()
    def answer(chats: list[Any], size: int) -> list[str]:
        """Answer some conversations."""
        found = made(chats, batch_size=size, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_full_text=False)
        return [one[0]["generated_text"] for one in found]

    return answer, chats, order
