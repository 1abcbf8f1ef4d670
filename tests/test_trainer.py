"""Training on the tiny model: what moves, which loss, the same run however a batch is split, and no lost steps.

Losses come by hand from transformers' own model, row by row; whole runs are compared with other ways of splitting the
same batches. Three label words, of which "neutral" is two tokens, make the batches' supervised tokens uneven.
"""

import contextlib
import itertools
import json
import os
import re
import runpy
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launchers
import pytest
import torch
from forked import finish, launch, start
from launchers import TORCHRUN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from tweetdora import device
from tweetdora import trainer as trainer_module
from tweetdora.callbacks import EvaluationStopped, StopOnNonFiniteGradient, StopOnSignal, after_divergence
from tweetdora.checkpoints import SAVING_DIR, find_damage, publish_checkpoint
from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.data import Examples, load_examples
from tweetdora.errors import DivergedError, InputError
from tweetdora.generation import LabelParser
from tweetdora.modeling import DTYPES, attach_adapter, load_base
from tweetdora.packing import FILLER_ID, PackedCollator, PaddedCollator
from tweetdora.prompts import PromptTokenizer
from tweetdora.tokenized import tokenize_examples
from tweetdora.train_config import TrainConfig
from tweetdora.trainer import (
    ClassificationTrainer,
    mean_loss,
    supervised_loss_sum,
    training_seconds,
)

REPO_DIR = Path(__file__).resolve().parents[1]
TRAIN = REPO_DIR / "train.py"


@pytest.fixture(scope="module")
def train_examples(task) -> Examples:
    return load_examples(task, "train", None)


@pytest.fixture(scope="module")
def validation_examples(task) -> Examples:
    return load_examples(task, "validation", None)


@pytest.fixture(scope="module")
def sharp_dir(make_model, tokenizer, tmp_path_factory) -> str:
    """A tiny model with weights ten times the usual: its gradients are no rounding noise."""
    folder = str(tmp_path_factory.mktemp("sharp") / "tiny-sharp")
    make_model(initializer_range=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Laboratory:
    """What a trainer is made of; `train` makes one and runs it."""

    model_dir: str
    task: TaskConfig
    prompt_tokenizer: PromptTokenizer
    tokenizer: Any
    rows: Examples
    folder: Path
    count: int = 0

    def trainer(
        self,
        rows: Examples | None = None,
        validation: Examples | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        adapter: dict[str, Any] | None = None,
        **settings: Any,
    ) -> ClassificationTrainer:
        self.count += 1
        defaults = {
            "output_dir": str(self.folder / f"run{self.count}"),
            "precision": "fp32",
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 3,
            "logging_steps": 1,
            "save_strategy": "no",
            "max_eval_samples": 12 if validation else 0,
            "report_to": [],
            "disable_tqdm": True,
        }
        training = TrainConfig(**{**defaults, **settings})
        base = load_base(self.model_dir, None, DTYPES[training.precision], torch.device("cpu"))
        torch.manual_seed(1)
        model = attach_adapter(base, ModelConfig(**{"model_name_or_path": self.model_dir, **(adapter or {})}))
        return ClassificationTrainer(
            task=self.task,
            prompt_tokenizer=self.prompt_tokenizer,
            validation_examples=validation,
            model=model,
            args=training,
            train_dataset=tokenize_examples(rows or self.rows, self.prompt_tokenizer).features,
            processing_class=self.tokenizer,
            callbacks=list(callbacks),
        )

    def train(self, **settings: Any) -> ClassificationTrainer:
        trainer = self.trainer(**settings)
        trainer.train()
        return trainer

    def hand_loss(self, rows: Examples) -> float:
        """Mean over the supervised tokens of `rows`, each row alone in transformers' own model."""
        model = AutoModelForCausalLM.from_pretrained(self.model_dir).eval()
        losses = []
        with torch.no_grad():
            for example in tokenize_examples(rows, self.prompt_tokenizer).features:
                scores = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double().log_softmax(-1)
                for place, label in enumerate(example["labels"]):
                    if label != -100:
                        losses.append(-scores[place - 1, label].item())
        return sum(losses) / len(losses)


@pytest.fixture
def laboratory(sharp_dir, task, prompt_tokenizer, tokenizer, train_examples, tmp_path, capfd) -> Laboratory:
    """Its prints (Trainer's log lines) are swallowed."""
    return Laboratory(sharp_dir, task, prompt_tokenizer, tokenizer, train_examples, tmp_path)


def losses(trainer: ClassificationTrainer) -> list[float]:
    """The logged training losses."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: ClassificationTrainer) -> dict[str, torch.Tensor]:
    """All weights by name, as they are now."""
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def adapter(trainer: ClassificationTrainer) -> dict[str, torch.Tensor]:
    """The adapter's weights by name."""
    return {name: weight for name, weight in weights(trainer).items() if "lora_" in name}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=0, atol=tolerance)


# What moves


@pytest.mark.parametrize("target_modules", [["k_proj", "v_proj"], ["all-linear"]])
def test_every_adapter_tensor_moves(target_modules, laboratory):
    trainer = laboratory.trainer(adapter={"target_modules": target_modules})
    before = adapter(trainer)
    trainer.train()
    assert len(before) == 3 * 2 * (2 if target_modules == ["k_proj", "v_proj"] else 7)
    assert [name for name, weight in adapter(trainer).items() if torch.equal(weight, before[name])] == []


def test_no_base_tensor_moves(laboratory):
    trainer = laboratory.trainer()
    before = weights(trainer)
    trainer.train()
    moved = {name for name, weight in weights(trainer).items() if not torch.equal(weight, before[name])}
    assert moved == set(adapter(trainer))


def test_training_lowers_the_loss(laboratory):
    first, *_, last = losses(laboratory.train(max_steps=20, learning_rate=1e-2))
    assert last < first / 2


# The loss


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_first_loss_is_the_mean_over_supervised_tokens(batching, laboratory):
    """A fresh adapter changes nothing, and one step takes all rows, so their order does not matter."""
    trainer = laboratory.train(max_steps=1, global_batch_size=48, batching=batching)
    assert losses(trainer) == pytest.approx([laboratory.hand_loss(laboratory.rows)], rel=1e-6)


def test_first_loss_of_accumulated_batches_is_the_mean_over_all_their_tokens(laboratory):
    """16 rows of "neutral" have three supervised tokens each, the others two: no mean of means."""
    trainer = laboratory.train(max_steps=1, global_batch_size=48, gradient_accumulation_steps=16)
    assert losses(trainer) == pytest.approx([laboratory.hand_loss(laboratory.rows)], rel=1e-6)


def test_an_uneven_last_batch_is_a_mean_over_its_own_rows(laboratory):
    """19 rows in steps of 16: three are left over. They are those that the first step did not take."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(list(batches))
            batches.clear()

    batches: list[int] = []
    rows = laboratory.rows.head(19)
    # No learning, so that the second step's loss is still the base's.
    trainer = laboratory.trainer(rows=rows, learning_rate=0.0, max_steps=2, callbacks=[Watch()])
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: (
        batches.extend(inputs["example_ids"].tolist()),
        step(model, inputs, *rest),
    )[1]
    trainer.train()
    assert [len(batch) for batch in seen] == [16, 3]
    last = Examples([rows.texts[row] for row in seen[1]], [rows.labels[row] for row in seen[1]], seen[1], {})
    assert losses(trainer)[1] == pytest.approx(laboratory.hand_loss(last), rel=1e-6)
    assert sorted(seen[0] + seen[1]) == list(range(19))


def test_an_epoch_ends_with_its_uneven_batch(laboratory):
    trainer = laboratory.train(rows=laboratory.rows.head(19), max_steps=-1, num_train_epochs=2)
    assert (trainer.state.global_step, trainer.state.epoch) == (4, 2)


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_loss_sum_of_either_form_is_that_of_separate_rows(batching, laboratory):
    rows = laboratory.rows.head(7)
    examples = tokenize_examples(rows, laboratory.prompt_tokenizer).features
    collate = PackedCollator() if batching == "shared_prefix" else PaddedCollator(pad_token_id=4)
    model = load_base(laboratory.model_dir, None, torch.float32, torch.device("cpu"))
    supervised = sum(label != -100 for example in examples for label in example["labels"])
    expected = laboratory.hand_loss(rows) * supervised
    assert supervised_loss_sum(model, collate(examples)).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_float32_on_a_bf16_base(laboratory):
    model = load_base(laboratory.model_dir, None, torch.bfloat16, torch.device("cpu"))
    batch = PackedCollator()(tokenize_examples(laboratory.rows.head(4), laboratory.prompt_tokenizer).features)
    assert supervised_loss_sum(model, batch).dtype == torch.float32


def test_bf16_training_has_nearly_the_loss_of_float32(laboratory, monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    half, full = (losses(laboratory.train(precision=name)) for name in ("bf16", "fp32"))
    assert half == pytest.approx(full, rel=0.02)
    assert half != full


def test_a_setting_that_the_loss_leaves_out_is_refused(tmp_path):
    """The Trainer's own loss has label smoothing; in this one it would stand in the record and do nothing."""
    with pytest.raises(InputError, match="--label_smoothing_factor"):
        TrainConfig(output_dir=str(tmp_path), label_smoothing_factor=0.1)


# The same run, however the batch is split


def test_packed_training_is_padded_training(laboratory):
    packed, padded = (laboratory.train(batching=name, max_steps=6) for name in ("shared_prefix", "padded"))
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-5)
    assert_close(adapter(packed), adapter(padded), 1e-5)


@pytest.mark.parametrize("accumulation", [2, 4, 16])
@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_accumulated_training_is_training_on_whole_batches(accumulation, batching, laboratory):
    """41 rows: the third step of 16 has only nine, in one to nine parts."""
    whole, parts = (
        laboratory.train(rows=laboratory.rows.head(41), batching=batching, gradient_accumulation_steps=steps)
        for steps in (1, accumulation)
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)
    assert_close(adapter(parts), adapter(whole), 1e-6)


def test_a_model_that_cannot_be_packed_is_refused_before_it_trains(laboratory, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM._supports_sdpa", False)
    with pytest.raises(InputError, match="^--batching shared_prefix does not support llama: .*Use --batching padded"):
        laboratory.trainer()


def test_a_model_that_cannot_be_packed_trains_and_validates_on_padded_batches(
    laboratory, validation_examples, monkeypatch
):
    """With transformers' own attention, so nearly the same losses."""
    settings = {"batching": "padded", "validation": validation_examples, "eval_steps": 3, "max_new_tokens": 1}
    usual = laboratory.train(**settings).state.log_history
    monkeypatch.setattr("transformers.LlamaForCausalLM._supports_sdpa", False)
    own = laboratory.train(**settings).state.log_history
    for name in ("loss", "eval_loss"):
        assert [line[name] for line in own if name in line] == pytest.approx(
            [line[name] for line in usual if name in line], rel=1e-5
        )


# Divergence


def test_a_loss_that_is_nan_stops_the_training_and_names_step_and_rows(laboratory):
    trainer = laboratory.trainer(rows=laboratory.rows.head(5))
    with torch.no_grad():
        next(weight for name, weight in trainer.model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(
        DivergedError,
        match=r"^the loss is nan in step 1, training examples \[(\d, ){4}\d\]. "
        r"Start again in another --output_dir with a lower --learning_rate.$",
    ):
        trainer.train()


@pytest.mark.parametrize(("precision_name", "also"), [("fp32", ""), ("bf16", " or with --precision fp32")])
def test_advice_after_a_divergence_is_what_can_be_done(precision_name, also, tmp_path, monkeypatch):
    """A resumed run must have the same settings; a checkpoint is spoken of only if there is one."""
    monkeypatch.setattr(device, "has_bf16", lambda device_type: True)
    training = TrainConfig(output_dir=str(tmp_path), precision=precision_name, report_to=[])
    start = f"Start again in another --output_dir with a lower --learning_rate{also}"
    assert after_divergence(training) == f"{start}."
    beside = tmp_path / SAVING_DIR / "checkpoint-20"
    beside.mkdir(parents=True)
    (beside / "trainer_state.json").write_text("{}")
    publish_checkpoint(str(tmp_path), 20, keep=None)
    assert (
        after_divergence(training)
        == f"{start}; the adapter in {tmp_path}/checkpoint-20 is from before that step, and intact."
    )


def test_a_learning_rate_that_blows_up_is_noticed(laboratory):
    with pytest.raises(DivergedError, match="in step [23]"):
        laboratory.train(learning_rate=1e38, adapter={"method": "lora"}, max_steps=4)


def test_a_gradient_that_is_nan_stops_the_training_before_it_reaches_the_weights(laboratory):
    """The loss of a step can be finite and its gradient not: no later loss tells, if that step is the last."""
    trainer = laboratory.trainer()
    weight = next(weight for name, weight in trainer.model.named_parameters() if "lora_B" in name)
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DivergedError, match=r"in step 1, training examples \[[0-9, ]+\]\. Start again") as stopped:
        trainer.train()
    rows = json.loads(re.search(r"training examples (\[.*?\])", str(stopped.value))[1])
    assert len(set(rows)) == 16 and set(rows) <= set(range(48))
    assert all(torch.isfinite(weight).all() for weight in adapter(trainer).values())


# Validation


def test_validation_scores_are_those_of_rows_answered_one_by_one(laboratory, validation_examples):
    """Second way: merged model, one prompt at a time, transformers' generate(); scores counted here."""
    rows = validation_examples.head(10)
    trainer = laboratory.train(
        validation=rows,
        max_steps=20,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=20,
        max_new_tokens=4,
        per_device_eval_batch_size=4,
        adapter={"target_modules": ["all-linear"]},
    )
    logged = trainer.state.log_history[-2]
    model = trainer.model.merge_and_unload()
    words, stop = laboratory.task.label_words, {2, 4}
    prompts, _ = laboratory.prompt_tokenizer.prompt_ids(rows.texts)
    answers = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=[2, 4], pad_token_id=4
        )
        new = ids[0, len(prompt) :].tolist()
        stopped = bool(stop & set(new))
        answers.append((laboratory.tokenizer.decode(new[:-1] if stopped else new), stopped))
    predicted = [LabelParser(words)(text) for text, _ in answers]
    hits = [sum(p == c == number for p, c in zip(predicted, rows.labels, strict=True)) for number in range(3)]
    recall = [hits[number] / rows.labels.count(number) for number in range(3)]
    f1 = [2 * hits[number] / (rows.labels.count(number) + predicted.count(number)) for number in range(3)]
    assert {name: value for name, value in logged.items() if name.startswith("eval_")} == {
        "eval_loss": pytest.approx(logged["eval_loss"]),
        "eval_macro_f1": pytest.approx(sum(f1) / 3),
        "eval_macro_recall": pytest.approx(sum(recall) / 3),
        "eval_accuracy": pytest.approx(sum(hits) / 10),
        "eval_parse_rate": pytest.approx(sum(number != -1 for number in predicted) / 10),
        "eval_exact_match": pytest.approx(sum(text in words for text, _ in answers) / 10),
        "eval_eos_rate": pytest.approx(sum(stopped for _, stopped in answers) / 10),
        "eval_runtime": pytest.approx(logged["eval_runtime"]),
        "eval_samples_per_second": pytest.approx(logged["eval_samples_per_second"]),
        "eval_steps_per_second": pytest.approx(logged["eval_steps_per_second"]),
    }
    assert 0 < logged["eval_accuracy"] < 1, "scores that could not be told from a constant prove nothing"
    assert [answer.text for answer in trainer.last_generations] == [text for text, _ in answers]


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
@pytest.mark.parametrize("batch_size", [5, 32])
def test_validation_loss_is_the_mean_over_all_supervised_tokens(batching, batch_size, laboratory, validation_examples):
    """Twelve rows in batches of 5, 5 and 2: no mean of means."""
    trainer = laboratory.trainer(
        validation=validation_examples, batching=batching, per_device_eval_batch_size=batch_size, max_new_tokens=1
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(laboratory.hand_loss(validation_examples), rel=1e-6)


def test_validation_leaves_the_training_as_it_was(laboratory, validation_examples):
    """With dropout, whose random numbers a validation must not take."""
    settings = {"adapter": {"lora_dropout": 0.3}, "max_steps": 6, "max_new_tokens": 2}
    without = laboratory.train(**settings)
    with_validation = laboratory.train(validation=validation_examples, eval_steps=2, **settings)
    assert losses(with_validation) == losses(without)


# The log


def test_speed_is_counted_over_the_steps_since_the_last_line(laboratory, monkeypatch):
    """A clock that ticks once each time it is read: one second for every window of two steps of 16 rows."""
    clock = itertools.count()
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = laboratory.trainer(max_steps=3, logging_steps=1, batching="padded")
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["samples_per_second"] for entry in history] == [16, 16, 16]
    # The three steps are one epoch: together all the tokens there are.
    tokens = sum(
        len(example["input_ids"])
        for example in tokenize_examples(laboratory.rows, laboratory.prompt_tokenizer).features
    )
    assert sum(entry["tokens_per_second"] for entry in history) == tokens


def test_speed_leaves_out_what_came_before_the_first_step(laboratory, monkeypatch):
    """W&B starts, and a checkpoint may be read, between making a trainer and its first step."""
    clock = itertools.count()
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    trainer = laboratory.trainer(max_steps=1)
    for _ in range(100):
        next(clock)
    trainer.train()
    assert [entry["samples_per_second"] for entry in trainer.state.log_history if "loss" in entry] == [16]


def test_log_lines_hold_loss_speed_and_learning_rate(laboratory):
    trainer = laboratory.train(max_steps=4, logging_steps=2)
    lines = [entry for entry in trainer.state.log_history if "loss" in entry]
    expected = {"loss", "grad_norm", "learning_rate", "seconds", "samples_per_second", "tokens_per_second"}
    expected |= {"epoch", "step"}
    assert [(set(line), line["step"]) for line in lines] == [(expected, 2), (expected, 4)]


@pytest.mark.parametrize("bar", [True, False])
def test_the_log_is_printed_as_lines_with_a_progress_bar_or_without(laboratory, capfd, bar):
    laboratory.train(max_steps=4, logging_steps=2, disable_tqdm=not bar)
    said = capfd.readouterr()
    lines = [line for line in said.out.splitlines() if line]
    assert [line.split("  ")[0] for line in lines] == ["step 2/4", "step 4/4"], lines
    assert ("4/4" in said.err) == bar


def test_each_checkpoint_and_the_end_have_a_training_line(laboratory):
    """A run that is resumed from a checkpoint knows of the steps before it what the lines say."""
    trainer = laboratory.train(max_steps=5, logging_steps=100, save_strategy="steps", save_steps=2)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [2, 4, 5]


def test_the_last_line_has_the_mean_loss_of_all_steps(laboratory):
    every = losses(laboratory.train(max_steps=5, logging_steps=1))
    trainer = laboratory.train(max_steps=5, logging_steps=3)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(every) / 5, rel=1e-6)


def test_mean_loss_weighs_a_line_by_its_steps():
    """By hand: (2 * 4 + 1 * 1) / 3."""
    assert mean_loss([{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 1.0}]) == 3


def test_seconds_of_a_resumed_run_go_on_from_its_checkpoint(laboratory, monkeypatch):
    """A clock that stands still but for ten seconds in each step."""
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.now += 10

    first = laboratory.train(save_strategy="steps", save_steps=2, callbacks=[Tick()])
    assert training_seconds(first.state.log_history) == 30
    clock.now = 1000
    resumed = laboratory.trainer(max_steps=4, callbacks=[Tick()])
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-2"))
    assert [line["seconds"] for line in resumed.state.log_history] == [10, 20, 30, 40, 40]


# Determinism


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(laboratory):
    """Order of the rows and dropout follow from it."""
    settings = {"adapter": {"lora_dropout": 0.3}, "max_steps": 4}
    first, same, other = (laboratory.train(seed=seed, **settings) for seed in (1, 1, 2))
    assert losses(first) == losses(same) != losses(other)
    assert_close(adapter(first), adapter(same), 0)
    assert other.state.log_history[0]["loss"] != first.state.log_history[0]["loss"]


def test_full_determinism_computes_the_same_run(laboratory, monkeypatch):
    """No operation of a packed step is without a deterministic form."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    plain = laboratory.train()
    try:
        full = laboratory.train(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert losses(full) == losses(plain)


# Checkpoints


def test_a_checkpoint_holds_the_adapter_and_no_base(laboratory):
    trainer = laboratory.train(save_strategy="steps", save_steps=3)
    assert sorted(os.listdir(Path(trainer.args.output_dir) / "checkpoint-3")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checksums.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    ]


def test_a_checkpoint_is_the_adapter_of_its_step(laboratory):
    trainer = laboratory.train(save_strategy="steps", save_steps=3)
    saved = load_file(Path(trainer.args.output_dir) / "checkpoint-3" / "adapter_model.safetensors")
    assert {tuple(weight.shape) for weight in saved.values()} == {
        tuple(weight.shape) for weight in adapter(trainer).values()
    }
    now = {name.replace(".default", "").replace("vector.weight", "vector"): w for name, w in adapter(trainer).items()}
    assert_close(saved, now, 0)


@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_a_resumed_run_is_the_run_that_was_never_stopped(stop_at, laboratory):
    """Three steps are an epoch: one stop is at its end, two are within one. Dropout asks for the random state."""
    settings = {"adapter": {"lora_dropout": 0.3}, "lr_scheduler_type": "linear", "max_steps": 6}
    straight = laboratory.train(save_strategy="steps", save_steps=stop_at, save_total_limit=None, **settings)
    resumed = laboratory.trainer(**settings)
    resumed.train(resume_from_checkpoint=str(Path(straight.args.output_dir) / f"checkpoint-{stop_at}"))
    assert losses(resumed) == losses(straight)
    assert_close(adapter(resumed), adapter(straight), 0)


def test_a_run_that_starts_anew_from_a_checkpoints_adapter_is_another_run(laboratory):
    """The companion: optimizer and random state matter for the comparison above."""
    settings = {"adapter": {"lora_dropout": 0.3}, "lr_scheduler_type": "linear", "max_steps": 6}
    straight = laboratory.train(save_strategy="steps", save_steps=3, **settings)
    checkpoint = Path(straight.args.output_dir) / "checkpoint-3"
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "scheduler.pt").unlink()
    resumed = laboratory.trainer(**settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) != losses(straight)


# Stopping


class Raise(TrainerCallback):
    """Sends this process a signal at the beginning of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_training_after_the_step_with_a_checkpoint(number, laboratory):
    stop = StopOnSignal()
    trainer = laboratory.train(max_steps=5, save_strategy="steps", save_steps=100, callbacks=[stop, Raise(2, number)])
    assert (trainer.state.global_step, stop.signal_number) == (2, number)
    assert (Path(trainer.args.output_dir) / "checkpoint-2" / "trainer_state.json").is_file()


class RaiseInEvaluation:
    """Sends this process a signal while it answers validation rows, the n-th time that it is about to."""

    def __init__(self, monkeypatch, time: int) -> None:
        self.time, self.original = time, trainer_module.generate_all
        monkeypatch.setattr(trainer_module, "generate_all", self)

    def __call__(self, *arguments, **more):
        self.time -= 1
        if self.time == 0:
            signal.raise_signal(signal.SIGTERM)
        return self.original(*arguments, **more)


VALIDATED = {"eval_steps": 2, "max_new_tokens": 2, "max_steps": 4, "adapter": {"lora_dropout": 0.3}}


def validations(trainer) -> list[dict]:
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    return [{name: line[name] for name in line if not re.search("second|runtime", name)} for line in lines]


def goes_on_to_the_same_end(stopped, laboratory, validation_examples) -> None:
    """The run that a signal cut off ends, when it goes on, as the run that nobody stopped."""
    straight = laboratory.train(validation=validation_examples, **VALIDATED)
    resumed = laboratory.trainer(validation=validation_examples, **VALIDATED)
    checkpoint = str(Path(stopped.args.output_dir) / f"checkpoint-{stopped.state.global_step}")
    if stopped.state.global_step == VALIDATED["max_steps"]:
        resumed.restore_finished(checkpoint)
    else:
        resumed.train(resume_from_checkpoint=checkpoint)
    assert validations(resumed) == validations(straight) and len(validations(straight)) == 2
    assert losses(resumed) == losses(straight)
    assert_close(adapter(resumed), adapter(straight), 0)


def test_a_checkpoint_of_before_the_peak_memory_was_kept_is_gone_on_with(laboratory):
    first = laboratory.train(save_strategy="steps", save_steps=2, **VALIDATED)
    checkpoint = Path(first.args.output_dir) / "checkpoint-2"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"]["KeepPeakMemory"]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    resumed = laboratory.trainer(save_strategy="steps", save_steps=4, **VALIDATED)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert (Path(resumed.args.output_dir) / "checkpoint-4").is_dir()


@pytest.mark.parametrize("steps_left", [True, False])
def test_the_peak_memory_of_earlier_sessions_counts_for_a_resumed_run(steps_left, laboratory, monkeypatch):
    monkeypatch.setattr("tweetdora.callbacks.own_peak_memory_bytes", lambda: {"process": 5_000_000_000_000})
    step = 2 if steps_left else 4
    first = laboratory.train(save_strategy="steps", save_steps=step, **VALIDATED)
    monkeypatch.setattr("tweetdora.callbacks.own_peak_memory_bytes", lambda: {"process": 7})
    resumed = laboratory.trainer(save_strategy="steps", save_steps=4, **VALIDATED)
    checkpoint = str(Path(first.args.output_dir) / f"checkpoint-{step}")
    if steps_left:
        resumed.train(resume_from_checkpoint=checkpoint)
    else:
        resumed.restore_finished(checkpoint)
    assert resumed.kept_memory.earlier_peak_memory == {"process": 5_000_000_000_000}
    assert resumed.kept_memory.state()["attributes"] == {"earlier_peak_memory": {"process": 5_000_000_000_000}}


def test_of_several_processes_only_the_first_is_the_first_after_a_finished_run_is_restored(laboratory, monkeypatch):
    """A checkpoint says that it was written by the first; each process would open a W&B run of its own."""
    done = laboratory.train(save_strategy="steps", save_steps=4, **VALIDATED)
    restored = laboratory.trainer(**VALIDATED)
    monkeypatch.setattr(restored, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(restored, "is_local_process_zero", lambda: False)
    restored.restore_finished(str(Path(done.args.output_dir) / f"checkpoint-{done.state.global_step}"))
    assert (restored.state.is_world_process_zero, restored.state.is_local_process_zero) == (False, False)


@pytest.mark.parametrize("time", [1, 2], ids=["in the middle", "at the end"])
def test_a_signal_during_a_validation_ends_it_with_a_checkpoint_and_it_is_made_up_for(
    time, laboratory, validation_examples, monkeypatch
):
    with monkeypatch.context() as patch:
        counted = RaiseInEvaluation(patch, time)
        stop = StopOnSignal()
        stopped = laboratory.train(validation=validation_examples, callbacks=[stop], **VALIDATED)
    assert counted.time == 0, "no row is answered after the signal"
    assert (stopped.state.global_step, len(validations(stopped))) == (2 * time, time - 1)
    assert None in stopped.last_generations or not stopped.last_generations or time == 2, "no row is answered any more"
    assert stop.signal_number == signal.SIGTERM and stopped.evaluation_is_due()
    assert find_damage(str(Path(stopped.args.output_dir) / f"checkpoint-{2 * time}")) is None
    goes_on_to_the_same_end(stopped, laboratory, validation_examples)


def test_a_validation_that_is_cut_off_while_it_is_made_up_for_stays_due(laboratory, validation_examples, monkeypatch):
    with monkeypatch.context() as patch:
        RaiseInEvaluation(patch, 1)
        stopped = laboratory.train(validation=validation_examples, callbacks=[StopOnSignal()], **VALIDATED)
    with monkeypatch.context() as patch:
        RaiseInEvaluation(patch, 1)
        stop = StopOnSignal()
        again = laboratory.trainer(validation=validation_examples, callbacks=[stop], **VALIDATED)
        with pytest.raises(EvaluationStopped):
            again.train(resume_from_checkpoint=str(Path(stopped.args.output_dir) / "checkpoint-2"))
        stop.on_train_end(None, None, None)  # gives the signals back
    assert again.state.global_step == 2 and again.evaluation_is_due(), "no step was made"
    goes_on_to_the_same_end(stopped, laboratory, validation_examples)


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_a_step_that_ends_in_a_validation_skips_it_and_it_is_made_up_for(
    step, laboratory, validation_examples
):
    stopped = laboratory.train(
        validation=validation_examples, callbacks=[StopOnSignal(), Raise(step, signal.SIGINT)], **VALIDATED
    )
    assert (stopped.state.global_step, len(validations(stopped))) == (step, step // 2 - 1)
    goes_on_to_the_same_end(stopped, laboratory, validation_examples)


def test_a_signal_in_the_last_step_changes_nothing_where_nothing_is_left_to_do(laboratory):
    trainer = laboratory.train(callbacks=[StopOnSignal(), Raise(2, signal.SIGINT)], max_steps=2)
    assert trainer.state.global_step == 2 and not trainer.evaluation_is_due()


def test_no_validation_is_due_before_its_time_or_where_none_was_asked_for(laboratory, validation_examples):
    trainer = laboratory.train(validation=validation_examples, eval_steps=2, max_new_tokens=1, max_steps=3)
    due = []
    trainer.state.log_history = [line for line in trainer.state.log_history if "eval_loss" not in line]
    for step in (0, 1, 2, 3):
        trainer.state.global_step = step
        due.append(trainer.evaluation_is_due())
    assert due == [False, False, True, True]
    trainer.args.eval_strategy = IntervalStrategy.NO
    assert not trainer.evaluation_is_due()


def test_a_stopped_training_skips_the_validation(laboratory, validation_examples):
    settings = {"validation": validation_examples, "eval_steps": 1, "max_new_tokens": 1}
    trainer = laboratory.train(callbacks=[StopOnSignal(), Raise(1, signal.SIGINT)], **settings)
    assert [entry for entry in trainer.state.log_history if "eval_loss" in entry] == []


def test_signals_are_given_back_after_the_training(laboratory):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    laboratory.train(callbacks=[StopOnSignal(), Raise(1, signal.SIGTERM)])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("seconds", "stopped"), [(0.9, False), (1.1, True)])
def test_a_second_signal_stops_at_once_but_not_one_of_the_same_stop(seconds, stopped, monkeypatch):
    """Linux sends a parent-death signal once for each thread of the parent."""
    child = os.fork()
    if child == 0:
        try:
            stop, now = StopOnSignal(), time.monotonic()
            stop.on_train_begin(None, None, None)
            monkeypatch.setattr(time, "monotonic", lambda: now)
            signal.raise_signal(signal.SIGTERM)
            monkeypatch.setattr(time, "monotonic", lambda: now + seconds)
            signal.raise_signal(signal.SIGTERM)
        finally:
            os._exit(77)  # still alive
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == stopped
    assert (os.WTERMSIG(status) == signal.SIGTERM) if stopped else (os.WEXITSTATUS(status) == 77)


def test_fillers_are_not_named_among_the_examples_of_a_step_that_diverged(laboratory):
    """A last step of several processes has some; both the loss and the gradient name its examples."""
    trainer = laboratory.trainer()
    trainer.step_example_ids = [torch.tensor([3, FILLER_ID])]
    with pytest.raises(DivergedError, match=re.escape("training examples [3]. ")):
        trainer._check_finite(torch.tensor(float("nan")), torch.tensor([3, FILLER_ID]))
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            weight.grad = torch.full_like(weight, float("inf"))
    with pytest.raises(DivergedError, match=re.escape("training examples [3]. ")):
        StopOnNonFiniteGradient(trainer).on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


def test_a_signal_during_the_gathering_is_agreed_on_at_the_next(monkeypatch):
    """If it counted at once, this process would save while the others do the next step, and all would hang."""
    stop, numbers = StopOnSignal(), []

    def gather(number: torch.Tensor) -> torch.Tensor:
        numbers.append(int(number))
        if len(numbers) == 1:
            stop._note(signal.SIGTERM, None)
        return number

    monkeypatch.setattr("tweetdora.callbacks.gather", gather)
    launch = SimpleNamespace(world_size=2, device="cpu")
    assert [stop.agree(launch), stop.agree(launch)] == [False, True] and numbers == [0, signal.SIGTERM]


def test_a_signal_that_follows_the_agreed_stop_is_the_same_stop(monkeypatch):
    """Another process had it first, and this one gets its own after the gathering: its checkpoint is still written."""
    monkeypatch.setattr("tweetdora.callbacks.gather", lambda number: torch.tensor([0, signal.SIGINT]))
    stop = StopOnSignal()
    assert stop.agree(SimpleNamespace(world_size=2, device="cpu")) and stop.signal_number == signal.SIGINT
    monkeypatch.setattr(signal, "raise_signal", lambda number: pytest.fail("stopped at once"))
    stop._note(signal.SIGTERM, None)
    assert stop.signal_number == signal.SIGINT


# The script as a process


STEPS = 60


def command(model_dir: str, data_dir: str, run_dir: Path, *more: str) -> list[str]:
    """train.py's flags for a run of STEPS steps with dropout and validation."""
    return [
        *("--model_name_or_path", model_dir, "--dataset_name", data_dir, "--output_dir", str(run_dir)),
        *("--system_prompt", "Say how the day is: negative, neutral or positive.", "--max_train_samples", "0"),
        *("--precision", "fp32", "--learning_rate", "1e-3", "--max_steps", str(STEPS), "--logging_steps", "1"),
        *(
            "--max_eval_samples",
            "12",
            "--eval_steps",
            "30",
            "--max_new_tokens",
            "3",
            "--per_device_eval_batch_size",
            "4",
        ),
        *("--report_to", "none", "--disable_tqdm", "true", "--cpu_threads", "1", *more),
    ]


def run_here(arguments: list[str]) -> int:
    """train.py in this process."""
    return runpy.run_path(str(TRAIN))["main"](arguments)


def read_run_file(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "run.json").read_text())


@pytest.fixture(scope="module")
def straight_run(sharp_dir, data_dir, tmp_path_factory) -> Path:
    """A run of train.py in one process that nobody stopped."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert run_here(command(sharp_dir, data_dir, run_dir)) == 0
    return run_dir


def test_two_processes_train_what_one_trains(sharp_dir, data_dir, straight_run, tmp_path):
    run_dir = tmp_path / "two"
    processes = launch(2, [TRAIN, *command(sharp_dir, data_dir, run_dir)], tmp_path)
    said = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], said
    one, two = read_run_file(straight_run), read_run_file(run_dir)
    assert (two["training"]["world_size"], two["training"]["global_batch_size"]) == (2, 16)
    for first, second in zip(one["result"]["log_history"], two["result"]["log_history"], strict=True):
        # Each process computes the prefix once, so the operations (flos) are more, and times are never the same.
        for figure in set(first) - {name for name in first if re.search("second|runtime|flos", name)}:
            assert second[figure] == pytest.approx(first[figure], abs=2e-5), (first["step"], figure)
    weights_of = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (straight_run, run_dir)]
    assert_close(weights_of[1], weights_of[0], 1e-4)


def test_tensorboard_and_trackio_get_the_numbers(sharp_dir, data_dir, tmp_path, monkeypatch):
    """The Trainer's own callbacks, both at once, read back from the files that they wrote."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported: a process of its own
    run_dir = tmp_path / "run"
    flags = [*command(sharp_dir, data_dir, run_dir), "--report_to", "tensorboard", "trackio", "--max_steps", "30"]
    process = start([TRAIN, *flags], tmp_path)
    output = process.end()
    assert process.returncode == 0, output[-3000:]
    assert "tracker        tensorboard; trackio\n" in output
    history = read_run_file(run_dir)["result"]["log_history"]
    losses = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    scores = [entry["eval_macro_f1"] for entry in history if "eval_macro_f1" in entry]
    assert (len(losses), len(scores)) == (30, 1)

    events = EventAccumulator(str(next(run_dir.glob("runs/*"))))
    events.Reload()
    seen = {event.step: event.value for event in events.Scalars("train/loss")}
    assert seen == pytest.approx(losses, rel=1e-6)
    assert [event.value for event in events.Scalars("eval/macro_f1")] == pytest.approx(scores, rel=1e-6)

    with contextlib.closing(sqlite3.connect(next((tmp_path / "trackio").glob("*.db")))) as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == list(losses.values())
    assert [row["eval/macro_f1"] for row in rows if "eval/macro_f1" in row] == scores


def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_goes_on_to_the_same_adapter(
    sharp_dir, data_dir, straight_run, tmp_path, monkeypatch
):
    """With W&B, whose run goes on as well; a terminal's Ctrl-C goes to the whole group of processes."""
    monkeypatch.setenv("HOME", str(tmp_path))  # W&B leaves copies of its tables there
    run_dir = tmp_path / "stopped"
    arguments = [*command(sharp_dir, data_dir, run_dir), "--report_to", "wandb"]
    process = start([TRAIN, *arguments], tmp_path)
    process.wait_for("  loss ")
    os.killpg(process.pid, signal.SIGINT)
    output = process.end()
    assert process.returncode == 130, output
    stopped_at = json.loads(next(run_dir.glob("checkpoint-*/trainer_state.json")).read_text())["global_step"]
    assert stopped_at < STEPS
    assert f"Stopped at step {stopped_at} of {STEPS}; its checkpoint is in {run_dir}." in output
    stopped = read_run_file(run_dir)
    assert stopped["status"] == "interrupted"
    assert not (run_dir / "adapter").exists()

    resume = [*arguments, "--resume_from_checkpoint", "true"]
    with pytest.raises(InputError, match="training.learning_rate: was 0.001, now 0.002"):
        run_here([*resume, "--learning_rate", "2e-3"])
    assert run_here(resume) == 0
    run, whole = read_run_file(run_dir), read_run_file(straight_run)
    assert (run["status"], run["result"]["steps"]) == ("finished", STEPS)
    assert run["adapter"] == whole["adapter"]
    assert run["tracker"] == stopped["tracker"]
    tracked = {path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")}
    assert tracked == {run["tracker"]["id"]}


def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(sharp_dir, data_dir, tmp_path):
    run_dir = tmp_path / "two"
    words = [TRAIN, *command(sharp_dir, data_dir, run_dir), "--max_steps", "100000"]
    first, second = launch(2, words, tmp_path)
    first.wait_for("  loss ")
    second.send_signal(signal.SIGTERM)
    output = "".join(finish(first, second))
    assert (first.returncode, second.returncode) == (128 + signal.SIGTERM,) * 2, output[-3000:]
    (checkpoint,) = run_dir.glob("checkpoint-*")
    stopped_at = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"Stopped at step {stopped_at} of 100000; its checkpoint is in {run_dir}." in output
    assert read_run_file(run_dir)["status"] == "interrupted"
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


SHORT = ("--max_steps", "4", "--max_eval_samples", "0", "--logging_steps", "3")


def interrupt(monkeypatch, step: int) -> None:
    """Ctrl-C in a step of the train.py runs that follow, by way of a callback that the script adds."""
    monkeypatch.setattr("tweetdora.training.LogGenerations", lambda trainer: Raise(step, signal.SIGINT))


def test_ctrl_c_in_the_last_step_is_a_finished_run(sharp_dir, data_dir, tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 4)
    assert run_here(command(sharp_dir, data_dir, tmp_path / "run", *SHORT)) == 0
    run = read_run_file(tmp_path / "run")
    assert (run["status"], run["result"]["steps"]) == ("finished", 4)
    assert "Stopped" not in capsys.readouterr().out


def test_a_resumed_run_records_the_whole_run(sharp_dir, data_dir, tmp_path, monkeypatch):
    """Loss, seconds, and the command that a reader of the card can type."""
    arguments = command(sharp_dir, data_dir, tmp_path / "stopped", *SHORT)
    assert run_here(command(sharp_dir, data_dir, tmp_path / "straight", *SHORT)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        patch.setattr(sys, "argv", ["train.py", "--the", "first"])
        patch.setattr("time.gmtime", lambda: (2026, 3, 4, 5, 6, 7, 2, 63, 0))
        assert run_here(arguments) == 130
    state = json.loads((tmp_path / "stopped" / "checkpoint-2" / "trainer_state.json").read_text())
    assert run_here([*arguments, "--resume_from_checkpoint", "true"]) == 0
    straight, run = (read_run_file(tmp_path / name) for name in ("straight", "stopped"))
    assert (run["command"], run["created"]) == ("python train.py --the first", "2026-03-04T05:06:07Z")
    assert run["result"]["train_loss"] == pytest.approx(straight["result"]["train_loss"], rel=1e-6)
    assert run["result"]["log_history"][-1]["train_loss"] == run["result"]["train_loss"], "what W&B shows"
    assert run["result"]["seconds"] > training_seconds(state["log_history"]) > 0
    assert run["adapter"] == straight["adapter"]


def test_a_resumed_run_logs_after_the_steps_that_its_own_command_names(sharp_dir, data_dir, tmp_path, monkeypatch):
    arguments = command(sharp_dir, data_dir, tmp_path / "run", *SHORT, "--max_steps", "6")
    with monkeypatch.context() as patch:
        interrupt(patch, 1)
        assert run_here(arguments) == 130
    assert run_here([*arguments, "--logging_steps", "1", "--resume_from_checkpoint", "true"]) == 0
    history = read_run_file(tmp_path / "run")["result"]["log_history"]
    assert [line["step"] for line in history if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("steps", ["3", "4"], ids=["end of an epoch", "within an epoch"])
def test_a_run_that_was_killed_after_its_last_step_only_has_to_be_saved(steps, sharp_dir, data_dir, tmp_path):
    run_dir = tmp_path / "run"
    arguments = command(sharp_dir, data_dir, run_dir, *SHORT, "--max_steps", steps)
    assert run_here(arguments) == 0
    whole = read_run_file(run_dir)
    (run_dir / "run.json").write_text(json.dumps({**whole, "status": "started"}))
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    assert run_here([*arguments, "--resume_from_checkpoint", "true"]) == 0
    run = read_run_file(run_dir)
    assert (run["status"], run["result"]["steps"]) == ("finished", int(steps))
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()
    assert run["adapter"] == whole["adapter"]
    assert run["result"]["train_loss"] == whole["result"]["train_loss"]
    ends = [record["result"]["log_history"][-1] for record in (run, whole)]
    assert [end["train_loss"] for end in ends] == [whole["result"]["train_loss"]] * 2
    assert ends[0]["total_flos"] == ends[1]["total_flos"]
    assert run["result"]["seconds"] == pytest.approx(whole["result"]["seconds"], abs=0.5)


# Process 1 of two gets a loss that is not finite. Process 0 needs a while to say so in the record, which the launcher
# must leave it: it asks the others to end when one has failed.
BROKEN_PROCESS = """
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from tweetdora import record_files, trainer
write_json = record_files.write_json
def slow(path, record):
    time.sleep(1.5 if record.get("status") == "diverged" else 0)
    write_json(path, record)
record_files.write_json = slow
loss_sum = trainer.supervised_loss_sum
def broken(model, batch):
    return loss_sum(model, batch) * (float("nan") if os.environ["RANK"] == "1" and model.training else 1.0)
trainer.supervised_loss_sum = broken
sys.argv[0] = "train.py"
sys.exit(runpy.run_path({root!r} + "/train.py")["main"]())
"""


def test_a_loss_that_is_nan_in_one_process_stops_all(sharp_dir, data_dir, tmp_path):
    """Left alone, the others would wait for it until the launcher kills them, and the record would say "started"."""
    script = tmp_path / "broken.py"
    script.write_text(BROKEN_PROCESS.format(root=str(REPO_DIR)))
    arguments = command(sharp_dir, data_dir, tmp_path / "run", "--batching", "padded")
    logs = ["--redirects", "3", "--log-dir", tmp_path / "logs"]
    process = launchers.start([*TORCHRUN, *logs, script, *arguments], tmp_path)
    (output,) = launchers.finish(process)
    assert process.returncode == 1, output
    assert read_run_file(tmp_path / "run")["status"] == "diverged"
    said = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    found = [
        re.findall(r"DivergedError: the loss is nan in step 1, training examples (\[.*?\])\. Start again", text)
        for text in said
    ]
    assert len(found) == 2 and found[0] == found[1] and len(json.loads(found[0][0])) == 8
