"""The origin of a result: command, code, libraries, machine and time, without anything that identifies a user."""

import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time

from tweetdora.device import hardware
from tweetdora.processes import machines
from tweetdora.records import Environment, GitState

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub", "wandb")


def environment() -> Environment:
    """Return versions, hardware and the state of the code."""
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        packages={name: importlib.metadata.version(name) for name in _PACKAGES},
        hardware=hardware(),
        git=git_state(),
    )


def git_state() -> GitState | None:
    """Return the state of the checkout that this code runs from; None outside a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        if os.path.realpath(_git(here, "rev-parse", "--show-toplevel")) != os.path.realpath(here):
            return None  # installed in an environment inside someone's checkout
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
        changes = _git(here, "diff", "HEAD", "--", "*.py")
        digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
        return GitState(commit, dirty, digest)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: str, *words: str) -> str:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def command_line() -> str:
    """Return the command that started this script: launcher, script and flags, quoted for a shell.

    Absolute paths could reveal a user's name and mean nothing elsewhere. Those inside the working folder become
    relative; of others, only the last part is kept.
    """
    launcher = ["python"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch always sets it
        processes = os.environ.get("WORLD_SIZE", "1")
        launcher = ["accelerate", "launch"]
        if processes != "1":
            launcher += ["--multi_gpu", "--num_processes", processes]
        if machines() > 1:
            launcher += ["--num_machines", str(machines())]
        if os.environ["ACCELERATE_MIXED_PRECISION"] != "no":
            launcher += ["--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"]]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", *(["--nnodes", str(machines())] if machines() > 1 else [])]
        launcher += ["--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    flags = [*map(without_folders, sys.argv[1:])]
    if "FSDP_VERSION" in os.environ and "--shard_base" not in flags:  # an FSDP launch file said it
        flags += ["--shard_base", "true"]
    return shlex.join([*launcher, os.path.basename(sys.argv[0]), *flags])


def without_folders(word: str) -> str:
    """Return a word of a command without machine-specific parts of paths."""
    flag, equals, path = word.rpartition("=") if word.startswith("--") else ("", "", word)
    if os.path.isabs(path) and (os.path.exists(path) or not re.search(r"\s", path)):  # not a prompt that starts with /
        inside = os.path.relpath(path)
        path = os.path.basename(os.path.normpath(path)) if inside.startswith(os.pardir) else inside
    return flag + equals + path


def utc_now() -> str:
    """Return the current time in UTC, in ISO 8601, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
