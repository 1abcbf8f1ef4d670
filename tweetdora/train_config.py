"""The settings of train.py: transformers.TrainingArguments with this project's defaults, checked on creation."""

import dataclasses
import os
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from tweetdora.config import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    DEFAULT_RUN_DIR,
    MAX_NEW_TOKENS,
    PUBLISHED_REPO,
    SEED,
    Flag,
    ModelConfig,
    Precision,
    Range,
    TaskConfig,
    check_ranges,
    flags_of,
)
from tweetdora.device import decide_precision, uses_gpu
from tweetdora.errors import InputError
from tweetdora.processes import check_launch, take_over_fsdp


def inherited(name: str) -> Any:
    """Redeclare a field of TrainingArguments unchanged, so that it can carry a Flag."""
    (found,) = (item for item in dataclasses.fields(TrainingArguments) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


# Trainer arguments that would not do here what they say, or would contradict the record, with the reason.
_USE_FSDP2 = "a base that does not fit one GPU is sharded with FSDP2 (--shard_base true)"
_REFUSED_ARGUMENTS = {
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "average_tokens_across_devices": "the loss is always the mean over the answer tokens of all processes",
    "auto_find_batch_size": "a step always takes --global_batch_size examples; if memory runs out, raise "
    "--gradient_accumulation_steps",
    "accelerator_config": "--global_batch_size determines how processes share the examples",
    "load_best_model_at_end": "the adapter is that of the last step, as record and card say",
    "metric_for_best_model": "the adapter is that of the last step, as record and card say",
    "save_only_model": "a run cannot resume from a checkpoint without its optimizer",
    "ignore_data_skip": "a resumed run would see some examples twice and others never",
    "use_liger_kernel": "it replaces layers of the model, and evaluate.py would evaluate a different one",
    "bf16_full_eval": "validation uses --precision, like training",
    "fp16_full_eval": "validation uses --precision, like training",
    "deepspeed": _USE_FSDP2,
    "parallelism_config": _USE_FSDP2,
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        "every batch has another shape and would be compiled anew",
    ),
}

# Variables that `accelerate launch` sets, often from a forgotten config file of the machine.
_REFUSED_LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_LAUNCH_ADVICE = (
    "Launch with --config_file accelerate_config.yaml, or change the machine's own config with `accelerate config`."
)


@dataclass
class TrainConfig(TrainingArguments):
    """TrainingArguments with this project's defaults, and a few more fields."""

    _argument_group_name: ClassVar[str] = "training (transformers.TrainingArguments; --help_all lists the rest)"

    output_dir: str = field(
        default=DEFAULT_RUN_DIR, metadata={"help": "Run folder, for adapter, run.json and checkpoints."}
    )
    learning_rate: Annotated[float, Flag(affects="recipe", range=Range("a number, 0 or more", 0))] = field(
        default=3e-5, metadata={"help": "Peak learning rate of AdamW."}
    )
    num_train_epochs: Annotated[float, Flag(affects="recipe")] = field(
        default=1.0, metadata={"help": "Passes over the training examples."}
    )
    global_batch_size: Annotated[int, Flag(affects="recipe", range=AT_LEAST_1)] = field(
        default=16,
        metadata={"help": "Examples per optimizer step, over all processes and accumulation steps."},
    )
    per_device_train_batch_size: Annotated[int | None, Flag(shown=False)] = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Examples per forward pass of one process. It follows from --global_batch_size, the number of "
            "processes and --gradient_accumulation_steps; any other value is refused."
        },
    )
    batching: Annotated[Literal["shared_prefix", "padded"], Flag(affects="rounding")] = field(
        default="shared_prefix",
        metadata={
            "help": "shared_prefix: compute the common start of all prompts once per batch. padded: compute each "
            "prompt alone. Both give the same loss."
        },
    )
    shard_base: Annotated[bool, Flag(affects="rounding")] = field(
        default=False,
        metadata={
            "help": "Shard the base over all processes (FSDP2), for a base that does not fit one GPU. An FSDP "
            "launch file sets it."
        },
    )
    precision: Annotated[Precision, Flag(affects="compute")] = field(
        default="auto",
        metadata={
            "help": "Compute precision. auto: that of accelerate launch, otherwise bf16 if the device supports it."
        },
    )
    cpu_threads: Annotated[int, Flag(range=AT_LEAST_0)] = field(
        default=0, metadata={"help": "CPU threads per process; 0: all cores, divided among the processes."}
    )
    max_eval_samples: Annotated[int, Flag(range=AT_LEAST_0)] = field(
        default=200, metadata={"help": "Validate on the first N examples, by generation; 0: no validation."}
    )
    eval_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=100, metadata={"help": "Validate every N steps; if below 1, a fraction of all steps."}
    )
    max_new_tokens: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=MAX_NEW_TOKENS, metadata={"help": "Maximum number of generated tokens per answer."}
    )
    logging_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=10,
        metadata={"help": "Log every N steps; if below 1, a fraction of all steps."},
    )
    save_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=100, metadata={"help": "Write a checkpoint every N steps; if below 1, a fraction of all steps."}
    )
    save_total_limit: Annotated[int | None, Flag(range=AT_LEAST_0)] = field(
        default=2, metadata={"help": "Number of checkpoints to keep; 0: all."}
    )
    per_device_eval_batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=128, metadata={"help": "Validation batch size."}
    )
    max_steps: Annotated[int, Flag(affects="recipe")] = field(
        default=-1, metadata={"help": "Stop after N optimizer steps, overriding --num_train_epochs; -1: no limit."}
    )
    gradient_accumulation_steps: Annotated[int, Flag(affects="rounding", range=AT_LEAST_1)] = field(
        default=1,
        metadata={"help": "Forward passes per optimizer step, which share its --global_batch_size examples."},
    )
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run in its record and in W&B. Default: the run folder's name."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: resume from the newest intact checkpoint in --output_dir. Or a checkpoint folder."},
    )
    allow_mismatch: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings that may differ in a resumed run, named as in the error message."},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["wandb"],
        metadata={"help": "Trackers. wandb runs offline without a login. none: no tracker."},
    )
    logging_nan_inf_filter: Annotated[bool, Flag(shown=False)] = field(
        default=False, metadata={"help": "Hide NaN losses from the log."}
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "Hide the progress bar. Default: hidden unless the output is a terminal."}
    )
    remove_unused_columns: Annotated[bool, Flag(shown=False)] = field(
        default=False, metadata={"help": "The collator needs all columns."}
    )
    ddp_find_unused_parameters: Annotated[bool | None, Flag(shown=False)] = field(
        default=False, metadata={"help": "Not needed: every adapter weight gets a gradient."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": f"Repository for push_to_hub.py, owner/name. Default for the published recipe: {PUBLISHED_REPO}."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load and check everything, print the plan and one example, and stop."}
    )
    # Redeclared unchanged, to carry a Flag.
    lr_scheduler_type: Annotated[SchedulerType | str, Flag(affects="recipe")] = inherited("lr_scheduler_type")
    warmup_steps: Annotated[float, Flag(affects="recipe")] = inherited("warmup_steps")
    weight_decay: Annotated[float, Flag("recipe", AT_LEAST_0)] = inherited("weight_decay")
    max_grad_norm: Annotated[float, Flag("recipe", AT_LEAST_0)] = inherited("max_grad_norm")
    seed: Annotated[int, Flag(affects="recipe", range=SEED)] = inherited("seed")
    lr_scheduler_kwargs: Annotated[dict | str | None, Flag("recipe", shown=False)] = inherited("lr_scheduler_kwargs")
    adam_beta1: Annotated[float, Flag("recipe", shown=False)] = inherited("adam_beta1")
    adam_beta2: Annotated[float, Flag("recipe", shown=False)] = inherited("adam_beta2")
    adam_epsilon: Annotated[float, Flag("recipe", shown=False)] = inherited("adam_epsilon")
    optim: Annotated[OptimizerNames | str, Flag("recipe", shown=False)] = inherited("optim")
    optim_args: Annotated[str | None, Flag("recipe", shown=False)] = inherited("optim_args")
    optim_target_modules: Annotated[None | str | list[str], Flag("recipe", shown=False)] = inherited(
        "optim_target_modules"
    )
    label_smoothing_factor: Annotated[float, Flag("recipe", shown=False)] = inherited("label_smoothing_factor")
    data_seed: Annotated[int | None, Flag("recipe", SEED, shown=False)] = inherited("data_seed")
    neftune_noise_alpha: Annotated[float | None, Flag("recipe", shown=False)] = inherited("neftune_noise_alpha")
    train_sampling_strategy: Annotated[str, Flag("recipe", shown=False)] = inherited("train_sampling_strategy")
    dataloader_drop_last: Annotated[bool, Flag("recipe", shown=False)] = inherited("dataloader_drop_last")
    tf32: Annotated[bool | None, Flag("compute", shown=False)] = inherited("tf32")
    full_determinism: Annotated[bool, Flag("compute", shown=False)] = inherited("full_determinism")
    # Computed, not a flag: why this precision was chosen.
    precision_reason: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._refuse_what_is_not_ours()
        check_ranges(self)
        asked, launched = self._asks_for_fsdp(), take_over_fsdp()
        self.shard_base = asked or launched or self.shard_base
        for check in (
            self._check_hub_model_id,
            self._check_there_is_something_to_train,
            self._check_the_schedule_follows_the_steps,
            self._check_the_last_step_is_saved,
            self._check_noise_goes_with_the_batching,
        ):
            check()
        if not uses_gpu():
            self.use_cpu = True
        chosen, self.precision_reason = decide_precision(
            requested=self.precision,
            flags={name for name in ("bf16", "fp16") if getattr(self, name)},
            launcher=os.environ.get("ACCELERATE_MIXED_PRECISION"),
            device_type="cpu" if self.use_cpu else "cuda",
        )
        self.precision = chosen
        # bf16 is mixed precision without autocast: the frozen base is in bf16, the adapter in float32, and PEFT casts
        # between them. Autocast would cast at every operation (2.6 s instead of 1.5 s a step on two CPU cores). fp16
        # needs the autocast and loss scaling that come with the Trainer's flag.
        self.bf16, self.fp16 = False, self.precision == "fp16"
        self.eval_strategy = "steps" if self.max_eval_samples else "no"
        self.output_dir = os.path.normpath(os.path.expanduser(self.output_dir))
        self.run_name = self.run_name or os.path.basename(self.output_dir)
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()
        batch_size, self.per_device_train_batch_size = self.per_device_train_batch_size, 1
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:  # the Trainer's own complaints
            raise InputError(" ".join(str(error).split())) from error
        self._check_sharding()
        self.mixed_precision = "fp16" if self.fp16 else "no"
        # Under plain `python` on several GPUs, the Trainer would use DataParallel, which splits examples that belong
        # together and is slower than one process per GPU.
        self.visible_gpus = self._n_gpu
        self._n_gpu = min(self._n_gpu, 1)
        self.per_device_train_batch_size = self._examples_per_pass(batch_size)

    def _refuse_what_is_not_ours(self) -> None:
        """Refuse flags of the Trainer that do not fit this script."""
        if self.push_to_hub:
            raise InputError(
                "--push_to_hub is not supported by train.py: train first, then publish with python push_to_hub.py."
            )
        if self.hub_token is not None:
            raise InputError("--hub_token: a token in a flag ends up in logs; set HF_TOKEN or run `hf auth login`.")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) not in ("no", "steps"):
            raise InputError(
                "--eval_strategy is set by --max_eval_samples (0: no validation) and --eval_steps; leave it out."
            )
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"--train_sampling_strategy {self.train_sampling_strategy} is not supported: a resumed run, or one "
                "with several processes, would see the examples in another order. Choose random or sequential."
            )
        optimizer = str(getattr(self.optim, "value", self.optim))
        if optimizer.startswith("schedule_free"):
            raise InputError(
                f"--optim {optimizer} is not supported: its weights for validation and saving are others than those "
                "that are trained. Use another, such as adamw_torch."
            )
        fields = {item.name: item for item in dataclasses.fields(self)}
        for name, reason in _REFUSED_ARGUMENTS.items():
            if (value := getattr(self, name)) not in (fields[name].default, None, ""):
                raise InputError(f"--{name} is {value!r}, which is not supported: {reason}. Leave it out.")
        check_launch()
        for name, what in _REFUSED_LAUNCHES.items():
            if os.environ.get(name, "").lower() in ("true", "1"):
                raise InputError(
                    f"accelerate launch asks for {what} ({name}), which is not supported: {_USE_FSDP2}. "
                    f"{_LAUNCH_ADVICE}"
                )
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if backend.lower() != "no":
            raise InputError(
                f"accelerate launch asks for torch.compile (ACCELERATE_DYNAMO_BACKEND={backend}), which is not "
                f"supported: {_REFUSED_ARGUMENTS['torch_compile']}. {_LAUNCH_ADVICE}"
            )
        # Imported late: it prints that W&B runs offline, which does not concern scripts without a tracker.
        from transformers.integrations import get_available_reporting_integrations

        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        installed = get_available_reporting_integrations()
        if trackers not in (["none"], ["all"]) and not set(trackers) <= set(installed):
            raise InputError(
                f"--report_to is {' '.join(trackers)}; expected none, all, or some of the installed trackers: "
                f"{', '.join(installed)}."
            )

    def _check_hub_model_id(self) -> None:
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            raise InputError(
                f"--hub_model_id is {self.hub_model_id!r}; expected owner/name, such as {PUBLISHED_REPO}."
            )

    def _check_there_is_something_to_train(self) -> None:
        if not self.num_train_epochs < float("inf"):
            raise InputError(f"--num_train_epochs is {self.num_train_epochs}; expected a number above 0.")
        if self.max_steps == 0 or self.num_train_epochs <= 0:
            raise InputError(
                f"--max_steps is {self.max_steps} and --num_train_epochs {self.num_train_epochs}: nothing to train. "
                "Give a positive number (--dry_run true shows the plan without training)."
            )

    def _check_the_schedule_follows_the_steps(self) -> None:
        if self.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
            name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise InputError(
                f"--lr_scheduler_type {name} depends on validations, which an interruption may "
                "postpone; such a run could not resume exactly. Choose one that depends on steps, such as linear."
            )

    def _check_the_last_step_is_saved(self) -> None:
        if self.save_strategy == SaveStrategy.BEST:
            raise InputError("--save_strategy best: the adapter is that of the last step. Choose steps, epoch or no.")

    def _check_noise_goes_with_the_batching(self) -> None:
        if self.neftune_noise_alpha is not None and self.batching == "shared_prefix":
            raise InputError(
                "--neftune_noise_alpha scales its noise by the length of a row, but a shared_prefix batch is one "
                "long row. Add --batching padded, or leave it out."
            )

    def _asks_for_fsdp(self) -> bool:
        """True for --fsdp, which is the Trainer's way to say --shard_base true; the Trainer then need not see it."""
        asked = self.fsdp is not None and str(self.fsdp).lower() not in ("", "false")
        if self.fsdp_config or (asked and str(self.fsdp).lower() not in ("true", "full_shard")):
            raise InputError(
                f"--fsdp is {self.fsdp!r}, --fsdp_config {self.fsdp_config!r}; expected --fsdp true alone, "
                "which means --shard_base true."
            )
        self.fsdp = None
        return asked

    def _check_sharding(self) -> None:
        if self.shard_base and self.world_size < 2:
            raise InputError(
                "--shard_base true needs several processes, and this launch has one. Launch with --config_file "
                "recipes/accelerate/fsdp2.yaml, or leave it out."
            )
        if self.shard_base and self.precision == "fp16":
            raise InputError("--shard_base true is not tested with fp16. Use --precision bf16 or fp32.")

    def _examples_per_pass(self, requested: int | None) -> int:
        """Return the examples per forward pass of one process; an optimizer step always has --global_batch_size."""
        parts = self.world_size * self.gradient_accumulation_steps
        examples, rest = divmod(self.global_batch_size, parts)
        if rest or examples == 0:
            raise InputError(
                f"--global_batch_size {self.global_batch_size} cannot be divided evenly among {self.world_size} "
                f"processes x {self.gradient_accumulation_steps} accumulation steps; expected a multiple of {parts}."
            )
        if requested not in (None, examples):
            raise InputError(
                f"--per_device_train_batch_size {requested} contradicts --global_batch_size {self.global_batch_size}: "
                f"with {self.world_size} processes and {self.gradient_accumulation_steps} accumulation steps it is "
                f"{examples}. Leave it out, or change --global_batch_size or --gradient_accumulation_steps."
            )
        return examples


# Settings that records keep because they determine the result. world_size is not a field: the launcher sets it.
RECIPE_ARGUMENTS = tuple(name for name, flag in flags_of(TrainConfig).items() if flag.affects == "recipe")
ROUNDING_ARGUMENTS = (
    "world_size",
    *(name for name, flag in flags_of(TrainConfig).items() if flag.affects == "rounding"),
)
RESULT_ARGUMENTS = (
    *RECIPE_ARGUMENTS,
    *(name for name, flag in flags_of(TrainConfig).items() if flag.affects == "compute"),
    *ROUNDING_ARGUMENTS,
)


def is_published_run(task: TaskConfig, model: ModelConfig, training: TrainConfig) -> bool:
    """True if data, prompt, base model, adapter and training settings are those of the published run."""
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    return (
        dataclasses.replace(task, dataset_revision=None) == TaskConfig()
        and dataclasses.replace(model, model_revision=None) == ModelConfig()
        and all(getattr(training, name) == defaults[name] for name in RECIPE_ARGUMENTS)
    )
