"""Attention over a packed batch: each row sees the shared prefix and itself, and no row sees another.

A dense mask over all T tokens of a packed batch would cost T x T; here the prefix attends to itself once, and the
rows, padded to the longest only inside this function, attend to N x L x (P + L):

                keys:   prefix   own tokens of the same row
    prefix              causal   –
    row 0 … N-1         all      causal

It is an attention function in transformers' own interface (transformers.AttentionInterface), so the models' code stays
as it is. `packing` reaches it as an extra argument of model(...); without it the function is transformers' own
scaled_dot_product_attention, so one setting serves training and generation.
"""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tweetdora.errors import InputError

ATTENTION = "tweetdora"


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (B, T, H, D) for query (B, H, T, D), key and value (B, G, S, D); H heads share G of keys.

    With `packing` (see PackedCollator) B is 1 and S is T.
    """
    dtype = query.dtype
    if query.device.type == "cpu" and query.element_size() < 4:
        # Small matrix products in bf16 spend their time on copies on a CPU; float32 is faster and more exact.
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    if packing is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    else:
        _refuse_other_masks(module, attention_mask, kwargs)
        output = _packed_attention(query, key, value, packing, **kwargs)
    return output.to(dtype), None


def _refuse_other_masks(module: nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse layers that would have hidden more than causality and the passed window do; here it would not be hidden.

    Raises:
        InputError: names the layer.
    """
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None and "sliding_window" not in kwargs:
        said = f"keeps its window of {window} tokens in the mask"
    elif attention_mask is not None and attention_mask.numel() > 1:  # the collator's place-holder has one element
        said = "makes a mask of its own"
    else:
        return
    raise InputError(f"--batching packed: {type(module).__name__} {said}. Use --batching padded, which is slower.")


def _packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: dict[str, Any],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    prefix = packing["prefix_length"]
    padded_length = packing["to_padded"].numel() // packing["row_count"]
    own = []
    for states in (query, key, value):
        rows = states[0, :, prefix:].index_select(1, packing["to_padded"])  # (heads, N * L, D)
        own.append(rows.unflatten(1, (-1, padded_length)).transpose(0, 1))  # (N, heads, L, D)
    row_query, row_key, row_value = own
    count = row_query.shape[0]
    row_key = torch.cat([key[:, :, :prefix].expand(count, -1, -1, -1), row_key], dim=2)  # (N, G, P + L, D)
    row_value = torch.cat([value[:, :, :prefix].expand(count, -1, -1, -1), row_value], dim=2)
    mask = _causal_mask(prefix + padded_length, sliding_window, query.device)
    output = _attend(row_query, row_key, row_value, mask[prefix:], scaling, dropout)  # (N, H, L, D)
    output = output.transpose(0, 1).flatten(1, 2).index_select(1, packing["to_packed"])  # (H, T - P, D)
    if prefix:
        states = (query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix])
        of_prefix = _attend(*states, mask[:prefix, :prefix], scaling, dropout)[0]  # (H, P, D)
        output = torch.cat([of_prefix, output], dim=1)
    return output.transpose(0, 1).unsqueeze(0)  # (1, T, H, D)


def _causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of `length` positions (columns) each position (rows) sees: itself and those before, `window` at most.

    A row's own tokens follow the prefix in position, so the same square serves the prefix (its first rows) and every
    row of the batch (the others); a padding token comes after all the row's tokens, so none of them sees it.
    """
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    grouped = key.shape[1] != query.shape[1]
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
    )


def check_packable(model: PreTrainedModel) -> None:
    """Refuse models whose attention is more than this module computes.

    Raises:
        InputError: names the feature, and the flag for padded batches.
    """
    if reason := _why_not_packable(model):
        raise InputError(
            f"--batching packed does not fit {model.config.model_type}: {reason}. Use --batching padded, which is "
            "slower."
        )


def is_packable(model: PreTrainedModel) -> bool:
    """Whether rows of the model may share the states of what they begin with."""
    return _why_not_packable(model) is None


def _why_not_packable(model: PreTrainedModel) -> str | None:
    config = model.config
    if not model._supports_attention_backend:
        return "its code does not take attention functions"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    if not model._supports_sdpa:
        return "its attention is more than scaled dot products"  # sinks in gpt-oss, for example
    if other := set(_layer_types(config)) - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(other))}"
    return None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"]


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
