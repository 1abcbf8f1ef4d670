"""Weights & Biases: one run per training, offline when there is no login, never a prompt."""

import netrc
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import wandb

from tweetdora.data import Rows
from tweetdora.generation import UNPARSED, Answer

UNPARSED_NAME = "unparsed"
# How long a server that does not answer may keep a training from its start, and its end from being told.
_INIT_SECONDS, _FINISH_SECONDS = 30.0, 60.0
SAMPLE_ROWS = 50  # rows of the table of sample answers


def wandb_mode() -> tuple[str, str]:
    """online, offline, shared or disabled, and the reason; WANDB_MODE decides, else whether there is a login."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode, "WANDB_MODE says so"
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online", "the environment holds a W&B login"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        login = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        if login is not None and login[2]:
            return "online", f"there is a login for {host}"
    except (OSError, netrc.NetrcParseError):
        pass  # no readable netrc file is no login
    return "offline", "no W&B login was found (wandb login, or WANDB_API_KEY)"


def start_wandb(
    run_dir: str, name: str, config: dict[str, Any], tracker: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Open the W&B run that the Trainer's callback then uses.

    `tracker`, what an earlier call returned, continues that run where it lies, whatever the environment says now.

    A server that cannot be reached stops no training: the run is kept offline then, and a line says so.

    Returns what the run's record keeps: id, mode, address (None offline), project, and entity (None: the user's own).
    """
    mode, _ = wandb_mode()
    tracker = tracker or {}
    settings = {
        "project": tracker.get("project") or os.environ.get("WANDB_PROJECT", "tweetdora"),
        "entity": tracker.get("entity"),
        "name": name,
        "dir": run_dir,
        "id": tracker.get("id"),
        "resume": "allow" if tracker else None,
        "config": config,
        "settings": wandb.Settings(
            silent=True, init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS, finish_timeout_raises=True
        ),
    }
    try:
        run = wandb.init(mode=mode, **settings)
    except wandb.Error as error:
        if mode == "offline":
            raise
        reason = " ".join(str(error).split())[:200]
        wandb.teardown()  # its service holds the id of the run that it could not begin
        mode, run = "offline", wandb.init(mode="offline", **settings)
        print(f"note: W&B does not take the run ({reason}). It is kept here; {_sync(run)} sends it.")
    url = run.url if mode == "online" else None
    return {"id": run.id, "mode": mode, "url": url, "project": run.project, "entity": run.entity or None}


def log_answers(prefix: str, rows: Rows, answers: Sequence[Answer], label_words: Sequence[str], step: int) -> None:
    """Log a confusion matrix and a table of the first answers to the open W&B run."""
    names = [*label_words, UNPARSED_NAME]
    predictions = [len(label_words) if answer.predicted == UNPARSED else answer.predicted for answer in answers]
    table = wandb.Table(columns=["row", "text", "label", "answer", "predicted", "stopped"])
    shown = list(zip(rows.ids, rows.texts, rows.classes, answers, predictions, strict=True))[:SAMPLE_ROWS]
    for row_id, text, label, answer, predicted in shown:
        table.add_data(row_id, text, label_words[label], answer.text, names[predicted], answer.stopped)
    matrix = wandb.plot.confusion_matrix(
        y_true=rows.classes, preds=predictions, class_names=names, title=f"{prefix}, step {step}"
    )
    wandb.log({f"{prefix}/confusion_matrix": matrix, f"{prefix}/answers": table, "train/global_step": step})


def finish_wandb(summary: dict[str, Any] | None = None, exit_code: int = 0) -> None:
    """Close the open W&B run, if there is one."""
    if wandb.run is None:
        return
    run = wandb.run
    run.summary.update(summary or {})
    try:
        wandb.finish(exit_code=exit_code)
    except TimeoutError:
        waited = f"{_FINISH_SECONDS:.0f} s"
        print(f"note: W&B did not take all of the run in {waited}. It is whole here; {_sync(run)} sends it.")


def _sync(run: Any) -> str:
    return f"`wandb sync {run.settings.sync_dir}`"
