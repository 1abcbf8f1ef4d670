"""The published model in other formats: written, loaded again by the engine that they are for, and compared."""

import logging
import os
from collections.abc import Iterator, Sequence

import torch

from tweetdora.build import MAX_LOGIT_DIFFERENCE, MIN_EQUAL_GENERATIONS, Reference
from tweetdora.config import PushConfig
from tweetdora.errors import InputError, VerificationError
from tweetdora.prompts import PromptTokenizer
from tweetdora.records import Conversion
from tweetdora.to_gguf import answer_by_llama_cpp, check_converter, modelfile, write_gguf
from tweetdora.to_onnx import FILES, FOLDER, answer_by_onnxruntime, check_exporter, declare_onnx, write_onnx

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


def check_gguf(prompts: PromptTokenizer, system_prompt: str, texts: Sequence[str]) -> None:
    """Look before any work whether the prompt can be in a Modelfile, and some of the texts can be compared.

    Raises:
        InputError: says why not.
    """
    modelfile("model.gguf", prompts.format, system_prompt, 1)
    if not any(_comparable(prompts, texts)):
        raise InputError(
            "--gguf: all examples spell special tokens or are truncated, so that none can be compared. Leave it out."
        )


def _comparable(prompts: PromptTokenizer, texts: Sequence[str]) -> list[bool]:
    """For each text whether llama.cpp sees what we see: it reads special tokens as such, and truncates nothing."""
    lengths = map(len, prompts.prompt_ids(texts)[0])
    return [
        prompts.is_plain(text) and length < prompts.max_prompt_length
        for text, length in zip(texts, lengths, strict=True)
    ]


def convert(
    folder: str, name: str, config: PushConfig, reference: Reference
) -> tuple[list[Conversion], Exception | None]:
    """Write the formats that are asked for into the merged model's folder, and compare their answers with its own.

    The second value says what went wrong: a converter failed, or what it wrote answers otherwise. The folder holds
    nothing of a format that failed, and the merged model is as it was.
    """
    found: list[Conversion] = []
    before = set(_files(folder))
    try:
        if config.gguf != "none":
            log.info("Converting to GGUF %s ...", config.gguf)
            found.append(_convert_to_gguf(folder, name, config, reference))
            before = set(_files(folder))
        if config.onnx:
            log.info("Converting to ONNX ...")
            write_onnx(folder)
            found += [_compare_onnx(folder, kind, config.dtype, reference) for kind in FILES]
            declare_onnx(folder)
    except Exception as error:  # an engine's own too: the merged model must not be lost by it
        for path in set(_files(folder)) - before:
            os.remove(path)
        return [one for one in found if os.path.isfile(os.path.join(folder, one.file))], error
    return found, None


def _files(folder: str) -> Iterator[str]:
    return (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


def _convert_to_gguf(folder: str, name: str, config: PushConfig, reference: Reference) -> Conversion:
    prompts, task, texts = reference.prompt_tokenizer, reference.task, reference.examples.texts
    file = write_gguf(folder, name, config.gguf, config.llama_cpp)
    usable = _comparable(prompts, texts)
    plain = [
        (text, answer.strip())
        for text, answer, use in zip(texts, reference.outputs.generations, usable, strict=True)
        if use
    ]
    conversations = [prompts.format.messages(task.system_prompt, text) for text, _ in plain]
    done = answer_by_llama_cpp(
        os.path.join(folder, file), conversations, reference.max_new_tokens, prompts.max_prompt_length
    )
    bos = prompts.tokenizer.bos_token if done.adds_bos else ""
    with open(os.path.join(folder, "Modelfile"), "w", encoding="utf-8") as stream:
        stream.write(modelfile(file, prompts.format, task.system_prompt, reference.max_new_tokens, bos))
    equal = sum(found.strip() == answer for found, (_, answer) in zip(done.answers, plain, strict=True))
    return _checked(Conversion(f"GGUF {config.gguf}", file, done.engine, len(plain), equal))


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
            raise VerificationError(f"{file} is not the published model: logits differ by up to {difference:.3g}.")
    return _checked(Conversion(f"ONNX {kind}", file, engine, len(answers), equal))


def _checked(found: Conversion) -> Conversion:
    if found.equal_generations < MIN_EQUAL_GENERATIONS * found.num_examples:
        raise VerificationError(
            f"{found.file} does not answer as the published model does: {found.equal_generations} of "
            f"{found.num_examples} answers are equal in {found.engine}."
        )
    return found


def format_conversions(found: list[Conversion]) -> str:
    """What was written and compared, in lines for a person."""
    return "".join(
        f"{one.format}: {one.file}, {one.equal_generations} of {one.num_examples} answers equal in {one.engine}\n"
        for one in found
    )
