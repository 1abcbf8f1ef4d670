"""Comparisons as a person sees them: the table, the differences, the plots, and the page under results/."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from sample_records import sample_evaluation
from test_seeds import flipped, write_diverged, write_kept

from tweetdora import seeds
from tweetdora.compare import CompareConfig, difference_text, format_spent, format_table, main, render_page, share_text
from tweetdora.errors import InputError
from tweetdora.seeds import SeedDifference, find_runs, group_runs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def kept(tmp_path):
    """A folder of records: DoRA with seeds 42 and 43 at two rates, LoRA with seed 42 at one."""
    for seed in (42, 43):
        for rate, wrong in ((1e-3, 4), (1e-4, 12)):
            write_kept(tmp_path / f"dora-{rate}-{seed}", seed, flipped(wrong + seed - 42), learning_rate=rate)
    write_kept(tmp_path / "lora", 42, flipped(8), model={"method": "lora"}, learning_rate=1e-3)
    return tmp_path


def test_the_table_has_a_row_for_each_setting_best_first(kept, capsys):
    assert main([str(kept)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in lines if line.startswith("| learning_rate") or "| method" in line]
    assert [re.sub(r", (?=method)|(?<=\w), ", "; ", name) for name in names] == [
        "method dora; learning_rate 0.001",
        "method lora; learning_rate 0.001",
        "method dora; learning_rate 0.0001",
    ]
    best = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert best[1:4] == ["2", "**0.887**", "0.018"]  # 4 and 5 of 40 wrong: 0.9 and 0.8749, worked out by hand
    assert lines[3].split("|")[4].strip() == "", "one seed has no deviation"


def test_the_machines_are_said_beside_the_table(kept, capsys):
    main([str(kept)])
    assert "Trained on Fast CPU (torch 2.13.0); measured on Fast CPU (torch 2.13.0)." in capsys.readouterr().out


def test_what_runs_took_is_summed_by_machine(kept):
    """By hand: three runs of the same length, two of them measured on both splits; a training counts once."""
    runs = find_runs([str(kept)], "test")
    first = runs[0]
    training, answering = first.run.result.seconds, first.finetuned_metrics.seconds
    assert first.finetuned_metrics.likelihood is None, "else its seconds count too"
    lines = format_spent({"validation": runs[:2], "test": runs}).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    spent = [len(runs) * training, 2 * answering, len(runs) * answering]
    told = [f"{n / 3600:.1f} h" if n >= 3600 else f"{n / 60:.1f} min" for n in spent]
    assert cells == ["Fast CPU (torch 2.13.0)", str(len(runs)), *told]
    long = replace(first, run=replace(first.run, result=replace(first.run.result, seconds=5400)))
    assert "| 1.5 h |" in format_spent({"test": [long]})
    assert len(lines) == 3


def test_a_mean_is_over_all_runs_of_a_group_or_not_shown(kept):
    """Records of an early version have no likelihoods; here one of three has some."""
    (group, *_) = group_runs(find_runs([str(kept / "dora-*")], "test"))
    likelihood = sample_evaluation().finetuned.likelihood
    first = replace(group.runs[0], finetuned_metrics=replace(group.runs[0].finetuned_metrics, likelihood=likelihood))
    one, mixed = (replace(group, runs=runs) for runs in ([first], [first, *group.runs[1:]]))
    for shown, found in ((True, one), (False, mixed)):
        cells = [cell.strip() for cell in format_table([found], CompareConfig()).splitlines()[2].strip("|").split("|")]
        assert bool(cells[10]) == bool(cells[11]) == shown


def test_differences_are_told_in_words(kept, capsys):
    main([str(kept / "dora-0.001-*"), str(kept / "lora")])
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith("- **method dora** − method lora: +0.0")
    assert re.search(
        r"\], not paired by seed; for seed 42, which both have, \+0\.1\d\d; higher in 1 of 1 seeds;", said
    )
    assert "95 % over rows, with one seed of a group [" in said, "one seed has no spread"
    found = SeedDifference(0.0123, (0, 0), (-0.01, 0.03), True, [1, 2], 0.0123, 2, [5, 6], [1, 2], [0.03, 1e-310])
    assert difference_text(found) == (
        "+0.012, 95 % over rows and seeds [-0.010, +0.030]; higher in 2 of 2 seeds; per seed: 5 examples fixed, 1 "
        "broken (McNemar p = 0.03); 6 examples fixed, 2 broken (McNemar p < 1e-300)"
    )
    others = SeedDifference(0.0123, (0, 0), (-0.01, 0.03), False, [], None, 0, [], [], [])
    assert difference_text(others) == "+0.012, 95 % over rows and seeds [-0.010, +0.030], not paired by seed"


def test_runs_that_diverged_are_told_beside_the_table(kept, capsys):
    write_diverged(kept / "dora-44", 44)
    run = kept / "dora-44/run.json"
    run.write_text(run.read_text().replace('"learning_rate": 3e-05', '"learning_rate": 0.001'))
    config = CompareConfig(bootstrap_samples=50)
    (kept / "page.md").write_text('{{ table(".") }}')
    main([str(kept)])
    for said in (capsys.readouterr().out, render_page(str(kept / "page.md"), config)):
        rows = [line.split("|") for line in said.splitlines() if "| **0" in line]
        assert [(row[1].strip(), row[2].strip()) for row in rows] == [
            ("method dora, learning_rate 0.001", "2 (1 diverged)"),
            ("method lora, learning_rate 0.001", "1"),
            ("method dora, learning_rate 0.0001", "2"),
        ]
        assert "\n\nThese runs diverged, so they have no scores and are in no mean: dora-44." in said


def test_two_columns_of_a_file_are_counted_together(tmp_path):
    (tmp_path / "m.csv").write_text("a,b\nx,1\ny,2\nx,2\nx,2\n")
    (tmp_path / "page.md").write_text("{{ cross_table('m.csv', 'a', 'b') }}\n")
    assert render_page(str(tmp_path / "page.md"), CompareConfig()).splitlines() == [
        "| a / b | 1 | 2 |",
        "| --- | --- | --- |",
        "| x | 1 | 2 |",
        "| y | 0 | 1 |",
        "| all | 1 | 3 |",
    ]
    (tmp_path / "empty.csv").write_text("a,b\n")
    (tmp_path / "page.md").write_text("{{ cross_table('empty.csv', 'a', 'b') }}")
    with pytest.raises(InputError, match="empty.csv has no rows; expected the columns a and b"):
        render_page(str(tmp_path / "page.md"), CompareConfig())
    (tmp_path / "page.md").write_text("{{ cross_table('m.csv', 'a', 'c') }}")
    with pytest.raises(InputError, match=r"m\.csv has no column 'c'; its columns are a, b"):
        render_page(str(tmp_path / "page.md"), CompareConfig())


def test_a_share_of_all_is_not_the_same_as_one_of_nearly_all():
    assert [share_text(share) for share in (1, 0.99999, 0.5)] == ["100 %", "99.99 %", "50.00 %"]


def test_plots_are_drawn_over_a_setting_and_by_name(kept, tmp_path):
    for name, flags in (("rates.png", ["--x", "learning_rate"]), ("groups.png", [])):
        main([str(kept), "--plot", str(tmp_path / name), *flags])
        assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(
        InputError, match="--x is r, but these runs differ in method, learning_rate. Name one of these"
    ):
        main([str(kept), "--plot", str(tmp_path / "no.png"), "--x", "r"])


def test_a_page_is_its_template_with_tables(kept, tmp_path):
    page = kept / "page.md"
    page.write_text(
        "# Mine\n\n{{ table('dora-*', 'lora') }}\n{{ differences('dora-0.001-*', 'lora') }}\n"
        "{{ plot('a.png', 'dora-*', x='learning_rate', title='Rates') }}\n"
        "{% set found = evaluation('lora') %}{{ found.split }} {{ interval(found.base.intervals.macro_f1) }}"
    )
    assert main([str(page), "--output", str(tmp_path / "README.md")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Mine\n\n| runs | seeds |") and text.count("\n| ") == 5
    assert "![Rates](a.png)" in text and (kept / "a.png").is_file()
    assert re.search(r"\ntest \[0\.\d{3}, 0\.\d{3}\]$", text)


def test_runs_are_named_by_what_differs_from_the_reference(kept):
    (kept / "page.md").write_text(
        "{{ table('.', against='dora-0.001-*') }}\n\n{{ differences('.', against='dora-0.001-*') }}"
    )
    table, lines = render_page(str(kept / "page.md"), CompareConfig()).split("\n\n")
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert names == ["reference", "method lora", "learning_rate 0.0001"]
    named = [line.partition(": ")[0] for line in lines.splitlines()]
    assert sorted(named) == ["- **learning_rate 0.0001** − reference", "- **method lora** − reference"]
    (kept / "page.md").write_text("{{ table('.', against='dora-*') }}")
    with pytest.raises(InputError, match=r"against='dora-\*': expected the runs of one group among those"):
        render_page(str(kept / "page.md"), CompareConfig())


def test_bars_have_the_base_the_baselines_by_score_and_the_groups(kept, monkeypatch):
    from tweetdora import compare

    drawn: list[Any] = []
    monkeypatch.setattr(compare, "plot_bars", lambda bars, path, title, label: drawn.append((bars, path, title)))
    (kept / "page.md").write_text("{{ bars('a.png', 'before', {'LoRA': 'lora', 'DoRA': 'dora-0.001-*'}, title='T') }}")
    assert render_page(str(kept / "page.md"), CompareConfig()) == "![T](a.png)"
    ((bars, path, title),) = drawn
    assert (path, title) == (str(kept / "a.png"), "T")
    names = [bar[0] for bar in bars]
    assert (names[0], names[-2:]) == ("before", ["LoRA", "DoRA"]) and "uniform guessing" in names
    others = [bar[1] for bar in bars if bar[3] == "other"]
    assert others == sorted(others) and len(others) == len(bars) - 3
    (lora,) = find_runs([str(kept / "lora")], "test")
    assert bars[-2] == ("LoRA", lora.finetuned_metrics.macro_f1, ANY, "finetuned")
    (kept / "page.md").write_text("{{ bars('a.png', 'before', {'DoRA': 'dora-*'}) }}")
    with pytest.raises(InputError, match=r"bars\(\): dora-\* holds 2 groups of runs; expected one"):
        render_page(str(kept / "page.md"), CompareConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ tabel('x') }}", "page.md: UndefinedError: 'tabel' is undefined"),
        ("{% if %}", "page.md: TemplateSyntaxError"),
        ("{{ table('nowhere') }}", "no run in .*nowhere was measured on the test split"),
        ("{{ spent('nowhere') }}", "nowhere has no run that was measured on validation or test; expected a folder"),
    ],
)
def test_what_is_wrong_with_a_page_is_said(tmp_path, text, message):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(InputError, match=message):
        render_page(str(tmp_path / "page.md"), CompareConfig())


@pytest.mark.parametrize("words", [["x"], ["--split", "validation"], ["--plot", "p.png"], ["--x", "r"]])
def test_flags_that_a_page_would_not_heed_are_refused(tmp_path, words):
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(
        InputError, match="page.md is a page, which itself names runs, splits and plots. Give it alone"
    ):
        main([str(tmp_path / "page.md"), *words])
    with pytest.raises(InputError, match="--x r needs --plot"):
        main([str(tmp_path), "--x", "r"])


def test_the_page_of_the_repository_is_made_from_its_records(tmp_path, monkeypatch):
    """results/README.md is what the command makes; its plots are drawn elsewhere here, as their bytes need not be."""
    from tweetdora import compare

    for name in ("plot_groups", "plot_bars", "plot_reliability"):
        monkeypatch.setattr(compare, name, lambda *given: None)
    made = render_page(str(ROOT / "results/template.md"), CompareConfig())
    assert (ROOT / "results/README.md").read_text(encoding="utf-8") == made
    for name in re.findall(r"!\[.*\]\((.*)\)", made):
        assert (ROOT / "results" / name).is_file()


def test_every_kept_run_is_one_of_a_sweep(monkeypatch):
    """Records and sweep files do not drift apart: a sweep that is run again would skip them."""
    from tweetdora.sweep import plan_runs, read_sweep, state_of

    monkeypatch.chdir(ROOT)
    known = {}
    for path in sorted(Path("results").rglob("*.yaml")):
        sweep = read_sweep(str(path))
        known |= {run.records_dir: state_of(run, [], {}) for run in plan_runs(sweep)}
    by_hand = ("results/quickstart", "results/domains")  # LOG.md
    folders = (str(path.parent) for path in Path("results").rglob("run.json"))
    kept_dirs = {folder for folder in folders if not folder.startswith(by_hand)}
    assert kept_dirs == {folder for folder, state in known.items() if state != "to do"}
    assert seeds.find_runs(["results/rates"], "validation")
