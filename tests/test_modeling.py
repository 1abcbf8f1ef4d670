"""Base and adapter: attached, saved, loaded and merged without a change in what the model answers.

A fresh DoRA adapter answers like its base, so whatever loses it goes unseen: the adapters here have left their start.
"""

import copy
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tweetdora import modeling
from tweetdora.config import ModelConfig
from tweetdora.errors import HubError, InputError
from tweetdora.modeling import (
    adapter_folder,
    attach_adapter,
    base_identity,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    read_adapter_config,
    read_published_task,
    save_adapter,
    save_merged,
    trainable_parameters,
)
from tweetdora.records import BaseModelCard, BaseModelRecord
from tweetdora.source_cards import read_base_card

CPU = torch.device("cpu")
IDS = torch.tensor([[3, 40, 41, 42, 43, 9, 10], [3, 50, 51, 42, 60, 9, 10]])


def base_of(model_dir: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(model_dir, None, dtype, CPU)


def new_adapter(model_dir: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> PeftModel:
    """An adapter at its random start."""
    base = base_of(model_dir, dtype)
    torch.manual_seed(seed)
    return attach_adapter(base, ModelConfig(**{"model_name_or_path": model_dir, **settings}))


def disturbed(model_dir: str, **settings: Any) -> PeftModel:
    """An adapter whose every part, magnitudes too, has left its start by so much that answers change."""
    model = new_adapter(model_dir, **settings).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight *= 1 + torch.rand_like(weight)
            elif "lora_" in name:
                weight += 0.5 * torch.randn_like(weight)
    return model


@torch.no_grad()
def probabilities(model: torch.nn.Module) -> torch.Tensor:
    """The next token's, behind every token of two rows."""
    return model(input_ids=IDS).logits.float().softmax(-1)


def assert_same_answers(actual: torch.nn.Module, expected: torch.Tensor) -> None:
    torch.testing.assert_close(probabilities(actual), expected, rtol=0, atol=1e-5)


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """By a thousand times what counts as equal above."""
    return bool((one - other).abs().max() > 1e-2)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def contrast_dir(model_dir, tmp_path_factory) -> str:
    """The tiny model with weights ten times as large: the original's answers are nearly uniform whatever is asked."""
    folder = str(tmp_path_factory.mktemp("contrast") / "tiny-contrast")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight *= 10
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


# Attaching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_weights_are_float32_whatever_the_base_is(dtype, model_dir):
    model = new_adapter(model_dir, dtype)
    kinds = {(weight.requires_grad, weight.dtype) for weight in model.parameters()}
    assert kinds == {(True, torch.float32), (False, dtype)}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Hidden size 32, keys and values 16, r 8: A 8 x 32, B 16 x 8, magnitude 16; two modules in two layers.
        ({}, 4 * (8 * 32 + 16 * 8 + 16)),
        ({"method": "lora"}, 4 * (8 * 32 + 16 * 8)),
        ({"r": 1}, 4 * (32 + 16 + 16)),
        ({"target_modules": ["q_proj"]}, 2 * (8 * 32 + 32 * 8 + 32)),
        # q and o 32 to 32, k and v 32 to 16, gate and up 32 to 64, down 64 to 32; the head is left out.
        ({"target_modules": ["all-linear"]}, 2 * (2 * 544 + 2 * 400 + 2 * (256 + 512 + 64) + (512 + 256 + 32))),
    ],
)
def test_number_of_trainable_parameters_is_the_one_worked_out_by_hand(settings, expected, model_dir):
    assert trainable_parameters(new_adapter(model_dir, **settings)) == expected


def test_trainable_parameters_of_the_published_run_are_448000(make_model):
    """On a model of one layer with the published shapes: 20 layers have 448,000, as PEFT's own count says."""
    base = make_model(
        "mistral", hidden_size=896, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16,
        num_key_value_heads=8, head_dim=56,
    )  # fmt: skip
    base.name_or_path = "tiny"
    assert 20 * trainable_parameters(attach_adapter(base, ModelConfig(model_name_or_path="tiny"))) == 448_000


def test_all_linear_leaves_the_head_alone(model_dir):
    model = new_adapter(model_dir, target_modules=["all-linear"])
    assert not [name for name, weight in model.named_parameters() if weight.requires_grad and "lm_head" in name]


def test_a_target_module_that_matches_nothing_is_refused_with_the_names_that_would(model_dir):
    with pytest.raises(
        InputError,
        match="^--target_modules key vproj matches no linear layer of .*tiny-llama; "
        "its linear layers are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.$",
    ):
        new_adapter(model_dir, target_modules=["k_proj", "key", "vproj"])


def test_a_fresh_adapter_changes_no_answer(model_dir):
    assert_same_answers(new_adapter(model_dir).eval(), probabilities(base_of(model_dir)))


def test_the_same_seed_gives_the_same_start(model_dir):
    first, second = (dict(new_adapter(model_dir, seed=3).named_parameters()) for _ in range(2))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_another_seed_gives_another_start(model_dir):
    first, second = (dict(new_adapter(model_dir, seed=seed).named_parameters()) for seed in (3, 4))
    assert not any(torch.equal(weight, second[name]) for name, weight in first.items() if "lora_A" in name)


def test_adapter_settings_are_those_of_the_configuration(model_dir):
    config = new_adapter(model_dir, r=4, lora_alpha=12, lora_dropout=0.25).peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.base_model_name_or_path) == (
        4,
        12,
        0.25,
        True,
        model_dir,
    )


# Saving and loading the adapter


def test_a_saved_adapter_is_two_files_of_peft_and_nothing_else(model_dir, tmp_path):
    save_adapter(new_adapter(model_dir), str(tmp_path / "adapter"))
    assert sorted(os.listdir(tmp_path / "adapter")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_saved_adapter_holds_the_trained_weights_and_no_others(model_dir, tmp_path):
    model = disturbed(model_dir)
    save_adapter(model, str(tmp_path))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    # PEFT leaves the adapter's name out of the file.
    expected = {
        name.replace(".default.weight", ".weight").replace("vector.weight", "vector"): weight
        for name, weight in trained.items()
    }
    saved = saved_weights(tmp_path)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


@pytest.fixture
def asked_of_the_hub(monkeypatch) -> list[str]:
    """What PEFT would look up on the Hub; the answer is that there is nothing."""
    asked = []

    def note(repo_id: str, filename: str, **kwargs: Any) -> bool:
        asked.append(f"{repo_id}/{filename}")
        return False

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", note)
    return asked


def hub_adapter(make_model: Any) -> PeftModel:
    """An adapter whose base is said to come from the Hub."""
    base = make_model()
    base.name_or_path = "someone/tiny"
    return attach_adapter(base, ModelConfig(model_name_or_path="someone/tiny"))


def test_saving_an_adapter_asks_nothing_of_the_hub(make_model, tmp_path, asked_of_the_hub):
    save_adapter(hub_adapter(make_model), str(tmp_path))
    assert asked_of_the_hub == []


def test_peft_left_to_itself_would_ask_the_hub(make_model, tmp_path, asked_of_the_hub):
    """The companion: were it not so, the test above could not fail."""
    hub_adapter(make_model).save_pretrained(tmp_path)
    assert asked_of_the_hub == ["someone/tiny/config.json"]


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_loaded_adapter_answers_like_the_saved_one(method, contrast_dir, tmp_path):
    model = disturbed(contrast_dir, method=method)
    save_adapter(model, str(tmp_path))
    expected = probabilities(model)
    assert differ(expected, probabilities(base_of(contrast_dir)))
    assert_same_answers(load_adapter(base_of(contrast_dir), str(tmp_path)), expected)


def test_a_loaded_adapter_is_in_evaluation_mode_and_frozen(model_dir, tmp_path):
    save_adapter(new_adapter(model_dir), str(tmp_path))
    model = load_adapter(base_of(model_dir), str(tmp_path))
    assert (model.training, trainable_parameters(model)) == (False, 0)


def test_an_adapter_that_does_not_fit_on_the_disk_is_an_error_of_the_system(model_dir, tmp_path, monkeypatch):
    """safetensors has an error of its own for it, which no script would catch."""
    model = new_adapter(model_dir)

    def full(*arguments: Any, **more: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="the adapter could not be written .*No space left") as caught:
        save_adapter(model, str(tmp_path))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


def test_transformers_alone_drops_the_magnitudes_of_a_dora_adapter(contrast_dir, tmp_path):
    """A trap, not a wish: why a run publishes the merged model. When this fails, the trap is gone; tell so."""
    model = disturbed(contrast_dir)
    save_adapter(model, str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trapped = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differ(probabilities(trapped), probabilities(model))
    # Second way: the same weights with the magnitudes of a fresh adapter.
    start = dict(new_adapter(contrast_dir).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight.copy_(start[name])
    assert_same_answers(trapped, probabilities(model))


def test_a_folder_without_an_adapter_is_refused_by_name(model_dir):
    with pytest.raises(
        InputError, match="tiny-llama holds no adapter_config.json; expected an adapter folder that PE"
    ):
        load_adapter(base_of(model_dir), model_dir)


def test_an_adapter_of_another_base_is_refused(model_dir, make_model, tmp_path):
    save_adapter(new_adapter(model_dir), str(tmp_path))
    other = make_model(hidden_size=64)
    other.name_or_path = "other"
    with pytest.raises(
        InputError, match=rf"^the adapter in {tmp_path} does not fit the base model other: .*\s.*size mismatch"
    ):
        load_adapter(other, str(tmp_path))


def test_adapter_settings_are_read_from_its_folder(model_dir, tmp_path):
    save_adapter(new_adapter(model_dir, r=4), str(tmp_path))
    assert (read_adapter_config(str(tmp_path)).r, adapter_folder(str(tmp_path))) == (4, str(tmp_path))


def test_a_folder_without_an_adapter_has_no_adapter_settings(model_dir):
    assert read_adapter_config(model_dir) is None


# Merging


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("target_modules", [["k_proj", "v_proj"], ["all-linear"]])
def test_merged_model_answers_like_base_and_adapter(method, target_modules, contrast_dir):
    model = disturbed(contrast_dir, method=method, target_modules=target_modules)
    expected = probabilities(model)
    assert differ(expected, probabilities(base_of(contrast_dir)))
    assert_same_answers(merge(model), expected)


def test_magnitudes_alone_change_the_answers(contrast_dir):
    """So that a merge without them would be seen above."""
    model = new_adapter(contrast_dir).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "magnitude" in name:
                weight *= torch.linspace(0.2, 3, len(weight))
    assert differ(probabilities(model), probabilities(base_of(contrast_dir)))


@pytest.fixture(scope="module")
def stored_in_bf16(contrast_dir, tmp_path_factory) -> str:
    """A base stored in bfloat16, in files of at most 20 kB."""
    folder = str(tmp_path_factory.mktemp("bf16") / "base")
    shutil.copytree(contrast_dir, folder)
    os.remove(f"{folder}/model.safetensors")
    base_of(contrast_dir, torch.bfloat16).save_pretrained(folder, max_shard_size=20_000)
    return folder


def too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling, "available_memory_bytes", lambda device: 1000)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["dora", "lora"])
def test_a_base_too_large_for_float32_is_merged_as_it_is_stored(method, dtype, stored_in_bf16, tmp_path, monkeypatch):
    """Bit for bit what a merge in float32 gives."""
    save_adapter(disturbed(stored_in_bf16, method=method), str(tmp_path))
    whole = modeling.load_for_merge(stored_in_bf16, None, dtype, CPU)
    assert whole.dtype == torch.float32
    expected = merge(load_adapter(whole, str(tmp_path)), dtype).state_dict()
    too_little_memory(monkeypatch)
    base = modeling.load_for_merge(stored_in_bf16, None, dtype, CPU)
    assert base.dtype == torch.bfloat16
    merged = merge(load_adapter(base, str(tmp_path)), dtype)
    found = merged.state_dict()
    assert found.keys() == expected.keys() and {weight.dtype for weight in found.values()} == {dtype}
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name
    if dtype == torch.float16:  # rounded to bfloat16 on the way, the weights are others
        rough = load_adapter(base_of(stored_in_bf16, torch.bfloat16), str(tmp_path)).merge_and_unload().to(dtype)
        assert any(not torch.equal(weight, expected[name]) for name, weight in rough.state_dict().items())


def test_a_base_stored_in_float32_is_never_rounded_before_a_merge(contrast_dir, stored_in_bf16, monkeypatch, caplog):
    too_little_memory(monkeypatch)
    with caplog.at_level("INFO", logger="tweetdora"):
        assert modeling.load_for_merge(contrast_dir, None, torch.bfloat16, CPU).dtype == torch.float32
        assert modeling.load_for_merge(stored_in_bf16, None, torch.float32, CPU).dtype == torch.float32
    notes = [line.getMessage() for line in caplog.records if "It is loaded anyway" in line.getMessage()]
    assert len(notes) == 2 and notes[0].endswith("needed in float32, as it is stored.")
    assert notes[1].endswith("float32 for the result. Ask for a bfloat16 result (--dtype bfloat16, --precision bf16).")


def test_merged_frequencies_are_those_of_the_published_model(contrast_dir, tmp_path):
    """The frequencies of rotary embeddings are in no checkpoint; rounded to bfloat16, they change answers."""
    merged = merge(disturbed(contrast_dir), torch.bfloat16)
    save_merged(merged, load_tokenizer(contrast_dir), [2, 4], str(tmp_path))
    published = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, buffer in published.named_buffers():
        assert torch.equal(merged.get_buffer(name), buffer) and buffer.dtype == torch.float32, name
    merged.set_attn_implementation("sdpa")
    assert torch.equal(merged(input_ids=IDS).logits, published(input_ids=IDS).logits)


def test_an_adapter_on_experts_is_merged(make_model, tmp_path):
    """PEFT wraps their parameters, which belong to no linear layer, and puts two wrappers on one layer."""
    settings = {"num_local_experts": 2, "num_experts_per_tok": 1}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        base = make_model("mixtral", **settings).to(torch.bfloat16).to(dtype)
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        torch.manual_seed(3)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["k_proj"], target_parameters=names))
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape)
        found.append(merge(adapted, torch.float16).state_dict())
    for name, weight in found[0].items():
        assert torch.equal(found[1][name], weight), name


@pytest.mark.parametrize("fault", ["pointer", "missing shard"])
def test_what_loading_says_of_bad_weights_a_merge_says_too(fault, stored_in_bf16, tmp_path):
    shutil.copytree(stored_in_bf16, tmp_path / "base")
    shard = next((tmp_path / "base").glob("*.safetensors"))
    shard.unlink() if fault == "missing shard" else shard.write_text("version https://git-lfs.github.com/spec/v1\n")
    said = []
    for load in (load_base, modeling.load_for_merge):
        with pytest.raises(InputError) as caught:
            load(str(tmp_path / "base"), None, torch.float32, CPU)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_checkpoint_of_two_dtypes_counts_as_float32(contrast_dir, tmp_path, monkeypatch):
    """Its config.json may say bfloat16, and transformers would round what is stored in float32."""
    shutil.copytree(contrast_dir, tmp_path / "base")
    weights = load_file(f"{contrast_dir}/model.safetensors")
    name = next(iter(weights))
    half = {other: weight.half() for other, weight in weights.items()}
    save_file({**half, name: weights[name].bfloat16()}, tmp_path / "base/model.safetensors", {"format": "pt"})
    too_little_memory(monkeypatch)
    assert modeling.load_for_merge(str(tmp_path / "base"), None, torch.bfloat16, CPU).dtype == torch.float32


def test_a_merge_that_gives_nan_is_refused(model_dir):
    model = disturbed(model_dir)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        merge(model)


@pytest.fixture(scope="module")
def published(contrast_dir, tmp_path_factory) -> tuple[str, torch.Tensor]:
    """A merged model's folder, and the answers of base and adapter before the merge."""
    folder = str(tmp_path_factory.mktemp("published") / "model")
    model = disturbed(contrast_dir)
    expected = probabilities(model)
    save_merged(merge(model), load_tokenizer(contrast_dir), [2, 4], folder)
    return folder, expected


def test_a_large_model_is_saved_in_several_files(contrast_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "MAX_SHARD_BYTES", 30_000)
    model = disturbed(contrast_dir)
    expected = probabilities(model)
    save_merged(merge(model), load_tokenizer(contrast_dir), [2, 4], str(tmp_path))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert_same_answers(AutoModelForCausalLM.from_pretrained(tmp_path).eval(), expected)


def test_saved_merged_model_answers_the_same_in_vanilla_transformers(published, contrast_dir):
    folder, expected = published
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert differ(expected, probabilities(base_of(contrast_dir)))
    assert (model.dtype, model.config._attn_implementation) == (torch.float32, "sdpa")
    assert_same_answers(model, expected)


def test_saved_merged_model_has_no_adapter_and_no_attention_function_of_ours(published):
    texts = [path.read_text() for path in Path(published[0]).glob("*.json")]
    assert not [text for text in texts if "tweetdora" in text or "lora" in text]


def test_saved_merged_model_is_safetensors_configuration_and_tokenizer(published):
    assert sorted(os.listdir(published[0])) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_saved_generation_config_is_greedy_and_holds_the_stop_ids(published):
    """The tiny base ships eos 2 alone, like the published one, and its chat template writes 4."""
    generation = AutoModelForCausalLM.from_pretrained(published[0]).generation_config
    found = (generation.do_sample, generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
    assert found == (False, 1, [2, 4], 4)


def test_saved_configuration_lets_generation_use_its_cache(model_dir, tokenizer, tmp_path):
    model = base_of(model_dir)
    model.config.use_cache = False  # as gradient checkpointing leaves it
    save_merged(model, tokenizer, [2, 4], str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True


def test_saved_tokenizer_gives_the_same_ids_and_chat(published, tokenizer):
    saved = AutoTokenizer.from_pretrained(published[0])
    text = "What a good day <|im_end|> 🌞\n"
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert saved.chat_template == tokenizer.chat_template
    assert saved.get_vocab() == tokenizer.get_vocab()


def test_saved_in_bf16_the_weights_are_those_of_float32_rounded(published, contrast_dir, tmp_path):
    save_merged(merge(disturbed(contrast_dir), torch.bfloat16), load_tokenizer(contrast_dir), [2, 4], str(tmp_path))
    rounded, exact = load_file(tmp_path / "model.safetensors"), load_file(Path(published[0]) / "model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in rounded.items())


def test_a_tokenizer_without_a_pad_token_pads_with_a_special_stop_token(model_dir, make_tokenizer, tmp_path):
    """</s>, 2, is not special in the tiny tokenizer; as a pad token, it would be. Batches need a pad token."""
    save_merged(base_of(model_dir), make_tokenizer(pad_token=None), [2, 4], str(tmp_path))
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 4
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.pad_token, saved("a</s>b").input_ids) == ("<|im_end|>", make_tokenizer()("a</s>b").input_ids)
    assert saved(["a", "a b"], padding=True)["input_ids"]


def test_a_model_without_a_special_stop_token_pads_with_a_stop_id(model_dir, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(pad_token=None, eos_token=None)
    save_merged(base_of(model_dir), tokenizer, [7], str(tmp_path))
    assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 7


# Which base


def test_identity_of_a_folder_names_architecture_size_and_weights(model_dir):
    import hashlib

    sha256 = hashlib.sha256((Path(model_dir) / "model.safetensors").read_bytes()).hexdigest()
    base = base_of(model_dir)
    assert base_identity(base, model_dir, None) == BaseModelRecord(
        name_or_path=model_dir,
        revision=None,
        architecture="LlamaForCausalLM",
        parameters=sum(len(weight.flatten()) for weight in base.state_dict().values()),
        weights_sha256={"model.safetensors": sha256},
    )


def test_identity_changes_when_a_weight_changes(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 0.001
    model.save_pretrained(tmp_path)
    before, after = (vars(base_identity(base_of(folder), folder, None)) for folder in (model_dir, str(tmp_path)))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"name_or_path", "weights_sha256"}


def test_identity_of_a_hub_model_is_its_commit(make_model):
    identity = base_identity(make_model(), "someone/tiny", "0123abcd" * 5)
    assert (identity.revision, identity.weights_sha256) == ("0123abcd" * 5, None)


# Loading a base


def test_a_base_is_loaded_frozen_neither_in_training_nor_another_format(model_dir):
    model = base_of(model_dir, torch.bfloat16)
    assert (model.training, model.dtype) == (False, torch.bfloat16)


def test_a_quantised_base_is_refused(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError,
        match=f"^--model_name_or_path {tmp_path} is quantised; .* full-precision model; train.py --load_in_4bit true",
    ):
        base_of(str(tmp_path))


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "nothing"])
@pytest.mark.parametrize("load", [base_of, load_tokenizer])
def test_an_unknown_folder_is_named(load, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError,
        match=f"^--model_name_or_path {name}: there is no such folder, and it is not a Hub id .owner/name.*$",
    ):
        load(name)


def test_a_missing_quickstart_model_is_told_how_to_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="^--model_name_or_path assets/SmolLM2: .* `make assets` makes the quickstart"
    ):
        base_of("assets/SmolLM2")


@pytest.mark.parametrize("load", [base_of, load_tokenizer])
def test_without_the_hub_the_way_without_it_is_named(load):
    with pytest.raises(
        HubError,
        match="^--model_name_or_path someone/tiny: the Hugging Face Hub cannot be reached .*`make demo` runs",
    ):
        load("someone/tiny")


def test_the_revision_is_named_with_the_model():
    with pytest.raises(HubError, match="^--model_name_or_path someone/tiny, revision v1: the Hugging Face Hub"):
        load_base("someone/tiny", "v1", torch.float32, CPU)


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^--model_name_or_path {tmp_path}: .*config.json"):
        base_of(str(tmp_path))


def test_a_model_that_generates_no_text_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match=f"^--model_name_or_path {tmp_path}: Unrecognized configuration class"):
        base_of(str(tmp_path))


def test_weights_that_are_a_pickle_are_refused(model_dir, tmp_path):
    """Reading a pickle can run what its author wrote."""
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"^--model_name_or_path {tmp_path}: .*model.safetensors"):
        base_of(str(tmp_path))


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None])
def test_weights_that_are_a_pointer_or_cut_are_refused(content, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(content or weights.read_bytes()[:5000])
    with pytest.raises(InputError, match=f"^--model_name_or_path {tmp_path}: its weights are incomplete .*git lfs"):
        base_of(str(tmp_path))


def altered(model_dir: str, folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> str:
    """A copy of the model whose weights, and fields of its config, are others."""
    shutil.copytree(model_dir, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda weights: [weights.pop(name) for name in list(weights) if "layers.1.mlp" in name],
            {},
            "it lacks model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up",
        ),
        (
            lambda weights: weights.update({"score.weight": weights.pop("lm_head.weight")[:3]}),
            {"architectures": ["LlamaForSequenceClassification"]},
            "it lacks lm_head.weight, which would be random; and it also has score.weight, which the model does not "
            "use. config.json says LlamaForSequenceClassification; expected a complete causal language model.",
        ),
        (
            lambda weights: None,
            {"num_hidden_layers": 1},
            "it also has model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, model.layers.1."
            "mlp.gate_proj.weight and 6 more, which the model does not use",
        ),
        (lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"][:-1]}), {}, "lm_head.weight"),
        (lambda weights: weights.clear(), {}, "it lacks lm_head.weight, model.embed_tokens.weight, model.layers.0.in"),
    ],
    ids=["a layer's part missing", "a classifier", "layers too many", "another shape", "nothing"],
)
def test_a_checkpoint_that_is_not_the_models_is_refused_by_the_weights_names(
    change, config, message, model_dir, tmp_path
):
    """transformers fills what is missing at random, and only warns."""
    folder = altered(model_dir, tmp_path / "model", change, **config)
    with pytest.raises(InputError, match=f"^--model_name_or_path {folder}: ") as caught:
        base_of(folder)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_tied_head_that_is_not_in_the_file_is_not_missing(kind, make_model, tmp_path):
    make_model(kind, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    base = base_of(str(tmp_path))
    assert base.lm_head.weight is base.model.embed_tokens.weight


def test_a_base_folder_with_an_adapter_inside_is_refused(model_dir, tmp_path):
    """transformers puts it on, so that the base would be another one than its weights' hashes say."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    save_adapter(disturbed(model_dir, method="lora"), str(folder))
    with pytest.raises(InputError, match=f"^--model_name_or_path {folder} also holds an adapter .adapter_config.json"):
        base_of(str(folder))


def test_an_adapter_that_lacks_a_weight_is_refused(model_dir, tmp_path):
    """PEFT only warns, and that weight would be a new adapter's."""
    save_adapter(disturbed(model_dir), str(tmp_path))
    weights = load_file(tmp_path / "adapter_model.safetensors")
    removed = next(name for name in weights if "lora_B" in name)
    del weights[removed]
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="does not fit the base model .*missing adapter keys"):
        load_adapter(base_of(model_dir), str(tmp_path))


def test_an_adapter_on_a_head_that_is_the_embeddings_too_is_refused(make_model, tmp_path):
    """Merged, it would change what the model reads."""
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_model(tie_word_embeddings=False).save_pretrained(tmp_path / "apart")
    tied, apart = str(tmp_path / "tied"), str(tmp_path / "apart")
    with pytest.raises(
        InputError, match="^--target_modules lm_head: in .*tied it shares its weight with the embeddings"
    ):
        new_adapter(tied, target_modules=["k_proj", "lm_head"])
    save_adapter(new_adapter(apart, target_modules=["k_proj", "lm_head"]), str(tmp_path / "adapter"))
    with pytest.raises(InputError, match="^the adapter in .*adapter is on lm_head: in .*tied it shares its weight"):
        load_adapter(base_of(tied), str(tmp_path / "adapter"))
    load_adapter(base_of(apart), str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(task_type="SEQ_CLS"), "is for SEQ_CLS; expected CAUSAL_LM"),
        (
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "is of type PROMPT_TUNING, which has no",
        ),
    ],
)
def test_an_adapter_that_does_not_answer_in_words_or_cannot_be_merged_is_refused(config, message, tmp_path):
    config.base_model_name_or_path = "someone/tiny"
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"^the adapter {tmp_path} {message}"):
        read_adapter_config(str(tmp_path))


def test_a_tokenizer_of_an_unknown_form_is_a_line_with_the_librarys_words(model_dir, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "9.0", "model": {"type": "Unheard"}}')
    with pytest.raises(InputError, match=f"^--model_name_or_path {folder}: "):
        load_tokenizer(str(folder))


def test_layers_that_peft_puts_no_adapter_on_are_refused_with_its_words(model_dir, monkeypatch):
    def fail(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("no such layer\nfor us")

    monkeypatch.setattr(modeling, "get_peft_model", fail)
    message = (
        "^--target_modules k_proj: PEFT cannot put a dora adapter on these layers of a LlamaForCausalLM "
        ".RuntimeError: no such lay"
    )
    with pytest.raises(InputError, match=message):
        new_adapter(model_dir, target_modules=["k_proj"])


def head_inputs(model: PreTrainedModel) -> torch.Tensor:
    """What the head multiplies its weight with when only the last column's logits are wanted."""
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=IDS, logits_to_keep=1)
    return seen[0]


def test_the_head_gets_contiguous_states(model_dir):
    """torch.matmul copies the head's weight once for each row of a strided view."""
    assert head_inputs(base_of(model_dir)).is_contiguous()


def test_the_head_of_transformers_own_model_gets_a_view(model_dir):
    """The companion: were it not so, the test above could not fail."""
    assert not head_inputs(AutoModelForCausalLM.from_pretrained(model_dir)).is_contiguous()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gemma2", {"head_dim": 8}), ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8})],
)
def test_a_base_whose_attention_is_more_than_ours_keeps_its_own(kind, settings, make_model, tmp_path):
    """Capped scores (Gemma 2) and sinks (gpt-oss) are no part of scaled dot product attention."""
    if kind == "gpt_oss":
        settings = {**settings, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    model = make_model(kind, **settings)
    model.save_pretrained(tmp_path)
    assert_same_answers(base_of(str(tmp_path)), probabilities(model))


# The base's own card


def test_the_base_card_gives_licence_and_languages(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- x\n---\n# A model\n")
    assert read_base_card(str(tmp_path), None) == BaseModelCard(license="apache-2.0", language=["en"])


def test_the_base_card_gives_what_it_is_a_conversion_of_and_not_its_parent(tmp_path):
    card = "---\nbase_model: owner/parent\nconverted_from: owner/tiny\nconverted_file: tiny.gguf\n---\n# A model\n"
    (tmp_path / "README.md").write_text(card)
    assert read_base_card(str(tmp_path), None) == BaseModelCard(
        converted_from="owner/tiny", converted_file="tiny.gguf"
    )


def test_a_folder_without_a_card_has_none_and_nothing_is_looked_up(model_dir, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"asked for {args} {kwargs}")

    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", refuse)
    monkeypatch.setattr(modeling, "hf_hub_download", refuse)
    monkeypatch.chdir(os.path.dirname(model_dir))
    assert read_base_card(os.path.basename(model_dir), None) == BaseModelCard()


@pytest.mark.parametrize("text", ["no metadata", "---\nlicense: [\n---\n", "---\n- a\n- list\n---\n"])
def test_a_card_that_cannot_be_read_is_no_card(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert read_base_card(str(tmp_path), None) == BaseModelCard()


def test_the_card_of_a_hub_model_that_cannot_be_reached_is_no_card():
    assert read_base_card("someone/tiny", None) == BaseModelCard()


def test_adapter_settings_of_a_hub_repository_that_cannot_be_reached_are_unknown_not_none():
    """None would have the adapter measured as if it were a model."""
    with pytest.raises(HubError, match="^model or adapter someone/tiny: the Hugging Face Hub cannot be reached"):
        read_adapter_config("someone/tiny")


def test_a_model_in_the_cache_has_no_adapter_settings_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(modeling, "try_to_load_from_cache", lambda repo_id, name: str(tmp_path / name))
    assert read_adapter_config("someone/tiny") is None


def test_whether_a_model_in_the_cache_has_a_task_of_its_own_is_known_only_if_it_was_asked_for(monkeypatch, tmp_path):
    """transformers asks for no task.json. Without one, the published run's labels would be given to any model."""
    kept = {"config.json": str(tmp_path / "config.json")}
    monkeypatch.setattr(modeling, "try_to_load_from_cache", lambda repo_id, name: kept.get(name))
    with pytest.raises(HubError, match="^someone/tiny is in the cache, but not whether it has a task.json"):
        read_published_task("someone/tiny")
    kept["task.json"] = modeling._CACHED_NO_EXIST
    assert read_published_task("someone/tiny") is None


def hub_answer(kind: type[Exception]) -> Exception:
    """What the Hub's client raises for a 404; the address holds a word that also tells of a lost connection."""
    address = "https://huggingface.co/someone/tiny/resolve/main/adapter_config.json"
    response = httpx2.Response(404, request=httpx2.Request("HEAD", address))
    return kind(f"404 Client Error. Entry Not Found for url: {address}.", response=response)


def test_only_a_repository_that_has_no_adapter_config_has_no_adapter(monkeypatch):
    def answer(error: Exception) -> None:
        def raise_it(*args: Any) -> None:
            raise error

        monkeypatch.setattr(modeling, "hf_hub_download", raise_it)

    answer(hub_answer(RemoteEntryNotFoundError))
    assert read_adapter_config("someone/tiny") is None
    unknown = [hub_answer(kind) for kind in (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError)]
    wrapped = OSError("You are trying to access a gated repo: https://huggingface.co/someone/tiny/resolve/main")
    wrapped.__cause__ = unknown[1]  # as transformers raises it
    unknown.append(wrapped)
    for error, kind in [*((error, InputError) for error in unknown), (httpx2.ProxyError("refused"), HubError)]:
        answer(error)
        with pytest.raises(kind, match="^model or adapter someone/tiny: "):
            read_adapter_config("someone/tiny")


@pytest.mark.parametrize("name", ["./nothing", "no/such/folder"])
def test_an_adapter_that_is_neither_folder_nor_hub_id_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"^model or adapter {name}: there is no such folder, and it is not a Hub id"):
        read_adapter_config(name)


@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1", "[]", '{"peft_type": "NEW"}', '{"peft_type": "LORA"'],
    ids=["pointer", "list", "unknown kind", "cut"],
)
def test_adapter_settings_that_cannot_be_read_are_no_model(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(InputError, match=f"^the adapter_config.json of {tmp_path} cannot be read by PEFT .* again.$"):
        read_adapter_config(str(tmp_path))


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=f"^the adapter_config.json of {tmp_path} names no base_model_name_or_path;"):
        read_adapter_config(str(tmp_path))


def test_an_adapter_of_the_hub_that_cannot_be_reached_is_named():
    with pytest.raises(HubError, match="^adapter someone/tiny: the Hugging Face Hub cannot be reached"):
        adapter_folder("someone/tiny")


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=f"^the adapter {tmp_path} has no adapter_model.safetensors; save it again"):
        adapter_folder(str(tmp_path))


def test_saved_adapter_settings_name_the_base(model_dir, tmp_path):
    save_adapter(new_adapter(model_dir), str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == model_dir


# Bases for more than text


@pytest.fixture(scope="module")
def image_and_text_base():
    """A tiny Gemma 3 that takes images too; its image encoder has layers of the same names."""
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=61,
        boi_token_index=62,
        eoi_token_index=63,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.name_or_path = ModelConfig().model_name_or_path
    return model


@pytest.mark.parametrize("targets", [["k_proj", "v_proj"], ["all-linear"]])
def test_of_a_base_for_images_too_only_the_text_model_is_adapted(image_and_text_base, targets):
    base = copy.deepcopy(image_and_text_base)
    model = attach_adapter(base, ModelConfig(target_modules=targets))
    adapted = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert adapted and all(".language_model.layers." in name for name in adapted)
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == [], "each of them is trained, and two processes need not wait for one that is not"
    layers = 2 * (2 if targets == ["k_proj", "v_proj"] else 7)
    assert len(adapted) == 3 * layers


def test_a_layer_of_the_image_encoder_is_no_target(image_and_text_base):
    with pytest.raises(InputError, match="--target_modules out_proj matches no linear layer of .*; its linear layers"):
        attach_adapter(copy.deepcopy(image_and_text_base), ModelConfig(target_modules=["out_proj"]))


def test_a_base_for_text_alone_keeps_the_ordinary_settings(make_model):
    base = make_model()
    base.name_or_path = ModelConfig().model_name_or_path
    model = attach_adapter(base, ModelConfig())
    assert model.peft_config["default"].exclude_modules is None
