"""Build the publishable folder: save the merged model or the adapter alone, reload it, and compare the outputs.

publish.py pushes the folder to the Hub.
"""

import json
import math
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
    dtype_name,
    load_adapter,
    load_for_merge,
    load_tokenizer,
    merge,
    save_merged,
)
from tweetdora.plots import confusion_title, plot_confusion, plot_reliability, plot_training
from tweetdora.portable import make_portable
from tweetdora.priors import label_shares
from tweetdora.prompts import PromptTokenizer, freeze_template, stop_token_ids
from tweetdora.provenance import without_folders
from tweetdora.record_files import write_record
from tweetdora.records import (
    ADAPTER_DIR,
    ADAPTER_WEIGHTS,
    TASK_FILE,
    Comparison,
    EvaluationRecord,
    PublishedTask,
    RunRecord,
    TrainingResult,
)

# Merged or not, the model computes the same sums in float32; only their order differs.
MAX_LOGIT_DIFFERENCE = 1e-2
_EXAMPLES_AT_ONCE = 32
MIN_EQUAL_GENERATIONS = 0.9  # for weights in half precision, where a few answers may differ
# A folder with the card, a training plot, and an adapter in one of the two places is an earlier build.
_CARD, _CURVES = "README.md", ("plots/training.png", "figures/training.png")  # the second until record version 2
_ADAPTER_FILES = ("adapter/adapter_config.json", "adapter_config.json")


def check_output_dir(folder: str, run_dir: str) -> None:
    """Refuse a folder that a build must not replace, because everything in it would be lost.

    Raises:
        InputError: It is a file, holds the run or the working folder, or holds files without being an earlier build.
    """
    path = os.path.realpath(folder)
    for kept, what in ((run_dir, "the run folder"), (os.getcwd(), "the working folder")):
        if os.path.commonpath([path, os.path.realpath(kept)]) == path:
            raise InputError(f"--output_dir {folder} is {what} or contains it. Choose a separate folder.")
    if os.path.isfile(path):
        raise InputError(f"--output_dir {folder} is a file. Choose a folder.")
    found = os.listdir(path) if os.path.isdir(path) else []

    def has(name: str) -> bool:
        """True if the folder holds the file."""
        return os.path.isfile(os.path.join(path, name))

    built_here = has(_CARD) and any(map(has, _CURVES)) and any(map(has, _ADAPTER_FILES))
    if found and (not built_here or ".git" in found):
        raise InputError(
            f"{folder} would be replaced, but it is not an earlier build of push_to_hub.py: it holds "
            f"{', '.join(sorted(found)[:5])}. Choose another --output_dir, or empty the folder yourself."
        )


@dataclass(frozen=True)
class Outputs:
    """A model's outputs, one per example: the logits of the first new token, float32 (V,), and the generation."""

    logits: list[torch.Tensor]
    generations: list[str]


@dataclass(frozen=True)
class Reference:
    """The saved model's outputs on some examples, and their inputs; the model on the Hub must reproduce them."""

    examples: Examples
    task: TaskConfig
    prompt_tokenizer: PromptTokenizer
    max_new_tokens: int
    adapter_only: bool
    outputs: Outputs
    base_dtype: str = "float32"  # of base and adapter, with which the saved model was compared


def build_model(
    run_dir: str, run: RunRecord, examples: Examples, config: PushConfig, device: torch.device, folder: str
) -> tuple[Comparison, Reference]:
    """Save the merged model, or the adapter alone, to `folder`, reload it, and compare it with base and adapter.

    Returns:
        The result of the comparison, and the reloaded model's outputs.

    Raises:
        InputError: The base is not the run's base model.
        VerificationError: The saved model's outputs differ from those of base and adapter.
    """
    task, name, revision = run.task, run.base_model.name_or_path, run.base_model.revision
    adapter_dir = os.path.join(run_dir, ADAPTER_DIR)
    tokenizer = load_tokenizer(adapter_dir)
    prompt_tokenizer = PromptTokenizer(tokenizer, run.prompt_format, task.max_length)
    freeze_template(tokenizer, run.prompt_format, task)
    write_task(folder, run)
    dtype = getattr(torch, config.dtype)
    base = load_for_merge(name, revision, dtype, device)
    if (identity := base_identity(base, name, revision)) != run.base_model:
        raise InputError(
            f"{name} is not this run's base model: found {asdict(identity)}, expected {asdict(run.base_model)}."
        )
    base_dtype = dtype_name(base.dtype)
    with_adapter = load_adapter(base, adapter_dir)
    expected = logits_and_generations(with_adapter, tokenizer, prompt_tokenizer, examples, task, run.max_new_tokens)
    if config.adapter_only:
        copy_adapter(adapter_dir, folder, run.base_display_name, revision)
        tokenizer.save_pretrained(folder)
    else:
        copy_adapter(adapter_dir, os.path.join(folder, ADAPTER_DIR), run.base_display_name, revision)
        stop_ids = stop_token_ids(base, tokenizer, prompt_tokenizer.stop_token_id)
        save_merged(merge(with_adapter, dtype), tokenizer, stop_ids, folder)
    make_portable(folder)
    del base, with_adapter

    saved_tokenizer, saved = load_vanilla(folder, config.adapter_only, device)
    check_prompts(saved_tokenizer, prompt_tokenizer, examples, task)
    found = logits_and_generations(saved, saved_tokenizer, prompt_tokenizer, examples, task, run.max_new_tokens)
    check = check_saved(expected, found, config.dtype)
    reference = Reference(examples, task, prompt_tokenizer, run.max_new_tokens, config.adapter_only, found, base_dtype)
    return check, reference


def write_task(folder: str, run: RunRecord) -> None:
    """Write task.json: what the model was trained to do. Absolute paths of this machine are shortened."""
    name = without_folders(run.task.dataset_name)
    task = replace(run.task, dataset_name=name, dataset_revision=run.train_data.revision)
    shares = label_shares(run.train_data, task.label_words, task.balance_labels)
    write_record(os.path.join(folder, TASK_FILE), PublishedTask(task, run.prompt_format, run.max_new_tokens, shares))


def load_vanilla(
    name_or_path: str, adapter_only: bool, device: torch.device, **where: Any
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | PeftModel]:
    """Load tokenizer and model as any user does, without this project's code.

    `where` is passed to from_pretrained: revision, cache_dir.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **where)
    model: Any
    if adapter_only:
        # In float32, as the adapter was measured, regardless of the base's stored dtype.
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
    """Return, for each example, the logits of the first new token and the greedy generation."""
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
    """Check that the saved chat template gives a user the token ids that the model was trained with.

    Texts that spell special tokens or are truncated are left out.

    Raises:
        VerificationError: It gives different ids.
    """
    prompts, _ = prompt_tokenizer.prompt_ids(examples.texts)
    for text, prompt in zip(examples.texts, prompts, strict=True):
        if prompt_tokenizer.is_plain(text) and len(prompt) < prompt_tokenizer.max_prompt_length:
            messages = prompt_tokenizer.format.messages(task.system_prompt, text)
            rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            if rendered["input_ids"] != prompt:
                raise VerificationError(
                    f"for the text {text!r}, the saved chat template gives different token ids from training, "
                    "so the published model would not see the prompt that it was tuned on."
                )


def compare_outputs(expected: Outputs, found: Outputs) -> Comparison:
    """Compare the outputs of two models on the same examples."""
    pairs = zip(expected.logits, found.logits, strict=True)
    return Comparison(
        num_examples=len(expected.generations),
        equal_generations=sum(a == b for a, b in zip(expected.generations, found.generations, strict=True)),
        # torch's max() propagates NaN. Python's returns NaN or the number, depending on their order.
        max_logit_difference=torch.stack([_largest_difference(a, b) for a, b in pairs]).max().item(),
    )


def _largest_difference(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The largest difference of two rows of logits; infinite if some are missing.

    PEFT's AutoPeftModel adds embeddings if a tokenizer has more tokens than the base (Gemma 3): these are left out.
    """
    if len(found) < len(expected):
        return torch.tensor(math.inf)
    return (expected - found[: len(expected)]).abs().max()


def check_saved(expected: Outputs, found: Outputs, dtype: str) -> Comparison:
    """Compare the saved model with base and adapter.

    Raises:
        VerificationError: They differ by more than rounding.
    """
    check = compare_outputs(expected, found)
    difference, equal, count = check.max_logit_difference, check.equal_generations, check.num_examples
    exact = dtype == "float32"
    too_far = difference > MAX_LOGIT_DIFFERENCE or equal < count if exact else equal < MIN_EQUAL_GENERATIONS * count
    if too_far or difference != difference:
        raise VerificationError(
            f"the saved {dtype} model does not match base and adapter: logits differ by up to {difference:.3g}, and "
            f"{equal} of {count} answers are equal. Nothing was published."
        )
    return check


def format_check(check: Comparison) -> str:
    """Format a comparison as one line."""
    return (
        f"{check.equal_generations} of {check.num_examples} answers equal, largest logit difference "
        f"{check.max_logit_difference:.1e}."
    )


def copy_adapter(adapter_dir: str, folder: str, base_name: str, base_revision: str | None) -> None:
    """Copy the adapter's two files, and name the base in its config as the card does, not by a local path."""
    os.makedirs(folder, exist_ok=True)
    shutil.copy2(os.path.join(adapter_dir, ADAPTER_WEIGHTS), folder)
    settings = read_json(os.path.join(adapter_dir, "adapter_config.json"))
    settings |= {"base_model_name_or_path": base_name, "revision": base_revision}
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as stream:
        json.dump(settings, stream, indent=2, sort_keys=True)  # as PEFT writes it


def draw_plots(folder: str, name: str, result: TrainingResult, evaluation: EvaluationRecord) -> None:
    """Draw the card's plots from the records that its numbers come from."""
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
    """Yield a new folder next to `folder`, which replaces it at the end; after a failure, the old one stays."""
    folder = os.path.realpath(folder)  # drops a trailing slash: "publish/" + ".part" would be inside the folder
    beside, old = f"{folder}.{os.getpid()}.part", f"{folder}.{os.getpid()}.old"
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    with ExitStack() as on_failure:  # including an interrupt
        on_failure.callback(shutil.rmtree, beside, ignore_errors=True)
        yield beside
        on_failure.pop_all()
    if os.path.isdir(folder):
        os.rename(folder, old)
    os.rename(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
