"""What train.py, evaluate.py and push_to_hub.py share. They import it before anything that imports torch."""

import os

__version__ = "0.1.0"

# OpenMP's threads wait for one another by spinning. Where another program wants the cores too, each wait then lasts as
# long as that program's turn: a training step took 13 times as long on two cores shared with another process (LOG.md).
# Read when torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
