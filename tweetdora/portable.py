"""Make a published folder load as the same model in transformers 4 and transformers.js, not only in transformers 5.

transformers 5 writes the rotary embedding's settings as one mapping, rope_parameters, which version 4 does not read.
Version 4 silently falls back to its defaults, which changes the model (SmolLM2's base of 100,000 becomes 10,000). The
published configuration therefore has the fields of both versions. transformers.js reads the chat template from
tokenizer_config.json only.
"""

import os
from typing import Any

from tweetdora.errors import VerificationError
from tweetdora.files import read_json, write_json

TRIED_VERSIONS = ("4.57.6", "5.23.0")  # give the same answers in `make test-compat`
# Model types that `make test-compat` compared in both versions, with different bases of the rotary embedding.
TRIED_MODEL_TYPES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "smollm3", "olmo2", "granite"),
    *("gpt_neox", "stablelm", "starcoder2"),
)
_CONFIG, _TOKENIZER, _TEMPLATE = "config.json", "tokenizer_config.json", "chat_template.jinja"
# Fields in which transformers 5 stores how it was called; readers do not need them, and other libraries lack them.
_OF_THE_WRITER = ("backend", "is_local", "local_files_only")


def make_portable(folder: str) -> None:
    """Add the fields that others need to a folder's configuration and tokenizer; make its files world-readable."""
    for name, change in ((_CONFIG, _portable_config), (_TOKENIZER, _portable_tokenizer)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            write_json(path, change(read_json(path), folder))
    for place, _, files in os.walk(folder):
        for name in files:
            os.chmod(os.path.join(place, name), 0o644)  # safetensors writes files that only their owner can read


def _portable_config(config: dict[str, Any], folder: str) -> dict[str, Any]:
    parts = {name: _portable_config(part, folder) for name, part in config.items() if name == "text_config"}
    return {**config, **parts, **_version_4_rope(config)}


def _version_4_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings under version 4's names."""
    found = config.get("rope_parameters")
    if not found:
        return {}
    by_layer = {name: part for name, part in found.items() if isinstance(part, dict)}
    main = by_layer.get("full_attention", found) if by_layer else found
    if "rope_theta" not in main:  # other kinds of layers, in models that version 4 does not have
        return {}
    fields: dict[str, Any] = {"rope_theta": main["rope_theta"]}
    if "sliding_attention" in by_layer:
        fields["rope_local_base_freq"] = by_layer["sliding_attention"]["rope_theta"]
    if main.get("partial_rotary_factor") is not None:
        fields["partial_rotary_factor"] = main["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":
        fields |= {"rotary_emb_base": main["rope_theta"], "rotary_pct": main.get("partial_rotary_factor", 1.0)}
    if main.get("rope_type", "default") != "default":
        own = ("rope_theta", "partial_rotary_factor")
        fields["rope_scaling"] = {name: value for name, value in main.items() if name not in own}
    return fields


def _portable_tokenizer(config: dict[str, Any], folder: str) -> dict[str, Any]:
    fields = {name: value for name, value in config.items() if name not in _OF_THE_WRITER}
    if fields.get("tokenizer_class") == "TokenizersBackend":  # version 5's name for the same class
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields.setdefault("model_input_names", ["input_ids", "attention_mask"])
    fields["padding_side"] = "left"  # so that generation continues each prompt of a batch
    template = os.path.join(folder, _TEMPLATE)
    if os.path.isfile(template):
        with open(template, encoding="utf-8") as stream:
            fields["chat_template"] = stream.read()
    return fields


def check_portable(folder: str) -> None:
    """Check the written files, field by field.

    Raises:
        VerificationError: another reader would miss a field or read a wrong value; the message names it.
    """
    wrong = []
    config = read_json(os.path.join(folder, _CONFIG)) if os.path.isfile(os.path.join(folder, _CONFIG)) else {}
    tokenizer = read_json(os.path.join(folder, _TOKENIZER))
    for name, value in _version_4_rope(config).items():
        if config.get(name) != value:
            wrong.append(f"{_CONFIG} has {name} {config.get(name)!r}; expected {value!r}")
    if tokenizer.get("tokenizer_class") in (None, "TokenizersBackend"):
        wrong.append(
            f"{_TOKENIZER} has tokenizer_class {tokenizer.get('tokenizer_class')!r}, which version 4 does not know"
        )
    for name in ("chat_template", "model_input_names", "padding_side"):
        if not tokenizer.get(name):
            wrong.append(f"{_TOKENIZER} has no {name}")
    for place, _, files in os.walk(folder):
        for name in files:
            if os.stat(os.path.join(place, name)).st_mode & 0o444 != 0o444:
                wrong.append(f"{name} is not readable by all users")
    if wrong:
        raise VerificationError(
            f"the folder cannot be used by other programs: {'; '.join(wrong)}. Nothing was published."
        )


def model_type(folder: str) -> str | None:
    """The type of the model in a folder; None if it holds only an adapter."""
    path = os.path.join(folder, _CONFIG)
    return read_json(path).get("model_type") if os.path.isfile(path) else None


def supported_versions(model_type: str | None) -> str:
    """The card's text on the versions of transformers that can read the model.

    >>> supported_versions("llama")
    'transformers 4.57.6 and 5.23.0 (tested)'
    """
    old, new = TRIED_VERSIONS
    if model_type in TRIED_MODEL_TYPES:
        return f"transformers {old} and {new} (tested)"
    return f"transformers>=5 (tested with {new}; this model type was not tested with 4)"
