"""A published folder in an older transformers: the same tokens, answers and logits. `make test-compat` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_level_bpe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from tweetdora.config import TaskConfig
from tweetdora.data import load_examples
from tweetdora.modeling import load_base, load_tokenizer, save_merged
from tweetdora.portable import TRIED_MODEL_TYPES, TRIED_VERSIONS, check_portable, make_portable
from tweetdora.prompts import PromptTokenizer, freeze_template, read_prompt_format

ROOT = Path(__file__).resolve().parent.parent
COMPAT = ROOT / ".compat"
pytestmark = pytest.mark.skipif(not (COMPAT / ".done").is_file(), reason="`make test-compat` makes .compat first")
# Nothing of ours: what anybody writes who has read the card.
ASK = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for folder, conversations in json.load(open(sys.argv[1])).items():
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    part = found[folder] = {"version": transformers.__version__, "ids": [], "answers": [], "logits": []}
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            part["logits"].append(model(**inputs).logits[0, -1].topk(5).values.tolist())
        answer = model.generate(**inputs, max_new_tokens=4)
        part["ids"].append(inputs["input_ids"][0].tolist())
        part["answers"].append(answer[0, inputs["input_ids"].shape[1] :].tolist())
json.dump(found, open(sys.argv[2], "w"))
"""


def ask(conversations: dict[str, list[Any]], place: Path, old: bool) -> dict[str, Any]:
    """What the models in these folders make of conversations, in this transformers or in the older one."""
    (place / "conversations.json").write_text(json.dumps(conversations))
    words = [sys.executable, "-c", ASK, str(place / "conversations.json"), str(place / "out.json")]
    environment = {**os.environ, "PYTHONPATH": str(COMPAT) if old else ""}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "out.json").read_text())
    assert {part["version"] for part in found.values()} == {TRIED_VERSIONS[0 if old else 1]}
    return found


def assert_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert old["ids"] == new["ids"] and old["answers"] == new["answers"]
    torch.testing.assert_close(torch.tensor(old["logits"]), torch.tensor(new["logits"]), atol=1e-4, rtol=1e-4)


def publish(model: Any, tokenizer: Any, task: TaskConfig, folder: Path) -> list[Any]:
    """Save a model as push_to_hub.py does; what is to be asked."""
    found = read_prompt_format(tokenizer, task)
    prompt_tokenizer = PromptTokenizer(tokenizer, found, task.max_length)
    freeze_template(tokenizer, found, task)
    save_merged(model, tokenizer, [prompt_tokenizer.stop_token_id], str(folder))
    make_portable(str(folder))
    check_portable(str(folder))
    return [found.messages(task.system_prompt, text) for text in ("What a good day", "Such a bad trip", "news")]


THETA = 1234.0  # no version's default
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny(kind: str, vocabulary: int, **settings: Any) -> Any:
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 4,
    }
    if kind == "gemma3_text":
        by_layer = {"full_attention": THETA, "sliding_attention": THETA / 2}
        rope = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in by_layer.items()}
        fields |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    else:
        rope = {"rope_type": "default", "rope_theta": THETA}
    if kind in ("gpt_neox", "stablelm", "phi3"):
        rope |= {"partial_rotary_factor": 0.5}
    config = AutoConfig.for_model(kind, **{**fields, "rope_parameters": rope, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():  # large ones, so that positions matter
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), chat_template=CHATML, **names)


LLAMA_3 = {
    **{"rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
NAMES = [*TRIED_MODEL_TYPES, "llama 3", "real", "without the older fields"]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By name what the older and this transformers make of each model; all models in one process of each."""
    place = tmp_path_factory.mktemp("compat")
    words = tokenizer()
    asked = {}
    for name in NAMES[:-2]:
        kind, settings = ("llama", {"rope_parameters": LLAMA_3}) if name == "llama 3" else (name, {})
        folder = place / name
        asked[str(folder)] = publish(tiny(kind, len(words), **settings), tokenizer(), TaskConfig(), folder)
    asked[str(place / "real")] = publish_the_real_one(place / "real")
    bare = place / NAMES[-1]
    asked[str(bare)] = publish(tiny("llama", len(words)), words, TaskConfig(), bare)
    config = json.loads((bare / "config.json").read_text())
    assert config.pop("rope_theta") == THETA
    (bare / "config.json").write_text(json.dumps(config))
    old, new = (ask(asked, place, old) for old in (True, False))
    return {name: {"old": old[str(place / name)], "new": new[str(place / name)]} for name in NAMES}


def publish_the_real_one(folder: Path) -> list[Any]:
    """The quickstart's base as it is, and real tweets."""
    base = str(ROOT / "assets/SmolLM2-135M-Instruct")
    task = TaskConfig(dataset_name=str(ROOT / "assets/hutto_tweets"))
    words = load_tokenizer(base)
    publish(load_base(base, None, torch.float32, torch.device("cpu")), words, task, folder)
    found = read_prompt_format(words, task)
    return [found.messages(task.system_prompt, text) for text in load_examples(task, "test", None).texts[:24]]


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_model_of_this_kind_is_the_same_in_both_versions(name, answers):
    assert_the_same(**answers[name])


def test_without_the_older_fields_it_would_be_another_model(answers):
    """The companion."""
    found = answers[NAMES[-1]]
    assert (torch.tensor(found["old"]["logits"]) - torch.tensor(found["new"]["logits"])).abs().max() > 1e-2
