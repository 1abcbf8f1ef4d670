"""Convert the merged model to a GGUF file for llama.cpp and Ollama, with llama.cpp's own converter.

No package contains the converter; it comes with llama.cpp's source. `make .llama.cpp` unpacks the one in
llama-cpp-python's source archive, and any checkout of llama.cpp works too.
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
_CONTEXT = 256  # tokens beyond the longest prompt and answer, as llama.cpp tokenizes a template slightly differently
_LAST_LINES = 5
_SECONDS = 60.0  # timeout for llama.cpp's server, which runs in this process


def check_converter(llama_cpp: str, architecture: str) -> None:
    """Check, before any work, for the packages, the converter and its support of the architecture.

    Raises:
        InputError: Something is missing; the message says what, and how to get it.
    """
    check_installed("--gguf", "gguf", _PACKAGES)
    path = os.path.join(llama_cpp, CONVERTER)
    if not os.path.isfile(path):
        raise InputError(
            f"--gguf needs llama.cpp's converter, but {path} does not exist. Fetch it with `make .llama.cpp`, or name "
            "a checkout of llama.cpp with --llama_cpp (git clone --depth 1 https://github.com/ggml-org/llama.cpp)."
        )
    done = _run(path, "--print-supported-models")
    if done.returncode:
        raise InputError(f"{path} does not run here: {_last_lines(done.stdout)}")
    if not re.search(rf"^.*- {re.escape(architecture)}$", done.stdout, re.MULTILINE):
        raise InputError(f"--gguf: the converter in {llama_cpp} does not support {architecture}. Leave --gguf out.")


def write_gguf(folder: str, name: str, kind: str, llama_cpp: str) -> str:
    """Convert the model in a folder to a GGUF file in it, of type q8_0 or f16, and return the file's name.

    Raises:
        VerificationError: The converter failed.
    """
    file = f"{name}-{kind.upper()}.gguf"  # the form of name that the Hub and Ollama look for
    words = [os.path.join(llama_cpp, CONVERTER), folder, "--outtype", kind, "--model-name", name]
    done = _run(*words, "--outfile", os.path.join(folder, file))
    if done.returncode:
        raise VerificationError(f"llama.cpp's converter failed: {_last_lines(done.stdout)}.")
    return file


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # otherwise it looks up the base model's card
    return subprocess.run(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _last_lines(text: str) -> str:
    return " ".join(text.strip().splitlines()[-_LAST_LINES:])


def modelfile(
    file: str, prompt_format: PromptFormat, system_prompt: str, max_new_tokens: int, added_bos: str = ""
) -> str:
    """Write the Modelfile from which Ollama creates a model: `ollama create NAME -f Modelfile`.

    Ollama uses Go templates and does not translate a chat template that it does not know. So the Modelfile spells out
    the prompt that the model was trained with, without `added_bos`, which the engine puts before every prompt.

    Raises:
        InputError: A Modelfile cannot hold this prompt.
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
    """Escape a text for a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    """Quote a text as a value in a Modelfile."""
    if '"""' in text:
        raise InputError('the prompt holds """, which Ollama does not allow in a Modelfile. Leave --gguf out.')
    return f'"""{text}"""'


@dataclass(frozen=True)
class Answered:
    """llama.cpp's answers to some conversations, its version, and whether it starts prompts with BOS."""

    answers: list[str]
    engine: str
    adds_bos: bool


def answer_by_llama_cpp(
    path: str, conversations: Sequence[list[dict[str, Any]]], max_new_tokens: int, longest_prompt: int
) -> Answered:
    """Generate llama.cpp's greedy answers to some conversations, with the chat template in the file."""
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
            raise VerificationError(f"llama.cpp gave no answer with {path}: {answer}.")
        answers.append(answer["choices"][0]["message"]["content"] or "")
    return Answered(answers, f"llama.cpp (xllamacpp {version('xllamacpp')})", _adds_bos(server.listening_address))


def _adds_bos(address: str) -> bool:
    """True if llama.cpp starts a text with a special token. The server is asked, as the file need not say so."""
    body = json.dumps({"content": "", "add_special": True}).encode()
    request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
        return bool(json.load(answer)["tokens"])
