"""DoRA without materializing the adapted weight: PEFT's outputs and gradients, with fewer and smaller operations.

DoRA (Liu et al., arXiv 2402.09353) multiplies each output of a LoRA layer by a trained magnitude m and divides it by
the norm of the corresponding row of the adapted weight. The norm is treated as a constant:

    y = m / |W + s B A| * (W x + s B A x)        one norm per row; W (out, in), A (r, in), B (out, r)

PEFT builds W + s B A (out x in) in every step to get the norms. They can also be computed from products of size r;
|W|^2 never changes and is computed once (arXiv 2603.22276):

    |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B        row by row

The layer is registered through PEFT's extension point for custom layers; the adapter's weights, names and files are
PEFT's own.

If the base is quantised to 4 bits (QDoRA), W is its dequantised weight, as in PEFT.

Some real models have rows of zeros in W. Such a row has norm 0 and magnitude 0, and PEFT computes 0 / 0. Here its norm
counts as 1, so the row stays zero, both in the layer and after a merge.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.distributed.tensor import DTensor


class _GuardedMagnitude(DoraLinearLayer):
    """PEFT's magnitude, with norms that are never 0."""

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """|W + s B A| of each row, for PEFT's own forward and merge."""
        return without_zeros(super().get_weight_norm(*args, **kwargs))


class _GuardedDora(DoraLinearVariant):
    """PEFT's DoRA with _GuardedMagnitude."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Create the adapter's magnitude."""
        with _whole_weight(module):
            DoraLinearVariant.init(module, adapter_name, **kwargs)
        made: Any = module.lora_magnitude_vector[adapter_name]
        guarded = _GuardedMagnitude(made.fan_in_fan_out)
        guarded.weight = made.weight
        module.lora_magnitude_vector[adapter_name] = guarded


@contextlib.contextmanager
def _whole_weight(module: Any) -> Iterator[None]:
    """Give a layer whose weight is sharded over processes (FSDP2) the whole weight for a while. Collective."""
    layer = module.get_base_layer()
    if not isinstance(layer.weight, DTensor):
        yield
        return
    module.base_layer = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    module.base_layer.weight = nn.Parameter(layer.weight.full_tensor(), requires_grad=False)
    try:
        yield
    finally:
        module.base_layer = layer


class DoraLinear(Linear):
    """PEFT's LoRA layer for nn.Linear, with a faster forward for the common case of DoRA.

    The common case is one active DoRA adapter that is not merged and has no dropout on its input. PEFT's code handles
    everything else, except that rows of zeros are guarded there too.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's LoRA variants, with the guarded DoRA."""
        return {**super().lora_variants, ("use_dora",): _GuardedDora}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Adapted output (..., out) of x (..., in), in x's dtype."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_ordinary():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        lora_A: Any = self.lora_A[name].weight  # (r, in)
        lora_B: Any = self.lora_B[name].weight  # (out, r)
        base: Any = self.get_base_layer()
        scaling, magnitude = self.scaling[name], self.lora_magnitude_vector[name]
        result = base(x)  # (..., out)
        with _without_autocast(x.device.type):  # the adapter is computed in its own dtype
            with torch.no_grad():
                weight = dequantize_bnb_weight(base.weight) if is_4bit(base) else base.weight
                norms = row_norms(
                    self._squared_norms(base.weight, weight, lora_A.dtype), weight, lora_A, lora_B, scaling
                )
            gain = cast(torch.Tensor, magnitude.weight) / norms
            return _AddAndScale.apply(x, result, base.bias, lora_A, lora_B, gain, scaling)

    def _is_ordinary(self) -> bool:
        names = self.active_adapters
        if len(names) != 1 or names[0] not in self.lora_magnitude_vector:
            return False
        return not self.training or isinstance(self.lora_dropout[names[0]], nn.Identity)

    def _squared_norms(self, stored: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """|W|^2 of each row, shape (out,); recomputed only when the weight as it is stored changes."""
        state = (stored.untyped_storage()._cdata, stored._version, stored.device, dtype)
        if getattr(self, "_squared_norms_of", None) != state:
            self._squared_norms_of, self._kept_norms = state, weight.detach().to(dtype).square().sum(1)
        return self._kept_norms


def is_4bit(layer: Any) -> bool:
    """True for a layer whose weight bitsandbytes has quantised."""
    return getattr(layer.weight, "quant_state", None) is not None


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off, where there is any: the meta device has none (memory.py)."""
    return torch.autocast(device_type, enabled=False) if device_type != "meta" else contextlib.nullcontext()


def row_norms(
    squared_norms: torch.Tensor, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """|W + s B A| of each row, shape (out,), from |W|^2 (out,), W (out, in), A (r, in) and B (out, r).

    >>> weight, lora_A, lora_B = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])
    >>> row_norms(torch.tensor([9.0]), weight, lora_A, lora_B, 2.0)    # |(3, 0) + 2 * 1 * (0, 2)|
    tensor([5.])
    """
    cross = (weight.to(lora_A.dtype) @ lora_A.T * lora_B).sum(1)
    square = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(1)
    total = squared_norms + 2 * scaling * cross + scaling**2 * square
    return without_zeros(total.clamp(min=0).sqrt())  # rounding can give slightly negative values


def without_zeros(norms: torch.Tensor) -> torch.Tensor:
    """Replace norms of 0 by 1, so that dividing by them is safe."""
    return norms.where(norms > 0, 1)


class _AddAndScale(torch.autograd.Function):
    """gain * (result + s B A x) with a hand-written gradient, because autograd would save and pass more large tensors.

    With h = A x, u = result + s B h, d the gradient at the output and e = gain * d, the gradients are:

        gain: sum of d * u over tokens;  result: e;  B: s e^T h;  A: s (B^T e)^T x;  x: s A^T B^T e
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        result: torch.Tensor,
        bias: torch.Tensor | None,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        gain: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Output (..., out) in `result`'s dtype; sums are taken in the adapter's dtype."""
        if bias is not None:
            result = result - bias  # the magnitude scales the weight's contribution only
        tokens = x.flatten(0, -2).to(lora_A.dtype)  # (T, in)
        hidden = tokens @ lora_A.T  # (T, r)
        scaled_B = lora_B.T * scaling  # (r, out)
        unscaled = torch.addmm(result.flatten(0, -2).to(lora_A.dtype), hidden, scaled_B)  # (T, out)
        output = (unscaled * gain).to(result.dtype)
        ctx.save_for_backward(x, hidden, unscaled, lora_A, scaled_B, gain)
        ctx.scaling = scaling
        return (output if bias is None else output + bias).view(result.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of forward's arguments, in the same order."""
        x, hidden, unscaled, lora_A, scaled_B, gain = ctx.saved_tensors
        grad_output = gradient.flatten(0, -2).to(lora_A.dtype)  # (T, out)
        grad_gain = (grad_output * unscaled).sum(0)
        grad_unscaled = grad_output * gain
        grad_lora_B = (grad_unscaled.T @ hidden) * ctx.scaling
        grad_hidden = grad_unscaled @ scaled_B.T  # (T, r)
        grad_lora_A = grad_hidden.T @ x.flatten(0, -2).to(lora_A.dtype)
        grad_x = (grad_hidden @ lora_A).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_result = grad_unscaled.to(gradient.dtype).view(gradient.shape) if ctx.needs_input_grad[1] else None
        return grad_x, grad_result, None, grad_lora_A, grad_lora_B, grad_gain, None
