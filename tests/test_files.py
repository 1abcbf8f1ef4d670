"""Files: written whole or not at all, read with reasons, and named by their hashes."""

import hashlib
import json
import os
from typing import Any

import pytest
import torch

from tweetdora.errors import InputError
from tweetdora.files import file_sha256, read_json, tensors_sha256, write_json

# Writing


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    record = {"text": "größer 🌞", "number": 0.1, "none": None, "list": [1, [True]]}
    write_json(str(tmp_path / "run.json"), record)
    assert read_json(str(tmp_path / "run.json")) == record


def test_a_record_is_readable_text_with_a_newline_at_its_end(tmp_path):
    write_json(str(tmp_path / "run.json"), {"word": "größer", "steps": 3})
    assert (tmp_path / "run.json").read_text(encoding="utf-8") == '{\n  "word": "größer",\n  "steps": 3\n}\n'


def test_missing_folders_are_made(tmp_path):
    write_json(str(tmp_path / "new" / "folder" / "run.json"), {})
    assert read_json(str(tmp_path / "new" / "folder" / "run.json")) == {}


def test_a_name_without_a_folder_is_written_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json("run.json", {"steps": 3})
    assert json.loads((tmp_path / "run.json").read_text()) == {"steps": 3}


def test_a_dump_that_fails_leaves_the_old_record(tmp_path):
    """The list is written before the set, which JSON has no form for, is met."""
    path = tmp_path / "run.json"
    write_json(str(path), {"status": "started"})
    with pytest.raises(TypeError, match="set is not JSON serializable"):
        write_json(str(path), {"history": list(range(100_000)), "bad": set()})
    assert read_json(str(path)) == {"status": "started"}


def test_a_process_killed_while_writing_leaves_the_old_record(tmp_path, monkeypatch):
    """All is written but the new file is not yet in the old one's place."""
    path = tmp_path / "run.json"
    write_json(str(path), {"status": "started"})

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(str(path), {"status": "finished"})
    assert read_json(str(path)) == {"status": "started"}


def test_the_new_record_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """Else a machine that loses power may have neither."""
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    write_json(str(tmp_path / "run.json"), {})
    assert order == ["fsync", "replace"]


def test_a_written_record_leaves_no_part_behind(tmp_path):
    write_json(str(tmp_path / "run.json"), {})
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_dump_that_fails_leaves_no_part_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(str(tmp_path / "run.json"), {"bad": set()})
    assert os.listdir(tmp_path) == []


# Reading


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path}/run.json is missing.$"):
        read_json(str(tmp_path / "run.json"))


@pytest.mark.parametrize("content", [b'{"steps": ', b"", b"\xff\xfe"])
def test_a_broken_record_is_named(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/run.json is not readable JSON \(.*\); it was edited or truncated.$"
    ):
        read_json(str(tmp_path / "run.json"))


# Hashes


def test_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"weights" * 100_000)
    assert file_sha256(str(tmp_path / "file")) == hashlib.sha256(b"weights" * 100_000).hexdigest()


TENSORS = [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3.0]]))]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param([("a", torch.tensor([1.0, 2.5])), TENSORS[1]], id="value"),
        pytest.param([("aa", TENSORS[0][1]), TENSORS[1]], id="name"),
        pytest.param([("a", torch.tensor([[1.0, 2.0]])), TENSORS[1]], id="shape"),
        pytest.param([("a", torch.tensor([1.0, 2.0]).view(torch.int32)), TENSORS[1]], id="kind of number"),
        pytest.param(TENSORS[:1], id="one less"),
        pytest.param([("a", TENSORS[0][1]), ("b", torch.tensor([[-3.0]]))], id="sign"),
    ],
)
def test_hash_of_tensors_changes_with(other):
    assert tensors_sha256(other) != tensors_sha256(TENSORS)


def test_hash_of_tensors_does_not_depend_on_their_order():
    assert tensors_sha256(TENSORS[::-1]) == tensors_sha256(TENSORS)


def test_hash_of_tensors_does_not_depend_on_how_they_lie_in_memory():
    matrix = torch.arange(6.0).view(2, 3)
    assert tensors_sha256([("a", matrix.T.contiguous().T)]) == tensors_sha256([("a", matrix)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_hash_of_tensors_takes_every_kind_of_number(dtype):
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    assert len(tensors_sha256([("a", weight)])) == 64
