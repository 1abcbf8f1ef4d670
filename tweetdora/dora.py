"""DoRA without building the adapted weight: PEFT's layer, value and gradient, in fewer and smaller steps.

DoRA (Liu et al., arXiv 2402.09353) scales each output of a LoRA layer by a trained magnitude m over the norm of that
row of the adapted weight which makes it, the norm taken as a constant:

    y = m / |W + s B A| * (W x + s B A x)        one norm for each row; W (out, in), A (r, in), B (out, r)

PEFT makes W + s B A (out x in) for the norms in every step. They follow from r-sized products as well, and |W|^2,
which never changes, is computed once (arXiv 2603.22276):

    |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B        each row by itself

The layer goes in by PEFT's extension point for custom layers; the adapter's weights, names and files are PEFT's own.

A row of zeros in W, which there are in real models, has the norm 0 and the magnitude 0: PEFT computes 0 / 0. Here such
a norm counts as 1, so that the row stays one of zeros, in the layer and in a merge.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn


class _GuardedMagnitude(DoraLinearLayer):
    """PEFT's magnitude, in whose norms there is no 0."""

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """|W + s B A| of each row, as PEFT's own forward and merge ask for it."""
        return without_zeros(super().get_weight_norm(*args, **kwargs))


class _GuardedDora(DoraLinearVariant):
    """PEFT's DoRA with that magnitude."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Make the adapter's magnitude."""
        DoraLinearVariant.init(module, adapter_name, **kwargs)
        made: Any = module.lora_magnitude_vector[adapter_name]
        guarded = _GuardedMagnitude(made.fan_in_fan_out)
        guarded.weight = made.weight
        module.lora_magnitude_vector[adapter_name] = guarded


class DoraLinear(Linear):
    """PEFT's LoRA layer for nn.Linear, with the ordinary case of DoRA computed here.

    Ordinary is: one active DoRA adapter, not merged, without dropout on its input. The rest is PEFT's, but for rows of
    zeros.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's kinds of LoRA, DoRA's with a norm for rows of zeros."""
        return {**super().lora_variants, ("use_dora",): _GuardedDora}

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Adapted output (..., out) of x (..., in), in x's format."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_ordinary():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        lora_A: Any = self.lora_A[name].weight  # (r, in)
        lora_B: Any = self.lora_B[name].weight  # (out, r)
        base: Any = self.get_base_layer()
        scaling, magnitude = self.scaling[name], self.lora_magnitude_vector[name]
        result = base(x)  # (..., out)
        with torch.autocast(x.device.type, enabled=False):  # the adapter is computed in its own format
            with torch.no_grad():
                norms = row_norms(self._squared_norms(base.weight, lora_A.dtype), base.weight, lora_A, lora_B, scaling)
            gain = cast(torch.Tensor, magnitude.weight) / norms
            return _AddAndScale.apply(x, result, base.bias, lora_A, lora_B, gain, scaling)

    def _is_ordinary(self) -> bool:
        names = self.active_adapters
        if len(names) != 1 or names[0] not in self.lora_magnitude_vector:
            return False
        return not self.training or isinstance(self.lora_dropout[names[0]], nn.Identity)

    def _squared_norms(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """|W|^2 of each row, shape (out,); computed again only when the weight is another one."""
        state = (weight.data_ptr(), weight._version, weight.device, dtype)
        if getattr(self, "_squared_norms_of", None) != state:
            self._squared_norms_of, self._kept_norms = state, weight.detach().to(dtype).square().sum(1)
        return self._kept_norms


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
    return without_zeros(total.clamp(min=0).sqrt())  # rounding may leave a little less than 0


def without_zeros(norms: torch.Tensor) -> torch.Tensor:
    """Norms by which one can divide: 1 where a row is all zeros."""
    return norms.where(norms > 0, 1)


class _AddAndScale(torch.autograd.Function):
    """gain * (result + s B A x), with its gradient written out: autograd would keep and pass more large tensors.

    With h = A x, u = result + s B h, d the gradient at the output and e = gain * d:

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
        """Output (..., out), in `result`'s format; the sums are in the adapter's."""
        if bias is not None:
            result = result - bias  # the magnitude scales the weight's part only
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
        """The gradients of forward's arguments, in their order."""
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
