"""The plan of a run: refused before it starts if it cannot be, and described in numbers worked out by hand."""

import os
import re
from collections import namedtuple
from dataclasses import replace

import pytest

from tweetdora import device, plan
from tweetdora.block import LayerCount
from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.data import load_examples
from tweetdora.errors import InputError, ResourceError
from tweetdora.plan import check_disk, count_steps, default_hub_model_id, format_plan
from tweetdora.records import RunRecord, training_settings
from tweetdora.train_config import TrainConfig

REASON = "no W&B login was found (wandb login, or WANDB_API_KEY)"

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
        ResourceError,
        match=f"^--output_dir {tmp_path}/run: {needed / 1e6:.0f} MB free, but adapter, checkpoints and plots need "
        f"about {needed / 1e6:.0f} MB. Free disk space, choose another folder, or lower --save_total_limit.$",
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
    with pytest.raises(ResourceError, match=f"^--output_dir {tmp_path}/run is not writable; choose another folder.$"):
        check_disk(training(), trainable=1)


def test_a_folder_that_cannot_be_made_is_refused(training, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=f"^--output_dir {tmp_path}/file/run cannot be created: .*Not a directory"):
        check_disk(training(output_dir=str(tmp_path / "file" / "run")), trainable=1)


# The record of a run before its first step


@pytest.mark.parametrize(
    ("examples", "settings", "steps"),
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
        (16, {"dataloader_drop_last": True, "gradient_accumulation_steps": 4}, 1),
        (48, {"max_steps": 7}, 7),
        (48, {"max_steps": 7, "num_train_epochs": 9}, 7),
    ],
)
def test_the_number_of_steps_is_the_one_worked_out_by_hand(examples, settings, steps, training):
    assert count_steps(training(**settings), examples) == steps


@pytest.mark.parametrize("max_steps", [-1, 5])
def test_a_plan_without_a_whole_batch_is_refused(max_steps, training):
    settings = training(dataloader_drop_last=True, max_steps=max_steps)
    with pytest.raises(InputError, match="--dataloader_drop_last true leaves no batch of the 15 training examples"):
        count_steps(settings, 15)


def test_the_examples_are_counted_by_label(planned):
    """Labels 0, 1, 2, 0, … in both splits."""
    run = planned(examples=32)
    assert run.train_data.num_examples == 32
    assert run.train_data.label_counts == {"negative": 11, "neutral": 11, "positive": 10}
    assert run.validation_data.label_counts == {"negative": 4, "neutral": 4, "positive": 4}


def test_the_tokens_are_those_of_the_rendered_chats(planned, task, tokenizer):
    """Second way: the whole chat through the template, up to the stop token; a line break follows it there."""
    rows = load_examples(task, "train", None)
    tokens = 0
    for text, label in zip(rows.texts, rows.labels, strict=True):
        chat = [
            {"role": "system", "content": task.system_prompt},
            {"role": "user", "content": text},
            {"role": "assistant", "content": task.label_words[label]},
        ]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
        tokens += len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    data = planned().train_data
    # 16 rows of each class; negative and positive are one token, neutral two, and the stop token comes to each.
    assert (data.tokens, data.supervised_tokens, data.truncated) == (tokens, 16 * 2 + 16 * 3 + 16 * 2, 0)


def test_the_adapter_is_counted_and_its_start_named(planned):
    """Hidden size 32, keys and values 16, r 8, two modules in two layers: 4 x (8 x 32 + 16 x 8 + 16)."""
    first, same, other = planned(seed=1).adapter, planned(seed=1).adapter, planned(seed=2).adapter
    assert first.trainable_parameters == 1600
    assert first == same
    assert first.start_sha256 != other.start_sha256


def test_a_run_without_validation_has_no_validation_data(planned):
    assert planned(max_eval_samples=0).validation_data is None


def test_the_data_are_named_with_split_and_content(planned, task):
    data = planned().train_data
    assert (data.name, data.split, len(data.sha256)) == (task.dataset_name, "train", 64)


def test_the_device_that_computes_is_named(planned):
    """`environment` lists all GPUs there are, used or not."""
    assert planned().device == "cpu"


def test_a_record_holds_every_setting_that_changes_the_result(training):
    settings = training(learning_rate=1e-4, seed=7, warmup_steps=5, lr_scheduler_type="cosine")
    assert vars(training_settings(settings)) == {
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
        "batching": "shared_prefix",
        "shard_base": False,
        "seed": 7,
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
def test_only_a_run_of_the_published_recipe_is_published_there(task_is, model_is, flag, expected, training, task):
    task = TaskConfig() if task_is == "published" else task
    model = ModelConfig() if model_is == "published" else ModelConfig(model_name_or_path="me/base")
    assert default_hub_model_id(task, model, training(hub_model_id=flag)) == expected


def test_a_run_of_the_published_recipe_with_another_training_is_not_published_there(training):
    assert default_hub_model_id(TaskConfig(), ModelConfig(), training(max_steps=3, learning_rate=1.0)) is None


# The plan that a person reads


def lines(text: str) -> dict[str, str]:
    """Label and text of each line; of two with one label the last."""
    return dict(re.match(r"  (.{14}) (.*)", line).groups() for line in text.splitlines())


BOTH_LAYERS = LayerCount(2, 2, 64)


def plan_lines(
    run: RunRecord, settings: TrainConfig, threads: int = 1, layers: LayerCount = BOTH_LAYERS
) -> dict[str, str]:
    """The lines of a plan, but for what is noted on the tiny data set."""
    run = replace(run, notes=[])
    return {label.strip(): text for label, text in lines(format_plan(run, settings, threads, layers)).items()}


def test_the_plan_says_all_that_the_run_will_be(planned, training, task, model_dir, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    settings = {"report_to": ["wandb"], "eval_steps": 20, "learning_rate": 1e-4, "gradient_accumulation_steps": 2}
    config, run = training(**settings), planned(**settings)
    # 48 texts of two or three words each; the tokens are counted in a test above.
    tokens = f"{run.train_data.tokens:,}"
    parameters = 367 * 32 * 2 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
    shown = plan_lines(run, config, threads=2, layers=LayerCount(1, 2, 64))
    assert shown == {
        "base model": f"{model_dir} (LlamaForCausalLM, {parameters:,} parameters)",
        "adapter": "dora on k_proj, v_proj, r 8, alpha 16: 1,600 trainable parameters "
        f"({100 * 1600 / parameters:.3f}%)",
        "training data": f"48 examples of {task.dataset_name}, train: 16 negative, 16 neutral, 16 positive",
        "tokens": f"{tokens}, 112 of them supervised; 0 texts truncated to --max_length 512",
        "validation": "12 examples every 20 steps and at the end",
        "steps": "3 of 16 examples = 1 process(es) x 2 x 8; learning rate 0.0001, linear",
        "device": "cpu, 2 threads each",
        "precision": "fp32: asked for by --precision fp32",
        "batching": "shared_prefix: the prompts' common start once per batch; 1 of 2 layers run as one function",
        "system prompt": task.system_prompt,
        "tracker": f"wandb, offline: {REASON}",
        "run folder": f"{tmp_path}/run",
    }


def test_the_plan_gives_the_reason_for_a_precision_that_nobody_chose(planned, training, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: False)
    settings = {"precision": "auto"}
    assert plan_lines(planned(**settings), training(**settings))["precision"] == "fp32: this CPU has no bf16 units"


def test_the_plan_says_that_there_is_neither_validation_nor_tracker(planned, training):
    shown = plan_lines(planned(max_eval_samples=0), training(max_eval_samples=0))
    assert (shown["validation"], shown["tracker"]) == ("none", "none")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (LayerCount(2, 2, 8), ""),
        (LayerCount(0, 2, 4), ""),
        (LayerCount(2, 2, 4), ", but not for most batches of 8. "
         "--gradient_accumulation_steps 4 makes them 4: less time and memory"),
        (LayerCount(2, 2, 7), ", but not for most batches of 8. "
         "--gradient_accumulation_steps 4 makes them 4: less time and memory"),
        (LayerCount(2, 2, 3), ", but not for most batches of 8. "
         "--gradient_accumulation_steps 8 makes them 2: less time and memory"),
        (LayerCount(2, 2, 0), ", but not for texts as long as most"),
    ],
)  # fmt: skip
def test_the_plan_says_that_a_batch_is_too_large_for_the_layers_one_function(layers, said, planned, training):
    settings = {"gradient_accumulation_steps": 2}  # 16 examples in two parts
    shown = plan_lines(planned(**settings), training(**settings), layers=layers)["batching"]
    assert shown.endswith(f" {layers.written_out} of 2 layers run as one function{said}")


def test_the_plan_gives_the_reason_for_layers_that_fp16_leaves_as_they_are(planned, training):
    config = training()
    config.precision = "fp16"  # which needs a GPU
    shown = plan_lines(planned(), config, layers=LayerCount(0, 2, 8))["batching"]
    assert shown.endswith("; 0 of 2 layers run as one function: fp16 trains under autocast, with the model's own code")


def test_the_plan_says_that_prompts_are_not_shared(planned, training):
    settings = {"batching": "padded"}
    shown = plan_lines(planned(**settings), training(**settings))
    assert shown["batching"] == "padded: each example with its whole prompt"


def test_steps_below_one_are_a_share_of_all_steps(planned, training):
    settings = {"eval_steps": 0.125}
    lines = plan_lines(planned(**settings), training(**settings))
    assert lines["validation"] == "12 examples every 12.5 % of the steps and at the end"


def test_the_plan_says_how_many_gpus_stay_idle(planned, training):
    settings = training(max_steps=100)
    settings.visible_gpus = 4
    expected = "4 GPUs are visible, 1 is used: accelerate launch --multi_gpu train.py uses them all"
    assert plan_lines(planned(max_steps=100), settings)["note"] == expected


def test_the_plan_says_where_a_template_puts_the_prompt_that_it_has_no_role_for(planned, training):
    run = planned(max_steps=100)
    run = replace(run, prompt_format=replace(run.prompt_format, system_in_user_turn=True))
    expected = "the chat template has no system role: the system prompt starts the user's turn"
    assert plan_lines(run, training())["note"] == expected


def test_the_plan_of_an_ordinary_run_has_no_note(planned, training):
    settings = {"num_train_epochs": 20}
    assert "note" not in plan_lines(planned(**settings), training(**settings))


def test_the_plan_shows_the_notes_on_the_data(planned, training):
    text = format_plan(planned(), training(), 1, BOTH_LAYERS)
    assert "  note           test: 24 of 24 texts are in the train split too\n" in text


def test_the_plan_names_label_words_that_the_prompt_leaves_out(planned, training, task):
    run = planned(num_train_epochs=20)
    run = replace(run, task=replace(task, system_prompt="Negative or not?"))
    assert (
        plan_lines(run, training(num_train_epochs=20))["note"] == "the system prompt does not name neutral, positive"
    )


@pytest.mark.parametrize(
    ("steps", "rate", "said"), [(49, 9e-5, True), (50, 9e-5, False), (49, 1e-4, False), (3, 3e-5, True)]
)
def test_a_run_that_will_teach_nothing_is_said(steps, rate, said, planned, training):
    settings = {"max_steps": steps, "learning_rate": rate}
    shown = plan_lines(planned(**settings), training(**settings))
    assert ("note" in shown) == said
    if said:
        assert shown["note"].startswith(f"{steps} steps at a learning rate of {rate:g} will change almost nothing")


def test_the_plan_names_a_configuration_of_the_data_set(planned, training, task):
    run = planned()
    run = replace(run, train_data=replace(run.train_data, config="sentiment"))
    assert plan_lines(run, training())["training data"].startswith(
        f"48 examples of {task.dataset_name}/sentiment, train: "
    )
