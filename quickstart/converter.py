"""Fetch llama.cpp's converter from llama-cpp-python's source archive on PyPI: `python -m quickstart.converter`.

push_to_hub.py --gguf needs it if there is no checkout of llama.cpp. It unpacks only Python files and the licence, and
compiles nothing.
"""

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from quickstart.fetch import Archive, QuickstartError, fetch

SDIST = Archive(
    "llama-cpp-python==0.3.36",
    "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
_SOURCE = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
_WANTED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/", "LICENSE")


def unpack(sdist: Path, folder: Path) -> None:
    """Unpack the converter to a folder, which is replaced only after everything is unpacked."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as place:
        with tarfile.open(sdist) as archive:
            for member in archive.getmembers():
                if member.isfile() and member.name.removeprefix(_SOURCE).startswith(_WANTED):
                    member.name = member.name.removeprefix(_SOURCE)
                    archive.extract(member, place, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        os.mkdir(folder)
        for name in os.listdir(place):
            os.replace(Path(place, name), folder / name)


if __name__ == "__main__":
    try:
        unpack(fetch(*SDIST, Path("assets/downloads")), Path(".llama.cpp"))
    except QuickstartError as error:
        sys.exit(f"quickstart: {error}")
