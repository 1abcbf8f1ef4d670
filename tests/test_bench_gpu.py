"""bench/gpu.py, on the CPU and a tiny model: every part runs, and its checks hold."""

import json
from pathlib import Path

import pytest

from bench import gpu


@pytest.mark.filterwarnings("ignore")  # TRL's and the profiler's are not ours
def test_every_part_runs_and_leaves_its_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path), "--tiny", "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    parts = record["parts"]
    assert list(parts) == list(gpu.PARTS) and not [name for name, part in parts.items() if "error" in part]
    assert record["packages"]["torch"] and record["job"]["steps"] == 4 and record["model"] == "random weights"

    assert parts["correctness"]["passed"] and parts["answers"]["passed"]
    for targets, modules in (("k_v", 2), ("all-linear", 7)):
        kinds = parts["correctness"]["errors"][targets]
        assert len(kinds) == 5
        for name, errors in kinds.items():
            assert len(errors) == 2 + 2 * modules * 3, "loss, logits, and A, B and magnitude in two layers"
            largest = max(errors.values())
            assert 0 < largest < 1e-4 if "fp32:" in name else 1e-4 < largest < 1
    assert len(set(parts["answers"]["lengths"])) > 1, "rows stop at different tokens"

    training = parts["training"]
    sides = set(training["seconds"])
    assert sides | set(training["left_out"]) == {"ours", "plain", "trl", "trl_bf16"} and {"ours", "plain"} <= sides
    assert all(len(training["seconds"][side]) == 4 for side in sides)
    for side in sides:  # the same batches from the same start
        assert training["losses"][side] == pytest.approx(training["losses"]["ours"], rel=1e-2)
    assert {len(seconds) for kinds in parts["methods"].values() for seconds in kinds.values()} == {2}
    assert parts["answers"]["prompts"] == [6, 6] and len(parts["answers"]["2 new tokens"]["ours"]) == 2
    assert parts["launches"]["kernels"] == 0 and parts["launches"]["graph"]["error"]

    shown = capsys.readouterr().out
    for text in (gpu.GOAL, "ours: 4 steps together", "plain: a step", "answers equal to generate's", "CUDA graph"):
        assert text in shown
    assert ("trl: 4 steps together" in shown) == ("trl" in sides)
