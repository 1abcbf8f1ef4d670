"""Beside the training: a line for each checkpoint, missed validations, stops by signal or NaN, generations to W&B."""

import signal
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import wandb
from accelerate.utils import gather, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tweetdora.checkpoints import last_whole_checkpoint
from tweetdora.config import TrainConfig
from tweetdora.errors import DivergedError
from tweetdora.tracking import log_generations

if TYPE_CHECKING:
    from tweetdora.trainer import ClassificationTrainer


class EvaluationStopped(RuntimeError):
    """A signal came while the validation examples were being answered."""


def after_divergence(training: TrainConfig) -> str:
    """What can be done about a run that diverged; resumed, it must have the same settings, and diverges again."""
    precision = "" if training.precision == "fp32" else " or with --precision fp32"
    checkpoint, _ = last_whole_checkpoint(training.output_dir)
    good = f"; the adapter in {checkpoint} is from before it, and good" if checkpoint else ""
    return f"Start anew in another --output_dir with a lower --learning_rate{precision}{good}."


class _TrainerCallback(TrainerCallback):
    """A callback that looks at more of its trainer than it is handed."""

    def __init__(self, trainer: "ClassificationTrainer") -> None:
        self.trainer = trainer


class LogBeforeCheckpoint(TrainerCallback):
    """A training line for each checkpoint and for the end: no step is missing from the lines of a resumed run."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the line. A checkpoint may also follow from a validation, if a signal cuts that off."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True
        return control

    on_epoch_end = on_step_end


class RunMissedEvaluation(_TrainerCallback):
    """A resumed run begins with the validation that the interruption cost it, and is then as one never stopped."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Validate, if it is due.

        Raises:
            EvaluationStopped: a signal cut it off again; it stays due, and no step is made.
        """
        if self.trainer.evaluation_is_due():
            self.trainer.evaluate()
            if self.trainer.evaluation_is_due():
                raise EvaluationStopped


class StopOnNonFiniteGradient(_TrainerCallback):
    """A loss can be finite and its gradient not: the weights, and the next checkpoint, would be NaN."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse the step.

        Raises:
            DivergedError: a gradient is not finite.
        """
        if args.fp16:
            return  # the loss scaler skips such a step and lowers its scale
        model: Any = self.trainer.model
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            # Gradients are the same in all processes by now, so all of them stop here.
            ids = gather_object([number for part in self.trainer.step_example_ids for number in part.tolist()])
            raise DivergedError(
                f"a gradient is not finite in step {state.global_step + 1}, training examples {ids}. "
                f"{after_divergence(self.trainer.args)}"
            )


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM: finish the step, write a checkpoint, stop. A second one stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the signals for the time of the training."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal_number = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end."""
        if self.agree(args) and state.global_step < state.max_steps:  # after the last step there is nothing to stop
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
        return control

    def agree(self, args: TrainingArguments) -> bool:
        """Whether a signal has come to any process; all of them must ask at the same place."""
        if args.world_size > 1:  # a signal may have reached one process only, or one process a step earlier
            number = int(gather(torch.tensor([self.signal_number or 0], device=args.device)).max())
            self.signal_number = number or self.signal_number  # one may have come while this was gathered
        return self.signal_number is not None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class LogGenerations(_TrainerCallback):
    """After each validation: confusion matrix and sample generations to W&B."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the last validation generated."""
        examples = self.trainer.validation_examples
        if wandb.run is not None and examples is not None:
            found = [generation for generation in self.trainer.last_generations if generation is not None]
            log_generations("validation", examples, found, self.trainer.task.label_words, state.global_step)
