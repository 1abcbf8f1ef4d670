"""A packed batch gives the loss and the gradients of its rows, run one by one by transformers' own attention.

All of it in float64, where a wrong mask cannot hide behind rounding: rows share a prefix of 7 tokens at most, sliding
windows are shorter than the prefix, or between prefix and row.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from tweetdora import attention as attention_module
from tweetdora.attention import ATTENTION, check_packable
from tweetdora.config import ModelConfig
from tweetdora.errors import InputError
from tweetdora.modeling import attach_adapter
from tweetdora.packing import PackedCollator, PaddedCollator

PREFIX = [3, 40, 41, 42, 43, 44, 45]
KINDS = {
    "llama": {},
    "llama, as many key heads as heads": {"num_key_value_heads": 4},
    "llama, float scale of its own": {"head_dim": 24},
    "mistral, window shorter than the prefix": {"sliding_window": 4},
    "mistral, window between prefix and row": {"sliding_window": 9},
    "mistral, window longer than the row": {"sliding_window": 64},
    "qwen2": {},
    "qwen2, one layer with a window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
}


def row(prompt: Sequence[int], answer: Sequence[int], example_id: int = 0) -> dict[str, Any]:
    """A row as tokenize_examples makes it: loss on the answer only."""
    return {
        "input_ids": [*prompt, *answer],
        "labels": [-100] * len(prompt) + list(answer),
        "example_id": example_id,
    }


# Lengths, answer lengths and texts that differ, and a first text token that two rows share.
ROWS = [
    row([*PREFIX, 50, 51, 52, 9, 10], [60, 4]),
    row([*PREFIX, 53, 9, 10], [61, 62, 4]),
    row([*PREFIX, 50, 54, 55, 56, 57, 58, 9, 10], [63, 4]),
    row([*PREFIX, 9, 10], [60, 4]),  # an empty tweet
]


class ExactNorm(nn.Module):
    """A model's RMSNorm without its detour through float32, which would end the comparison at seven digits."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def adapted(
    make_model: Callable[..., Any],
    kind: str,
    attention: str,
    method: str = "dora",
    target_modules: Sequence[str] = ("all-linear",),
    **settings: Any,
) -> PeftModel:
    """A tiny float64 model whose adapter has left its start; equal weights for any `attention`."""
    # 0.2: with the usual 0.02 attention is nearly uniform, and a wrong mask changes little.
    base = make_model(kind.partition(",")[0], **{"initializer_range": 0.2, **KINDS.get(kind, {}), **settings})
    torch.manual_seed(2)
    for weight in base.parameters():
        if weight.dim() == 1:  # norms, which start at 1, and biases, which start at 0
            weight.data += 0.3 * torch.randn(weight.shape)
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            base.set_submodule(name, ExactNorm(module))
    base.set_attn_implementation(attention)
    base.name_or_path = "tiny"
    config = ModelConfig(model_name_or_path="tiny", method=method, target_modules=list(target_modules))
    torch.manual_seed(1)
    model = attach_adapter(base, config).double().eval()
    with torch.no_grad():
        for _, weight in adapter_weights(model):
            weight += 0.1 * torch.randn_like(weight)
    return model


def adapter_weights(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    """The adapter's weights by name."""
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def loss_and_gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and adapter gradients by name."""
    names, weights = zip(*adapter_weights(model), strict=True)
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, weights), strict=True))}


def one_by_one(model: PeftModel, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Second way: each row alone, unpadded, all logits, and the loss as a sum of log-probabilities."""
    loss = torch.zeros((), dtype=torch.float64)
    for example in rows:
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
        for position, label in enumerate(example["labels"]):
            if label != -100:
                loss = loss - logits[position - 1, label]
    return loss_and_gradients(model, loss)


def collated(model: PeftModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Loss and gradients of a batch of either form, in float64 (the trainer's own loss is float32)."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "example_ids")}
    logits = model(**inputs, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return loss_and_gradients(model, loss)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to ten digits behind the point, loss and every gradient, none of which is zero throughout."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-6, name
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name} {text}"
        )


# Packed


@pytest.fixture(scope="module")
def expected_of(make_model) -> Callable[[str], dict[str, torch.Tensor]]:
    """expected_of(kind): loss and gradients of ROWS one by one."""
    return cache(lambda kind: one_by_one(adapted(make_model, kind, "sdpa"), ROWS))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_gradients_are_those_of_separate_rows(kind, make_model, expected_of):
    assert_same(collated(adapted(make_model, kind, ATTENTION), PackedCollator()(ROWS)), expected_of(kind))


def test_packed_loss_and_gradients_are_those_of_separate_rows_with_a_lora_adapter(make_model):
    expected = one_by_one(adapted(make_model, "llama", "sdpa", method="lora"), ROWS)
    assert_same(collated(adapted(make_model, "llama", ATTENTION, method="lora"), PackedCollator()(ROWS)), expected)


@pytest.mark.parametrize("kind", ["llama", "mistral, window shorter than the prefix"])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([row([50, 51, 52], [60, 4]), row([53, 51], [61, 62, 4])], id="no shared prefix"),
        pytest.param([row([*PREFIX, 50, 51, 9, 10], [60, 4])], id="one row"),
        pytest.param([row([*PREFIX, 50, 9, 10], [60, 4])] * 3, id="equal rows"),
        pytest.param([row([*PREFIX, *PREFIX, *PREFIX, text], [60, 4]) for text in (50, 51)], id="prompt over tweets"),
        pytest.param([row([*PREFIX, 9, 10], [60, 4]), row([*PREFIX, *range(20, 60), 9, 10], [60, 4])], id="uneven"),
        pytest.param([row([50], [60, 4]), row([50], [61, 4])], id="a prompt of one token"),
    ],
)
def test_packed_loss_and_gradients_are_those_of_separate_rows_for(rows, kind, make_model):
    expected = one_by_one(adapted(make_model, kind, "sdpa"), rows)
    assert_same(collated(adapted(make_model, kind, ATTENTION), PackedCollator()(rows)), expected)


def test_packed_rows_of_a_real_data_set_give_the_loss_and_gradients_of_separate_rows(
    make_model, prompt_tokenizer, task
):
    from tweetdora.data import load_examples
    from tweetdora.tokenized import tokenize_examples

    rows = tokenize_examples(load_examples(task, "train", None).head(8), prompt_tokenizer).features
    assert PackedCollator()(rows)["packing"]["prefix_length"] > 10
    expected = one_by_one(adapted(make_model, "llama", "sdpa"), rows)
    assert_same(collated(adapted(make_model, "llama", ATTENTION), PackedCollator()(rows)), expected)


def test_packed_logits_are_in_the_order_of_the_labels(make_model):
    """Each supervised token's own loss, not only the sum, is the separate row's."""
    plain, packed = adapted(make_model, "llama", "sdpa"), adapted(make_model, "llama", ATTENTION)
    batch = PackedCollator()(ROWS)
    labels = batch.pop("labels")
    del batch["example_ids"]
    with torch.no_grad():
        actual = packed(**batch, use_cache=False).logits[0].log_softmax(-1)[range(len(labels)), labels]
        expected = []
        for example in ROWS:
            scores = plain(input_ids=torch.tensor([example["input_ids"]])).logits[0].log_softmax(-1)
            supervised = [place for place, label in enumerate(example["labels"]) if label != -100]
            expected += [scores[place - 1, example["input_ids"][place]] for place in supervised]
    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-10)


def distances(length: int) -> torch.Tensor:
    """How far before each position (rows) each position (columns) is."""
    return torch.arange(length)[:, None] - torch.arange(length)


# Each of these breaks the mask in another way, and must be seen by the comparison above.
WRONG_MASKS = {
    "not causal": lambda distance, window: distance.abs() < window,
    "no window": lambda distance, window: distance >= 0,
    "window one too long": lambda distance, window: (distance >= 0) & (distance <= window),
    "window one too short": lambda distance, window: (distance >= 0) & (distance < window - 1),
    "blind to the token before": lambda distance, window: (distance >= 0) & (distance < window) & (distance != 1),
}


@pytest.mark.parametrize("mistake", WRONG_MASKS)
def test_comparison_with_separate_rows_sees_a_wrong_mask(mistake, make_model, expected_of, monkeypatch):
    kind = "mistral, window between prefix and row"
    wrong = WRONG_MASKS[mistake]
    monkeypatch.setattr(
        attention_module, "_causal_mask", lambda length, window, device: wrong(distances(length), window)
    )
    with pytest.raises(AssertionError, match="loss"):
        assert_same(collated(adapted(make_model, kind, ATTENTION), PackedCollator()(ROWS)), expected_of(kind))


def test_comparison_with_separate_rows_sees_rows_that_see_one_another(make_model, expected_of):
    """Without `packing` one row follows the other as if it were its text."""
    batch = PackedCollator()(ROWS)
    del batch["packing"], batch["attention_mask"]
    batch["position_ids"] = torch.arange(batch["input_ids"].numel())[None]
    with pytest.raises(AssertionError, match="loss"):
        assert_same(collated(adapted(make_model, "llama", ATTENTION), batch), expected_of("llama"))


# Padded, and without a batch's packing


@pytest.mark.parametrize("kind", KINDS)
def test_padded_loss_and_gradients_are_those_of_separate_rows(kind, make_model, expected_of):
    batch = PaddedCollator(pad_token_id=4)(ROWS)
    assert_same(collated(adapted(make_model, kind, ATTENTION), batch), expected_of(kind))


@pytest.mark.parametrize("kind", ["llama", "mistral, window between prefix and row"])
def test_without_packing_the_logits_are_those_of_transformers_own_attention(kind, make_model):
    ids = torch.tensor([ROWS[0]["input_ids"]])
    with torch.no_grad():
        actual = adapted(make_model, kind, ATTENTION)(input_ids=ids).logits
        torch.testing.assert_close(actual, adapted(make_model, kind, "sdpa")(input_ids=ids).logits, rtol=0, atol=0)


def test_generated_ids_are_those_of_transformers_own_attention(make_model):
    """Generation has a cache and, in a batch of unequal rows, padding on the left."""
    batch = PaddedCollator(pad_token_id=4)(ROWS)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 4}
    kind = "mistral, window between prefix and row"
    generated = [
        adapted(make_model, kind, attention).generate(**inputs, **settings).tolist()
        for attention in (ATTENTION, "sdpa")
    ]
    assert generated[0] == generated[1]


def test_half_precision_is_computed_in_float32_on_the_cpu_and_given_back_in_its_own_format():
    """Second way: float32 from the start, rounded to bf16 at the end."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 6, 8).bfloat16()
    module = nn.Module()
    output, _ = attention_module.attention(module, query, key, value, None, scaling=0.5, is_causal=True)
    exact = nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, scale=0.5
    )
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, exact.bfloat16().transpose(1, 2))


# What cannot be packed


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_with_plain_attention_are_packable(kind, make_model):
    check_packable(make_model(kind))


UNPACKABLE = {
    # The two keep their window in the mask, which a packed batch does not have.
    "qwen2_moe": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 32, "num_experts": 2, "num_experts_per_tok": 1},
        "its layers apply their window of 4 tokens through the mask",
    ),
    "phimoe": (
        {"sliding_window": 4, "num_local_experts": 2},
        "its layers apply their window of 4 tokens through the mask",
    ),
    # A mask that depends on the tokens.
    "doge": ({}, "its layers build their own masks"),
    "gemma2": ({}, "it caps attention scores"),
    "gpt_oss": (
        {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "rope_parameters": {"rope_type": "default"}},
        "its attention is more than a scaled dot product",  # it has attention sinks
    ),
    "minimax": (
        {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1},
        "it has layers of type linear_attention",
    ),
    "deepseek_v2": (
        {"kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
        | {"head_dim": 8, "num_key_value_heads": 4, "first_k_dense_replace": 2},
        "its values have another width than its keys",
    ),
    "diffllama": ({}, "its layers call attention more than once"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "it has layers of type conv"),
    "falcon": ({}, "its code does not accept attention functions"),
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_models_with_more_than_plain_attention_are_refused_with_the_flag_that_helps(kind, make_model):
    settings, reason = UNPACKABLE[kind]
    with pytest.raises(
        InputError, match=f"^--batching shared_prefix does not support {kind}: {reason}. Use --batching padded"
    ):
        check_packable(make_model(kind, **settings))


def test_looking_whether_a_model_is_packable_leaves_its_attention(make_model):
    model = make_model("llama")
    check_packable(model)
    assert model.config._attn_implementation == "sdpa"
