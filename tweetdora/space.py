"""Build a Space for a published model: space/app.py, the package, and the facts that the page shows.

The Space installs the package versions of this machine, runs app.py, and loads the model from the Hub.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from tweetdora.card_facts import (
    Publication,
    Records,
    choose_samples,
    evaluation_path,
    read_records,
    title,
)
from tweetdora.classifier import Classifier
from tweetdora.errors import InputError, VerificationError
from tweetdora.files import folder_name, write_json
from tweetdora.leaks import check_contents
from tweetdora.model_card import SOURCES, to_yaml
from tweetdora.publish import HubRepo
from tweetdora.record_files import read_run

GRADIO_VERSION = "6.31.0"  # as in requirements-app.txt; the Space's machine installs it
ABOUT = "space.json"
SPACE_FILES = (".py", ".json", ".md", ".txt")
# The packages needed to classify; the others are for training and for the card.
_PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub"),
    *("numpy", "jinja2", "pyyaml", "tqdm"),
)
_KEPT = ("README.md", ".gitattributes")  # the files of a new, empty Space
_PAGE_DID_NOT_RUN = "the page's own check failed"


def check_space_dir(folder: str) -> None:
    """Refuse a folder that holds anything but an earlier build of a Space.

    Raises:
        InputError: It does; the message names the folder.
    """
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(os.path.join(folder, ABOUT)):
        raise InputError(f"{folder} would be replaced, but it is not an earlier build of a Space. Move it away.")


def check_space(repo: HubRepo, model: HubRepo) -> None:
    """Check that the Space holds no other app and that the page could load the model.

    Raises:
        InputError: The Space holds another app, or the model is private.
    """
    if model.private:
        raise InputError(
            f"--space: {model.repo_id} is private, and the page has no token to load it. Make the model public, or "
            "leave --space out."
        )
    if ABOUT not in repo.files and (others := set(repo.files) - set(_KEPT)):
        raise InputError(
            f"--space {repo.repo_id} holds another app ({', '.join(sorted(others)[:5])}). Choose another name."
        )


def build_page(folder: str, built: str, repo_id: str, records: Records, publication: Publication) -> list[str | None]:
    """Fill the folder, check its contents, and run the page on the model in `built`; return its examples' labels.

    Raises:
        InputError: The folder holds something that should not be published.
        VerificationError: The page fails, or its labels differ from the model's.
    """
    texts = build_space(folder, publication.hub_model_id or folder_name(built), records, publication)
    check_contents(folder, f"{repo_id}/{publication.hub_model_id}", SPACE_FILES)
    labels = [prediction.label for prediction in Classifier(built)(texts)]
    check_page(folder, os.path.abspath(built), labels)
    return labels


def build_space(folder: str, model: str, records: Records, publication: Publication) -> list[str]:
    """Fill the folder and return the example texts.

    `model` is the published model's id or, in a dry run, its folder's name.
    """
    name = title(records.run, publication.hub_model_id)
    about = _about(model, name, records, publication.sample_ids)
    write_json(os.path.join(folder, ABOUT), about)
    shutil.copy2(os.path.join(SOURCES, "space", "app.py"), folder)
    package = os.path.join(folder, "tweetdora")
    os.mkdir(package)
    for path in glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py")):
        shutil.copy2(path, package)
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]  # without this machine's +cpu of torch
    with open(os.path.join(folder, "requirements.txt"), "w", encoding="utf-8") as stream:
        stream.write("\n".join(pins) + "\n")
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        stream.write(f"---\n{to_yaml(_metadata(name, publication))}\n---\n\n{_readme(name, publication)}")
    return [one["text"] for one in about["examples"]]


def about_run(run_dir: str, split: str = "test") -> dict[str, Any]:
    """Collect the facts that the page shows of a run; without an evaluation, only its name."""
    run = read_run(run_dir)
    if not os.path.isfile(evaluation_path(run_dir, split)):
        return {"model": run_dir, "title": run.name, "notes": ["It has not been evaluated yet."], "examples": []}
    return _about(run_dir, run.name, read_records(run, run_dir, split))


def _about(model: str, name: str, records: Records, sample_ids: Sequence[int] = ()) -> dict[str, Any]:
    samples = choose_samples(records.predictions, records.run.task.label_words, sample_ids)[0]
    examples = [{"text": row["text"]} for row in samples]
    return {"model": model, "title": name, "notes": _notes(records), "examples": examples}


def _notes(records: Records) -> list[str]:
    """Write the notes that a visitor should see."""
    data, found = records.evaluation.data, records.finetuned
    low, high = found.intervals.macro_f1
    return [
        f"On {data.num_examples:,} examples of {data.display_name}, {data.split}, its answers have a macro-F1 of "
        f"{found.macro_f1:.3f} (95 % interval {low:.3f} to {high:.3f}).",
        "It was not evaluated on topics, times, languages or kinds of text that its training data does not cover.",
    ]


def _metadata(name: str, publication: Publication) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": name,
        "emoji": "💬",
        "colorFrom": "indigo",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
    }
    if publication.hub_model_id:
        found["models"] = [publication.hub_model_id]
    if publication.license and publication.license != "other":
        found["license"] = publication.license
    return found


def _readme(name: str, publication: Publication) -> str:
    link = f"[{name}](https://huggingface.co/{publication.hub_model_id})" if publication.hub_model_id else name
    return f"Try {link}: type a text, or upload a file. The model card has its results and limitations.\n"


def check_page(folder: str, model: str, expected: list[str | None]) -> None:
    """Run `app.py --check` in the page's folder, with its own copy of the package, and compare the labels.

    Raises:
        VerificationError: The check fails, or the labels differ.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the folder is pushed as it is
    words = [sys.executable, "app.py", model, "--check"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or lines[-1] != json.dumps(expected):
        found = lines[-1] if lines and not done.returncode else " ".join(done.stderr.strip().splitlines()[-3:])
        raise VerificationError(f"{folder}: {_PAGE_DID_NOT_RUN}: {found}; expected {expected}. Do not use the Space.")
