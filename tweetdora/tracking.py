"""Weights & Biases: one run per training, offline if there is no login, and never a login prompt."""

import configparser
import contextlib
import logging
import netrc
import os
import sys
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from transformers.utils import ENV_VARS_TRUE_VALUES

from tweetdora.data import Examples
from tweetdora.errors import InputError
from tweetdora.generation import UNPARSED, Generation
from tweetdora.records import TrackerRecord

log = logging.getLogger(__name__)
_MODES = ("online", "offline", "disabled", "shared")
_OTHER_NAMES = {"dryrun": "offline", "run": "online"}  # W&B's former names
UNPARSED_NAME = "unparsed"
# How long an unresponsive server may delay the start of a training, and the upload of its end.
_INIT_SECONDS, _FINISH_SECONDS = 30.0, 60.0
SAMPLE_ROWS = 50  # rows of the table of generations


def wandb_mode() -> tuple[str, str]:
    """Return online, offline, shared or disabled, and the reason: the environment, or whether a login exists.

    Raises:
        InputError: WANDB_MODE is not a mode of W&B.
    """
    if is_wandb_disabled():
        return "disabled", "WANDB_DISABLED is set"
    if mode := os.environ.get("WANDB_MODE"):
        mode = _OTHER_NAMES.get(mode, mode)
        if mode not in _MODES:
            raise InputError(f"WANDB_MODE is {mode!r}; expected one of {', '.join(_MODES)}, or leave it unset.")
        return mode, "WANDB_MODE is set"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online", "the environment holds a W&B login"
    host = urlsplit(_wandb_server()).netloc  # with its port, as W&B writes it
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        if login is not None and login[2]:
            return "online", f"there is a login for {host}"
    except (OSError, netrc.NetrcParseError):
        pass  # without a readable netrc file there is no login
    return "offline", "no W&B login was found (wandb login, or WANDB_API_KEY)"


def _wandb_server() -> str:
    """The server's address: from the environment, or as `wandb login --host` has stored it."""
    if found := os.environ.get("WANDB_BASE_URL"):
        return found
    folder = os.environ.get("WANDB_CONFIG_DIR", os.path.join(os.path.expanduser("~"), ".config", "wandb"))
    stored = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        stored.read(os.path.join(folder, "settings"), encoding="utf-8")
    return stored.get("default", "base_url", fallback="https://api.wandb.ai")


def is_wandb_disabled() -> bool:
    """True if the user has disabled W&B through WANDB_DISABLED, transformers' own variable."""
    return os.environ.get("WANDB_DISABLED", "").upper() in ENV_VARS_TRUE_VALUES


def start_wandb(
    run_dir: str, name: str, config: dict[str, Any], tracker: TrackerRecord | None = None
) -> TrackerRecord:
    """Open the W&B run that the Trainer's callback then uses.

    `tracker`, the result of an earlier call, continues that run in its own project, whatever the environment says now.

    If the server cannot be reached, training continues: the run is stored offline, and a warning is logged.
    """
    import wandb  # takes a second, which evaluate.py and predict.py need not wait for

    mode, _ = wandb_mode()
    settings: dict[str, Any] = {
        "project": tracker.project if tracker else os.environ.get("WANDB_PROJECT", "tweetdora"),
        "entity": tracker.entity if tracker else None,
        "name": name,
        "dir": run_dir,
        "id": tracker.id if tracker else None,
        "resume": "allow" if tracker else None,
        "config": config,
        "settings": wandb.Settings(
            silent=True, init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
        ),
    }
    try:
        run = wandb.init(mode=cast(Any, mode), **settings)  # overrides WANDB_MODE
    except wandb.Error as error:
        if mode == "offline":
            raise
        reason = " ".join(str(error).split())[:200]
        wandb.teardown()  # its service still holds the id of the run that it could not start
        mode, run = "offline", wandb.init(mode="offline", **settings)
        log.warning(
            "note: W&B cannot start the run (%s). It is stored locally; upload it with %s.", reason, _sync(run)
        )
    url = run.url if mode == "online" else None
    if mode == "disabled" and tracker is not None:
        return tracker  # it can be gone on with later
    # A disabled run has a made-up entity, which a later session would ask the server for.
    entity = None if mode == "disabled" else run.entity or None
    return TrackerRecord(id=run.id, mode=mode, url=url, project=run.project, entity=entity)


def open_run() -> Any:
    """The open W&B run; None if there is none."""
    wandb = sys.modules.get("wandb")
    return wandb.run if wandb is not None else None


def log_generations(
    prefix: str, examples: Examples, generations: Sequence[Generation], label_words: Sequence[str], step: int
) -> None:
    """Log a confusion matrix and a table of the first generations to the open W&B run."""
    import wandb

    names = [*label_words, UNPARSED_NAME]
    predictions = [len(label_words) if found.predicted == UNPARSED else found.predicted for found in generations]
    table = wandb.Table(columns=["example_id", "text", "label", "generation", "predicted", "stopped"])
    ids, texts, labels = examples.example_ids, examples.texts, examples.labels
    shown = list(zip(ids, texts, labels, generations, predictions, strict=True))[:SAMPLE_ROWS]
    for example_id, text, label, found, predicted in shown:
        table.add_data(example_id, text, label_words[label], found.text, names[predicted], found.stopped)
    matrix = wandb.plot.confusion_matrix(
        y_true=labels, preds=predictions, class_names=names, title=f"{prefix}, step {step}"
    )
    wandb.log({f"{prefix}/confusion_matrix": matrix, f"{prefix}/generations": table, "train/global_step": step})


def finish_wandb(summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
    """Close the open W&B run, if any."""
    if (run := open_run()) is None:
        return
    run.summary.update(summary or {})
    try:
        run.finish(exit_code=exit_code)
    except TimeoutError:
        waited = f"{_FINISH_SECONDS:.0f} s"
        log.warning(
            "note: W&B did not upload the whole run in %s. It is complete locally; upload it with %s.",
            waited,
            _sync(run),
        )


def _sync(run: Any) -> str:
    return f"`wandb sync {run.settings.sync_dir}`"
