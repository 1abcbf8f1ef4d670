"""Run a sweep: train and evaluate every combination of settings and seed, one after the other.

    python -m tweetdora.sweep my-sweep.yaml --dry_run true    # list the runs, run nothing
    python -m tweetdora.sweep my-sweep.yaml                   # the same command resumes it after a stop

Those in results/ have been run, so their records exist.

A sweep file; only `output_dir`, `records_dir` and `seeds` are required:

    output_dir: runs/rates                  # run folders
    records_dir: results/rates              # the records kept from each run, without texts
    config: recipes/quickstart.yaml         # a recipe that all runs start from
    settings: {max_train_samples: 10000}    # flags of train.py for all runs
    variants:                               # flags of train.py by variant name
      dora: {method: dora}
      lora: {method: lora}
    grid: {learning_rate: [3e-5, 1e-4]}     # every combination, with every variant
    seeds: [42, 43, 44]
    splits: [validation]                    # the splits that evaluate.py measures on
    evaluate: {batch_size: 256}             # flags of evaluate.py
    launcher: [accelerate, launch, --config_file, accelerate_config.yaml]    # default: this Python

A run whose records exist is not run again, also if it diverged. The base model is evaluated once for all runs that
ask it the same.
"""

import ctypes
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Any, Literal, get_args

import yaml

from tweetdora.cli import parse_train, parse_with_paths, parse_with_target, read_yaml, run_script
from tweetdora.config import AT_LEAST_1, EvaluateConfig, Flag, ModelConfig, TaskConfig, check_ranges
from tweetdora.errors import InputError
from tweetdora.files import held_lock
from tweetdora.record_files import decode, read_predictions, read_record, run_status, write_record
from tweetdora.records import (
    KEPT_PREDICTIONS,
    PREDICTIONS,
    RUN_FILE,
    EvaluationRecord,
    RunRecord,
    compact_predictions,
    training_settings,
)
from tweetdora.targets import correct_task
from tweetdora.train_config import RECIPE_ARGUMENTS, TrainConfig

log = logging.getLogger("tweetdora.sweep")
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_BUSY = (
    "another sweep is running on this machine",
    "Wait for it, or stop it; a stopped sweep resumes with its own command.",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Task settings that affect only the train split: on other splits, the base gives the same results whatever they are.
_TRAINING_ONLY = ("max_train_samples", "balance_labels")
_ADVICE = (
    "With the same settings it would diverge again: add a variant with a lower learning_rate, or with precision fp32."
)
_SET_HERE = ("seed", "output_dir", "report_to")  # settings of a run that the sweep itself sets
# Flags of evaluate.py that a sweep file may not set: the sweep sets them, or the base must share them with the run.
_MEASURED_SO = (
    *("split", "output_dir", "report_to", "base_results", "config", "prompt_of", "precision", "max_new_tokens"),
)


@dataclass(frozen=True)
class SweepConfig:
    """Flags, in addition to the sweep file."""

    dry_run: bool = field(default=False, metadata={"help": "Check all settings and list the runs; run nothing."})
    jobs: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=1,
        metadata={"help": "Runs at the same time. Use more than 1 only if a single run leaves the device idle."},
    )
    minutes: float | None = field(
        default=None, metadata={"help": "Start no new run after this many minutes. If unset, all runs are done."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file."""

    output_dir: str
    records_dir: str
    seeds: list[int]
    config: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    splits: list[str] = field(default_factory=lambda: ["validation"])
    evaluate: dict[str, Any] = field(default_factory=dict)
    launcher: list[str] = field(default_factory=lambda: [sys.executable])


@dataclass(frozen=True)
class Run:
    """A run of a sweep: its complete recipe, run folder, folder of kept records, and parsed settings."""

    name: str
    recipe: dict[str, Any]
    run_dir: str
    records_dir: str
    task: TaskConfig = field(compare=False)
    model: ModelConfig = field(compare=False)
    training: TrainConfig = field(compare=False)


class RunFailedError(Exception):
    """A run failed: its training diverged, or one of its scripts ended with an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status, which is 1 if a run failed, or diverged in this call or earlier."""
    # parse
    config, paths = parse_with_paths(argv, SweepConfig, __doc__.partition("\n")[0], "SWEEP", "Sweep file, YAML.")

    # load
    left: dict[str, tuple[Sweep, Run]] = {}  # by run folder, because two sweeps may share a run
    diverged = False
    for path in paths:
        sweep = read_sweep(path)
        planned = [(run, state_of(run, sweep.splits, sweep.evaluate)) for run in plan_runs(sweep)]
        counts = Counter(state for _, state in planned)
        note = f", {counts['diverged']} diverged" if counts["diverged"] else ""
        log.info("%s: %d runs, %d of them done%s", path, len(planned), counts["done"], note)
        for run, state in planned:
            if state == "to do":
                left[run.run_dir] = _join(left.get(run.run_dir), sweep, run)
            elif state == "diverged":
                diverged = True
                log.warning("%s diverged: see %s. %s", run.name, os.path.join(run.records_dir, RUN_FILE), _ADVICE)
        if config.dry_run:
            log.info("\n".join(f"  {state:<8} {run.name}" for run, state in planned))
    if config.dry_run:
        return 0
    if not left:
        return int(diverged)

    # work
    with held_lock("sweep", *_BUSY):  # two sweeps at once would slow each other down
        runner = Runner(config)
        failed = runner.run([*left.values()])
    for name, why in failed.items():
        log.warning("failed: %s: %s", name, why)
    if runner.not_begun:
        log.info("%d runs were not started within --minutes; the same command resumes the sweep.", runner.not_begun)
    return int(diverged or bool(failed))


# The plan


def read_sweep(path: str) -> Sweep:
    """Read a sweep file.

    Raises:
        InputError: the file is missing, or a key is invalid.
    """
    found = read_yaml(path, path)
    known = {item.name: item for item in dataclasses.fields(Sweep)}
    if unknown := sorted(set(found) - set(known)):
        raise InputError(f"{path}: unknown key {', '.join(unknown)}; expected keys are {', '.join(known)}.")
    if missing := [name for name in ("output_dir", "records_dir", "seeds") if name not in found]:
        raise InputError(f"{path} has no {', '.join(missing)}.")
    values = {"variants": {}, **found}
    values["variants"] = {name: settings or {} for name, settings in values["variants"].items()}
    whole = dataclasses.asdict(Sweep("", "", [])) | values
    sweep = decode(Sweep, whole, path)
    for name, items in (("seeds", sweep.seeds), *sweep.grid.items()):
        if len({json.dumps(item) for item in items}) < len(items) or not items:
            raise InputError(f"{path}: {name} is {items}; expected one or more different values.")
    splits = get_args(next(item.type for item in dataclasses.fields(EvaluateConfig) if item.name == "split"))
    if not sweep.splits or not set(sweep.splits) <= set(splits):
        raise InputError(f"{path}: splits is {sweep.splits}; expected some of {', '.join(splits)}.")
    for where in (sweep.settings, *sweep.variants.values(), sweep.grid):
        if taken := sorted(set(where) & set(_SET_HERE)):
            raise InputError(f"{path}: {', '.join(taken)} is set by the sweep for each run; list seeds under `seeds`.")
    if taken := sorted(set(sweep.evaluate) & set(_MEASURED_SO)):
        raise InputError(f"{path}: evaluate sets {', '.join(taken)}, which the sweep sets for each run. Leave it out.")
    _evaluate_config(sweep.evaluate)
    return sweep


def _evaluate_config(settings: Mapping[str, Any]) -> EvaluateConfig:
    return parse_with_target(_flags(settings), EvaluateConfig, "", "")[0]


def _flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags. A list takes all words that follow it, so the target of a script comes before them."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def plan_runs(sweep: Sweep) -> list[Run]:
    """Plan all runs of a sweep, seed by seed, so that a stopped sweep leaves complete comparisons behind.

    Raises:
        InputError: a setting is not a flag of train.py, or contradicts another.
    """
    common = (read_yaml(sweep.config, f"config {sweep.config}") if sweep.config else {}) | sweep.settings
    runs = []
    for variant in sweep.variants:
        if variant in ("", ".", "..") or {"/", "\\"} & set(variant):
            raise InputError(
                f"the variant {variant!r} is the name of a folder, so it may not be empty or contain a slash. Call it "
                f"{_word(variant).strip('.') or 'dora'}, for example."
            )
    for seed in sweep.seeds:
        for variant, settings in (sweep.variants or {"": {}}).items():
            for values in itertools.product(*sweep.grid.values()):
                chosen = dict(zip(sweep.grid, values, strict=True))
                parts = [variant, *(f"{name}={_word(value)}" for name, value in chosen.items()), f"seed={seed}"]
                name = "-".join(filter(None, parts))
                run_dir = os.path.join(sweep.output_dir, name)
                recipe = {**common, **settings, **chosen, "seed": seed, "output_dir": run_dir, "report_to": "none"}
                records_dir = os.path.join(sweep.records_dir, name)
                runs.append(Run(name, recipe, run_dir, records_dir, *_parse(name, recipe)))
    return runs


def _join(planned: tuple[Sweep, Run] | None, sweep: Sweep, run: Run) -> tuple[Sweep, Run]:
    """Merge a run with the same run of another sweep, so that both sweeps' splits are measured.

    Raises:
        InputError: the other sweep has different settings for the same folder.
    """
    if planned is None:
        return sweep, run
    other, twin = planned
    if twin != run:
        raise InputError(
            f"two sweeps have different runs in {run.run_dir}. Give one of them another output_dir and records_dir."
        )
    for name, (before, now) in {
        "launcher": (other.launcher, sweep.launcher),
        "evaluate": ({**other.evaluate, "batch_size": 0}, {**sweep.evaluate, "batch_size": 0}),  # changes no result
    }.items():
        if before != now:
            raise InputError(
                f"two sweeps have the run {run.run_dir}, but another {name}: {getattr(other, name)} and "
                f"{getattr(sweep, name)}. Give both the same, or one of them another output_dir and records_dir."
            )
    return dataclasses.replace(other, splits=[*dict.fromkeys([*other.splits, *sweep.splits])]), run


def _word(value: Any) -> str:
    """Format a value as part of a folder name."""
    words = value if isinstance(value, list) else [value]
    return "+".join("".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in str(word)) for word in words)


def _parse(name: str, recipe: dict[str, Any]) -> tuple[TaskConfig, ModelConfig, TrainConfig]:
    """Parse a run's settings as train.py does, so that errors show now and not after hours."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{name}.yaml")
        _write_recipe(recipe, path)
        try:
            return parse_train(["--config", path], "")
        except InputError as error:
            raise InputError(str(error).replace(path, f"run {name}")) from error


def _write_recipe(recipe: dict[str, Any], path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        yaml.safe_dump(recipe, stream, sort_keys=False, allow_unicode=True)


def state_of(run: Run, splits: Sequence[str], evaluate: Mapping[str, Any]) -> Literal["to do", "done", "diverged"]:
    """The state of a run by its records. One that diverged has only the record of its training.

    Args:
        evaluate: The flags of evaluate.py with which the splits are to be measured.

    Raises:
        InputError: they belong to a run with other settings or were measured with other flags, or are incomplete and
            the run itself is gone.
    """
    path = os.path.join(run.records_dir, RUN_FILE)
    if not os.path.isfile(path):
        return "to do"
    record = read_record(RunRecord, path)
    _check_settings(run, record, run.records_dir)
    if record.status == "diverged":
        return "diverged"
    measured = [path for split in splits if os.path.isfile(path := os.path.join(run.records_dir, f"{split}.json"))]
    for path in measured:
        _check_measured(run, path, evaluate)
    if len(measured) == len(splits):
        return "done"
    _check_still_there(run, record)
    return "to do"


def _check_settings(run: Run, record: RunRecord, folder: str) -> None:
    """Check that the run found in a folder has the planned settings.

    Raises:
        InputError: they differ; the message names them.
    """
    planned, found = (
        {**vars(task), **vars(model), **{name: getattr(training, name) for name in RECIPE_ARGUMENTS}}
        for task, model, training in (
            (run.task, run.model, training_settings(run.training)),
            (record.task, record.model, record.training),
        )
    )
    if differ := [
        f"{name}: was {found[name]!r}, now {planned[name]!r}" for name in found if found[name] != planned[name]
    ]:
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(differ)}. Rename the variant, or choose another "
            "output_dir and records_dir."
        )


def _check_measured(run: Run, path: str, evaluate: Mapping[str, Any]) -> None:
    """Check that a record was measured as it would be now.

    Raises:
        InputError: it was not; the message names the differences.
    """
    record, config = read_record(EvaluationRecord, path), _evaluate_config(evaluate)
    asked = re.search(r"--max_eval_samples[= ](\d+)", record.command)
    precision = record.precision if run.recipe.get("precision", "auto") == "auto" else run.training.precision
    _, corrections = correct_task(run.task, config.corrections)
    pairs: dict[str, tuple[Any, Any]] = {
        "max_eval_samples": (int(asked[1]) if asked else "all", config.max_eval_samples or "all"),
        "bootstrap_samples": (record.bootstrap.samples, config.bootstrap_samples),
        "seed": (record.bootstrap.seed, config.seed),
        "precision": (record.precision, precision),
        "max_new_tokens": (record.max_new_tokens, run.training.max_new_tokens),
        "replaced data settings": (_listed(record.corrections), _listed(corrections)),
    }
    if differ := [
        f"{name}: was {found}, now {planned}" for name, (found, planned) in pairs.items() if found != planned
    ]:
        raise InputError(
            f"{path} was measured differently: {'; '.join(differ)}. Remove it and the run's evaluation to measure "
            "again, or choose another output_dir and records_dir."
        )


def _listed(corrections: Sequence[str]) -> str:
    """Replaced data settings in words."""
    return f"({'; '.join(corrections)})" if corrections else "none"


def _check_still_there(run: Run, kept: RunRecord) -> None:
    """Refuse to retrain a run whose records are kept, because records of two adapters would be mixed.

    Raises:
        InputError: the run folder does not hold the run that the records belong to.
    """
    path = os.path.join(run.run_dir, RUN_FILE)
    found = read_record(RunRecord, path).adapter.sha256 if os.path.isfile(path) else None
    if found != kept.adapter.sha256:
        raise InputError(
            f"{run.records_dir} lacks a split, and {run.run_dir} does not hold the run that its records belong to. "
            "Restore that run folder, or delete the records to train and measure the run again."
        )


# Running


class Runner:
    """Executes the remaining runs, `jobs` at a time, and forwards a stop signal to the running scripts."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped_by: int | None = None
        self._base_locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._done = 0
        self.not_begun = 0

    def run(self, runs: list[tuple[Sweep, Run]]) -> dict[str, str]:
        """Execute runs; return why some failed, by name. After a stop signal, exit once the scripts have stopped."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.config.jobs) as pool:
                found = list(pool.map(lambda item: self._one(item[0], item[1], len(runs)), runs))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self._stopped_by is not None:
            log.info("Stopped after %d runs; the same command resumes the sweep.", self._done)
            sys.exit(128 + self._stopped_by)
        return {run.name: why for (_, run), why in zip(runs, found, strict=True) if why}

    def _stop(self, number: int, _: Any) -> None:
        """Forward a signal, but only once: a second one would interrupt a script that is writing its checkpoint."""
        if self._stopped_by is None:
            self._stopped_by = number
            for process in list(self._running):
                _signal_group(process, number)

    def _one(self, sweep: Sweep, run: Run, count: int) -> str | None:
        """Do one run, from training to records; return the reason if it failed, else None."""
        if self._stopped_by is not None:
            return None
        if self.config.minutes is not None and time.monotonic() - self._began > 60 * self.config.minutes:
            with self._lock:
                self.not_begun += 1
            return None
        try:
            self._train(sweep, run)
            for split in sweep.splits:
                self._evaluate(sweep, run, split)
        except (RunFailedError, InputError, OSError) as error:  # the other runs continue
            return str(error)
        if self._stopped_by is None:
            self._tell(run, sweep.splits[-1], count)
        return None

    def _tell(self, run: Run, split: str, count: int) -> None:
        """Log a run's score and the estimated time left."""
        record = read_record(EvaluationRecord, os.path.join(run.records_dir, f"{split}.json"))
        found = record.finetuned or record.base
        low, high = found.intervals.macro_f1
        with self._lock:
            self._done += 1
            passed = time.monotonic() - self._began
            left = f", about {_duration(passed / self._done * (count - self._done))} left"
            log.info(
                "%s: %s macro-F1 %.3f [%.3f, %.3f]; %d of %d in %s%s",
                *(run.name, split, found.macro_f1, low, high, self._done, count, _duration(passed)),
                left if self._done < count else "",
            )

    def _train(self, sweep: Sweep, run: Run) -> None:
        """Train or resume the training; _evaluate keeps the record, at the very end."""
        recipe, status = f"{run.run_dir}.yaml", run_status(run.run_dir)
        _write_recipe(run.recipe, recipe)
        if status in ("finished", "diverged"):
            _check_settings(run, read_record(RunRecord, os.path.join(run.run_dir, RUN_FILE)), run.run_dir)
        if status == "finished":
            return
        flags = ["--resume_from_checkpoint", "true"] if status else []
        if status != "diverged":
            try:
                self._call(run, [*sweep.launcher, os.path.join(_ROOT, "train.py"), "--config", recipe, *flags])
            except RunFailedError:
                if run_status(run.run_dir) != "diverged":
                    raise
        if run_status(run.run_dir) == "diverged":
            keep_training(run)
            raise RunFailedError(
                f"the training diverged, which is recorded in {run.records_dir}; see the end of {run.run_dir}.log. "
                f"{_ADVICE}"
            )
        if self._stopped_by is None:
            for name in os.listdir(run.run_dir):
                if name.startswith("checkpoint-"):
                    shutil.rmtree(os.path.join(run.run_dir, name))

    def _evaluate(self, sweep: Sweep, run: Run, split: str) -> None:
        if self._stopped_by is not None or os.path.isfile(os.path.join(run.records_dir, f"{split}.json")):
            return
        base = self._measure_base(sweep, run, split)
        if self._stopped_by is None and not _is_measured(
            run, base, split
        ):  # it is if the sweep was killed just after measuring
            self._call(run, [*_evaluate_words(sweep, split, run.run_dir), "--base_results", base])
        if self._stopped_by is None:
            keep_records(run, split)

    def _measure_base(self, sweep: Sweep, run: Run, split: str) -> str:
        """The folder with the base's answers to what this run is asked; they are generated if missing."""
        how = {"precision": run.training.precision, "max_new_tokens": run.training.max_new_tokens}
        name, revision = run.model.model_name_or_path, run.model.model_revision
        asked: dict[str, Any] = {**vars(run.task), **sweep.evaluate, **how, "model": name, "revision": revision}
        asked |= {package: version(package) for package in ("torch", "transformers")}
        # A chat template may write the date: the base is asked as the run was trained, on whatever day.
        trained = read_record(RunRecord, os.path.join(run.run_dir, RUN_FILE))
        asked["prompt"] = dataclasses.asdict(trained.prompt_format)
        asked = {name: value for name, value in asked.items() if split == "train" or name not in _TRAINING_ONLY}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()[:8]
        folder = os.path.join(sweep.output_dir, f"base-{key}")
        with self._lock:
            lock = self._base_locks.setdefault(f"{key} {split}", threading.Lock())
        with lock:
            if self._stopped_by is None and not os.path.isfile(os.path.join(folder, f"{split}.json")):
                own = {"config": f"{run.run_dir}.yaml", "prompt_of": run.run_dir, "output_dir": folder}
                flags = _flags({**own, **how})
                self._call(run, [*_evaluate_words(sweep, split, name), *flags])
        return folder

    def _call(self, run: Run, words: list[str]) -> None:
        """Run a script to its end, with its output appended to <run folder>.log.

        Raises:
            RunFailedError: the script ended with an error.
        """
        if self._stopped_by is not None:
            return
        path = f"{run.run_dir}.log"
        with open(path, "ab") as stream:
            stream.write(f"$ {shlex.join(words)}\n".encode())
            stream.flush()
            # In its own process group: otherwise it would get the terminal's Ctrl-C as well as the forwarded signal.
            process = subprocess.Popen(
                words, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_end_with_parent
            )
            self._running.add(process)
            if self._stopped_by is not None:  # stopped since the check above
                _signal_group(process, self._stopped_by)
            status = process.wait()
            while _signal_group(process, 0):  # a launcher may end before the processes it launched
                time.sleep(0.1)
            self._running.discard(process)
        if status and self._stopped_by is None:
            raise RunFailedError(f"a script exited with status {status}; see the end of {path}")


def _end_with_parent() -> None:
    """Ask Linux, with prctl(2), to end this process, which is about to become a script, when the sweep is killed.

    Otherwise an orphaned training would continue, and the resumed sweep would start another in the same run folder.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal (0: none) to a script and all processes it started; True if any of them exists."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_measured(run: Run, base: str, split: str) -> bool:
    """True if the run folder holds this measurement: of its adapter, compared with the base's answers in `base`."""
    path = os.path.join(run.run_dir, "evaluation", f"{split}.json")
    if not os.path.isfile(path):
        return False
    found = read_record(EvaluationRecord, path)
    adapter = read_record(RunRecord, os.path.join(run.run_dir, RUN_FILE)).adapter.sha256
    measured = read_record(EvaluationRecord, os.path.join(base, f"{split}.json")).created
    return (found.adapter_sha256, found.base_measured) == (adapter, measured)


def _evaluate_words(sweep: Sweep, split: str, target: str) -> list[str]:
    script = os.path.join(_ROOT, "evaluate.py")
    return [*sweep.launcher, script, target, f"--split={split}", "--report_to=none", *_flags(sweep.evaluate)]


def keep_records(run: Run, split: str) -> None:
    """Copy the records of a run and its evaluation to the sweep's records, without texts and weights."""
    results = os.path.join(run.run_dir, "evaluation")
    record = read_record(EvaluationRecord, os.path.join(results, f"{split}.json"))
    lines = read_predictions(os.path.join(results, split, PREDICTIONS))
    keep_training(run)
    write_record(os.path.join(run.records_dir, f"{split}.{KEPT_PREDICTIONS}"), compact_predictions(lines, record))
    write_record(
        os.path.join(run.records_dir, f"{split}.json"), record
    )  # last, because it marks the others as complete


def keep_training(run: Run) -> None:
    """Copy the record of a run's training to the sweep's records, without texts."""
    record = read_record(RunRecord, os.path.join(run.run_dir, RUN_FILE))
    record = dataclasses.replace(record, train_data=dataclasses.replace(record.train_data, first_texts={}))
    write_record(os.path.join(run.records_dir, RUN_FILE), record)


def _duration(seconds: float) -> str:
    """Format a duration: 45 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


if __name__ == "__main__":
    run_script(main, "tweetdora.sweep")
