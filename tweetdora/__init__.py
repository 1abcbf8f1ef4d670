"""The package behind the scripts. They import it before anything that imports torch."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tweetdora.classifier import Classifier, Prediction

__version__ = "0.1.0"

# OpenMP threads wait for each other by spinning, by default for milliseconds. If another program needs the cores, each
# wait lasts as long as that program's time slice, and a step takes many times as long. Spinning for microseconds and
# then sleeping costs nothing measurable on a quiet machine (LOG.md). torch reads this when it loads GNU OpenMP; the
# user's own setting is kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__all__ = ["Classifier", "Prediction"]


def __getattr__(name: str) -> Any:
    """Import Classifier and Prediction on first use, because they import torch."""
    if name in __all__:
        from tweetdora import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
