"""Atomic file writes, locks, and hashes."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from filelock import FileLock, Timeout

from tweetdora.errors import InputError


@contextlib.contextmanager
def held_lock(name: str, found: str, cure: str) -> Iterator[None]:
    """Hold a named lock for this user and machine; it is released when the process ends, in whatever way.

    Raises:
        InputError: another process holds it. The message is `found` and `cure`.
    """
    user = getattr(os, "getuid", lambda: "user")()
    path = os.path.join(tempfile.gettempdir(), f"tweetdora-{user}-{name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"{found} (it holds {path}). {cure}") from None
    try:
        yield
    finally:
        lock.release()


def write_json(path: str, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the complete new one."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    beside = f"{path}.{os.getpid()}.part"
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def read_json(path: str) -> Any:
    """Read JSON.

    Raises:
        InputError: the file is missing or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable JSON ({error}); it was edited or truncated.") from None


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_sha256(named_tensors: list[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over names, shapes and values of tensors; it identifies an adapter's initial weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folder_name(path: str) -> str:
    """The last part of a path, which is the only part to publish."""
    return os.path.basename(os.path.normpath(path))
