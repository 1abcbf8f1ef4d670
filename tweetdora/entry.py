"""The commands of an installed tweetdora: the scripts of the repository, under names of their own.

The wheel holds the scripts as the package tweetdora.scripts (pyproject.toml); in a checkout there is no such package.
"""

import importlib
from typing import NoReturn

from tweetdora.cli import run_script


def _run(script: str, name: str) -> NoReturn:
    run_script(importlib.import_module(f"tweetdora.scripts.{script}").main, name)


def train() -> NoReturn:
    """tweetdora-train is train.py."""
    _run("train", "tweetdora-train")


def evaluate() -> NoReturn:
    """tweetdora-evaluate is evaluate.py."""
    _run("evaluate", "tweetdora-evaluate")


def predict() -> NoReturn:
    """tweetdora-predict is predict.py."""
    _run("predict", "tweetdora-predict")


def push() -> NoReturn:
    """tweetdora-push is push_to_hub.py."""
    _run("push_to_hub", "tweetdora-push")
