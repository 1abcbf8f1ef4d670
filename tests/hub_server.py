"""A Hub for tests: what huggingface_hub 2.4 asks over HTTP, answered on 127.0.0.1 from a folder.

    with Hub(folder) as hub:
        hub.tokens["hf_owner"] = User("owner")
        hub.store.upload("models", "owner/name", {"config.json": b"{}"})
        run(script, env={"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_owner", "HF_HOME": empty, ...})

`hub.requests` says what was asked. `hub.faults` makes it fail, the first that fits at a time:

    Fault("POST .*/commit/", 503)                        one request is refused
    Fault("POST .*/commit/", drop=True)                  it is done, and then the connection breaks
    Fault("GET .*/whoami-v2", 429, times=3, headers={"Retry-After": "1"})
"""

import base64
import json
import math
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from hub_store import BRANCH, PULL_REQUEST, TAG, Commit, File, Refusal, Repository, Store, is_large
from hub_xet import XET_TOKEN, Cas

PART_SIZE = 6_000_000  # of a large file that is uploaded in several parts
_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<repo_id>[^/]+/[^/]+)"
_GIT = r"/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+?)"


@dataclass
class User:
    """Who a token belongs to, and whether it may write."""

    name: str
    role: str = "write"


@dataclass
class Fault:
    """What to do with requests whose "METHOD /path?query" the pattern matches: refuse, or do it and drop the line."""

    pattern: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=lambda: {"error": "a fault of the test"})
    drop: bool = False


@dataclass
class Request:
    """What a client asks."""

    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    user: User | None

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


@dataclass
class Generation:
    """What it gets: JSON, or bytes, or a file of which it may want a part."""

    content: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


Handle = Callable[..., Generation]
_ROUTES: list[tuple[str, re.Pattern[str], Handle]] = []


def route(method: str, pattern: str) -> Callable[[Handle], Handle]:
    """Declare who answers a method and an address, whose named parts become arguments."""

    def register(handle: Handle) -> Handle:
        _ROUTES.append((method, re.compile(pattern + "/?$"), handle))
        return handle

    return register


class Hub:
    """The server: repositories, tokens, faults, and a record of what was asked."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.tokens: dict[str, User] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.card_errors: list[str] = []  # what the Hub has against any card
        self.tampered: dict[str, bytes] = {}  # paths, and what a commit puts there instead of what was sent
        self._lock, self._fault_lock = threading.Lock(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # Another origin: a client must not send its token there.
        self.cdn = f"http://localhost:{self.port}/cdn"
        self.cas = Cas(folder / "xorbs", f"{self.endpoint}/cas")

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault_for(self, line: str) -> Fault | None:
        """The fault that meets this request; it counts as used."""
        with self._fault_lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None

    def answer(self, request: Request) -> Generation:
        """What the first route that fits says; requests that change a repository wait for one another."""
        for method, pattern, handle in _ROUTES:
            if method == request.method and (match := pattern.match(request.path)):
                parts = {name: unquote(text) if text else text for name, text in match.groupdict().items()}
                # While a commit waits for hf_xet to put a file together, the storage must go on answering.
                if request.method == "GET" or request.path.startswith("/cas/"):
                    return handle(self, request, **parts)
                with self._lock:
                    return handle(self, request, **parts)
        raise Refusal(404, f"the test Hub knows no {request.method} {request.path}")

    def repository(self, request: Request, kind: str | None, repo_id: str, write: bool = False) -> Repository:
        """A repository that the user may read, or write."""
        repository = self.store.repositories.get((kind or "models", repo_id))
        owner = repo_id.split("/")[0]
        if repository is None or repository.private and (request.user is None or request.user.name != owner):
            raise Refusal(404 if request.user else 401, "Repository Not Found", "RepoNotFound")
        if write:
            _check_writer(request, owner)
        return repository


def _check_writer(request: Request, owner: str) -> None:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    if request.user.role != "write" or request.user.name != owner:
        raise Refusal(403, f"Forbidden: {request.user.name} ({request.user.role}) may not write to {owner}.")


# Account and repositories


@route("GET", "/api/whoami-v2")
def _whoami(hub: Hub, request: Request) -> Generation:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    user = request.user
    token = {"displayName": "test", "role": user.role}
    return Generation(
        {"type": "user", "name": user.name, "fullname": user.name, "orgs": [], "auth": {"accessToken": token}}
    )


@route("GET", "/api/agent-harnesses")
def _harnesses(hub: Hub, request: Request) -> Generation:
    return Generation({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/repos/create")
def _create(hub: Hub, request: Request) -> Generation:
    asked = request.json()
    kind = f"{asked.get('type') or 'model'}s"
    owner = asked.get("organization") or (request.user.name if request.user else "")
    repo_id = f"{owner}/{asked['name']}"
    _check_writer(request, owner)
    url = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    if (kind, repo_id) in hub.store.repositories:
        raise Refusal(409, "You already created this model repo", url=url)
    hub.store.create(kind, repo_id, asked.get("visibility") == "private")
    return Generation({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def _delete(hub: Hub, request: Request) -> Generation:
    asked = request.json()
    kind, repo_id = f"{asked.get('type') or 'model'}s", f"{asked['organization']}/{asked['name']}"
    hub.repository(request, kind, repo_id, write=True)
    del hub.store.repositories[kind, repo_id]
    return Generation({})


@route("PUT", _REPO + "/settings")
def _settings(hub: Hub, request: Request, kind: str, repo_id: str) -> Generation:
    repository = hub.repository(request, kind, repo_id, write=True)
    if "visibility" in request.json():
        repository.private = request.json()["visibility"] == "private"
    return Generation({})


@route("GET", _REPO + "/auth-check(?P<write>/write)?")
def _auth_check(hub: Hub, request: Request, kind: str, repo_id: str, write: str | None) -> Generation:
    hub.repository(request, kind, repo_id, write=write is not None)
    return Generation({})


@route("POST", "/api/validate-yaml")
def _validate_card(hub: Hub, request: Request) -> Generation:
    errors = [{"message": message} for message in hub.card_errors]
    try:
        _front_matter(request.json()["content"])
    except yaml.YAMLError as error:
        errors.append({"message": f"YAML: {error}"})
    return Generation({"errors": errors, "warnings": []}, 400 if errors else 200)


# What a repository holds


@route("GET", _REPO + "(?:/revision/(?P<revision>[^/]+))?")
def _info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Generation:
    repository = hub.repository(request, kind, repo_id)
    commit = repository.commit_of(revision or "main")
    first = list(repository.history("main"))[-1]
    blobs = request.query.get("blobs", "").lower() == "true"
    facts: dict[str, Any] = {
        "_id": commit.oid[:24],
        "id": repo_id,
        "author": repo_id.split("/")[0],
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": first.date,
        "private": repository.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [_sibling(file, blobs) for file in commit.files.values()],
    }
    if "README.md" in commit.files:
        text = hub.store.blob(commit.files["README.md"].sha256).read_text(encoding="utf-8")
        facts["cardData"] = _front_matter(text)
    return Generation(facts)


def _sibling(file: File, blobs: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        entry |= {"size": file.size, "blobId": file.oid}
        if file.large:
            entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def _front_matter(text: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


@route("GET", _REPO + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def _tree(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Generation:
    commit = hub.repository(request, kind, repo_id).commit_of(revision)
    prefix = f"{folder.rstrip('/')}/" if folder else ""
    below = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
    if prefix and not below:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound", commit=commit.oid)
    recursive = request.query.get("recursive", "").lower() == "true"
    entries = [_entry(file) for path, file in below.items() if recursive or "/" not in path[len(prefix) :]]
    folders = {parent for path in below for parent in _folders(path) if parent.startswith(prefix) and parent != prefix}
    folders = {parent for parent in folders if recursive or "/" not in parent[len(prefix) : -1]}
    entries += [{"type": "directory", "path": name[:-1], "oid": "0" * 40, "size": 0} for name in folders]
    return Generation(sorted(entries, key=lambda entry: entry["path"]))


@route("POST", _REPO + "/paths-info/(?P<revision>[^/]+)")
def _paths_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Generation:
    commit = hub.repository(request, kind, repo_id).commit_of(revision)
    if request.headers.get("Content-Type", "").startswith("application/json"):
        paths = request.json()["paths"]
    else:
        paths = parse_qs(request.body.decode())["paths"]
    folders = {folder[:-1] for path in commit.files for folder in _folders(path)}
    entries = [_entry(commit.files[path]) for path in paths if path in commit.files]
    entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in paths if path in folders]
    return Generation(entries)


def _entry(file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": file.path, "size": file.size, "oid": file.oid}
    if file.large:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    if file.xet_hash:
        entry["xetHash"] = file.xet_hash
    return entry


def _folders(path: str) -> Iterable[str]:
    """a/b/c.txt -> a/, a/b/"""
    parts = path.split("/")[:-1]
    return ("/".join(parts[: count + 1]) + "/" for count in range(len(parts)))


# Branches, tags, history, pull requests


@route("GET", _REPO + "/refs")
def _refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Generation:
    refs = hub.repository(request, kind, repo_id).refs

    def named(start: str) -> list[dict[str, str]]:
        found = {ref: oid for ref, oid in refs.items() if ref.startswith(start)}
        return [{"name": ref[len(start) :], "ref": ref, "targetCommit": oid} for ref, oid in found.items()]

    answer = {"branches": named(BRANCH), "tags": named(TAG), "converts": []}
    if "include_prs" in request.query:
        answer["pullRequests"] = named(PULL_REQUEST)
    return Generation(answer)


@route("GET", _REPO + "/commits/(?P<revision>[^/]+)")
def _commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Generation:
    history = hub.repository(request, kind, repo_id).history(revision)
    return Generation([_commit_line(commit) for commit in history])


def _commit_line(commit: Commit) -> dict[str, Any]:
    authors = [{"user": commit.author}]
    return {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "date": commit.date,
        "authors": authors,
    }


@route("POST", _REPO + "/(?P<what>tag|branch)/(?P<name>[^/]+)")
def _point(hub: Hub, request: Request, kind: str, repo_id: str, what: str, name: str) -> Generation:
    repository = hub.repository(request, kind, repo_id, write=True)
    asked = request.json() if request.body else {}
    if what == "tag":  # the address names what is tagged
        ref, target = TAG + asked["tag"], name
    else:
        ref, target = BRANCH + name, asked.get("startingPoint", "main")
    if ref in repository.refs:
        raise Refusal(409, f"Reference already exists: {ref}")
    repository.refs[ref] = repository.commit_of(target).oid
    return Generation({})


@route("DELETE", _REPO + "/(?P<what>tag|branch)/(?P<name>[^/]+)")
def _forget(hub: Hub, request: Request, kind: str, repo_id: str, what: str, name: str) -> Generation:
    repository = hub.repository(request, kind, repo_id, write=True)
    ref = (TAG if what == "tag" else BRANCH) + name
    if ref == BRANCH + "main":
        raise Refusal(403, "Cannot delete the main branch")
    if repository.refs.pop(ref, None) is None:
        raise Refusal(404, f"{ref} does not exist", "RevisionNotFound")
    return Generation({})


@route("POST", _REPO + "/super-squash/(?P<branch>[^/]+)")
def _squash(hub: Hub, request: Request, kind: str, repo_id: str, branch: str) -> Generation:
    hub.repository(request, kind, repo_id, write=True).squash(BRANCH + branch, request.json()["message"])
    return Generation({})


def _open_pull_request(repository: Repository, title: str) -> int:
    number = len(repository.pull_requests) + 1
    repository.pull_requests[number] = title
    repository.refs[f"{PULL_REQUEST}{number}"] = repository.refs[BRANCH + "main"]
    return number


# Uploads


@route("POST", _REPO + "/preupload/(?P<revision>[^/]+)")
def _preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Generation:
    repository = _repository_to_change(hub, request, kind, repo_id)
    there = repository.commit_of(revision).files
    answers = []
    for asked in request.json()["files"]:
        large = is_large(asked["path"], asked["size"])
        answer = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if asked["path"] in there:
            file = there[asked["path"]]
            answer["oid"] = file.sha256 if file.large else file.oid
        answers.append(answer)
    return Generation({"files": answers})


def _repository_to_change(hub: Hub, request: Request, kind: str, repo_id: str) -> Repository:
    """To open a pull request it is enough to be someone."""
    write = request.query.get("create_pr") != "1"
    repository = hub.repository(request, kind, repo_id, write=write)
    if request.user is None or request.user.role != "write":
        raise Refusal(403, "Forbidden: a token with write access is needed.")
    return repository


@route("POST", _GIT + r"\.git/info/lfs/objects/batch")
def _lfs_batch(hub: Hub, request: Request, kind: str | None, repo_id: str) -> Generation:
    hub.repository(request, kind, repo_id)
    if request.user is None or request.user.role != "write":
        raise Refusal(403, "Forbidden: a token with write access is needed.")
    objects = []
    for asked in request.json()["objects"]:
        entry: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
        if not hub.store.blob(asked["oid"]).is_file():
            upload: dict[str, Any] = {"href": f"{hub.cdn}/upload/{asked['oid']}"}
            count = math.ceil(asked["size"] / PART_SIZE)
            if count > 1:
                parts = {str(number): f"{upload['href']}/part/{number}" for number in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(PART_SIZE), **parts}
            verify = {"href": f"{hub.endpoint}/lfs/verify"}
            entry["actions"] = {"upload": upload, "verify": verify}
        objects.append(entry)
    return Generation({"transfer": "basic", "objects": objects})


@route("PUT", r"/cdn/upload/(?P<sha256>[0-9a-f]{64})")
def _lfs_put(hub: Hub, request: Request, sha256: str) -> Generation:
    _refuse_token(request)
    _keep(hub, sha256, request.body)
    return Generation(b"")


@route("PUT", r"/cdn/upload/(?P<sha256>[0-9a-f]{64})/part/(?P<number>\d+)")
def _lfs_put_part(hub: Hub, request: Request, sha256: str, number: str) -> Generation:
    _refuse_token(request)
    (hub.store.folder / f"{sha256}.{number}").write_bytes(request.body)
    return Generation(b"", headers={"ETag": f'"part-{number}"'})


@route("POST", r"/cdn/upload/(?P<sha256>[0-9a-f]{64})")
def _lfs_complete(hub: Hub, request: Request, sha256: str) -> Generation:
    _refuse_token(request)
    numbers = [part["partNumber"] for part in request.json()["parts"]]
    parts = [hub.store.folder / f"{sha256}.{number}" for number in numbers]
    _keep(hub, sha256, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    return Generation({})


@route("POST", "/lfs/verify")
def _lfs_verify(hub: Hub, request: Request) -> Generation:
    asked = request.json()
    path = hub.store.blob(asked["oid"])
    if not path.is_file() or path.stat().st_size != asked["size"]:
        raise Refusal(404, f"{asked['oid']} did not arrive")
    return Generation({})


def _refuse_token(request: Request) -> None:
    if "Authorization" in request.headers:
        raise Refusal(400, "a token was sent to another origin")


def _keep(hub: Hub, sha256: str, content: bytes) -> None:
    file = hub.store.add_bytes("", content)
    if file.sha256 != sha256:
        raise Refusal(400, f"the bytes are of {file.sha256}, not of {sha256}")


@route("POST", _REPO + "/commit/(?P<revision>[^/]+)")
def _commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Generation:
    repository = _repository_to_change(hub, request, kind, repo_id)
    header: dict[str, Any] = {}
    changed, deleted = [], []
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            header = value
        elif key == "file":
            content = hub.tampered.get(value["path"], base64.b64decode(value["content"]))
            changed.append(hub.store.add_bytes(value["path"], content))
        elif key == "lfsFile":
            changed.append(_large_file(hub, value["path"], value["oid"]))
        elif key in ("deletedFile", "deletedFolder"):
            deleted.append(value["path"])
        else:
            raise Refusal(400, f"the test Hub knows no {key} in a commit")
    if header.get("parentCommit", repository.commit_of(revision).oid) != repository.commit_of(revision).oid:
        raise Refusal(
            412,
            "The branch was updated since you opened this page. Please refresh and try again.",
            "PreconditionFailed",
        )
    number = None
    ref = revision if revision in repository.refs else BRANCH + revision
    if request.query.get("create_pr") == "1":
        number = _open_pull_request(repository, header["summary"])
        ref = f"{PULL_REQUEST}{number}"
    commit = repository.add_commit(
        ref, header["summary"], request.user.name, changed, deleted, header.get("description", "")
    )
    address = f"{hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    answer = {
        "success": True,
        "commitOid": commit.oid,
        "commitUrl": f"{address}/commit/{commit.oid}",
        "hookOutput": "",
    }
    if number:
        answer["pullRequestUrl"] = f"{address}/discussions/{number}"
    return Generation(answer)


def _large_file(hub: Hub, path: str, sha256: str) -> File:
    """A file that came by LFS or by Xet before; in the second case its bytes are put together now."""
    xet_hash = None
    if sha256 in hub.cas.by_sha256:
        xet_hash = hub.cas.write_file(sha256, hub.store.blob(sha256))
    return hub.store.kept_file(path, sha256, xet_hash=xet_hash)


# Xet


@route("GET", _REPO + "/xet-(?P<access>read|write)-token/(?P<revision>[^/]+)")
def _xet_token(hub: Hub, request: Request, kind: str, repo_id: str, access: str, revision: str) -> Generation:
    write = access == "write" and request.query.get("create_pr") != "1"
    hub.repository(request, kind, repo_id, write=write)
    connection = hub.cas.connection()
    names = {"X-Xet-Access-Token": "accessToken", "X-Xet-Token-Expiration": "exp", "X-Xet-Cas-Url": "casUrl"}
    return Generation(connection, headers={name: str(connection[key]) for name, key in names.items()})


@route("POST", "/cas/v1/xorbs/default/(?P<xet_hash>[0-9a-f]{64})")
def _xorb_put(hub: Hub, request: Request, xet_hash: str) -> Generation:
    return Generation({"was_inserted": hub.cas.add_xorb(xet_hash, request.body)})


@route("POST", "/cas/v1/shards")
def _shard_put(hub: Hub, request: Request) -> Generation:
    if not hub.cas.add_shard(request.body):
        raise Refusal(400, "the shard names a xorb that never came")
    return Generation({"result": 1})


@route("GET", "/cas/v1/reconstructions/(?P<xet_hash>[0-9a-f]{64})")
def _reconstruction(hub: Hub, request: Request, xet_hash: str) -> Generation:
    if xet_hash not in hub.cas.by_xet_hash:
        raise Refusal(404, f"no file {xet_hash}")
    match = re.match(r"bytes=(\d+)-(\d+)$", request.headers.get("Range", ""))
    return Generation(hub.cas.reconstruction(xet_hash, (int(match[1]), int(match[2])) if match else None))


@route("GET", "/cas/xorbs/(?P<xet_hash>[0-9a-f]{64})")
def _xorb(hub: Hub, request: Request, xet_hash: str) -> Generation:
    return Generation(hub.cas.folder / xet_hash)


# Downloads


def _resolve(hub: Hub, request: Request, kind: str | None, repo_id: str, revision: str, path: str) -> Generation:
    commit = hub.repository(request, kind, repo_id).commit_of(revision)
    if path not in commit.files:
        raise Refusal(404, f"Entry not found: {path}", "EntryNotFound", commit=commit.oid)
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if not file.large:
        return Generation(hub.store.blob(file.sha256), headers=headers)
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if file.xet_hash:
        refresh = f"{hub.endpoint}/api/{kind or 'models'}/{repo_id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'}
    return Generation(b"", 302, {**headers, "Location": f"{hub.cdn}/{file.sha256}"})


for _method in ("GET", "HEAD"):
    route(_method, _GIT + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")(_resolve)


@route("GET", r"/cdn/(?P<sha256>[0-9a-f]{64})")
def _cdn(hub: Hub, request: Request, sha256: str) -> Generation:
    _refuse_token(request)
    return Generation(hub.store.blob(sha256), headers={"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})


# HTTP


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer of several parts waits 0.04 s for an acknowledgement
    hub: Hub

    def _serve(self) -> None:
        line = f"{self.command} {self.path}"
        body = self._read_body()
        fault = self.hub.fault_for(line)
        self.hub.requests.append(line)
        try:
            if fault and fault.status:
                self._send(Generation(fault.body, fault.status, fault.headers))
                return
            answer = self.hub.answer(self._request(body))
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message.replace("\n", " "), "X-Request-Id": "test"}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            if "commit" in refusal.more:
                headers["X-Repo-Commit"] = str(refusal.more.pop("commit"))
            answer = Generation({"error": refusal.message, **refusal.more}, refusal.status, headers)
        if fault and fault.drop:
            self.close_connection = True
            return
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _request(self, body: bytes) -> Request:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = [XET_TOKEN] if self.path.startswith("/cas/") else self.hub.tokens
        if token and token not in known:
            raise Refusal(401, "Invalid credentials in Authorization header")
        parts = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return Request(self.command, parts.path, query, self.headers, body, self.hub.tokens.get(token))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Generation) -> None:
        status, headers, content = answer.status, dict(answer.headers), answer.content
        if isinstance(content, Path):
            content, status = self._part(content.read_bytes(), headers)
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _part(self, content: bytes, headers: dict[str, str]) -> tuple[bytes, int]:
        """The bytes that the client wants, and the status that says whether they are all."""
        match = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        if not match:
            return content, 200
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if first > last:
            headers["Content-Range"] = f"bytes */{len(content)}"
            return b"", 416
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return content[first : last + 1], 206

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal; hub.requests has it."""
