"""The machine: device, precision, threads and memory use."""

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from tweetdora.config import Precision
from tweetdora.errors import InputError
from tweetdora.processes import check_launch


@dataclass(frozen=True)
class Hardware:
    """The hardware, as kept in records."""

    cpu: str
    cores: int  # available to this process
    memory_bytes: int
    gpus: list[str]


def compute_state() -> PartialState:
    """Return the state of this process within its launch, on a CUDA GPU or the CPU.

    By default accelerate would also use an Apple GPU (mps); precision and speed here are for CUDA and CPUs only.

    Raises:
        InputError: the launch was meant to have several processes and has one.
    """
    check_launch()
    return PartialState(cpu=not uses_gpu())


def uses_gpu() -> bool:
    """True if there is a CUDA GPU, unless the launch is for the CPU (`accelerate launch --cpu`)."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def decide_precision(
    requested: Precision, flags: set[str], launcher: str | None, device_type: str
) -> tuple[Precision, str]:
    """Return the compute precision and the reason for it, as part of a sentence.

    requested: --precision. flags: --bf16 and --fp16, if on. launcher: the value that accelerate launch sets ("no" also
    if nobody chose). device_type: "cpu" or "cuda".

    Raises:
        InputError: the sources contradict each other, or the device does not support the precision.
    """
    chosen = {f"--{name} true": name for name in sorted(flags)}
    if requested != "auto":
        chosen[f"--precision {requested}"] = requested
    if launcher not in (None, "", "no"):
        chosen[f"accelerate launch's mixed_precision: {launcher}"] = launcher
    if len(set(chosen.values())) > 1:
        raise InputError(
            f"{' contradicts '.join(chosen)}. Set the precision in one place: --precision, or mixed_precision in "
            "accelerate_config.yaml."
        )
    device_name = "this CPU" if device_type == "cpu" else torch.cuda.get_device_name()
    if not chosen:
        if has_bf16(device_type):
            return "bf16", f"{device_name} computes in bf16"
        return "fp32", f"{device_name} has no bf16 units"
    source, precision = next(iter(chosen.items()))
    # It may come from a forgotten config file of the machine.
    launch = " Or launch with --mixed_precision no." if source.startswith("accelerate") else ""
    if precision not in ("fp32", "bf16", "fp16"):
        raise InputError(f"{source}: expected no, bf16 or fp16.{launch}")
    if precision == "bf16" and not has_bf16(device_type):
        raise InputError(f"{source}: {device_name} has no bf16 units. Use --precision fp32.{launch}")
    if precision == "fp16" and device_type == "cpu":
        raise InputError(f"{source}: fp16 needs a GPU. Use --precision bf16 or fp32.{launch}")
    return cast(Precision, precision), f"asked for by {source}"


def can_compute(precision: Precision, device_type: str) -> bool:
    """True if the device supports the precision natively."""
    if precision == "fp16":
        return device_type == "cuda"
    return precision == "fp32" or has_bf16(device_type)


def has_bf16(device_type: str) -> bool:
    """True if the device has native bf16 arithmetic; PyTorch can emulate it anywhere, slowly."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def hardware() -> Hardware:
    """Return processor, cores, memory and GPUs of this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(_cpu_name(), cpu_cores(), memory, gpus)


def cpu_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def use_cpu_threads(device: torch.device, processes: int, threads: int = 0) -> int:
    """Give this process its share of the cores if it computes on the CPU; return its number of threads.

    By default, accelerate launch and torchrun set OMP_NUM_THREADS=1, which would leave all other cores idle.
    """
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(threads or max(1, cpu_cores() // here))
    return torch.get_num_threads()


def available_memory_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate, on the host and on its device."""
    here = min(psutil.virtual_memory().available, _left_of_the_cgroup()) // int(
        os.environ.get("LOCAL_WORLD_SIZE", "1")
    )
    return min(here, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else here


def _left_of_the_cgroup(root: str = "/sys/fs/cgroup", of_process: str = "/proc/self/cgroup") -> int:
    """Return what the memory limits of this process's control groups (v2) leave, as in a container or a Slurm job."""
    left = sys.maxsize
    try:
        with open(of_process, encoding="utf-8") as stream:
            path = next(line.rstrip("\n").removeprefix("0::") for line in stream if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    parts = path.strip("/").split("/")
    for depth in range(len(parts) + 1):
        folder = os.path.join(root, *parts[:depth])
        with contextlib.suppress(OSError, ValueError):
            limit, used = (_number_in(folder, name) for name in ("memory.max", "memory.current"))
            with open(os.path.join(folder, "memory.stat"), encoding="utf-8") as stream:
                cached = sum(int(line.split()[1]) for line in stream if line.startswith("inactive_file "))
            left = min(left, limit - used + cached)
    return left


def _number_in(folder: str, name: str) -> int:
    with open(os.path.join(folder, name), encoding="utf-8") as stream:
        return int(stream.read())


def peak_memory_bytes(earlier: dict[str, int]) -> dict[str, int]:
    """Return the peak resident memory and each GPU's peak allocation, in bytes, as maxima over all processes.

    `earlier` are peaks of earlier sessions. Collective: every process must call it.
    """
    return largest([*gather_object([own_peak_memory_bytes()]), earlier])


def largest(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
    """The largest of the values that have the same name in several dictionaries, for all names of the first.

    >>> largest([{"process": 3, "gpu0": 2}, {"process": 4}])
    {'process': 4, 'gpu0': 2}
    """
    return {name: max(peak.get(name, 0) for peak in peaks) for name in peaks[0]}


def own_peak_memory_bytes() -> dict[str, int]:
    """Return this process's peak resident memory so far, and each GPU's peak allocation, in bytes."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    for index in range(torch.cuda.device_count()):
        peak[f"gpu{index}"] = torch.cuda.max_memory_allocated(index)
    return peak
