"""The storage behind Xet, for the test Hub: what hf_xet uploads, and how it gets it back. hub_server.py routes to it.

hf_xet cuts a file into chunks, sends them many at a time as a "xorb", and a "shard" that says which chunks of which
xorbs make which file (formats: huggingface.co/docs/xet). The bytes of a file are made again by hf_xet itself.
"""

import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_xet import XetFileInfo, XetSession

XET_TOKEN = "xet"  # lets into this storage, and nowhere else
_RECORD = 48  # bytes of every record in a shard
_LAST = b"\xff" * 32  # the hash that ends a section
_VERIFICATION, _METADATA = 1 << 31, 1 << 30  # flags: what follows a file's terms


@dataclass(frozen=True)
class Term:
    """Chunks `start` to `end` (not included) of a xorb, and how many bytes they are when unpacked."""

    xorb: str
    unpacked_bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file that shards have described."""

    xet_hash: str
    sha256: str
    terms: list[Term]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(term.unpacked_bytes for term in self.terms)


class Cas:
    """Xorbs on disk, and the files that are made of them, by both of their hashes."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.by_xet_hash: dict[str, XetFile] = {}
        self.by_sha256: dict[str, XetFile] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def connection(self) -> dict[str, Any]:
        """What a client needs to be let in."""
        return {"accessToken": XET_TOKEN, "exp": int(time.time()) + 3600, "casUrl": self.address}

    def add_xorb(self, xet_hash: str, content: bytes) -> bool:
        """Keep a xorb; whether it is new."""
        path = self.folder / xet_hash
        new = not path.exists()
        path.write_bytes(content)
        return new

    def add_shard(self, content: bytes) -> bool:
        """Learn a shard's files; False if it names a xorb that never came."""
        files = read_shard(content)
        if any(not (self.folder / term.xorb).is_file() for file in files for term in file.terms):
            return False
        for file in files:
            self.by_xet_hash[file.xet_hash] = self.by_sha256[file.sha256] = file
        return True

    def reconstruction(self, xet_hash: str, asked: tuple[int, int] | None) -> dict[str, Any]:
        """The chunks that make bytes `asked` of a file (both included), or all of it, and where they are."""
        file = self.by_xet_hash[xet_hash]
        first, last = asked or (0, file.size - 1)
        terms, fetch, offset, skipped = [], {}, 0, None
        for term in file.terms:
            if offset <= last and offset + term.unpacked_bytes > first:
                skipped = first - offset if skipped is None else skipped
                chunks = {"start": term.start, "end": term.end}
                terms.append({"hash": term.xorb, "unpacked_length": term.unpacked_bytes, "range": chunks})
                places = chunk_offsets((self.folder / term.xorb).read_bytes())
                part = {"start": places[term.start], "end": places[term.end] - 1}
                where = {"range": chunks, "url": f"{self.address}/xorbs/{term.xorb}", "url_range": part}
                fetch.setdefault(term.xorb, []).append(where)
            offset += term.unpacked_bytes
        return {"offset_into_first_range": skipped or 0, "terms": terms, "fetch_info": fetch}

    def write_file(self, sha256: str, target: Path) -> str:
        """Put the bytes of an uploaded file together at `target`; its Xet hash."""
        file, access = self.by_sha256[sha256], self.connection()
        session = XetSession()
        with session.new_file_download_group(
            endpoint=self.address, token=access["accessToken"], token_expiry_unix_secs=access["exp"]
        ) as group:
            group.start_download_file(XetFileInfo(file.xet_hash, file.size), str(target))
        return file.xet_hash


def read_shard(content: bytes) -> list[XetFile]:
    """The files of a shard: header, then for each file a record, its terms, and what the flags announce."""
    files, place = [], _RECORD  # behind the shard's own header
    while content[place : place + 32] != _LAST:
        xet_hash, flags, count = content[place : place + 32], *struct.unpack_from("<II", content, place + 32)
        place += _RECORD
        terms = []
        for _ in range(count):
            _, unpacked, start, end = struct.unpack_from("<IIII", content, place + 32)
            terms.append(Term(as_text(content[place : place + 32]), unpacked, start, end))
            place += _RECORD
        place += _RECORD * count if flags & _VERIFICATION else 0
        sha256 = ""
        if flags & _METADATA:
            sha256 = as_text(content[place : place + 32])
            place += _RECORD
        files.append(XetFile(as_text(xet_hash), sha256, terms))
    return files


def chunk_offsets(xorb: bytes) -> list[int]:
    """Where each chunk of a xorb begins, and where the last one ends.

    A chunk has a header of 8 bytes: version 0, 3 bytes of packed length, the packing, 3 bytes of unpacked length.
    """
    places = [0]
    while places[-1] < len(xorb) and xorb[places[-1]] == 0:
        packed = int.from_bytes(xorb[places[-1] + 1 : places[-1] + 4], "little")
        places.append(places[-1] + 8 + packed)
    return places


def as_text(xet_hash: bytes) -> str:
    """A hash as Xet writes it: four little-endian numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", xet_hash))
