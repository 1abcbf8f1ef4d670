"""Records: what a run leaves behind so that nobody types or guesses it later."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
import time
from typing import Any

import torch
from accelerate.utils import gather_object

from tweetdora.config import RUNS_DIR
from tweetdora.errors import InputError

RECORD_VERSION = 2
RUN_FILE = "run.json"
ADAPTER_DIR = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "wandb")


def write_json(path: str, record: Any) -> None:
    """Write a record so that a reader finds either the old file or the whole new one."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = f"{path}.{os.getpid()}.part"
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def read_json(path: str) -> Any:
    """Read a record.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); it was changed or cut.") from None


def read_run(run_dir: str) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        InputError: the folder is no run folder, or its training did not finish.
    """
    path = os.path.join(run_dir, RUN_FILE)
    if not os.path.isfile(path):
        runs = sorted(name for name in _folders(RUNS_DIR) if os.path.isfile(os.path.join(RUNS_DIR, name, RUN_FILE)))
        known = f"Run folders here: {', '.join(os.path.join(RUNS_DIR, name) for name in runs)}." if runs else ""
        why = f"it has no {RUN_FILE}" if os.path.isdir(run_dir) else "there is no such folder"
        raise InputError(f"{run_dir} is not a run folder: {why}. Train first with train.py. {known}".rstrip())
    run = read_json(path)
    if run.get("record_version") != RECORD_VERSION:
        raise InputError(
            f"{path} has record version {run.get('record_version')}; this code reads version {RECORD_VERSION}."
        )
    if run["status"] != "finished":
        raise InputError(
            f"the run in {run_dir} is {run['status']}, not finished. Go on with its train.py command and "
            "--resume_from_checkpoint true."
        )
    weights = os.path.join(run_dir, ADAPTER_DIR, ADAPTER_WEIGHTS)
    if not os.path.isfile(weights):
        raise InputError(f"{weights} is missing; the run record says that the run finished with it.")
    if file_sha256(weights) != run["adapter"]["sha256"]:
        raise InputError(f"{weights} is not the adapter that {path} describes: its SHA-256 differs.")
    return run


def _folders(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def file_sha256(path: str) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_sha256(named_tensors: list[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, shapes and values of tensors; used to name an adapter's random start."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Versions, hardware and the state of the code, without anything that names a user or a path."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware(),
        "git": git_state(),
    }


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu_name(), "cores": cpu_cores(), "memory_bytes": memory, "gpus": gpus}


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_threads(device: torch.device, processes: int, threads: int = 0) -> int:
    """Give this process its share of the cores when it computes on the CPU; the number of threads it then uses.

    accelerate launch and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which leaves all cores but one idle.
    """
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(threads or max(1, cpu_cores() // here))
    return torch.get_num_threads()


def _cpu_name() -> str:
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit, whether the work tree differs from it, the SHA-256 of how its code does; None outside a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
        changes = _git(here, "diff", "HEAD", "--", "*.py")
        digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
        return {"commit": commit, "dirty": dirty, "changes_sha256": digest}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: str, *words: str) -> str:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def command_line() -> str:
    """How this script was started: launcher, script and flags, quoted for a shell.

    Absolute paths would tell a user's name, and mean nothing elsewhere: those inside the working folder are made
    relative to it, of others the last part is kept.
    """
    launcher = ["python"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch always sets it
        processes = os.environ.get("WORLD_SIZE", "1")
        launcher = ["accelerate", "launch", *([] if processes == "1" else ["--num_processes", processes])]
        if os.environ["ACCELERATE_MIXED_PRECISION"] != "no":
            launcher += ["--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"]]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *map(without_folders, sys.argv[1:])])


def without_folders(word: str) -> str:
    """A word of a command without what only this machine has in its paths."""
    flag, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if os.path.isabs(path) and (os.path.exists(path) or not re.search(r"\s", path)):  # no prompt that begins with /
        inside = os.path.relpath(path)
        path = os.path.basename(os.path.normpath(path)) if inside.startswith(os.pardir) else inside
    return flag + equals + path


def peak_memory_bytes() -> dict[str, int]:
    """Highest resident memory of a process, and of each GPU's allocator: the largest figures of all processes.

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


def utc_now() -> str:
    """The time of day in UTC, to the second, in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
