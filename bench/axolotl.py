"""Benchmark train.py against axolotl, both as processes, on the same examples in the same order, in float32.

`make .axolotl/.done` fetches axolotl 0.19 and the transformers, PEFT and TRL that it pins. It runs on a CPU without
being made for it, and refuses bf16 there. Its settings are those of its documentation, but for what would make it
slower or other than ours: no gradient checkpointing, no shuffling, and loss on the answer and its stop token.
"""

import json
import os
import re
import sys
import tempfile
from typing import Any

import yaml

from bench.launch import run_timed, train_flags
from bench.settings import Settings
from tweetdora.config import ModelConfig
from tweetdora.errors import InputError
from tweetdora.train_config import TrainConfig

FOLDER = ".axolotl"
_LOSS = re.compile(r"'loss': '([^']+)'|^step +\d+/\d+ +loss ([0-9.]+)")  # of the Trainer's log, or of ours


def measure_axolotl(settings: Settings) -> dict[str, list[float]]:
    """Time steps as the time between their log lines, which each side writes after every step: ours, axolotl, ours."""
    steps, size = _steps(settings), settings.batch_size
    if steps * size > settings.train_examples:
        raise InputError(f"--train_examples {settings.train_examples} is too few for {steps} steps of {size}")
    if not os.path.isfile(os.path.join(FOLDER, ".done")):
        raise InputError(f"{FOLDER} is missing. To fetch axolotl, run make {FOLDER}/.done")
    found: dict[str, list[float]] = {"ours_seconds": [], "axolotl_seconds": []}
    for side in ("ours", "axolotl", "ours"):
        with tempfile.TemporaryDirectory() as folder:
            seconds, losses = (_run_ours if side == "ours" else _run_axolotl)(settings, folder)
        found[f"{side}_seconds"] += seconds[max(1, settings.warmup) :]  # the first step has no line before it
        found[f"{side}_losses"] = losses
    return found


def _run_ours(settings: Settings, folder: str) -> tuple[list[float], list[float]]:
    flags = train_flags(settings, os.path.join(folder, "run"), "fp32")
    flags += ["--max_steps", str(_steps(settings)), "--logging_steps", "1"]
    flags += ["--global_batch_size", str(settings.batch_size), "--train_sampling_strategy", "sequential"]
    return step_seconds(run_timed([sys.executable, "train.py", *flags])[0])


def _run_axolotl(settings: Settings, folder: str) -> tuple[list[float], list[float]]:
    task, examples = settings.task(), settings.load("train", _steps(settings) * settings.batch_size)
    lines = [
        [
            {"role": "system", "content": task.system_prompt},
            {"role": "user", "content": text},
            {"role": "assistant", "content": task.label_words[label]},
        ]
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]
    data, config = os.path.join(folder, "tweets.json"), os.path.join(folder, "config.yml")
    with open(data, "w", encoding="utf-8") as stream:
        json.dump([{"messages": messages} for messages in lines], stream)
    with open(config, "w", encoding="utf-8") as stream:
        yaml.safe_dump(_config(settings, folder, data), stream)
    # Not in this folder, where `import evaluate` finds evaluate.py.
    places = os.pathsep.join(filter(None, (os.path.abspath(FOLDER), os.environ.get("PYTHONPATH"))))
    more = {"PYTHONPATH": places, "AXOLOTL_DO_NOT_TRACK": "1"}
    return step_seconds(run_timed([sys.executable, "-m", "axolotl.cli.train", config], folder, more)[0])


def _config(settings: Settings, folder: str, data: str) -> dict[str, Any]:
    """Axolotl's settings for the published recipe."""
    adapter, task = ModelConfig(), settings.task()
    return {
        "base_model": os.path.abspath(settings.model),
        "adapter": "lora",
        "peft_use_dora": adapter.method == "dora",
        "lora_r": adapter.r,
        "lora_alpha": adapter.lora_alpha,
        "lora_dropout": adapter.lora_dropout,
        "lora_target_modules": adapter.target_modules,
        "datasets": [{"path": data, "type": "chat_template", "roles_to_train": ["assistant"], "train_on_eos": "turn"}],
        "dataset_prepared_path": os.path.join(folder, "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # in the order of the data
        "sequence_len": task.max_length,
        "attn_implementation": "sdpa",
        "output_dir": os.path.join(folder, "out"),
        "micro_batch_size": settings.batch_size,
        "gradient_accumulation_steps": 1,
        "learning_rate": TrainConfig.learning_rate,
        "lr_scheduler": "linear",
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_steps": _steps(settings),
        "logging_steps": 1,
        "bf16": False,
    }


def _steps(settings: Settings) -> int:
    return settings.warmup + settings.steps


def step_seconds(lines: list[tuple[float, str]]) -> tuple[list[float], list[float]]:
    """Seconds between the log lines of the steps (0 for the first one), and the loss in each."""
    logged = [(when, float(match[1] or match[2])) for when, line in lines if (match := _LOSS.search(line))]
    times = [when for when, _ in logged]
    return [now - before for before, now in zip(times[:1] + times, times, strict=False)], [loss for _, loss in logged]
