"""What may leave the machine: one secret planted in each place where it could hide."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tweetdora import leaks
from tweetdora.errors import InputError
from tweetdora.leaks import check_contents, find_secret, known_secrets

SECRETS = {
    "hf_" + "aB3" * 12: "a Hugging Face token",
    "wandb_v1_" + "x" * 30: "a W&B key",
    "WANDB_API_KEY=" + "0af9" * 10: "a W&B key",
    "-----BEGIN OPENSSH PRIVATE KEY-----": "a private key",
    "AKIA" + "ABCD1234" * 2: "an AWS key",
    "ghp_" + "a1B2" * 9: "a GitHub token",
    "sk-" + "proj-" + "a1" * 20: "an API key",
    "/home/somebody/thesis": "a home folder",
    "C:\\Users\\somebody": "a home folder",
    "/Users/somebody": "a home folder",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder as push_to_hub.py builds it, on a machine without a login of its own."""
    monkeypatch.setattr(leaks, "get_token", lambda: None)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "publish"
    for name in ("README.md", "config.json", "chat_template.jinja", "adapter/adapter_config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first line\nsecond line\n")
    (folder / "plots").mkdir()
    (folder / "plots/training.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(folder: Path, repo_id: str | None = "acme/model") -> str:
    with pytest.raises(InputError) as caught:
        check_contents(str(folder), repo_id)
    return str(caught.value)


def test_an_ordinary_folder_passes(folder):
    check_contents(str(folder), "acme/model")


@pytest.mark.parametrize(("secret", "what"), SECRETS.items())
def test_a_secret_is_known_by_its_form_and_is_not_repeated(folder, secret, what):
    (folder / "README.md").write_text(f"first line\nsee {secret} there\n")
    said = refused(folder)
    assert said.startswith(f"README.md, line 2, holds {what}. Nothing was published.")
    assert secret not in said


@pytest.mark.parametrize(
    "name", ["README.md", "config.json", "chat_template.jinja", "adapter/adapter_config.json", "plots/training.png"]
)
def test_no_file_is_left_out(folder, name):
    with open(folder / name, "ab") as stream:
        stream.write(b"\nhf_" + b"a" * 34)
    assert refused(folder).startswith(f"{name}, line ")


def test_the_header_of_weights_is_read_too(folder):
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors", {"made_by": "hf_" + "a" * 34})
    assert "model.safetensors, line 2, holds a Hugging Face token" in refused(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", ".env", "notes.txt", "adapter/training_args.bin", ".hidden.json"])
def test_a_file_of_another_kind_is_refused(folder, name):
    (folder / name).write_text("x")
    assert re.search(rf"{re.escape(name)} is not of a kind that is published", refused(folder))


def test_the_values_of_this_machine_are_found_whatever_their_form(folder, tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("# comment\nexport DATABASE='correct horse'\nSHORT=word\nPIN=13572468 # of mine\n")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password abcdef0123456789\n")
    monkeypatch.setattr(leaks, "get_token", lambda: "an-odd-token")
    for value, what in (
        ("correct horse", "the value of DATABASE in .env"),
        ("13572468", "the value of PIN in .env"),
        ("abcdef0123456789", "the password for api.wandb.ai in .netrc"),
        ("an-odd-token", "the Hub token of this machine"),
    ):
        (folder / "config.json").write_text(json.dumps({"name": value}, indent=1))
        assert refused(folder).startswith(f"config.json, line 2, holds {what}.")
    (folder / "config.json").write_text(json.dumps({"name": "word"}))
    (folder / "tokenizer.json").write_text(json.dumps({"\u0120correct horse": 7}))
    check_contents(str(folder), "acme/model")  # a vocabulary may hold any word
    (folder / "tokenizer.json").write_text(json.dumps({"an-odd-token": 7}))
    assert "tokenizer.json, line 1, holds the Hub token of this machine" in refused(folder)


def test_the_login_name_is_found_in_a_path_unless_it_is_the_owner_of_the_repository(folder, monkeypatch):
    monkeypatch.setattr(leaks.getpass, "getuser", lambda: "mark")
    for path in ("/scratch/mark", '"/mnt/data/mark/runs"', "(/scratch/mark)", "/opt/x:/scratch/mark/lib", "D:/a/mark"):
        (folder / "README.md").write_text(f"trained in {path}\n")
        assert "README.md, line 1, holds the login name of this machine" in refused(folder)
    check_contents(str(folder), "mark/model")


@pytest.mark.parametrize(
    "text",
    [
        "/data/marks",
        "and/or/mark",
        "https://x.com/a/mark",
        "data/mark",
        "a mark",
        '"\u0120mark": 4260',
        "/mark",
        "~/a/mark",
    ],
)
def test_a_login_name_that_is_a_word_may_stand_in_a_text_and_in_a_vocabulary(folder, monkeypatch, text):
    """Or nobody whose login is a common word could publish."""
    monkeypatch.setattr(leaks.getpass, "getuser", lambda: "mark")
    (folder / "README.md").write_text(f"{text}\n", encoding="utf-8")
    check_contents(str(folder), "acme/model")


def test_common_login_names_say_nothing(folder, monkeypatch):
    monkeypatch.setattr(leaks.getpass, "getuser", lambda: "root")
    (folder / "README.md").write_text("root mean square\n")
    check_contents(str(folder), None)


@pytest.mark.parametrize(
    "text",
    [
        "commit 0123456789abcdef0123456789abcdef01234567",
        "https://example.org/home/page",
        "hf_token is read from the environment",
        "sk-learn",
    ],
)
def test_what_only_looks_like_a_secret_passes(text):
    assert find_secret(text, {}, {}) is None


def test_short_and_empty_values_are_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(leaks, "get_token", lambda: None)
    (tmp_path / ".env").write_text("A=\nB=1234567\nC=12345678\nno sign\n")
    assert known_secrets({"NETRC": str(tmp_path / "none"), "HF_TOKEN": ""}, str(tmp_path)) == {
        "the value of C in .env": "12345678"
    }
