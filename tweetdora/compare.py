"""Compare runs of any task on the same rows: a table over seeds, paired tests and a plot.

    python -m tweetdora.compare runs/dora runs/lora                 # run folders that evaluate.py has measured
    python -m tweetdora.compare results/rates --split validation    # the records of a sweep
    python -m tweetdora.compare results/rates --plot rates.png --x learning_rate
    python -m tweetdora.compare results/template.md --output results/README.md    # a page with tables and plots

Runs that differ only in the seed form one row. A page is a Jinja template that can call table(), machines(), spent(),
differences(), plot(), bars(), reliability(), evaluation() and cross_table(). Its paths are relative to the page.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import jinja2

from tweetdora.cli import parse_with_paths, run_script
from tweetdora.config import AT_LEAST_1, Flag, check_ranges
from tweetdora.errors import InputError
from tweetdora.evaluation import format_p
from tweetdora.plots import plot_bars, plot_groups, plot_reliability
from tweetdora.records import Environment, Interval
from tweetdora.seeds import (
    Group,
    MeasuredRun,
    SeedDifference,
    Summary,
    all_pairs,
    difference,
    find_diverged,
    find_runs,
    group_runs,
    measured_in,
    settings_text,
    summarise,
)
from tweetdora.tables import read_rows

log = logging.getLogger("tweetdora.compare")
_RUNS = "Run folder, folder of runs or of records, or pattern; or the template of a page, .md."


@dataclass(frozen=True)
class CompareConfig:
    """Flags, in addition to the runs."""

    split: str = field(default="test", metadata={"help": "Split that the runs were measured on."})
    output: str | None = field(
        default=None, metadata={"help": "File for the table or the page. If unset, standard output."}
    )
    plot: str | None = field(default=None, metadata={"help": "File for a plot of the groups, .png or .svg."})
    x: str | None = field(
        default=None,
        metadata={"help": "Setting on the plot's x axis, such as learning_rate. If unset, the groups' names."},
    )
    bootstrap_samples: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=2_000, metadata={"help": "Bootstrap resamples for the 95 %% intervals."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    config, paths = parse_with_paths(argv, CompareConfig, __doc__.partition("\n")[0], "RUN", _RUNS)

    is_page = paths[0].endswith(".md")
    if is_page and (len(paths) > 1 or config.plot or config.x or config.split != "test"):
        raise InputError(
            f"{paths[0]} is a page, which itself names runs, splits and plots. Give it alone, with --output and "
            "--bootstrap_samples at most."
        )
    if config.x and not config.plot:
        raise InputError(f"--x {config.x} needs --plot, the file to draw.")

    # load, work
    if is_page:
        text = render_page(paths[0], config)
    else:
        diverged = find_diverged(paths)
        groups = group_runs(find_runs(paths, config.split), diverged.values())
        parts = [format_table(groups, config), format_diverged(diverged), format_machines(groups)]
        parts.append(format_differences(all_pairs(groups), config))
        text = "\n\n".join(filter(None, parts)) + "\n"
        if config.plot:
            draw_plot(groups, config.plot, config.x, config)

    # save
    if config.output is None:
        log.info(text)
        return 0
    with open(config.output, "w", encoding="utf-8") as stream:
        stream.write(text)
    log.info("Wrote %s.", config.output)
    return 0


# Tables


_HEADER = (
    *("runs", "seeds", "macro-F1", "SD over seeds", "95 % over rows", "95 % over rows and seeds"),
    *("accuracy", "parse", "exact", "EOS", "most likely", "log loss", "minutes", "memory"),
)


def format_table(groups: Sequence[Group], config: CompareConfig) -> str:
    """Format the groups as a Markdown table, best first."""
    found = [(summarise(group, config.bootstrap_samples), group) for group in groups]
    ranked = sorted(found, key=lambda pair: -pair[0].mean)
    rows = [(settings_text(group.settings), *_cells(group, summary)) for summary, group in ranked]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (_HEADER, ("---",) * len(_HEADER), *rows))


def _cells(group: Group, found: Summary) -> tuple[str, ...]:
    """A group's row, without its name."""
    metrics = [run.finetuned_metrics for run in group.runs]
    likelihoods = [metric.likelihood for metric in metrics if metric.likelihood is not None]
    if len(likelihoods) < len(metrics):  # records of an early version have none
        likelihoods = []
    results = [run.run.result for run in group.runs if run.run.result is not None]
    minutes = _mean([result.seconds / 60 for result in results])
    memory = _mean([_peak_memory(result.peak_memory_bytes) for result in results])
    return (
        f"{len(group.runs)} ({len(group.diverged)} diverged)" if group.diverged else str(len(group.runs)),
        f"**{found.mean:.3f}**",
        "" if found.deviation is None else f"{found.deviation:.3f}",
        interval_text(found.rows_interval),
        "" if found.deviation is None else interval_text(found.interval),
        f"{_mean([metric.accuracy for metric in metrics]):.3f}",
        *(share_text(_mean([getattr(metric, name) for metric in metrics])) for name in ("parse_rate", "exact_match")),
        share_text(_mean([metric.eos_rate for metric in metrics])),
        f"{_mean([one.macro_f1 for one in likelihoods]):.3f}" if likelihoods else "",
        f"{_mean([one.log_loss for one in likelihoods]):.3f}" if likelihoods else "",
        f"{minutes:.1f}",
        f"{memory:.1f} GB",
    )


def _peak_memory(by_place: dict[str, int]) -> float:
    """The largest peak memory of a GPU, or of a process if there was no GPU, in GB."""
    on_gpus = {place: size for place, size in by_place.items() if place.startswith("gpu")}
    return max((on_gpus or by_place).values(), default=0) / 1e9


def format_diverged(folders: Iterable[str]) -> str:
    """A sentence on the runs in these folders, which diverged; empty if there is none."""
    names = ", ".join(os.path.basename(os.path.normpath(folder)) for folder in folders)
    return f"These runs diverged, so they have no scores and are in no mean: {names}." if names else ""


def format_machines(groups: Sequence[Group]) -> str:
    """A sentence on the machines used to train and measure: not a setting, but they may change the last digits."""
    runs = [run for group in groups for run in group.runs]
    trained = sorted({_machine(run.run.environment) for run in runs})
    measured = sorted({_machine(run.evaluation.environment) for run in runs})
    return f"Trained on {', '.join(trained)}; measured on {', '.join(measured)}."


def format_spent(by_split: Mapping[str, Sequence[MeasuredRun]]) -> str:
    """A table of what runs took, by machine: trainings, and the fine-tuned models' generations and likelihoods."""
    trained: dict[str, dict[str, float]] = {}  # seconds by machine and folder; a run is trained once for all splits
    measured: dict[str, dict[str, float]] = {split: defaultdict(float) for split in by_split}
    for split, runs in by_split.items():
        for run in runs:
            training, metrics = run.run.result, run.finetuned_metrics
            trained.setdefault(_machine(run.run.environment), {})[run.folder] = training.seconds if training else 0.0
            scoring = metrics.likelihood.seconds if metrics.likelihood else 0.0
            measured[split][_machine(run.evaluation.environment)] += metrics.seconds + scoring
    lines = [
        f"| machine | runs | training | {' | '.join(f'answers on {split}' for split in by_split)} |",
        "|---" * (3 + len(by_split)) + "|",
    ]
    for machine in sorted({*trained, *(name for found in measured.values() for name in found)}):
        runs_here = trained.get(machine, {})
        spent = [sum(runs_here.values()), *(measured[split][machine] for split in by_split)]
        cells = [_duration(seconds) if seconds else "" for seconds in spent]
        lines.append(f"| {machine} | {len(runs_here) or ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _machine(environment: Environment) -> str:
    hardware, torch_version = environment.hardware, environment.packages["torch"]
    return f"{' and '.join(hardware.gpus) or hardware.cpu} (torch {torch_version})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def interval_text(interval: Interval) -> str:
    """Format an interval for the tables."""
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def share_text(share: float) -> str:
    """Format a share in per cent; only a share of exactly 1 is shown as 100."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %"


def format_differences(pairs: Sequence[tuple[Group, Group]], config: CompareConfig) -> str:
    """A line per pair of groups with the difference and its interval; empty for no pair."""
    lines = []
    for first, second in pairs:
        found = difference_text(difference(first, second, config.bootstrap_samples))
        lines.append(f"- **{settings_text(first.settings)}** − {settings_text(second.settings)}: {found}")
    return "\n".join(lines)


def difference_text(found: SeedDifference) -> str:
    """Format a difference as text."""
    low, high = found.interval or found.rows_interval
    what = "rows and seeds" if found.interval else "rows, with one seed of a group"
    text = f"{found.difference:+.3f}, 95 % over {what} [{low:+.3f}, {high:+.3f}]"
    count = len(found.common_seeds)
    if not found.same_seeds:
        text += ", not paired by seed"
    if found.common_difference is None:
        return text
    if not found.same_seeds:
        named = f"seed{'s' if count > 1 else ''} {', '.join(map(str, found.common_seeds))}"
        text += f"; for {named}, which both have, {found.common_difference:+.3f}"
    pairs = (
        f"{fixed} examples fixed, {broken} broken (McNemar p {format_p(value)})"
        for fixed, broken, value in zip(found.fixed, found.broken, found.p_values, strict=True)
    )
    return f"{text}; higher in {found.seeds_above} of {count} seeds; per seed: {'; '.join(pairs)}"


# Plots


def draw_plot(groups: Sequence[Group], path: str, x: str | None, config: CompareConfig, title: str = "") -> None:
    """Plot every run's macro-F1 as a point and each group's mean with its interval, over the setting `x` if given.

    Raises:
        InputError: the groups do not differ in `x`, or it is not a number.
    """
    if x is not None and any(x not in group.settings for group in groups):
        known = ", ".join(groups[0].settings) or "no setting"
        raise InputError(f"--x is {x}, but these runs differ in {known}. Name one of these, or leave --x out.")
    if x is not None and not all(type(group.settings[x]) in (int, float) for group in groups):
        raise InputError(
            f"--x is {x}, which is not a number in all of these runs. Name another setting, or leave --x out."
        )
    drawn = []
    for group in groups:
        others = {name: value for name, value in group.settings.items() if name != x}
        found = summarise(group, config.bootstrap_samples)
        drawn.append(
            (settings_text(others), group.settings[x] if x else None, found.values, found.mean, found.interval)
        )
    shown = title or f"{groups[0].runs[0].evaluation.data.display_name}, {groups[0].runs[0].evaluation.split}"
    plot_groups(drawn, path, shown, x)


# Pages


_CALLS = ("table", "machines", "spent", "differences", "plot", "bars", "reliability", "evaluation", "cross_table")


class _Page:
    """The functions that a page's template can call; paths are relative to the page."""

    def __init__(self, folder: str, config: CompareConfig) -> None:
        self.folder, self.config = folder, config

    def groups(self, *paths: str, split: str = "test") -> list[Group]:
        """Group the runs in these folders."""
        places = [os.path.join(self.folder, path) for path in paths]
        return group_runs(find_runs(places, split), find_diverged(places).values())

    def _against(self, reference: str, *paths: str, split: str) -> tuple[list[Group], Group]:
        """The groups of these runs and that of the reference, named by the settings that differ from its own."""
        folders = {os.path.realpath(run.folder) for run in find_runs([os.path.join(self.folder, reference)], split)}
        groups = self.groups(*paths, split=split)
        found = [group for group in groups if {os.path.realpath(run.folder) for run in group.runs} == folders]
        if len(found) != 1:
            raise InputError(f"against={reference!r}: expected the runs of one group among those that are shown.")
        own = found[0].settings
        named = [
            replace(group, settings={name: value for name, value in group.settings.items() if value != own[name]})
            for group in groups
        ]
        return [group for group in named if group.settings], replace(found[0], settings={"": "reference"})

    def table(self, *paths: str, split: str = "test", against: str | None = None) -> str:
        """The table of these runs; `against`: the reference, from which they are named."""
        if against is None:
            groups = self.groups(*paths, split=split)
        else:
            others, reference = self._against(against, *paths, split=split)
            groups = [*others, reference]
        diverged = format_diverged(find_diverged([os.path.join(self.folder, path) for path in paths]))
        return "\n\n".join(filter(None, [format_table(groups, self.config), diverged]))

    def machines(self, *paths: str, split: str = "test") -> str:
        """The machines that trained and measured these runs."""
        return format_machines(self.groups(*paths, split=split))

    def spent(self, *paths: str) -> str:
        """What the runs in these folders took, on both splits; a folder without a run on a split has none there."""
        places = [os.path.join(self.folder, path) for path in paths]
        for place in places:
            if not any(measured_in(place, split) for split in ("validation", "test")):
                raise InputError(f"{place} has no run that was measured on validation or test; expected a folder.")
        found = {
            split: [run for place in places if measured_in(place, split) for run in find_runs([place], split)]
            for split in ("validation", "test")
        }
        # Paths may overlap.
        once = {split: {os.path.realpath(run.folder): run for run in runs} for split, runs in found.items()}
        return format_spent({split: [*runs.values()] for split, runs in once.items()})

    def differences(self, *paths: str, split: str = "test", against: str | None = None) -> str:
        """The paired differences of these runs; `against`: only those to the reference."""
        if against is None:
            return format_differences(all_pairs(self.groups(*paths, split=split)), self.config)
        groups, reference = self._against(against, *paths, split=split)
        return format_differences([(group, reference) for group in groups], self.config)

    def plot(
        self,
        file: str,
        *paths: str,
        split: str = "test",
        x: str | None = None,
        title: str = "",
    ) -> str:
        """Plot these runs to a file next to the page; return the Markdown that shows it."""
        groups = self.groups(*paths, split=split)
        draw_plot(groups, os.path.join(self.folder, file), x, self.config, title)
        return f"![{title or 'macro-F1 of the runs'}]({file})"

    def bars(self, file: str, base: str, finetuned: dict[str, str], split: str = "test", title: str = "") -> str:
        """Draw macro-F1 before and after as bars, with the baselines of the last runs' rows between them.

        base: what to call the base model. finetuned: the folders of runs by what to call them.
        """
        bars = []
        for name, path in finetuned.items():
            groups = self.groups(path, split=split)
            if len(groups) != 1:
                raise InputError(f"bars(): {path} holds {len(groups)} groups of runs; expected one.")
            summary = summarise(groups[0], self.config.bootstrap_samples)
            bars.append((name, summary.mean, summary.interval, "finetuned"))
        record = groups[0].runs[0].evaluation
        others = [(other.name, other.macro_f1, other.macro_f1_interval, "other") for other in record.baselines.others]
        guess = ("uniform guessing", record.baselines.uniform.macro_f1, None, "other")
        before = (base, record.base.macro_f1, record.base.intervals.macro_f1, "base")
        between = sorted([guess, *others], key=lambda bar: bar[1])
        plot_bars([before, *between, *bars], os.path.join(self.folder, file), title, "macro-F1")
        return f"![{title}]({file})"

    def reliability(self, file: str, path: str, split: str = "test", title: str = "") -> str:
        """Plot accuracy over probability for a run's base and fine-tuned model; return the Markdown that shows it."""
        (run,) = find_runs([os.path.join(self.folder, path)], split)
        plot_reliability(run.evaluation.likelihoods, os.path.join(self.folder, file), title)
        return f"![{title}]({file})"

    def cross_table(self, file: str, rows: str, columns: str) -> str:
        """Count each pair of values in two columns of a .csv file."""
        return cross_table(os.path.join(self.folder, file), rows, columns)

    def evaluation(self, path: str, split: str = "test") -> Any:
        """The evaluation record of one run."""
        (run,) = find_runs([os.path.join(self.folder, path)], split)
        return run.evaluation


def cross_table(path: str, rows: str, columns: str) -> str:
    """Count each pair of values in two columns of a .csv file, as a Markdown table.

    Raises:
        InputError: a column does not exist.
    """
    found = list(read_rows(path))
    if not found:
        raise InputError(f"{path} has no rows; expected the columns {rows} and {columns}.")
    for name in (rows, columns):
        if name not in found[0].values:
            raise InputError(f"{path} has no column {name!r}; its columns are {', '.join(found[0].values)}.")
    counts = Counter((str(row.values[rows]), str(row.values[columns])) for row in found)
    names, across = ([*dict.fromkeys(pair[place] for pair in sorted(counts))] for place in (0, 1))
    across.sort()
    cells = [[name, *(str(counts[name, other]) for other in across)] for name in names]
    sums = [str(sum(counts[name, other] for name in names)) for other in across]
    lines = [[f"{rows} / {columns}", *across], ["---"] * (len(across) + 1), *cells, ["all", *sums]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render_page(path: str, config: CompareConfig) -> str:
    """Render a page from its template, and write its plots next to it.

    Raises:
        InputError: the template is invalid, or a run that it names does not exist.
    """
    folder = os.path.dirname(path) or "."
    page = _Page(folder, config)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the output is Markdown
        loader=jinja2.FileSystemLoader(folder),
    )
    calls: dict[str, Callable[..., Any]] = {name: getattr(page, name) for name in _CALLS}
    shown = {"interval": interval_text, "share": share_text}
    try:
        return environment.get_template(os.path.basename(path)).render(**calls, **shown)
    except (jinja2.TemplateError, OSError) as error:
        raise InputError(f"{path}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    run_script(main, "tweetdora.compare")
