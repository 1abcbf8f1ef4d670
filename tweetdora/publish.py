"""The way of a built folder to the Hub: look first, commit once, read it back.

inspect_repo    before any work: token, rights, name, what is there already
publish         one commit on top of what was found; after a lost answer look, then decide
read_back       every file by its hash, and the model itself from an empty cache
"""

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from tweetdora.build import (
    MAX_LOGIT_DIFFERENCE,
    Reference,
    compare_outputs,
    format_check,
    load_vanilla,
    logits_and_generations,
)
from tweetdora.config import PushConfig
from tweetdora.errors import HubError, InputError, ResourceError, VerificationError
from tweetdora.records import Published, ReadBack

# What the Hub's client raises when a server refuses or is not reached; hf_xet raises the built-in ConnectionError.
HUB_ERRORS = (HTTPError, OSError)
WAITS = (1.0, 2.0, 4.0)  # seconds before a failed commit is tried again
# Statuses after which the same request can only fail again.
_FINAL = (400, 401, 403, 404, 413, 422)
# What a publish of ours may have left in a repository. Above all a root adapter_config.json: transformers would load
# base and adapter in place of the merged model.
_OURS = re.compile(
    r"README\.md|model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors|chat_template\.jinja"
    r"|(config|generation_config|model\.safetensors\.index|adapter_config|tokenizer|tokenizer_config)\.json"
    r"|task\.json|\.eval_results/tweetdora\.yaml|Modelfile|onnx/model(_quantized)?\.onnx(_data)?"
    r"|adapter/adapter_(config\.json|model\.safetensors)|(plots|figures)/[^/]+\.png"
)
_OURS_IN_A_SPACE = re.compile(r"README\.md|app\.py|requirements\.txt|space\.json|tweetdora/[a-z_]+\.py")


@dataclass(frozen=True)
class HubRepo:
    """A repository as it was found before the work began."""

    repo_id: str
    exists: bool
    head: str | None = None  # the commit that the new one goes on top of
    files: tuple[str, ...] = ()
    revision: str | None = None  # branch; None: the default one
    create_pr: bool = False
    repo_type: Literal["model", "space"] = "model"
    private: bool = False
    tag: str | None = None  # the one that is asked for, where the head has it already

    @property
    def address(self) -> str:
        """Where a browser finds it, behind the Hub's own address."""
        return f"spaces/{self.repo_id}" if self.repo_type == "space" else self.repo_id


def inspect_repo(repo_id: str, config: PushConfig, repo_type: Literal["model", "space"] = "model") -> HubRepo:
    """Look at the repository, and refuse what could not be pushed to it. Tag, branch and pull request are a model's.

    Raises:
        InputError: a name that is none, or a contradiction with what is there.
        HubError: no token, or one that may not write.
    """
    flag = "--space" if repo_type == "space" else "--hub_model_id"
    if repo_type == "space":
        config = replace(config, tag=None, revision=None, create_pr=False)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{flag} {repo_id} is no name of a repository: {error}") from error
    api = HfApi()
    user = _who_may_write(api)
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
        refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        _check_new(repo_id, user, config, flag)
        return HubRepo(repo_id, exists=False, revision=config.revision, repo_type=repo_type)
    except HUB_ERRORS as error:
        raise HubError(f"the Hub says of {repo_id}: {_said(error)}") from error
    if config.private and not info.private:
        raise InputError(
            f"--private true, but {repo_id} is public already, and a push would not change that. Make it private in "
            f"its settings on the Hub first, or give another {flag}."
        )
    if not config.create_pr:
        try:
            api.auth_check(repo_id, repo_type=repo_type, write=True)
        except HUB_ERRORS as error:
            raise HubError(
                f"{user['name']} may not write to {repo_id} ({_said(error)}). Push to a repository of your own with "
                f"{flag} {user['name']}/{repo_id.split('/')[1]}"
                f"{', or propose the files with --create_pr true' if repo_type == 'model' else ''}."
            ) from error
    repo = HubRepo(
        repo_id,
        exists=True,
        revision=config.revision,
        create_pr=config.create_pr,
        repo_type=repo_type,
        private=bool(info.private),
    )
    if config.revision is None or config.revision in [branch.name for branch in refs.branches]:
        repo = _with_head(api, repo)  # else _make_repository makes the branch
    for tag in refs.tags:
        if tag.name == config.tag:
            if tag.target_commit != repo.head:
                raise InputError(_tag_is_there(config.tag, repo))
            repo = replace(repo, tag=config.tag)
    return repo


def _tag_is_there(tag: str, repo: HubRepo) -> str:
    return f"--tag {tag} is there already in {repo.repo_id}, on another commit; give another, or delete it on the Hub."


def _who_may_write(api: HfApi) -> dict[str, Any]:
    if get_token() is None:
        raise HubError(
            "no Hub token: run `hf auth login` or set HF_TOKEN (a token with write access). "
            "--dry_run true builds and checks the folder without one."
        )
    try:
        user = api.whoami()
    except HUB_ERRORS as error:
        raise HubError(
            f"the Hub does not take the token, or cannot be reached: {_said(error)}. Log in again with `hf auth "
            "login`, or build the folder with --dry_run true."
        ) from error
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"the Hub token of {user['name']} may only read. Make one with write access at "
            f"{api.endpoint}/settings/tokens, then `hf auth login` or HF_TOKEN."
        )
    return user


def _check_new(repo_id: str, user: dict[str, Any], config: PushConfig, flag: str) -> None:
    if config.create_pr:
        raise InputError(f"--create_pr true, but there is no {repo_id} on the Hub that {user['name']} can see.")
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    if owner not in owners:
        raise InputError(
            f"{repo_id} does not exist, and {user['name']} cannot make it: {owner} is neither {user['name']} nor one "
            f"of their organisations{': ' + ', '.join(owners[1:]) if owners[1:] else ''}. Give another {flag}."
        )


def check_kind(repo: HubRepo, adapter_only: bool) -> None:
    """Refuse to put an adapter in a whole model's place: who loads that by AutoModel would get another model.

    Raises:
        InputError: the repository holds a model's weights.
    """
    if adapter_only and {"model.safetensors", "model.safetensors.index.json"} & set(repo.files):
        raise InputError(
            f"--adapter_only true, but {repo.repo_id} holds a whole model. Give the adapter a repository of its own "
            "with --hub_model_id."
        )


def check_metadata(metadata: str) -> None:
    """Let the Hub look at the card's metadata, which it would refuse the commit for otherwise.

    Raises:
        HubError: what the Hub's validator says.
    """
    try:
        ModelCard(f"---\n{metadata}\n---\n").validate(repo_type="model")
    except ValueError as error:
        raise HubError(
            f"the Hub refuses the card's metadata: {_said(error)}. It comes from the base model's card and the run's "
            "record; --license sets the licence."
        ) from error
    except HUB_ERRORS as error:
        raise HubError(f"the Hub could not be asked about the card's metadata: {_said(error)}.") from error


def check_free_space(folder: str, needed_bytes: int) -> None:
    """Refuse to begin where the model, or the copy of it that is read back, would not fit.

    Raises:
        ResourceError: names the folder, what is free and what is needed.
    """
    for place in dict.fromkeys([_nearest(folder), tempfile.gettempdir()]):
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            raise ResourceError(
                f"{place} has {free / 1e9:.1f} GB free, and {needed_bytes / 1e9:.1f} GB are needed for the model. "
                "Free disk space, or choose another --output_dir (TMPDIR for the copy that is read back)."
            )


def _nearest(folder: str) -> str:
    path = os.path.realpath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def publish(folder: str, repo: HubRepo, message: str, private: bool) -> Published:
    """Make the repository's files those of the folder in one commit; what others put there is left alone.

    Raises:
        HubError: nothing was published, or what is there is not known; it says which.
        InputError: the tag that is asked for is on the head, which holds other files.
    """
    api = HfApi()
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files
    )
    repo = _make_repository(api, repo, private)
    there, ours = set(repo.files) - set(names) - {".gitattributes"}, _OURS
    # A GGUF file of this name as well: it would be of other weights than those that are published now.
    own_gguf = re.compile(rf"{re.escape(repo.repo_id.rpartition('/')[2])}-(Q8_0|F16)\.gguf")
    if repo.repo_type == "space":
        ours = _OURS_IN_A_SPACE
    removed = sorted(name for name in there if ours.fullmatch(name) or own_gguf.fullmatch(name))
    if repo.tag and repo.head and (removed or differing_files(api, folder, repo, repo.head)):
        raise InputError(f"{_tag_is_there(repo.tag, repo)} The folder {folder} is complete.")
    additions = [CommitOperationAdd(name, os.path.join(folder, name)) for name in names]
    try:
        api.preupload_lfs_files(
            repo.repo_id,
            additions,
            repo_type=repo.repo_type,
            revision=repo.revision,
            create_pr=repo.create_pr,
            free_memory=False,
        )
    except (*HUB_ERRORS, RuntimeError, ValueError) as error:
        raise HubError(
            _nothing_published(repo, folder, f"uploading the large files failed: {_said(error)}")
        ) from error
    landed = _commit(api, folder, repo, additions, removed, message)
    return Published(
        repo_id=repo.repo_id,
        commit=landed.commit,
        url=f"{api.endpoint}/{repo.address}/commit/{landed.commit}",
        changed=landed.commit != repo.head,
        pull_request=landed.pull_request,
        removed=removed,
        left_alone=sorted(there - set(removed)),
    )


def _make_repository(api: HfApi, repo: HubRepo, private: bool) -> HubRepo:
    """The repository and the branch, made where they are missing; with what is in them."""
    try:
        if not repo.exists:
            sdk = "gradio" if repo.repo_type == "space" else None
            api.create_repo(repo.repo_id, repo_type=repo.repo_type, private=private, exist_ok=True, space_sdk=sdk)
        if repo.revision is not None and repo.head is None:
            api.create_branch(repo.repo_id, branch=repo.revision, exist_ok=True)
    except HUB_ERRORS as error:
        raise HubError(f"{repo.repo_id} could not be made: {_said(error)}. Nothing was pushed to it.") from error
    return repo if repo.head is not None else _with_head(api, repo)


def _with_head(api: HfApi, repo: HubRepo) -> HubRepo:
    """The repository with what its branch holds now."""
    try:
        info: Any = api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=repo.revision)
    except HUB_ERRORS as error:
        raise HubError(f"the Hub says of {repo.repo_id}: {_said(error)}. Nothing was pushed to it.") from error
    return replace(repo, exists=True, head=info.sha, files=tuple(file.rfilename for file in info.siblings or []))


@dataclass(frozen=True)
class _Landed:
    """A commit that is on the Hub."""

    commit: str
    pull_request: str | None = None


def _commit(
    api: HfApi, folder: str, repo: HubRepo, additions: list[CommitOperationAdd], removed: list[str], message: str
) -> _Landed:
    """Commit on top of the head that was found; after a failure look at the head before anything else is done.

    Four attempts at most. Asked a second time without looking, the Hub might hold the commit twice: an answer can be
    lost on its way back.
    """
    operations: list[Any] = [*additions, *(CommitOperationDelete(name, is_folder=False) for name in removed)]
    for wait in (*WAITS, None):
        try:
            done = api.create_commit(
                repo.repo_id,
                operations,
                commit_message=message,
                repo_type=repo.repo_type,
                revision=repo.revision,
                create_pr=repo.create_pr,
                parent_commit=repo.head,
            )
            return _Landed(done.oid, done.pr_revision)
        except ValueError as error:  # above all the Hub's own check of the card
            raise HubError(_nothing_published(repo, folder, f"the Hub refuses it: {_said(error)}")) from error
        except HUB_ERRORS as failure:
            status = getattr(getattr(failure, "response", None), "status_code", None)
            if status not in _FINAL and (landed := _after_failure(api, folder, repo, failure)):
                return landed
            if status in _FINAL or status == 412 or wait is None:
                raise HubError(_nothing_published(repo, folder, _said(failure))) from failure
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _after_failure(api: HfApi, folder: str, repo: HubRepo, failure: Exception) -> _Landed | None:
    """The commit if it landed although its answer was lost; None if the repository is as it was.

    Raises:
        HubError: someone else's commit is there, or the Hub does not say.
    """
    try:
        if repo.create_pr:
            refs = api.list_repo_refs(repo.repo_id, include_pull_requests=True).pull_requests or []
            for ref in reversed(refs):
                if not differing_files(api, folder, repo, ref.target_commit):
                    return _Landed(ref.target_commit, ref.ref)
            return None
        head = api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=repo.revision).sha or ""
        if head == repo.head:
            return None
        if not differing_files(api, folder, repo, head):
            return _Landed(head)
    except HUB_ERRORS as error:
        raise HubError(
            f"the answer to the commit was lost ({_said(failure)}), and the Hub does not say what it holds "
            f"({_said(error)}). Look at {api.endpoint}/{repo.address}/commits; the same command again commits "
            f"nothing twice. The folder {folder} is complete."
        ) from error
    raise HubError(
        f"someone else committed {head[:8]} to {repo.repo_id} in the meantime. Nothing of yours was published; the "
        f"same command again goes on top of it. The folder {folder} is complete."
    ) from failure


def differing_files(api: HfApi, folder: str, repo: HubRepo, revision: str) -> list[str]:
    """Files of the folder that the Hub does not hold byte for byte at that revision, by its own listing."""
    found = api.verify_repo_checksums(repo.repo_id, repo_type=repo.repo_type, revision=revision, local_dir=folder)
    return sorted([*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths])


def _nothing_published(repo: HubRepo, folder: str, why: str) -> str:
    return f"pushing to {repo.repo_id} failed: {why}. Nothing was pushed to it. The folder {folder} is complete."


def _said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def add_tag(published: Published, tag: str) -> None:
    """Put a tag on the commit.

    Raises:
        HubError: the Hub refused; the commit stays.
    """
    try:
        HfApi().create_tag(published.repo_id, tag=tag, revision=published.commit)
    except HUB_ERRORS as error:
        raise HubError(
            f"{published.url} is published, but --tag {tag} could not be put on it: {_said(error)}."
        ) from error


def read_back(published: Published, folder: str, reference: Reference, device: torch.device) -> ReadBack:
    """Compare what the Hub holds with the folder, file by file, and what anyone loads from it with the folder's model.

    Raises:
        VerificationError: something differs.
        HubError: it could not be read.
    """
    try:
        check_files(published, HubRepo(published.repo_id, exists=True), folder)
        with tempfile.TemporaryDirectory() as cache:  # empty, so that every file comes from the Hub
            where = {"revision": published.revision, "cache_dir": cache}
            tokenizer, model = load_vanilla(published.repo_id, reference.adapter_only, device, **where)
    except HUB_ERRORS as error:
        raise HubError(
            f"{published.url} is published, but could not be read back: {_said(error)}. The same command again "
            "commits nothing new and checks it."
        ) from error
    found = logits_and_generations(
        model,
        tokenizer,
        reference.prompt_tokenizer,
        reference.examples,
        reference.task,
        reference.max_new_tokens,
    )
    check = compare_outputs(reference.outputs, found)
    difference, equal, count = check.max_logit_difference, check.equal_generations, check.num_examples
    if equal < count or not difference <= MAX_LOGIT_DIFFERENCE:
        raise VerificationError(
            f"{published.url} does not answer as {folder} does: {equal} of {count} answers are equal, logits "
            f"differ by up to {difference:.3g}. Do not use it."
        )
    return ReadBack(**vars(check), files=sum(len(names) for _, _, names in os.walk(folder)))


def check_files(published: Published, repo: HubRepo, folder: str) -> None:
    """Compare what the Hub holds with the folder, file by file.

    Raises:
        VerificationError: something differs.
    """
    try:
        differing = differing_files(HfApi(), folder, repo, published.revision)
    except HUB_ERRORS as error:
        raise HubError(f"{published.url} is published, but could not be read back: {_said(error)}.") from error
    if differing:
        raise VerificationError(
            f"{published.url} does not hold what {folder} does: {', '.join(differing)}. Do not use it; push again."
        )


def format_published(published: Published, seen: ReadBack) -> str:
    """What is on the Hub, in lines for a person."""
    what = "Published" if published.changed else "Nothing to publish, it is there already"
    lines = [
        f"{what}: {published.url}",
        f"Read back from an empty cache: {seen.files} files equal by hash, {format_check(seen)}",
    ]
    if published.pull_request:
        lines.append(f"Pull request: revision {published.pull_request}")
    if published.removed:
        lines.append(f"Removed, from an earlier publish: {', '.join(published.removed)}")
    if published.left_alone:
        lines.append(f"Left alone, not ours: {', '.join(published.left_alone)}")
    return "\n".join(lines)
