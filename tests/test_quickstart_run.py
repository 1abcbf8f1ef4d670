"""The quickstart recipe, shortened: SmolLM2-135M-Instruct on real tweets through all three scripts."""

import json
from pathlib import Path
from typing import Any


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_real_small_model_end_to_end(small_run):
    folder, _ = small_run
    losses = [entry["loss"] for entry in read(folder / "run.json")["result"]["log_history"] if "loss" in entry]
    assert len(losses) == 2 and losses[-1] < losses[0] - 0.5
    record = read(folder / "evaluation/test.json")
    assert record["finetuned"]["parse_rate"] > record["base"]["parse_rate"]
    card, adapter = (folder / "publish/README.md").read_text(), read(folder / "publish/adapter/adapter_config.json")
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card
    assert "here converted from `SmolLM2-135M-Instruct.Q4_1.gguf` and therefore not identical to the original" in card
