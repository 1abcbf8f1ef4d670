"""The Hugging Face Hub before anything is loaded from it: whether it answers, and which commit a revision is."""

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
    """Put the Hub's libraries in offline mode if one of `names` is no local path and the Hub does not answer.

    Left to themselves they try each file six times over 23 seconds. Offline, what is in the cache is used, and what is
    not is an error at once. It is the mode that HF_HUB_OFFLINE=1 asks for; the libraries read that variable when they
    are imported, so here the values they made of it are set.
    """
    if constants.HF_HUB_OFFLINE or all(os.path.exists(name) for name in names) or _reachable():
        return
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    log.warning("note: %s cannot be reached; only what is cached here can be used", constants.ENDPOINT)


def _reachable() -> bool:
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return True  # the proxy's business; the libraries find out
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def pin_revision(name: str, revision: str | None, repo_type: str = "model") -> str | None:
    """The commit that a revision of a repository on the Hub is at this moment; None for a local path.

    Everything that is loaded is to be of one commit, which the record names: neither transformers 5 nor datasets 5
    says which one it loaded. So a script asks once, at its top, and loads everything by what it was told. What the Hub
    does not know, or cannot be asked, stays as it is; loading it says so.
    """
    if os.path.exists(name):
        return None
    if name.count("/") != 1:
        return revision
    try:
        return HfApi().resolve_revision(name, revision=revision, repo_type=repo_type).resolved
    except (RevisionResolutionError, HTTPError, OSError, ValueError):  # the last: a name that cannot be one
        return revision
