"""Benchmark checkpoints: the seconds of each save next to those of the step before it, in a run of train.py."""

import os
import tempfile
import time
from typing import Any
from unittest import mock

from bench.launch import train_flags
from bench.settings import Settings
from tweetdora import trainer


def measure_saving(settings: Settings) -> dict[str, Any]:
    """Time each step in bf16 and the checkpoint after it, including its checksums and fsync."""
    import train  # the script at the top

    steps: list[float] = []
    saves: list[float] = []
    sizes: list[int] = []
    kind = trainer.ClassificationTrainer
    original_step, original_save = kind.training_step, kind._save_checkpoint

    def training_step(self: trainer.ClassificationTrainer, *arguments: Any) -> Any:
        """Time a step's forward and backward pass; without the optimizer, so the ratio save / step is too high."""
        began = time.perf_counter()
        result = original_step(self, *arguments)
        steps.append(time.perf_counter() - began)
        return result

    def save_checkpoint(self: trainer.ClassificationTrainer, *arguments: Any) -> None:
        """Time a save and record its size."""
        began = time.perf_counter()
        original_save(self, *arguments)
        saves.append(time.perf_counter() - began)
        folder = os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        sizes.append(sum(entry.stat().st_size for entry in os.scandir(folder)))

    with (
        mock.patch.object(kind, "training_step", training_step),
        mock.patch.object(kind, "_save_checkpoint", save_checkpoint),
        tempfile.TemporaryDirectory() as folder,
    ):
        flags = train_flags(settings, os.path.join(folder, "run"))
        count = str(settings.warmup + settings.steps)
        train.main([*flags, "--max_steps", count, "--save_steps", "1", "--disable_tqdm", "true"])
    kept = slice(settings.warmup, None)
    return {"step_seconds": steps[kept], "save_seconds": saves[kept], "checkpoint_bytes": sizes[-1]}
