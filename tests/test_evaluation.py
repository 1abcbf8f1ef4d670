"""What evaluate.py measures, and where its results go."""

import json
from pathlib import Path

import pytest

from tweetdora import evaluation
from tweetdora.config import DEFAULT_RUN_DIR, PUBLISHED_REPO, EvaluateConfig
from tweetdora.errors import InputError
from tweetdora.evaluation import find_eval_target


@pytest.fixture
def results_dir(tmp_path, monkeypatch):
    """results_dir(target): where the results of a model go; the current folder is empty, the Hub has no adapters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "read_adapter_config", lambda name: None)

    def find(name: str) -> str:
        target = find_eval_target(name, EvaluateConfig())
        assert target.kind == "model"
        return target.results_dir

    return find


def model_folder(path: str) -> str:
    Path(path).mkdir(parents=True)
    Path(path, "config.json").write_text("{}")
    return path


def test_the_published_models_results_do_not_go_into_the_folder_of_the_run(results_dir):
    found = results_dir(PUBLISHED_REPO)
    assert found == "runs/evaluations/liuhailin0123--llm-course-hw3-dora"
    assert not Path(found).is_relative_to(DEFAULT_RUN_DIR)


def test_results_bear_the_whole_name_of_their_target(results_dir, tmp_path):
    names = ["a/x", "b/x", model_folder("c/x"), model_folder(str(tmp_path / "c" / "y"))]
    assert [results_dir(name).removeprefix("runs/evaluations/") for name in names] == ["a--x", "b--x", "c--x", "c--y"]


@pytest.mark.parametrize("name", [".", "../outside", "./"])
def test_results_of_a_folder_that_is_not_inside_this_one_bear_its_path(results_dir, tmp_path, monkeypatch, name):
    folder = Path(model_folder("base")) if name.startswith("./") or name == "." else Path("work")
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    if name == "../outside":
        model_folder(name)
    path = str(Path(name).resolve())
    assert results_dir(name) == "runs/evaluations/" + path.strip("/").replace("/", "--")


def test_a_model_folder_under_runs_is_a_model(results_dir):
    assert results_dir(model_folder("runs/demo/publish")) == "runs/evaluations/runs--demo--publish"


@pytest.mark.parametrize("name", ["runs/dmeo", "./runs/dmeo", DEFAULT_RUN_DIR])
def test_a_run_folder_that_does_not_exist_is_not_looked_for_on_the_hub(results_dir, name):
    with pytest.raises(InputError, match="is not a run folder: there is no such folder. Train first"):
        results_dir(name)


def test_a_folder_that_is_no_model_is_taken_for_a_run(results_dir):
    Path("somewhere").mkdir()
    with pytest.raises(InputError, match="^somewhere is not a run folder"):
        results_dir("somewhere")


def test_an_adapter_folder_under_runs_is_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/demo/adapter").mkdir(parents=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "owner/base", "r": 8}
    Path("runs/demo/adapter/adapter_config.json").write_text(json.dumps(settings))
    Path("runs/demo/adapter/adapter_model.safetensors").write_bytes(b"")
    target = find_eval_target("runs/demo/adapter", EvaluateConfig())
    assert (target.kind, target.base, target.adapter_dir) == ("adapter", "owner/base", "runs/demo/adapter")
    assert target.results_dir == "runs/evaluations/runs--demo--adapter"
