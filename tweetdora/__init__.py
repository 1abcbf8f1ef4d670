"""What train.py, evaluate.py and push_to_hub.py share. They import it before anything that imports torch."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for one another by spinning, by default for milliseconds. Where another program wants the cores
# too, each wait then lasts as long as that program's turn, and a step takes many times as long. Spinning for
# microseconds and then sleeping costs nothing visible on a quiet machine (LOG.md). Read when torch loads GNU OpenMP;
# what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
