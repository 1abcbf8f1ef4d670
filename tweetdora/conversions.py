"""Convert the merged model to other formats, load each in its engine, and compare the answers."""

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
    """Check, before any work, that the requested formats can be written here.

    Raises:
        InputError: Something is missing; the message says what.
    """
    if config.gguf != "none":
        check_converter(config.llama_cpp, architecture)
    if config.onnx:
        check_exporter(architecture)


def check_gguf(prompts: PromptTokenizer, system_prompt: str, texts: Sequence[str]) -> None:
    """Check, before any work, that a Modelfile can hold the prompt and that some of the texts can be compared.

    Raises:
        InputError: One of the two is not possible.
    """
    modelfile("model.gguf", prompts.format, system_prompt, 1)
    if not any(_comparable(prompts, texts)):
        raise InputError(
            "--gguf: all examples spell special tokens or are truncated, so none can be compared. Leave --gguf out."
        )


def _comparable(prompts: PromptTokenizer, texts: Sequence[str]) -> list[bool]:
    """For each text, True if llama.cpp sees our prompt: it parses special tokens and truncates nothing."""
    lengths = map(len, prompts.prompt_ids(texts)[0])
    return [
        prompts.is_plain(text) and length < prompts.max_prompt_length
        for text, length in zip(texts, lengths, strict=True)
    ]


def convert(
    folder: str, name: str, config: PushConfig, reference: Reference
) -> tuple[list[Conversion], Exception | None]:
    """Write the requested formats into the merged model's folder, and compare their answers with the model's.

    The second value is the error if a converter failed or its model answers differently, else None. The files of a
    failed format are removed, and the merged model is unchanged.
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
    except Exception as error:  # also an engine's own errors: they must not cost the merged model
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
        # The logits of a model that is published in half precision are rounded.
        too_far = difference > MAX_LOGIT_DIFFERENCE and dtype == "float32"
        if too_far or difference != difference:
            raise VerificationError(
                f"{file} does not match the merged model: logits differ by up to {difference:.3g}."
            )
    return _checked(Conversion(f"ONNX {kind}", file, engine, len(answers), equal))


def _checked(found: Conversion) -> Conversion:
    if found.equal_generations < MIN_EQUAL_GENERATIONS * found.num_examples:
        raise VerificationError(
            f"{found.file} answers differently from the merged model: {found.equal_generations} of "
            f"{found.num_examples} answers are equal in {found.engine}."
        )
    return found


def format_conversions(found: list[Conversion]) -> str:
    """Summarize the conversions, one line for each."""
    return "".join(
        f"{one.format}: {one.file}, {one.equal_generations} of {one.num_examples} answers equal in {one.engine}\n"
        for one in found
    )
