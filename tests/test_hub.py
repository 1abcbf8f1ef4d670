"""What is asked of the Hub before anything is loaded; the test Hub itself is test_hub_server.py's."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tweetdora import hub
from tweetdora.hub import pin_revision

ROOT = Path(__file__).resolve().parent.parent


def test_a_local_path_has_no_revision(tmp_path):
    assert pin_revision(str(tmp_path), None) is None
    assert pin_revision(str(tmp_path), "v1") is None


def test_a_name_that_is_not_on_the_hub_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)
    assert pin_revision("missing.csv", "v1") == "v1"
    assert pin_revision("a/b/c", None) is None


@pytest.fixture
def moving_hub(monkeypatch) -> None:
    """A Hub that is at another commit each time that it is asked."""
    commits = iter(letter * 40 for letter in "abcdef")

    class MovingHub:
        def resolve_revision(self, name: str, **settings: str) -> SimpleNamespace:
            return SimpleNamespace(resolved=next(commits))

    monkeypatch.setattr(hub, "_commits", {})
    monkeypatch.setattr(hub, "HfApi", MovingHub)


def test_a_revision_is_asked_for_once_in_a_process(moving_hub):
    """The Hub may move on between two splits of a data set."""
    assert pin_revision("someone/moving", None) == pin_revision("someone/moving", None) == "a" * 40
    assert pin_revision("someone/moving", None, "dataset") == "b" * 40
    assert pin_revision("someone/moving", "v2") == "c" * 40


def test_a_run_that_goes_on_keeps_its_commits_whatever_the_hub_has_now(moving_hub):
    keep_commits = runpy.run_path(str(ROOT / "train.py"))["keep_commits"]
    saved = {
        "task": {"dataset_name": "someone/tweets", "dataset_revision": None},
        "model": {"model_name_or_path": "someone/base", "model_revision": "v2"},
        "base": {"revision": "base then"},
        "train_data": {"revision": "data then"},
    }
    keep_commits(saved)
    assert pin_revision("someone/base", "v2") == "base then"
    assert pin_revision("someone/tweets", None, "dataset") == "data then"
    assert pin_revision("someone/base", None) == "a" * 40
    saved["base"]["revision"] = saved["train_data"]["revision"] = None  # local folders have none
    saved["model"]["model_name_or_path"] = "someone/other"
    keep_commits(saved)
    assert pin_revision("someone/other", "v2") == "b" * 40


def test_without_the_hub_a_revision_stays_as_it_is():
    assert constants.HF_HUB_OFFLINE  # the tests' own setting
    assert pin_revision("someone/tiny", "v1") == "v1"
    assert pin_revision("someone/tiny", None) is None
