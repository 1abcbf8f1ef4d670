"""publish.py against the test Hub, step by step and fault by fault; test_publish.py has the scripts as a whole."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import Fault, Hub, User
from huggingface_hub import HfApi, constants

from tweetdora import publish as module
from tweetdora.config import PushConfig
from tweetdora.errors import UserError
from tweetdora.publish import (
    HubRepo,
    add_tag,
    check_free_space,
    check_kind,
    differing_files,
    inspect_repo,
    publish,
)

OWNER, READER, OTHER = "hf_owner", "hf_reader", "hf_other"
REPO = "acme/model"
FILES = {"README.md": "# A model\n", "config.json": "{}", "model.safetensors": "x", "plots/training.png": "png"}
# The client hands bytes to httpx2 in a way that httpx2 wants no more.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A Hub that publish.py talks to, over LFS, as acme."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(module, "WAITS", (0.0,) * len(module.WAITS))
    with Hub(tmp_path / "hub") as hub:
        hub.tokens |= {OWNER: User("acme"), READER: User("acme", "read"), OTHER: User("bob")}
        log_in(monkeypatch, hub, OWNER)
        yield hub


def log_in(monkeypatch, hub: Hub, token: str | None, endpoint: str | None = None) -> None:
    monkeypatch.setattr(module, "get_token", lambda: token)
    monkeypatch.setattr(module, "HfApi", lambda: HfApi(endpoint=endpoint or hub.endpoint, token=token))


@pytest.fixture
def folder(tmp_path) -> str:
    return write(tmp_path / "publish", FILES)


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def config(**settings) -> PushConfig:
    return PushConfig(hub_model_id=REPO, **settings)


def history(hub: Hub, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.store.repositories["models", REPO].history(revision)]


def files_of(hub: Hub, revision: str = "main") -> list[str]:
    return sorted(hub.store.repositories["models", REPO].commit_of(revision).files)


def refused(call: Callable, *arguments, **more) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **more)
    return str(caught.value)


# Before any work


def test_what_is_found_is_written_down(hub):
    assert inspect_repo(REPO, config()) == HubRepo(REPO, exists=False)
    hub.store.upload("models", REPO, {"config.json": b"{}"})
    target = inspect_repo(REPO, config())
    assert target.head == hub.store.repositories["models", REPO].commit_of("main").oid
    assert (target.exists, target.files) == (True, (".gitattributes", "config.json"))


def test_nothing_is_changed_by_looking(hub):
    hub.store.upload("models", REPO, {"config.json": b"{}"})
    inspect_repo(REPO, config())
    assert {line.split()[0] for line in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no Hub token: run `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", "the Hub rejected the token, or cannot be reached: Invalid user token. Log in"),
        (
            READER,
            "the Hub token of acme is read-only. Create one with write access at http://127.0.0.1:[0-9]+/settings",
        ),
        (
            OTHER,
            "acme/model does not exist, and bob cannot create it: acme is neither bob nor one of",
        ),
    ],
)
def test_a_token_that_cannot_do_it_is_said_before_any_work(hub, monkeypatch, token, message):
    log_in(monkeypatch, hub, token)
    assert re.match(message, refused(inspect_repo, REPO, config()))


def test_a_hub_that_cannot_be_reached_is_said(hub, monkeypatch):
    log_in(monkeypatch, hub, OWNER, endpoint="http://127.0.0.1:9")
    assert refused(inspect_repo, REPO, config()).startswith("the Hub rejected the token, or cannot be reached: ")


def test_without_write_access_the_remedies_are_named(hub, monkeypatch):
    hub.store.upload("models", REPO, {"config.json": b"{}"})
    log_in(monkeypatch, hub, OTHER)
    said = refused(inspect_repo, REPO, config())
    assert said.startswith("bob may not write to acme/model (") and "--hub_model_id bob/model" in said
    assert "--create_pr true" in said
    assert inspect_repo(REPO, config(create_pr=True)).create_pr


def test_a_private_repository_of_someone_else_looks_like_none(hub, monkeypatch):
    hub.store.upload("models", REPO, {}, private=True)
    log_in(monkeypatch, hub, OTHER)
    assert "acme/model does not exist, and bob cannot create it" in refused(inspect_repo, REPO, config())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"private": True}, "--private true, but acme/model is already public"),
        ({"tag": "v1"}, "--tag v1 already exists in acme/model"),
    ],
)
def test_what_contradicts_the_repository_is_refused(hub, settings, message):
    hub.store.upload("models", REPO, {"config.json": b"{}"})
    module.HfApi().create_tag(REPO, tag="v1")
    hub.store.upload("models", REPO, {"config.json": b"{ }"})
    assert refused(inspect_repo, REPO, config(**settings)).startswith(message)


def test_a_pull_request_needs_a_repository(hub):
    assert "acme/model does not exist on the Hub" in refused(inspect_repo, REPO, config(create_pr=True))


@pytest.mark.parametrize("name", ["acme/mo del", "acme/model--x", "acme/-model", "acme/model.git"])
def test_a_name_that_is_none_is_refused_without_asking(hub, name):
    assert refused(inspect_repo, name, config()).startswith(f"--hub_model_id {name} is not a valid repository name")
    assert hub.requests == []


def test_an_adapter_does_not_take_a_whole_models_place(hub):
    hub.store.upload("models", REPO, {"config.json": b"{}", "model.safetensors": b"x"})
    target = inspect_repo(REPO, config())
    check_kind(target, adapter_only=False)
    assert refused(check_kind, target, True).startswith("--adapter_only true, but acme/model holds a whole model.")
    check_kind(HubRepo(REPO, exists=True, files=("adapter_model.safetensors",)), adapter_only=True)


def test_too_little_space_is_said_with_what_is_needed(tmp_path):
    check_free_space(str(tmp_path / "not" / "yet" / "there"), 1)
    said = refused(check_free_space, str(tmp_path), 10**18)
    assert said.startswith(f"{tmp_path} has ") and "the model needs 1000000000.0 GB" in said


# The commit


def test_a_new_repository_gets_the_files_in_one_commit(hub, folder):
    published = publish(folder, inspect_repo(REPO, config()), "better", private=True)
    assert history(hub) == ["better", "initial commit"]
    assert files_of(hub) == sorted([".gitattributes", *FILES])
    assert hub.store.repositories["models", REPO].private
    assert published.changed and published.url == f"{hub.endpoint}/{REPO}/commit/{published.commit}"
    assert differing_files(module.HfApi(), folder, HubRepo(REPO, exists=True), published.commit) == []


def test_weights_of_several_parts_arrive_whole(hub, folder):
    """The Hub takes 6 MB at a time: 14 MB are three parts, and a file of its own."""
    weights = random.Random(0).randbytes(14_000_000)
    (Path(folder) / "model.safetensors").write_bytes(weights)
    published = publish(folder, inspect_repo(REPO, config()), "better", False)
    assert sum(line.startswith("PUT /cdn/upload") for line in hub.requests) >= 3
    assert differing_files(module.HfApi(), folder, HubRepo(REPO, exists=True), published.commit) == []
    stored = hub.store.repositories["models", REPO].commit_of("main").files["model.safetensors"]
    assert hub.store.blob(stored.sha256).read_bytes() == weights


def test_a_repository_that_came_into_being_meanwhile_is_gone_on_with(hub, folder):
    target = inspect_repo(REPO, config())
    hub.store.upload("models", REPO, {"LICENSE": b"x"})
    published = publish(folder, target, "better", False)
    assert any(line.startswith("POST /api/repos/create") for line in hub.requests)  # answered 409
    assert history(hub) == ["better", "Upload", "initial commit"] and published.left_alone == ["LICENSE"]


def test_the_same_folder_again_makes_no_commit(hub, folder):
    first = publish(folder, inspect_repo(REPO, config()), "better", False)
    again = publish(folder, inspect_repo(REPO, config()), "better", False)
    assert (again.changed, again.commit) == (False, first.commit)
    assert history(hub) == ["better", "initial commit"]


def test_what_an_earlier_publish_left_goes_and_what_others_put_there_stays(hub, folder):
    """An adapter_config.json at the root would be loaded in place of the merged model."""
    old = ["adapter_config.json", "adapter_model.safetensors", "model-00001-of-00002.safetensors", "figures/old.png"]
    old += ["model-Q8_0.gguf", "Modelfile", "onnx/model.onnx", "onnx/model_quantized.onnx_data"]  # of older weights
    others = ["LICENSE", "notes/thesis.md", "pytorch_model.bin", "somebody-Q8_0.gguf", "onnx/decoder.onnx"]
    hub.store.upload("models", REPO, dict.fromkeys([*old, *others], b"x"))
    published = publish(folder, inspect_repo(REPO, config()), "better", False)
    assert (published.removed, published.left_alone) == (sorted(old), sorted(others))
    assert files_of(hub) == sorted([".gitattributes", *FILES, *others])
    assert history(hub)[0] == "better"


def test_a_branch_is_made_where_it_is_missing_and_main_stays(hub, folder):
    hub.store.upload("models", REPO, {"config.json": b"old"})
    published = publish(folder, inspect_repo(REPO, config(revision="try")), "better", False)
    assert files_of(hub) == [".gitattributes", "config.json"]
    assert history(hub, "try")[0] == "better"
    again = publish(folder, inspect_repo(REPO, config(revision="try")), "better", False)
    assert (again.changed, again.commit) == (False, published.commit)


def test_a_pull_request_leaves_the_repository_as_it_is(hub, folder, monkeypatch):
    hub.store.upload("models", REPO, {"config.json": b"old"})
    log_in(monkeypatch, hub, OTHER)
    published = publish(folder, inspect_repo(REPO, config(create_pr=True)), "please", False)
    assert published.pull_request == "refs/pr/1"
    assert files_of(hub) == [".gitattributes", "config.json"]
    assert files_of(hub, "refs/pr/1") == sorted([".gitattributes", *FILES])


def test_a_tag_names_the_commit(hub, folder):
    published = publish(folder, inspect_repo(REPO, config()), "better", False)
    add_tag(published, "v1")
    assert hub.store.repositories["models", REPO].refs["refs/tags/v1"] == published.commit
    assert "is published, but could not be tagged with --tag v1" in refused(add_tag, published, "v1")


def test_the_same_command_with_a_tag_goes_on_where_it_was_interrupted(hub, folder):
    published = publish(folder, inspect_repo(REPO, config(tag="v1")), "better", False)
    add_tag(published, "v1")
    repo = inspect_repo(REPO, config(tag="v1"))
    assert repo.tag == "v1"
    again = publish(folder, repo, "better", False)
    assert (again.changed, again.commit) == (False, published.commit)
    Path(folder, "README.md").write_text("---\nlicense: mit\n---\nother\n")
    said = refused(publish, folder, repo, "better", False)
    assert said.startswith(f"--tag v1 already exists in {REPO}, on another commit. Choose another")
    assert history(hub)[0] == "better" and files_of(hub) == sorted([".gitattributes", *FILES])


# What goes wrong on the way


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refusal_that_passes_is_tried_again_and_makes_one_commit(hub, folder, status):
    hub.faults = [Fault("POST .*/commit/", status, times=2)]
    assert publish(folder, inspect_repo(REPO, config()), "better", False).changed
    assert history(hub) == ["better", "initial commit"]


def test_a_refusal_that_stays_ends_with_nothing_published(hub, folder):
    hub.faults = [Fault("POST .*/commit/", 503, times=99)]
    said = refused(publish, folder, inspect_repo(REPO, config()), "better", False)
    assert re.match(r"pushing to acme/model failed: .*503.*\. Nothing was pushed to it\. The folder .* is", said)
    assert history(hub) == ["initial commit"]
    assert sum("POST" in line and "/commit/" in line for line in hub.requests) == 4


def test_a_lost_answer_to_a_commit_that_landed_is_a_success_and_no_second_commit(hub, folder):
    hub.faults = [Fault("POST .*/commit/", drop=True)]
    published = publish(folder, inspect_repo(REPO, config()), "better", False)
    assert history(hub) == ["better", "initial commit"]
    assert published.changed
    assert published.commit == hub.store.repositories["models", REPO].commit_of("main").oid


def test_a_lost_answer_to_a_pull_request_opens_no_second_one(hub, folder):
    hub.store.upload("models", REPO, {"config.json": b"old"})
    hub.faults = [Fault("POST .*/commit/", drop=True)]
    published = publish(folder, inspect_repo(REPO, config(create_pr=True)), "please", False)
    assert published.pull_request == "refs/pr/1"
    assert len(hub.store.repositories["models", REPO].pull_requests) == 1


def test_two_publishers_at_once_do_not_overwrite_one_another(hub, folder, tmp_path):
    hub.store.upload("models", REPO, {"config.json": b"old"})
    target = inspect_repo(REPO, config())
    other = write(tmp_path / "other", {"config.json": "the other one's"})
    publish(other, inspect_repo(REPO, config()), "first", False)
    said = refused(publish, folder, target, "second", False)
    assert "someone else committed" in said and "nothing of yours was published" in said
    assert history(hub) == ["first", "Upload", "initial commit"]


def test_a_hub_that_falls_silent_leaves_the_question_open_in_words(hub, folder):
    hub.store.upload("models", REPO, {"config.json": b"old"})
    target = inspect_repo(REPO, config())
    hub.faults = [Fault("POST .*/commit/", drop=True), Fault(f"GET /api/models/{REPO}", 403, times=99)]
    said = refused(publish, folder, target, "better", False)
    assert "the Hub's reply to the commit was lost" in said and "the Hub does not say what it holds" in said
    assert "run the same command again; it commits nothing twice" in said
    hub.faults = []
    assert not publish(folder, inspect_repo(REPO, config()), "better", False).changed


@pytest.mark.parametrize("status", [401, 403, 404, 413])
def test_a_final_refusal_is_not_tried_again(hub, folder, status):
    hub.faults = [Fault("POST .*/commit/", status, times=99)]
    said = refused(publish, folder, inspect_repo(REPO, config()), "better", False)
    assert "Nothing was pushed to it" in said
    assert sum("POST" in line and "/commit/" in line for line in hub.requests) == 1


def test_a_card_that_the_hub_refuses_is_no_commit(hub, folder):
    hub.card_errors.append("license must be one of ...")
    said = refused(publish, folder, inspect_repo(REPO, config()), "better", False)
    assert "the Hub rejects it" in said and "license must be one of" in said
    assert history(hub) == ["initial commit"]


def test_an_upload_that_breaks_is_no_commit(hub, folder):
    hub.faults = [Fault("PUT /cdn/upload", 400, times=99)]
    said = refused(publish, folder, inspect_repo(REPO, config()), "better", False)
    assert "uploading the large files failed" in said and "Nothing was pushed to it" in said
    assert history(hub) == ["initial commit"]


# Reading back


def test_a_file_that_is_not_what_was_sent_is_found(hub, folder):
    published = publish(folder, inspect_repo(REPO, config()), "better", False)
    files = dict(FILES, **{"config.json": "{ }", "model.safetensors": "weighty", "new.json": "{}"})
    changed = write(Path(folder), files)
    assert differing_files(module.HfApi(), changed, HubRepo(REPO, exists=True), published.commit) == [
        "config.json",
        "model.safetensors",
        "new.json",
    ]
