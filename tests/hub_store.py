"""What the test Hub holds: repositories with their commits, and the files' bytes on disk. HTTP is hub_server.py's."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

BRANCH, TAG, PULL_REQUEST = "refs/heads/", "refs/tags/", "refs/pr/"


class Refusal(Exception):
    """What the Hub answers instead: a status, the code that the client goes by, and words for people."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass(frozen=True)
class File:
    """A file of a commit; `oid` is git's, of the content or of the pointer that git keeps in place of a large file."""

    path: str
    size: int
    sha256: str
    oid: str
    large: bool
    xet_hash: str | None = None


@dataclass(frozen=True)
class Commit:
    """One state of a repository, by path."""

    oid: str
    title: str
    message: str
    author: str
    date: str
    parent: str | None
    files: Mapping[str, File]


@dataclass
class Repository:
    """Commits, and what points to them: branches, tags and pull requests."""

    kind: str  # models or datasets, as in the addresses
    id: str  # owner/name
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)  # number and title

    def commit_of(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a pull request (refs/pr/1) or an object id."""
        for name in (revision, BRANCH + revision, TAG + revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> Iterable[Commit]:
        """Commits of a revision, newest first."""
        commit: Commit | None = self.commit_of(revision)
        while commit is not None:
            yield commit
            commit = self.commits[commit.parent] if commit.parent else None

    def add_commit(
        self, ref: str, title: str, author: str, changed: Iterable[File] = (), deleted: Iterable[str] = (), message=""
    ) -> Commit:
        """A commit on top of `ref`; a deleted path that ends in / takes all that is below it."""
        parent = self.commits.get(self.refs.get(ref, ""))
        files = dict(parent.files) if parent else {}
        for path in deleted:
            gone = [name for name in files if name == path or path.endswith("/") and name.startswith(path)]
            if not gone:
                raise Refusal(400, f"{path} does not exist")
            for name in gone:
                del files[name]
        files |= {file.path: file for file in changed}
        date = now()
        content = repr((parent.oid if parent else None, title, message, author, date, sorted(files.items())))
        oid = hashlib.sha1(f"{content}{len(self.commits)}".encode()).hexdigest()
        commit = Commit(oid, title, message, author, date, parent.oid if parent else None, files)
        self.commits[oid] = commit
        self.refs[ref] = oid
        return commit

    def squash(self, ref: str, message: str) -> None:
        """Make the history of `ref` one commit."""
        last = self.commits[self.refs[ref]]
        oid = hashlib.sha1((last.oid + message).encode()).hexdigest()
        self.commits[oid] = replace(last, oid=oid, title=message, parent=None)
        self.refs[ref] = oid


class Store:
    """All repositories, and a folder with the bytes of all files by their SHA-256."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[tuple[str, str], Repository] = {}
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repository:
        """A new repository, whose first commit is the Hub's own, as on the real one."""
        repository = Repository(kind, repo_id, private)
        attributes = self.add_bytes(".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        repository.add_commit(BRANCH + "main", "initial commit", "system", [attributes])
        self.repositories[kind, repo_id] = repository
        return repository

    def upload(self, kind: str, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> Repository:
        """A repository that is there before a test begins."""
        repository = self.repositories.get((kind, repo_id)) or self.create(kind, repo_id, private)
        added = [self.add_bytes(path, content, is_large(path, len(content))) for path, content in files.items()]
        repository.add_commit(BRANCH + "main", "Upload", repo_id.split("/")[0], added)
        return repository

    def blob(self, sha256: str) -> Path:
        """Where the bytes of a file are, or will be."""
        return self.folder / "blobs" / sha256

    def add_bytes(self, path: str, content: bytes, large: bool = False) -> File:
        """Keep a file's bytes."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.blob(sha256).write_bytes(content)
        return (
            self.kept_file(path, sha256, large) if large else File(path, len(content), sha256, git_oid(content), False)
        )

    def kept_file(self, path: str, sha256: str, large: bool = True, xet_hash: str | None = None) -> File:
        """A large file whose bytes have arrived before."""
        if not self.blob(sha256).is_file():
            raise Refusal(400, f"the bytes of {path} ({sha256}) never arrived")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
        return File(path, size, sha256, git_oid(pointer.encode()), large, xet_hash)


def git_oid(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    """Whether a file goes by LFS or Xet and not inside the commit: the Hub's own rule is not public."""
    return path.endswith(".safetensors") or size > 10_000_000


def now() -> str:
    """This moment as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
