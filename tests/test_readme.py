"""README and docs/ are true: commands parse, tables are the records', and the tree is the repository's."""

import re
import shlex
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.record import read_bench
from bench.stats import format_spread, ratios, spread
from tweetdora.cli import parse_predict, parse_train, parse_with_target, read_task
from tweetdora.config import EvaluateConfig, PushConfig
from tweetdora.errors import InputError
from tweetdora.record_files import read_record
from tweetdora.records import EvaluationRecord, RunRecord
from tweetdora.seeds import Group, find_runs, summarise

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SCRIPT = re.compile(r"(?:accelerate launch|python) [^`\n#|]*?(?:train|evaluate|predict|push_to_hub)\.py[^`\n#|&]*")
TEXTS = "\n".join([README, *DOCS.values()])
COMMANDS = sorted({found.strip().removesuffix('"') for found in SCRIPT.findall(TEXTS) if "--help" not in found})


@pytest.fixture(autouse=True)
def recipe_of_the_readme(tmp_path, monkeypatch):
    """The recipe under the name that the commands give it, beside the repository's own."""
    (tmp_path / "my-task.yaml").write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)


def parse(command):
    """Read a command's flags as its script would."""
    words = shlex.split(command)
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place], words[place + 1 :]
    if script == "train.py":
        return parse_train(flags, "")
    if script == "predict.py":
        return parse_predict(flags, "")
    return parse_with_target(flags, EvaluateConfig if script == "evaluate.py" else PushConfig, "", "")


def test_the_readme_has_the_three_commands_of_the_published_run():
    assert {"accelerate launch train.py", "python evaluate.py", "python push_to_hub.py"} <= set(COMMANDS)
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command):
    parse(command)


def test_a_wrong_command_would_not_pass():
    with pytest.raises(InputError, match="unknown argument '--spilt'"):
        parse("python evaluate.py runs/demo --spilt test")


def test_make_knows_the_readmes_words():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXTS, re.MULTILINE)) <= targets


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_the_links_to_files_and_headings_of_the_repository_resolve(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("https://")]
    for link in links:
        path, _, heading = link.partition("#")
        target = ((ROOT / name).parent / path) if path else ROOT / name
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_make_demo_deletes_no_run_that_it_did_not_make(tmp_path):
    """With a folder of its own, and `true` in place of the programs."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "run.json").write_text("a user's")
    (tmp_path / "bin").mkdir()
    for name in ("accelerate", "python"):
        (tmp_path / "bin" / name).symlink_to("/bin/true")
    words = ["make", "-C", str(ROOT), "demo", f"DEMO_DIR={folder}", f"BIN={tmp_path / 'bin'}"]
    words += ["-o", "assets", "-o", ".venv/.runtime"]  # as they are

    def demo() -> subprocess.CompletedProcess:
        return subprocess.run(words, capture_output=True, text=True)

    done = demo()
    assert done.returncode != 0 and "was not made by make demo, so it was left alone" in done.stderr
    assert (folder / "run.json").read_text() == "a user's"
    (folder / "run.json").unlink()
    folder.rmdir()
    assert demo().returncode == 0
    (folder / "run.json").write_text("the demo's")
    assert demo().returncode == 0 and not (folder / "run.json").exists()


def test_the_recipe_of_the_readme_is_one(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1])
    task = read_task(str(recipe))
    assert (task.label_words, task.label_values, task.text_column) == (["bad", "good"], ["1", "5"], "review")


def test_the_tree_is_the_repositorys():
    """Every tracked file at the root and every module stands in the tree, and everything in the tree exists."""
    tree = re.search(r"## Layout\n\n```\n(.*?)```", DOCS["design.md"], re.DOTALL)[1]
    named = set(re.findall(r"[\w./-]+\.(?:py|md|txt|lock|yaml|yml)|(?<=^)[\w.]+/(?:\w+)?", tree, re.MULTILINE))
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = done.stdout.split()
    modules = {Path(path).name for path in tracked if path.startswith("tweetdora/")} - {"__init__.py"}
    known = {
        "README.md",
        "LICENSE",
        "CITATION.cff",
        "Makefile",
        "pyproject.toml",
        ".gitignore",
        ".dockerignore",
        "Dockerfile",
        ".pre-commit-config.yaml",
    }
    top = {path for path in tracked if "/" not in path} - known
    assert modules | top <= {Path(name).name for name in named}
    missing = [
        name
        for name in named
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "tweetdora", ROOT / "recipes", ROOT / "docs"))
    ]
    assert missing == []


def test_the_package_imports_only_downwards():
    """The floors of the tree: a module imports only modules that stand below it."""
    tree = re.search(r"tweetdora/ .*?\n(.*?)tests/", DOCS["design.md"], re.DOTALL)[1]
    floors = [re.findall(r"(\w+)\.py", line) for line in tree.splitlines()]
    floor_of = {name: number for number, names in enumerate(floors) for name in names}
    for name, floor in floor_of.items():
        source = (ROOT / "tweetdora" / f"{name}.py").read_text(encoding="utf-8")
        for imported in re.findall(r"^from tweetdora\.(\w+) import", source, re.MULTILINE):
            assert floor_of[imported] >= floor, f"{name} imports {imported}"


def shown(value: float) -> str:
    """A share as the README's table writes it: 4.4 %, and 100 % for all."""
    return "100 %" if value == 1 else f"{value:.1%}".replace("%", " %")


def test_the_table_of_results_is_the_records():
    record = read_record(EvaluationRecord, str(ROOT / "results/quickstart/test.json"))
    run = read_record(RunRecord, str(ROOT / "results/quickstart/run.json"))
    assert record.adapter_sha256 == run.adapter.sha256, "the two records are of one run"

    def row(name: str, scores: Any) -> str:
        """A line of the table, without what is left empty."""
        return f"| {name} | {scores.macro_f1:.3f} | | {scores.macro_recall:.3f} | {scores.accuracy:.3f} | | |"

    def measured(name: str, mark: str, found: Any) -> str:
        """A line of the table, of a model."""
        low, high = found.intervals.macro_f1
        rates = f"{shown(found.parse_rate)} | {shown(found.eos_rate)} |"
        scores = f"{mark}{found.macro_f1:.3f}{mark} | [{low:.3f}, {high:.3f}] | {found.macro_recall:.3f}"
        return f"| {name} | {scores} | {found.accuracy:.3f} | {rates}"

    difference = record.difference
    low, high = difference.macro_f1.interval
    for line in (
        f"{run.result.steps} steps, one seed ({run.training.seed}), {record.data.num_examples} test examples, "
        f"answered in {record.precision} (",
        f"| {run.train_data.display_name}, {record.split}, n = {record.data.num_examples} | macro-F1 |",
        measured(f"base: {run.base_hub_id.rpartition('/')[2]}", "", record.base),
        measured("**fine-tuned: DoRA on k and v, r 8**", "**", record.finetuned),
        row("uniform guessing", record.baselines.uniform),
        row(f'always "{record.baselines.majority.label}"', record.baselines.majority),
        *(other_row(other) for other in record.baselines.others),
        *(likelihood_line(name, found) for name, found in record.likelihoods.items()),
        f"The paired difference is {difference.macro_f1.difference:+.3f} [{low:+.3f}, {high:+.3f}]: "
        f"{difference.mcnemar.fixed} examples fixed, {difference.mcnemar.broken} broken.",
    ):
        assert line in README.replace("\n", " ").replace("  ", " ") or line in README, line


def other_row(other: Any) -> str:
    """A line of the table, of a classifier of another kind."""
    low, high = other.macro_f1_interval
    scores = f"{other.macro_f1:.3f} | [{low:.3f}, {high:.3f}] | {other.macro_recall:.3f} | {other.accuracy:.3f}"
    return f"| {other.name} | {scores} | | |"


def likelihood_line(name: str, found: Any) -> str:
    """What is said of the likeliest label words of a model."""
    low, high = found.intervals.macro_f1
    shown = {"base": "base", "finetuned": "fine-tuned"}[name]
    scores = f"{found.macro_f1:.3f} | [{low:.3f}, {high:.3f}] | {found.macro_recall:.3f} | {found.accuracy:.3f}"
    return f"| {shown}, most likely label word | {scores} | | |"


def test_the_table_of_the_experiment_is_the_records():
    """Validation macro-F1: the mean over seeds where there are several."""

    def mean(runs: str) -> str:
        """As the table shows it."""
        found = find_runs([str(ROOT / "results" / runs)], "validation")
        return f"{sum(run.finetuned_metrics.macro_f1 for run in found) / len(found):.3f}"

    seeds = find_runs([str(ROOT / "results/rates/dora-learning_rate=3e-05-*")], "validation")
    deviation = statistics.stdev(run.finetuned_metrics.macro_f1 for run in seeds)
    rate = "rates/{}-learning_rate={}-*"
    assert cells_of("3e-5, the published rate")[1:] == [
        f"{mean(rate.format('dora', '3e-05'))} ({len(seeds)} seeds, SD {deviation:.3f})",
        mean(rate.format("lora", "3e-05")),
    ]
    assert cells_of("2e-3, the best of the learning rates")[1:] == [
        mean(rate.format(name, "0.002")) for name in ("dora", "lora")
    ]
    expected = [mean(f"best/{name}-r16-1e-3-2epochs-*") for name in ("dora", "lora")]
    found = find_runs([str(ROOT / "results/best/lora-r16-1e-3-2epochs-*")], "validation")
    assert cells_of("all 45,615 rows, every linear layer")[1:] == [expected[0], f"{expected[1]} ({len(found)} seeds)"]
    best = find_runs([str(ROOT / "results/best/lora-r16-1e-3-2epochs-*")], "test")
    summary, numbers = summarise(Group({}, best)), [str(run.seed) for run in best]
    said = (
        f"LoRA reached {summary.mean:.3f} (mean of seeds {', '.join(numbers[:-1])} and {numbers[-1]}, 95 % interval "
        f"over tweets and seeds [{summary.interval[0]:.3f}, {summary.interval[1]:.3f}]"
    )
    assert said in README.replace("\n", " ")
    (record,) = find_runs([str(ROOT / "results/rates/dora-learning_rate=3e-05-seed=42")], "test")
    shown = (
        f"{found.macro_f1:.3f} [{found.intervals.macro_f1[0]:.3f}, {found.intervals.macro_f1[1]:.3f}]"
        for found in record.evaluation.models.values()
    )
    recipe = find_runs([str(ROOT / "results/rates/dora-learning_rate=3e-05-*")], "test")
    over_seeds = sum(run.finetuned_metrics.macro_f1 for run in recipe) / len(recipe)
    fair = [find_runs([str(ROOT / "results" / rate.format(name, "0.002"))], "test") for name in ("dora", "lora")]
    assert len(recipe) == 5 and [run.seed for run in fair[0]] == [run.seed for run in fair[1]]
    means = [sum(run.finetuned_metrics.macro_f1 for run in runs) / len(runs) for runs in fair]
    said = (
        "went from {} to {} (seed 42; {:.3f} in the mean of five seeds); at 2e-3, DoRA reached {:.3f} and LoRA {:.3f} "
        "(means of {} other seeds)"
    )
    assert said.format(*shown, over_seeds, *means, len(fair[0])) in README.replace("\n", " ")


def cells_of(what: str) -> list[str]:
    """The cells of a line of README's tables, or of docs/performance.md's, by how the line begins."""
    lines = [*README.splitlines(), *DOCS["performance.md"].splitlines()]
    (line,) = [line for line in lines if line.startswith(f"| {what}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_speed_is_the_records():
    """Not tested: GEMM shares, ratios of memory, bf16 methods, generation's speed, saving and axolotl's ratio."""
    parts = read_bench(str(ROOT / "results/bench/cpu.json")).parts
    for what, precision in (("training step, float32", "fp32"), ("training step, bf16", "bf16")):
        sample = parts["training"].samples[precision]
        ours, other = sample["our_seconds"], sample["trl_seconds"]
        expected = [format_spread(spread(seconds), "s") for seconds in (ours, other)]
        _, *found = cells_of(what)
        assert found[:2] == expected
        times = ratios(other, ours)
        if precision == "bf16":
            ours, theirs = (text.split(" [")[0] for text in expected)
            said = f"step takes {ours} against {theirs} for TRL + PEFT on two CPU cores, {found[2]} as fast"
            assert said.replace(" [", " times [") in README.replace("\n  ", " ")
        else:
            assert f"in float32 {times['median']:.1f} times" in README.replace("\n  ", " ")
        assert found[2] == f"{times['median']:.1f} [{times['q1']:.1f}, {times['q3']:.1f}]"
    for what, precision in (("the same, TRL as its documentation", "fp32"), ("the same, bf16 (float32 base", "bf16")):
        ours, other = (parts["documented"].samples[precision][side] for side in ("ours", "trl"))
        times = ratios(other, ours)
        expected = [format_spread(spread(seconds), "s") for seconds in (ours, other)]
        assert cells_of(what)[1:4] == [*expected, f"{times['median']:.1f} [{times['q1']:.1f}, {times['q3']:.1f}]"]
    assert cells_of("the published recipe (")[1] == f"{parts['full'].samples['all']['seconds'] / 60:.1f} min"
    assert cells_of("`accelerate launch`")[1] == f"{parts['launch'].samples['all']['runs'][-1]['to_first_step']:.1f} s"
    for what, variant in (
        ("DoRA step / LoRA step, k and v", "fp32:k_v"),
        ("DoRA step / LoRA step, all linear", "fp32:all-linear"),
    ):
        sample = parts["methods"].samples[variant]
        for cell, side in zip(cells_of(what)[1:3], ("ours", "peft"), strict=True):
            times = ratios(sample[f"{side}_dora"], sample[f"{side}_lora"])
            assert cell == f"{times['median']:.2f} [{times['q1']:.2f}, {times['q3']:.2f}]"
    found = parts["prediction"].samples["bf16"]
    assert f"in batches of {found['pipeline_batch']}" in cells_of("classification by likelihood")[0]
    for cell, side in zip(cells_of("classification by likelihood")[1:3], ("scores", "pipeline"), strict=True):
        speeds = [found["num_examples"] / seconds for seconds in found[f"{side}_seconds"]]
        assert cell == format_spread(spread(speeds), "samples/s")
    found = parts["axolotl"].samples["all"]
    expected = [format_spread(spread(found[f"{side}_seconds"]), "s") for side in ("ours", "axolotl")]
    assert cells_of("float32, axolotl")[1:3] == expected
    seconds = parts["generation"].samples["all"]["validation"]["seconds"]
    assert cells_of("2,000 tweets")[1] == f"{seconds:.0f} s"
    losses = parts["training"].samples["fp32"]
    apart = max(abs(a - b) for a, b in zip(losses["our_losses"], losses["trl_losses"], strict=True))
    name, found, *_ = cells_of("largest difference of the loss")
    assert found == f"{apart:.1e}".replace("e-0", "e-") and f"{len(losses['our_losses'])} steps" in name
    assert f"with losses that differ by at most {found}" in README.replace("\n  ", " ")
    memory = parts["memory"].samples
    peaks = {name: f"{sample['peak_bytes'] / 1e9:.2f}" for name, sample in memory.items()}
    name, ours, other, *_ = cells_of("peak memory")
    assert f"under autocast {peaks['bf16:trl']} GB" in name
    assert ours == f"{peaks['fp32:ours']} / {peaks['bf16:ours']} GB"
    assert other == f"{peaks['fp32:trl']} / {peaks['bf16:trl_bf16']} GB"
