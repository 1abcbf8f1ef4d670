"""Linear layers that share their input, computed as one product, with LoRA or DoRA adapters and written-out gradients.

With the weights of k_proj and v_proj on top of each other, one product serves both, forward and backward, and one
product serves their adapters' A. The formulas are those of dora.py; here many small operations are saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.distributed.tensor import DTensor

from tweetdora.dora import DoraLinear, is_4bit

# Rows of zeros in a weight have norm 0 and magnitude 0. Any positive norm keeps them at zero (dora.py).
_SMALLEST_SQUARE = 1e-30


@dataclass
class Kept:
    """What a forward pass keeps for the backward pass; None where there is no adapter.

    hidden: s A x of all adapters, (T, m r). unscaled: W x + s B A x before DoRA's gain, (T, out). gain and
    inverse_norms: (out,).
    """

    hidden: torch.Tensor | None = None
    unscaled: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    inverse_norms: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor | None]:
        """The fields in order."""
        return [self.hidden, self.unscaled, self.gain, self.inverse_norms]


class Joined:
    """Linear layers with the same input (T, in), in the order of their columns in the output (T, out).

    The layers with adapters come last, so that their columns are next to each other. The weights of several layers
    become views of one tensor. (A weight that was only mapped from a file takes memory of its own then.)
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.adapted = [layer for layer in layers if isinstance(layer, LoraLinear)]
        self.bases: list[Any] = [
            layer.get_base_layer() if isinstance(layer, LoraLinear) else layer for layer in layers
        ]
        self.adapted_bases = self.bases[len(self.bases) - len(self.adapted) :]
        self.sizes = [base.out_features for base in self.adapted_bases]
        self.first = sum(base.out_features for base in self.bases) - sum(self.sizes)
        self.name = self.adapted[0].active_adapters[0] if self.adapted else ""
        self.dora = bool(self.adapted) and self.name in self.adapted[0].lora_magnitude_vector
        self.scaling = float(self.adapted[0].scaling[self.name]) if self.adapted else 1.0
        self._joined: torch.Tensor | None = None
        self._squared_norms: tuple[Any, torch.Tensor] | None = None

    def is_ordinary(self) -> bool:
        """True if this class computes what the layers would: at most one adapter each, alike, and not merged."""
        return (
            all(map(_is_plain, self.bases))
            and all(_is_ordinary(layer, self.name, self.dora, self.scaling) for layer in self.adapted)
            and len({base.bias is None for base in self.bases}) == 1
            and len({layer.lora_A[self.name].weight.shape for layer in self.adapted}) < 2
            and len({weight.dtype for weight in self.adapter_weights()}) < 2
        )

    def adapter_weights(self) -> list[torch.Tensor]:
        """A of all adapters, then B, then DoRA's magnitudes."""
        weights: list[Any] = [layer.lora_A[self.name].weight for layer in self.adapted]
        weights += [layer.lora_B[self.name].weight for layer in self.adapted]
        if self.dora:
            weights += [layer.lora_magnitude_vector[self.name].weight for layer in self.adapted]
        return weights

    def weight(self) -> torch.Tensor:
        """All weights on top of each other, (out, in)."""
        weights = [base.weight for base in self.bases]
        if len(weights) == 1:
            return weights[0].detach()
        joined, sizes = self._joined, [len(weight) for weight in weights]
        if joined is None or not all(map(_is_same, weights, joined.split(sizes))):
            joined = torch.cat([weight.detach() for weight in weights])
            for weight, part in zip(weights, joined.split(sizes), strict=True):
                weight.data = part
            self._joined = joined
        return joined

    def prepare(self) -> None:
        """Make what is made once, before the first step needs it."""
        weight = self.weight()
        if self.dora:
            self._squares(weight[self.first :], self.adapter_weights()[0].dtype)

    def forward(
        self, x: torch.Tensor, weights: Sequence[torch.Tensor], residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Kept]:
        """Output (T, out) of x (T, in) in x's dtype, plus `residual`. `weights` as adapter_weights returns them."""
        joined = self.weight()
        if not self.adapted and residual is not None:
            return self._with_bias(torch.addmm(residual, x, joined.T)), Kept()
        output = x @ joined.T
        kept = Kept()
        if self.adapted:
            kept = self._adapt(x, output[:, self.first :], joined[self.first :], weights)
        if residual is not None:
            output += residual
        return self._with_bias(output), kept

    def _with_bias(self, output: torch.Tensor) -> torch.Tensor:
        biases = [base.bias for base in self.bases]
        return output if biases[0] is None else output.add_(_cat(biases))

    def _adapt(
        self, x: torch.Tensor, output: torch.Tensor, weight: torch.Tensor, weights: Sequence[torch.Tensor]
    ) -> Kept:
        """Apply the adapters to the columns `output` of W x, in place."""
        count = len(self.adapted)
        lora_A, lora_B, magnitudes = weights[:count], weights[count : 2 * count], weights[2 * count :]
        dtype = lora_A[0].dtype
        stacked_A = _cat(lora_A)  # (m r, in)
        x, wide = x.to(dtype), output.to(dtype)
        # With beta=0, the first argument is not read.
        hidden = torch.addmm(x.new_empty(1, 1), x, stacked_A.T, beta=0, alpha=self.scaling)  # (T, m r)
        sums = torch.empty(output.shape, dtype=dtype, device=output.device) if self.dora else wide
        parts = zip(wide.split(self.sizes, dim=1), hidden.chunk(count, dim=1), lora_B, strict=True)
        for target, (part, own, up) in zip(sums.split(self.sizes, dim=1), parts, strict=True):
            torch.addmm(part, own, up.T, out=target)
        if self.dora:
            gain, inverse_norms = self._gain(weight, stacked_A, lora_A, lora_B, magnitudes)
            torch.mul(sums, gain, out=output)
            return Kept(hidden, sums, gain, inverse_norms)
        if sums is not output:
            output.copy_(sums)
        return Kept(hidden)

    def _gain(
        self,
        weight: torch.Tensor,
        stacked_A: torch.Tensor,
        lora_A: Sequence[torch.Tensor],
        lora_B: Sequence[torch.Tensor],
        magnitudes: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """DoRA's m / |W + s B A| and 1 / |W + s B A| of each row, (out,).

        The squared norm is |W|^2 + s (2 W A^T + s B A A^T) . B, row by row (dora.py).
        """
        squared, dtype = self._squares(weight, stacked_A.dtype), stacked_A.dtype
        weight = weight.to(dtype)
        per_adapter = stacked_A.view(len(lora_A), -1, stacked_A.shape[1])
        products = torch.bmm(per_adapter, per_adapter.transpose(1, 2))  # (m, r, r)
        cross = torch.empty(len(weight), per_adapter.shape[1], dtype=dtype, device=weight.device)  # (out, r)
        parts = zip(weight.split(self.sizes), cross.split(self.sizes), lora_A, lora_B, products, strict=True)
        for own, target, down, up, product in parts:
            torch.mm(own, down.T, out=target)
            target.addmm_(up, product, beta=2, alpha=self.scaling)
        cross.mul_(_cat(lora_B))
        inverse = torch.add(squared, cross.sum(1), alpha=self.scaling).clamp_(min=_SMALLEST_SQUARE).rsqrt_()
        return _cat(magnitudes) * inverse, inverse

    def _squares(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """|W|^2 of each row; recomputed only when a weight changes."""
        versions = ((base.weight.untyped_storage()._cdata, base.weight._version) for base in self.adapted_bases)
        state = dtype, weight.dtype, weight.device, *versions
        if self._squared_norms is None or self._squared_norms[0] != state:
            self._squared_norms = state, weight.to(dtype).square().sum(1)
        return self._squared_norms[1]

    def backward(
        self,
        gradient: torch.Tensor,
        x: torch.Tensor | None,
        kept: Kept,
        weights: Sequence[torch.Tensor],
        needs_input: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Gradients of x, if it needs one, and of the adapters' weights, in their order.

        x is read only if there are adapters. DoRA adapters overwrite `gradient` (T, out).
        """
        grad_x: torch.Tensor | None = None
        grads: list[torch.Tensor] = []
        if self.adapted:
            grad_hidden, grads = self._backward_adapters(gradient[:, self.first :], x, kept, weights)
            if needs_input:
                grad_x = (grad_hidden @ _cat(weights[: len(self.adapted)])).to(gradient.dtype)
        if needs_input:
            joined = self.weight()
            grad_x = gradient @ joined if grad_x is None else grad_x.addmm_(gradient, joined)
        return grad_x, grads

    def _backward_adapters(
        self, gradient: torch.Tensor, x: Any, kept: Kept, weights: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Gradients of A x and of the adapters' weights; turns `gradient` into that of W x, in place."""
        count, hidden = len(self.adapted), kept.hidden
        assert hidden is not None
        wide = gradient.to(hidden.dtype)
        grad_magnitudes: list[torch.Tensor] = []
        if kept.gain is not None and kept.unscaled is not None and kept.inverse_norms is not None:
            grad_gain = (wide * kept.unscaled).sum(0)
            grad_magnitudes = list((grad_gain * kept.inverse_norms).split(self.sizes))
            wide.mul_(kept.gain)
            if wide is not gradient:
                gradient.copy_(wide)
        grad_hidden, grad_B = torch.empty_like(hidden), []
        ranks = zip(hidden.chunk(count, dim=1), grad_hidden.chunk(count, dim=1), strict=True)
        parts = zip(wide.split(self.sizes, dim=1), ranks, weights[count : 2 * count], strict=True)
        for part, (down, target), up in parts:
            grad_B.append(part.T @ down)
            target.addmm_(part, up, beta=0, alpha=self.scaling)
        grad_A = list((grad_hidden.T @ x.to(hidden.dtype)).split(hidden.shape[1] // count))
        return grad_hidden, [*grad_A, *grad_B, *grad_magnitudes]


def _cat(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _is_same(weight: torch.Tensor, part: torch.Tensor) -> bool:
    """True if two tensors are the same numbers in memory."""
    storages = [tensor.untyped_storage()._cdata for tensor in (weight, part)]
    return (
        storages[0] == storages[1]
        and weight.storage_offset() == part.storage_offset()
        and weight.shape == part.shape
        and weight.dtype == part.dtype
    )


def _is_plain(base: Any) -> bool:
    """True for an ordinary linear layer, whose frozen weight lies whole in this process."""
    return (
        type(base) is nn.Linear
        and not isinstance(base.weight, DTensor)
        and not is_4bit(base)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )


def _is_ordinary(layer: Any, name: str, dora: bool, scaling: float) -> bool:
    if type(layer) not in (DoraLinear, LoraLinear) or layer.disable_adapters or layer.merged:
        return False
    if layer.active_adapters != [name] or (name in layer.lora_magnitude_vector) != dora or layer.lora_bias.get(name):
        return False
    if not dora and name in layer.lora_variant:
        return False
    return layer.scaling[name] == scaling and isinstance(layer.lora_dropout[name], nn.Identity)
