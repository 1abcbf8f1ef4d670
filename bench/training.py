"""Benchmark training: steps, losses, share of the machine's GEMM rate, peak memory."""

import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from bench.settings import Settings
from bench.sides import Side, copy_adapter, our_side, time_in_turn, trl_side
from bench.stats import ModelShape, spread, step_operations
from tweetdora.modeling import DTYPES
from tweetdora.packing import PackedCollator

RANK = 8


def measure_training(settings: Settings, precision: str) -> dict[str, Any]:
    """Time interleaved steps of both sides, from the same start on the same batches; time GEMMs after each pair."""
    rounds = max(settings.steps, settings.loss_steps) if precision == "fp32" else settings.steps
    batches = settings.batches(settings.warmup + rounds)
    kind, tried = faster_trl(settings, precision, batches[0])
    rows = [row for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        trl, ours = trl_side(settings, precision, rows, folder, kind), our_side(settings, precision)
        copy_adapter(trl, ours)
        shape = model_shape(ours.model.config)
        tokens = [PackedCollator()(batch)["input_ids"].numel() for batch in batches]
        measured = time_in_turn(
            {
                "trl": lambda number: trl.step(batches[number]),
                "ours": lambda number: ours.step(batches[number]),
                "gemm": lambda number: gemm_rate(tokens[number], shape, DTYPES[precision]),
            },
            rounds,
            settings.warmup,
        )
    return {
        "trl_kind": kind,
        "trl_kinds_tried_seconds": tried,
        "trl_seconds": measured["trl"]["seconds"],
        "our_seconds": measured["ours"]["seconds"],
        "trl_losses": measured["trl"]["results"],
        "our_losses": measured["ours"]["results"],
        "model_shape": asdict(shape),
        "packed_tokens": tokens,
        "operations": [batch_operations(shape, batch) for batch in batches[settings.warmup :]],
        "gemm_operations_per_second": measured["gemm"]["results"][settings.warmup :],
    }


def faster_trl(settings: Settings, precision: str, rows: list[dict[str, Any]]) -> tuple[str, dict[str, list[float]]]:
    """Return TRL's faster form in `precision`, and the seconds of a few steps of each form; float32 has only one."""
    if precision == "fp32":
        return "trl", {}
    with tempfile.TemporaryDirectory() as folder:
        sides = {kind: trl_side(settings, precision, rows, folder, kind) for kind in ("trl", "trl_bf16")}
        actions = {kind: _repeat(side, rows) for kind, side in sides.items()}
        measured = time_in_turn(actions, rounds=min(3, settings.steps), warmup=1)
    seconds = {kind: found["seconds"] for kind, found in measured.items()}
    return min(seconds, key=lambda kind: spread(seconds[kind])["median"]), seconds


def _repeat(side: Side, rows: list[dict[str, Any]]) -> Callable[[int], float]:
    return lambda number: side.step(rows)


def model_shape(config: Any) -> ModelShape:
    """Read the sizes that `step_operations` needs from a Llama-like configuration."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        width,
        config.vocab_size,
    )


def batch_operations(shape: ModelShape, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Count the operations of our step on a batch."""
    batch = PackedCollator()(rows)
    prefix = batch["packing"]["prefix_length"]
    own_lengths = [len(row["input_ids"]) - 1 - prefix for row in rows]  # without the stop token
    return step_operations(shape, own_lengths, prefix, batch["labels"].numel(), RANK)


def gemm_rate(tokens: int, shape: ModelShape, dtype: torch.dtype, repeats: int = 30) -> float:
    """Measure the operations per second of torch's product of (T, hidden) and (hidden, intermediate), and back again.

    The weights have the layout of nn.Linear and stay the same, so they are in the caches. The model's own steps, which
    read other weights in each layer, can hardly reach this rate.
    """
    states = torch.randn(tokens, shape.hidden, dtype=dtype)
    up = torch.randn(shape.intermediate, shape.hidden, dtype=dtype)
    down = torch.randn(shape.hidden, shape.intermediate, dtype=dtype)
    torch.nn.functional.linear(torch.nn.functional.linear(states, up), down)
    started = time.perf_counter()
    for _ in range(repeats):
        torch.nn.functional.linear(torch.nn.functional.linear(states, up), down)
    seconds = time.perf_counter() - started
    return repeats * 2 * 2 * tokens * shape.hidden * shape.intermediate / seconds


def measure_memory(settings: Settings, precision: str, side: str) -> dict[str, int]:
    """Measure the peak memory of this process, which does nothing else, over start, loading and 3 steps of one side.

    `growth` is the peak during the steps minus the resident memory after loading. It leaves out the peak of loading,
    which can be higher.
    """
    batches = settings.batches(3)
    with tempfile.TemporaryDirectory() as folder:
        if side == "ours":
            trained = our_side(settings, precision)
        else:
            trained = trl_side(settings, precision, [row for batch in batches for row in batch], folder, side)
        gc.collect()
        of_loading, after_loading = _peak_bytes(), _resident_bytes()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")  # resets the kernel's peak: man 5 proc
        for batch in batches:
            trained.step(batch)
    of_steps = _peak_bytes()
    return {
        "peak_bytes": max(of_loading, of_steps),
        "loading_peak_bytes": of_loading,
        "after_loading_bytes": after_loading,
        "growth_bytes": of_steps - after_loading,
    }


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
