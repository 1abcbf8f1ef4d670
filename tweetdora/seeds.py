"""Statistics over seeds: a group's mean, its uncertainty from seeds and from rows, and paired differences.

A group is the runs with the same settings and different seeds. The uncertainty of its mean score is reported as:

- the spread over seeds: the standard deviation of the runs' scores on the same rows;
- the interval over rows: how the scores of these same runs would vary on other rows of this kind, by a bootstrap that
  draws the same rows for every run;
- the interval over both: rows and seeds are drawn independently (Owen, The pigeonhole bootstrap, Annals of Applied
  Statistics 1, 2007). From k seeds, k - 1 are drawn, so that their mean varies as much as the mean of k does (Rao and
  Wu, Resampling inference with complex survey data, JASA 83, 1988). With 2 or 3 seeds it is only a rough indication.
"""

import glob
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tweetdora.errors import InputError
from tweetdora.files import read_json
from tweetdora.metrics import confusion_matrix, interval_of, mcnemar_p_value, scores
from tweetdora.record_files import read_predictions, read_record
from tweetdora.records import (
    KEPT_PREDICTIONS,
    PREDICTIONS,
    RUN_FILE,
    CompactPredictions,
    EvaluationRecord,
    Interval,
    ModelMetrics,
    RunRecord,
    compact_predictions,
)
from tweetdora.train_config import RESULT_ARGUMENTS, ROUNDING_ARGUMENTS

_IN_EVERY_RUN = ("seed", "data_seed", *ROUNDING_ARGUMENTS)  # in which the runs of a group may differ
# Where base and data came from, and which rows are measured: not settings of the training.
_NO_SETTING = (
    "dataset_revision",
    "model_revision",
    "validation_split",
    "validation_share",
    "test_split",
    "test_share",
)


@dataclass(frozen=True)
class MeasuredRun:
    """A run and its evaluation; `labels` and `finetuned` are arrays (N,) of label ids, with -1 for unparsed."""

    folder: str
    run: RunRecord
    evaluation: EvaluationRecord
    finetuned_metrics: ModelMetrics
    labels: np.ndarray
    finetuned: np.ndarray

    @property
    def seed(self) -> int:
        """The seed of the adapter's initialization and the data order."""
        return int(self.run.training.seed)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect the run's result, except the seed."""
        return settings_of(self.run)


def settings_of(run: RunRecord) -> dict[str, Any]:
    """The settings that affect a run's result, except the seed."""
    training = {name: getattr(run.training, name) for name in RESULT_ARGUMENTS if name not in _IN_EVERY_RUN}
    found = {**vars(run.task), **vars(run.model), **training}
    return {name: value for name, value in found.items() if name not in _NO_SETTING}


def _made_of(run: RunRecord) -> dict[str, Any]:
    """The base model and training data that a run actually used, whatever its settings call them."""
    return {"base model": run.base_model, "set of training examples": run.train_data.sha256}


@dataclass(frozen=True)
class Group:
    """Runs that differ only in the seed; `settings` are those in which the group differs from other groups.

    `diverged` are the seeds of the runs with these settings that diverged: they have no scores.
    """

    settings: dict[str, Any]
    runs: list[MeasuredRun]
    diverged: list[int] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The runs' seeds, in order."""
        return [found.seed for found in self.runs]


@dataclass(frozen=True)
class Summary:
    """The mean of a score over runs; `deviation` is the standard deviation over seeds, None for one run."""

    mean: float
    values: list[float]
    deviation: float | None
    rows_interval: Interval
    interval: Interval  # over rows and seeds; for one run, over rows only


@dataclass(frozen=True)
class SeedDifference:
    """One group's mean minus another's; the fields from `common_seeds` on cover the seeds that both groups have.

    If a group has a seed that the other lacks (not `same_seeds`), `interval` is not paired by seed.
    """

    difference: float
    rows_interval: Interval
    interval: Interval | None  # over rows and seeds; None if a group has one seed, so that its spread is unknown
    same_seeds: bool
    common_seeds: list[int]
    common_difference: float | None  # None if there is no common seed
    seeds_above: int  # the number of common seeds for which the first is above the second
    fixed: list[int]
    broken: list[int]
    p_values: list[float]  # McNemar's


# Reading


def find_runs(paths: Sequence[str], split: str) -> list[MeasuredRun]:
    """Find the runs measured on a split in run folders, folders of runs, or patterns such as results/rates/*.

    Raises:
        InputError: a path has no such run, or the runs were measured on different rows.
    """
    found: list[MeasuredRun] = []
    for path in paths:
        before = len(found)
        for folders in _matches(path):
            read = [_read_run(folder, split) for folder in folders]
            found += [one for one in read if one is not None]
        if len(found) == before:
            diverged = find_diverged([path])
            note = f"; {len(diverged)} diverged" if diverged else ""
            raise InputError(
                f"no run in {path} was measured on the {split} split{note}. Expected run folders, or a sweep's "
                f"records_dir, with {RUN_FILE} and {split}.json; --split names another split."
            )
    _check_same_rows(found)
    return found


def find_diverged(paths: Sequence[str]) -> dict[str, RunRecord]:
    """The runs that diverged by folder, searched for as in `find_runs`; they have no scores.

    Raises:
        InputError: the record of one cannot be read.
    """
    folders = dict.fromkeys(folder for path in paths for match in _matches(path) for folder in match)
    found = {folder: _read_diverged(folder) for folder in folders}
    return {folder: run for folder, run in found.items() if run is not None}


def _read_diverged(folder: str) -> RunRecord | None:
    """Read the run in a folder if it diverged; None for any other, and for a file that is no record."""
    path = os.path.join(folder, RUN_FILE)
    try:
        value = read_json(path)
    except InputError:
        return None
    is_diverged = isinstance(value, dict) and value.get("status") == "diverged"
    return read_record(RunRecord, path) if is_diverged else None


def _matches(path: str) -> list[list[str]]:
    """The folders that a path or pattern names, each followed by the folders in it."""
    folders = filter(os.path.isdir, sorted(glob.glob(path)))
    return [[folder, *sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())] for folder in folders]


def measured_in(folder: str, split: str) -> bool:
    """True if a folder of runs has one that was measured on the split."""
    places = ("", "evaluation", "*", "*/evaluation")
    return any(glob.glob(os.path.join(glob.escape(folder), place, f"{split}.json")) for place in places)


def _read_run(folder: str, split: str) -> MeasuredRun | None:
    """Read the run in a folder and its evaluation; None if either is missing."""
    run_path = os.path.join(folder, RUN_FILE)
    live = os.path.join(folder, "evaluation")
    results = live if os.path.isdir(live) else folder
    path = os.path.join(results, f"{split}.json")
    if not (os.path.isfile(run_path) and os.path.isfile(path)):
        return None
    run, evaluation = read_record(RunRecord, run_path), read_record(EvaluationRecord, path)
    kept = os.path.join(results, f"{split}.{KEPT_PREDICTIONS}")
    if os.path.isfile(kept):
        answers = read_record(CompactPredictions, kept)
    else:
        answers = compact_predictions(read_predictions(os.path.join(results, split, PREDICTIONS)), evaluation)
    labels, finetuned = (_numbers(line) for line in (answers.labels, answers.finetuned))
    matrix = confusion_matrix(labels.tolist(), finetuned.tolist(), len(evaluation.label_words)).tolist()
    metrics = evaluation.finetuned
    if metrics is None or answers.adapter_sha256 != run.adapter.sha256 or matrix != metrics.confusion_matrix:
        raise InputError(
            f"{folder}: its records are not of one run, or not of the same answers. Measure the run again."
        )
    return MeasuredRun(folder, run, evaluation, metrics, labels, finetuned)


def find_sisters(run_dir: str, split: str, paths: Sequence[str] = ()) -> tuple[Group | None, list[str]]:
    """Group a run with those that differ from it only in the seed; also return a sentence per run skipped.

    They are searched for next to the run folder and in `paths`, which are folders of runs or of kept records. They
    must have been measured on the same examples in the same precision, or have diverged, in which case the group has
    their seeds. It is None if there are no such runs.
    """
    own = _read_run(run_dir, split)
    if own is None:
        return None, []
    by_seed, diverged, passed_over = {own.seed: own}, set[int](), []
    for folder in _folders_to_look_in(run_dir, paths):
        try:
            run = read_record(RunRecord, os.path.join(folder, RUN_FILE))
            if settings_of(run) != own.settings or _made_of(run) != _made_of(own.run):
                continue
            found = _read_run(folder, split)
        except InputError as error:  # a damaged folder must not prevent publishing another run
            passed_over.append(f"{folder} is skipped: {error}")
            continue
        if run.status == "diverged":
            diverged.add(int(run.training.seed))
            passed_over.append(f"{folder} differs only in the seed, but diverged")
        elif found is None:
            passed_over.append(f"{folder} differs only in the seed, but was not measured on the {split} split")
        elif not _measured_alike(own.evaluation, found.evaluation):
            passed_over.append(f"{folder} differs only in the seed, but was measured differently or on other examples")
        else:
            by_seed.setdefault(found.seed, found)
    diverged -= set(by_seed)
    if len(by_seed) == 1 and not diverged:
        return None, passed_over
    return Group({}, [by_seed[seed] for seed in sorted(by_seed)], sorted(diverged)), passed_over


def _folders_to_look_in(run_dir: str, paths: Sequence[str]) -> list[str]:
    """The folders with a run record next to `run_dir` and in `paths`, each once and without `run_dir`."""
    own = os.path.realpath(run_dir)
    found: dict[str, None] = {}
    for path in (os.path.dirname(own), *paths):
        inner = sorted(entry.path for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
        found |= dict.fromkeys(os.path.realpath(folder) for folder in (path, *inner))
    return [folder for folder in found if folder != own and os.path.isfile(os.path.join(folder, RUN_FILE))]


def _measured_alike(first: EvaluationRecord, second: EvaluationRecord) -> bool:
    def what(record: EvaluationRecord) -> tuple[Any, ...]:
        """What scores depend on, in addition to the model."""
        return record.data.sha256, record.label_words, record.precision, record.max_new_tokens

    return what(first) == what(second)


def _measured_as_trained(found: MeasuredRun) -> bool:
    """True if it was measured in the precision and with the token budget of its training, which may be compared."""
    measured = found.evaluation.precision, found.evaluation.max_new_tokens
    return measured == (found.run.training.precision, found.run.max_new_tokens)


def _numbers(line: str) -> np.ndarray:
    return np.array([int(word) for word in line.split()], dtype=np.int64)


def _check_same_rows(runs: Sequence[MeasuredRun]) -> None:
    """Check that all runs were measured on the same rows; otherwise a difference could come from the rows.

    Raises:
        InputError: two runs differ; the message names the first two.
    """
    first, as_trained = runs[0], all(map(_measured_as_trained, runs))
    for other in runs[1:]:
        for what, before, now in (
            ("label words", first.evaluation.label_words, other.evaluation.label_words),
            ("examples", first.evaluation.data.sha256, other.evaluation.data.sha256),
        ):
            if before != now:
                counts = [found.evaluation.data.num_examples for found in (first, other)]
                raise InputError(
                    f"{first.folder} and {other.folder} were measured on different {what} ({counts[0]:,} and "
                    f"{counts[1]:,} examples), so their scores cannot be compared. Leave one of them out, or measure "
                    "both on the same split and --max_eval_samples."
                )
        if not as_trained and not _measured_alike(first.evaluation, other.evaluation):
            how = [
                f"{found.precision} and max_new_tokens {found.max_new_tokens}"
                for found in (first.evaluation, other.evaluation)
            ]
            raise InputError(
                f"{first.folder} and {other.folder} were measured differently ({how[0]}; {how[1]}). Measure one again "
                "with evaluate.py's --precision and --max_new_tokens of the other."
            )


def group_runs(runs: Sequence[MeasuredRun], diverged: Iterable[RunRecord] = ()) -> list[Group]:
    """Group the runs by their settings; each group is sorted by seed, and has the seeds of its runs that diverged.

    Raises:
        InputError: two runs have the same settings and seed, or the same settings but different data or bases.
    """
    groups: list[tuple[dict[str, Any], list[MeasuredRun]]] = []
    for run in runs:
        known = next((members for settings, members in groups if settings == run.settings), None)
        if known is None:
            groups.append((run.settings, [run]))
            continue
        if twin := next((other for other in known if other.seed == run.seed), None):
            raise InputError(f"{twin.folder} and {run.folder} have the same settings and seed; name only one of them.")
        if differ := [name for name, value in _made_of(run.run).items() if value != _made_of(known[0].run)[name]]:
            what = " and a different ".join(differ)
            raise InputError(
                f"{known[0].folder} and {run.folder} have the same settings but a different {what}: the files at "
                "their paths changed between the runs. Leave one of them out."
            )
        known.append(run)
    names = list(groups[0][0])
    differing = [name for name in names if any(settings.get(name) != groups[0][0][name] for settings, _ in groups)]
    lost = list(diverged)
    return [
        Group(
            {name: settings[name] for name in differing},
            sorted(members, key=lambda found: found.seed),
            _lost_seeds(members, lost),
        )
        for settings, members in groups
    ]


def _lost_seeds(members: Sequence[MeasuredRun], diverged: Iterable[RunRecord]) -> list[int]:
    """The seeds of the runs that differ from the members in the seed alone and diverged."""
    settings, made_of = members[0].settings, _made_of(members[0].run)
    alike = [run for run in diverged if settings_of(run) == settings and _made_of(run) == made_of]
    return sorted({int(run.training.seed) for run in alike} - {found.seed for found in members})


# Statistics


def resample(runs: Sequence[MeasuredRun], samples: int, seed: int, metric: str = "macro_f1") -> np.ndarray:
    """Score each run on each resample of the rows (samples, runs); the rows are the same for all runs."""
    num_labels = len(runs[0].evaluation.label_words)
    cells = [found.labels * (num_labels + 1) + found.finetuned % (num_labels + 1) for found in runs]
    generator, count = np.random.default_rng(seed), len(runs[0].labels)
    shape = (num_labels, num_labels + 1)
    values = np.empty((samples, len(runs)))
    for number in range(samples):
        drawn = np.bincount(generator.integers(0, count, count), minlength=count)
        matrices = [np.bincount(found, drawn, shape[0] * shape[1]).reshape(shape) for found in cells]
        values[number] = scores(np.stack(matrices))[metric]
    return values


def summarise(group: Group, samples: int = 2_000, seed: int = 0) -> Summary:
    """Compute a group's mean macro-F1, its spread and its intervals."""
    values = [found.finetuned_metrics.macro_f1 for found in group.runs]
    drawn = resample(group.runs, samples, seed)
    return Summary(
        mean=float(np.mean(values)),
        values=values,
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        rows_interval=interval_of(drawn.mean(1)),
        interval=interval_of(_over_seeds(drawn, _draw_seeds(len(values), samples, seed))),
    )


def difference(first: Group, second: Group, samples: int = 2_000, seed: int = 0) -> SeedDifference:
    """The first group's mean macro-F1 minus the second's on the same rows; paired by seed if both have the same."""
    drawn = resample([*first.runs, *second.runs], samples, seed)
    one, other = drawn[:, : len(first.runs)], drawn[:, len(first.runs) :]
    paired = first.seeds == second.seeds
    common = [(ours, theirs) for ours in first.runs for theirs in second.runs if ours.seed == theirs.seed]
    apart = [ours.finetuned_metrics.macro_f1 - theirs.finetuned_metrics.macro_f1 for ours, theirs in common]
    picks = _draw_seeds(len(first.runs), samples, seed)
    picks_other = picks if paired else _draw_seeds(len(second.runs), samples, seed + 1)
    values = [[found.finetuned_metrics.macro_f1 for found in group.runs] for group in (first, second)]
    changes = [_changes(ours, theirs) for ours, theirs in common]
    return SeedDifference(
        difference=float(np.mean(values[0]) - np.mean(values[1])),
        rows_interval=interval_of(one.mean(1) - other.mean(1)),
        interval=(
            interval_of(_over_seeds(one, picks) - _over_seeds(other, picks_other))
            if min(len(first.runs), len(second.runs)) > 1
            else None
        ),
        same_seeds=paired,
        common_seeds=[ours.seed for ours, _ in common],
        common_difference=float(np.mean(apart)) if apart else None,
        seeds_above=sum(one > 0 for one in apart),
        fixed=[fixed for fixed, _ in changes],
        broken=[broken for _, broken in changes],
        p_values=[mcnemar_p_value(*counts) for counts in changes],
    )


def _draw_seeds(count: int, samples: int, seed: int) -> np.ndarray:
    """Indices of runs (samples, k - 1), drawn with replacement; for a single run, always 0."""
    if count == 1:
        return np.zeros((samples, 1), dtype=np.int64)
    return np.random.default_rng([seed, count]).integers(0, count, (samples, count - 1))


def _over_seeds(drawn: np.ndarray, picks: np.ndarray) -> np.ndarray:
    return np.take_along_axis(drawn, picks, axis=1).mean(1)


def _changes(ours: MeasuredRun, theirs: MeasuredRun) -> tuple[int, int]:
    """Count the rows that only the first run gets right, and those that only the second gets right."""
    right, right_theirs = ours.finetuned == ours.labels, theirs.finetuned == theirs.labels
    return int((right & ~right_theirs).sum()), int((~right & right_theirs).sum())


def all_pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """All pairs of groups, each with the better one first."""
    ranked = sorted(groups, key=lambda group: -float(np.mean([run.finetuned_metrics.macro_f1 for run in group.runs])))
    return list(itertools.combinations(ranked, 2))


def settings_text(settings: dict[str, Any]) -> str:
    """Format a group's settings: learning_rate 0.0005, method dora."""
    shown = (f"{name} {value_text(value)}".strip() for name, value in settings.items())
    return ", ".join(shown) or "all runs"


def value_text(value: Any) -> str:
    """Format a setting's value."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    if value is None or isinstance(value, bool):  # a mapping would take 1.0 for True
        return "all" if value is None else ("yes" if value else "no")
    return f"{value:g}" if isinstance(value, float) else str(value)
