"""The machine: its device, the precision it computes in, its threads, and how much memory was used."""

import os
import platform
import resource
import sys
from dataclasses import dataclass
from typing import Literal, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from tweetdora.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]  # "auto" only where it is asked for


@dataclass(frozen=True)
class Hardware:
    """What a machine has, as a record says it."""

    cpu: str
    cores: int  # that this process may use
    memory_bytes: int
    gpus: list[str]


def compute_state() -> PartialState:
    """This process among those of its launch, on a CUDA GPU or the CPU.

    Left to itself accelerate would take an Apple GPU (mps) too; precision and speed here are for CUDA and CPUs.
    """
    return PartialState(cpu=not torch.cuda.is_available())


def decide_precision(
    requested: Precision, flags: set[str], launcher: str | None, device_type: str
) -> tuple[Precision, str]:
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
    # Its config file may be one of the machine's, that nobody remembers.
    launch = " Or launch with --mixed_precision no." if source.startswith("accelerate") else ""
    if precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"{source}: expected no, bf16 or fp16.{launch}")
    if precision == "bf16" and not has_bf16(device_type):
        raise InputError(f"{source}: {device_name} has no bf16 units. Use --precision fp32.{launch}")
    if precision == "fp16" and device_type == "cpu":
        raise InputError(f"{source}: fp16 needs a GPU. Use --precision bf16 or fp32.{launch}")
    return cast(Precision, precision), f"asked for by {source}"


def can_compute(precision: Precision, device_type: str) -> bool:
    """Whether the device computes in that precision by itself."""
    if precision == "fp16":
        return device_type == "cuda"
    return precision == "fp32" or has_bf16(device_type)


def has_bf16(device_type: str) -> bool:
    """Whether the device has bf16 arithmetic of its own (PyTorch can emulate it anywhere, slowly)."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def hardware() -> Hardware:
    """Processor, cores, memory and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(_cpu_name(), cpu_cores(), memory, gpus)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def use_cpu_threads(device: torch.device, processes: int, threads: int = 0) -> int:
    """Give this process its share of the cores when it computes on the CPU; the number of threads it then uses.

    accelerate launch and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which leaves all cores but one idle.
    """
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(threads or max(1, cpu_cores() // here))
    return torch.get_num_threads()


def peak_memory_bytes() -> dict[str, int]:
    """Highest resident memory of a process, and of each GPU's allocator: the largest of all processes.

    All processes must call it.
    """
    peaks = gather_object([_own_peak_memory_bytes()])
    return {name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]}


def _own_peak_memory_bytes() -> dict[str, int]:
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peak[f"gpu{index}"] = torch.cuda.max_memory_allocated(index)
    return peak
