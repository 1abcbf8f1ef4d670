"""The publishable folder: merged model or adapter alone, saved, loaded again and compared.

publish.py takes it to the Hub.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tweetdora.config import PushConfig, TaskConfig
from tweetdora.data import Examples
from tweetdora.errors import InputError, VerificationError
from tweetdora.files import read_json
from tweetdora.generation import generate_all
from tweetdora.modeling import (
    base_identity,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    save_merged,
)
from tweetdora.plots import confusion_title, plot_confusion, plot_reliability, plot_training
from tweetdora.portable import make_portable
from tweetdora.priors import label_shares
from tweetdora.prompts import PromptTokenizer, freeze_template, stop_token_ids
from tweetdora.provenance import without_folders
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    TASK_FILE,
    Comparison,
    EvaluationRecord,
    PublishedTask,
    RunRecord,
    TrainingResult,
    write_record,
)

# The merge is a sum in float32 either way; what differs is the order of the sums.
MAX_LOGIT_DIFFERENCE = 1e-2
_EXAMPLES_AT_ONCE = 32
MIN_EQUAL_GENERATIONS = 0.9  # for weights in half precision, whose answers may differ here and there
# A folder that holds these, and an adapter in one of the two places, was built here.
_CARD, _CURVES = "README.md", ("plots/training.png", "figures/training.png")  # the second: until record version 2
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

    built_here = has(_CARD) and any(map(has, _CURVES)) and any(map(has, _ADAPTER_FILES))
    if found and (not built_here or ".git" in found):
        raise InputError(
            f"{folder} would be replaced, but is no earlier build of push_to_hub.py: it holds "
            f"{', '.join(sorted(found)[:5])}. Give another --output_dir, or empty the folder yourself."
        )


@dataclass(frozen=True)
class Outputs:
    """What a model made of some examples: for each the logits of the first new token, float32 of shape (V,), and the
    text that it generated.
    """

    logits: list[torch.Tensor]
    generations: list[str]


@dataclass(frozen=True)
class Reference:
    """What the saved model made of some examples: what is loaded from the Hub later must do the same."""

    examples: Examples
    task: TaskConfig
    prompt_tokenizer: PromptTokenizer
    max_new_tokens: int
    adapter_only: bool
    outputs: Outputs


def build_model(
    run_dir: str, run: RunRecord, examples: Examples, config: PushConfig, device: torch.device, folder: str
) -> tuple[Comparison, Reference]:
    """Save the merged model, or the adapter alone, to `folder`, load that again and compare; what the check saw.

    Raises:
        InputError: the base is another one.
        VerificationError: what was saved does not answer as base and adapter do.
    """
    task, name, revision = run.task, run.base_model.name_or_path, run.base_model.revision
    adapter_dir = os.path.join(run_dir, ADAPTER_DIR)
    tokenizer = load_tokenizer(adapter_dir)
    prompt_tokenizer = PromptTokenizer(tokenizer, run.prompt_format, task.max_length)
    freeze_template(tokenizer, run.prompt_format, task)
    write_task(folder, run)
    base = load_base(name, revision, torch.float32, device)
    if (identity := base_identity(base, name, revision)) != run.base_model:
        raise InputError(
            f"{name} is not the base model of this run: found {asdict(identity)}, expected {asdict(run.base_model)}."
        )
    with_adapter = load_adapter(base, adapter_dir)
    expected = logits_and_generations(with_adapter, tokenizer, prompt_tokenizer, examples, task, run.max_new_tokens)
    if config.adapter_only:
        copy_adapter(adapter_dir, folder, run.base_display_name, revision)
        tokenizer.save_pretrained(folder)
    else:
        copy_adapter(adapter_dir, os.path.join(folder, ADAPTER_DIR), run.base_display_name, revision)
        stop_ids = stop_token_ids(base, tokenizer, prompt_tokenizer.stop_token_id)
        save_merged(merge(with_adapter), tokenizer, stop_ids, getattr(torch, config.dtype), folder)
    make_portable(folder)
    del base, with_adapter

    saved_tokenizer, saved = load_vanilla(folder, config.adapter_only, device)
    check_prompts(saved_tokenizer, prompt_tokenizer, examples, task)
    found = logits_and_generations(saved, saved_tokenizer, prompt_tokenizer, examples, task, run.max_new_tokens)
    check = check_saved(expected, found, config.dtype)
    return check, Reference(examples, task, prompt_tokenizer, run.max_new_tokens, config.adapter_only, found)


def write_task(folder: str, run: RunRecord) -> None:
    """Write task.json: what the model was trained to do. Local folders in it lose what only this machine has."""
    name = without_folders(run.task.dataset_name)
    task = replace(run.task, dataset_name=name, dataset_revision=run.train_data.revision)
    shares = label_shares(run.train_data, task.label_words, task.balance_labels)
    write_record(os.path.join(folder, TASK_FILE), PublishedTask(task, run.prompt_format, run.max_new_tokens, shares))


def load_vanilla(
    name_or_path: str, adapter_only: bool, device: torch.device, **where: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Tokenizer and model as any user loads them: nothing of ours takes part in making the model or the prompt.

    `where` goes to from_pretrained: revision, cache_dir.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
    model: Any
    if adapter_only:
        # In float32, as the adapter was measured, whatever format the base is stored in.
        model = AutoPeftModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32, **where)
    else:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **where)
    return tokenizer, model.to(device).eval()


def logits_and_generations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_tokenizer: PromptTokenizer,
    examples: Examples,
    task: TaskConfig,
    max_new_tokens: int,
) -> Outputs:
    """For each example the logits of the first new token, and what is generated greedily."""
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    logits: list[torch.Tensor] = []
    for start in range(0, len(prompts), _EXAMPLES_AT_ONCE):
        batch = prompts[start : start + _EXAMPLES_AT_ONCE]
        length = max(map(len, batch))
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in batch], device=model.device)
        ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in batch], device=model.device)  # (B, T)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        logits += output.logits[:, -1].float().cpu().unbind()
    generations, _ = generate_all(
        model,
        tokenizer,
        prompt_tokenizer,
        examples,
        task.label_words,
        batch_size=_EXAMPLES_AT_ONCE,
        max_new_tokens=max_new_tokens,
    )
    return Outputs(logits, [generation.text for generation in generations if generation is not None])


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, prompt_tokenizer: PromptTokenizer, examples: Examples, task: TaskConfig
) -> None:
    """The saved chat template must give a user the token ids that the model was trained with.

    Raises:
        VerificationError: it does not, for an ordinary text.
    """
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    for text, prompt in zip(examples.texts, prompts, strict=True):
        if prompt_tokenizer.is_plain(text) and len(prompt) < prompt_tokenizer.max_prompt_length:
            messages = prompt_tokenizer.format.messages(task.system_prompt, text)
            rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            if rendered["input_ids"] != prompt:
                raise VerificationError(
                    f"the saved chat template gives other token ids than training used for the text {text!r}; "
                    "the published model would not see the prompt that it was tuned on."
                )


def compare_outputs(expected: Outputs, found: Outputs) -> Comparison:
    """How far the outputs of two models for the same examples are apart."""
    pairs = zip(expected.logits, found.logits, strict=True)
    return Comparison(
        num_examples=len(expected.generations),
        equal_generations=sum(a == b for a, b in zip(expected.generations, found.generations, strict=True)),
        # Of NaN and a number, max() takes whichever comes first; torch's keeps the NaN.
        max_logit_difference=torch.stack([(a - b).abs().max() for a, b in pairs]).max().item(),
    )


def check_saved(expected: Outputs, found: Outputs, dtype: str) -> Comparison:
    """Compare the saved model with base and adapter.

    Raises:
        VerificationError: more than rounding lies between the two.
    """
    check = compare_outputs(expected, found)
    difference, equal, count = check.max_logit_difference, check.equal_generations, check.num_examples
    exact = dtype == "float32"
    too_far = difference > MAX_LOGIT_DIFFERENCE or equal < count if exact else equal < MIN_EQUAL_GENERATIONS * count
    if too_far or difference != difference:
        raise VerificationError(
            f"the saved {dtype} model is not the adapter model: logits differ by up to {difference:.3g}, {equal} of "
            f"{count} answers are equal. Nothing was published."
        )
    return check


def format_check(check: Comparison) -> str:
    """How like the two models answered."""
    return (
        f"{check.equal_generations} of {check.num_examples} answers equal, largest logit difference "
        f"{check.max_logit_difference:.1e}."
    )


def copy_adapter(adapter_dir: str, folder: str, base_name: str, base_revision: str | None) -> None:
    """Copy the adapter's two files; its settings name the base as the card does, not by a path of this machine."""
    os.makedirs(folder, exist_ok=True)
    shutil.copy2(os.path.join(adapter_dir, ADAPTER_WEIGHTS), folder)
    settings = read_json(os.path.join(adapter_dir, "adapter_config.json"))
    settings |= {"base_model_name_or_path": base_name, "revision": base_revision}
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as stream:
        json.dump(settings, stream, indent=2, sort_keys=True)  # as PEFT writes it


def draw_plots(folder: str, name: str, result: TrainingResult, evaluation: EvaluationRecord) -> None:
    """Draw the plots that the card shows, from the records that its numbers are from."""
    plots = os.path.join(folder, "plots")
    os.makedirs(plots)
    plot_training(result.log_history, os.path.join(plots, "training.png"), name)
    for model, metrics in evaluation.models.items():
        path = os.path.join(plots, f"confusion_{model}.png")
        title = confusion_title(model, metrics.macro_f1)
        plot_confusion(metrics.confusion_matrix, evaluation.label_words, path, title)
    if evaluation.likelihoods:
        plot_reliability(evaluation.likelihoods, os.path.join(plots, "reliability.png"), name)


@contextmanager
def staged_folder(folder: str) -> Iterator[str]:
    """A new folder beside `folder`, to be filled; it takes its place at the end, and a failure leaves the old one."""
    folder = os.path.realpath(folder)  # "publish/" + ".part" would lie inside it
    beside, old = f"{folder}.{os.getpid()}.part", f"{folder}.{os.getpid()}.old"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    with ExitStack() as on_failure:  # an interrupt included
        on_failure.callback(shutil.rmtree, beside, ignore_errors=True)
        yield beside
        on_failure.pop_all()
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
