"""The compute device and precision: decided in one place, the precision with the reason."""

import torch
from accelerate import PartialState

from tweetdora.errors import InputError


def compute_state() -> PartialState:
    """This process among those of its launch, on a CUDA GPU or the CPU.

    Left to itself accelerate would take an Apple GPU (mps) too; precision and speed here are for CUDA and CPUs.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def decide_precision(requested: str, flags: set[str], launcher: str | None, device_type: str) -> tuple[str, str]:
    """The compute precision and the reason for it, as one sentence part.

    `requested` is --precision, `flags` those of --bf16 and --fp16 that are on, `launcher` what accelerate launch put
    into the environment ("no" also when nobody chose), `device_type` "cpu" or "cuda".

    Raises:
        InputError: the sources contradict one another, or the device cannot compute in that precision.
    """
    chosen = {f"--{name} true": name for name in sorted(flags)}
    if requested != "auto":
        chosen[f"--precision {requested}"] = requested
    if launcher not in (None, "", "no"):
        chosen[f"accelerate launch's mixed_precision: {launcher}"] = launcher
    if len(set(chosen.values())) > 1:
        raise InputError(
            f"{' contradicts '.join(chosen)}. Give the precision in one place: --precision, or mixed_precision in "
            "accelerate_config.yaml."
        )
    device_name = "this CPU" if device_type == "cpu" else torch.cuda.get_device_name()
    if not chosen:
        if has_bf16(device_type):
            return "bf16", f"{device_name} computes in bf16"
        return "fp32", f"{device_name} has no bf16 units"
    source, precision = next(iter(chosen.items()))
    if precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"{source}: expected no, bf16 or fp16.")
    if precision == "bf16" and not has_bf16(device_type):
        raise InputError(f"{source}: {device_name} has no bf16 units. Use --precision fp32.")
    if precision == "fp16" and device_type == "cpu":
        raise InputError(f"{source}: fp16 needs a GPU. Use --precision bf16 or fp32.")
    return precision, f"asked for by {source}"


def has_bf16(device_type: str) -> bool:
    """Whether the device has bf16 arithmetic of its own (PyTorch can emulate it anywhere, slowly)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
