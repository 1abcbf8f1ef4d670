"""Attention over a packed batch: each row sees the shared prefix and itself, but no other row.

A dense mask over all T tokens of a packed batch would cost T x T. Here the prefix attends to itself once, and the
rows, padded to the longest only inside this function, cost N x L x (P + L):

                keys:   prefix   own tokens of the same row
    prefix              causal   –
    row 0 … N-1         all      causal

During generation, a PackedKVCache holds the rows' keys and values. One new token of each row then forms another packed
batch, which attends to the cached keys.

The function implements transformers' AttentionInterface, so the models' code stays unchanged. `packing` reaches it as
an extra argument of model(...). Without it, the function is transformers' own scaled_dot_product_attention, so one
setting serves training and generation.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tweetdora.errors import InputError
from tweetdora.packing import pack

ATTENTION = "tweetdora"
# On a CPU, matrix products that store all N x H x L x (P + L) scores take half the time of torch's fused attention,
# mostly because of the gradient. Above these numbers of scores they would take too much memory: the first limit is for
# scores that are kept for the gradient, the second for inference.
KEPT_SCORES, _SCORES = 2**22, 2**25


class NotPackable(RuntimeError):
    """The attention of a model's layers does more than this module computes."""


@dataclass
class PackedKVCache:
    """Keys and values of the N rows that are being generated, by layer number.

    `prompts` holds the prompts' keys and values, each (N, G, P + L, D) and padded on the right; `seen` (N, P + L) is
    True for tokens and False for padding. `generated` holds those of the new tokens, each (N, G, new tokens, D).
    """

    prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    generated: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    seen: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.bool))

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only these rows, given by number."""
        for part in (self.prompts, self.generated):
            for layer, (keys, values) in part.items():
                part[layer] = keys[rows], values[rows]
        self.seen = self.seen[rows]


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
    """Attention output (B, T, H, D) for query (B, H, T, D), key and value (B, G, S, D); H heads share G key heads.

    With `packing` (see PackedCollator), B is 1 and S is T. If packing["tree"] is set too, the rows are followed by the
    tokens of N trees: K tokens that continue each of the N rows (see scoring.CompletionTree).
    """
    if packing is not None:
        _refuse_other_masks(module, attention_mask, kwargs)
        layer: Any = module.layer_idx
        if packing.get("decoding"):
            return _decode_attention(query, key, value, packing, layer, **kwargs), None
        if "tree" in packing:
            return _attention_with_tree(query, key, value, packing, **kwargs), None
        output, keys, values = _packed_attention(query, key, value, packing, **kwargs)
        if "cache" in packing:
            if layer in packing["cache"].prompts:  # such as DiffLlama's: the cache holds one pair per layer
                raise NotPackable("its layers call attention more than once")
            packing["cache"].prompts[layer] = keys, values
        return output, None
    dtype = query.dtype
    if query.device.type == "cpu" and query.element_size() < 4:
        # On a CPU, torch's fused attention is slower in bf16 than in float32 (LOG.md), and less exact.
        query, key, value = query.float(), key.float(), value.float()
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.to(dtype), None


def _refuse_other_masks(module: nn.Module, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """Refuse layers that mask more than causality and the passed window, because that mask would be ignored here.

    Raises:
        NotPackable: says what the layers do.
    """
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None and "sliding_window" not in kwargs:
        raise NotPackable(f"its layers apply their window of {window} tokens through the mask")
    if attention_mask is not None and attention_mask.numel() > 1:  # the collator's placeholder has one element
        raise NotPackable("its layers build their own masks")


def _packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: dict[str, Any],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention output (1, T, H, D), and the padded rows' keys and values (N, G, P + L, D)."""
    prefix = packing["prefix_length"]
    to_padded, to_packed = packing["to_padded"], packing["to_packed"]
    padded_length = to_padded.numel() // packing["row_count"]
    if value.shape[-1] != key.shape[-1]:  # multi-head latent attention, for example
        raise NotPackable("its values have another width than its keys")
    of_prefix, own = [], []
    for states in (query, key, value):
        # Split instead of slicing: the gradient of a slice allocates zeros as large as the whole tensor.
        first, rest = states[0].transpose(0, 1).split([prefix, states.shape[2] - prefix])  # (P or T - P, heads, D)
        rows = _Regroup.apply(rest, to_padded, to_packed, None)  # (N * L, heads, D)
        of_prefix.append(first.transpose(0, 1))  # (heads, P, D)
        own.append(rows.unflatten(0, (-1, padded_length)).transpose(1, 2))  # (N, heads, L, D)
    keys, values = (  # (N, G, P + L, D)
        torch.cat([first.expand(len(rows), -1, -1, -1), rows], dim=2)
        for first, rows in zip(of_prefix[1:], own[1:], strict=True)
    )
    own_mask, prefix_mask = causal_masks(packing, prefix + padded_length, query.device, sliding_window)
    output = _attend(own[0], keys, values, own_mask, scaling, dropout)  # (N, H, L, D)
    output = output.transpose(1, 2).flatten(0, 1)  # (N * L, H, D)
    output = _Regroup.apply(output, to_packed, to_padded, packing["is_padding"])  # (T - P, H, D)
    if prefix:
        query, key, value = (states[None] for states in of_prefix)
        prefix_output = _attend(query, key, value, prefix_mask, scaling, dropout)[0]
        output = torch.cat([prefix_output.transpose(0, 1), output])
    return output.unsqueeze(0), keys, values


class _Regroup(torch.autograd.Function):
    """Move tokens to padded positions or back: states (A, heads, D) to (B, heads, D) by `index` (B,).

    The gradient is gathered by the reverse index `back` (A,), which is faster than a scatter-add. The result is exact:
    nothing attends to a padding position, so the gradient that arrives from one is zero, and the gradient sent to one
    (`unseen`, of shape (A,)) is set to zero.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, index: torch.Tensor, back: torch.Tensor, unseen: torch.Tensor | None
    ) -> torch.Tensor:
        """Take the rows of `states` that `index` names."""
        ctx.back, ctx.unseen = back, unseen
        return states.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of `states`."""
        gradient = gradient.index_select(0, ctx.back)
        if ctx.unseen is not None:
            gradient.masked_fill_(ctx.unseen[:, None, None], 0)
        return gradient, None, None, None


def _decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: dict[str, Any],
    layer: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention output (1, N, H, D) of one new token per row, for query (1, H, N, D), key and value (1, G, N, D)."""
    cache: PackedKVCache = packing["cache"]
    new = [states[0].transpose(0, 1)[:, :, None] for states in (key, value)]  # (N, G, 1, D)
    if layer in cache.generated:
        new = [torch.cat([old, states], dim=2) for old, states in zip(cache.generated[layer], new, strict=True)]
    cache.generated[layer] = new[0], new[1]
    keys, values = cache.prompts[layer]  # (N, G, P + L, D)
    count, groups, prompt_length, width = keys.shape
    query = query[0].transpose(0, 1).reshape(count, groups, -1, width)  # (N, G, H / G, D)
    query = query * (scaling if scaling is not None else width**-0.5)
    scores = torch.cat([query @ keys.transpose(2, 3), query @ new[0].transpose(2, 3)], dim=-1)
    number = new[0].shape[2]
    seen = torch.cat([cache.seen, cache.seen.new_ones(count, number)], dim=1)  # (N, P + L + new)
    if sliding_window is not None:
        # A row's new tokens follow its own last token, not the padding.
        places = torch.arange(prompt_length, device=keys.device).expand(count, -1)
        own = cache.seen.sum(1, keepdim=True) + torch.arange(number, device=keys.device)
        places = torch.cat([places, own], dim=1)
        seen = seen & (places[:, -1:] - places < sliding_window)
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    output = weights[..., :prompt_length] @ values + weights[..., prompt_length:] @ new[1]  # (N, G, H / G, D)
    return output.reshape(1, count, -1, width)


def _attention_with_tree(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: dict[str, Any], **kwargs: Any
) -> torch.Tensor:
    """Attention output (1, T, H, D) of a packed batch whose last N * K tokens are trees of K tokens, one per row."""
    end = query.shape[2] - packing["row_count"] * len(packing["tree"])  # end of the rows
    output, keys, values = _packed_attention(query[:, :, :end], key[:, :, :end], value[:, :, :end], packing, **kwargs)
    tree = _tree_attention(query[:, :, end:], key[:, :, end:], value[:, :, end:], keys, values, packing, **kwargs)
    return torch.cat([output, tree], dim=1)


def _tree_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    packing: dict[str, Any],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Attention output (1, N * K, H, D) of the trees of K tokens that continue each of N rows.

    In packing["tree"] (K, K), row i marks the tokens (columns) on the path from the root to token i, i included. A
    token sees these and its row's prompt. The prompts' `keys` and `values` are (N, G, P + L, D), padded on the right;
    packing["seen"] (N, P + L) says which of them are tokens. Query is (1, H, N * K, D), key and value are
    (1, G, N * K, D).
    """
    tree, prompt_seen = packing["tree"], packing["seen"]
    count, groups, prompt_length, width = keys.shape
    number = len(tree)
    heads = query.shape[1] // groups
    new_keys, new_values = (
        states[0].unflatten(1, (count, number)).transpose(0, 1) for states in (key, value)
    )  # (N, G, K, D)
    query = query[0].unflatten(1, (count, number)).transpose(0, 1).unflatten(1, (groups, heads))  # (N, G, h, K, D)
    query = query.flatten(2, 3) * (scaling if scaling is not None else width**-0.5)  # (N, G, h * K, D)
    scores = torch.cat([query @ keys.transpose(2, 3), query @ new_keys.transpose(2, 3)], dim=-1)
    seen_prompt = prompt_seen[:, None].expand(-1, number, -1)  # (N, K, P + L)
    seen_new = tree.expand(count, -1, -1)
    if sliding_window is not None:
        depth = tree.sum(1)  # 1 for a token right after the prompt
        place = prompt_seen.sum(1, keepdim=True) + depth - 1  # (N, K)
        distance = place[:, :, None] - torch.arange(prompt_length, device=keys.device)
        seen_prompt = seen_prompt & (distance < sliding_window)
        seen_new = seen_new & (depth[:, None] - depth < sliding_window)
    seen = torch.cat([seen_prompt, seen_new], dim=-1).repeat(1, heads, 1)[:, None]  # (N, 1, h * K, P + L + K)
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    output = weights[..., :prompt_length] @ values + weights[..., prompt_length:] @ new_values  # (N, G, h * K, D)
    output = output.unflatten(2, (heads, number)).permute(0, 3, 1, 2, 4)  # (N, K, G, h, D)
    return output.reshape(1, count * number, -1, width)


def _causal_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of `length` positions (columns) each position (rows) sees: itself and those before it, at most `window`.

    A row's own tokens follow the prefix in position, so one square mask serves both: its first rows are for the
    prefix, the others for every row of the batch. A row's padding comes after all its tokens, so none of them sees it.
    """
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


class _Mask:
    """Which positions (columns) each position (rows) sees, bool (L, S), and what is added to scores for that."""

    def __init__(self, seen: torch.Tensor) -> None:
        self.seen = seen
        self._added: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def added(self, dtype: torch.dtype, heads: int) -> torch.Tensor:
        """0 where a position is seen, minus infinity elsewhere, (heads * L, S)."""
        if (dtype, heads) not in self._added:
            hidden = torch.zeros_like(self.seen, dtype=dtype).masked_fill_(~self.seen, float("-inf"))
            self._added[dtype, heads] = hidden.repeat(heads, 1)
        return self._added[dtype, heads]


def causal_masks(
    packing: dict[str, Any], length: int, device: torch.device, window: int | None = None
) -> tuple[_Mask, _Mask]:
    """The masks of the rows' own tokens and of the prefix; made by a batch's first layer, and kept for the others."""
    made, prefix = packing.setdefault("masks", {}), packing["prefix_length"]
    if (window, device) not in made:
        seen = _causal_mask(length, window, device)
        made[window, device] = _Mask(seen[prefix:]), _Mask(seen[:prefix, :prefix])
    return made[window, device]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: _Mask,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attention output (N, H, L, D) for query (N, H, L, D), key and value (N, G, S, D)."""
    count, heads, length, width = query.shape
    groups, seen = key.shape[1:3]
    most = KEPT_SCORES if torch.is_grad_enabled() else _SCORES
    if query.device.type != "cpu" or dropout or count * heads * length * seen > most:
        dtype = query.dtype
        if query.device.type == "cpu" and query.element_size() < 4:
            query, key, value = query.float(), key.float(), value.float()
        output = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask.seen, dropout_p=dropout, scale=scaling, enable_gqa=groups != heads
        )
        return output.to(dtype)
    # Stack the heads that share keys, so that each row and group needs only one product.
    query = query.reshape(count * groups, -1, width)  # (N * G, H / G * L, D)
    key, value = key.reshape(count * groups, seen, width), value.reshape(count * groups, seen, width)
    hidden = mask.added(query.dtype, heads // groups)
    scale = scaling if scaling is not None else width**-0.5
    scores = torch.baddbmm(hidden, query, key.transpose(1, 2), alpha=scale)  # (N * G, H / G * L, S)
    return torch.bmm(torch.softmax(scores, dim=-1), value).view(count, heads, length, width)


def check_packable(model: PreTrainedModel) -> None:
    """Refuse models whose attention does more than this module computes.

    Raises:
        InputError: names the feature, and the flag for padded batches.
    """
    if model.config._attn_implementation == ATTENTION:
        return  # load_base has checked it already
    if reason := _why_not_packable(model):
        raise InputError(
            f"--batching shared_prefix does not support {model.config.model_type}: {reason}. Use --batching padded, "
            "which is slower."
        )


def is_packable(model: PreTrainedModel) -> bool:
    """True if the model supports packed batches and generation after a shared prefix."""
    return _why_not_packable(model) is None


def _why_not_packable(model: PreTrainedModel) -> str | None:
    config = model.config
    if not model._supports_attention_backend:
        return "its code does not accept attention functions"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention scores"
    if not model._supports_sdpa:
        return "its attention is more than a scaled dot product"  # sinks in gpt-oss, for example
    if other := set(_layer_types(config)) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(other))}"
    return _try_packed_batch(model)


@torch.no_grad()
def _try_packed_batch(model: PreTrainedModel) -> str | None:
    """Run two rows of one token after a prefix of one, as generation does; return why attention refuses, or None."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        batch, _ = pack([[0, 1], [0, 2]], prefix=1)
        batch["packing"]["cache"] = PackedKVCache()
        model(**send_to_device(batch, model.device), use_cache=False)
    except NotPackable as reason:
        return str(reason)
    finally:
        model.set_attn_implementation(before)
    return None


def _layer_types(config: PretrainedConfig) -> list[str]:
    return getattr(config, "layer_types", None) or ["full_attention"]


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
