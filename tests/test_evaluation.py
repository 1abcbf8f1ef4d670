"""What evaluate.py measures, and where its results go."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sample_records import sample_evaluation, sample_metrics, sample_run

from tweetdora import device, evaluation
from tweetdora.config import DEFAULT_RUN_DIR, PUBLISHED_REPO, EvaluateConfig, ModelConfig, TaskConfig
from tweetdora.data import make_examples
from tweetdora.errors import InputError
from tweetdora.evaluation import (
    EvalTarget,
    Measured,
    decide_decoding,
    find_eval_target,
    generate_base_and_finetuned,
    warn_of_guessing,
)
from tweetdora.modeling import attach_adapter, load_base, save_adapter
from tweetdora.records import MajorityBaseline, RunRecord


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


# How the answers are generated


def target_of(run: RunRecord | None) -> EvalTarget:
    return EvalTarget("runs/x", "run" if run else "model", "b", None, None, None, TaskConfig(), None, run, "results")


def trained_in(precision: str, max_new_tokens: int = 64) -> RunRecord:
    run = sample_run(max_new_tokens=max_new_tokens)
    return dataclasses.replace(run, training=dataclasses.replace(run.training, precision=precision))


@pytest.mark.parametrize(
    ("run", "flags", "launcher", "bf16", "expected", "notes"),
    [
        (None, {}, None, True, ("bf16", 16), []),
        (None, {"max_new_tokens": 5}, None, False, ("fp32", 5), []),
        ("fp32", {}, None, True, ("fp32", 64), []),  # what the device would do by itself is another thing
        ("bf16", {}, None, True, ("bf16", 64), []),
        ("fp32", {"precision": "bf16"}, None, True, ("bf16", 64), ["note: answers in bf16 (asked for by --precision"]),
        ("fp32", {}, "bf16", True, ("bf16", 64), ["note: answers in bf16 (asked for by accelerate launch's"]),
        (
            "bf16",
            {},
            None,
            False,
            ("fp32", 64),
            ["note: answers in fp32 (this CPU has no bf16 units); the run was tr"],
        ),
        (
            "fp16",
            {},
            None,
            False,
            ("fp32", 64),
            ["note: answers in fp32 (this CPU has no bf16 units); the run was tr"],
        ),
        (
            "fp32",
            {"max_new_tokens": 16},
            None,
            False,
            ("fp32", 16),
            ["note: --max_new_tokens 16; the run was validat"],
        ),
        ("fp32", {"max_new_tokens": 64}, None, False, ("fp32", 64), []),
    ],
)
def test_what_the_run_fixed_comes_from_the_run_and_what_differs_is_said(
    run, flags, launcher, bf16, expected, notes, monkeypatch
):
    target = target_of(run and trained_in(run))
    monkeypatch.setattr(device, "has_bf16", lambda device_type: bf16)
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    found = decide_decoding(target, EvaluateConfig(**flags), "cpu")
    assert (found.precision, found.max_new_tokens) == expected
    assert len(found.notes) == len(notes) and all(map(str.startswith, found.notes, notes))


# An adapter from elsewhere


@pytest.fixture
def adapter_dir(model_dir, tmp_path) -> Path:
    """A folder with a new adapter on the tiny model."""
    base = load_base(model_dir, None, torch.float32, torch.device("cpu"))
    torch.manual_seed(0)
    save_adapter(attach_adapter(base, ModelConfig(model_name_or_path=model_dir)), str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def measure_adapter(folder: Path, task: TaskConfig) -> Measured:
    config = EvaluateConfig(max_new_tokens=2)
    target = dataclasses.replace(find_eval_target(str(folder), config), task=task)
    decoding = decide_decoding(target, config, "cpu")
    return generate_base_and_finetuned(target, None, make_examples(["What a day"], [0]), config, decoding)


def test_the_tokenizer_and_template_beside_an_adapter_are_those_it_was_trained_with(
    adapter_dir, make_tokenizer, task, tokenizer
):
    assert measure_adapter(adapter_dir, task).prompt_format.head.startswith("<|im_start|>system")
    make_tokenizer(chat_template="day" + tokenizer.chat_template).save_pretrained(adapter_dir)
    measured = measure_adapter(adapter_dir, task)
    assert measured.prompt_format.head.startswith("day<|im_start|>system")
    assert {name: len(found) for name, found in measured.generations.items()} == {"finetuned": 1, "base": 1}


def test_an_adapter_that_does_not_fit_is_refused_before_an_example_is_answered(
    adapter_dir, make_model, task, tokenizer, tmp_path, monkeypatch
):
    make_model(hidden_size=16).save_pretrained(tmp_path / "smaller")
    tokenizer.save_pretrained(tmp_path / "smaller")
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "smaller")}))
    monkeypatch.setattr(evaluation, "_generate", None)
    with pytest.raises(InputError, match="^the adapter in .* does not fit the base model"):
        measure_adapter(adapter_dir, task)


# Guessing


@pytest.mark.parametrize(
    ("finetuned", "base", "said"),
    [
        (0.60, 0.1, None),
        (0.5012, 0.1, "note: the fine-tuned model's macro-F1, 0.501, is not above that of uniform guessing, 0.501."),
        (0.30, 0.9, "note: the fine-tuned model's macro-F1, 0.300, is not above that of uniform guessing, 0.501."),
        (None, 0.30, "note: the base model's macro-F1, 0.300, is not above that of uniform guessing, 0.501."),
        (None, 0.60, None),
    ],
)
def test_a_model_that_is_no_better_than_guessing_is_said(finetuned, base, said):
    matrix = [[1, 1, 0], [1, 1, 1]]
    record = sample_evaluation(
        base=sample_metrics(base, matrix), finetuned=finetuned and sample_metrics(finetuned, matrix)
    )
    assert warn_of_guessing(record) == said


def test_the_better_guess_is_the_one_to_beat():
    baselines = dataclasses.replace(
        sample_evaluation().baselines, majority=MajorityBaseline(0.6, 0.5, 0.5, label="good")
    )
    record = sample_evaluation(baselines=baselines, finetuned=sample_metrics(0.55, [[1, 1, 0], [1, 1, 1]]))
    assert "is not above that of always the same label, 0.600." in warn_of_guessing(record)
