"""Our DoRA layer against PEFT's own: value, gradients, files, and the cases that it leaves to PEFT."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tweetdora.config import ModelConfig
from tweetdora.dora import DoraLinear, row_norms
from tweetdora.modeling import attach_adapter, load_adapter, load_base, merge, save_adapter


class Layers(nn.Module):
    """Two linear layers."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, bias=bias)
        self.second = nn.Linear(10, 4, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def pair(bias: bool, dtype: torch.dtype, base_dtype: torch.dtype | None = None, **settings: Any) -> list[PeftModel]:
    """PEFT's model and ours, alike in every weight, their adapters and magnitudes moved off the start."""
    torch.manual_seed(0)
    base = Layers(bias).to(base_dtype or dtype)
    models = []
    for ours in (False, True):
        config = LoraConfig(
            **{"r": 3, "lora_alpha": 7, "target_modules": ["first", "second"], "use_dora": True, **settings}
        )
        if ours:
            config._register_custom_module({nn.Linear: DoraLinear})
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = (weight.data + 0.3 * torch.randn(weight.shape, dtype=torch.float64)).to(dtype)
        models.append(model)
    assert isinstance(models[1].base_model.model.second, DoraLinear)
    assert not isinstance(models[0].base_model.model.second, DoraLinear)
    return models


def value_and_gradients(model: PeftModel, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output, and gradients of the input and of every adapter weight, for a fixed gradient at the output."""
    x = x.clone().requires_grad_()
    output = model(x)
    torch.manual_seed(3)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output.dtype))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return output, [x.grad, *(weights[name].grad for name in sorted(weights))]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_value_and_gradients_are_pefts(bias, dtype, tolerance):
    peft, ours = pair(bias, dtype)
    torch.manual_seed(2)
    x = torch.randn(2, 5, 6, dtype=torch.float64).to(dtype)
    expected, expected_gradients = value_and_gradients(peft, x)
    actual, gradients = value_and_gradients(ours, x)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert len(gradients) == 1 + 2 * 3, "input, and A, B and magnitude of two layers"
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(gradient, wanted, rtol=10 * tolerance, atol=10 * tolerance)


def test_gradients_are_those_of_finite_differences():
    """The second way, without PEFT; the norm is a constant in DoRA's gradient, so it is held fixed here too."""
    _, ours = pair(True, torch.float64)
    layer = ours.base_model.model.second
    base, name = layer.get_base_layer(), "default"
    x = torch.randn(4, 10, dtype=torch.float64)
    down, up, magnitude = (
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.lora_magnitude_vector[name].weight,
    )
    scaling = 7 / 3
    norms = torch.linalg.norm(base.weight + scaling * up @ down, dim=1).detach()

    def by_hand(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return (x @ (base.weight + scaling * up @ down).T) * (magnitude / norms) + base.bias

    torch.testing.assert_close(layer(x), by_hand(x, down, up, magnitude), rtol=1e-12, atol=1e-12)
    target = torch.randn(4, 4, dtype=torch.float64)
    actual = torch.autograd.grad((layer(x) * target).sum(), [down, up, magnitude])
    weights = [weight.detach().clone() for weight in (down, up, magnitude)]
    for number, weight in enumerate(weights):
        slopes = torch.zeros_like(weight)
        for place in range(weight.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved = [other.clone() for other in weights]
                moved[number].view(-1)[place] += step
                values.append((by_hand(x, *moved) * target).sum())
            slopes.view(-1)[place] = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close(actual[number], slopes, rtol=1e-6, atol=1e-7)


def test_a_row_of_zeros_stays_one_and_the_others_are_pefts():
    """o_proj of Llama-3.1-8B has such rows. PEFT divides 0 by 0 there, in value, gradient and merge."""
    peft, ours = pair(False, torch.float32)
    for model in (peft, ours):
        layer = model.base_model.model.second
        with torch.no_grad():
            layer.get_base_layer().weight[1] = 0
            layer.lora_B["default"].weight[1] = 0
            layer.lora_magnitude_vector["default"].weight[1] = 0
    torch.manual_seed(2)
    x = torch.randn(7, 10)
    expected, actual = (model.base_model.model.second(x) for model in (peft, ours))
    assert expected[:, 1].isnan().all(), "when this fails, PEFT has a guard of its own; take ours out"
    kept = [0, 2, 3]
    torch.testing.assert_close(actual[:, kept], expected[:, kept], rtol=1e-5, atol=1e-6)
    assert actual[:, 1].eq(0).all()
    _, gradients = value_and_gradients(ours, torch.randn(2, 5, 6))
    assert all(gradient.isfinite().all() for gradient in gradients)
    before = ours.base_model.model.second(x)
    merged = ours.merge_and_unload(safe_merge=True).second
    torch.testing.assert_close(merged(x), before, rtol=1e-5, atol=1e-6)


def test_a_base_with_a_row_of_zeros_trains_is_saved_and_merged(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), None, torch.float32, torch.device("cpu"))
    ours = attach_adapter(base, ModelConfig(model_name_or_path=str(tmp_path / "base"))).train()
    ids = torch.tensor([[5, 9, 300, 7, 11]])
    optimizer = torch.optim.AdamW([weight for weight in ours.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        ours(input_ids=ids, labels=ids).loss.backward()
        assert all(weight.grad.isfinite().all() for weight in ours.parameters() if weight.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    expected = ours.eval()(input_ids=ids).logits
    save_adapter(ours, str(tmp_path / "adapter"))
    again = load_base(str(tmp_path / "base"), None, torch.float32, torch.device("cpu"))
    loaded = load_adapter(again, str(tmp_path / "adapter"))
    torch.testing.assert_close(merge(loaded)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_norms_by_hand():
    """(3, 0) + 2 * 1 * (0, 2) is (3, 4), of length 5."""
    weight, down, up = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])
    assert row_norms(torch.tensor([9.0]), weight, down, up, 2.0).tolist() == [5.0]


def test_bf16_base_gives_an_output_in_bf16_close_to_pefts():
    peft, ours = pair(False, torch.float32, base_dtype=torch.bfloat16)
    x = torch.randn(2, 5, 6).bfloat16()
    expected, wanted = value_and_gradients(peft, x)
    actual, gradients = value_and_gradients(ours, x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == other.dtype
        torch.testing.assert_close(gradient, other, rtol=0.05, atol=0.05)


def test_norms_follow_a_changed_weight():
    """The kept |W|^2 must not outlive the weight that it was made from."""
    peft, ours = pair(False, torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    for change in (lambda weight: weight.mul_(2), lambda weight: setattr(weight, "data", weight.data + 1)):
        for model in (peft, ours):
            model(x)
            with torch.no_grad():
                change(model.base_model.model.second.base_layer.weight)
        torch.testing.assert_close(ours(x), peft(x), rtol=1e-12, atol=1e-12)


CASES = {
    "with dropout": lambda model: model.train(),
    "merged": lambda model: model.merge_adapter(),
    "merged and unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("case", CASES)
def test_other_cases_are_pefts(case):
    peft, ours = pair(True, torch.float64, lora_dropout=0.5)
    x = torch.randn(3, 6, dtype=torch.float64)
    outputs = []
    for model in (peft.eval(), ours.eval()):
        CASES[case](model)
        torch.manual_seed(5)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def test_two_active_adapters_are_pefts():
    peft, ours = pair(False, torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    for model in (peft, ours):
        torch.manual_seed(6)
        config = LoraConfig(r=2, target_modules=["second"], use_dora=True)
        if model is ours:
            config._register_custom_module({nn.Linear: DoraLinear})
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        model.double()
    torch.testing.assert_close(ours(x), peft(x), rtol=1e-10, atol=1e-10)


def test_files_are_pefts_both_ways(make_model, tmp_path):
    """PEFT reads ours, and we read PEFT's; names, shapes and settings are the same."""
    config = ModelConfig(model_name_or_path="tiny", target_modules=["k_proj", "v_proj"])
    bases = [make_model("llama") for _ in range(4)]
    bases[0].name_or_path = "tiny"
    ours = attach_adapter(bases[0], config)
    plain = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"], use_dora=True)
    peft = get_peft_model(bases[1], plain)
    assert any(isinstance(module, DoraLinear) for module in ours.modules())
    assert not any(isinstance(module, DoraLinear) for module in peft.modules())
    torch.manual_seed(0)
    for model, folder in ((ours, tmp_path / "ours"), (peft, tmp_path / "peft")):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.2 * torch.randn_like(weight)
        save_adapter(model, str(folder))
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "peft")]
    assert {name: value.shape for name, value in saved[0].items()} == {n: v.shape for n, v in saved[1].items()}
    ids = torch.tensor([[5, 9, 300, 7, 11]])
    with torch.no_grad():
        read_by_peft = PeftModel.from_pretrained(bases[2], tmp_path / "ours").eval()
        torch.testing.assert_close(read_by_peft(ids).logits, ours.eval()(ids).logits, rtol=1e-5, atol=1e-5)
        read_by_us = load_adapter(bases[3], str(tmp_path / "peft"))
        torch.testing.assert_close(read_by_us(ids).logits, peft.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_lora_adapter_is_pefts_own_layer(make_model):
    base = make_model("llama")
    base.name_or_path = "tiny"
    model = attach_adapter(base, ModelConfig(model_name_or_path="tiny", method="lora"))
    assert not any(isinstance(module, DoraLinear) for module in model.modules())
