"""The Trainer: loss on completions only, validation by generation, and atomic checkpoints."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, SaveStrategy

from tweetdora.attention import check_packable
from tweetdora.batches import EvenBatches, WithFiller
from tweetdora.callbacks import (
    EvaluationStopped,
    KeepPeakMemory,
    LogBeforeCheckpoint,
    RunMissedEvaluation,
    StopOnNonFiniteGradient,
    StopOnSignal,
    after_divergence,
)
from tweetdora.checkpoints import SAVING_DIR, clear_unfinished, last_whole_checkpoint, publish_checkpoint
from tweetdora.config import TaskConfig
from tweetdora.data import Examples
from tweetdora.errors import DivergedError, ResourceError
from tweetdora.generation import Generation, generate_all
from tweetdora.modeling import save_adapter
from tweetdora.packing import FILLER_ID, PackedCollator, PaddedCollator, token_count
from tweetdora.progress import ProgressBar, ProgressLines
from tweetdora.prompts import IGNORE_INDEX, PromptTokenizer
from tweetdora.tokenized import tokenize_examples
from tweetdora.train_config import TrainConfig

# Validation metrics that are logged and tracked during training.
LOGGED_SCORES = ("macro_f1", "macro_recall", "accuracy", "parse_rate", "exact_match", "eos_rate")


class ClassificationTrainer(Trainer):
    """transformers' Trainer for prompt-completion examples.

    - Logits are computed only for the columns that carry loss, and the loss in float32.
    - The loss is the sum over supervised tokens divided by their number in the whole optimizer step, over all
      processes and accumulation steps, so it does not depend on how a batch is split.
    - evaluate() answers the validation examples by generation.
    - A checkpoint holds the adapter, not the base, and is written atomically (checkpoints.py).
    - A validation that a signal cut off, or that a stop skipped, is repeated when the run is resumed.
    """

    args: TrainConfig
    model: PeftModel
    processing_class: PreTrainedTokenizerBase
    eval_dataset: Any

    def __init__(
        self,
        *,
        task: TaskConfig,
        prompt_tokenizer: PromptTokenizer,
        validation_examples: Examples | None,
        **trainer_arguments: Any,
    ) -> None:
        packed = trainer_arguments["args"].batching == "shared_prefix"
        collator = PackedCollator() if packed else PaddedCollator(pad_token_id=prompt_tokenizer.stop_token_id)
        validation = tokenize_examples(validation_examples, prompt_tokenizer).features if validation_examples else None
        features = WithFiller(trainer_arguments.pop("train_dataset"))
        with _allow_checkpoints(trainer_arguments["args"]):
            super().__init__(
                data_collator=collator, eval_dataset=validation, train_dataset=features, **trainer_arguments
            )
        if packed:
            check_packable(cast(Any, self.model).get_base_model())
        self.task, self.prompt_tokenizer, self.validation_examples = task, prompt_tokenizer, validation_examples
        self.last_generations: list[Generation | None] = []
        self.remove_callback(ProgressCallback if not self.args.disable_tqdm else PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(ProgressBar())
        self.add_callback(ProgressLines())
        self.add_callback(StopOnNonFiniteGradient(self))
        self.add_callback(LogBeforeCheckpoint())
        self.add_callback(KeepPeakMemory())
        self.add_callback(RunMissedEvaluation(self))
        # compute_loss divides by the supervised tokens of the whole step, so accumulation must not divide again.
        self.loss_is_scaled_for_ga = True
        # When the run would have started if it had never been interrupted; None before the first step.
        self._started: float | None = None
        self._window_started = 0.0
        self._window_examples: int | torch.Tensor = 0
        self._window_tokens: int | torch.Tensor = 0
        self.step_example_ids: list[torch.Tensor] = []  # this process's, in the current optimizer step

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own, but with several processes, the last step has no example twice (batches.py)."""
        loader = super().get_train_dataloader()
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and not shard.drop_last:
            shard.batch_sampler = EvenBatches(
                shard.batch_sampler, shard.num_processes, filler=len(cast(WithFiller, self.train_dataset))
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of one optimizer step, and the number of supervised tokens in them over all processes.

        The Trainer's own count skips the first column of the labels, which carries no loss in its layout. In these
        collators' layout it does.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        supervised = sum((batch["labels"] != IGNORE_INDEX).sum() for batch in batches)
        self.step_example_ids = [batch["example_ids"] for batch in batches]
        return batches, self.accelerator.reduce(torch.as_tensor(supervised, device=device))

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run one forward and backward pass, and count examples and tokens for the log."""
        if self._started is None:  # the clock starts at the first step, after the setup
            self._window_started = time.perf_counter()
            self._started = self._window_started - training_seconds(self.state.log_history)
        self._window_examples += (
            inputs["example_ids"] != FILLER_ID
        ).sum()  # read when it is logged: no wait for a GPU
        self._window_tokens += token_count(inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Cross-entropy over the supervised tokens of a collated batch.

        Raises:
            DivergedError: the loss is not finite.
        """
        labels = inputs["labels"]  # (B, K)
        total = supervised_loss_sum(model, inputs)
        self._check_finite(total.detach(), inputs["example_ids"])
        if num_items_in_batch is None:
            loss = total / (labels != IGNORE_INDEX).sum()
        else:
            # Gradients are averaged over processes, and the count is the sum over processes.
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def _check_finite(self, loss_sum: torch.Tensor, example_ids: torch.Tensor) -> None:
        """Refuse a loss that is not finite, in all processes at once: if only one stopped, the others would hang."""
        broken = not torch.isfinite(loss_sum)
        if self.accelerator.num_processes > 1:
            broken = bool(self.accelerator.reduce(torch.tensor(int(broken), device=loss_sum.device)))
        if broken:
            ids = example_ids[example_ids != FILLER_ID].tolist()
            own = [] if torch.isfinite(loss_sum) else [(loss_sum.item(), ids)]
            found = gather_object(own)
            ids = [example_id for _, process_ids in found for example_id in process_ids]
            raise DivergedError(
                f"the loss is {found[0][0]} in step {self.state.global_step + 1}, training examples {ids}. "
                + after_divergence(self.args)
            )

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Compute loss and generations of the validation examples, with a share for each process."""
        from tweetdora.metrics import compute_metrics  # takes two seconds, which the first step need not wait for

        examples, stop = self.validation_examples, self._stop_on_signal()
        if examples is None:
            raise AssertionError("the Trainer does not validate without validation examples")
        together = self.args.shard_base  # then all processes must call the model equally often
        indices = list(range(len(examples)))
        with self.accelerator.split_between_processes(indices) as share:
            loss_parts = self._loss_parts(indices if together else share)
        loss_parts = loss_parts if together else gather_object(loss_parts)
        loss_sum, tokens = (sum(part) for part in zip(*loss_parts, strict=True))

        def stopped() -> bool:
            """True if a signal asks to stop; for a sharded base, only once all processes agree."""
            return stop is not None and (stop.agree(self.args) if together else stop.signal_number is not None)

        with self.accelerator.autocast():
            self.last_generations, _ = generate_all(
                self.model,
                self.processing_class,
                self.prompt_tokenizer,
                examples,
                self.task.label_words,
                batch_size=self.args.per_device_eval_batch_size,
                max_new_tokens=self.args.max_new_tokens,
                stop=stopped,
                together=together,
            )
        if stop is not None and stop.agree(self.args):
            raise EvaluationStopped
        found = [
            generation for generation in self.last_generations if generation is not None
        ]  # all of them, because it was not stopped
        scores = compute_metrics(examples.labels, found, self.task.label_words)
        metrics = {"loss": loss_sum / tokens, **{name: getattr(scores, name) for name in LOGGED_SCORES}}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=metrics, num_samples=len(examples))

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        """Answer and score the validation examples; if a signal cuts this off, request a checkpoint and a stop."""
        try:
            return super().evaluate(*arguments, **more)
        except EvaluationStopped:
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # or it would run again at the end of the epoch
            return {}

    def _stop_on_signal(self) -> StopOnSignal | None:
        """The callback that cuts off a validation on a signal, if there is one."""
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, StopOnSignal)), None)

    def evaluation_is_due(self) -> bool:
        """True if the last step should have been validated but was not."""
        step, state = self.state.global_step, self.state
        if self.args.eval_strategy == IntervalStrategy.NO or not step or step < (self.args.eval_delay or 0):
            return False
        due = step % state.eval_steps == 0 or step >= state.max_steps
        return due and not any("eval_loss" in line and line["step"] == step for line in state.log_history)

    @torch.no_grad()
    def _loss_parts(self, share: Sequence[int]) -> list[tuple[float, int]]:
        """Loss sum and number of supervised tokens for each batch of this process's validation examples."""
        self.model.eval()
        size, parts = self.args.per_device_eval_batch_size, []
        for start in range(0, len(share), size):
            batch = self.data_collator([self.eval_dataset[index] for index in share[start : start + size]])
            inputs = self._prepare_inputs(batch)
            with self.accelerator.autocast():
                loss = supervised_loss_sum(self.model, inputs)
            parts.append((loss.item(), int((inputs["labels"] != IGNORE_INDEX).sum())))
        return parts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a line, with the seconds of the whole run; training lines also get the speed since the last line."""
        now = time.perf_counter()
        if self._started is not None:
            logs["seconds"] = round(now - self._started, 2)
        if "train_loss" in logs:  # the Trainer's own covers only the steps since the last resume
            logs["train_loss"] = mean_loss(self.state.log_history)
        if "loss" in logs:
            seconds = now - self._window_started
            counts = torch.tensor([int(self._window_examples), int(self._window_tokens)], device=self.args.device)
            examples, tokens = self.accelerator.reduce(counts).tolist()
            logs["samples_per_second"] = round(examples / seconds, 2)
            logs["tokens_per_second"] = round(tokens / seconds, 1)
        super().log(logs, start_time)
        self._window_started, self._window_examples, self._window_tokens = time.perf_counter(), 0, 0

    @property
    def kept_memory(self) -> KeepPeakMemory:
        """The callback that knows the peak memory of earlier sessions; transformers may put another in its place."""
        return next(one for one in self.callback_handler.callbacks if isinstance(one, KeepPeakMemory))

    def restore_finished(self, checkpoint: str) -> None:
        """Load adapter and history of a checkpoint that has no training steps left."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        # The checkpoint has those of the process that wrote it; with them, each process would start a W&B run.
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self.kept_memory.on_train_begin(self.args, self.state, self.control)
        if self.evaluation_is_due():
            self.evaluate()
        # The Trainer's last line, which it logs after the last checkpoint.
        self.log({"total_flos": self.state.total_flos, "train_loss": mean_loss(self.state.log_history)})

    def _get_output_dir(self, trial: Any) -> str:
        """The folder where the Trainer writes a checkpoint before it is renamed into place."""
        return os.path.join(self.args.output_dir, SAVING_DIR)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint to a temporary folder; once all processes have written their part, rename it into place.

        Raises:
            ResourceError: it could not be written; earlier checkpoints are unchanged.
        """
        if self.args.should_save:
            clear_unfinished(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        self._write(lambda: super(ClassificationTrainer, self)._save_checkpoint(model, trial))
        folder, step, keep = self.args.output_dir, self.state.global_step, self.args.save_total_limit
        self._write(lambda: publish_checkpoint(folder, step, keep) if self.args.should_save else None)

    def _write(self, action: Callable[[], Any]) -> None:
        """Run each process's part of a save; if one fails, all of them stop and the unfinished files are removed."""
        failures: list[str] = []
        try:
            action()
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
            failures = [" ".join(str(error).split())[:200]]
        failures = gather_object(failures)
        if failures:
            if self.args.should_save:
                clear_unfinished(self.args.output_dir)
            raise ResourceError(self._not_saved(failures[0]))

    def _not_saved(self, said: str) -> str:
        """The error message for a checkpoint that could not be written."""
        folder, (last, _) = self.args.output_dir, last_whole_checkpoint(self.args.output_dir)
        kept = f"{last} is intact" if last else "there is no earlier one"
        return (
            f"the checkpoint of step {self.state.global_step} could not be written to {folder} ({said}); {kept}. Free "
            "disk space or fix the folder's permissions, then repeat the command with --resume_from_checkpoint true."
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; a checkpoint holds no base model, tokenizer or pickled arguments."""
        if self.args.should_save:
            save_adapter(self.model, output_dir or self.args.output_dir)


@contextlib.contextmanager
def _allow_checkpoints(training: TrainConfig) -> Iterator[None]:
    """Let the Trainer accept a base that is sharded over processes.

    It refuses one whose run saves checkpoints, because it cannot save an optimizer of shared parameters. Here the
    optimizer has the adapter only, which is whole in every process.
    """
    strategy = training.save_strategy
    if training.shard_base:
        training.save_strategy = SaveStrategy.NO
    try:
        yield
    finally:
        training.save_strategy = strategy


def supervised_loss_sum(model: nn.Module | PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the cross-entropy over the supervised tokens of a batch of either layout, at least in float32."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "example_ids")}
    logits = model(**inputs, use_cache=False).logits  # (1, K, V) packed, (B, K, V) padded
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def mean_loss(log_history: Sequence[dict[str, float]]) -> float:
    """Mean training loss over all steps of a run, however often it was resumed.

    Each training line holds the mean of the steps since the line before it:

    >>> mean_loss([{"step": 2, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": 1.0}])
    3.0
    """
    total, before = 0.0, 0.0
    for line in log_history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - before)
            before = line["step"]
    return total / before


def training_seconds(log_history: Sequence[dict[str, float]]) -> float:
    """Seconds of training up to a run's last log line, without the time between an interruption and its resume."""
    return max((line.get("seconds", 0.0) for line in log_history), default=0.0)
