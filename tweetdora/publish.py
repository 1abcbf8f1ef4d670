"""Push a built folder to the Hub: check first, commit once, read it back.

inspect_repo    before any work: check the token, its permissions, the name, and what the repository already holds
publish         one commit on top of the head that was found; if the Hub's reply is lost, check before retrying
read_back       compare every file by hash, and load the model itself from an empty cache
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

# What the Hub's client raises if a server refuses or cannot be reached; hf_xet raises the built-in ConnectionError.
HUB_ERRORS = (HTTPError, OSError)
WAITS = (1.0, 2.0, 4.0)  # seconds before each retry of a failed commit
# Statuses that are not worth retrying: the same request would fail again.
_FINAL = (400, 401, 403, 404, 413, 422)
# Files that an earlier publish may have left in a repository. The dangerous one is adapter_config.json at the root:
# transformers would load base and adapter instead of the merged model.
_OURS = re.compile(
    r"README\.md|model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors|chat_template\.jinja"
    r"|(config|generation_config|model\.safetensors\.index|adapter_config|tokenizer|tokenizer_config)\.json"
    r"|(special_tokens_map|added_tokens)\.json"  # of another tokenizer, whose special tokens would replace this one's
    r"|task\.json|\.eval_results/tweetdora\.yaml|Modelfile|onnx/model(_quantized)?\.onnx(_data)?"
    r"|adapter/adapter_(config\.json|model\.safetensors)|(plots|figures)/[^/]+\.png"
)
_OURS_IN_A_SPACE = re.compile(r"README\.md|app\.py|requirements\.txt|space\.json|tweetdora/[a-z_]+\.py")


@dataclass(frozen=True)
class HubRepo:
    """A repository as it was before the push."""

    repo_id: str
    exists: bool
    head: str | None = None  # the parent of the new commit
    files: tuple[str, ...] = ()
    revision: str | None = None  # branch; None for the default one
    create_pr: bool = False
    repo_type: Literal["model", "space"] = "model"
    private: bool = False
    tag: str | None = None  # the requested tag, if it is already on the head

    @property
    def address(self) -> str:
        """The path of the repository's page, relative to the Hub's address."""
        return f"spaces/{self.repo_id}" if self.repo_type == "space" else self.repo_id


def inspect_repo(repo_id: str, config: PushConfig, repo_type: Literal["model", "space"] = "model") -> HubRepo:
    """Look up the repository and check that the push would be accepted.

    Tag, branch and pull request apply to a model repository only.

    Raises:
        InputError: The name is invalid, or the flags contradict what the repository holds.
        HubError: There is no token, or it may not write.
    """
    flag = "--space" if repo_type == "space" else "--hub_model_id"
    if repo_type == "space":
        config = replace(config, tag=None, revision=None, create_pr=False)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{flag} {repo_id} is not a valid repository name: {error}") from error
    api = HfApi()
    user = _who_may_write(api)
    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
        refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        _check_new(repo_id, user, config, flag)
        return HubRepo(repo_id, exists=False, revision=config.revision, repo_type=repo_type)
    except HUB_ERRORS as error:
        raise HubError(f"the Hub could not be asked about {repo_id}: {_said(error)}") from error
    if config.private and not info.private:
        raise InputError(
            f"--private true, but {repo_id} is already public, and a push would not change that. Make it private in "
            f"its settings on the Hub first, or choose another {flag}."
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
        repo = _with_head(api, repo)  # otherwise, _make_repository creates the branch
    for tag in refs.tags:
        if tag.name == config.tag:
            if tag.target_commit != repo.head:
                raise InputError(_tag_is_there(config.tag, repo))
            repo = replace(repo, tag=config.tag)
    return repo


def _tag_is_there(tag: str, repo: HubRepo) -> str:
    return f"--tag {tag} already exists in {repo.repo_id}, on another commit. Choose another, or delete it on the Hub."


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
            f"the Hub rejected the token, or cannot be reached: {_said(error)}. Log in again with `hf auth "
            "login`, or build the folder with --dry_run true."
        ) from error
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"the Hub token of {user['name']} is read-only. Create one with write access at "
            f"{api.endpoint}/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )
    return user


def _check_new(repo_id: str, user: dict[str, Any], config: PushConfig, flag: str) -> None:
    if config.create_pr:
        raise InputError(
            f"--create_pr true, but {repo_id} does not exist on the Hub, or {user['name']} cannot see it."
        )
    owner = repo_id.split("/")[0]
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    if owner not in owners:
        raise InputError(
            f"{repo_id} does not exist, and {user['name']} cannot create it: {owner} is neither {user['name']} nor "
            f"one of their organisations{': ' + ', '.join(owners[1:]) if owners[1:] else ''}. Choose another {flag}."
        )


def check_kind(repo: HubRepo, adapter_only: bool) -> None:
    """Refuse to push an adapter over a whole model: anyone who loads it with AutoModel would get another model.

    Raises:
        InputError: The repository holds the weights of a whole model.
    """
    if adapter_only and {"model.safetensors", "model.safetensors.index.json"} & set(repo.files):
        raise InputError(
            f"--adapter_only true, but {repo.repo_id} holds a whole model. Choose a separate repository for the "
            "adapter with --hub_model_id."
        )


def check_metadata(metadata: str) -> None:
    """Have the Hub validate the card's metadata, since it refuses a commit with an invalid card.

    Raises:
        HubError: The metadata is invalid, or the Hub cannot be reached.
    """
    try:
        ModelCard(f"---\n{metadata}\n---\n").validate(repo_type="model")
    except ValueError as error:
        raise HubError(
            f"the Hub rejects the card's metadata: {_said(error)}. The metadata comes from the base model's card and "
            "the run's record; set the licence with --license."
        ) from error
    except HUB_ERRORS as error:
        raise HubError(f"the Hub could not validate the card's metadata: {_said(error)}.") from error


def check_free_space(folder: str, needed_bytes: int) -> None:
    """Check that the disk has space for the model and for the copy that is read back.

    Raises:
        ResourceError: It does not; the message names the folder, the free space and the space needed.
    """
    for place in dict.fromkeys([_nearest(folder), tempfile.gettempdir()]):
        free = shutil.disk_usage(place).free
        if free < needed_bytes:
            raise ResourceError(
                f"{place} has {free / 1e9:.1f} GB free, but the model needs {needed_bytes / 1e9:.1f} GB. "
                "Free disk space, or choose another --output_dir (TMPDIR for the copy that is read back)."
            )


def _nearest(folder: str) -> str:
    path = os.path.realpath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def publish(folder: str, repo: HubRepo, message: str, private: bool) -> Published:
    """Update the repository to the folder's files in one commit; files that others put there are left alone.

    Raises:
        HubError: Nothing was published, or it is unknown what the Hub holds; the message says which.
        InputError: The requested tag is on the head, and the head holds other files.
    """
    api = HfApi()
    names = sorted(
        os.path.relpath(os.path.join(root, name), folder) for root, _, files in os.walk(folder) for name in files
    )
    repo = _make_repository(api, repo, private)
    there, ours = set(repo.files) - set(names) - {".gitattributes"}, _OURS
    # Also a GGUF file with this name: it would hold other weights than those that are published now.
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
    """Create the repository and the branch if they are missing, and look up what they hold."""
    try:
        if not repo.exists:
            sdk = "gradio" if repo.repo_type == "space" else None
            api.create_repo(repo.repo_id, repo_type=repo.repo_type, private=private, exist_ok=True, space_sdk=sdk)
        if repo.revision is not None and repo.head is None:
            api.create_branch(repo.repo_id, branch=repo.revision, exist_ok=True)
    except HUB_ERRORS as error:
        raise HubError(f"{repo.repo_id} could not be created: {_said(error)}. Nothing was pushed to it.") from error
    return repo if repo.head is not None else _with_head(api, repo)


def _with_head(api: HfApi, repo: HubRepo) -> HubRepo:
    """Look up what the repository's branch holds now."""
    try:
        info: Any = api.repo_info(repo.repo_id, repo_type=repo.repo_type, revision=repo.revision)
    except HUB_ERRORS as error:
        raise HubError(
            f"the Hub could not be asked about {repo.repo_id}: {_said(error)}. Nothing was pushed to it."
        ) from error
    return replace(repo, exists=True, head=info.sha, files=tuple(file.rfilename for file in info.siblings or []))


@dataclass(frozen=True)
class _Landed:
    """A commit that is on the Hub."""

    commit: str
    pull_request: str | None = None


def _commit(
    api: HfApi, folder: str, repo: HubRepo, additions: list[CommitOperationAdd], removed: list[str], message: str
) -> _Landed:
    """Commit on top of the head that was found, and retry at most three times.

    After each failure, it checks the head first. The commit may have landed although the Hub's reply was lost, and a
    blind retry would commit twice.
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
        except ValueError as error:  # usually the Hub's validation of the card
            raise HubError(_nothing_published(repo, folder, f"the Hub rejects it: {_said(error)}")) from error
        except HUB_ERRORS as failure:
            status = getattr(getattr(failure, "response", None), "status_code", None)
            if status not in _FINAL and (landed := _after_failure(api, folder, repo, failure)):
                return landed
            if status in _FINAL or status == 412 or wait is None:
                raise HubError(_nothing_published(repo, folder, _said(failure))) from failure
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _after_failure(api: HfApi, folder: str, repo: HubRepo, failure: Exception) -> _Landed | None:
    """Return the commit if it landed although the Hub's reply was lost; None if the repository is unchanged.

    Raises:
        HubError: Someone else has committed in the meantime, or the Hub does not say.
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
            f"the Hub's reply to the commit was lost ({_said(failure)}), and the Hub does not say what it holds "
            f"({_said(error)}). Check {api.endpoint}/{repo.address}/commits, or run the same command again; it "
            f"commits nothing twice. The folder {folder} is complete."
        ) from error
    raise HubError(
        f"someone else committed {head[:8]} to {repo.repo_id} in the meantime, so nothing of yours was published. Run "
        f"the same command again to commit on top of it. The folder {folder} is complete."
    ) from failure


def differing_files(api: HfApi, folder: str, repo: HubRepo, revision: str) -> list[str]:
    """List the folder's files that the Hub lacks or holds with another hash at this revision."""
    found = api.verify_repo_checksums(repo.repo_id, repo_type=repo.repo_type, revision=revision, local_dir=folder)
    return sorted([*(mismatch["path"] for mismatch in found.mismatches), *found.extra_paths])


def _nothing_published(repo: HubRepo, folder: str, why: str) -> str:
    return f"pushing to {repo.repo_id} failed: {why}. Nothing was pushed to it. The folder {folder} is complete."


def _said(error: Exception) -> str:
    """Format an error as one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def add_tag(published: Published, tag: str) -> None:
    """Put a tag on the commit.

    Raises:
        HubError: The Hub refused; the commit stays.
    """
    try:
        HfApi().create_tag(published.repo_id, tag=tag, revision=published.commit)
    except HUB_ERRORS as error:
        raise HubError(
            f"{published.url} is published, but could not be tagged with --tag {tag}: {_said(error)}."
        ) from error


def read_back(published: Published, folder: str, reference: Reference, device: torch.device) -> ReadBack:
    """Compare the Hub's files with the folder's by hash, and the outputs of the model on the Hub with `reference`.

    Raises:
        VerificationError: Something differs.
        HubError: The repository could not be read.
    """
    try:
        check_files(published, HubRepo(published.repo_id, exists=True), folder)
        with tempfile.TemporaryDirectory() as cache:  # empty, so that every file comes from the Hub
            where = {"revision": published.revision, "cache_dir": cache}
            tokenizer, model = load_vanilla(published.repo_id, reference.adapter_only, device, **where)
    except HUB_ERRORS as error:
        raise HubError(
            f"{published.url} is published, but could not be read back: {_said(error)}. Run the same command again to "
            "check it; it commits nothing new."
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
            f"{published.url} gives different outputs from {folder}: {equal} of {count} answers are equal, and logits "
            f"differ by up to {difference:.3g}. Do not use it."
        )
    return ReadBack(**vars(check), files=sum(len(names) for _, _, names in os.walk(folder)))


def check_files(published: Published, repo: HubRepo, folder: str) -> None:
    """Compare the Hub's files with the folder's by hash.

    Raises:
        VerificationError: Something differs.
        HubError: The Hub could not be asked.
    """
    try:
        differing = differing_files(HfApi(), folder, repo, published.revision)
    except HUB_ERRORS as error:
        raise HubError(f"{published.url} is published, but could not be read back: {_said(error)}.") from error
    if differing:
        raise VerificationError(
            f"{published.url} does not match {folder}: {', '.join(differing)}. Do not use it; push again."
        )


def format_published(published: Published, seen: ReadBack) -> str:
    """Summarize what is on the Hub."""
    what = "Published" if published.changed else "Nothing to publish, the Hub already holds it"
    lines = [
        f"{what}: {published.url}",
        f"Read back from an empty cache: {seen.files} files match by hash, {format_check(seen)}",
    ]
    if published.pull_request:
        lines.append(f"Pull request: revision {published.pull_request}")
    if published.removed:
        lines.append(f"Removed files of an earlier publish: {', '.join(published.removed)}")
    if published.left_alone:
        lines.append(f"Left other files alone: {', '.join(published.left_alone)}")
    return "\n".join(lines)
