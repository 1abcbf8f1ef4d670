"""Flags and recipes: the defaults are the published run, and what cannot be is refused in the user's own words."""

import dataclasses
import errno
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from tweetdora import cli, config, device, train_config
from tweetdora.cli import parse_train, parse_with_target, read_task, run_script
from tweetdora.config import CORRECTIONS, SYSTEM_PROMPT, EvaluateConfig, ModelConfig, PushConfig, TaskConfig
from tweetdora.device import decide_precision, uses_gpu
from tweetdora.errors import DivergedError, HubError, InputError, ResourceError, UserError, VerificationError
from tweetdora.records import training_settings
from tweetdora.seeds import find_runs
from tweetdora.train_config import RECIPE_ARGUMENTS, TrainConfig, is_published_run

REPO_DIR = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPO_DIR / "recipes").rglob("*.yaml"))
# Launch files of accelerate, not recipes of train.py.
RECIPES = [path for path in RECIPES if "accelerate" not in path.relative_to(REPO_DIR / "recipes").parts]


@pytest.fixture(autouse=True)
def a_cpu_with_bf16(monkeypatch):
    """The same decision on every machine; tests of it set their own."""
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def recipe(tmp_path):
    """recipe(text): the flags that name a recipe of this text."""

    def write(text: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return ["--config", str(path)]

    return write


def parse(*argv: str) -> tuple[TaskConfig, ModelConfig, TrainConfig]:
    return parse_train(argv, "Train.")


# Defaults


def test_the_defaults_are_the_published_run():
    """Every value by hand, from the published run's description."""
    task, model, training = parse()
    assert (task.dataset_name, task.dataset_config) == ("cardiffnlp/tweet_eval", "sentiment")
    assert (task.train_split, task.max_train_samples) == ("train", 10_000)
    assert task.label_words == ["negative", "neutral", "positive"]
    assert task.system_prompt == (
        "You are a tweet sentiment classifier. For each tweet input, analyze its sentiment and output exactly one "
        'word: "negative", "neutral", or "positive". Do not include any extra text.'
    )
    assert model.model_name_or_path == "OuteAI/Lite-Oute-1-300M-Instruct"
    assert (model.method, model.target_modules, model.r, model.lora_alpha) == ("dora", ["k_proj", "v_proj"], 8, 16)
    assert (training.learning_rate, training.num_train_epochs, training.max_steps) == (3e-5, 1.0, -1)
    assert (training.global_batch_size, training.per_device_train_batch_size, training.world_size) == (16, 16, 1)
    assert training.output_dir == "runs/llm-course-hw3-dora"
    assert is_published_run(task, model, training)


@pytest.mark.parametrize(
    "flags",
    [
        ("--r", "4"),
        ("--max_train_samples", "0"),
        ("--system_prompt", "Answer."),
        ("--model_name_or_path", "other"),
        ("--learning_rate", "1"),
        ("--max_steps", "3"),
        ("--num_train_epochs", "2"),
        ("--global_batch_size", "32"),
        ("--lr_scheduler_type", "cosine"),
        ("--warmup_steps", "10"),
        ("--seed", "1"),
    ],
)
def test_another_setting_is_not_the_published_run(flags):
    assert not is_published_run(*parse(*flags))


@pytest.mark.parametrize(
    "flags",
    [
        ("--model_revision", "a" * 40, "--dataset_revision", "b" * 40),
        ("--gradient_accumulation_steps", "4"),
        ("--precision", "fp32"),
        ("--batching", "padded"),
        ("--max_eval_samples", "0", "--save_steps", "7", "--report_to", "none", "--output_dir", "elsewhere"),
    ],
)
def test_a_pinned_revision_or_another_machine_is_still_the_published_run(flags):
    assert is_published_run(*parse(*flags))


def test_another_data_set_has_no_configuration_unless_one_is_named():
    assert parse("--dataset_name", "imdb")[0].dataset_config is None
    assert parse("--dataset_config", "emoji")[0].dataset_config == "emoji"


@pytest.mark.parametrize("config_class", [TaskConfig, ModelConfig, TrainConfig, EvaluateConfig, PushConfig])
def test_every_field_has_a_sentence_of_help(config_class):
    ours = [item for item in dataclasses.fields(config_class) if item.name in config_class.__annotations__]
    assert len(ours) >= 7
    for item in ours:
        assert not item.init or item.metadata["help"].endswith("."), item.name


# Recipes


def test_flags_win_over_the_recipe_and_the_recipe_over_the_defaults(recipe):
    text = "learning_rate: 1e-4\nr: 4\ntarget_modules: [q_proj]\nlabel_words: [bad, good]\n"
    task, model, training = parse(*recipe(text), "--r", "2", "--label_words", "no", "yes")
    assert (training.learning_rate, model.r, model.lora_alpha) == (1e-4, 2, 16)
    assert model.target_modules == ["q_proj"]
    assert task.label_words == ["no", "yes"]


def test_the_place_of_the_recipe_among_the_flags_does_not_matter(recipe):
    assert parse("--r", "2", *recipe("r: 4"), "--lora_alpha", "3")[1].r == 2
    (flag, path) = recipe("r: 4")
    assert parse(f"{flag}={path}")[1].r == 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_committed_recipe_parses(path):
    task, model, training = parse("--config", str(path))
    assert training.output_dir != "runs/llm-course-hw3-dora", (
        "a variant must not write into the published run's folder"
    )
    assert read_task(str(path)) == task


def test_there_is_a_committed_recipe():
    assert "quickstart.yaml" in [path.name for path in RECIPES]


def test_the_best_recipe_is_that_of_the_best_run_on_validation():
    runs = find_runs([str(REPO_DIR / "results/best")], "validation")
    best = max(runs, key=lambda run: run.finetuned_metrics.macro_f1).run
    task, model, training = parse("--config", str(REPO_DIR / "recipes/best.yaml"))
    assert (task, model) == (best.task, best.model)
    found = training_settings(training)
    for name in set(RECIPE_ARGUMENTS) - {"seed"}:
        assert getattr(found, name) == getattr(best.training, name), name


def test_the_learning_rate_of_a_recipe_is_a_number(recipe):
    """YAML 1.1 reads 3e-5, which has no dot, as a string."""
    assert parse(*recipe("learning_rate: 3e-5"))[2].learning_rate == 0.00003


@pytest.mark.parametrize("value", ["--Answer!", "-x", "'a=b'", "-1"])
def test_a_value_of_a_recipe_is_no_flag(recipe, value):
    assert parse(*recipe(f"system_prompt: {value}"))[0].system_prompt == value.strip("'")


def test_numbers_are_words_where_words_are_expected(recipe):
    text = "label_words: [1, 2, 3]\nlabel_values: [-1, 0, 1]\nmodel_revision: 1234567"
    task, model, _ = parse(*recipe(text))
    assert (task.label_words, task.label_values) == (["1", "2", "3"], ["-1", "0", "1"])
    assert model.model_revision == "1234567"


def test_null_is_none_where_none_means_something(recipe):
    task, model, training = parse(*recipe("max_train_samples: null\nsave_total_limit: null\nmodel_revision:"))
    assert (task.max_train_samples, training.save_total_limit, model.model_revision) == (None, None, None)
    assert parse(*recipe("max_train_samples: null"), "--max_train_samples", "5")[0].max_train_samples == 5


@pytest.mark.parametrize("key", ["learning_rate", "r", "label_words", "output_dir", "global_batch_size", "method"])
def test_null_is_refused_where_a_value_is_needed(recipe, key):
    with pytest.raises(InputError, match=rf"recipe.yaml: {key} is empty \(null\); set a value"):
        parse(*recipe(f"{key}: null"))


def test_null_inside_a_list_is_refused(recipe):
    with pytest.raises(InputError, match=r"recipe.yaml: label_words is \['bad', None\]; expected a plain value or"):
        parse(*recipe("label_words: [bad, null]"))


@pytest.mark.parametrize(("text", "found"), [("[no, yes]", "False"), ("[on, 'off']", "True")])
def test_unquoted_truth_values_are_refused_as_label_words(recipe, text, found):
    message = f'recipe.yaml: label_words holds {found} where a word is expected; put it in quotes, like "no"'
    with pytest.raises(InputError, match=message):
        parse(*recipe(f"label_words: {text}"))


def test_quoted_truth_values_are_label_words(recipe):
    assert parse(*recipe("label_words: ['no', \"yes\"]"))[0].label_words == ["no", "yes"]


@pytest.mark.parametrize("value", ["{bad: 0, good: 1}", "[[bad], [good]]"])
def test_nested_values_are_refused(recipe, value):
    with pytest.raises(InputError, match="recipe.yaml: label_words is .*bad.*; expected a plain value or a list of"):
        parse(*recipe(f"label_words: {value}"))


def test_an_unknown_key_is_refused_with_a_near_one(recipe):
    message = "recipe.yaml: unknown key 'lerning_rate'. Did you mean learning_rate? Keys are the flags of train.py"
    with pytest.raises(InputError, match=re.escape(message)):
        parse(*recipe("lerning_rate: 1"))


@pytest.mark.parametrize("key", ["xyzzy", "7", "help", "help_all", "config", "precision_reason", "no"])
def test_what_is_no_setting_is_an_unknown_key(recipe, key):
    with pytest.raises(InputError, match="recipe.yaml: unknown key "):
        parse(*recipe(f"{key}: 1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("r: [", "--config .*recipe.yaml is not readable YAML: while parsing"),
        ("r: \x00", "--config .*recipe.yaml is not readable YAML: "),
        ("", "recipe.yaml: expected lines such as 'learning_rate: 3e-5', found NoneType"),
        ("- r", "recipe.yaml: expected lines such as 'learning_rate: 3e-5', found list"),
        ("r: four", "argument --r: invalid int value: 'four'"),
        ("r: 4\nlora_alpha: 8\nr: 8", "recipe.yaml is not readable YAML: the key 'r' occurs more than once"),
        ("eval_strategy: no", 'eval_strategy holds False where a word is expected; put it in quotes, like "no"'),
        ("config: other.yaml", "unknown key 'config'. Keys are the flags of train.py"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe, text, message):
    with pytest.raises(InputError, match=message):
        parse(*recipe(text))


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"r: \xff")
    with pytest.raises(InputError, match="recipe.yaml is not readable YAML: 'utf-8' codec"):
        parse("--config", str(tmp_path / "recipe.yaml"))


def test_a_second_recipe_is_refused(recipe):
    with pytest.raises(InputError, match="--config is given 2 times .*; expected one recipe per run"):
        parse(*recipe("r: 4"), "--config", "recipes/quickstart.yaml")


def test_resuming_may_be_asked_for_in_a_recipe_without_quotes(recipe):
    assert parse(*recipe("resume_from_checkpoint: true"))[2].resume_from_checkpoint == "True"


def test_a_missing_recipe_is_named():
    with pytest.raises(InputError, match="--config recipes/nix.yaml: there is no such file; recipes are in recipes/"):
        parse("--config", "recipes/nix.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match=f"--config {tmp_path} cannot be read .Is a directory.; expected a YAML file"):
        parse("--config", str(tmp_path))


def test_read_task_reads_the_task_alone_and_without_a_recipe_the_published_one(recipe):
    assert read_task(None) == TaskConfig()
    _, path = recipe("dataset_name: imdb\nlabel_words: [bad, good]\nmax_train_samples: 0\nr: 4\nprecision: fp16")
    task = read_task(path)
    assert task == TaskConfig(dataset_name="imdb", label_words=["bad", "good"], max_train_samples=None)


def test_read_task_checks_the_recipe(recipe):
    with pytest.raises(InputError, match="unknown key 'label_word'. Did you mean label_words?"):
        read_task(recipe("label_word: [a, b]")[1])


# Flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--lerning_rate", "1"],
            r"unknown argument '--lerning_rate'; did you mean --learning_rate\? \(see .* --help",
        ),
        (["--xyzzy"], r"unknown argument '--xyzzy' \(see .* --help\)"),
        (["--learning", "1"], "unknown argument '--learning'"),
        (["quickstart"], "unknown argument 'quickstart'"),
        (["recipes/x.yaml"], "unexpected argument 'recipes/x.yaml'; to use a recipe, write --config recipes/x.yaml"),
        (["--learning_rate", "fast"], "argument --learning_rate.*invalid float value: 'fast'"),
        (["--method", "qlora"], "argument --method: invalid choice: 'qlora'"),
        (["--dry_run", "maybe"], "argument --dry_run.*Truthy value expected: got maybe"),
        (["--config"], "argument --config: expected one argument"),
    ],
)
def test_a_wrong_flag_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse(*argv)


def test_a_stray_word_behind_a_recipe_is_refused(recipe):
    """It must not become another item of the list that the recipe ends in."""
    with pytest.raises(InputError, match="unknown argument 'v_proj'"):
        parse(*recipe("target_modules: [k_proj]"), "v_proj")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], False), (["--dry_run"], True), (["--dry_run", "true"], True), (["--dry_run", "false"], False)],
)
def test_a_flag_can_be_turned_off_as_well_as_on(argv, expected):
    assert parse(*argv)[2].dry_run is expected


@pytest.mark.parametrize(("value", "expected"), [("false", False), ("no", False), ("true", True), ("'yes'", True)])
def test_a_truth_value_of_a_recipe_can_be_false(recipe, value, expected):
    assert parse(*recipe(f"logging_first_step: {value}"))[2].logging_first_step is expected


def test_a_truth_value_of_a_recipe_gives_way_to_the_flag(recipe):
    assert parse(*recipe("dry_run: true"), "--dry_run", "false")[2].dry_run is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--label_words", "No", "no"],
            r"--label_words is \['No', 'no'\]; expected at least two words that differ in",
        ),
        (["--label_words", "yes"], r"--label_words is \['yes'\]; expected at least two words"),
        (["--label_words", "yes", " "], r"--label_words is \['yes', ' '\]; expected at least two words"),
        (
            ["--label_values", "0", "4"],
            "--label_values has 2 values and --label_words 3 words; give one value per wo",
        ),
        (["--max_train_samples", "-1"], "--max_train_samples is -1; expected a positive number, or 0 for all"),
        (["--r", "0"], "--r is 0 and --lora_alpha 16; both must be 1 or more"),
        (["--lora_alpha", "0"], "--r is 8 and --lora_alpha 0; both must be 1 or more"),
        (["--lora_dropout", "1"], "--lora_dropout is 1.0; expected 0 or more, and below 1"),
        (["--lora_dropout", "-0.1"], "--lora_dropout is -0.1; expected 0 or more"),
        (
            ["--push_to_hub", "true"],
            "--push_to_hub is not supported by train.py: train first, then publish with python push_to_hub.py",
        ),
        (["--hub_token", "hf_secret"], "--hub_token: a token in a flag ends up in logs; set HF_TOKEN or run"),
        (["--max_eval_samples", "-1"], "--max_eval_samples is -1; expected 0 or more"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; expected 1 or more"),
        (["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size is 0; expected 1 or more"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0; expected 1 or more"),
        (["--global_batch_size", "0"], "--global_batch_size is 0; expected 1 or more"),
        (["--cpu_threads", "-1"], "--cpu_threads is -1; expected 0 or more"),
        (["--learning_rate=-1e-4"], "--learning_rate is -0.0001; expected a number, 0 or more"),
        (["--learning_rate", "nan"], "--learning_rate is nan; expected a number, 0 or more"),
        (["--logging_steps", "0"], "--logging_steps is 0.0; expected a number above 0"),
        (["--save_steps", "-5"], "--save_steps is -5.0; expected a number above 0"),
        (
            ["--eval_strategy", "epoch"],
            "--eval_strategy is set by --max_eval_samples .0: no validation. and --eval_steps",
        ),
        (["--seed", "-1"], "--seed is -1; expected 0 to 4294967295"),
        (["--data_seed", "4294967296"], "--data_seed is 4294967296; expected 0 to 4294967295"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha scales .* Add --batching padded"),
        (
            ["--hub_model_id", "me"],
            "--hub_model_id is 'me'; expected owner/name, such as liuhailin0123/llm-course-hw3",
        ),
        (["--max_steps", "0"], "--max_steps is 0 and --num_train_epochs 1.0: nothing to train"),
        (["--num_train_epochs", "0"], "--max_steps is -1 and --num_train_epochs 0.0: nothing to train"),
        (["--num_train_epochs", "nan"], "--num_train_epochs is nan; expected a number above 0"),
        (["--num_train_epochs", "inf"], "--num_train_epochs is inf; expected a number above 0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        parse(*argv)


def test_an_optimizer_that_saves_other_weights_than_it_trains_is_refused():
    message = (
        "^--optim schedule_free_adamw is not supported: its weights for validation and saving are others than those"
    )
    with pytest.raises(InputError, match=message):
        parse("--optim", "schedule_free_adamw")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--label_smoothing_factor", "0.1"], "is 0.1, which is not supported: the loss is plain cross-entropy"),
        (
            ["--average_tokens_across_devices", "false"],
            "is False, .*: the loss is always the mean over the answer tok",
        ),
        (
            ["--auto_find_batch_size", "true"],
            "is True, .*: a step always takes --global_batch_size examples; if memory",
        ),
        (
            ["--accelerator_config", '{"split_batches": true}'],
            "is '.*', .*: --global_batch_size determines how processes share",
        ),
        (["--metric_for_best_model", "loss"], "is 'loss', .*: the adapter is that of the last step"),
        (["--load_best_model_at_end", "true"], "is True, .*: the adapter is that of the last step"),
        (["--save_only_model", "true"], "is True, .*: a run cannot resume from a checkpoint without its optimizer"),
        (["--ignore_data_skip", "true"], "is True, .*: a resumed run would see some examples twice and others never"),
        (["--use_liger_kernel", "true"], "is True, .*: it replaces layers of the model"),
        (["--bf16_full_eval", "true"], "is True, .*: validation uses --precision"),
        (["--fp16_full_eval", "true"], "is True, .*: validation uses --precision"),
        (
            ["--deepspeed", "zero.json"],
            "is 'zero.json', .*: a base that does not fit one GPU is sharded with FSDP2",
        ),
    ],
)
def test_a_flag_of_the_trainer_that_does_something_else_here_is_refused_with_the_reason(argv, message):
    with pytest.raises(InputError, match=rf"^{argv[0]} {message}.*\. Leave it out\.$"):
        parse(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--save_strategy", "best"], "--save_strategy best: the adapter is that of the last step"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "--lr_scheduler_type reduce_lr_on_plateau depends on val"),
        (["--lr_scheduler_type", "greedy"], "--lr_scheduler_type greedy depends on validations"),
    ],
)
def test_what_follows_the_validations_is_refused(argv, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(*argv)


@pytest.mark.parametrize("trackers", [["foo"], ["wandb", "foo"], ["none", "wandb"], ["all", "none"]])
def test_a_tracker_that_is_not_there_is_refused_with_those_that_are(trackers):
    message = (
        rf"^--report_to is {' '.join(trackers)}; expected none, all, or some of the installed trackers: "
        r".*\bwandb\b.*\.$"
    )
    with pytest.raises(InputError, match=message):
        parse("--report_to", *trackers)


def test_none_and_all_trackers_are_what_the_trainer_means_by_them():
    assert parse("--report_to", "none")[2].report_to == []
    assert "wandb" in parse("--report_to", "all")[2].report_to
    assert TrainConfig(report_to="wandb").report_to == ["wandb"]


def test_a_refused_token_is_not_repeated():
    with pytest.raises(InputError) as caught:
        parse("--hub_token", "hf_secret")
    assert "secret" not in str(caught.value)


def test_the_edges_of_what_can_be_are_accepted():
    task, model, training = parse(
        *("--max_train_samples", "1", "--r", "1", "--lora_alpha", "1", "--lora_dropout", "0"),
        *("--max_eval_samples", "0", "--max_new_tokens", "1", "--hub_model_id", "me/mine", "--max_steps", "1"),
        *("--seed", "0", "--data_seed", "4294967295", "--neftune_noise_alpha", "5", "--batching", "padded"),
    )
    assert (task.max_train_samples, model.r, training.hub_model_id, training.max_steps) == (1, 1, "me/mine", 1)
    assert training.eval_strategy == "no" and parse()[2].eval_strategy == "steps"


def test_the_run_is_named_after_its_folder():
    training = parse("--output_dir", "runs/mine/")[2]
    assert (training.output_dir, training.run_name) == ("runs/mine", "mine")
    assert parse("--output_dir", "runs/mine", "--run_name", "other")[2].run_name == "other"


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_for_terminals_unless_the_user_says_so(monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert parse()[2].disable_tqdm is not terminal
    assert parse("--disable_tqdm", "false")[2].disable_tqdm is False
    assert parse("--disable_tqdm", "true")[2].disable_tqdm is True


# Batch sizes


@pytest.mark.parametrize(
    ("global_batch_size", "accumulation", "rows"), [(16, 1, 16), (16, 4, 4), (12, 3, 4), (16, 16, 1)]
)
def test_rows_of_a_pass_follow_from_the_global_batch_size(global_batch_size, accumulation, rows):
    argv = ["--global_batch_size", str(global_batch_size), "--gradient_accumulation_steps", str(accumulation)]
    assert parse(*argv)[2].per_device_train_batch_size == rows
    assert parse(*argv, "--per_device_train_batch_size", str(rows))[2].per_device_train_batch_size == rows


def test_an_order_that_depends_on_the_number_of_processes_or_on_a_resume_is_refused():
    """transformers groups within the batches of a process, by a random state that a resume does not restore."""
    parse("--train_sampling_strategy", "sequential")
    for strategy in ("group_by_length", "batch_rebalance"):
        with pytest.raises(InputError, match=f"--train_sampling_strategy {strategy} is not supported: a resumed run"):
            parse("--train_sampling_strategy", strategy)


def test_checkpoints_without_limit_are_0_and_not_a_negative_number():
    """transformers takes both for no limit; here, -1 would keep the newest one only."""
    assert parse("--save_total_limit", "0")[2].save_total_limit == 0
    with pytest.raises(InputError, match="--save_total_limit is -1; expected 0 or more"):
        parse("--save_total_limit", "-1")


@pytest.mark.parametrize("flag", ["weight_decay", "max_grad_norm"])
def test_what_would_make_weights_or_gradients_grow_is_refused(flag):
    """torch checks neither."""
    with pytest.raises(InputError, match=f"--{flag} is -0.1; expected 0 or more"):
        parse(f"--{flag}", "-0.1")


@pytest.mark.parametrize("flag", ["torch_compile_backend", "torch_compile_mode"])
def test_what_turns_torch_compile_on_is_refused_as_well(flag):
    with pytest.raises(InputError, match=f"--{flag} is 'x', which is not supported: every batch has another shape"):
        parse(f"--{flag}", "x")


def test_a_launch_for_the_cpu_uses_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert uses_gpu()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_gpu()


def test_rows_of_a_pass_shrink_as_processes_are_added(monkeypatch):
    """The global batch must not grow with the number of GPUs."""
    monkeypatch.setattr(TrainConfig, "world_size", 8)
    assert parse()[2].per_device_train_batch_size == 2
    assert parse("--gradient_accumulation_steps", "2")[2].per_device_train_batch_size == 1
    message = (
        "--global_batch_size 12 cannot be divided evenly among 8 processes x 1 accumulation steps; expected a mult"
    )
    with pytest.raises(InputError, match=message):
        parse("--global_batch_size", "12")


def test_a_contradicting_batch_size_is_refused_with_the_one_that_fits():
    message = (
        "--per_device_train_batch_size 8 contradicts --global_batch_size 16: with 1 processes and 4 accumulation "
        "steps it is 4. Leave it out, or change"
    )
    with pytest.raises(InputError, match=message):
        parse("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4")


@pytest.mark.parametrize(("size", "accumulation"), [("16", "3"), ("2", "4")])
def test_a_global_batch_that_cannot_be_shared_is_refused(size, accumulation):
    message = (
        f"--global_batch_size {size} cannot be divided evenly among 1 processes x {accumulation} accumulation steps"
    )
    with pytest.raises(InputError, match=f"{message}; expected a multiple of {accumulation}"):
        parse("--global_batch_size", size, "--gradient_accumulation_steps", accumulation)


# Precision


@pytest.mark.parametrize(
    ("requested", "flags", "launcher", "device_type", "bf16_units", "expected"),
    [
        ("auto", (), None, "cpu", True, ("bf16", "this CPU computes in bf16")),
        ("auto", (), None, "cpu", False, ("fp32", "this CPU has no bf16 units")),
        ("auto", (), None, "cuda", True, ("bf16", "H0 computes in bf16")),
        ("auto", (), None, "cuda", False, ("fp32", "H0 has no bf16 units")),
        ("auto", (), "no", "cpu", True, ("bf16", "this CPU computes in bf16")),  # nobody chose
        ("auto", (), "", "cpu", False, ("fp32", "this CPU has no bf16 units")),
        ("auto", (), "bf16", "cpu", True, ("bf16", "asked for by accelerate launch's mixed_precision: bf16")),
        ("auto", (), "fp16", "cuda", False, ("fp16", "asked for by accelerate launch's mixed_precision: fp16")),
        ("auto", ("bf16",), None, "cpu", True, ("bf16", "asked for by --bf16 true")),
        ("auto", ("fp16",), "no", "cuda", True, ("fp16", "asked for by --fp16 true")),
        ("fp32", (), None, "cpu", True, ("fp32", "asked for by --precision fp32")),
        ("fp32", (), "no", "cuda", True, ("fp32", "asked for by --precision fp32")),
        ("bf16", ("bf16",), "bf16", "cpu", True, ("bf16", "asked for by --bf16 true")),
    ],
)
def test_precision_and_its_reason(monkeypatch, requested, flags, launcher, device_type, bf16_units, expected):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: bf16_units)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H0")
    assert decide_precision(requested, set(flags), launcher, device_type) == expected


@pytest.mark.parametrize(
    ("requested", "flags", "launcher", "message"),
    [
        ("fp32", ("bf16",), None, "--bf16 true contradicts --precision fp32. Set the precision in one place"),
        ("fp32", (), "bf16", "--precision fp32 contradicts accelerate launch's mixed_precision: bf16. Set the"),
        ("auto", ("bf16", "fp16"), None, "--bf16 true contradicts --fp16 true. Set"),
        (
            "bf16",
            ("bf16",),
            "fp16",
            "--bf16 true contradicts --precision bf16 contradicts accelerate launch's mixed_p",
        ),
        ("auto", ("bf16",), "fp16", "--bf16 true contradicts accelerate launch's mixed_precision: fp16. Set"),
    ],
)
def test_contradicting_precisions_are_refused_by_name(requested, flags, launcher, message):
    with pytest.raises(InputError, match=message):
        decide_precision(requested, set(flags), launcher, "cpu")


@pytest.mark.parametrize(
    ("requested", "launcher", "bf16_units", "message"),
    [
        ("auto", "fp8", True, "accelerate launch's mixed_precision: fp8: expected no, bf16 or fp16"),
        ("bf16", None, False, "--precision bf16: this CPU has no bf16 units. Use --precision fp32"),
        ("fp16", None, True, "--precision fp16: fp16 needs a GPU. Use --precision bf16 or fp32"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(monkeypatch, requested, launcher, bf16_units, message):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: bf16_units)
    with pytest.raises(InputError, match=message):
        decide_precision(requested, set(), launcher, "cpu")


def test_bf16_units_are_what_the_device_says(monkeypatch):
    monkeypatch.undo()
    for capability in ("amx_bf16", "avx512_bf16", "bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=capability: {"avx2": True, name: True})
        assert device.has_bf16("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not device.has_bf16("cpu")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not device.has_bf16("cuda"), "emulated bf16 is slower than float32"


def test_the_names_of_the_cpu_capabilities_exist_in_this_torch():
    """They are no documented interface: a renamed one would quietly turn bf16 off."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64":
        pytest.skip("the names on this architecture are not known")
    assert {"amx_bf16", "avx512_bf16"} <= set(capabilities)


def test_the_launchers_precision_reaches_the_training_arguments(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    training = parse()[2]
    assert (training.precision, training.precision_reason) == (
        "bf16",
        "asked for by accelerate launch's mixed_precision: bf16",
    )
    assert training.mixed_precision == "no", "the Trainer would take it from the launcher and autocast"
    with pytest.raises(InputError, match="--precision fp32 contradicts accelerate launch's mixed_precision: bf16"):
        parse("--precision", "fp32")


@pytest.mark.parametrize("precision_name", ["fp32", "bf16"])
def test_the_trainer_does_not_autocast(precision_name):
    training = parse("--precision", precision_name)[2]
    assert training.precision == precision_name
    assert (training.bf16, training.fp16, training.mixed_precision) == (False, False, "no")


def test_the_trainers_own_flag_is_a_source_of_the_precision():
    assert parse("--bf16", "true")[2].precision_reason == "asked for by --bf16 true"
    with pytest.raises(InputError, match="--fp16 true: fp16 needs a GPU. Use --precision bf16 or fp32"):
        parse("--fp16", "true")


# The other scripts


def test_a_target_comes_with_its_flags():
    flags_read, target = parse_with_target(
        ["runs/x", "--max_eval_samples", "7"], EvaluateConfig, "Measure.", "Folder."
    )
    assert (target, flags_read.max_eval_samples, flags_read.split) == ("runs/x", 7, "test")
    flags = ["--dry_run", "true", "--private", "false", "runs/x"]
    flags_read, target = parse_with_target(flags, PushConfig, "Push.", "Folder.")
    assert (target, flags_read.dry_run, flags_read.private) == ("runs/x", True, False)


def test_without_a_target_it_is_the_published_runs_folder():
    assert parse_with_target([], EvaluateConfig, "Measure.", "Folder.")[1] == "runs/llm-course-hw3-dora"


@pytest.mark.parametrize(
    ("config_class", "argv", "message"),
    [
        (EvaluateConfig, ["a", "b"], "unknown argument 'b'"),
        (EvaluateConfig, ["--max_sample", "3"], "unknown argument '--max_sample'; did you mean --max_eval_samples"),
        (EvaluateConfig, ["--split", "dev"], "argument --split: invalid choice: 'dev'"),
        (EvaluateConfig, ["--max_eval_samples", "0"], "--max_eval_samples is 0; expected 1 or more"),
        (EvaluateConfig, ["--batch_size", "0"], "--batch_size is 0; expected 1 or more"),
        (EvaluateConfig, ["--max_new_tokens", "-1"], "--max_new_tokens is -1; expected 1 or more"),
        (EvaluateConfig, ["--seed", "-1"], "--seed is -1; expected 0 or more"),
        (EvaluateConfig, ["--bootstrap_samples", "0"], "--bootstrap_samples is 0; expected 1 or more"),
        (PushConfig, ["--check_samples", "0"], "--check_samples is 0; expected 1 or more"),
        (PushConfig, ["--hub_model_id", "a/b/c"], "--hub_model_id is 'a/b/c'; expected owner/name"),
        (PushConfig, ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_a_wrong_flag_of_the_other_scripts_is_refused(config_class, argv, message):
    with pytest.raises(InputError, match=message):
        parse_with_target(argv, config_class, "Do.", "Folder.")


# Help


def help_text(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 0
    return capsys.readouterr().out


def options_of(text: str) -> set[str]:
    return set(re.findall(r"^ +(--\w+)", text, flags=re.MULTILINE))


def test_help_shows_our_flags_and_hides_the_trainers_obscure_ones(capsys):
    text = help_text(capsys, "--help")
    shown = options_of(text)
    ours = {f"--{item.name}" for config in (TaskConfig, ModelConfig) for item in dataclasses.fields(config)}
    ours |= {"--config", "--help_all", "--learning_rate", "--global_batch_size", "--precision", "--batching", "--seed"}
    assert ours <= shown
    assert not shown & {"--adam_beta1", "--fsdp", "--hub_token", "--logging_nan_inf_filter", "--remove_unused_columns"}
    assert len(text.splitlines()) < 135


def test_help_is_readable(capsys):
    text = help_text(capsys, "--help")
    assert "\nTrain.\n" in text
    assert "Slices such as train[:80%] work; they keep the order." in text
    assert "--dry_run [bool]" in text and "--learning_rate float" in text
    for clutter in ("--no_", "--learning-rate", "string_to_bool", "LEARNING_RATE", "(default: None)", "==SUPPRESS=="):
        assert clutter not in text, clutter
    assert max(len(line) for line in text.splitlines() if "{" not in line) <= 119


def test_help_all_shows_the_trainers_flags_too(capsys):
    short, long = options_of(help_text(capsys, "--help")), options_of(help_text(capsys, "--help_all"))
    assert short < long
    assert {"--adam_beta1", "--fsdp", "--hub_token", "--remove_unused_columns"} <= long
    assert {f"--{item.name}" for item in dataclasses.fields(TrainConfig) if item.init} <= long
    assert not [option for option in long if option.startswith("--no_")], "--flag false says the same"


def test_the_other_scripts_explain_their_target(capsys):
    with pytest.raises(SystemExit):
        parse_with_target(["--help"], EvaluateConfig, "Measure.", "Folder of a run.")
    text = capsys.readouterr().out
    assert re.search(r"target +Folder of a run. \(default: runs/llm-course-hw3-dora\)", text)
    assert "Bootstrap resamples for the 95 % intervals. (default: 10000)" in text


# The way out of a script


@pytest.fixture
def silenced(monkeypatch) -> list[str]:
    """What run_script switches off for the whole process, noted instead."""
    noted = []
    for name in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(cli.transformers_logging, name, lambda name=name: noted.append(name))
    return noted


def end_of(main, capsys) -> tuple[int | str | None, str]:
    """What run_script exits with, and what it printed."""
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        run_script(main, "train.py")
    return ended.value.code, capsys.readouterr().err


def test_a_script_ends_with_the_status_of_its_main(capsys, silenced):
    assert end_of(lambda: 0, capsys) == (0, "")
    assert end_of(lambda: 143, capsys) == (143, "")
    assert silenced == ["set_verbosity_error", "disable_progress_bar"] * 2


def test_a_script_leaves_the_other_processes_when_it_succeeded_and_only_then(capsys, silenced, tmp_path):
    """Not after an error: the others may wait in a collective, and the launcher ends them."""

    def fail() -> int:
        raise InputError("--r is 0; give 1.")

    distributed = torch.distributed
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert end_of(fail, capsys)[0] == 2 and distributed.is_initialized()
        assert end_of(lambda: 0, capsys) == (0, "") and not distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("kind", "status"),
    [(InputError, 2), (ResourceError, 3), (DivergedError, 4), (HubError, 5), (VerificationError, 6), (UserError, 1)],
)
def test_what_the_user_can_mend_is_a_message_without_a_traceback_and_a_status_by_its_kind(
    kind, status, capsys, silenced
):
    def main() -> int:
        raise kind("--r is 0; give 1.")

    assert end_of(main, capsys) == (status, "train.py: --r is 0; give 1.\n")


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], False),
        (["--traceback"], True),
        (["--traceback", "true"], True),
        (["--traceback=true"], True),
        (["--traceback", "false"], False),
        (["--traceback", "--r", "0"], True),
    ],
)
def test_the_traceback_of_a_refusal_is_shown_where_it_is_asked_for(flags, shown, capsys, silenced, monkeypatch):
    def main() -> int:
        raise InputError("--r is 0; give 1.") from ValueError("of a library")

    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    status, said = end_of(main, capsys)
    assert status == 2 and said.endswith("train.py: --r is 0; give 1.\n")
    assert ("Traceback" in said and "ValueError: of a library" in said) == shown


def test_the_flag_for_it_is_every_scripts():
    parse("--traceback", "true")
    assert parse_with_target(["runs/x", "--traceback", "true"], PushConfig, "Push.", "Folder.")[1] == "runs/x"


def test_ctrl_c_is_a_message_and_the_shells_status_for_it(capsys, silenced):
    def main() -> int:
        raise KeyboardInterrupt

    code, said = end_of(main, capsys)
    assert code == 130
    assert said == "train.py: stopped by Ctrl-C; everything finished before is kept.\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_no_more_is_a_message_that_names_the_file(code, capsys, silenced):
    def main() -> int:
        raise OSError(code, os.strerror(code), "runs/demo/run.json")

    status, said = end_of(main, capsys)
    assert (
        status == ResourceError.exit_status
        and said.startswith(f"train.py: [Errno {code}] ")
        and "'runs/demo/run.json'. F" in said
    )
    assert said.endswith(", or use another folder.\n") and ("Fix its permissions" in said) == (code in (13, 30))


def test_another_failure_of_the_system_keeps_its_traceback(silenced):
    def main() -> int:
        raise OSError(errno.EIO, "the disk is broken")

    with warnings.catch_warnings(), pytest.raises(OSError, match="broken"):
        run_script(main, "train.py")


def test_a_mistake_of_ours_keeps_its_traceback(silenced):
    def main() -> int:
        raise ValueError("ours")

    with warnings.catch_warnings(), pytest.raises(ValueError, match="ours"):
        run_script(main, "train.py")


# What a launcher asks for


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_a_launch_that_shares_a_model_out_is_refused(name, what, monkeypatch):
    """From `accelerate config` on the machine, which a user may have forgotten."""
    monkeypatch.setenv(name, "false")
    parse()
    monkeypatch.setenv(name, "true")
    with pytest.raises(
        InputError, match=f"^accelerate launch asks for {what} .{name}., .* --config_file accelerate_con"
    ):
        parse()


def several_processes(monkeypatch) -> None:
    """A launch of two, without the second."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(TrainConfig, "device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(TrainConfig, "world_size", 2)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: setattr(self, "_n_gpu", 0))


@pytest.mark.parametrize(
    "way", ["--shard_base true", "--fsdp true", "--fsdp full_shard", "launch file", "launch file --fsdp true"]
)
def test_each_way_to_ask_for_fsdp_shares_the_base_out(way, monkeypatch):
    several_processes(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true" if "launch file" in way else "false")
    monkeypatch.setenv("FSDP_VERSION", "2")
    training = parse(*way.removeprefix("launch file").split())[2]
    assert training.shard_base and training.fsdp is None, "the Trainer would wrap the model once more"
    assert os.environ["ACCELERATE_USE_FSDP"] == "false", "and so would Accelerate"
    assert not parse()[2].shard_base


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "asks for FSDP 1; expected fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "sets fsdp_offload_params, which is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "sets fsdp_activation_checkpointing, .*--activation_checkpointing"),
    ],
)
def test_what_an_fsdp_launch_would_get_otherwise_than_it_says_is_refused(name, value, message, monkeypatch):
    several_processes(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        parse()


def test_a_base_is_not_sharded_over_one_process_nor_in_fp16(monkeypatch):
    with pytest.raises(InputError, match="--shard_base true needs several processes, and this launch has one"):
        parse("--shard_base", "true")
    for flags in (["--fsdp", "full_shard offload"], ["--shard_base", "true", "--fsdp_config", '{"version": 1}']):
        with pytest.raises(InputError, match="expected --fsdp true alone"):
            parse(*flags)
    several_processes(monkeypatch)
    monkeypatch.setattr(train_config, "decide_precision", lambda **arguments: ("fp16", "asked for"))
    with pytest.raises(InputError, match="--shard_base true is not tested with fp16"):
        parse("--shard_base", "true")


# Where a flag is added


def test_what_changes_the_result_is_recorded_and_what_may_differ_is_named():
    """The three kinds by hand: a flag that is moved from one to another is seen here."""
    rounding = {"world_size", "gradient_accumulation_steps", "batching", "shard_base"}
    assert set(train_config.ROUNDING_ARGUMENTS) == rounding
    assert set(train_config.RESULT_ARGUMENTS) - set(train_config.RECIPE_ARGUMENTS) - rounding == {
        *("precision", "tf32", "full_determinism"),
    }
    assert {"learning_rate", "seed", "optim", "max_steps", "global_batch_size"} < set(train_config.RECIPE_ARGUMENTS)
    assert not set(train_config.RECIPE_ARGUMENTS) & {"output_dir", "logging_steps", "max_eval_samples", "report_to"}


def test_an_inherited_flag_keeps_the_trainers_default_and_help():
    fields = {item.name: item for item in dataclasses.fields(TrainConfig)}
    for item in dataclasses.fields(TrainingArguments):
        of_ours = ("learning_rate", "num_train_epochs", "max_steps")
        if item.name in train_config.RECIPE_ARGUMENTS and item.name not in of_ours:
            assert (fields[item.name].default, fields[item.name].metadata) == (item.default, item.metadata), item.name


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf")])
def test_a_range_holds_no_nan_nothing_below_and_nothing_endless(value):
    assert value not in config.AT_LEAST_0 and value not in config.ABOVE_0
    assert 0 in config.AT_LEAST_0 and 0 not in config.ABOVE_0 and 0.5 in config.ABOVE_0


def test_settings_are_not_changed_after_they_are_made():
    for made in (TaskConfig(), ModelConfig(), EvaluateConfig(), PushConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, dataclasses.fields(made)[0].name, "other")


def test_a_launch_that_asks_for_torch_compile_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # what accelerate launch sets where nobody asks
    parse()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    message = "^accelerate launch asks for torch.compile .ACCELERATE_DYNAMO_BACKEND=INDUCTOR., .*`accelerate config`"
    with pytest.raises(InputError, match=message):
        parse()
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    with pytest.raises(InputError, match="^--torch_compile is True, which is not supported: every batch has another"):
        parse("--torch_compile", "true")


def test_what_the_machines_own_launch_config_asks_for_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(InputError, match="fp16 needs a GPU. Use --precision bf16 or fp32. Or launch with --mixed"):
        parse()


# The prompt and the words


def test_the_prompt_is_made_from_the_label_words():
    assert TaskConfig().system_prompt == SYSTEM_PROMPT
    assert TaskConfig(label_words=["spam", "ham"]).system_prompt == (
        'Classify the text. Answer with exactly one of these words: "spam" or "ham". Write nothing else.'
    )
    assert TaskConfig(label_words=["a", "b", "c"], system_prompt=" ").system_prompt.endswith(
        'these words: "a", "b" or "c". Write nothing else.'
    )
    assert TaskConfig(label_words=["spam", "ham"], system_prompt="Spam?").system_prompt == "Spam?"


def test_variables_of_the_template_stand_in_a_recipe_as_they_are(tmp_path):
    (tmp_path / "recipe.yaml").write_text("chat_template_kwargs:\n  effort: low\n  tries: [1, 2]\n")
    task, *_ = parse_train(["--config", str(tmp_path / "recipe.yaml"), "--report_to", "none"], "")
    assert task.chat_template_kwargs == {"effort": "low", "tries": [1, 2]}


def test_a_mapping_is_refused_where_none_is_meant(tmp_path):
    (tmp_path / "recipe.yaml").write_text("text_column:\n  a: b\n")
    with pytest.raises(InputError, match="text_column is .*; expected a plain value or a list of plain values"):
        parse_train(["--config", str(tmp_path / "recipe.yaml")], "")


def test_what_is_given_to_correct_a_task_is_told_from_what_is_not():
    assert EvaluateConfig().corrections == {}
    given = {"test_split": "holdout", "skip_bad_rows": False}
    assert EvaluateConfig(**given).corrections == given
    task_fields = {item.name for item in dataclasses.fields(TaskConfig)}
    assert set(CORRECTIONS) <= task_fields
    fixed_by_the_run = {"label_words", "system_prompt", "chat_template", "chat_template_kwargs", "max_length"}
    other = {"max_train_samples", "balance_labels", "validation_share", "test_share", "split_seed"}
    assert task_fields == {*CORRECTIONS, *fixed_by_the_run, *other}
