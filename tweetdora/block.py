"""A decoder layer for packed batches with its gradient written out: half of the operations.

A model of 135M parameters is bound by the number of operations on a GPU, and on a CPU by memory traffic between them.
Here a layer is one autograd function: products of layers that share an input are joined (joined.py), one gather moves
states into the padded layout (padded.py), and residuals are added by the products.

`write_out` recognises layers of Llama's form by their parts (Llama, SmolLM2, Mistral, Qwen2 and others). Each form is
tried against the model's own code before it is used. Whatever is not recognised, or is called in another way, such as
in generation, runs the model's own code.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import SiLUActivation

from tweetdora.attention import ATTENTION, KEPT_SCORES
from tweetdora.joined import Joined, Kept
from tweetdora.packing import pack
from tweetdora.padded import Gathers, PaddedAttention, rotate

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Largest difference between the two ways, over the largest value; float32 is off by 1e-6, bf16 by 0.01.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


class _Norm:
    """A root mean square norm with a frozen weight."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.epsilon = float(getattr(module, "variance_epsilon", 0.0) or getattr(module, "eps", 0.0))
        self._added: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised x (T, width), and the root mean square of each token (T, 1)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        width = x.shape[-1]
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        # sqrt(|x|^2 + width * epsilon) / sqrt(width)
        root = torch.hypot(root, self.added(wide, x.device)).mul_(width**-0.5)
        return torch.div(x, root, out=torch.empty_like(x)).mul_(self.module.weight), root

    def added(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """sqrt(width * epsilon) as a tensor; made once."""
        if self._added is None or (self._added.dtype, self._added.device) != (dtype, device):
            number = math.sqrt(len(self.module.weight) * self.epsilon)
            self._added = torch.tensor(number, dtype=dtype, device=device)
        return self._added

    def backward(
        self, gradient: torch.Tensor, x: torch.Tensor, root: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Gradient of x, plus `residual`: with e = gradient * weight, (e - x mean(e x) / root^2) / root."""
        wide, width = root.dtype, x.shape[-1]
        scaled = torch.mul(gradient, self.module.weight, out=torch.empty(x.shape, dtype=wide, device=x.device))
        along = (scaled * x).sum(-1, keepdim=True).div_(root.square())
        scaled = torch.addcmul(scaled, x.to(wide), along, value=-1 / width)
        return torch.addcdiv(residual.to(wide), scaled, root).to(x.dtype)


class _Layer:
    """The parts of a decoder layer, and its forward and backward pass on packed states (T, width)."""

    def __init__(self, layer: Any, last: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.module = attention
        self.norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        # Queries and keys stay next to each other, because one rotation serves both.
        rotated = sorted((q, k), key=_is_adapted)
        order = [v, *rotated] if _is_adapted(rotated[1]) and not _is_adapted(v) else [*rotated, v]
        self.attention = _attention_of(attention, order)
        self.qkv, self.o = Joined(order), Joined([attention.o_proj])
        self.gate_first = _is_adapted(mlp.up_proj) or not _is_adapted(mlp.gate_proj)
        gate_up = (mlp.gate_proj, mlp.up_proj)
        self.gate_up, self.down = Joined(gate_up if self.gate_first else gate_up[::-1]), Joined([mlp.down_proj])
        self.last = last

    def joined(self) -> list[Joined]:
        """All linear layers, in the order of adapter_weights."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def adapter_weights(self) -> list[torch.Tensor]:
        """The trained weights."""
        return [weight for joined in self.joined() for weight in joined.adapter_weights()]

    def handles(self, states: torch.Tensor, packing: dict[str, Any] | None, others: dict[str, Any]) -> bool:
        """True if forward computes what the layer would, for these arguments."""
        if packing is None or packing.keys() & {"decoding", "tree", "cache"} or not torch.is_grad_enabled():
            return False
        if others.get("position_embeddings") is None or others.get("past_key_values") is not None:
            return False
        if states.shape[0] != 1 or torch.is_autocast_enabled(states.device.type):
            return False
        if self.module.training and self.module.attention_dropout:
            return False
        rows, length = packing["row_count"], packing["to_padded"].numel() // packing["row_count"]
        if rows * self.attention.heads * length * (packing["prefix_length"] + length) > KEPT_SCORES:
            return False
        return all(joined.is_ordinary() for joined in self.joined())


def _attention_of(module: Any, order: Sequence[Any]) -> PaddedAttention:
    """The attention of a layer whose projections have their columns in this order."""
    head_dim, first = int(module.head_dim), 0
    names = {module.q_proj: "q", module.k_proj: "k", module.v_proj: "v"}
    offsets = {}
    for part in order:
        offsets[names[part]] = first
        first += part.out_features // head_dim
    heads, groups = (part.out_features // head_dim for part in (module.q_proj, module.k_proj))
    # Mistral reads the window from the configuration, Qwen2 from the layer.
    window = getattr(module, "sliding_window", getattr(getattr(module, "config", None), "sliding_window", None))
    return PaddedAttention(heads, groups, head_dim, float(module.scaling), window, offsets)


class _Function(torch.autograd.Function):
    """The layer as one function of its input and its adapters' weights."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        layer: _Layer,
        packing: dict[str, Any],
        gathers: Gathers,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Output (1, T, width) for states (1, T, width)."""
        x = states[0]
        of = _by_joined(layer, weights)
        normed, root = layer.norms[0].forward(x)
        qkv, kept_qkv = layer.qkv.forward(normed, of[0])
        rotate(layer.attention.rotated(qkv), gathers.cos, gathers.signed_sin)
        attended, kept_attention = layer.attention.attend(qkv, packing, gathers)
        below, rows = x, packing.get("kept") if layer.last else None
        if rows is not None:  # what follows is needed where there is loss only
            attended, below = attended.index_select(0, rows), below.index_select(0, rows)
        middle, kept_o = layer.o.forward(attended, of[1], residual=below)
        normed_middle, middle_root = layer.norms[1].forward(middle)
        gate_up, kept_gate_up = layer.gate_up.forward(normed_middle, of[2])
        gate, up = _halves(gate_up, layer.gate_first)
        activated = nn.functional.silu(gate)
        product = activated * up
        output, kept_down = layer.down.forward(product, of[3], residual=middle)
        ctx.layer, ctx.packing, ctx.gathers, ctx.rows = layer, packing, gathers, rows
        inputs = [
            value if joined.adapted else None
            for joined, value in zip(layer.joined(), (normed, attended, normed_middle, product), strict=True)
        ]
        kept = [part for each in (kept_qkv, kept_o, kept_gate_up, kept_down) for part in each.tensors()]
        ctx.save_for_backward(
            *(x, root, middle, middle_root, gate_up, activated), *inputs, *kept, *kept_attention, *weights
        )
        ctx.attention_kept = len(kept_attention)
        if rows is not None:
            output = torch.zeros_like(x).index_copy_(0, rows, output)
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of states and weights."""
        layer, rows = ctx.layer, ctx.rows
        saved = ctx.saved_tensors
        x, root, middle, middle_root, gate_up, activated, *rest = saved
        inputs, rest = rest[:4], rest[4:]
        kept = [Kept(*rest[place : place + 4]) for place in range(0, 16, 4)]
        rest = rest[16:]
        of_attention, weights = rest[: ctx.attention_kept], rest[ctx.attention_kept :]
        of = _by_joined(layer, weights)
        needs_input = ctx.needs_input_grad[0]
        gradient = gradient[0] if rows is None else gradient[0].index_select(0, rows)

        def back(number: int, grad: torch.Tensor, needed: bool = True) -> tuple[Any, list[torch.Tensor]]:
            """One of the four products."""
            joined = layer.joined()[number]
            return joined.backward(grad, inputs[number], kept[number], of[number], needed)

        d_product, d_down = back(3, gradient.clone() if layer.down.dora else gradient)
        gate, up = _halves(gate_up, layer.gate_first)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = _halves(d_gate_up, layer.gate_first)
        torch.mul(d_product, activated, out=d_up)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gate)
        d_normed, d_gate_up_weights = back(2, d_gate_up)
        d_middle = layer.norms[1].backward(d_normed, middle, middle_root, gradient)
        d_attended, d_o = back(1, d_middle.clone() if layer.o.dora else d_middle)
        if rows is not None:
            d_attended = d_attended.new_zeros(len(x), d_attended.shape[1]).index_copy_(0, rows, d_attended)
            d_middle = torch.zeros_like(x).index_copy_(0, rows, d_middle)
        d_qkv = layer.attention.attend_backward(d_attended, of_attention, ctx.packing, ctx.gathers)
        rotate(layer.attention.rotated(d_qkv), ctx.gathers.cos, ctx.gathers.signed_sin, back=True)
        d_normed, d_qkv_weights = back(0, d_qkv, needs_input)
        d_states = layer.norms[0].backward(d_normed, x, root, d_middle)[None] if needs_input else None
        return d_states, None, None, None, *d_qkv_weights, *d_o, *d_gate_up_weights, *d_down


def _by_joined(layer: _Layer, weights: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    """The weights of each of the layer's products."""
    parts, start = [], 0
    for joined in layer.joined():
        count = len(joined.adapted) * (3 if joined.dora else 2)
        parts.append(weights[start : start + count])
        start += count
    return parts


def _halves(both: torch.Tensor, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, each (T, I), of their joined output."""
    first, second = both.chunk(2, dim=1)
    return (first, second) if gate_first else (second, first)


class _WrittenOut:
    """A decoder layer that runs as one function where it can."""

    _written_out: _Layer

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output (1, T, width)."""
        layer, packing = self._written_out, kwargs.get("packing")
        if args or not layer.handles(hidden_states, packing, kwargs):
            return cast(Any, super()).forward(hidden_states, *args, **kwargs)
        assert packing is not None
        gathers = layer.attention.gathers(packing, *kwargs["position_embeddings"])
        return cast(torch.Tensor, _Function.apply(hidden_states, layer, packing, gathers, *layer.adapter_weights()))


def write_out(model: Any, proven: bool = False) -> int:
    """Let the decoder layers of a model with adapters run as one function each; return how many do.

    proven: leave out the trial, for a model without data whose like has been tried. Then call `join_weights` once it
    has data.
    """
    base = model.get_base_model()
    if base.config._attn_implementation != ATTENTION:
        return 0
    layers = [module for module in base.modules() if {name for name, _ in module.named_children()} == _LAYER_PARTS]
    tried: dict[Any, bool] = {}
    count = 0
    for place, module in enumerate(layers):
        if not _is_of_llamas_form(module):
            continue
        layer = _Layer(module, last=place == len(layers) - 1)
        if not all(joined.is_ordinary() for joined in layer.joined()):
            continue
        own, attention = type(module), layer.attention
        form = own, *attention.offsets.items(), layer.gate_first, attention.window
        module._written_out = layer
        module.__class__ = type(own.__name__, (_WrittenOut, own), {"__module__": own.__module__})
        if form not in tried:
            tried[form] = proven or _agrees(module, own)
        if tried[form]:
            count += 1
        else:
            module.__class__ = own
            del module._written_out
    if not proven:
        join_weights(model)
    return count


def is_written_out(model: nn.Module) -> bool:
    """True if layers of a model run as one function each."""
    return any(isinstance(module, _WrittenOut) for module in model.modules())


def join_weights(model: nn.Module) -> None:
    """Lay the weights of layers that share an input on top of each other, before the first step needs them."""
    for module in model.modules():
        if isinstance(module, _WrittenOut):
            for norm in module._written_out.norms:
                weight = norm.module.weight
                norm.added(torch.promote_types(weight.dtype, torch.float32), weight.device)
            for joined in module._written_out.joined():
                joined.prepare()


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "lora_A")


def _is_of_llamas_form(module: Any) -> bool:
    attention, mlp = module.self_attn, module.mlp
    parts = [{name for name, _ in part.named_children()} for part in (attention, mlp)]
    if parts != [_ATTENTION_PARTS, _MLP_PARTS] or not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        return False
    numbers = all(hasattr(attention, name) for name in ("head_dim", "scaling", "attention_dropout"))
    norms = (module.input_layernorm, module.post_attention_layernorm)
    weights = [weight for norm in norms for weight in norm.parameters()]
    return numbers and len(weights) == 2 and not any(weight.requires_grad for weight in weights)


def _agrees(module: Any, own: Any) -> bool:
    """True if the written-out layer has the window, output and gradients of the model's own code on a small batch."""
    layer: _Layer = module._written_out
    weight = layer.qkv.bases[0].weight
    width, dtype, device = weight.shape[1], weight.dtype, weight.device
    source = torch.Generator().manual_seed(0)
    batch, _ = pack([[0, 0, 1, 2], [0, 0, 3], [0, 0, 4, 5, 6]], prefix=2)
    count = batch["input_ids"].shape[1]
    states = torch.randn(1, count, width, generator=source).to(device, dtype).requires_grad_()
    angles = 3 * torch.rand(1, count, layer.attention.head_dim // 2, generator=source).repeat(1, 1, 2).to(device)
    rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = layer.adapter_weights()
    direction = torch.randn(1, count, width, generator=source).to(device, dtype)
    results = []
    with torch.enable_grad():
        for forward in (own.forward, type(module).forward):
            packing = {
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in batch["packing"].items()
            }
            arguments = {"position_embeddings": rotary, "attention_mask": batch["attention_mask"].to(device)}
            output = forward(module, states, packing=packing, **arguments)
            if {window for window, _ in packing["masks"]} != {layer.attention.window}:
                return False
            output = output[0] if isinstance(output, tuple) else output
            results.append([output, *torch.autograd.grad(output, [states, *weights], direction)])
    tolerance = _TOLERANCE[dtype]
    return all(
        (theirs - ours).abs().max() <= tolerance * theirs.abs().max() + 1e-12
        for theirs, ours in zip(*results, strict=True)
    )
