"""kill -9 at random moments of train.py, over and over, against the same run left alone.

    python tests/soak.py MODEL DATA FOLDER --tries 20 --seed 0        # what `make soak` does, with a tiny model

One process imports everything once and forks a child for each start of train.py, so that the kills meet loading,
steps, validation and saves, not imports. A run goes on from its last checkpoint until it ends by itself; then adapter,
optimizer, scheduler, random states, every logged figure and the final record must be bit for bit those of the run that
nobody killed. Prints one line a try and ends with status 1 where one differs.
"""

import argparse
import contextlib
import json
import os
import random
import re
import runpy
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
STEPS = 12


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


def start(flags: list[str], log: Path) -> int:
    """Fork a child that runs train.py; its number."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = runpy.run_path(str(ROOT / "train.py"))["main"](flags)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_with_kills(flags: list[str], run_dir: Path, longest: float, draw: random.Random) -> int:
    """Start and kill until the run ends by itself; how often it was killed."""
    kills = 0
    while True:
        resume = ["--resume_from_checkpoint", "true"] if (run_dir / "run.json").exists() else []
        child = start([*flags, *resume], run_dir.parent / f"{run_dir.name}.log")
        deadline = time.monotonic() + draw.uniform(0.0, longest) if kills < 12 else float("inf")
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                if status:
                    raise SystemExit((run_dir.parent / f"{run_dir.name}.log").read_text()[-3000:])
                return kills
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        run_file = run_dir / "run.json"
        if run_file.exists() and json.loads(run_file.read_text())["status"] == "finished":
            return kills  # it was killed between its last word and its exit


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


def main() -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    with contextlib.suppress(SystemExit):  # import all that the children need
        runpy.run_path(str(ROOT / "train.py"), run_name="imported")
    straight = options.folder / "straight"
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    run_with_kills(train_flags(options.model, options.data, straight), straight, float("inf"), random.Random())
    longest, expected, failures, kills = time.monotonic() - began, outcome(straight), 0, 0
    for number in range(options.tries):
        run_dir = options.folder / f"try{number}"
        draw = random.Random(f"{options.seed} {number}")
        count = run_with_kills(train_flags(options.model, options.data, run_dir), run_dir, longest, draw)
        found = outcome(run_dir)
        differing = [name for name in expected if not same(expected[name], found[name])]
        if "record" in differing:
            parts = [
                part for part in expected["record"] if not same(expected["record"][part], found["record"].get(part))
            ]
            differing += [f"record.{part}" for part in parts]
        verdict = f"differs in {', '.join(differing)}" if differing else "equal"
        print(f"try {number}: {count} kills, {verdict}", flush=True)
        failures, kills = failures + bool(differing), kills + count
    print(f"{options.tries - failures} of {options.tries} runs equal after {kills} kills in all")
    return 1 if failures or not kills else 0


if __name__ == "__main__":
    sys.exit(main())
