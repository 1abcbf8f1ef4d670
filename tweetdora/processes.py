"""Launches of several processes on one machine or more: what they must have in common, and the loss of one."""

import contextlib
import os
import socket
import tempfile
import time
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import distributed

from tweetdora.errors import InputError

_ENVIRONMENT_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SEEN_WITHIN = 30.0  # seconds; a network file system may show a new file late
# How gloo, NCCL and PyTorch's store say that the other end is gone.
_LOST = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"),
    *("Timed out waiting", "Application timeout caused pair closure"),
)


def check_launch() -> None:
    """Refuse a launch that should start several processes but starts one.

    accelerate starts a single process, without a word, for `--cpu --num_processes 2` and for `--num_processes 2` on a
    machine with fewer than two GPUs. It still sets the address at which the processes would have met.

    Raises:
        InputError: names the flag that starts several processes.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and "MASTER_ADDR" in os.environ and not any(name in os.environ for name in _ENVIRONMENT_SIZES):
        raise InputError(
            "accelerate launch was asked for several processes, but started one (MASTER_ADDR is set, WORLD_SIZE is "
            "not). Add --multi_gpu, also on the CPU, in place of --cpu, or launch with --config_file "
            "recipes/accelerate/cpu.yaml. If you want one process, unset MASTER_ADDR."
        )


def take_over_fsdp() -> bool:
    """True if accelerate launch asks for FSDP2; withdraws the request from the environment, because we do it.

    Accelerate would shard the model again, and on a CPU it would use DDP without a word.

    Raises:
        InputError: a setting of the launch file that saves memory would be ignored.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() not in ("true", "1"):
        return False
    ignored = {
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false") != "false",
        "fsdp_activation_checkpointing": os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false") != "false",
    }
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError(
            "accelerate launch asks for FSDP 1; expected fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml."
        )
    if wrong := [name for name, is_on in ignored.items() if is_on]:
        raise InputError(
            f"accelerate launch sets {', '.join(wrong)}, which is not supported. Set it to false, as in "
            "recipes/accelerate/fsdp2.yaml. (--activation_checkpointing true saves activations.)"
        )
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return True


def lost_process(error: RuntimeError) -> str | None:
    """Describe an error that means that another process of this launch is gone; None if it means something else."""
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return None
    said = " ".join(str(error).split())
    words = next((words for words in _LOST if words in said), None)
    if words is None and not isinstance(error, distributed.DistError):
        return None
    return (
        f"process {distributed.get_rank()} on {socket.gethostname()} stops: another process of this launch has ended "
        f"or cannot be reached ({words or said[:160]}). If that one printed an error, it is the cause. What was saved "
        "is intact; the same command resumes (train.py: with --resume_from_checkpoint true)."
    )


def machines() -> int:
    """The number of machines of this launch, as torchrun or accelerate launch says."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def check_same(facts: dict[str, Any]) -> None:
    """Check that all processes have the same settings, files and packages. Collective.

    Otherwise they would train on, or measure, a mixture: each process reads its own machine's files.

    Raises:
        InputError: in all processes; names the first process that differs, and in what.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    found = gather_object([(socket.gethostname(), facts)])
    host, expected = found[0]
    for number, (other, theirs) in enumerate(found):
        if differ := [name for name in expected if theirs.get(name) != expected[name]]:
            what = "; ".join(
                f"{name}: {_short(theirs.get(name))} instead of {_short(expected[name])}" for name in differ
            )
            raise InputError(
                f"process {number} on {other} differs from process 0 on {host}: {what}. Start the same command in all "
                "processes, with the same files and package versions on every machine."
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_shared_folder(folder: str, flag: str) -> None:
    """Check that all processes see the same folder, because each of them reads and writes files there. Collective.

    Raises:
        InputError: in all processes; names the machines that do not see it.
    """
    state = PartialState()
    if state.num_processes == 1:
        return
    name, failure = "", ""
    if state.is_main_process:
        try:
            os.makedirs(folder, exist_ok=True)
            descriptor, path = tempfile.mkstemp(prefix=".shared-", dir=folder)
            os.close(descriptor)
            name = os.path.basename(path)
        except OSError as error:  # the others wait for the name
            failure = str(error)
    name, failure = broadcast_object_list([name, failure])
    if failure:
        raise InputError(f"{flag} {folder} cannot be written: {failure}. Fix its permissions, or use another folder.")
    missing = gather_object([] if _appears(os.path.join(folder, name)) else [socket.gethostname()])
    if state.is_main_process:
        os.unlink(os.path.join(folder, name))
    if missing:
        raise InputError(
            f"{flag} {folder} is not the same folder in all processes: on {', '.join(sorted(set(missing)))} it is "
            f"another one than on {_main_host()}. Every process writes its part of a checkpoint there and reads it on "
            "resume. Use a folder on a file system that all machines share, by the same path."
        )


def _main_host() -> str:
    return gather_object([socket.gethostname()])[0]


def _appears(path: str) -> bool:
    """True once a file is seen; a network file system may need a moment, and its folder listed, to show it."""
    limit = time.monotonic() + _SEEN_WITHIN
    while True:
        with contextlib.suppress(OSError):
            if os.path.basename(path) in os.listdir(os.path.dirname(path)):
                return True
        if time.monotonic() >= limit:
            return False
        time.sleep(0.5)
