"""What is asked of the Hub before anything is loaded; the test Hub itself is test_hub_server.py's."""

from types import SimpleNamespace

from huggingface_hub import constants

from tweetdora import hub
from tweetdora.hub import pin_revision


def test_a_local_path_has_no_revision(tmp_path):
    assert pin_revision(str(tmp_path), None) is None
    assert pin_revision(str(tmp_path), "v1") is None


def test_a_name_that_is_not_on_the_hub_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", None)
    assert pin_revision("missing.csv", "v1") == "v1"
    assert pin_revision("a/b/c", None) is None


def test_a_revision_is_asked_for_once_in_a_process(monkeypatch):
    """The Hub may move on between two splits of a data set."""
    commits = iter(["a" * 40, "b" * 40])

    class MovingHub:
        def resolve_revision(self, name: str, **settings: str) -> SimpleNamespace:
            return SimpleNamespace(resolved=next(commits))

    monkeypatch.setattr(hub, "HfApi", MovingHub)
    assert pin_revision("someone/moving", None) == pin_revision("someone/moving", None) == "a" * 40
    assert pin_revision("someone/moving", None, "dataset") == "b" * 40


def test_a_run_that_goes_on_keeps_its_commit_whatever_the_hub_has_now(monkeypatch):
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(hub, "_commit_of", lambda name, revision, repo_type: "new")
    hub.remember_commit("owner/base", None, "model", "old")
    hub.remember_commit("owner/other", None, "model", None)
    assert hub.pin_revision("owner/base", None) == "old"
    assert hub.pin_revision("owner/base", "v2") == hub.pin_revision("owner/base", None, "dataset") == "new"
    assert hub.pin_revision("owner/other", None) == "new"


def test_without_the_hub_a_revision_stays_as_it_is():
    assert constants.HF_HUB_OFFLINE  # the tests' own setting
    assert pin_revision("someone/tiny", "v1") == "v1"
    assert pin_revision("someone/tiny", None) is None
