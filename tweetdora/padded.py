"""Attention over a packed batch in the padded layout, with its gradient written out, for block.py.

One gather moves the heads of all tokens to where attention.py's products need them, and another one back. The prefix's
keys and values are copied to every row by that gather, so their gradients are summed over the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tweetdora.attention import causal_masks


@dataclass
class Gathers:
    """Where the states of a packed batch lie in the padded layout; made once a batch.

    Rows are heads of tokens, of head_dim numbers. Padded, they are laid out as (N, G, H / G, L) own queries,
    (G, H / G, P) the prefix's queries, (N, G, P + L) keys, as many values, (G, P) keys and values of the prefix.

    padded: for each padded row the row of the packed states. packed: for each packed row its padded row. output and
    output_back: the same for the queries only. is_padding: (N, 1, 1, L, 1). source: the rotary embedding's cos as
    it was given. cos and signed_sin: (T, 1, D), the first half of sin negative.
    """

    padded: torch.Tensor
    packed: torch.Tensor
    output: torch.Tensor
    output_back: torch.Tensor
    is_padding: torch.Tensor
    source: torch.Tensor
    cos: torch.Tensor
    signed_sin: torch.Tensor


class PaddedAttention:
    """Attention of a layer on packed states (T, per_token * D), whose heads are queries, keys and values in any order.

    offsets: the first head of "q", "k" and "v" among a token's heads.
    """

    def __init__(
        self, heads: int, groups: int, head_dim: int, scaling: float, window: int | None, offsets: dict[str, int]
    ) -> None:
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.scaling, self.window, self.offsets = scaling, window, offsets

    def scores(self, packing: dict[str, Any]) -> int:
        """Number of attention scores that a batch's forward pass keeps."""
        shape = _Shape.of(packing, self)
        return self.heads * (shape.rows * shape.length * (shape.prefix + shape.length) + shape.prefix**2)

    def gathers(self, packing: dict[str, Any], cos: torch.Tensor, sin: torch.Tensor) -> Gathers:
        """The batch's index tensors; made by the first layer, and kept for the others."""
        key = self.heads, self.groups, self.head_dim, *self.offsets.items()
        made = packing.setdefault("gathers", {})
        if key not in made or made[key].source is not cos:
            made[key] = _make_gathers(packing, self.heads, self.groups, self.offsets, cos, sin)
        return made[key]

    def attend(
        self, states: torch.Tensor, packing: dict[str, Any], gathers: Gathers
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Attention output (T, H * D) of rotated states (T, per_token * D), and what the backward pass needs."""
        shape = _Shape.of(packing, self)
        padded = self._exact(states.view(-1, self.head_dim).index_select(0, gathers.padded))
        query, prefix_query, key, value, *_ = shape.split(padded)
        mask, prefix_mask = causal_masks(packing, shape.prefix + shape.length, states.device, self.window)
        per_group = self.heads // self.groups
        output = padded.new_empty(shape.queries, self.head_dim)
        own, first = output.split([shape.own_queries, shape.queries - shape.own_queries])
        scores = torch.baddbmm(mask.added(query.dtype, per_group), query, key.mT, alpha=self.scaling)
        weights = torch.softmax(scores, dim=-1)
        torch.bmm(weights, value, out=own.view(query.shape))
        kept = [padded, weights]
        if shape.prefix:
            prefix_key, prefix_value = (part[: self.groups, : shape.prefix] for part in (key, value))
            scores = torch.baddbmm(
                prefix_mask.added(query.dtype, per_group), prefix_query, prefix_key.mT, alpha=self.scaling
            )
            weights = torch.softmax(scores, dim=-1)
            torch.bmm(weights, prefix_value, out=first.view(prefix_query.shape))
            kept.append(weights)
        return output.index_select(0, gathers.output).view(len(states), -1).to(states.dtype), kept

    def _exact(self, states: torch.Tensor) -> torch.Tensor:
        """Half precision in float32 where the scores of the fused attention that this stands for are: not on a CPU."""
        half = states.element_size() < 4 and states.device.type != "cpu"
        return states.float() if half else states

    def attend_backward(
        self, gradient: torch.Tensor, kept: Sequence[torch.Tensor], packing: dict[str, Any], gathers: Gathers
    ) -> torch.Tensor:
        """Gradient of the rotated states, (T, per_token * D), from that of the output, (T, H * D)."""
        shape = _Shape.of(packing, self)
        padded, weights = kept[0], kept[1]
        query, prefix_query, key, value, *_ = shape.split(padded)
        given = self._exact(gradient.reshape(-1, self.head_dim).index_select(0, gathers.output_back))
        own, first = given.split([shape.own_queries, shape.queries - shape.own_queries])
        per_head = (shape.rows, self.groups, self.heads // self.groups, shape.length, self.head_dim)
        own.view(per_head).masked_fill_(gathers.is_padding, 0)
        grads = padded.new_empty(shape.total, self.head_dim)
        d_query, d_prefix_query, d_key, d_value, d_prefix_key, d_prefix_value = shape.split(grads)
        _attend_backward(
            own.view(query.shape), weights, (query, key, value), (d_query, d_key, d_value), self.scaling, beta=0
        )
        if shape.prefix:
            for part, target in ((d_key, d_prefix_key), (d_value, d_prefix_value)):  # of all rows
                per_row = part.view(shape.rows, self.groups, -1, self.head_dim)[:, :, : shape.prefix]
                torch.sum(per_row, dim=0, out=target)
            states = (prefix_query, key[: self.groups, : shape.prefix], value[: self.groups, : shape.prefix])
            targets = d_prefix_query, d_prefix_key, d_prefix_value
            _attend_backward(first.view(prefix_query.shape), kept[2], states, targets, self.scaling, beta=1)
        return grads.index_select(0, gathers.packed).view(len(gradient), -1).to(gradient.dtype)

    def rotated(self, states: torch.Tensor) -> torch.Tensor:
        """The heads of queries and keys, (T, H + G, D), of states (T, per_token * D)."""
        first = min(self.offsets["q"], self.offsets["k"])
        return states.view(len(states), -1, self.head_dim)[:, first : first + self.heads + self.groups]


@dataclass(frozen=True)
class _Shape:
    """Numbers of a packed batch: rows N, prefix P, own tokens L, and those of heads."""

    rows: int
    prefix: int
    length: int
    heads: int
    groups: int

    @classmethod
    def of(cls, packing: dict[str, Any], layer: PaddedAttention) -> "_Shape":
        """The numbers of a batch in a layer."""
        rows = packing["row_count"]
        return cls(rows, packing["prefix_length"], packing["to_padded"].numel() // rows, layer.heads, layer.groups)

    @property
    def own_queries(self) -> int:
        """Padded rows that hold the own tokens' queries."""
        return self.rows * self.heads * self.length

    @property
    def queries(self) -> int:
        """Padded rows that hold queries."""
        return self.own_queries + self.heads * self.prefix

    @property
    def total(self) -> int:
        """Padded rows, with those of the gradients of the prefix's keys and values."""
        return self.queries + 2 * self.groups * (self.rows * (self.prefix + self.length) + self.prefix)

    def split(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """Own queries, the prefix's queries, keys, values, and the prefix's keys and values if they are there."""
        seen, width = self.rows * self.groups * (self.prefix + self.length), padded.shape[1]
        of_prefix = self.groups * self.prefix
        sizes = [self.own_queries, self.queries - self.own_queries, seen, seen, of_prefix, of_prefix]
        number = 6 if len(padded) == sum(sizes) else 4
        batches = [self.rows * self.groups, self.groups] + 2 * [self.rows * self.groups] + 2 * [self.groups]
        parts = zip(padded.split(sizes[:number]), batches[:number], strict=True)
        return [part.view(batch, len(part) // batch, width) for part, batch in parts]


def _attend_backward(
    gradient: torch.Tensor,
    weights: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    targets: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float,
    beta: int,
) -> None:
    """Write the gradients of query, key and value; with beta=1, add those of key and value to what is there."""
    query, key, value = states
    d_query, d_key, d_value = targets
    d_value.baddbmm_(weights.mT, gradient, beta=beta)
    d_weights = torch.bmm(gradient, value.mT)
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    d_query.baddbmm_(d_scores, key, beta=0, alpha=scaling)
    d_key.baddbmm_(d_scores.mT, query, beta=beta, alpha=scaling)


def _make_gathers(
    packing: dict[str, Any], heads: int, groups: int, offsets: dict[str, int], cos: torch.Tensor, sin: torch.Tensor
) -> Gathers:
    device, rows, prefix = cos.device, packing["row_count"], packing["prefix_length"]
    to_padded, to_packed = packing["to_padded"].to(device), packing["to_packed"].to(device)
    length, per_token = to_padded.numel() // rows, heads + 2 * groups
    own = (prefix + to_padded).view(rows, length)  # tokens
    first = torch.arange(prefix, device=device)
    seen = torch.cat([first.expand(rows, -1), own], dim=1)  # (N, P + L)
    head, group = torch.arange(heads, device=device), torch.arange(groups, device=device)
    query = own[:, None] * per_token + (head + offsets["q"])[:, None]  # (N, H, L)
    prefix_query = first * per_token + (head + offsets["q"])[:, None]  # (H, P)
    keys, values = (
        seen[:, None] * per_token + (group + offsets[part])[:, None]
        for part in "kv"  # (N, G, P + L)
    )
    prefix_keys, prefix_values = (first * per_token + (group + offsets[part])[:, None] for part in "kv")  # (G, P)
    parts = [part.flatten() for part in (query, prefix_query, keys, values)]
    padded = torch.cat(parts)
    # The reverse: of the padded rows that hold a packed row's gradient, exactly one.
    tokens = len(to_packed) + prefix
    place = torch.arange(len(padded) + 2 * groups * prefix, device=device)
    everything = torch.cat([padded, prefix_keys.flatten(), prefix_values.flatten()])
    is_padding = packing["is_padding"].to(device).view(rows, length)
    holds = torch.ones_like(everything, dtype=torch.bool)
    sizes = [len(part) for part in parts]
    own_query, _, own_keys, own_values, _ = holds.split([*sizes, 2 * groups * prefix])
    own_query.view(rows, heads, length).masked_fill_(is_padding[:, None], False)
    for part in (own_keys, own_values):
        by_row = part.view(rows, groups, prefix + length)
        # Their gradients are summed over the rows, into the last rows. (A CPU would write those last anyway.)
        by_row[:, :, :prefix] = False
        by_row[:, :, prefix:].masked_fill_(is_padding[:, None], False)
    unused = tokens * per_token  # what the others write to
    packed = place.new_empty(unused + 1).scatter_(0, everything.where(holds, unused), place)[:-1]
    output = packed.view(tokens, per_token)[:, offsets["q"] : offsets["q"] + heads].flatten()
    queries = torch.cat(parts[:2])
    output_back = queries.div(per_token, rounding_mode="floor") * heads + queries % per_token - offsets["q"]
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)[:, None]  # (T, 1, D)
    return Gathers(
        padded, packed, output, output_back, is_padding[:, None, None, :, None], cos, cos[0][:, None], signed
    )


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, back: bool = False) -> None:
    """Apply the rotary embedding in place, or its transpose; both halves of a head have the same angles."""
    turned = torch.roll(states, states.shape[-1] // 2, -1)
    states.mul_(cos).addcmul_(turned, signed_sin, value=-1 if back else 1)
