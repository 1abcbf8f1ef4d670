"""The way of a built folder to the Hub: look first, commit once, read it back.

find_target     before any work: token, rights, name, what is there already
publish         one commit on top of what was found; after a lost answer look, then decide
read_back       every file by its hash, and the model itself from an empty cache
"""

import os
import re
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from tweetdora.build import MAX_LOGIT_DIFFERENCE, Reference, differences, load_as_anyone, observe
from tweetdora.config import PushConfig
from tweetdora.errors import InputError

# What the Hub's client raises when a server refuses or is not reached; hf_xet raises the built-in ConnectionError.
HUB_ERRORS = (HTTPError, OSError)
WAITS = (1.0, 2.0, 4.0, 0.0)  # seconds after each failed attempt to commit
# Statuses after which the same request can only fail again.
_FINAL = (400, 401, 403, 404, 413, 422)
# What a publish of ours may have left in a repository. Above all a root adapter_config.json: transformers would load
# base and adapter in place of the merged model.
_OURS = re.compile(
    r"README\.md|model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors|chat_template\.jinja"
    r"|(config|generation_config|model\.safetensors\.index|adapter_config|tokenizer|tokenizer_config)\.json"
    r"|adapter/adapter_(config\.json|model\.safetensors)|figures/[^/]+\.png"
)


@dataclass(frozen=True)
class Target:
    """A repository as it was found before the work began."""

    repo_id: str
    exists: bool
    head: str | None = None  # the commit that the new one goes on top of
    files: tuple[str, ...] = ()
    revision: str | None = None  # branch; None: the default one
    create_pr: bool = False


@dataclass
class Published:
    """What the Hub holds now."""

    repo_id: str
    commit: str
    url: str
    changed: bool  # False: it held these files already
    pull_request: str | None = None
    removed: list[str] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)

    @property
    def revision(self) -> str:
        """Under what it can be read: a pull request's commit is reached by its own name."""
        return self.pull_request or self.commit

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)


def find_target(repo_id: str, config: PushConfig) -> Target:
    """Look at the repository, and refuse what could not be pushed to it.

    Raises:
        InputError: no token, one that may not write, a name that is none, or a contradiction with what is there.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {repo_id} is no name of a repository: {error}") from error
    api = HfApi()
    user = _who_may_write(api)
    try:
        info = api.model_info(repo_id)
        refs = api.list_repo_refs(repo_id)
    except RepositoryNotFoundError:
        _check_new(repo_id, user, config)
        return Target(repo_id, exists=False, revision=config.revision)
    except HUB_ERRORS as error:
        raise InputError(f"the Hub says of {repo_id}: {_said(error)}") from error
    if config.private and not info.private:
        raise InputError(
            f"--private true, but {repo_id} is public already, and a push would not change that. Make it private in "
            "its settings on the Hub first, or give another --hub_model_id."
        )
    if not config.create_pr:
        try:
            api.auth_check(repo_id, write=True)
        except HUB_ERRORS as error:
            raise InputError(
                f"{user['name']} may not write to {repo_id} ({_said(error)}). Push to a repository of your own with "
                f"--hub_model_id {user['name']}/{repo_id.split('/')[1]}, or propose the files with --create_pr true."
            ) from error
    if config.tag in [tag.name for tag in refs.tags]:
        raise InputError(f"--tag {config.tag} is there already in {repo_id}; give another, or delete it on the Hub.")
    target = Target(repo_id, exists=True, revision=config.revision, create_pr=config.create_pr)
    if config.revision is not None and config.revision not in [branch.name for branch in refs.branches]:
        return target  # _make_repository makes the branch
    return _with_head(api, target)


def _who_may_write(api: HfApi) -> dict[str, Any]:
    if get_token() is None:
        raise InputError(
            "no Hub token: run `hf auth login` or set HF_TOKEN (a token with write access). "
            "--dry_run true builds and checks the folder without one."
        )
    try:
        user = api.whoami()
    except HUB_ERRORS as error:
        raise InputError(
            f"the Hub does not take the token, or cannot be reached: {_said(error)}. Log in again with `hf auth "
            "login`, or build the folder with --dry_run true."
        ) from error
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            f"the Hub token of {user['name']} may only read. Make one with write access at "
            f"{api.endpoint}/settings/tokens, then `hf auth login` or HF_TOKEN."
        )
    return user


def _check_new(repo_id: str, user: dict[str, Any], config: PushConfig) -> None:
    if config.create_pr:
        raise InputError(f"--create_pr true, but there is no {repo_id} on the Hub that {user['name']} can see.")
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    if owner not in owners:
        raise InputError(
            f"{repo_id} does not exist, and {user['name']} cannot make it: {owner} is neither {user['name']} nor one "
            f"of their organisations{': ' + ', '.join(owners[1:]) if owners[1:] else ''}. Give another --hub_model_id."
        )


def check_kind(target: Target, adapter_only: bool) -> None:
    """Refuse to put an adapter in a whole model's place: who loads that by AutoModel would get another model.

    Raises:
        InputError: the repository holds a model's weights.
    """
    if adapter_only and {"model.safetensors", "model.safetensors.index.json"} & set(target.files):
        raise InputError(
            f"--adapter_only true, but {target.repo_id} holds a whole model. Give the adapter a repository of its own "
            "with --hub_model_id."
        )


def check_metadata(metadata: str) -> None:
    """Let the Hub look at the card's metadata, which it would refuse the commit for otherwise.

    Raises:
        InputError: what the Hub's validator says.
    """
    try:
        ModelCard(f"---\n{metadata}\n---\n").validate(repo_type="model")
    except ValueError as error:
        raise InputError(
            f"the Hub refuses the card's metadata: {_said(error)}. It comes from the base model's card and the run's "
            "record; --license sets the licence."
        ) from error
    except HUB_ERRORS as error:
        raise InputError(f"the Hub could not be asked about the card's metadata: {_said(error)}.") from error


def check_free_space(folder: str, needed_bytes: int) -> None:
    """Refuse to begin where the model, or the copy of it that is read back, would not fit.

    Raises:
        InputError: names the folder, what is free and what is needed.
    """
    for place in dict.fromkeys([_nearest(folder), tempfile.gettempdir()]):
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            raise InputError(
                f"{place} has {free / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB are needed for the model. "
                "Make room, or choose another --output_dir (TMPDIR for what is read back)."
            )


def _nearest(folder: str) -> str:
    path = os.path.realpath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def publish(folder: str, target: Target, message: str, private: bool) -> Published:
    """Make the repository's files those of the folder in one commit; what others put there is left alone.

    Raises:
        InputError: nothing was published, or what is there is not known; it says which.
    """
    api = HfApi()
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files
    )
    target = _make_repository(api, target, private)
    there = set(target.files) - set(names) - {".gitattributes"}
    removed = sorted(name for name in there if _OURS.fullmatch(name))
    additions = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
    try:
        api.preupload_lfs_files(
            target.repo_id, additions, revision=target.revision, create_pr=target.create_pr, free_memory=False
        )
    except (*HUB_ERRORS, RuntimeError, ValueError) as error:
        raise InputError(
            _nothing_published(target, folder, f"uploading the large files failed: {_said(error)}")
        ) from error
    info = _commit(api, folder, target, additions, removed, message)
    return Published(
        repo_id=target.repo_id,
        commit=info["commit"],
        url=f"{api.endpoint}/{target.repo_id}/commit/{info['commit']}",
        changed=info["commit"] != target.head,
        pull_request=info.get("pull_request"),
        removed=removed,
        left_alone=sorted(there - set(removed)),
    )


def _make_repository(api: HfApi, target: Target, private: bool) -> Target:
    """The repository and the branch, made where they are missing; with what is in them."""
    try:
        if not target.exists:
            api.create_repo(target.repo_id, private=private, exist_ok=True)
        if target.revision is not None and target.head is None:
            api.create_branch(target.repo_id, branch=target.revision, exist_ok=True)
    except HUB_ERRORS as error:
        raise InputError(f"{target.repo_id} could not be made: {_said(error)}. Nothing was published.") from error
    return target if target.head is not None else _with_head(api, target)


def _with_head(api: HfApi, target: Target) -> Target:
    """The target with what its branch holds now."""
    try:
        info = api.model_info(target.repo_id, revision=target.revision)
    except HUB_ERRORS as error:
        raise InputError(f"the Hub says of {target.repo_id}: {_said(error)}. Nothing was published.") from error
    return replace(target, exists=True, head=info.sha, files=tuple(file.rfilename for file in info.siblings or []))


def _commit(
    api: HfApi, folder: str, target: Target, additions: list[CommitOperationAdd], removed: list[str], message: str
) -> dict[str, Any]:
    """Commit on top of the head that was found; after a failure look at the head before anything else is done."""
    operations = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in removed)]
    for wait in WAITS:
        try:
            done = api.create_commit(
                target.repo_id,
                operations,
                commit_message=message,
                revision=target.revision,
                create_pr=target.create_pr,
                parent_commit=target.head,
            )
            return {"commit": done.oid, "pull_request": done.pr_revision}
        except ValueError as error:  # above all the Hub's own check of the card
            raise InputError(_nothing_published(target, folder, f"the Hub refuses it: {_said(error)}")) from error
        except HUB_ERRORS as error:
            failure = error
        status = getattr(getattr(failure, "response", None), "status_code", None)
        if status in _FINAL:
            break
        if landed := _after_failure(api, folder, target, failure):
            return landed
        if status == 412:
            break
        time.sleep(wait)
    raise InputError(_nothing_published(target, folder, _said(failure))) from failure


def _after_failure(api: HfApi, folder: str, target: Target, failure: Exception) -> dict[str, Any] | None:
    """The commit if it landed although its answer was lost; None if the repository is as it was.

    Raises:
        InputError: someone else's commit is there, or the Hub does not say.
    """
    try:
        if target.create_pr:
            refs = api.list_repo_refs(target.repo_id, include_pull_requests=True).pull_requests or []
            for ref in reversed(refs):
                if not differing_files(api, folder, target.repo_id, ref.target_commit):
                    return {"commit": ref.target_commit, "pull_request": ref.ref}
            return None
        head = api.model_info(target.repo_id, revision=target.revision).sha
        if head == target.head:
            return None
        if not differing_files(api, folder, target.repo_id, head):
            return {"commit": head}
    except HUB_ERRORS as error:
        raise InputError(
            f"the answer to the commit was lost ({_said(failure)}), and the Hub does not say what it holds "
            f"({_said(error)}). Look at {api.endpoint}/{target.repo_id}/commits; the same command again commits "
            f"nothing twice. The folder {folder} is complete."
        ) from error
    raise InputError(
        f"someone else committed {head[:8]} to {target.repo_id} in the meantime. Nothing of yours was published; the "
        f"same command again goes on top of it. The folder {folder} is complete."
    ) from failure


def differing_files(api: HfApi, folder: str, repo_id: str, revision: str) -> list[str]:
    """Files of the folder that the Hub does not hold byte for byte at that revision, by its own listing."""
    found = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    return sorted([*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths])


def _nothing_published(target: Target, folder: str, why: str) -> str:
    return f"pushing to {target.repo_id} failed: {why}. Nothing was published. The folder {folder} is complete."


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def add_tag(published: Published, tag: str) -> None:
    """Put a tag on the commit.

    Raises:
        InputError: the Hub refused; the commit stays.
    """
    try:
        HfApi().create_tag(published.repo_id, tag=tag, revision=published.commit)
    except HUB_ERRORS as error:
        raise InputError(
            f"{published.url} is published, but --tag {tag} could not be put on it: {_said(error)}."
        ) from error


def read_back(published: Published, folder: str, reference: Reference, device: torch.device) -> dict[str, Any]:
    """Compare what the Hub holds with the folder, file by file, and what anyone loads from it with the folder's model.

    Raises:
        InputError: something differs, or it could not be read.
    """
    api = HfApi()
    try:
        differing = differing_files(api, folder, published.repo_id, published.revision)
        if differing:
            raise InputError(
                f"{published.url} does not hold what {folder} does: {', '.join(differing)}. Do not use it; push again."
            )
        with tempfile.TemporaryDirectory() as cache:  # empty, so that every file comes from the Hub
            where = {"revision": published.revision, "cache_dir": cache}
            tokenizer, model = load_as_anyone(published.repo_id, reference.adapter_only, device, **where)
    except HUB_ERRORS as error:
        raise InputError(
            f"{published.url} is published, but could not be read back: {_said(error)}. The same command again "
            "commits nothing new and checks it."
        ) from error
    task, rows = reference.task, reference.rows
    logits, answers = observe(model, tokenizer, reference.encoder, rows, task, reference.max_new_tokens)
    difference, equal = differences(reference.found, (logits, answers))
    if equal < len(answers) or not difference <= MAX_LOGIT_DIFFERENCE:
        raise InputError(
            f"{published.url} does not answer as {folder} does: {equal} of {len(answers)} answers are equal, logits "
            f"differ by up to {difference:.3g}. Do not use it."
        )
    files = sum(len(names) for _, _, names in os.walk(folder))
    return {"files": files, "rows": len(answers), "equal_answers": equal, "max_logit_difference": difference}
