"""What train.py, evaluate.py and push_to_hub.py share. They import it before anything that imports torch."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for one another by spinning, by default for milliseconds. Where another program wants the cores,
# each wait then lasts as long as that program's turn: a step took many times as long on two cores shared with another
# process. Spinning for microseconds only and then sleeping costs a quiet machine nothing that could be measured (LOG.md).
# Read when torch loads GNU OpenMP; what the user has set stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
