"""The memory that a training will need, computed before its first step from shapes alone.

A step is run with tensors that have shapes but no data (PyTorch's FakeTensorMode), on a copy of the model, and the
bytes that live at the same time are counted. Such tensors take the same kernels as real ones, so the count is exact up
to what a kernel needs inside; PyTorch's meta device takes other kernels for attention, which keep more or less.
"""

import contextlib
import copy
import ctypes
import gc
import random
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from tweetdora.block import join_weights, write_out_like, written_out
from tweetdora.config import ModelConfig
from tweetdora.device import available_memory_bytes, own_peak_memory_bytes
from tweetdora.dora import is_4bit
from tweetdora.modeling import DTYPES, attach_adapter, set_up_for_packing, trainable_parameters
from tweetdora.packing import PackedCollator, PaddedCollator
from tweetdora.tokenized import Features
from tweetdora.train_config import TrainConfig
from tweetdora.trainer import supervised_loss_sum

_DRAWS = 200  # batches that are drawn to find a large one
# On a CPU, the heap takes more than the tensors that live in it. Measured: 1.0 to 1.3 times as much (LOG.md).
_HEAP = 1.1
# Adam's two moments, in float32, for each trained weight. The gradients are counted with the step.
_OPTIMIZER_BYTES = 8


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
        if self.base > self.available:
            return f"{line}: IT DOES NOT FIT. Use --load_in_4bit true, or --shard_base true with several GPUs"
        return f"{line}: IT DOES NOT FIT. Raise --gradient_accumulation_steps, or add --activation_checkpointing true"


def plan_memory(
    model: Any, model_config: ModelConfig, training: TrainConfig, features: Features, pad_token_id: int
) -> MemoryPlan:
    """Expect the memory of a training whose model and examples are loaded."""
    trained = trainable_parameters(model)
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    base = sum(map(_own_bytes, frozen))
    adapter = trained * (4 + _OPTIMIZER_BYTES)
    packed = training.batching == "shared_prefix"
    batch = large_batch(
        features,
        int(training.per_device_train_batch_size or 1),
        PackedCollator() if packed else PaddedCollator(pad_token_id),
    )
    inner = model.get_base_model()
    step = step_bytes(inner, model_config, training, batch)
    if model_config.load_in_4bit:  # one layer at a time is dequantised
        layers = [layer for layer in inner.modules() if isinstance(layer, nn.Linear) and is_4bit(layer)]
        sizes = [layer.in_features * layer.out_features for layer in layers]
        step += max(sizes, default=0) * DTYPES[training.precision].itemsize
    if training.shard_base:
        layers = inner.config.get_text_config().num_hidden_layers
        head = inner.get_output_embeddings().weight
        step += int(2 * sum(map(_whole_bytes, frozen)) / layers) + _whole_bytes(head)
    if training.device.type == "cuda":
        free = torch.cuda.mem_get_info(training.device)[0] + torch.cuda.memory_reserved(training.device)
        return MemoryPlan(base, adapter, step, 0, 0, free)
    step = int(step * _HEAP)
    _return_free_memory()
    process = psutil.Process().memory_info().rss
    other = max(0, process - base - 4 * trained)
    loading = own_peak_memory_bytes()["process"]
    return MemoryPlan(base, adapter, step, other, loading, available_memory_bytes(training.device) + process)


def _return_free_memory() -> None:
    """Return what loading has freed to the system, so that it is not counted; only glibc can."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _whole_bytes(weight: torch.Tensor) -> int:
    return weight.numel() * weight.element_size()


def _own_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight in this process, which may hold a part of it."""
    return _whole_bytes(cast(Any, weight).to_local() if hasattr(weight, "to_local") else weight)


def large_batch(features: Features, size: int, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Any:
    """The batch with the most tokens of those drawn at random, as a run will meet one."""
    draw, lengths = random.Random(0), features.lengths
    drawn = (draw.sample(range(len(features)), min(size, len(features))) for _ in range(_DRAWS))
    rows = max(drawn, key=lambda rows: sum(lengths[row] for row in rows))
    return collator([features[row] for row in rows])


def step_bytes(base: PreTrainedModel, config: ModelConfig, training: TrainConfig, batch: dict[str, Any]) -> int:
    """Peak bytes of a forward and backward pass on a batch, without weights; gradients are included."""
    with torch.device("meta"):
        settings = copy.deepcopy(base.config)
        settings.__dict__.pop("quantization_config", None)
        bare = AutoModelForCausalLM.from_config(settings, dtype=DTYPES[training.precision])
        set_up_for_packing(bare)
        model = attach_adapter(bare, config)
        write_out_like(model, written_out(base))
    model.train()
    if training.activation_checkpointing:
        bare.activation_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _make_fake(model, training.device)
        batch = tree_map_only(torch.Tensor, lambda tensor: fake.from_tensor(tensor).to(training.device), batch)
        join_weights(model)
        with _LiveBytes(model.parameters()) as live:
            supervised_loss_sum(model, batch).backward()
    return live.peak


def _make_fake(model: nn.Module, device: torch.device) -> None:
    """Put a model from the meta device on a device, without data; within a FakeTensorMode."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live; `peak` is the most at a time.

    Views of `known` tensors are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            """Forget a storage."""
            del self._seen[key]
            self._now -= size

        self._seen[key] = weakref.ref(storage, freed)  # a weak reference keeps nothing alive
        self._now += size
        self.peak = max(self.peak, self._now)
