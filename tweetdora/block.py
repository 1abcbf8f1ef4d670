"""A decoder layer for packed batches with its gradient written out: half of the operations.

A model of 135M parameters is bound by the number of operations on a GPU, and on a CPU by memory traffic between them.
Here a layer is one autograd function: products of layers that share an input are joined (joined.py), one gather moves
states into the padded layout (padded.py), and residuals are added by the products.

`write_out` recognises layers of Llama's form by their parts (Llama, SmolLM2, Mistral, Qwen2 and others), and tries
each one against the model's own code on a small batch. Whatever is not recognised, gives numbers that differ by more
than rounding, or is called in another way, such as in generation, runs the model's own code.
"""

import copy
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers.activations import SiLUActivation

from tweetdora.attention import KEPT_SCORES
from tweetdora.joined import Joined, Kept
from tweetdora.packing import PackedCollator, pack
from tweetdora.padded import Gathers, PaddedAttention, rotate

_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
# Largest difference between the two ways, over the largest value; float32 is off by 1e-6, bf16 by 0.01.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.05}
_DRAWS = 9  # random batches, to see whether most are too large


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
        self.layer = layer
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
        linear = (layer for joined in self.joined() for layer in joined.layers)
        self.parts = {*map(id, linear), id(layer.input_layernorm), id(layer.post_attention_layernorm)}

    def joined(self) -> list[Joined]:
        """All linear layers, in the order of adapter_weights."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def adapter_weights(self) -> list[torch.Tensor]:
        """The trained weights."""
        return [weight for joined in self.joined() for weight in joined.adapter_weights()]

    def handles(self, states: torch.Tensor, packing: dict[str, Any] | None, others: dict[str, Any]) -> bool:
        """True if the function may be used for these arguments, given that the layer has been tried."""
        if packing is None or packing.keys() & {"decoding", "tree", "cache"} or not torch.is_grad_enabled():
            return False
        rotary = others.get("position_embeddings")
        if rotary is None or rotary[0].shape != (1, states.shape[1], self.attention.head_dim):
            return False
        if others.get("past_key_values") is not None or torch.is_autocast_enabled(states.device.type):
            return False
        if self.layer.training and self.layer.self_attn.attention_dropout:
            return False
        if self.attention.scores(packing) > KEPT_SCORES or not self.is_what_it_was():
            return False
        return all(joined.is_ordinary() for joined in self.joined())

    def is_what_it_was(self) -> bool:
        """True if the layer still has the parts that this was made of."""
        attention, mlp, (first, second) = self.layer.self_attn, self.layer.mlp, self.norms
        linear = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        norms = self.layer.input_layernorm, self.layer.post_attention_layernorm
        same = {*map(id, (*linear, mlp.gate_proj, mlp.up_proj, mlp.down_proj, *norms))} == self.parts
        return same and not first.module.weight.requires_grad and not second.module.weight.requires_grad


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
        """Output (1, T, width) for states (1, T, width)."""
        layer, packing = self._written_out, kwargs.get("packing")
        if args or not layer.handles(hidden_states, packing, kwargs):
            return cast(Any, super()).forward(hidden_states, *args, **kwargs)
        assert packing is not None
        gathers = layer.attention.gathers(packing, *kwargs["position_embeddings"])
        return cast(torch.Tensor, _Function.apply(hidden_states, layer, packing, gathers, *layer.adapter_weights()))


def write_out(model: Any) -> list[int]:
    """Let the decoder layers of a model with adapters run as one function each; return the numbers of those that do.

    Every layer is tried: in some models, layers of one class differ (SmolLM3 leaves the rotary embedding out of some).
    """
    rotary = getattr(model.get_base_model().get_decoder(), "rotary_emb", None)
    done = []
    for number, module in enumerate(_decoder_layers(model)):
        if rotary is not None and _is_of_llamas_form(module):
            try:
                _replace(module, last=module is _decoder_layers(model)[-1])
                agrees = _agrees(module, rotary)
            except Exception:  # code that looks like Llama's can need anything
                agrees = False
            if agrees:
                done.append(number)
            else:
                _restore(module)
    join_weights(model)
    return done


def write_out_like(model: Any, numbers: Sequence[int]) -> None:
    """Do the same for a model without data, given what write_out returned. Once it has data, call `join_weights`."""
    for number in numbers:
        _replace(_decoder_layers(model)[number], last=number == len(_decoder_layers(model)) - 1)


def written_out(model: Any) -> list[int]:
    """The numbers of the layers that run as one function each."""
    return [number for number, module in enumerate(_decoder_layers(model)) if isinstance(module, _WrittenOut)]


@dataclass(frozen=True)
class LayerCount:
    """How many of all decoder layers run as one function each, for at most so many examples at a time."""

    written_out: int
    total: int
    examples: int


def count_layers(model: Any, features: Sequence[dict[str, Any]], at_once: int) -> LayerCount:
    """Count the layers; halve `at_once` until they take most batches of so many `features`, drawn at random."""
    done, layers, source = written_out(model), _decoder_layers(model), random.Random(0)

    def draw_scores() -> int:
        """Attention scores of a random batch."""
        rows = source.sample(range(len(features)), min(at_once, len(features)))
        batch = PackedCollator()([features[row] for row in rows])
        return cast(int, layers[done[0]]._written_out.attention.scores(batch["packing"]))

    def are_too_many() -> bool:
        """True if most batches of `at_once` have too many scores."""
        return statistics.median(draw_scores() for _ in range(_DRAWS)) > KEPT_SCORES

    while done and at_once and are_too_many():
        at_once //= 2
    return LayerCount(len(done), len(layers), at_once)


def _decoder_layers(model: Any) -> list[Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(getattr(base.get_decoder(), "layers", []))


def _replace(module: Any, last: bool) -> None:
    own = type(module)
    module._written_out = _Layer(module, last)
    module.__class__ = type(own.__name__, (_WrittenOut, own), {"__module__": own.__module__})


def _restore(module: Any) -> None:
    if isinstance(module, _WrittenOut):
        module.__class__ = type(module).__mro__[2]  # the class before _replace
        del module._written_out


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
    if not _LAYER_PARTS <= {name for name, _ in module.named_children()}:
        return False
    attention, mlp = module.self_attn, module.mlp
    parts = [{name for name, _ in part.named_children()} for part in (attention, mlp)]
    if parts != [_ATTENTION_PARTS, _MLP_PARTS] or not isinstance(mlp.act_fn, (nn.SiLU, SiLUActivation)):
        return False
    numbers = all(hasattr(attention, name) for name in ("head_dim", "scaling", "attention_dropout"))
    norms = (module.input_layernorm, module.post_attention_layernorm)
    weights = [weight for norm in norms for weight in norm.parameters()]
    return numbers and len(weights) == 2 and not any(weight.requires_grad for weight in weights)


def _agrees(module: Any, rotary: Any) -> bool:
    """True if the written-out layer has the window, output and gradients of the model's own code on a small batch.

    In bf16, the own code's rounding can exceed the tolerance where outputs are large (one layer of SmolLM2-135M). Then
    a float32 copy of the layer takes its place.
    """
    found = _try_both(module, rotary)
    if found is None or _are_close(*found):
        return found is not None
    if found[0][0].dtype != torch.bfloat16:
        return False
    exact = _try_both(_float32_copy(module), rotary)
    return exact is not None and _are_close(*exact) and _are_close(exact[0], found[1])


def _float32_copy(module: Any) -> Any:
    """The written-out layer in float32; it is copied without its joined weights, which would double the memory."""
    last = module._written_out.last
    _restore(module)
    try:
        copied = copy.deepcopy(module).float()
    finally:
        _replace(module, last)
    _replace(copied, last)
    return copied


def _are_close(own: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> bool:
    """True if no difference exceeds the tolerance of our numbers' type; NaN and infinities do."""
    tolerance = _TOLERANCE[ours[0].dtype]
    return all(
        (mine - right).abs().max() <= tolerance * right.abs().max() + 1e-12
        for right, mine in zip(own, ours, strict=True)
    )


def _try_both(module: Any, rotary: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Output and gradients of the model's own code and of the written-out layer; None if the latter cannot be used.

    Both are tried as in training, with an adapter off its start, and with positions up to the last one of the model.
    All numbers are drawn in bf16, so that a float32 copy gets the same.
    """
    layer: _Layer = module._written_out
    weight, weights = layer.qkv.bases[0].weight, layer.adapter_weights()
    if not all(joined.is_ordinary() for joined in layer.joined()) or not weights:
        return None
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        """Random numbers like the layer's states."""
        return torch.randn(*shape, generator=source).to(torch.bfloat16).to(weight.device, weight.dtype)

    batch, _ = pack([[0, 0, 1, 2], [0, 0, 3], [0, 0, 4, 5, 6]], prefix=2)
    batch = send_to_device(batch, weight.device)
    count = batch["input_ids"].shape[1]
    kept = torch.tensor([3, 4, 7] if layer.last else range(count), device=weight.device)
    states, direction = draw(1, count, weight.shape[1]).requires_grad_(), draw(1, len(kept), weight.shape[1])
    last_position = getattr(module.self_attn.config, "max_position_embeddings", 1_000) - 1
    positions = torch.linspace(0, last_position, count, device=weight.device).long()[None]
    before, was_training = [each.detach().clone() for each in weights], module.training
    results = []
    try:
        for each in weights:
            moved = each.float().cpu() + 0.1 * torch.randn(each.shape, generator=source)
            each.data.copy_(moved.to(torch.bfloat16))
        module.train()
        for own in (True, False):
            packing = {**batch["packing"], "kept": kept}
            arguments = {"position_embeddings": rotary(states, positions), "position_ids": positions}
            arguments |= {"packing": packing, "attention_mask": batch["attention_mask"]}
            with torch.enable_grad(), torch.random.fork_rng():
                torch.manual_seed(0)  # for dropout, which the written-out layer does not have
                if not own and not layer.handles(states, packing, arguments):
                    return None
                output = (cast(Any, super(_WrittenOut, module)) if own else module).forward(states, **arguments)
                if {window for window, _ in packing["masks"]} != {layer.attention.window}:
                    return None
                gradients = torch.autograd.grad(output[:, kept], [states, *weights], direction)
            results.append([output[:, kept].detach(), *gradients])
    finally:
        module.train(was_training)
        for each, value in zip(weights, before, strict=True):
            each.data.copy_(value)
    return results[0], results[1]
