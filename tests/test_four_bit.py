"""A base quantised to 4 bits: the adapter learns on its dequantised weights, and is merged into the stored ones."""

import importlib.util
import json
import os
import shutil
from contextlib import closing
from typing import Any

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="make test runs these tests with .4bit on the path")
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from forked import Server, environments, finish, start
from peft import PeftModel

from tests.test_modeling import IDS, new_adapter
from tests.test_scripts import ROOT, main_of, run, train_flags
from tweetdora.config import ModelConfig
from tweetdora.dora import DoraLinear
from tweetdora.errors import InputError
from tweetdora.modeling import attach_adapter, base_identity, load_base
from tweetdora.training import check_4bit

CPU = torch.device("cpu")


def quantised(model_dir: str, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(model_dir, None, dtype, CPU, in_4bit=True)


def dequantised_twin(model_dir: str) -> Any:
    """The same model with ordinary linear layers that hold the dequantised weights, float32."""
    twin, base = load_base(model_dir, None, torch.float32, CPU), quantised(model_dir)
    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            twin.get_submodule(name).weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return twin


def adapted(base: Any, model_dir: str, method: str) -> PeftModel:
    """With an adapter off its start; the same for every base."""
    torch.manual_seed(0)
    model = attach_adapter(base, ModelConfig(model_name_or_path=model_dir, method=method)).eval()
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data * (1 + torch.rand(weight.shape) if "magnitude" in name else 1)
            weight.data = weight.data + 0.1 * torch.randn(weight.shape)
    return model


def test_the_linear_layers_are_quantised_and_counted_whole(model_dir):
    base, stored = quantised(model_dir), load_base(model_dir, None, torch.float32, CPU)
    layers = [name for name, layer in base.named_modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 7 * stored.config.num_hidden_layers, "q, k, v, o, gate, up and down; not the head"
    assert base_identity(base, model_dir, None) == base_identity(stored, model_dir, None)
    assert (
        base.model.layers[0].self_attn.q_proj.weight.numel() < stored.model.layers[0].self_attn.q_proj.weight.numel()
    )
    assert not torch.equal(base(input_ids=IDS).logits, stored(input_ids=IDS).logits)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_an_adapter_on_it_computes_with_the_dequantised_weights(model_dir, method):
    """Against ordinary layers with these weights, where DoRA's norms cannot come from packed numbers."""
    ours = adapted(quantised(model_dir), model_dir, method)
    twin = adapted(dequantised_twin(model_dir), model_dir, method)
    assert isinstance(ours.base_model.model.model.layers[0].self_attn.k_proj, DoraLinear) == (method == "dora")
    outputs = []
    for model in (ours, twin):
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        outputs.append(
            (logits, {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
        )
    (logits, gradients), (expected, wanted) = outputs
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys() and len(gradients) >= 4
    for name, gradient in gradients.items():
        assert wanted[name].abs().max() > 0
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6, msg=name)


def test_magnitudes_start_at_the_norms_of_the_dequantised_rows(model_dir):
    torch.manual_seed(0)
    model = attach_adapter(quantised(model_dir), ModelConfig(model_name_or_path=model_dir))
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    weight = layer.base_layer.weight
    norms = dequantize_4bit(weight.data, weight.quant_state).norm(dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.detach(), norms)
    stored = new_adapter(model_dir).base_model.model.model.layers[0].self_attn.k_proj
    assert not torch.equal(stored.lora_magnitude_vector["default"].weight, norms)


def test_evaluation_leaves_the_packed_weights_alone(monkeypatch, model_dir):
    """On a CPU with AVX512-BF16, which every CPU is here, bitsandbytes would pack them anew in place."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = quantised(model_dir)
    layers = [layer for layer in base.modules() if isinstance(layer, Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    before = [layer.weight.data.clone() for layer in layers]
    with torch.no_grad():
        base.eval()(input_ids=IDS)
    assert all(torch.equal(layer.weight.data, kept) for layer, kept in zip(layers, before, strict=True))


def test_what_cannot_be_is_refused(monkeypatch, model_dir, training):
    config = ModelConfig(model_name_or_path=model_dir, load_in_4bit=True)
    check_4bit(config, training())
    sharded = training()
    sharded.shard_base = True
    with pytest.raises(InputError, match="--load_in_4bit true and --shard_base true cannot be combined"):
        check_4bit(config, sharded)
    find = importlib.util.find_spec
    monkeypatch.setattr("tweetdora.extras.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(InputError, match="pip install -r requirements-4bit.txt"):
        check_4bit(config, training())
    check_4bit(ModelConfig(model_name_or_path=model_dir), training())


@pytest.mark.parametrize(("method", "batching"), [("dora", "shared_prefix"), ("lora", "padded")])
def test_train_evaluate_and_publish(method, batching, teachable_dir, data_dir, tmp_path, capsys):
    """It learns on 4 bits; what is measured and published is the stored base with the adapter merged in."""
    folder = tmp_path / "run"
    flags = train_flags(teachable_dir, data_dir, folder)
    more = ["--load_in_4bit", "true", "--method", method, "--batching", batching, "--max_steps", "12"]
    main_of("train.py")([*flags, *more, "--dry_run", "true"])
    assert "quantised to 4 bits for the training" in capsys.readouterr().out
    main_of("train.py")([*flags, *more])
    record = json.loads((folder / "run.json").read_text())
    assert record["model"]["load_in_4bit"] and record["result"]["steps"] == 12
    losses = [line["loss"] for line in record["result"]["log_history"] if "loss" in line]
    assert losses[-1] < losses[0]
    main_of("evaluate.py")([str(folder)])
    main_of("push_to_hub.py")([str(folder), "--dry_run", "true", "--allow_chance_level", "true"])
    config = json.loads((folder / "publish" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert "quantised to 4 bits (NF4) for the training only" in (folder / "publish" / "README.md").read_text()
    shutil.rmtree(folder / "publish")


CACHED = """
import runpy, sys
sys.path.insert(0, {root!r})
import tweetdora
from tweetdora import tokenized
tokenized.CACHE_FROM = 4
write = tokenized._write
tokenized._write = lambda *arguments: print("tokenised by one process") or write(*arguments)
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_two_processes_train_what_one_trains(teachable_dir, data_dir, tmp_path):
    """Each holds the 4-bit base; one of them tokenises, and the other reads the cache."""
    script, losses = tmp_path / "cached.py", []
    script.write_text(CACHED.format(root=str(ROOT)))
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for count in (1, 2):
        folder = tmp_path / str(count)
        flags = train_flags(teachable_dir, data_dir, folder)
        for flag, value in {"--max_steps": "6", "--max_eval_samples": "0", "--logging_steps": "1"}.items():
            flags[flags.index(flag) + 1] = value
        flags += ["--load_in_4bit", "true"]
        if count == 1:
            said = run("train.py", *flags, **cache, PYTHONPATH=os.environ.get("PYTHONPATH", ""))
        else:
            with closing(Server({**os.environ, **cache})) as server:
                scripts = [start([script, *flags], ROOT, each, server) for each in environments(count)]
                said = "".join(finish(*scripts))
            assert {process.returncode for process in scripts} == {0}, said
        assert said.count("tokenised by one process") == count - 1, said
        history = json.loads((folder / "run.json").read_text())["result"]["log_history"]
        losses.append([line["loss"] for line in history if "loss" in line])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(list((tmp_path / "cache" / "tokenized").iterdir())) == 1
