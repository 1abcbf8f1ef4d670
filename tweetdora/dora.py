"""DoRA without building the adapted weight: PEFT's layer, value and gradient, in fewer and smaller steps.

DoRA (Liu et al., arXiv 2402.09353) scales each output of a LoRA layer by a trained magnitude m over the norm of that
row of the adapted weight which makes it, the norm taken as a constant:

    y = m / |W + s B A| * (W x + s B A x)        one norm for each row; W (out, in), A (r, in), B (out, r)

PEFT makes W + s B A (out x in) for the norms in every step. They follow from r-sized products as well, and |W|^2,
which never changes, is computed once (arXiv 2603.22276):

    |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B        each row by itself

The layer goes in by PEFT's extension point for custom layers; the adapter's weights, names and files are PEFT's own.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


class DoraLinear(Linear):
    """PEFT's LoRA layer for nn.Linear, with the ordinary case of DoRA computed here.

    Ordinary is: one active DoRA adapter, not merged, without dropout on its input. The rest is PEFT's.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Adapted output (..., out) of x (..., in), in x's format."""
        if args or kwargs or self.disable_adapters or self.merged or not self._is_ordinary():
            return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight  # (r, in), (out, r)
        base, scaling = self.get_base_layer(), self.scaling[name]
        result = base(x)  # (..., out)
        with torch.autocast(x.device.type, enabled=False):  # the adapter is computed in its own format
            with torch.no_grad():
                norms = row_norms(self._squared_norms(base.weight, down.dtype), base.weight, down, up, scaling)
            gain = self.lora_magnitude_vector[name].weight / norms
            return _AddAndScale.apply(x, result, base.bias, down, up, gain, scaling)

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
    squared_norms: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float
) -> torch.Tensor:
    """|W + s B A| of each row, shape (out,), from |W|^2 (out,), W (out, in), A = down (r, in) and B = up (out, r).

    >>> weight, down, up = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0]])
    >>> row_norms(torch.tensor([9.0]), weight, down, up, 2.0)    # |(3, 0) + 2 * 1 * (0, 2)|
    tensor([5.])
    """
    cross = (weight.to(down.dtype) @ down.T * up).sum(1)
    square = ((up @ (down @ down.T)) * up).sum(1)
    return (squared_norms + 2 * scaling * cross + scaling**2 * square).sqrt()


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
        down: torch.Tensor,
        up: torch.Tensor,
        gain: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Output (..., out), in `result`'s format; the sums are in the adapter's."""
        if bias is not None:
            result = result - bias  # the magnitude scales the weight's part only
        tokens = x.flatten(0, -2).to(down.dtype)  # (T, in)
        hidden = tokens @ down.T  # (T, r)
        scaled_up = up.T * scaling  # (r, out)
        unscaled = torch.addmm(result.flatten(0, -2).to(down.dtype), hidden, scaled_up)  # (T, out)
        output = (unscaled * gain).to(result.dtype)
        ctx.save_for_backward(x, hidden, unscaled, down, scaled_up, gain)
        ctx.scaling = scaling
        return (output if bias is None else output + bias).view(result.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of forward's arguments, in their order."""
        x, hidden, unscaled, down, scaled_up, gain = ctx.saved_tensors
        of_output = gradient.flatten(0, -2).to(down.dtype)  # (T, out)
        of_gain = (of_output * unscaled).sum(0)
        of_unscaled = of_output * gain
        of_up = (of_unscaled.T @ hidden) * ctx.scaling
        of_hidden = of_unscaled @ scaled_up.T  # (T, r)
        of_down = of_hidden.T @ x.flatten(0, -2).to(down.dtype)
        of_x = (of_hidden @ down).to(x.dtype).view(x.shape) if ctx.needs_input_grad[0] else None
        of_result = of_unscaled.to(gradient.dtype).view(gradient.shape) if ctx.needs_input_grad[1] else None
        return of_x, of_result, None, of_down, of_up, of_gain, None
