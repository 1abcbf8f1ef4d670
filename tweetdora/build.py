"""The publishable folder: merged model or adapter alone, saved, loaded again and compared.

publish.py takes it to the Hub.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.card_facts import card_base_name
from tweetdora.config import PushConfig, TaskConfig
from tweetdora.data import Rows
from tweetdora.errors import InputError
from tweetdora.generation import answer_rows
from tweetdora.modeling import (
    base_identity,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    save_merged,
)
from tweetdora.prompts import Encoder, PromptFormat, stop_token_ids
from tweetdora.records import ADAPTER_DIR, ADAPTER_WEIGHTS, read_json

# The merge is a sum in float32 either way; what differs is the order of the sums.
MAX_LOGIT_DIFFERENCE = 1e-2
_ROWS_AT_ONCE = 32
MIN_EQUAL_ANSWERS = 0.9  # for weights published in half precision, whose answers may differ here and there
# A folder that holds these, and an adapter in one of the two places, was built here.
_BUILT_FILES = ("README.md", "figures/training.png")
_ADAPTER_FILES = ("adapter/adapter_config.json", "adapter_config.json")


def check_output_dir(folder: str, run_dir: str) -> None:
    """Refuse a folder that a build must not replace; everything that is in it would go.

    Raises:
        InputError: it is a file, holds the run or the working folder, or holds something that was not built here.
    """
    path = os.path.realpath(folder)
    for kept, what in ((run_dir, "the run folder"), (os.getcwd(), "the working folder")):
        if os.path.commonpath([path, os.path.realpath(kept)]) == path:
            raise InputError(f"--output_dir {folder} is {what} or holds it; give the build a folder of its own.")
    if os.path.isfile(path):
        raise InputError(f"--output_dir {folder} is a file; give a folder.")
    found = os.listdir(path) if os.path.isdir(path) else []

    def has(name: str) -> bool:
        """Whether the folder holds the file."""
        return os.path.isfile(os.path.join(path, name))

    built_here = all(map(has, _BUILT_FILES)) and any(map(has, _ADAPTER_FILES))
    if found and (not built_here or ".git" in found):
        raise InputError(
            f"{folder} would be replaced, but is no earlier build of push_to_hub.py: it holds "
            f"{', '.join(sorted(found)[:5])}. Give another --output_dir, or empty the folder yourself."
        )


def read_evaluation(run_dir: str, split: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The results of evaluate.py for a run, and the answer of every row.

    Raises:
        InputError: the run was not evaluated on that split, or its files are not whole.
    """
    again = f"Measure first: python evaluate.py {run_dir} --split {split}"
    folder = os.path.join(run_dir, "evaluation")
    record, predictions = os.path.join(folder, f"{split}.json"), os.path.join(folder, split, "predictions.jsonl")
    for path in (record, predictions, *figure_paths(run_dir, split)):
        if not os.path.isfile(path):
            remedy = again if path.startswith(folder) else "It is part of the run folder; train.py wrote it."
            raise InputError(f"{path} is missing. {remedy}")
    try:
        with open(predictions, encoding="utf-8") as stream:
            return read_json(record), [json.loads(line) for line in stream]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{predictions} has a line that is not JSON ({error}); it was cut. {again}") from None


def figure_paths(run_dir: str, split: str) -> list[str]:
    """The pictures that the card shows: training.png is train.py's, the others are evaluate.py's."""
    folder = os.path.join(run_dir, "evaluation", split)
    names = [os.path.join(folder, f"confusion_{when}.png") for when in ("before", "after")]
    return [os.path.join(run_dir, "training.png"), *names]


@dataclass(frozen=True)
class Reference:
    """How the saved model answers some rows: what is loaded from the Hub later must do the same."""

    rows: Rows
    task: TaskConfig
    encoder: Encoder
    max_new_tokens: int
    adapter_only: bool
    found: tuple[list[torch.Tensor], list[str]]


def build_model(
    run_dir: str, run: dict[str, Any], rows: Rows, config: PushConfig, device: torch.device, folder: str
) -> tuple[dict[str, Any], Reference]:
    """Save the merged model, or the adapter alone, to `folder`, load that again and compare; what the check saw.

    Raises:
        InputError: the base is another one, or what was saved does not answer as base and adapter do.
    """
    task, name = TaskConfig(**run["task"]), run["base"]["name_or_path"]
    adapter_dir = os.path.join(run_dir, ADAPTER_DIR)
    tokenizer = load_tokenizer(adapter_dir)
    encoder = Encoder(tokenizer, PromptFormat(**run["prompt_format"]), task.max_length)
    revision = run["base"]["revision"]
    base = load_base(name, revision, torch.float32, device)
    if (identity := base_identity(base, name, revision)) != run["base"]:
        raise InputError(f"{name} is not the base model of this run: found {identity}, expected {run['base']}.")
    with_adapter = load_adapter(base, adapter_dir)
    expected = observe(with_adapter, tokenizer, encoder, rows, task, run["max_new_tokens"])
    if config.adapter_only:
        copy_adapter(adapter_dir, folder, card_base_name(run), revision)
        tokenizer.save_pretrained(folder)
    else:
        copy_adapter(adapter_dir, os.path.join(folder, ADAPTER_DIR), card_base_name(run), revision)
        stop_ids = stop_token_ids(base, tokenizer, encoder.stop_token_id)
        save_merged(merge(with_adapter), tokenizer, stop_ids, getattr(torch, config.dtype), folder)
    del base, with_adapter

    saved_tokenizer, saved = load_as_anyone(folder, config.adapter_only, device)
    check_prompts(saved_tokenizer, encoder, rows, task)
    found = observe(saved, saved_tokenizer, encoder, rows, task, run["max_new_tokens"])
    check = compare(expected, found, config.dtype)
    return check, Reference(rows, task, encoder, run["max_new_tokens"], config.adapter_only, found)


def load_as_anyone(
    name_or_path: str, adapter_only: bool, device: torch.device, **where: str
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Tokenizer and model as any user loads them: nothing of ours takes part in making the model or the prompt.

    `where` goes to from_pretrained: revision, cache_dir.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
    if adapter_only:
        # In float32, as the adapter was measured, whatever format the base is stored in.
        model = AutoPeftModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32, **where)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **where)
    return tokenizer, model.to(device).eval()


def observe(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    encoder: Encoder,
    rows: Rows,
    task: TaskConfig,
    max_new_tokens: int,
) -> tuple[list[torch.Tensor], list[str]]:
    """For each row the logits of the first answer token, float32 of shape (V,), and the greedy answer."""
    prompts, _ = encoder.prompt_ids(rows.texts)
    logits = []
    for start in range(0, len(prompts), _ROWS_AT_ONCE):
        batch = prompts[start : start + _ROWS_AT_ONCE]
        length = max(map(len, batch))
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
        ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in batch], device=model.device)  # (B, T)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        logits += output.logits[:, -1].float().cpu().unbind()
    answers, _ = answer_rows(
        model, tokenizer, encoder, rows, task.label_words, batch_size=_ROWS_AT_ONCE, max_new_tokens=max_new_tokens
    )
    return logits, [answer.text for answer in answers]


def check_prompts(tokenizer: PreTrainedTokenizerBase, encoder: Encoder, rows: Rows, task: TaskConfig) -> None:
    """The saved chat template must give a user the token ids that the model was trained with.

    Raises:
        InputError: it does not, for an ordinary text.
    """
    prompts, _ = encoder.prompt_ids(rows.texts)
    for text, prompt in zip(rows.texts, prompts, strict=True):
        if encoder.is_plain(text) and len(prompt) < encoder.max_prompt_length:
            messages = encoder.format.messages(task.system_prompt, text)
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            if ids != prompt:
                raise InputError(
                    f"the saved chat template gives other token ids than training used for the text {text!r}; "
                    "the published model would not see the prompt that it was tuned on."
                )


def differences(
    expected: tuple[list[torch.Tensor], list[str]], found: tuple[list[torch.Tensor], list[str]]
) -> tuple[float, int]:
    """The largest difference of a logit, and how many answers are equal, of what `observe` saw of two models."""
    logits = max((a - b).abs().max().item() for a, b in zip(expected[0], found[0], strict=True))
    return logits, sum(a == b for a, b in zip(expected[1], found[1], strict=True))


def compare(
    expected: tuple[list[torch.Tensor], list[str]], found: tuple[list[torch.Tensor], list[str]], dtype: str
) -> dict[str, Any]:
    """Largest difference of a logit, and equal answers.

    Raises:
        InputError: more than rounding lies between the two.
    """
    difference, equal = differences(expected, found)
    rows = len(expected[1])
    exact = dtype == "float32"
    too_far = difference > MAX_LOGIT_DIFFERENCE or equal < rows if exact else equal < MIN_EQUAL_ANSWERS * rows
    if too_far or difference != difference:
        raise InputError(
            f"the saved {dtype} model is not the adapter model: logits differ by up to {difference:.3g}, {equal} of "
            f"{rows} answers are equal. Nothing was published."
        )
    return {"dtype": dtype, "rows": rows, "equal_answers": equal, "max_logit_difference": difference}


def copy_adapter(adapter_dir: str, folder: str, base_name: str, base_revision: str | None) -> None:
    """Copy the adapter's two files; its settings name the base as the card does, not by a path of this machine."""
    os.makedirs(folder, exist_ok=True)
    shutil.copy2(os.path.join(adapter_dir, ADAPTER_WEIGHTS), folder)
    settings = read_json(os.path.join(adapter_dir, "adapter_config.json"))
    settings |= {"base_model_name_or_path": base_name, "revision": base_revision}
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as stream:
        json.dump(settings, stream, indent=2, sort_keys=True)


def copy_figures(run_dir: str, folder: str, split: str) -> None:
    """Copy the pictures that the card shows."""
    target = os.path.join(folder, "figures")
    os.makedirs(target)
    for path in figure_paths(run_dir, split):
        shutil.copy2(path, target)


def replace_folder(folder: str, build: Callable[[str], Any]) -> Any:
    """Let `build` fill a new folder beside `folder`, then put it in its place; a failure leaves the old one."""
    folder = os.path.realpath(folder)  # "publish/" + ".part" would lie inside it
    beside, old = f"{folder}.{os.getpid()}.part", f"{folder}.{os.getpid()}.old"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    with ExitStack() as on_failure:  # an interrupt included
        on_failure.callback(shutil.rmtree, beside, ignore_errors=True)
        result = build(beside)
        on_failure.pop_all()
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
    return result
