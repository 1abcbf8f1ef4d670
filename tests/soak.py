"""kill -9 at random moments of train.py, over and over, against the same run left alone.

The scripts are forked from one that has imported everything (forked.py), so that the kills meet loading, steps,
validation and saves, not imports. A run goes on from its last checkpoint until it ends by itself; then adapter,
optimizer, scheduler, random states, every logged figure and the final record must be bit for bit those of the run that
nobody killed.
"""

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import forked
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12
_MOST_KILLS = 12  # of one run


def train_flags(model: str, data: str, run_dir: Path) -> list[str]:
    """A run with dropout, validation, and a checkpoint after each second step: much of its time is saving."""
    return [
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(run_dir)),
        *("--run_name", "soak", "--max_train_samples", "0", "--lora_dropout", "0.2", "--precision", "fp32"),
        *("--system_prompt", "Say how the day is: negative, neutral or positive.", "--learning_rate", "1e-3"),
        *("--max_steps", str(STEPS), "--logging_steps", "1", "--save_steps", "2", "--max_eval_samples", "12"),
        *("--eval_steps", "4", "--max_new_tokens", "3", "--report_to", "none", "--disable_tqdm", "true"),
        *("--cpu_threads", "1"),
    ]


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a run leaves, times and machine left out."""
    checkpoint = run_dir / f"checkpoint-{STEPS}"
    run = json.loads((run_dir / "run.json").read_text())
    timed = re.compile("second|runtime|finished|created|command|peak_memory")

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_times(item) for name, item in value.items() if not timed.search(name)}
        return [without_times(item) for item in value] if isinstance(value, list) else value

    return {
        "adapter": load_file(run_dir / "adapter/adapter_model.safetensors"),
        "saved adapter": load_file(checkpoint / "adapter_model.safetensors"),
        # optimizer.pt, scheduler.pt, and rng_state.pth or, of several processes, rng_state_0.pth, …
        **{path.name: torch.load(path, weights_only=False) for path in sorted(checkpoint.glob("*.pt*"))},
        "record": without_times(run),
        "state": without_times(json.loads((checkpoint / "trainer_state.json").read_text())),
    }  # fmt: skip


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal in every bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "tobytes"):
        return a.tobytes() == b.tobytes()
    return a == b


def run_with_kills(flags: list[str], run_dir: Path, longest: float, draw: random.Random) -> int:
    """Start and kill until the run ends by itself; how often it was killed."""
    kills = 0
    while True:
        resume = ["--resume_from_checkpoint", "true"] if (run_dir / "run.json").exists() else []
        script = forked.start([ROOT / "train.py", *flags, *resume], run_dir.parent)
        if kills == _MOST_KILLS or script.join(draw.uniform(0.0, longest)):
            said = script.end()
            assert script.returncode == 0, said[-3000:]
            return kills
        script.kill()
        kills += 1
        run_file = run_dir / "run.json"
        if run_file.exists() and json.loads(run_file.read_text())["status"] == "finished":
            return kills  # it was killed between its last word and its exit


def soak(model: str, data: str, folder: Path, tries: int) -> None:
    """Kill as many runs as there are tries, and print a line for each.

    Raises:
        AssertionError: a run ended otherwise than the one that was left alone, or none was killed.
    """
    folder.mkdir()
    forked.start([ROOT / "train.py", "--help"], folder).end()  # the server's start is no part of the time below
    began = time.monotonic()
    alone = forked.start([ROOT / "train.py", *train_flags(model, data, folder / "straight")], folder)
    said = alone.end()
    assert alone.returncode == 0, said[-3000:]
    longest, expected = time.monotonic() - began, outcome(folder / "straight")
    all_kills, failures = 0, 0
    for number in range(tries):
        run_dir = folder / f"try{number}"
        kills = run_with_kills(train_flags(model, data, run_dir), run_dir, longest, random.Random(number))
        found = outcome(run_dir)
        differing = [name for name in expected if not same(expected[name], found[name])]
        if "record" in differing:
            record, other = expected["record"], found["record"]
            differing += [f"record.{part}" for part in record if not same(record[part], other.get(part))]
        print(
            f"try {number}: {kills} kills, {'differs in ' + ', '.join(differing) if differing else 'equal'}",
            flush=True,
        )
        all_kills, failures = all_kills + kills, failures + bool(differing)
    print(f"{tries - failures} of {tries} runs equal after {all_kills} kills in all")
    assert not failures and all_kills, "see the lines above"
