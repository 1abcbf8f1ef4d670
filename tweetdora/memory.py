"""The memory that a training will need, computed before its first step from shapes alone.

A copy of the model without weights, on PyTorch's meta device, does the forward pass of a large packed batch. The
tensors that it would keep for the backward pass are counted; with the base, they are most of a training's memory.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from tweetdora.config import ModelConfig, TrainConfig
from tweetdora.device import own_peak_memory_bytes
from tweetdora.modeling import DTYPES, attach_adapter, set_up_for_packing, trainable_parameters
from tweetdora.packing import PackedCollator, token_count
from tweetdora.trainer import supervised_loss_sum

_DRAWS = 200  # batches that are drawn to find a large one
# Gradient and Adam's two moments, in float32, for each trained weight; the weights themselves are loaded already.
_OPTIMIZER_BYTES = 12


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a process is expected to need at its peak, by cause, and those that its device has.

    base: the frozen weights. adapter: weights, gradients and optimizer. activations: what the forward pass keeps for
    the backward pass, and layers gathered from other processes. other: Python, its libraries and the data, on a CPU.
    loading: the peak that was reached before the training.
    """

    base: int
    adapter: int
    activations: int
    other: int
    loading: int
    available: int

    @property
    def peak(self) -> int:
        """The sum of all parts, or what loading took if that was more."""
        return max(self.base + self.adapter + self.activations + self.other, self.loading)

    def line(self) -> str:
        """The plan's line about memory."""
        parts = {"base": self.base, "adapter and optimizer": self.adapter, "activations": self.activations}
        parts |= {"everything else": self.other} if self.other else {}
        shown = ", ".join(f"{size / 1e9:.2f} {name}" for name, size in parts.items())
        line = f"about {self.peak / 1e9:.1f} GB at the peak ({shown}); {self.available / 1e9:.1f} GB available"
        if self.peak <= self.available:
            return line
        return f"{line}: IT DOES NOT FIT. Raise --gradient_accumulation_steps, or add --gradient_checkpointing true"


def memory_line(
    model: Any, model_config: ModelConfig, training: TrainConfig, features: Sequence[dict[str, Any]]
) -> str:
    """The plan's line about memory, for batches of either layout."""
    if training.batching == "padded":
        return "not estimated for --batching padded"
    return plan_memory(model, model_config, training, features, DTYPES[training.precision]).line()


def plan_memory(
    model: Any,
    model_config: ModelConfig,
    training: TrainConfig,
    features: Sequence[dict[str, Any]],
    dtype: torch.dtype,
) -> MemoryPlan:
    """Expect the memory of a training of packed batches, whose model and examples are loaded.

    Against processes on a CPU, it was within 15 %. Of padded batches, attention keeps more than its meta version says.
    """
    trained = trainable_parameters(model)
    base = sum(_own_bytes(weight) for weight in model.parameters() if not weight.requires_grad)
    adapter = trained * (4 + _OPTIMIZER_BYTES)
    batch = large_batch(features, int(training.per_device_train_batch_size or 1))
    inner = model.get_base_model()
    activations = saved_bytes(inner, model_config, batch, dtype)
    layers = inner.config.get_text_config().num_hidden_layers
    if training.gradient_checkpointing:
        # Each layer keeps its input, and one layer at a time is computed again.
        states = token_count(batch) * inner.config.get_text_config().hidden_size * dtype.itemsize
        activations = int(activations / layers + states * layers)
    if training.shard_base:
        whole = sum(
            weight.numel() * weight.element_size() for weight in inner.parameters() if not weight.requires_grad
        )
        head = inner.get_output_embeddings().weight
        activations += int(2 * whole / layers) + head.numel() * head.element_size()
    if training.device.type == "cuda":
        return MemoryPlan(base, adapter, activations, 0, 0, torch.cuda.mem_get_info(training.device)[1])
    process = psutil.Process().memory_info().rss
    other = max(0, process - base - 4 * trained)
    loading = own_peak_memory_bytes()["process"]
    return MemoryPlan(base, adapter, activations, other, loading, psutil.virtual_memory().available + process)


def _own_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight in this process, which may hold a part of it."""
    own = cast(Any, weight).to_local() if hasattr(weight, "to_local") else weight
    return own.numel() * own.element_size()


def large_batch(features: Sequence[dict[str, Any]], size: int) -> dict[str, Any]:
    """The packed batch with the most tokens of those drawn at random, as a run will meet one."""
    draw, lengths = random.Random(0), [len(feature["input_ids"]) for feature in features]
    drawn = (draw.sample(range(len(features)), min(size, len(features))) for _ in range(_DRAWS))
    rows = max(drawn, key=lambda rows: sum(lengths[row] for row in rows))
    return PackedCollator()([features[row] for row in rows])


def saved_bytes(base: PreTrainedModel, config: ModelConfig, batch: dict[str, Any], dtype: torch.dtype) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, without weights."""
    with torch.device("meta"):
        copy = AutoModelForCausalLM.from_config(base.config, dtype=dtype)
        set_up_for_packing(copy)
        model = attach_adapter(copy, config)
    model.train()
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by storage: several tensors may be views of one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that the backward pass will need."""
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), batch)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        supervised_loss_sum(model, batch)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)
