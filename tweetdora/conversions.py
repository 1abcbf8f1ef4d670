"""The published model in other formats: written, loaded again by the engine that they are for, and compared."""

import logging
import os

import torch

from tweetdora.build import MAX_LOGIT_DIFFERENCE, MIN_EQUAL_GENERATIONS, Reference
from tweetdora.config import PushConfig
from tweetdora.errors import InputError, VerificationError
from tweetdora.records import Conversion
from tweetdora.to_gguf import answer_by_llama_cpp, check_converter, write_gguf, write_modelfile
from tweetdora.to_onnx import FILES, FOLDER, answer_by_onnxruntime, check_exporter, write_onnx

log = logging.getLogger(__name__)


def check_conversions(config: PushConfig, architecture: str) -> None:
    """Look before any work whether the other formats that are asked for can be written here.

    Raises:
        InputError: says what is missing.
    """
    if config.gguf != "none":
        check_converter(config.llama_cpp, architecture)
    if config.onnx:
        check_exporter(architecture)


def convert(folder: str, name: str, config: PushConfig, reference: Reference) -> list[Conversion]:
    """Write the formats that are asked for into the merged model's folder, and compare their answers with its own.

    Raises:
        VerificationError: a converter failed, or what it wrote answers otherwise.
    """
    found = []
    if config.gguf != "none":
        log.info("Converting to GGUF %s ...", config.gguf)
        found.append(_convert_to_gguf(folder, name, config, reference))
    if config.onnx:
        log.info("Converting to ONNX ...")
        write_onnx(folder)
        found += [_compare_onnx(folder, kind, config.dtype, reference) for kind in FILES]
    return found


def _convert_to_gguf(folder: str, name: str, config: PushConfig, reference: Reference) -> Conversion:
    prompts = reference.prompt_tokenizer
    file = write_gguf(folder, name, config.gguf, config.llama_cpp)
    write_modelfile(folder, file, prompts.format, reference.task.system_prompt, reference.max_new_tokens)
    # llama.cpp reads special tokens in a text as such, and does not truncate one.
    lengths = [len(prompt) for prompt in prompts.prompt_ids(reference.examples.texts)[0]]
    examples = zip(reference.examples.texts, reference.outputs.generations, lengths, strict=True)
    plain = [
        (text, answer.strip())
        for text, answer, length in examples
        if prompts.is_plain(text) and length < prompts.max_prompt_length
    ]
    if not plain:
        raise InputError(
            "--gguf: all examples spell special tokens or are truncated, so that none can be compared. Leave it out."
        )
    conversations = [prompts.format.messages(reference.task.system_prompt, text) for text, _ in plain]
    engine, answers = answer_by_llama_cpp(
        os.path.join(folder, file), conversations, reference.max_new_tokens, prompts.max_prompt_length
    )
    equal = sum(found.strip() == answer for found, (_, answer) in zip(answers, plain, strict=True))
    return _checked(Conversion(f"GGUF {config.gguf}", file, engine, len(plain), equal))


def _compare_onnx(folder: str, kind: str, dtype: str, reference: Reference) -> Conversion:
    file = f"{FOLDER}/{FILES[kind]}"
    prompts, _ = reference.prompt_tokenizer.prompt_ids(reference.examples.texts)
    engine, ids, logits = answer_by_onnxruntime(folder, file, prompts, reference.max_new_tokens)
    tokenizer = reference.prompt_tokenizer.tokenizer
    answers = [tokenizer.decode(own, skip_special_tokens=False) for own in ids]
    equal = sum(a == b for a, b in zip(answers, reference.outputs.generations, strict=True))
    if kind == "float32":
        pairs = zip(logits, reference.outputs.logits, strict=True)
        difference = torch.stack([(torch.from_numpy(a) - b).abs().max() for a, b in pairs]).max().item()
        # A model that is published in half a precision computes in it, and its logits are rounded.
        too_far = difference > MAX_LOGIT_DIFFERENCE and dtype == "float32"
        if too_far or difference != difference:
            raise VerificationError(
                f"{file} is not the published model: logits differ by up to {difference:.3g}. Nothing was published."
            )
    return _checked(Conversion(f"ONNX {kind}", file, engine, len(answers), equal))


def _checked(found: Conversion) -> Conversion:
    if found.equal_generations < MIN_EQUAL_GENERATIONS * found.num_examples:
        raise VerificationError(
            f"{found.file} does not answer as the published model does: {found.equal_generations} of "
            f"{found.num_examples} answers are equal in {found.engine}. Nothing was published."
        )
    return found


def format_conversions(found: list[Conversion]) -> str:
    """What was written and compared, in lines for a person."""
    return "".join(
        f"{one.format}: {one.file}, {one.equal_generations} of {one.num_examples} answers equal in {one.engine}\n"
        for one in found
    )
