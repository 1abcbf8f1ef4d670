"""The commands of an installed tweetdora, one for each script of the repository.

The wheel contains the scripts as the package tweetdora.scripts (pyproject.toml), which does not exist in a checkout.
"""

import importlib
from typing import NoReturn

from tweetdora import cli


def _run(script: str, name: str) -> NoReturn:
    cli.command = name
    main = importlib.import_module(f"tweetdora.scripts.{script}").main
    cli.command = None
    cli.run_script(main, name)


def train() -> NoReturn:
    """Run train.py as tweetdora-train."""
    _run("train", "tweetdora-train")


def evaluate() -> NoReturn:
    """Run evaluate.py as tweetdora-evaluate."""
    _run("evaluate", "tweetdora-evaluate")


def predict() -> NoReturn:
    """Run predict.py as tweetdora-predict."""
    _run("predict", "tweetdora-predict")


def push() -> NoReturn:
    """Run push_to_hub.py as tweetdora-push."""
    _run("push_to_hub", "tweetdora-push")
