"""What is asked of the Hub before anything is loaded; the test Hub itself is test_hub_server.py's."""

import dataclasses
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from sample_records import sample_run

from tweetdora import hub
from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.hub import pin_revision
from tweetdora.resume import Commits, pin_commits


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
    commits = iter(letter * 40 for letter in "cdef")

    class MovingHub:
        def resolve_revision(self, name: str, **settings: str) -> SimpleNamespace:
            return SimpleNamespace(resolved=next(commits))

    monkeypatch.setattr(hub, "HfApi", MovingHub)


PUBLISHED = TaskConfig(dataset_name="someone/tweets"), ModelConfig(model_name_or_path="someone/base")


def test_a_new_run_is_of_the_commits_that_the_hub_has_now(moving_hub):
    assert pin_commits(*PUBLISHED, None) == Commits(base="c" * 40, data="d" * 40)


def test_a_run_that_goes_on_keeps_its_commits_whatever_the_hub_has_now(moving_hub):
    saved = sample_run(task=PUBLISHED[0], model=PUBLISHED[1])  # its base is of commit a…, its data of b…
    assert pin_commits(*PUBLISHED, saved) == Commits(base="a" * 40, data="b" * 40)
    moved = dataclasses.replace(PUBLISHED[1], model_revision="v2")
    assert pin_commits(PUBLISHED[0], moved, saved) == Commits(base="c" * 40, data="b" * 40)
    other = dataclasses.replace(PUBLISHED[0], dataset_name="someone/other")
    assert pin_commits(other, PUBLISHED[1], saved) == Commits(base="a" * 40, data="d" * 40)


def test_without_the_hub_a_revision_stays_as_it_is():
    assert constants.HF_HUB_OFFLINE  # the tests' own setting
    assert pin_revision("someone/tiny", "v1") == "v1"
    assert pin_revision("someone/tiny", None) is None
