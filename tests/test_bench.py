"""The pure parts of bench/: counts by hand, medians, the table, the flags; no model, no TRL."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sample_records import ENVIRONMENT

from bench import __main__ as bench
from bench.__main__ import OUTPUT, PARTS, measure, parse, stolen_share
from bench.axolotl import measure_axolotl, step_seconds
from bench.generation import until_stop
from bench.launch import import_seconds, train_flags
from bench.launches import count_operations
from bench.record import BenchData, BenchPart, BenchRecord, read_bench, write_bench
from bench.report import _axolotl, _launches, table
from bench.settings import Settings
from bench.stats import ModelShape, format_spread, format_table, ratios, spread, step_operations
from tweetdora.cli import parse_train
from tweetdora.errors import InputError


def test_the_operations_of_a_tiny_step_are_those_counted_by_hand():
    """Two layers, hidden 4, intermediate 6, 2 heads on 1 of keys, each 3 wide, vocabulary 10; rank 2.

    A prefix of 2 and rows of 1 and 2 own tokens: 5 tokens. Weights of a layer: q 4x6, k and v 4x3 each, o 6x4, MLP
    3 x 4x6 = 24 + 24 + 24 + 72 = 144. Pairs seen: prefix 1 + 2, row 0: 3, row 1: 3 + 4 = 13.
    """
    counted = step_operations(ModelShape(2, 4, 6, 2, 1, 3, 10), own_lengths=[1, 2], prefix=2, supervised=4, rank=2)
    assert counted == {
        # The first layer's q, k, v: 48 weights. Of the last one's 96 others, only 4 of 5 tokens are needed.
        "linear": 2 * 5 * 288 + 2 * 5 * (288 - 48) - 2 * 2 * 96,
        "attention": 2 * 13 * 3 * (2 * 6 + 2 * 6),  # forward once and backward twice: scores and values
        "head": 2 * (2 * 4 * 4 * 10),
        # k and v: 2 T r (in + out) = 2 * 5 * 2 * 7 each; forward 2 layers, weights 2 layers, input 1 layer
        "adapter": 2 * 140 * (2 + 2 + 1),
    }


def test_a_batch_without_a_prefix_counts_the_pairs_inside_its_rows_only():
    counted = step_operations(ModelShape(1, 1, 1, 1, 1, 1, 1), own_lengths=[2, 3], prefix=0, supervised=2, rank=1)
    assert counted["attention"] == 12 * (3 + 6)


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "n": 1}


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    above, below = [10.0, 100.0, 12.0], [5.0, 20.0, 3.0]
    assert ratios(above, below)["median"] == 4.0  # of 2, 5 and 4; the medians are 12 and 5
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "cell"),
    [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (0.00002, "2.0e-05"), (0.0, "0")],
)
def test_a_cell_shows_three_digits(value, cell):
    assert format_spread({"median": value, "q1": value, "q3": value}, "s") == f"{cell} s [{cell}, {cell}]"


def test_the_table_is_padded_markdown():
    assert format_table(["what", "ours"], [["step", "1.5 s"]]).splitlines() == [
        "| what | ours  |",
        "|------|-------|",
        "| step | 1.5 s |",
    ]


def test_ids_end_with_the_first_stop_token():
    assert until_stop([7, 2, 0, 0], [0, 2]) == [7, 2]
    assert until_stop([7, 8], [2]) == [7, 8]


def test_import_times_are_summed_by_package():
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:   1500000 |    2000000 |   torch.nn",
        "import time:    500000 |     500000 | torch",
        "import time:    250000 |     250000 | numpy",
        "another line",
    ]
    assert import_seconds(lines) == {"torch": 2.0, "numpy": 0.25}


def part(**samples: Any) -> BenchPart:
    """A part of a record with these samples, measured with the settings that are the defaults."""
    return BenchPart(
        created="2026-11-25T10:00:00Z",
        command="python -m bench",
        settings=Settings(),
        data=BenchData("tweets", None, None, True, "train", num_examples=10_000, sha256="c"),
        openmp={"OMP_WAIT_POLICY": None},
        environment=ENVIRONMENT,
        stolen_share=None,
        samples=samples,
    )


def test_a_record_of_the_bench_is_read_back_as_it_was_written(tmp_path):
    path = str(tmp_path / "cpu.json")
    assert read_bench(path) == BenchRecord({})
    record = BenchRecord({"training": part(fp32=training_sample())})
    write_bench(path, record)
    assert read_bench(path) == record
    (tmp_path / "cpu.json").write_text('{"record_version": 9}')
    with pytest.raises(InputError, match="has record version 9; python -m bench reads 1 and 2"):
        read_bench(path)


def training_sample() -> dict[str, Any]:
    """Two pairs of steps: TRL 6 and 8 s, ours 2 and 2 s, 3 Gop each on a machine of 6 Gop/s."""
    return {
        "trl_kind": "trl",
        "trl_seconds": [6.0, 8.0],
        "our_seconds": [2.0, 2.0],
        "trl_losses": [4.0, 3.0],
        "our_losses": [4.0, 3.00025],
        "operations": [{"linear": 2 * 10**9, "head": 10**9}] * 2,
        "gemm_operations_per_second": [6e9, 6e9],
    }


def test_the_training_lines_of_the_table_are_those_worked_out_by_hand():
    text = table({"training": part(fp32=training_sample())})  # of 10,000 examples in batches of 16: 625 steps
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    assert lines == [
        ["training step, fp32, TRL (trl)", "2.00 s [2.00, 2.00]", "7.00 s [6.50, 7.50]", "3.50 [3.25, 3.75]"],
        ["largest difference of the loss, fp32, 2 steps", "2.5e-04", "", ""],
        ["share of the GEMM rate, fp32", "0.250 [0.250, 0.250]", "", ""],
        ["GEMM rate, fp32", "", "6.00 Gop/s [6.00, 6.00]", ""],
        ["projected: 625 steps, fp32", "20.8 min", "72.9 min", ""],
    ]


def test_the_table_says_how_much_of_the_cores_the_host_took():
    assert "host took, training | 12.5%" in table({"training": replace(part(), stolen_share=0.125)})
    assert "host took" not in table({"training": part()})


def test_the_stolen_share_is_that_of_the_time_between():
    busy, idle, stolen = 0, 3, 7
    before, after = [5] * 8, [5] * 8
    after[busy] += 30
    after[idle] += 60
    after[stolen] += 10
    assert stolen_share(before, after) == 0.1
    assert stolen_share(None, after) is None


@pytest.mark.parametrize(
    ("part_name", "shares", "tries", "kept"),
    [
        ("training", [0.2, 0.04, 0.0], 2, 0.04),
        ("training", [0.2, 0.3, 0.06], 3, 0.06),
        ("training", [None], 1, None),
        ("launches", [0.9], 1, 0.9),
    ],
)
def test_a_part_is_measured_again_while_the_host_is_busy(part_name, shares, tries, kept, monkeypatch, capsys):
    measured, slept, given = [], [], iter(shares)
    monkeypatch.setattr(bench, "run_worker", lambda part, variant, argv: measured.append(variant) or {"n": 1})
    monkeypatch.setattr(bench, "stolen_share", lambda before, after: next(given))
    monkeypatch.setattr(bench.time, "sleep", slept.append)
    known = part()
    facts = {name: getattr(known, name) for name in ("command", "settings", "data", "openmp", "environment")}
    found = measure(part_name, facts, [], tries=3)
    assert (found.stolen_share, len(measured), len(slept)) == (kept, 2 * tries, tries - 1)
    refused = capsys.readouterr().out
    assert refused.count("a measurement is valid up to 5%") == sum(
        share is not None and share > 0.05 and part_name == "training" for share in shares[:tries]
    )


def test_what_a_busy_machine_gave_does_not_enter_the_record(tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "cpu.json")
    write_bench(path, BenchRecord({"saving": part(all="earlier")}))
    monkeypatch.setattr(bench, "describe", lambda argv, settings: {})
    busy = {"training": 0.5, "saving": 0.01}
    monkeypatch.setattr(
        bench, "measure", lambda name, facts, argv, tries: replace(part(new=name), stolen_share=busy[name])
    )
    monkeypatch.setattr(bench, "table", lambda parts: "table")
    assert bench.main(["--only", "training", "saving", "--output", path]) == 1
    assert read_bench(path).parts.keys() == {"saving"} and read_bench(path).parts["saving"].samples == {
        "new": "saving"
    }
    assert "Not measured, because the machine was busy: training." in capsys.readouterr().out


def test_operations_are_counted_without_views():
    """A step: two products, a view that is none of the count, a sum, and what the backward pass needs for them."""

    class Step:
        weight = torch.ones(2, 3, requires_grad=True)

        def step(self, rows: list) -> None:
            ((torch.ones(4, 3) @ self.weight.t()) * 2).view(-1).sum().backward()

    found = count_operations(Step(), [])
    # mul and its gradient; the sum's gradient is expanded, a view; mm for the weight's gradient.
    assert {name: found[name] for name in ("mm", "mul", "sum")} == {"mm": 2, "mul": 2, "sum": 1}
    assert not {"t", "view", "expand", "detach"} & set(found)


def test_the_lines_of_operations_compare_the_sums():
    samples = {"fp32": {"trl": {"mm": 6, "mul": 4}, "ours": {"mm": 4}}}
    assert _launches(samples, None) == [["operations of a step that are no views, fp32, TRL (trl)", "4", "10", "2.50"]]


def test_axolotls_steps_are_the_times_between_its_log_lines():
    """The Trainer's own log of axolotl, and ours; each has the loss of a step."""
    axolotl = [(1.0, "start"), (5.0, "50%| 1/2 {'loss': '2.5', 'ppl': '9'}"), (7.0, "{'loss': '1e-01', 'ppl': '9'}")]
    ours = [(3.0, "step 1/2  loss 2.500  lr 3e-05"), (3.5, "validation  loss 9.0"), (4.0, "step 2/2  loss 0.100  lr")]
    assert step_seconds(axolotl) == ([0.0, 2.0], [2.5, 0.1])
    assert step_seconds(ours) == ([0.0, 1.0], [2.5, 0.1])


def test_the_lines_of_axolotl_compare_medians_and_losses():
    sample = {"ours_seconds": [1.0, 2.0, 3.0], "axolotl_seconds": [8.0, 9.0]}
    losses = {"ours_losses": [2.0, 3.0], "axolotl_losses": [2.0, 3.5]}
    assert _axolotl({"all": sample | losses}, None) == [
        ["training step, fp32, axolotl, as processes", "2.00 s [1.50, 2.50]", "8.50 s [8.25, 8.75]", "4.25"],
        ["largest difference of the logged loss, axolotl, 2 steps", "5.0e-01", "", ""],
    ]


def test_a_missing_axolotl_is_fetched_by_the_command_that_the_error_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="make .axolotl/.done"):
        measure_axolotl(Settings())


def test_memory_is_compared_within_a_precision():
    sizes = {"fp32:ours": 2e9, "fp32:trl": 5e9, "bf16:ours": 1e9, "bf16:trl": 4e9, "bf16:trl_bf16": 3e9}
    samples = {name: {"peak_bytes": size, "growth_bytes": size / 2} for name, size in sizes.items()}
    text = table({"memory": part(**samples)})
    ratio = [line.strip("| ").split("|")[-1].strip() for line in text.splitlines()[2:]]
    assert ratio == ["2.50", "2.50", "4.00", "4.00", "3.00", "3.00"]


def test_flags_win_over_quick_and_quick_over_the_defaults():
    options, settings = parse(["--quick", "--steps", "3"])
    assert (settings.steps, settings.batch_size, settings.loss_steps) == (3, 8, 2)
    assert not {"full", "axolotl"} & set(options.only) and len(options.only) == len(PARTS) - 2
    assert parse(["--full"])[0].only[-1] == "full"
    assert parse([])[1].steps == 20 and OUTPUT == "results/bench/cpu.json"


def test_the_processes_of_train_py_get_flags_that_it_knows(tmp_path):
    """The published recipe's adapter, batch and learning rate are train.py's defaults, so no flag names them."""
    _, settings = parse([])
    task, model, training = parse_train(train_flags(settings, str(tmp_path), "fp32"), "")
    assert (task.max_train_samples, training.max_eval_samples, training.global_batch_size) == (10_000, 0, 16)
    assert (training.learning_rate, model.r, model.target_modules) == (3e-5, 8, ["k_proj", "v_proj"])


def test_axolotl_is_not_timed_on_examples_that_repeat():
    _, settings = parse(["--train_examples", "64"])
    with pytest.raises(InputError, match=r"--train_examples 64 is too few for \d+ steps of 16"):
        measure_axolotl(settings)
