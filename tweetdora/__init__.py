"""What the scripts train.py, evaluate.py and push_to_hub.py share."""

__version__ = "0.1.0"
