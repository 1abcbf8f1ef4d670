"""Export the merged model to ONNX files for onnxruntime and transformers.js, with onnxruntime-genai's model builder.

    onnx/model.onnx              float32
    onnx/model_quantized.onnx    weights of the linear layers in 8 bits, which transformers.js calls q8

The weights are next to each file, in <file>_data, where transformers.js looks for them. (optimum-onnx 0.1 cannot be
used here: it needs transformers below 4.58.)
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from tweetdora.errors import InputError, VerificationError
from tweetdora.extras import check_installed
from tweetdora.files import read_json, write_json

FOLDER = "onnx"
FILES = {"float32": "model.onnx", "int8": "model_quantized.onnx"}
_PACKAGES = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")
# Activations stay in float32 (accuracy level 1): in 8 bits, they changed one first token in 16 (LOG.md).
_OPTIONS = {"float32": ["-p", "fp32"], "int8": ["-p", "int8", "--extra_options", "accuracy_level=1"]}


def check_exporter(architecture: str) -> None:
    """Check, before any work, for the packages and the exporter's support of the architecture.

    Raises:
        InputError: Something is missing; the message says what.
    """
    check_installed("--onnx", "onnx", _PACKAGES)
    import onnxruntime_genai

    # The builder has no list of architectures, only a chain of comparisons, so its source is searched.
    builder = os.path.join(os.path.dirname(onnxruntime_genai.__file__), "models", "builder.py")
    with open(builder, encoding="utf-8") as stream:
        if f'"{architecture}"' not in stream.read():
            raise InputError(
                f"--onnx: onnxruntime-genai {version('onnxruntime-genai')} does not support {architecture}. "
                "Leave --onnx out."
            )


def write_onnx(folder: str) -> None:
    """Export the model in a folder to its subfolder `onnx`.

    Raises:
        VerificationError: The exporter failed.
    """
    os.makedirs(os.path.join(folder, FOLDER))
    for kind, file in FILES.items():
        with tempfile.TemporaryDirectory(dir=folder) as place:
            words = ["-m", "onnxruntime_genai.models.builder", "-m", folder, "-o", place, "-e", "cpu", "-c", place]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(
                [sys.executable, *words, *_OPTIONS[kind]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
            if done.returncode:
                said = " ".join(done.stdout.strip().splitlines()[-3:])
                raise VerificationError(f"onnxruntime-genai's builder failed: {said}.")
            _take(place, folder, file)


def declare_onnx(folder: str) -> None:
    """Tell transformers.js, in the model's config.json, where the weights are."""
    path = os.path.join(folder, "config.json")
    where = {"use_external_data_format": {file: 1 for file in FILES.values()}}
    write_json(path, {**read_json(path), "transformers.js_config": where})


def _take(place: str, folder: str, file: str) -> None:
    """Move an exported model to the folder's `onnx` under a new name, and rename its weights in the graph."""
    import onnx

    width = _head_dim(read_json(os.path.join(folder, "config.json")))
    graph = onnx.load(os.path.join(place, "model.onnx"), load_external_data=False)
    for state in (*graph.graph.input, *graph.graph.output):
        if state.name.startswith(("past_key_values", "present")):
            # The builder makes the width symbolic, and transformers.js creates the empty states with 0 for a symbol.
            state.type.tensor_type.shape.dim[3].dim_value = width
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{file}_data"
    onnx.save(graph, os.path.join(folder, FOLDER, file))
    os.replace(os.path.join(place, "model.onnx.data"), os.path.join(folder, FOLDER, f"{file}_data"))


def answer_by_onnxruntime(
    folder: str, file: str, prompts: Sequence[list[int]], max_new_tokens: int
) -> tuple[str, list[list[int]], list[np.ndarray]]:
    """Generate greedily with onnxruntime.

    Returns:
        The engine and its version; for each prompt the new token ids, without the stop token; and for each prompt the
        logits of the first new token, of shape (V,).
    """
    import onnxruntime

    stop_ids = read_json(os.path.join(folder, "generation_config.json"))["eos_token_id"]
    stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
    path = os.path.join(folder, file)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = {found.name: found for found in session.get_inputs()}
    outputs = [found.name for found in session.get_outputs()]
    answers, first_logits = [], []
    for prompt in prompts:
        feed: dict[str, Any] = {
            name: np.zeros((1, found.shape[1], 0, found.shape[3]), np.float32)
            for name, found in inputs.items()
            if name.startswith("past_key_values")
        }
        new: list[int] = []
        ids = prompt
        while len(new) < max_new_tokens:
            done = len(prompt) + len(new) - len(ids)
            feed |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, done + len(ids)), np.int64)}
            if "position_ids" in inputs:
                feed["position_ids"] = np.arange(done, done + len(ids))[None]
            found = dict(zip(outputs, session.run(None, feed), strict=True))
            logits = found["logits"][0, -1]
            if not new:
                first_logits.append(logits)
            token = int(logits.argmax())
            if token in stop_ids:
                break
            new.append(token)
            ids = [token]
            feed = {name.replace("present", "past_key_values"): value for name, value in found.items()}
            del feed["logits"]
        answers.append(new)
    return f"onnxruntime {version('onnxruntime')}", answers, first_logits


def _head_dim(config: dict[str, Any]) -> int:
    """Return the size of an attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
