"""What the scripts share. They import it before anything that imports torch."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tweetdora.classifier import Classifier, Prediction

__version__ = "0.1.0"

# OpenMP's threads wait for one another by spinning, by default for milliseconds. Where another program wants the cores
# too, each wait then lasts as long as that program's turn, and a step takes many times as long. Spinning for
# microseconds and then sleeping costs nothing visible on a quiet machine (LOG.md). Read when torch loads GNU OpenMP;
# what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["Classifier", "Prediction"]


def __getattr__(name: str) -> Any:
    """Classifier and Prediction, imported when they are asked for: they import torch."""
    if name in __all__:
        from tweetdora import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
