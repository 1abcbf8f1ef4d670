"""Benchmark this project against TRL 1.16 and PEFT on the CPU, and print the table.

    python -m bench                          # everything except full and axolotl, in about an hour and a half
    python -m bench --only training memory   # some parts; the others stay unchanged in the record
    python -m bench --quick                  # a smoke test: 2 steps of 8 examples, into runs/bench/quick.json

The parts are training (steps, losses, share of the GEMM rate, projection), memory, documented (TRL with its
defaults), methods (DoRA and LoRA), prompts (longer ones), generation, prediction, launches (operations of a step),
saving, launch, full (the published recipe, with --full or --only full), and axolotl (with --only axolotl; needs
`make .axolotl/.done`).
If the host of a virtual machine takes more than 5 % of the cores' time, a part is measured again, up to three times,
and otherwise left out.
Each part runs in separate processes, so none inherits another's memory. Compared sides are interleaved in one process.

Writes every raw sample, with machine, versions and commit, to results/bench/cpu.json.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch

from bench.record import BenchData, BenchPart, BenchRecord, read_bench, write_bench
from bench.report import table
from bench.settings import Settings
from tweetdora.cli import run_script
from tweetdora.device import use_cpu_threads
from tweetdora.files import read_json, write_json
from tweetdora.provenance import environment, utc_now, without_folders

# For each part, the function and its runs. A run lists the function's arguments, separated by colons.
PARTS = {
    "training": ("bench.training.measure_training", ["fp32", "bf16"]),
    "memory": (
        "bench.training.measure_memory",
        ["fp32:ours", "fp32:trl", "bf16:ours", "bf16:trl", "bf16:trl_bf16"],
    ),
    "documented": ("bench.variants.measure_documented", ["fp32", "bf16"]),
    "axolotl": ("bench.axolotl.measure_axolotl", ["all"]),
    "methods": (
        "bench.variants.measure_methods",
        ["fp32:k_v", "fp32:all-linear", "bf16:k_v", "bf16:all-linear"],
    ),
    "prompts": ("bench.variants.measure_prompts", ["bf16"]),
    "generation": ("bench.generation.measure_generation", ["all"]),
    "prediction": ("bench.prediction.measure_prediction", ["fp32", "bf16"]),
    "launches": ("bench.launches.measure_launches", ["fp32", "bf16"]),
    "saving": ("bench.saving.measure_saving", ["all"]),
    "launch": ("bench.launch.measure_launch", ["all"]),
    "full": ("bench.launch.measure_full", ["all"]),
}
COUNTED = ("memory", "launches")  # parts that do not depend on how busy the machine is
MAX_STOLEN = 0.05  # of the cores' time, that the host may take during a part
TRIES, WAIT_SECONDS = 3, 120
OUTPUT, QUICK_OUTPUT = os.path.join("results", "bench", "cpu.json"), os.path.join("runs", "bench", "quick.json")
QUICK = {
    "batch_size": 8,
    "steps": 2,
    "warmup": 1,
    "loss_steps": 2,
    "generation_examples": 8,
    "generation_batch": 4,
    "tune_steps": 2,
    "validation_examples": 8,
    "train_examples": 64,
}


def main(argv: list[str] | None = None) -> int:
    """Measure the requested parts, one after the other, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options, settings = parse(argv)
    if options.worker:
        work(options.worker, settings, options.output)
        return 0
    output = options.output or (QUICK_OUTPUT if options.quick else OUTPUT)
    parts = read_bench(output).parts
    # Only once: the record, written after each part, may be a tracked file, and writing it changes the git state.
    facts, refused = describe(argv, settings), []
    for part in options.only:
        found = measure(part, facts, argv, tries=1 if options.quick else TRIES)
        if options.quick or is_valid(part, found.stolen_share):
            parts[part] = found
            write_bench(output, BenchRecord(parts))
        else:
            refused.append(part)
    print(f"\n{table(parts)}\n\nWrote {output}.")
    if refused:
        print(f"Not measured, because the machine was busy: {', '.join(refused)}. {output} keeps what it had of them.")
    return 1 if refused else 0


def measure(part: str, facts: dict[str, Any], argv: list[str], tries: int) -> BenchPart:
    """Measure a part; if the host took too much of the cores' time meanwhile, wait and measure again."""
    for attempt in range(tries):
        if attempt:
            time.sleep(WAIT_SECONDS)
        created, before = utc_now(), cpu_times()
        samples = {variant: run_worker(part, variant, argv) for variant in PARTS[part][1]}
        stolen = stolen_share(before, cpu_times())
        found = BenchPart(**facts, created=created, stolen_share=stolen, samples=samples)
        if is_valid(part, stolen):
            break
        print(f"{part}: the host took {stolen:.1%} of the cores' time; a measurement is valid up to {MAX_STOLEN:.0%}.")
    return found


def is_valid(part: str, stolen: float | None) -> bool:
    """True if the machine was quiet enough, or if it makes no difference to what was measured."""
    return part in COUNTED or stolen is None or stolen <= MAX_STOLEN


def parse(argv: list[str]) -> tuple[argparse.Namespace, Settings]:
    """Parse the flags: what to run, and the settings of the measurement."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"Parts to run: {', '.join(PARTS)}.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: 2 steps of 8 examples.")
    parser.add_argument("--full", action="store_true", help="Also run the whole published recipe.")
    parser.add_argument("--output", metavar="FILE", help=f"File of the record (default: {OUTPUT}).")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # do one run, part:variant, in this process
    for item in dataclasses.fields(Settings):
        text = f"{item.metadata['help']} ({item.default})"
        parser.add_argument(f"--{item.name}", type=type(item.default), metavar="VALUE", help=text)
    options = parser.parse_args(argv)
    given = {item.name: getattr(options, item.name) for item in dataclasses.fields(Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.only is None:
        options.only = [part for part in PARTS if part not in ("full", "axolotl")]
    if options.full and "full" not in options.only:
        options.only.append("full")
    return options, Settings(**{**(QUICK if options.quick else {}), **given})


def describe(argv: list[str], settings: Settings) -> dict[str, Any]:
    """Collect what the record holds of each part in addition to its samples: command, data, environment and code."""
    found, examples = environment(), settings.load("train", settings.train_examples)
    if examples.source is None:
        raise AssertionError("loaded examples have a source")
    return {
        "command": shlex.join(["python", "-m", "bench", *map(without_folders, argv)]),
        "settings": settings,
        "data": BenchData(**vars(examples.source), num_examples=len(examples), sha256=examples.sha256),
        "openmp": {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "environment": dataclasses.replace(
            found, packages={**found.packages, "trl": importlib.metadata.version("trl")}
        ),
    }


def cpu_times() -> list[int] | None:
    """Read the cores' time since the machine started, in ticks of each kind (proc(5)); None without /proc/stat."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            return [int(ticks) for ticks in file.readline().split()[1:9]]
    except FileNotFoundError:
        return None


def stolen_share(before: list[int] | None, after: list[int] | None) -> float | None:
    """Compute the share of the cores' time that the host of a virtual machine gave to others.

    >>> stolen_share([10, 0, 0, 90, 0, 0, 0, 0], [60, 0, 0, 130, 0, 0, 0, 10])  # the eighth: stolen
    0.1
    """
    if before is None or after is None:
        return None
    spent = [end - start for start, end in zip(before, after, strict=True)]
    return round(spent[7] / sum(spent), 4)


def run_worker(part: str, variant: str, argv: list[str]) -> Any:
    """Do one run in a separate process and return its samples."""
    print(f"{utc_now()} {part} {variant}", flush=True)
    # Model and tweets are local; TRL and transformers would ask the Hub about them.
    calm = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "samples.json")
        command = [sys.executable, "-m", "bench", *argv, "--worker", f"{part}:{variant}", "--output", output]
        subprocess.run(command, check=True, env={**os.environ, **calm})
        return read_json(output)


def work(job: str, settings: Settings, output: str) -> None:
    """Do one run in this process."""
    # sides.py sets a flag by TRL's name, which transformers 5.23 has deprecated.
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    use_cpu_threads(torch.device("cpu"), 1)
    part, *words = job.split(":")
    module, _, function = PARTS[part][0].rpartition(".")
    arguments = [] if words == ["all"] else words
    write_json(output, getattr(importlib.import_module(module), function)(settings, *arguments))


if __name__ == "__main__":
    run_script(main, "python -m bench")
