"""Decoder layers with a written-out gradient against each row alone in transformers' own code, all in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from test_attention import ROWS, adapted, assert_same, collated, one_by_one, row
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tweetdora import block
from tweetdora.attention import ATTENTION
from tweetdora.block import LayerCount, count_layers, write_out, written_out
from tweetdora.config import ModelConfig
from tweetdora.modeling import attach_adapter, merge
from tweetdora.packing import PackedCollator
from tweetdora.padded import PaddedAttention, rotate

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FORMS = {
    "llama": {},
    "llama, as many key heads as heads": {"num_key_value_heads": 4},
    "llama, heads wider than the states": {"head_dim": 24},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral, window shorter than the prefix": {"sliding_window": 4},
    "mistral, window between prefix and row": {"sliding_window": 9},
    "mistral, window longer than the row": {"sliding_window": 64},
    "qwen2": {},
    "qwen2, one layer with a window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
}


def pair(make_model: Any, kind: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """A model in transformers' own code, and the same one written out in full."""
    settings = {**FORMS.get(kind, {}), **settings}
    plain, ours = (adapted(make_model, kind.partition(",")[0], how, **settings) for how in ("sdpa", ATTENTION))
    assert write_out(ours) == [0, 1]
    return plain, ours


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("kind", FORMS)
def test_loss_and_gradients_are_those_of_separate_rows(kind, method, make_model):
    plain, ours = pair(make_model, kind, method=method)
    assert_same(collated(ours, PackedCollator()(ROWS)), one_by_one(plain, ROWS))


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize(
    "targets",
    [
        *([name] for name in LINEAR),
        *(list(names) for names in itertools.combinations(LINEAR[:3], 2)),
        *(["gate_proj", "up_proj"], ["o_proj", "down_proj"], ["q_proj", "v_proj", "up_proj"]),
    ],
    ids=",".join,
)
def test_loss_and_gradients_are_those_of_separate_rows_for_an_adapter_on(targets, method, make_model):
    plain, ours = pair(make_model, method=method, target_modules=targets)
    assert_same(collated(ours, PackedCollator()(ROWS)), one_by_one(plain, ROWS))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row([50, 51, 52], [60, 4]), row([53, 51], [61, 62, 4])], id="no shared prefix"),
        pytest.param([ROWS[0]], id="one row"),
        pytest.param([ROWS[0]] * 3, id="equal rows"),
        pytest.param([row([50], [60, 4]), row([50], [61, 4])], id="a prompt of one token"),
        pytest.param([row([3, 9, 10], [60, 4]), row([3, *range(20, 60), 9, 10], [60, 4])], id="uneven"),
    ],
)
def test_loss_and_gradients_are_those_of_separate_rows_for(rows, make_model):
    plain, ours = pair(make_model, "mistral, window shorter than the prefix")
    assert_same(collated(ours, PackedCollator()(rows)), one_by_one(plain, rows))


def test_activation_checkpointing_gives_the_same_gradients(make_model):
    plain, ours = pair(make_model)
    ours.get_base_model().activation_checkpointing_enable()
    ours.enable_input_require_grads()
    assert_same(collated(ours.train(), PackedCollator()(ROWS)), one_by_one(plain, ROWS))


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_in_bf16_it_is_as_near_to_float64_as_the_models_own_code(method, make_model, monkeypatch):
    """The base in bf16 and the adapter in float32, as train.py has them."""
    plain, ours = pair(make_model, method=method)
    theirs = adapted(make_model, "llama", ATTENTION, method=method)
    expected = one_by_one(plain, ROWS)

    def error(model: Any) -> float:
        """Over all gradients and the loss."""
        for weight in model.parameters():
            weight.data = weight.data.to(torch.float32 if weight.requires_grad else torch.bfloat16)
        found = collated(model, PackedCollator()(ROWS))
        assert all(value.dtype == torch.float32 for name, value in found.items() if name != "loss")
        return sum(((found[name] - value).norm() / value.norm()).item() for name, value in expected.items())

    on_a_cpu, limit = error(ours), 1.2 * error(theirs)
    assert 0 < on_a_cpu < limit
    monkeypatch.setattr(PaddedAttention, "_exact", lambda self, states: states.float())
    assert on_a_cpu != error(ours) < limit, "with scores in float32, as on a GPU"


def test_the_last_layer_computes_only_what_the_loss_needs(make_model):
    _, ours = pair(make_model)
    batch, found = PackedCollator()(ROWS), {}
    for number, layer in enumerate(ours.get_base_model().model.layers):
        layer.register_forward_hook(lambda layer, inputs, output, number=number: found.update({number: output[0]}))
    collated(ours, batch)
    kept = set(batch["logits_to_keep"].tolist())
    computed = [{row for row, state in enumerate(found[number]) if state.abs().max() > 0} for number in (0, 1)]
    assert computed == [set(range(batch["input_ids"].numel())), kept] and len(kept) == 9


class Operations(TorchDispatchMode):
    """The names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def rolls(model: Any, **changes: Any) -> int:
    """How often a forward pass of ROWS turns states for the rotary embedding; a plain layer never does."""
    batch = PackedCollator()(ROWS)
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "example_ids")}
    with Operations() as operations:
        model(**{**inputs, **changes}, use_cache=False)
    return operations.names.count("aten::roll")


def test_only_training_on_packed_batches_is_written_out(make_model):
    _, ours = pair(make_model)
    assert rolls(ours) == 2, "once in each layer"
    with torch.no_grad():
        assert rolls(ours) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert rolls(ours) == 0
    with ours.disable_adapter():
        assert rolls(ours) == 0
    ours.train().get_base_model().config.attention_dropout = 0.5
    for module in ours.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert rolls(ours) == 0


def test_other_positions_of_the_same_batch_are_seen(make_model):
    """What is made once for a batch depends on them."""
    plain, ours = adapted(make_model, "llama", ATTENTION), pair(make_model)[1]
    batch = PackedCollator()(ROWS)
    first = collated(ours, batch)["loss"]
    batch["position_ids"] = batch["position_ids"] * 2
    assert_same(collated(ours, batch), collated(plain, batch))
    assert collated(ours, batch)["loss"] != first


def test_too_many_scores_for_one_product_are_left_to_the_models_code(make_model, monkeypatch):
    _, ours = pair(make_model)
    monkeypatch.setattr(block, "KEPT_SCORES", 100)
    assert rolls(ours) == 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {"head_dim": 8}) for kind in ("qwen3", "gemma", "phi3")),
        ("olmo2", {}),
        # Layers without some of the parts that Llama's have.
        *(("gpt_neox", {}), ("cohere", {"use_qk_norm": False})),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ffn_dim": 64}),
    ],
)
def test_layers_of_another_form_run_the_models_own_code(kind, settings, make_model):
    base = make_model(kind, **settings)
    base.set_attn_implementation(ATTENTION)
    base.name_or_path = "tiny"
    model = attach_adapter(base, ModelConfig(model_name_or_path="tiny", target_modules=["all-linear"]))
    assert write_out(model) == written_out(model) == []


OF_LLAMAS_FORM_BUT = {
    # Layers of one class that differ: every second one has no rotary embedding.
    "smollm3": ({"no_rope_layers": [1, 0], "no_rope_layer_interval": 2}, [0]),
    # Dropout on the attention's and the MLP's output, in training only.
    "seed_oss": ({"residual_dropout": 0.3, "attention_dropout": 0.0, "head_dim": 8}, []),
    # A rotary embedding on half of a head, whose tables are narrower than a head.
    "glm4_moe": ({"use_qk_norm": False, "partial_rotary_factor": 0.5, "first_k_dense_replace": 2, "head_dim": 8}, []),
    # Queries that grow with their position, from 8 on.
    "ministral3": (
        {
            "head_dim": 8,
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "llama_4_scaling_beta": 0.1},
                **{"original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0},
                "mscale_all_dim": 1.0,
            },
        },
        [],
    ),
}


@pytest.mark.parametrize("kind", OF_LLAMAS_FORM_BUT)
def test_a_layer_that_gives_other_numbers_runs_the_models_own_code(kind, make_model):
    settings, expected = OF_LLAMAS_FORM_BUT[kind]
    targets = ["k_proj", "v_proj"]
    models = [adapted(make_model, kind, ATTENTION, target_modules=targets, **settings) for _ in range(2)]
    assert write_out(models[1]) == expected
    assert count_layers(models[1], ROWS, 2) == LayerCount(len(expected), 2, 2)
    batch = PackedCollator()(ROWS)
    for model in models:
        for module in model.modules():
            module.training = not isinstance(module, nn.Dropout)
    found = []
    for model in models:
        torch.manual_seed(0)
        found.append(collated(model, batch))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize(("kind", "expected"), [("llama", [0, 1]), ("smollm3", [0])])
def test_a_layer_whose_trial_in_bf16_fails_is_compared_with_a_float32_copy(kind, expected, make_model, monkeypatch):
    """In SmolLM2-135M, one layer's outputs are so large that the own code's rounding exceeds bf16's tolerance."""
    model = adapted(make_model, kind, ATTENTION, **OF_LLAMAS_FORM_BUT.get(kind, [{}])[0]).to(torch.bfloat16)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    let_own_code_be_off_in_bf16(model, monkeypatch)
    assert write_out(model) == expected
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def let_own_code_be_off_in_bf16(model, monkeypatch):
    """By more than the tolerance, as if by rounding."""
    mlp = type(model.get_base_model().model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: forward(self, x) * (1.3 if x.dtype == torch.bfloat16 else 1))


def test_a_float32_copy_must_agree_as_closely_as_float32_can(make_model, monkeypatch):
    """An error of half a percent in the rotation is far below bf16's tolerance."""
    model = adapted(make_model, "llama", ATTENTION).to(torch.bfloat16)
    let_own_code_be_off_in_bf16(model, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            block, "rotate", lambda states, *more, **flags: rotate(states, *more, **flags) or states.mul_(1.005)
        )
        assert write_out(model) == []
    assert write_out(model) == [0, 1]


@pytest.mark.parametrize("factor", [1.3, math.nan])
def test_a_layer_that_is_wrong_in_bf16_only_is_refused(factor, make_model, monkeypatch):
    """A float32 copy that agrees does not excuse it."""

    def wrong(states, *arguments, **flags):
        rotate(states, *arguments, **flags)
        states.mul_(factor if states.dtype == torch.bfloat16 else 1)

    model = adapted(make_model, "llama", ATTENTION).to(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(block, "rotate", wrong)
        assert write_out(model) == []
    assert write_out(model) == [0, 1]


def test_a_layer_on_which_the_trial_ends_in_an_error_runs_the_models_own_code(make_model):
    model = adapted(make_model, "llama", ATTENTION)
    model.get_base_model().model.layers[0].self_attn.head_dim = None
    assert write_out(model) == [1] and written_out(model) == [1]


def test_a_long_prefix_counts_among_the_scores(make_model, monkeypatch):
    """4 heads: 3 rows of 2 tokens after 30, and the prefix on itself."""
    _, ours = pair(make_model)
    layer = ours.get_base_model().model.layers[0]._written_out
    batch = PackedCollator()([row([*range(10, 40), 9], [60, 4]) for _ in range(3)])
    assert batch["packing"]["prefix_length"] == 30
    assert layer.attention.scores(batch["packing"]) == 4 * (3 * 2 * 32 + 30 * 30)


@pytest.mark.parametrize(("limit", "examples"), [(4624, 4), (4623, 2), (4112, 2), (4111, 1), (3855, 0)])
def test_a_batch_with_too_many_scores_is_halved_until_the_layers_take_it(limit, examples, make_model, monkeypatch):
    """4 heads; N rows of 2 tokens after 30, and the prefix on itself: 4 x (N x 2 x 32 + 30 x 30)."""
    _, ours = pair(make_model)
    rows = [row([*range(10, 40), 9], [60, 4]) for _ in range(6)]
    monkeypatch.setattr(block, "KEPT_SCORES", limit)
    assert count_layers(ours, rows, 4) == LayerCount(2, 2, examples)


def test_the_trial_leaves_the_adapter_and_the_mode(make_model):
    model = adapted(make_model, "llama", ATTENTION)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert write_out(model) == [0, 1]
    assert torch.equal(torch.rand(3), expected), "the next random numbers are those without it"
    assert not model.training and not any(module.training for module in model.modules())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None


def test_a_part_that_is_replaced_runs_the_models_own_code(make_model):
    _, ours = pair(make_model)
    layer = ours.get_base_model().model.layers[0]
    layer.self_attn.q_proj = layer.self_attn.q_proj.get_base_layer()
    assert rolls(ours) == 1, "of the other layer"


class Doubled(nn.Module):
    """A norm that looks like Llama's but is none."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("part", ["input_layernorm", "post_attention_layernorm"])
def test_a_layer_that_only_looks_like_llamas_runs_the_models_own_code(part, make_model):
    model = adapted(make_model, "llama", ATTENTION)
    for layer in model.get_base_model().model.layers:
        setattr(layer, part, Doubled(getattr(layer, part)))
    assert write_out(model) == []


def test_a_layer_that_ignores_its_configurations_window_runs_the_models_own_code(make_model, monkeypatch):
    model = adapted(make_model, "mistral", ATTENTION, sliding_window=64)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.sliding_window = 32
    assert write_out(model) == []


@pytest.mark.parametrize("target", ["input_layernorm", "mlp.up_proj.base_layer"])
def test_a_layer_with_trained_weights_of_its_own_runs_the_models_own_code(target, make_model):
    model = adapted(make_model, "llama", ATTENTION)
    model.get_base_model().model.layers[1].get_submodule(target).weight.requires_grad_(True)
    assert write_out(model) == [0]


def test_dropout_on_the_adapters_input_runs_the_models_own_code(make_model):
    base = make_model("llama")
    base.set_attn_implementation(ATTENTION)
    base.name_or_path = "tiny"
    assert write_out(attach_adapter(base, ModelConfig(model_name_or_path="tiny", lora_dropout=0.1))) == []


def test_weights_that_share_an_input_lie_together_and_stay_the_layers_own(make_model):
    _, ours = pair(make_model)
    layer = ours.get_base_model().model.layers[0]
    parts = [layer.self_attn.get_submodule(f"{name}_proj.base_layer").weight for name in "qkv"]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    before = collated(ours, PackedCollator()(ROWS))
    for part in parts:  # as a move to another device would
        part.data = part.data.clone()
    assert_same(collated(ours, PackedCollator()(ROWS)), before)
    plain = pair(make_model)[0]
    for model in (plain, ours):  # a change in place is a change of what is computed, DoRA's norms among it
        for name in "qkv":
            with torch.no_grad():
                layer = model.get_base_model().model.layers[1]
                layer.self_attn.get_submodule(f"{name}_proj.base_layer").weight[:7] *= 2
    assert_same(collated(ours, PackedCollator()(ROWS)), one_by_one(plain, ROWS))


def test_a_written_out_model_merges_and_saves_like_any_other(make_model, tmp_path):
    from transformers import AutoModelForCausalLM

    plain, ours = pair(make_model)
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        merged = merge(ours, torch.float64)
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-6)
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert all(
        torch.equal(weight, dict(merged.named_parameters())[name]) for name, weight in loaded.named_parameters()
    )
