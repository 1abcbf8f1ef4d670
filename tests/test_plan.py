"""The plan of a run: refused before it starts if it cannot be, and described in figures worked out by hand."""

import copy
import dataclasses
import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tweetdora import plan, precision
from tweetdora.checkpoints import CHECKSUMS, SAVING_DIR, publish_checkpoint, saved_run
from tweetdora.config import ModelConfig, TaskConfig, TrainConfig
from tweetdora.data import Rows, load_rows
from tweetdora.errors import InputError
from tweetdora.modeling import attach_adapter, base_identity, load_base
from tweetdora.plan import (
    check_disk,
    check_same_run,
    describe_run,
    find_checkpoint,
    format_plan,
)
from tweetdora.prompts import encode_rows

REASON = "no W&B login was found (wandb login, or WANDB_API_KEY)"


@pytest.fixture
def training(tmp_path) -> Callable[..., TrainConfig]:
    """training(**settings): the settings of a run in a folder that does not exist yet."""

    def make(**settings: Any) -> TrainConfig:
        defaults = {"output_dir": str(tmp_path / "run"), "precision": "fp32", "report_to": []}
        return TrainConfig(**{**defaults, **settings})

    return make


def make_checkpoint(run_dir: Path, step: int) -> str:
    """A checkpoint as far as find_checkpoint looks."""
    beside = run_dir / SAVING_DIR / f"checkpoint-{step}"
    beside.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt"):
        (beside / name).write_text("{}")
    return publish_checkpoint(str(run_dir), step, keep=None)


def make_record(run_dir: Path, status: str) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "run.json").write_text(json.dumps({"status": status}))


# Where to go on from


@pytest.mark.parametrize("asked", [None, "", "false", "False"])
def test_a_new_run_starts_from_nothing(asked, training):
    settings = training(resume_from_checkpoint=asked)
    assert find_checkpoint(settings) == (None, [])
    assert settings.resume_from_checkpoint is None, "the Trainer takes any text for a folder"


def test_a_new_run_may_start_in_a_folder_that_holds_something_else(training, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("")
    assert find_checkpoint(training()) == (None, [])


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        *(
            (status, "Go on with it by --resume_from_checkpoint true, or choose")
            for status in ("started", "interrupted")
        ),
        ("finished", "Choose"),
        ("diverged", "Lower --learning_rate and choose"),
    ],
)
def test_a_new_run_is_refused_a_folder_with_a_run(status, advice, training, tmp_path):
    make_record(tmp_path / "run", status)
    message = (
        f"^--output_dir {tmp_path}/run already holds a run \\({status}\\). {advice} another --output_dir, or delete"
    )
    with pytest.raises(InputError, match=message):
        find_checkpoint(training())


def test_a_new_run_is_refused_a_folder_with_checkpoints(training, tmp_path):
    make_checkpoint(tmp_path / "run", 10)
    with pytest.raises(InputError, match=rf"^--output_dir {tmp_path}/run already holds a run \(unfinished\)"):
        find_checkpoint(training())


@pytest.mark.parametrize("asked", ["true", "True"])
def test_a_resumed_run_goes_on_from_its_last_checkpoint(asked, training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    for step in (9, 100, 20):
        make_checkpoint(tmp_path / "run", step)
    assert find_checkpoint(training(resume_from_checkpoint=asked)) == (str(tmp_path / "run" / "checkpoint-100"), [])


def test_a_resumed_run_goes_on_from_the_checkpoint_that_is_named(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    first = make_checkpoint(tmp_path / "run", 10)
    make_checkpoint(tmp_path / "run", 20)
    assert find_checkpoint(training(resume_from_checkpoint=first)) == (first, [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt cannot be read (No such file or directory)"),
        (lambda folder: (folder / "optimizer.pt").write_text("cut"), "optimizer.pt is not what was written"),
    ],
)
def test_a_resumed_run_passes_over_a_damaged_checkpoint_and_says_so(damage, said, training, tmp_path):
    make_record(tmp_path / "run", "started")
    whole, other = make_checkpoint(tmp_path / "run", 10), make_checkpoint(tmp_path / "run", 20)
    damage(Path(other))
    found, (note,) = find_checkpoint(training(resume_from_checkpoint="true"))
    assert found == whole
    assert note.startswith(f"note: {other} is damaged and passed over (") and said in note
    assert note.endswith(f"; going on from {whole}.") and "\n" not in note
    with pytest.raises(InputError, match=re.escape(f"--resume_from_checkpoint {other}: ") + ".*" + re.escape(said)):
        find_checkpoint(training(resume_from_checkpoint=other))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "started")
    checkpoint = make_checkpoint(tmp_path / "run", 10)
    Path(checkpoint, "optimizer.pt").unlink()
    with pytest.raises(InputError, match=rf"found no whole checkpoint in .* \({checkpoint} is damaged, optimizer.pt"):
        find_checkpoint(training(resume_from_checkpoint="true"))


def test_a_checkpoint_that_was_being_written_is_not_looked_at(training, tmp_path):
    make_record(tmp_path / "run", "started")
    whole = make_checkpoint(tmp_path / "run", 10)
    shutil.copytree(whole, tmp_path / "run" / SAVING_DIR / "checkpoint-20")
    assert find_checkpoint(training(resume_from_checkpoint="true")) == (whole, [])


def test_a_resumed_run_takes_no_copy_for_its_last_checkpoint(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    last = make_checkpoint(tmp_path / "run", 10)
    shutil.copytree(last, tmp_path / "run" / "checkpoint-10-copy")
    assert find_checkpoint(training(resume_from_checkpoint="true")) == (last, [])


def test_a_finished_run_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "finished")
    make_checkpoint(tmp_path / "run", 10)
    with pytest.raises(
        InputError,
        match=f"^the run in {tmp_path}/run is finished; there is nothing to resume. Choose another --output_dir.$",
    ):
        find_checkpoint(training(resume_from_checkpoint="true"))


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again_and_says_so(training, tmp_path):
    make_record(tmp_path / "run", "started")
    settings = training(resume_from_checkpoint="true")
    note = f"note: the run in {tmp_path}/run was stopped before its first checkpoint; it begins again."
    assert find_checkpoint(settings) == (None, [note])
    assert settings.resume_from_checkpoint is None


def test_a_run_goes_on_from_a_checkpoint_of_another_folder_in_an_empty_one_only(training, tmp_path):
    make_record(tmp_path / "other", "interrupted")
    other = make_checkpoint(tmp_path / "other", 10)
    assert find_checkpoint(training(resume_from_checkpoint=other)) == (other, [])
    assert saved_run(other) == {"status": "interrupted"}, "the record that belongs to the checkpoint"
    make_record(tmp_path / "run", "interrupted")
    with pytest.raises(InputError, match="is of another run than --output_dir .*/run, which holds one already"):
        find_checkpoint(training(resume_from_checkpoint=other))


def test_a_folder_that_does_not_exist_is_not_resumed(training):
    with pytest.raises(InputError, match="^--resume_from_checkpoint true: found no checkpoint in "):
        find_checkpoint(training(resume_from_checkpoint="true"))


def test_a_named_folder_that_is_no_checkpoint_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    make_checkpoint(tmp_path / "run", 10)
    named = f"{tmp_path}/run/checkpoint-11"
    with pytest.raises(InputError, match=f"^--resume_from_checkpoint {named}: there is no such checkpoint.$"):
        find_checkpoint(training(resume_from_checkpoint=named))


# Room and rights


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("limit", "needed"),
    [
        (2, 1_000_000 * 12 * 3 + 50_000_000),  # a million weights and two moments of 4 bytes, 2 + 1 checkpoints
        (5, 1_000_000 * 12 * 6 + 50_000_000),
        (None, 1_000_000 * 12 * 11 + 50_000_000),
    ],
)
def test_a_run_starts_only_if_its_checkpoints_fit(limit, needed, training, tmp_path, monkeypatch):
    settings = training(save_total_limit=limit)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: Usage(0, 0, needed))
    check_disk(settings, trainable=1_000_000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: Usage(0, 0, needed - 1))
    with pytest.raises(
        InputError,
        match=f"^--output_dir {tmp_path}/run: {needed / 1e6:.0f} MB free, but adapter, checkpoints and plots need "
        f"about {needed / 1e6:.0f} MB. Make room, choose another folder, or lower --save_total_limit.$",
    ):
        check_disk(settings, trainable=1_000_000)


def test_room_is_looked_for_where_the_run_will_be(training, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: (asked.append(path), Usage(0, 0, 10**12))[1])
    check_disk(training(), trainable=1)
    assert asked == [str(tmp_path / "run")]
    assert (tmp_path / "run").is_dir()


def test_a_folder_that_cannot_be_written_is_refused(training, tmp_path, monkeypatch):
    """By way of os.access: for root, whom tests may run as, every folder can be written."""
    monkeypatch.setattr(plan.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(InputError, match=f"^--output_dir {tmp_path}/run is not writable; choose another folder.$"):
        check_disk(training(), trainable=1)


def test_a_folder_that_cannot_be_made_is_refused(training, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=f"^--output_dir {tmp_path}/file/run cannot be made: .*Not a directory"):
        check_disk(training(output_dir=str(tmp_path / "file" / "run")), trainable=1)


# The description


@pytest.fixture(scope="module")
def rows_of(task) -> dict[str, Rows]:
    return {split: load_rows(task, split) for split in ("train", "validation")}


@pytest.fixture
def describe(model_dir, task, encoder, training, rows_of) -> Callable[..., dict[str, Any]]:
    """describe(rows=None, seed=0, task=…, model=…, **training settings): the plan of a run on the tiny model."""
    whole, validation = rows_of["train"], rows_of["validation"]

    def make(rows: int | None = None, seed: int = 0, **settings: Any) -> dict[str, Any]:
        parts = {"task": settings.pop("task", task), "model": settings.pop("model", {})}
        model_config = ModelConfig(**{"model_name_or_path": model_dir, **parts["model"]})
        config = training(**settings)
        base = load_base(model_dir, None, torch.float32, torch.device("cpu"))
        identity = base_identity(base, model_dir, None)
        base.name_or_path = model_config.model_name_or_path
        torch.manual_seed(seed)
        train_rows = whole.head(rows)
        return describe_run(
            task=parts["task"],
            model_config=model_config,
            training=config,
            base=identity,
            base_card={"license": "mit"},
            model=attach_adapter(base, model_config),
            encoder=encoder,
            train_rows=train_rows,
            encoded=encode_rows(train_rows, encoder),
            validation_rows=validation if config.eval_samples else None,
        )

    return make


@pytest.mark.parametrize(
    ("rows", "settings", "steps"),
    [
        (48, {}, 3),
        (47, {}, 3),  # the last batch has 15
        (33, {}, 3),  # the last batch has one
        (32, {}, 2),
        (1, {}, 1),
        (48, {"global_batch_size": 48}, 1),
        (48, {"gradient_accumulation_steps": 4}, 3),
        (48, {"num_train_epochs": 2}, 6),
        (48, {"num_train_epochs": 0.5}, 2),  # one and a half
        (48, {"num_train_epochs": 2.5}, 8),  # seven and a half
        (47, {"dataloader_drop_last": True}, 2),  # the last 15 rows are left out
        (40, {"dataloader_drop_last": True, "gradient_accumulation_steps": 4}, 3),  # in fours: ten
        (1, {"dataloader_drop_last": True}, 1),
        (48, {"max_steps": 7}, 7),
        (48, {"max_steps": 7, "num_train_epochs": 9}, 7),
    ],
)
def test_the_number_of_steps_is_the_one_worked_out_by_hand(rows, settings, steps, describe):
    assert describe(rows=rows, **settings)["steps"] == steps


def test_the_rows_are_counted_by_class(describe):
    """Classes 0, 1, 2, 0, … in both splits."""
    run = describe(rows=32)
    assert run["train_data"]["rows"] == 32
    assert run["train_data"]["class_counts"] == {"negative": 11, "neutral": 11, "positive": 10}
    assert run["validation_data"]["class_counts"] == {"negative": 4, "neutral": 4, "positive": 4}


def test_the_tokens_are_those_of_the_rendered_chats(describe, task, tokenizer):
    """Second way: the whole chat through the template, up to the stop token; a line break follows it there."""
    rows = load_rows(task, "train")
    tokens = 0
    for text, label in zip(rows.texts, rows.classes, strict=True):
        chat = [
            {"role": "system", "content": task.system_prompt},
            {"role": "user", "content": text},
            {"role": "assistant", "content": task.label_words[label]},
        ]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
        tokens += len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    data = describe()["train_data"]
    # 16 rows of each class; negative and positive are one token, neutral two, and the stop token comes to each.
    assert (data["tokens"], data["supervised_tokens"], data["cut_texts"]) == (tokens, 16 * 2 + 16 * 3 + 16 * 2, 0)


def test_the_adapter_is_counted_and_its_start_named(describe):
    """Hidden size 32, keys and values 16, r 8, two modules in two layers: 4 x (8 x 32 + 16 x 8 + 16)."""
    first, same, other = describe(seed=1)["adapter"], describe(seed=1)["adapter"], describe(seed=2)["adapter"]
    assert first["trainable_parameters"] == 1600
    assert first == same
    assert first["start_sha256"] != other["start_sha256"]


def test_a_run_without_validation_has_no_validation_data(describe):
    assert describe(eval_samples=0)["validation_data"] is None


def test_the_data_are_named_with_split_and_content(describe, task):
    source = describe()["train_data"]
    assert (source["name"], source["split"], len(source["sha256"])) == (task.dataset_name, "train", 64)


def test_the_device_that_computes_is_named(describe):
    """`environment` lists all GPUs there are, used or not."""
    assert describe()["device"] == "cpu"


def test_the_description_is_plain_json(describe):
    run = describe()
    assert json.loads(json.dumps(run)) == run


def test_the_description_holds_every_setting_that_changes_the_result(describe):
    assert describe(learning_rate=1e-4, seed=7, warmup_steps=5, lr_scheduler_type="cosine")["training"] == {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": None,
        "warmup_steps": 5,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "optim": "adamw_torch_fused",
        "optim_args": None,
        "optim_target_modules": None,
        "max_grad_norm": 1.0,
        "label_smoothing_factor": 0.0,
        "num_train_epochs": 1.0,
        "max_steps": -1,
        "global_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "precision": "fp32",
        "tf32": None,
        "batching": "packed",
        "seed": 42,
        "data_seed": None,
        "neftune_noise_alpha": None,
        "full_determinism": False,
        "train_sampling_strategy": "random",
        "dataloader_drop_last": False,
    }


@pytest.mark.parametrize(
    ("task_is", "model_is", "flag", "expected"),
    [
        ("published", "published", None, "liuhailin0123/llm-course-hw3-dora"),
        ("published", "published", "me/mine", "me/mine"),
        ("another", "published", None, None),
        ("published", "another", None, None),
        ("another", "another", "me/mine", "me/mine"),
    ],
)
def test_only_a_run_of_the_published_recipe_is_published_there(task_is, model_is, flag, expected, describe, task):
    task = TaskConfig() if task_is == "published" else task
    model = {"model_name_or_path": ModelConfig().model_name_or_path} if model_is == "published" else {}
    assert describe(task=task, model=model, hub_model_id=flag)["hub_model_id"] == expected


def test_a_run_of_the_published_recipe_with_another_training_is_not_published_there(describe):
    model = {"model_name_or_path": ModelConfig().model_name_or_path}
    assert describe(task=TaskConfig(), model=model, max_steps=3, learning_rate=1.0)["hub_model_id"] is None


# The plan that a person reads


def lines(text: str) -> dict[str, str]:
    """Label and text of each line; of two with one label the last."""
    return dict(re.match(r"  (.{14}) (.*)", line).groups() for line in text.splitlines())


def plan_lines(run: dict[str, Any], settings: TrainConfig) -> dict[str, str]:
    return {label.strip(): text for label, text in lines(format_plan(run, settings)).items()}


def test_the_plan_says_all_that_the_run_will_be(describe, training, task, model_dir, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    settings = {"report_to": ["wandb"], "eval_steps": 20, "learning_rate": 1e-4, "gradient_accumulation_steps": 2}
    config = training(**settings)
    config.cpu_threads = 2
    run = describe(**settings)
    # 48 texts of two or three words each; the tokens are counted in a test above.
    tokens = f"{run['train_data']['tokens']:,}"
    parameters = 367 * 32 * 2 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    assert plan_lines(run, config) == {
        "base model": f"{model_dir} (LlamaForCausalLM, {parameters:,} parameters)",
        "adapter": "dora on k_proj, v_proj, r 8, alpha 16: 1,600 trainable parameters "
        f"({100 * 1600 / parameters:.3f}%)",
        "training rows": f"48 of {task.dataset_name}, train: 16 negative, 16 neutral, 16 positive",
        "tokens": f"{tokens}, of which 112 carry loss; 0 texts cut to --max_length 512",
        "validation": "12 rows every 20 steps and at the end",
        "steps": "3 of 16 rows = 1 process(es) x 2 x 8; learning rate 0.0001, linear",
        "device": "cpu, 2 threads each",
        "precision": "fp32: asked for by --precision fp32",
        "tracker": f"wandb, offline: {REASON}",
        "run folder": f"{tmp_path}/run",
    }


def test_the_plan_gives_the_reason_for_a_precision_that_nobody_chose(describe, training, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda device_type: False)
    settings = {"precision": "auto"}
    assert plan_lines(describe(**settings), training(**settings))["precision"] == "fp32: this CPU has no bf16 units"


def test_the_plan_says_that_there_is_neither_validation_nor_tracker(describe, training):
    shown = plan_lines(describe(eval_samples=0), training(eval_samples=0))
    assert (shown["validation"], shown["tracker"]) == ("none", "none")


def test_steps_below_one_are_a_share_of_all_steps(describe, training):
    settings = {"eval_steps": 0.125}
    lines = plan_lines(describe(**settings), training(**settings))
    assert lines["validation"] == "12 rows every 12.5 % of the steps and at the end"


def test_the_plan_says_how_many_gpus_stay_idle(describe, training):
    settings = training()
    settings.visible_gpus = 4
    expected = "4 GPUs are visible, 1 is used: accelerate launch --multi_gpu train.py uses all"
    assert plan_lines(describe(), settings)["note"] == expected


def test_the_plan_says_where_a_template_puts_the_prompt_that_it_has_no_role_for(describe, training):
    run = describe()
    run["prompt_format"]["system_in_user_turn"] = True
    expected = "the chat template takes no system message: the prompt heads the user's turn"
    assert plan_lines(run, training())["note"] == expected


def test_the_plan_of_an_ordinary_run_has_no_note(describe, training):
    assert "note" not in plan_lines(describe(), training())


def test_the_plan_names_a_configuration_of_the_data_set(describe, training, task):
    run = describe()
    run["train_data"]["config"] = "sentiment"
    assert plan_lines(run, training())["training rows"].startswith(f"48 of {task.dataset_name}/sentiment, train: ")


# Whether it is the same run


def test_the_same_settings_are_the_same_run(describe):
    check_same_run(json.loads(json.dumps(describe())), describe())


@pytest.mark.parametrize(
    "difference",
    [
        {"save_steps": 5},
        {"logging_steps": 3},
        {"output_dir": "elsewhere"},
        {"eval_samples": 0},
        {"report_to": ["wandb"]},
        {"run_name": "another"},
    ],
)
def test_settings_that_change_no_result_may_change(difference, describe):
    check_same_run(describe(), describe(**difference))


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ({"learning_rate": 1e-4}, "training.learning_rate: was 3e-05, now 0.0001"),
        ({"lr_scheduler_type": "cosine"}, "training.lr_scheduler_type: was 'linear', now 'cosine'"),
        ({"global_batch_size": 8}, "training.global_batch_size: was 16, now 8"),
        ({"max_steps": 9}, "training.max_steps: was -1, now 9"),
        ({"seed": 7}, None),
        ({"batching": "padded"}, "training.batching: was 'packed', now 'padded'"),
        ({"model": {"r": 4}}, "model.r: was 8, now 4"),
        ({"model": {"method": "lora"}}, "model.method: was 'dora', now 'lora'"),
        ({"rows": 40}, "train_data.rows: was 48, now 40"),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(difference, named, describe):
    if named is None:  # `seed` is describe's own name for the adapter's; the run's goes by way of the record
        run = describe()
        run["training"]["seed"], named = 7, "training.seed: was 42, now 7"
        pair = describe(), run
    else:
        pair = describe(), describe(**difference)
    with pytest.raises(
        InputError,
        match="^--resume_from_checkpoint: this is not the run that was interrupted. .*another --output_dir.$",
    ) as refusal:
        check_same_run(*pair)
    assert named in str(refusal.value)


def test_another_prompt_is_another_run(describe, task):
    other = dataclasses.replace(task, system_prompt="Something else")
    with pytest.raises(InputError, match="task.system_prompt: was 'Say how the day is.*', now 'Something else'"):
        check_same_run(describe(), describe(task=other))


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("base", "weights_sha256"),
        ("base", "revision"),
        ("train_data", "sha256"),
        ("prompt_format", "tail"),
        ("task", "max_length"),
    ],
)
def test_changed_data_base_or_prompt_are_another_run(part, key, describe):
    changed = describe()
    changed[part][key] = "changed"
    with pytest.raises(InputError, match=rf"{part}\.{key}: was .*, now 'changed'"):
        check_same_run(describe(), changed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("training.world_size", lambda run: run["training"].update(world_size=2)),
        ("training.batching", lambda run: run["training"].update(batching="padded")),
        ("code", lambda run: run["environment"].update(git={"commit": "b" * 40, "dirty": False})),
        ("packages", lambda run: run["environment"]["packages"].update(torch="9.9")),
    ],
)
def test_what_may_differ_is_refused_by_name_and_allowed_by_name(name, change, describe):
    saved, now = describe(), describe()
    saved["environment"] = copy.deepcopy(saved["environment"]) | {"git": {"commit": "a" * 40, "dirty": False}}
    now["environment"] = copy.deepcopy(saved["environment"])
    assert check_same_run(saved, now) == []
    change(now)
    with pytest.raises(InputError, match=re.escape(f"(--allow_changes {name} goes on all the same)")):
        check_same_run(saved, now)
    (said,) = check_same_run(saved, now, [name])
    assert said.startswith(name) and ": was " in said and ", now " in said


def test_what_makes_another_run_is_allowed_by_no_name(describe, training):
    """Said in the first second, and of a run that is not resumed too."""
    with pytest.raises(InputError, match="--allow_changes training.learning_rate: expected some of training.world"):
        find_checkpoint(training(allow_changes=["training.learning_rate"]))
    with pytest.raises(InputError, match="training.learning_rate: was 3e-05, now 0.0001. Give"):
        check_same_run(describe(), describe(learning_rate=1e-4), ["code", "packages"])


def test_all_differences_are_named_at_once(describe):
    with pytest.raises(InputError, match="model.r: was 8, now 4.*; training.learning_rate: was 3e-05, now 0.0001"):
        check_same_run(describe(), describe(model={"r": 4}, learning_rate=1e-4))


def test_a_setting_that_an_older_record_does_not_have_is_named(describe):
    saved = describe()
    del saved["training"]["batching"]
    with pytest.raises(InputError, match="training.batching: was None, now 'packed'"):
        check_same_run(saved, describe())
