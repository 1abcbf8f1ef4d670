"""Check whether the Hugging Face Hub can be reached, and resolve revisions to commits."""

import logging
import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets.config
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError, RevisionResolutionError

_TIMEOUT_SECONDS = 3.0
log = logging.getLogger(__name__)


def use_cache_if_unreachable(*names: str) -> None:
    """Switch the Hub's libraries to offline mode if one of `names` is not a local path and the Hub does not answer.

    By default they retry each file six times over 23 seconds. In offline mode they use the cache, and fail at once for
    anything else. This is the mode of HF_HUB_OFFLINE=1. The libraries read that variable on import, so the values
    derived from it are set here.
    """
    if constants.HF_HUB_OFFLINE or all(os.path.exists(name) for name in names) or _reachable():
        return
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    log.warning("note: %s cannot be reached; using the local cache only", constants.ENDPOINT)


def _reachable() -> bool:
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return True  # up to the proxy; the libraries will find out
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def pin_revision(name: str, revision: str | None, repo_type: str = "model") -> str | None:
    """Return the current commit of a repository's revision on the Hub; None for a local path.

    Everything should be loaded from one commit, which the record names, but neither transformers 5 nor datasets 5
    reports the commit that it loaded. So a script asks once, at the start, and loads everything by that commit. If the
    Hub does not know the revision or cannot be asked, it is returned unchanged, and loading it reports the error.
    """
    if os.path.exists(name):
        return None
    if name.count("/") != 1:
        return revision
    try:
        return HfApi().resolve_revision(name, revision=revision, repo_type=repo_type).resolved
    except (RevisionResolutionError, HTTPError, OSError, ValueError):  # ValueError: an invalid name
        return revision
