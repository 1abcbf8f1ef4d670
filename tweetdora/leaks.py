"""Check a folder before it leaves the machine: only allowed kinds of file, no secrets, no trace of the machine."""

import getpass
import json
import netrc
import os
import re
from collections.abc import Iterator, Mapping

import gguf
from huggingface_hub import get_token

from tweetdora.errors import InputError

_KINDS = (".safetensors", ".json", ".md", ".png", ".gguf", ".onnx", ".onnx_data", ".yaml")
_BY_NAME = ("chat_template.jinja", "Modelfile")
# Secrets found by their form. An old W&B key, 40 hexadecimal digits, looks like a git commit, so it is found
# only by its value or next to its name.
_FORMS = {
    "a Hugging Face token": r"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a W&B key": r"\bwandb_v1_[A-Za-z0-9_]{20,}|(?i:wandb[_ -]?api[_ -]?key\W{1,5}[0-9a-f]{40})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "an AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a home folder": r"(?<![A-Za-z0-9.])(/home/|/Users/|[A-Za-z]:\\\\?Users\\\\?)[A-Za-z0-9._-]+",
}
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_OF_ENV = " in .env"
_SHORTEST_VALUE = 8  # shorter values in .env are words that may occur anywhere
_COMMON_USERS = (
    "root",
    "user",
    "ubuntu",
    "admin",
    "runner",
    "jovyan",
    "debian",
    "ec2-user",
    "nobody",
    "app",
    "default",
)


def check_contents(folder: str, repo_id: str | None, kinds: tuple[str, ...] = _KINDS) -> None:
    """Refuse a folder with a file of another kind, or with content that should not be published.

    Raises:
        InputError: the folder holds one; the message names file, line and kind of the secret, not the secret itself.
    """
    values = known_secrets(os.environ, os.getcwd())
    names = _names_of_the_machine(repo_id)
    for root, _, files in os.walk(folder):
        for file in sorted(files):
            path = os.path.join(root, file)
            name = os.path.relpath(path, folder)
            if not file.endswith(kinds) and file not in _BY_NAME or file.startswith("."):
                raise InputError(
                    f"{path} is not of a kind that is published ({', '.join(kinds)}, "
                    f"{', '.join(_BY_NAME)}). Remove it, or rebuild the folder."
                )
            # A vocabulary holds words, which a value in .env may be as well (ENVIRONMENT=production).
            words = file in _VOCABULARIES
            own = {what: value for what, value in values.items() if not (words and what.endswith(_OF_ENV))}
            for line, text in _lines(path):
                if what := find_secret(text, own, names):
                    raise InputError(
                        f"{name}, line {line}, holds {what}. Nothing was published. Remove it from the settings, the "
                        "prompt or the data that it comes from, and rebuild the folder."
                    )


def find_secret(text: str, values: Mapping[str, str], names: Mapping[str, str]) -> str | None:
    """Say what in a line should not be published; None if nothing. `values` are texts, `names` are patterns.

    >>> find_secret("token: hf_" + "x" * 34, {}, {})
    'a Hugging Face token'
    >>> find_secret("by the model of 2024", {"the value of KEY in .env": "secret-word"}, {})
    """
    for what, form in _FORMS.items():
        if re.search(form, text):
            return what
    for what, value in values.items():
        if value in text:
            return what
    for what, name in names.items():
        if re.search(name, text):
            return what
    return None


def known_secrets(environment: Mapping[str, str], folder: str) -> dict[str, str]:
    """Collect this machine's secrets, keyed by a description: the Hub's and W&B's logins, and the values in .env."""
    found = {"the Hub token of this machine": get_token() or ""}
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        found[f"the value of {name}"] = environment.get(name, "")
    try:
        logins = netrc.netrc(environment.get("NETRC"))
        for host in logins.hosts:
            login = logins.authenticators(host)
            found[f"the password for {host} in .netrc"] = login[2] if login else ""
    except (OSError, netrc.NetrcParseError):
        pass  # without a readable file there is no password to look for
    try:
        with open(os.path.join(folder, ".env"), encoding="utf-8") as stream:
            for line in stream:
                name, sign, value = line.partition("=")
                if sign:
                    found[f"the value of {name.strip().removeprefix('export ')}{_OF_ENV}"] = _unquoted(value.strip())
    except (OSError, UnicodeDecodeError):
        pass
    return {what: value for what, value in found.items() if len(value) >= _SHORTEST_VALUE}


def _unquoted(value: str) -> str:
    """A value of .env without quotes, or without the comment behind it.

    >>> _unquoted('"a # b"'), _unquoted("abc123 # a comment")
    ('a # b', 'abc123')
    """
    if value[:1] in ("'", '"') and value.find(value[0], 1) > 0:
        return value[1 : value.find(value[0], 1)]
    return re.split(r"\s#", value)[0].strip()


def _names_of_the_machine(repo_id: str | None) -> dict[str, str]:
    """Return patterns of login name and home folder, unless too common to identify anyone, or public as the owner.

    The login name is looked for in absolute paths only: many are words, such as mark or will, which a tokenizer's
    vocabulary and any text may hold.
    """
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in a container, the user may have no name
        user = ""
    home = os.path.expanduser("~")
    names = {}
    if len(user) > 3 and user not in _COMMON_USERS and user not in (repo_id or "").split("/"):
        names["the login name of this machine"] = rf"(?<![\w./~-])(/[\w.+-]+)+/{re.escape(user)}(?![\w-])"
    if home.count(os.sep) > 1:
        names["the home folder of this machine"] = rf"(?<![\w-]){re.escape(home)}(?![\w-])"
    return names


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file, numbered from 1. For weights, yield the text in their header."""
    if path.endswith(".safetensors"):
        with open(path, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        text = json.dumps(header.get("__metadata__", {}), indent=0)
    elif path.endswith(".gguf"):
        fields = gguf.GGUFReader(path).fields.values()
        text = "\n".join(str(field.contents()) for field in fields if field.types == [gguf.GGUFValueType.STRING])
    elif path.endswith(".onnx_data"):
        text = ""  # only weights; their names are in the .onnx file
    else:
        with open(path, "rb") as stream:
            text = stream.read().decode("utf-8", "replace")
    return enumerate(text.splitlines(), 1)
