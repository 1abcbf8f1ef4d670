"""The fields that other readers need; test_compat.py compares whole models in an older transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from tweetdora.errors import VerificationError
from tweetdora.portable import check_portable, make_portable


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer = {"tokenizer_class": "TokenizersBackend", "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return tmp_path


def written(folder: Path, **config: Any) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    make_portable(str(folder))
    check_portable(str(folder))
    return json.loads((folder / "config.json").read_text())


def test_the_rotary_embedding_has_the_names_of_both_versions(folder):
    assert written(folder, rope_parameters={"rope_type": "default", "rope_theta": 5.0})["rope_theta"] == 5.0
    by_layer = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in (("full_attention", 6.0),)}
    assert written(folder, rope_parameters=by_layer)["rope_theta"] == 6.0


def test_layers_of_kinds_that_version_4_does_not_have_are_left_as_they_are(folder):
    config = {"rope_parameters": {"compress": {"rope_type": "default", "rope_theta": 5.0}}}
    assert written(folder, **config) == config


@pytest.mark.parametrize(("mode", "is_readable"), [(0o644, True), (0o777, True), (0o600, False)])
def test_files_must_be_readable_by_all_and_may_be_more(folder, mode, is_readable):
    """Some file systems know one mode only."""
    written(folder)
    (folder / "config.json").chmod(mode)
    if is_readable:
        check_portable(str(folder))
    else:
        with pytest.raises(VerificationError, match="config.json is not readable by all users"):
            check_portable(str(folder))
