"""Files that are written whole or not at all, and hashes of what is in them."""

import hashlib
import json
import os
from typing import Any

import torch

from tweetdora.errors import InputError


def write_json(path: str, value: Any) -> None:
    """Write JSON so that a reader finds either the old file or the whole new one."""
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
        raise InputError(f"{path} is not readable JSON ({error}); it was changed or cut.") from None


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
