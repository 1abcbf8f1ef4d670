"""Trainer callbacks: log lines, missed validations, stops on signals and NaN, peak memory, generations to W&B."""

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from tweetdora.checkpoints import last_whole_checkpoint
from tweetdora.device import largest, own_peak_memory_bytes
from tweetdora.errors import DivergedError
from tweetdora.packing import FILLER_ID
from tweetdora.tracking import log_generations, open_run
from tweetdora.train_config import TrainConfig

if TYPE_CHECKING:
    from tweetdora.trainer import ClassificationTrainer


# Seconds. One stop may deliver several signals: a launcher forwards the terminal's Ctrl-C, the other processes get
# theirs later, and Linux sends a parent-death signal once for each thread of the parent, about 1 ms apart.
SAME_STOP = 1.0


class EvaluationStopped(RuntimeError):
    """A signal arrived during validation."""


def after_divergence(training: TrainConfig) -> str:
    """Advice for a run that diverged. Resuming does not help: with the same settings it diverges again."""
    precision = "" if training.precision == "fp32" else " or with --precision fp32"
    checkpoint, _ = last_whole_checkpoint(training.output_dir)
    good = f"; the adapter in {checkpoint} is from before that step, and intact" if checkpoint else ""
    return f"Start again in another --output_dir with a lower --learning_rate{precision}{good}."


class _TrainerCallback(TrainerCallback):
    """A callback that needs its trainer, not only the state."""

    def __init__(self, trainer: "ClassificationTrainer") -> None:
        self.trainer = trainer


class LogBeforeCheckpoint(TrainerCallback):
    """Log at each checkpoint and at the end, so that the log of a resumed run covers every step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a log line. A validation may also end in a checkpoint, if a signal interrupts it."""
        if control.should_save or control.should_evaluate or control.should_training_stop:
            control.should_log = True
        return control

    on_epoch_end = on_step_end


class KeepPeakMemory(TrainerCallback, ExportableState):
    """Store the peak memory in each checkpoint, so that a resumed run has that of all its sessions."""

    def __init__(self) -> None:
        self.earlier_peak_memory: dict[str, int] = {}  # of earlier sessions, as own_peak_memory_bytes returns it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over what the checkpoint has; also for a run that has no steps left."""
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        found = callbacks.setdefault(type(self).__name__, self.state())  # an older checkpoint has none
        self.earlier_peak_memory = found["attributes"]["earlier_peak_memory"]

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to the checkpoint; of several processes, the first one's."""
        return {
            "args": {},
            "attributes": {"earlier_peak_memory": largest([own_peak_memory_bytes(), self.earlier_peak_memory])},
        }


class RunMissedEvaluation(_TrainerCallback):
    """Start a resumed run with the validation that the interruption skipped, to match an uninterrupted run."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Validate if a validation is due. Resumed, the steps to log, save and validate after are the new flags'.

        Raises:
            EvaluationStopped: a signal interrupted it again; it stays due, and no step is made.
        """
        state.compute_steps(args, state.max_steps)  # the Trainer leaves those of the checkpoint
        if self.trainer.evaluation_is_due():
            self.trainer.evaluate()
            if self.trainer.evaluation_is_due():
                raise EvaluationStopped


class StopOnNonFiniteGradient(_TrainerCallback):
    """Stop before a non-finite gradient turns the weights, and the next checkpoint, into NaN."""

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
            own = [number for part in self.trainer.step_example_ids for number in part.tolist()]
            ids = gather_object([number for number in own if number != FILLER_ID])
            raise DivergedError(
                f"a gradient is not finite in step {state.global_step + 1}, training examples {ids}. "
                f"{after_divergence(self.trainer.args)}"
            )


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. A signal SAME_STOP later stops at once."""

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._since = 0.0  # when it was set, by time.monotonic()
        self._previous: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Handle the signals during training."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is None:
            self.signal_number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_STOP:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Request a checkpoint and the end of training."""
        if self.agree(args) and state.global_step < state.max_steps:  # after the last step there is nothing to stop
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
        return control

    def agree(self, args: TrainingArguments) -> bool:
        """True if any process received a signal. Collective: every process must call it at the same point."""
        if args.world_size > 1:  # a signal may reach one process only, or one process a step earlier
            number = int(gather(torch.tensor([self.signal_number or 0], device=args.device)).max())
            if number and self.signal_number is None:
                self._note(number, None)
            return bool(number)  # one that arrived here during the gathering is agreed on at the next call
        return self.signal_number is not None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class LogGenerations(_TrainerCallback):
    """Send a confusion matrix and sample generations to W&B after each validation."""

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the generations of the last validation."""
        examples = self.trainer.validation_examples
        if open_run() is not None and examples is not None:
            found = [generation for generation in self.trainer.last_generations if generation is not None]
            log_generations("validation", examples, found, self.trainer.task.label_words, state.global_step)
