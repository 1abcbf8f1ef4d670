"""The test Hub against the real client: huggingface_hub and hf_xet in their own process, over Xet and over LFS."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hub_server import Fault, Hub, User
from hub_xet import chunk_offsets, read_shard

# What a client has of `huggingface_hub` and a folder, and `told`, which comes back.
HEADER = """
import json, os, sys
from pathlib import Path
from huggingface_hub import *
from huggingface_hub.errors import *
api, told = HfApi(), {}

def refused(call, *arguments, **more):
    try:
        call(*arguments, **more)
    except HfHubHTTPError as error:
        return f"{type(error).__name__} {error.response.status_code}"
    except Exception as error:
        return type(error).__name__
"""
FOOTER = "\nprint(json.dumps(told))"
LARGE = 13_000_001  # bytes: three parts over LFS

Client = Callable[..., dict[str, Any]]


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as hub:
        hub.tokens |= {"hf_owner": User("acme"), "hf_reader": User("acme", "read"), "hf_other": User("bob")}
        yield hub


@pytest.fixture(params=["xet", "lfs"])
def client(request, hub, tmp_path) -> Client:
    """Run lines of Python as a user of the Hub; what they put into `told`."""

    def run(code: str, token: str | None = "hf_owner") -> dict[str, Any]:
        home = tmp_path / f"home{len(list(tmp_path.glob('home*')))}"
        names = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "TMPDIR")
        env = {name: os.environ[name] for name in names if name in os.environ}
        env |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": str(int(request.param == "lfs")),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        if token:
            env["HF_TOKEN"] = token
        command = [sys.executable, "-c", HEADER + code + FOOTER]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    run.transport = request.param
    return run


PUBLISH = f"""
weights = bytes(range(256)) * ({LARGE} // 256 + 1)
weights = os.urandom(1_000_000) + weights[:{LARGE} - 1_000_000]
Path("weights").write_bytes(weights)
files = {{"model.safetensors": "weights", "config.json": b"{{}}", "README.md": b"---\\nlicense: mit\\n---\\n# A\\n"}}

def add(files):
    return [CommitOperationAdd(name, content) for name, content in files.items()]

api.create_repo("acme/model", private=True)
head = api.model_info("acme/model").sha
commit = api.create_commit("acme/model", add(files), commit_message="Publish", parent_commit=head)
"""


def test_what_was_published_comes_back_byte_for_byte(hub, client):
    told = client(
        PUBLISH
        + """
api.create_tag("acme/model", tag="v1")
info = api.model_info("acme/model", revision="v1", files_metadata=True)
told["head"] = info.sha == commit.oid and info.private and info.card_data.license
told["sizes"] = {file.rfilename: file.size for file in info.siblings}
folder = Path(snapshot_download("acme/model", revision="v1"))
told["equal"] = (folder / "model.safetensors").read_bytes() == weights
told["tree"] = {file.path: [file.lfs is not None, file.xet_hash is not None]
                for file in api.list_repo_tree("acme/model", recursive=True)}
told["history"] = [commit.title for commit in api.list_repo_commits("acme/model")]
"""
    )
    assert told["head"] == "mit"
    assert told["equal"]
    assert told["sizes"]["model.safetensors"] == LARGE
    xet = client.transport == "xet"
    assert told["tree"]["model.safetensors"] == [True, xet]
    assert told["tree"]["config.json"] == [False, False]
    assert told["history"] == ["Publish", "initial commit"]
    assert any("/cas/v1/xorbs/" in line for line in hub.requests) == xet
    assert sum("/part/" in line for line in hub.requests) == (0 if xet else 3)


def test_a_client_without_xet_reads_what_came_by_xet_and_the_other_way_round(client):
    client(PUBLISH)
    told = client(
        f"""
os.environ["HF_HUB_DISABLE_XET"] = "{int(client.transport == "xet")}"
import subprocess
code = 'from huggingface_hub import hf_hub_download as get; print(get("acme/model", "model.safetensors"))'
done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
told["equal"] = Path(done.stdout.strip()).read_bytes() == Path("weights").read_bytes()
"""
    )
    assert told["equal"]


def test_the_same_files_again_make_no_commit_and_a_deletion_makes_one(client):
    told = client(
        PUBLISH
        + """
again = api.create_commit("acme/model", add(files), commit_message="Again")
told["same"] = again.oid == commit.oid
api.create_commit("acme/model", [CommitOperationDelete("config.json")], commit_message="Delete")
told["files"] = api.list_repo_files("acme/model")
told["before"] = api.list_repo_files("acme/model", revision=commit.oid)
"""
    )
    assert told["same"]
    assert told["files"] == [".gitattributes", "README.md", "model.safetensors"]
    assert told["before"] == [".gitattributes", "README.md", "config.json", "model.safetensors"]


def test_the_hub_refuses_in_the_words_that_the_client_knows(hub, client):
    hub.store.upload("models", "acme/public", {"config.json": b"{}"})
    hub.store.upload("models", "acme/private", {"config.json": b"{}"}, private=True)
    code = """
add = lambda text: [CommitOperationAdd("a.txt", text)]
told["private"] = refused(api.model_info, "acme/private")
told["missing"] = refused(api.model_info, "acme/missing")
told["revision"] = refused(api.model_info, "acme/public", revision="v9")
told["file"] = refused(hf_hub_download, "acme/public", "missing.json")
told["whoami"] = refused(api.whoami)
told["create"] = refused(api.create_repo, "acme/public")
told["commit"] = refused(api.create_commit, "acme/public", add(b"1"), commit_message="x")
told["stale"] = refused(api.create_commit, "acme/public", add(b"2"), commit_message="x", parent_commit="0" * 40)
"""
    by_owner, by_reader = client(code), client(code, token="hf_reader")
    by_other, by_nobody, by_fake = client(code, token="hf_other"), client(code, token=None), client(code, token="hf_x")
    missing = {"missing": "RepositoryNotFoundError 404", "revision": "RevisionNotFoundError 404"}
    missing |= {"file": "RemoteEntryNotFoundError 404"}
    assert {name: by_owner[name] for name in missing} == missing
    assert (by_owner["private"], by_owner["whoami"], by_owner["create"]) == (None, None, "HfHubHTTPError 409")
    assert (by_owner["commit"], by_owner["stale"]) == (None, "HfHubHTTPError 412")
    assert (by_reader["private"], by_reader["commit"]) == (None, "HfHubHTTPError 403")
    assert (by_other["private"], by_other["commit"]) == ("RepositoryNotFoundError 404", "HfHubHTTPError 403")
    assert by_nobody["private"] == "RepositoryNotFoundError 401" and by_nobody["revision"] == missing["revision"]
    assert by_fake["whoami"] == "HfHubHTTPError 401"


def test_a_pull_request_by_someone_who_may_not_write_leaves_main_alone(hub, client):
    hub.store.upload("models", "acme/public", {"config.json": b"{}"})
    told = client(
        """
opened = api.create_commit("acme/public", [CommitOperationAdd("model.safetensors", b"weights")],
                           commit_message="Please", create_pr=True)
told["revision"] = opened.pr_revision
told["proposed"] = api.list_repo_files("acme/public", revision=opened.pr_revision)
told["main"] = api.list_repo_files("acme/public")
""",
        token="hf_other",
    )
    assert told["revision"] == "refs/pr/1"
    assert told["proposed"] == [".gitattributes", "config.json", "model.safetensors"]
    assert told["main"] == [".gitattributes", "config.json"]


def test_a_card_is_refused_before_a_byte_is_sent(hub, client):
    hub.card_errors.append("license must be one of ...")
    hub.store.upload("models", "acme/public", {"config.json": b"{}"})
    told = client(
        """
card = CommitOperationAdd("README.md", b"---\\nlicense: none\\n---\\n")
told["refused"] = refused(api.create_commit, "acme/public", [card], commit_message="x")
"""
    )
    assert told["refused"] == "ValueError"
    assert not any("preupload" in line or "/commit/" in line for line in hub.requests)


def test_faults_refuse_as_often_as_they_say_and_a_dropped_answer_is_a_commit_that_landed(hub, client):
    hub.store.upload("models", "acme/public", {"config.json": b"{}"})
    hub.faults = [
        Fault("POST .*/commit/", 503),
        Fault("POST .*/commit/", drop=True),
        Fault("GET .*/whoami-v2", 429, times=1, headers={"Retry-After": "0"}),
    ]
    told = client(
        """
add = lambda name: [CommitOperationAdd(name, b"x")]
told["first"] = refused(api.create_commit, "acme/public", add("a"), commit_message="first")
told["second"] = refused(api.create_commit, "acme/public", add("b"), commit_message="second")
told["third"] = refused(api.create_commit, "acme/public", add("c"), commit_message="third")
told["history"] = [commit.title for commit in api.list_repo_commits("acme/public")]
"""
    )
    assert told["first"] == "HfHubHTTPError 503"
    assert told["second"] == "RemoteProtocolError"
    assert told["third"] is None
    assert told["history"] == ["third", "second", "Upload", "initial commit"]


def test_a_data_set_is_another_kind_of_repository_of_the_same_name(hub, client):
    hub.store.upload("datasets", "acme/same", {"data/train.csv": b"text,label\n"})
    hub.store.upload("models", "acme/same", {"config.json": b"{}"})
    told = client(
        """
told["data"] = api.list_repo_files("acme/same", repo_type="dataset")
told["text"] = Path(hf_hub_download("acme/same", "data/train.csv", repo_type="dataset")).read_text()
told["paths"] = [entry.path for entry in api.get_paths_info("acme/same", ["data", "none"], repo_type="dataset")]
told["tree"] = [entry.path for entry in api.list_repo_tree("acme/same", repo_type="dataset")]
""",
        token=None,
    )
    assert told["data"] == [".gitattributes", "data/train.csv"]
    assert told["text"] == "text,label\n"
    assert told["paths"] == ["data"]
    assert told["tree"] == [".gitattributes", "data"]


def test_branches_settings_squash_and_deletion_do_what_they_say(hub, client):
    hub.store.upload("models", "acme/public", {"config.json": b"{}"})
    told = client(
        """
api.create_branch("acme/public", branch="try")
told["twice"] = refused(api.create_branch, "acme/public", branch="try")
told["branches"] = [branch.name for branch in api.list_repo_refs("acme/public").branches]
api.delete_branch("acme/public", branch="try")
told["main"] = refused(api.delete_branch, "acme/public", branch="main")
api.create_tag("acme/public", tag="v1")
api.delete_tag("acme/public", tag="v1")
told["tag"] = refused(api.delete_tag, "acme/public", tag="v1")
api.update_repo_settings("acme/public", private=True)
told["private"] = api.model_info("acme/public").private
api.super_squash_history("acme/public", commit_message="one")
told["history"] = [commit.title for commit in api.list_repo_commits("acme/public")]
told["files"] = api.list_repo_files("acme/public")
api.delete_repo("acme/public")
told["gone"] = refused(api.model_info, "acme/public")
"""
    )
    assert told["twice"] == "HfHubHTTPError 409" and told["branches"] == ["main", "try"]
    assert told["main"] == "HfHubHTTPError 403" and told["tag"] == "RevisionNotFoundError 404"
    assert told["private"] and told["history"] == ["one"] and told["files"] == [".gitattributes", "config.json"]
    assert told["gone"] == "RepositoryNotFoundError 404"


def test_chunks_of_a_xorb_lie_one_behind_the_other():
    """Two chunks by hand: 3 packed bytes after a header of 8, then 2, then a footer that is no chunk."""
    chunk = bytes([0, 3, 0, 0, 0, 3, 0, 0]) + b"abc"
    assert chunk_offsets(chunk + bytes([0, 2, 0, 0, 1, 9, 0, 0]) + b"de" + b"XETBLOB") == [0, 11, 21]


def test_a_shard_is_read_as_the_format_says():
    """One file of one term, with a verification and a metadata record, by hand."""
    number = (1).to_bytes(8, "little")
    words = [int(value).to_bytes(4, "little") for value in (0, 700, 0, 2)]
    flags = (1 << 31 | 1 << 30).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(8)
    file = number * 4 + flags
    term = bytes(32) + b"".join(words)
    shard = bytes(48) + file + term + bytes(48) + number * 4 + bytes(16) + b"\xff" * 32 + bytes(16)
    (read,) = read_shard(shard)
    assert read.xet_hash == read.sha256 == "0000000000000001" * 4
    assert (read.size, read.terms[0].start, read.terms[0].end, read.terms[0].xorb) == (700, 0, 2, "0" * 64)
