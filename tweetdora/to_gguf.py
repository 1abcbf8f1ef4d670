"""The published model as a GGUF file, for llama.cpp and Ollama, made by llama.cpp's own converter.

The converter comes with llama.cpp's source, in no package: `make .llama.cpp` unpacks the one of llama-cpp-python's
source archive, and any checkout of llama.cpp has one too.
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tweetdora.errors import InputError, VerificationError
from tweetdora.extras import check_installed
from tweetdora.records import PromptFormat

CONVERTER = "convert_hf_to_gguf.py"
_PACKAGES = ("gguf", "sentencepiece", "xllamacpp")
_CONTEXT = (
    256  # tokens beyond the longest prompt and answer, as llama.cpp counts a template's tokens a little otherwise
)
_LAST_LINES = 5
_SECONDS = 60.0  # to wait for llama.cpp's own server, in this process


def check_converter(llama_cpp: str, architecture: str) -> None:
    """Look for the converter, the packages and the architecture before any work.

    Raises:
        InputError: says what is missing, and how it is got.
    """
    check_installed("--gguf", "gguf", _PACKAGES)
    path = os.path.join(llama_cpp, CONVERTER)
    if not os.path.isfile(path):
        raise InputError(
            f"--gguf needs llama.cpp's converter, and there is no {path}. `make .llama.cpp` fetches it, or name a "
            "checkout of llama.cpp with --llama_cpp (git clone --depth 1 https://github.com/ggml-org/llama.cpp)."
        )
    done = _run(path, "--print-supported-models")
    if done.returncode:
        raise InputError(f"{path} does not run here: {_last_lines(done.stdout)}")
    if not re.search(rf"^.*- {re.escape(architecture)}$", done.stdout, re.MULTILINE):
        raise InputError(f"--gguf: the converter in {llama_cpp} knows no {architecture}. Leave --gguf out.")


def write_gguf(folder: str, name: str, kind: str, llama_cpp: str) -> str:
    """Convert the model in a folder to a GGUF file beside it, of number format q8_0 or f16; the file's name.

    Raises:
        VerificationError: the converter failed.
    """
    file = f"{name}-{kind.upper()}.gguf"  # as the Hub and Ollama look for them
    words = [os.path.join(llama_cpp, CONVERTER), folder, "--outtype", kind, "--model-name", name]
    done = _run(*words, "--outfile", os.path.join(folder, file))
    if done.returncode:
        raise VerificationError(f"llama.cpp's converter failed: {_last_lines(done.stdout)}.")
    return file


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # it would look for the base model's card on the Hub
    return subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _last_lines(text: str) -> str:
    return " ".join(text.strip().splitlines()[-_LAST_LINES:])


def modelfile(
    file: str, prompt_format: PromptFormat, system_prompt: str, max_new_tokens: int, added_bos: str = ""
) -> str:
    """The Modelfile with which Ollama makes a model of the GGUF file: `ollama create NAME -f Modelfile`.

    Ollama's templates are Go's, and it does not translate a chat template that it does not know. So the prompt is
    spelled out, as the model was trained with it; but for `added_bos`, which the engine puts before every prompt.

    Raises:
        InputError: the prompt holds what a Modelfile cannot hold.
    """
    head, tail = prompt_format.head.removeprefix(added_bos), prompt_format.tail
    before, found, behind = head.partition(system_prompt)
    written = _go(before) + "{{ .System }}" + _go(behind) if found else _go(head)
    lines = [
        f"FROM ./{file}",
        f"SYSTEM {_quoted(system_prompt)}",
        f"TEMPLATE {_quoted(written + '{{ .Prompt }}' + _go(tail))}",
        "PARAMETER temperature 0",
        f"PARAMETER num_predict {max_new_tokens}",
        f"PARAMETER stop {_quoted(prompt_format.stop_token)}",
    ]
    return "\n".join(lines) + "\n"


def _go(text: str) -> str:
    """Text in a Go template as it stands."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """Text as a value in a Modelfile."""
    if '"""' in text:
        raise InputError('the prompt holds """, which a Modelfile of Ollama cannot hold. Leave --gguf out.')
    return f'"""{text}"""'


@dataclass(frozen=True)
class Answered:
    """What llama.cpp made of some conversations: the answers, its version, and whether it begins prompts with BOS."""

    answers: list[str]
    engine: str
    adds_bos: bool


def answer_by_llama_cpp(
    path: str, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int, longest_prompt: int
) -> Answered:
    """The greedy answers of llama.cpp to some conversations, by the file's own chat template."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx, settings.n_parallel = longest_prompt + max_new_tokens + _CONTEXT, 1
    settings.n_gpu_layers, settings.warmup, settings.verbosity = 0, False, -1
    settings.cpuparams.n_threads = os.cpu_count() or 1
    server = xllamacpp.Server(settings)
    answers = []
    for messages in conversations:
        request = {"messages": messages, "temperature": 0, "max_tokens": max_new_tokens}
        answer: Any = server.handle_chat_completions(request)
        if "choices" not in answer:
            raise VerificationError(f"llama.cpp does not answer with {path}: {answer}.")
        answers.append(answer["choices"][0]["message"]["content"] or "")
    return Answered(answers, f"llama.cpp (xllamacpp {version('xllamacpp')})", _adds_bos(server.listening_address))


def _adds_bos(address: str) -> bool:
    """Whether llama.cpp begins a text with a special token: asked of itself, as its file need not say it."""
    body = json.dumps({"content": "", "add_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return bool(json.load(answer)["tokens"])
