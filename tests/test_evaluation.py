"""What evaluate.py measures, and where its results go."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from sample_records import sample_evaluation, sample_metrics, sample_run

from tweetdora import device, evaluation, targets
from tweetdora.build import write_task
from tweetdora.config import DEFAULT_RUN_DIR, PUBLISHED_REPO, EvaluateConfig, ModelConfig, TaskConfig
from tweetdora.data import load_examples, make_examples
from tweetdora.errors import InputError
from tweetdora.evaluation import (
    Measured,
    load_eval_data,
    measure_base_and_finetuned,
    no_better_than_guessing,
)
from tweetdora.modeling import attach_adapter, load_base, read_published_task, save_adapter
from tweetdora.records import MajorityBaseline, RunRecord
from tweetdora.targets import EvalTarget, correct_task, decide_decoding, find_eval_target


@pytest.fixture
def results_dir(tmp_path, monkeypatch):
    """results_dir(target): where the results of a model go; the current folder is empty, the Hub has no adapters."""
    monkeypatch.chdir(tmp_path)
    for read in ("read_adapter_config", "read_published_task"):
        monkeypatch.setattr(targets, read, lambda name: None)

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
    with pytest.raises(InputError, match="is not a run folder: the folder does not exist. Train first"):
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
    return EvalTarget(
        "runs/x",
        "run" if run else "model",
        "b",
        None,
        None,
        None,
        TaskConfig(),
        None,
        run and run.max_new_tokens,
        run,
        "results",
    )


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
            ["note: --max_new_tokens 16; runs/x was trained for 64."],
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
    return measure_base_and_finetuned(target, None, make_examples(["What a day"], [0]), config, decoding)


def test_the_tokenizer_and_template_beside_an_adapter_are_those_it_was_trained_with(
    adapter_dir, make_tokenizer, task, tokenizer
):
    assert measure_adapter(adapter_dir, task).prompt_format.head.startswith("<|im_start|>system")
    make_tokenizer(chat_template="day" + tokenizer.chat_template).save_pretrained(adapter_dir)
    measured = measure_adapter(adapter_dir, task)
    assert measured.prompt_format.head.startswith("day<|im_start|>system")
    lengths = {name: (len(found.generations), len(found.scores.labels)) for name, found in measured.answers.items()}
    assert lengths == {"finetuned": (1, 1), "base": (1, 1)}


def test_an_adapter_that_does_not_fit_is_refused_before_an_example_is_answered(
    adapter_dir, make_model, task, tokenizer, tmp_path, monkeypatch
):
    make_model(hidden_size=16).save_pretrained(tmp_path / "smaller")
    tokenizer.save_pretrained(tmp_path / "smaller")
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "smaller")}))
    monkeypatch.setattr(evaluation, "_answer", None)
    with pytest.raises(InputError, match="^the adapter in .* does not fit the base model"):
        measure_adapter(adapter_dir, task)


# Guessing


@pytest.mark.parametrize(
    ("finetuned", "base", "said"),
    [
        (0.60, 0.1, None),
        (0.5012, 0.1, "The fine-tuned model's macro-F1, 0.501, is not above that of uniform guessing, 0.501."),
        (0.30, 0.9, "The fine-tuned model's macro-F1, 0.300, is not above that of uniform guessing, 0.501."),
        (None, 0.30, "The base model's macro-F1, 0.300, is not above that of uniform guessing, 0.501."),
        (None, 0.60, None),
    ],
)
def test_a_model_that_is_no_better_than_guessing_is_said(finetuned, base, said):
    matrix = [[1, 1, 0], [1, 1, 1]]
    record = sample_evaluation(
        base=sample_metrics(base, matrix), finetuned=finetuned and sample_metrics(finetuned, matrix)
    )
    assert no_better_than_guessing(record) == said


def test_the_better_guess_is_the_one_to_beat():
    baselines = dataclasses.replace(
        sample_evaluation().baselines, majority=MajorityBaseline(0.6, 0.5, 0.5, label="good")
    )
    record = sample_evaluation(baselines=baselines, finetuned=sample_metrics(0.55, [[1, 1, 0], [1, 1, 1]]))
    assert "is not above that of always predicting one label, 0.600." in no_better_than_guessing(record)


# Other data than the task's


def test_a_task_is_corrected_by_name_and_what_was_otherwise_is_told(task):
    corrected, said = correct_task(task, {"test_split": "train[:5]", "text_column": "text"})
    assert (corrected.test_split, corrected.text_column) == ("train[:5]", "text")
    assert said == ["test_split: was 'test', now 'train[:5]'"]
    assert correct_task(task, {}) == (task, [])


def test_another_data_set_has_its_own_configuration_and_revision():
    task = TaskConfig(dataset_revision="v1")
    corrected, said = correct_task(task, {"dataset_name": "owner/other"})
    assert (corrected.dataset_config, corrected.dataset_revision) == (None, None)
    assert said == [
        "dataset_name: was 'cardiffnlp/tweet_eval', now 'owner/other'",
        "dataset_config: was 'sentiment', now None",
        "dataset_revision: was 'v1', now None",
    ]
    shared, said = correct_task(TaskConfig(test_share=0.2), {"dataset_name": "owner/other"})
    assert shared.test_share == 0.0 and said[-1] == "test_share: was 0.2, now 0.0", "all of the other one is measured"
    moved = correct_task(TaskConfig(dataset_name="old/rows.csv", test_share=0.2), {"dataset_name": "new/rows.csv"})
    assert moved[0].test_share == 0.2, "the same file in another place keeps its share"
    given = {"dataset_name": "owner/other", "dataset_config": "x"}
    assert correct_task(task, given)[0].dataset_config == "x"


def test_a_correction_tells_no_folder_of_this_machine(tmp_path):
    """It stands on the card; so does the note on training examples that are gone."""
    _, said = correct_task(TaskConfig(), {"dataset_name": str(tmp_path / "secret" / "rows.csv")})
    assert said[0] == "dataset_name: was 'cardiffnlp/tweet_eval', now 'rows.csv'"
    run = sample_run(task=TaskConfig(dataset_name=str(tmp_path / "gone.csv")))
    (tmp_path / "here.csv").write_text("text,label\na,0\n")
    here = TaskConfig(dataset_name=str(tmp_path / "here.csv"), test_split="train")
    assert str(tmp_path) not in " ".join(notes_of(run, here))


def test_a_named_split_takes_the_place_of_a_share():
    corrected, said = correct_task(TaskConfig(test_share=0.1), {"test_split": "train[:5]"})
    assert (corrected.test_split, corrected.test_share) == ("train[:5]", 0.0)
    assert said == ["test_split: was 'test', now 'train[:5]'", "test_share: was 0.1, now 0.0"]


def run_on(task, **changes) -> RunRecord:
    """A run that was trained on the train split of a task."""
    train = load_examples(task, "train", None)
    data = dataclasses.replace(sample_run().train_data, sha256=train.sha256, **changes)
    return sample_run(task=task, train_data=data)


def notes_of(run: RunRecord, task: TaskConfig, split: str = "test", **flags) -> list[str]:
    target = dataclasses.replace(target_of(run), task=task)
    notes = load_eval_data(target, EvaluateConfig(split=split, **flags), None, None).notes
    assert {note.split for note in notes} <= {split}
    return [note.text for note in notes]


def test_what_is_measured_is_compared_with_what_was_trained_on(task):
    run = run_on(task)
    assert notes_of(run, task) == [
        "only 24 examples, so the intervals are wide",
        "24 of 24 texts are in the train split too",
    ]
    assert notes_of(run, task, split="validation") == ["12 of 12 texts are in the train split too"]
    assert notes_of(run, task, split="train") == []


def test_training_examples_that_cannot_be_compared_are_said(task):
    gone = run_on(task)
    gone = dataclasses.replace(gone, task=dataclasses.replace(task, train_split="gone"))
    assert (
        "texts shared with the training examples were not counted: these can no longer be read"
        in (notes_of(gone, task)[1])
    )
    other = dataclasses.replace(gone, task=task, train_data=dataclasses.replace(gone.train_data, sha256="other"))
    assert notes_of(other, task)[1].endswith("these have changed since the run was trained")


# A published model's own task


def test_a_published_model_is_asked_its_own_question(results_dir, monkeypatch, tmp_path):
    folder = model_folder(str(tmp_path / "model"))
    monkeypatch.setattr(targets, "read_published_task", read_published_task)
    run = sample_run(max_new_tokens=40)
    write_task(folder, run)
    target = find_eval_target(folder, EvaluateConfig())
    assert (target.task, target.prompt_format) == (
        dataclasses.replace(run.task, dataset_revision=run.train_data.revision),
        run.prompt_format,
    )
    assert (target.notes, decide_decoding(target, EvaluateConfig(), "cpu").max_new_tokens) == ([], 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("label_words: [x, y]\n")
    target = find_eval_target(folder, EvaluateConfig(config=str(recipe)))
    assert (target.task.label_words, target.prompt_format, target.max_new_tokens) == (["x", "y"], None, None)


def test_a_base_is_asked_as_a_run_was_trained_on_whatever_day(results_dir, tmp_path, monkeypatch):
    """A chat template may write the date: measured with today's, the base would not be comparable with the run."""
    run = sample_run()
    monkeypatch.setattr(targets, "read_run", lambda folder: {"runs/mine": run}[folder])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"label_words": run.task.label_words, "system_prompt": run.task.system_prompt}))
    config = EvaluateConfig(prompt_of="runs/mine", config=str(recipe))
    target = find_eval_target(model_folder(str(tmp_path / "model")), config)
    assert (target.prompt_format, target.run) == (run.prompt_format, None)
    with pytest.raises(InputError, match="--prompt_of runs/mine: that run has another system prompt or other label"):
        find_eval_target(str(tmp_path / "model"), EvaluateConfig(prompt_of="runs/mine"))
    with pytest.raises(InputError, match="--prompt_of runs/mine: runs/mine has its own prompt; leave the flag out"):
        find_eval_target("runs/mine", EvaluateConfig(prompt_of="runs/mine"))


def test_a_published_task_tells_no_folder_of_this_machine(tmp_path):
    write_task(str(tmp_path), sample_run(task=TaskConfig(dataset_name=str(tmp_path / "secret" / "rows.csv"))))
    text = (tmp_path / "task.json").read_text()
    assert '"dataset_name": "rows.csv"' in text and str(tmp_path) not in text


@pytest.mark.parametrize(("name", "revision"), [("owner/base", "some-branch"), ("owner/other", None)])
def test_a_base_is_measured_at_the_revision_of_its_recipe(results_dir, tmp_path, monkeypatch, name, revision):
    monkeypatch.setattr("tweetdora.targets.read_adapter_config", lambda name: None)
    path = tmp_path / "recipe.yaml"
    path.write_text("model_name_or_path: owner/base\nmodel_revision: some-branch\n")
    assert find_eval_target(name, EvaluateConfig(config=str(path))).base_revision == revision


def test_a_model_without_a_task_is_asked_the_published_question_and_that_is_said(results_dir, tmp_path):
    target = find_eval_target(model_folder(str(tmp_path / "model")), EvaluateConfig())
    (note,) = target.notes
    assert "no task.json was found with" in note and "on cardiffnlp/tweet_eval. --config names" in note


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "task.json is not readable"),
        ('{"record_version": 99}', "task.json has record version 99; this code reads"),
    ],
)
def test_a_task_that_cannot_be_read_is_refused(content, message, tmp_path):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_published_task(str(tmp_path))
