"""Benchmark variants of a training step: DoRA against LoRA, and longer prompts against the ordinary one."""

import tempfile
from typing import Any

from peft import LoraConfig, get_peft_model

from bench.settings import Settings
from bench.sides import CPU, our_side, packed_side, time_in_turn, trl_side
from bench.training import faster_trl
from tweetdora.block import write_out
from tweetdora.config import ModelConfig
from tweetdora.modeling import DTYPES, attach_adapter, load_base


def measure_methods(settings: Settings, precision: str, targets: str) -> dict[str, list[float]]:
    """Time steps with DoRA and LoRA, from attach_adapter and from PEFT alone, on the same packed batches."""
    batches = settings.batches(settings.warmup + settings.steps)
    modules = ["all-linear"] if targets == "all-linear" else ["k_proj", "v_proj"]
    sides = {}
    for method in ("dora", "lora"):
        config = ModelConfig(model_name_or_path=settings.model, method=method, target_modules=modules)
        base = load_base(settings.model, None, DTYPES[precision], CPU)
        ours = attach_adapter(base, config)
        write_out(ours)
        sides[f"ours_{method}"] = packed_side(ours)
        base = load_base(settings.model, None, DTYPES[precision], CPU)
        plain = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear" if targets == "all-linear" else modules,
            use_dora=method == "dora",
        )
        sides[f"peft_{method}"] = packed_side(get_peft_model(base, plain))
    actions = {name: (lambda number, side=side: side.step(batches[number])) for name, side in sides.items()}
    measured = time_in_turn(actions, settings.steps, settings.warmup)
    return {name: found["seconds"] for name, found in measured.items()}


def measure_documented(settings: Settings, precision: str) -> dict[str, list[float]]:
    """Time interleaved steps of ours and of TRL as its documentation shows it."""
    batches = settings.batches(settings.warmup + settings.steps)
    rows = [row for batch in batches for row in batch]
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "trl": trl_side(settings, precision, rows, folder, "trl_documented"),
            "ours": our_side(settings, precision),
        }
        actions = {name: (lambda number, side=side: side.step(batches[number])) for name, side in sides.items()}
        measured = time_in_turn(actions, settings.steps, settings.warmup)
    return {name: found["seconds"] for name, found in measured.items()}


def measure_prompts(settings: Settings, precision: str) -> dict[str, Any]:
    """Time interleaved steps of both sides with the system prompt once, twice and four times as long."""
    lengths = (1, 2, 4)
    batches = {length: settings.batches(settings.warmup + settings.steps, length) for length in lengths}
    kind, _ = faster_trl(settings, precision, batches[1][0])
    with tempfile.TemporaryDirectory() as folder:
        trl, ours = trl_side(settings, precision, batches[1][0], folder, kind), our_side(settings, precision)
        actions = {
            f"{name}_{length}": (lambda number, side=side, length=length: side.step(batches[length][number]))
            for length in lengths
            for name, side in (("trl", trl), ("ours", ours))
        }
        measured = time_in_turn(actions, settings.steps, settings.warmup)
    return {
        "trl_kind": kind,
        "sequence_lengths": {length: [len(row["input_ids"]) for row in batches[length][0]] for length in lengths},
        **{f"{name}_seconds": found["seconds"] for name, found in measured.items()},
    }
