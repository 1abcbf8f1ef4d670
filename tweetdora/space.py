"""A Space of the Hub for a published model: space/app.py, the package, and what the page says of the model.

The Space installs the versions that this machine has, runs app.py, and loads the model from the Hub.
"""

import glob
import json
import os
import shutil
import subprocess
import sys
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
from tweetdora.files import write_json
from tweetdora.leaks import check_contents
from tweetdora.model_card import SOURCES, to_yaml
from tweetdora.publish import HubRepo
from tweetdora.records import folder_name, read_run

GRADIO_VERSION = "6.31.0"  # as in requirements-app.txt; the Space's machine installs it
ABOUT = "space.json"
SPACE_FILES = (".py", ".json", ".md", ".txt")
# What the package imports to classify; the other packages are for training and for the card.
_PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "huggingface_hub"),
    *("numpy", "jinja2", "pyyaml", "tqdm"),
)
_KEPT = ("README.md", ".gitattributes")  # what a new Space holds already
_PAGE_DID_NOT_RUN = "the page's own check failed"


def check_space_dir(folder: str) -> None:
    """Refuse a folder that holds something else than a Space built here.

    Raises:
        InputError: names it.
    """
    if os.path.isdir(folder) and os.listdir(folder) and not os.path.isfile(os.path.join(folder, ABOUT)):
        raise InputError(f"{folder} would be replaced, but is no Space that was built here. Move it away.")


def check_space(repo: HubRepo, model: HubRepo) -> None:
    """Refuse to put the page over somebody's other app, and a page for a model that it could not load.

    Raises:
        InputError: the Space holds one, or the model is private.
    """
    if model.private:
        raise InputError(
            f"--space: {model.repo_id} is private, and the page has no token to load it. Make the model public, or "
            "leave --space out."
        )
    if ABOUT not in repo.files and (others := set(repo.files) - set(_KEPT)):
        raise InputError(
            f"--space {repo.repo_id} holds another app ({', '.join(sorted(others)[:5])}). Give another name."
        )


def build_page(folder: str, built: str, repo_id: str, records: Records, publication: Publication) -> list[str | None]:
    """Fill the folder, look into it and run it on the model in the folder `built`; the labels of the page's examples.

    Raises:
        InputError: the folder holds what should not be published.
        VerificationError: the page fails, or gives other labels than the model.
    """
    texts = build_space(folder, publication.hub_model_id or folder_name(built), records, publication)
    check_contents(folder, f"{repo_id}/{publication.hub_model_id}", SPACE_FILES)
    labels = [prediction.label for prediction in Classifier(built)(texts)]
    check_page(folder, os.path.abspath(built), labels)
    return labels


def build_space(folder: str, model: str, records: Records, publication: Publication) -> list[str]:
    """Fill the folder; the example texts.

    `model` is the published model's id, or its folder's name in a dry run.
    """
    name = title(records.run, publication.hub_model_id)
    about = _about(model, name, records)
    write_json(os.path.join(folder, ABOUT), about)
    shutil.copy2(os.path.join(SOURCES, "space", "app.py"), folder)
    package = os.path.join(folder, "tweetdora")
    os.mkdir(package)
    for path in glob.glob(os.path.join(os.path.dirname(os.path.abspath(__file__)), "*.py")):
        shutil.copy2(path, package)
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES]  # torch's +cpu is this machine's
    with open(os.path.join(folder, "requirements.txt"), "w", encoding="utf-8") as stream:
        stream.write("\n".join(pins) + "\n")
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        stream.write(f"---\n{to_yaml(_metadata(name, publication))}\n---\n\n{_readme(name, publication)}")
    return [one["text"] for one in about["examples"]]


def about_run(run_dir: str, split: str = "test") -> dict[str, Any]:
    """What the page says of a run; of one that is not measured only its name."""
    run = read_run(run_dir)
    if not os.path.isfile(evaluation_path(run_dir, split)):
        return {"model": run_dir, "title": run.name, "notes": ["It was not measured yet."], "examples": []}
    return _about(run_dir, run.name, read_records(run, run_dir, split))


def _about(model: str, name: str, records: Records) -> dict[str, Any]:
    samples = choose_samples(records.predictions, records.run.task.label_words)[0]
    examples = [{"text": row["text"]} for row in samples]
    return {"model": model, "title": name, "notes": _notes(records), "examples": examples}


def _notes(records: Records) -> list[str]:
    """What a visitor should know of the model."""
    data, found = records.evaluation.data, records.finetuned
    low, high = found.intervals.macro_f1
    return [
        f"On {data.num_examples:,} examples of {data.display_name}, {data.split}, its answers have a macro-F1 of "
        f"{found.macro_f1:.3f} (95 % interval {low:.3f} to {high:.3f}).",
        "Other topics, times, languages and text forms than those of its training data were not measured.",
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
    return f"Try {link}: type a text, or upload a file. Limits and results are on the model's card.\n"


def check_page(folder: str, model: str, expected: list[str | None]) -> None:
    """Run the page's own check in its folder, with its own copy of the package; it must give the expected labels.

    Raises:
        VerificationError: it fails, or gives other labels.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # the folder is what is pushed
    words = [sys.executable, "app.py", model, "--check"]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or lines[-1] != json.dumps(expected):
        found = lines[-1] if lines and not done.returncode else " ".join(done.stderr.strip().splitlines()[-3:])
        raise VerificationError(f"{folder}: {_PAGE_DID_NOT_RUN}: {found}; expected {expected}. Do not use the Space.")
