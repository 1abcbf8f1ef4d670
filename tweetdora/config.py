"""The settings of the scripts: dataclasses whose defaults are the published run, checked on creation.

They are not changed afterwards. Each field is a flag; its annotation may carry a Flag with more than type and help.
"""

import codecs
import dataclasses
import inspect
import json
import os
import sys
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from tweetdora.device import Precision, decide_precision
from tweetdora.errors import InputError
from tweetdora.processes import check_launch, take_over_fsdp

PUBLISHED_REPO = "liuhailin0123/llm-course-hw3-dora"
RUNS_DIR = "runs"
MAX_NEW_TOKENS = 16  # enough for one label word and the stop token; a run's record holds its own value
PREDICTION_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # formats that predict.py writes
DEFAULT_RUN_DIR = os.path.join(RUNS_DIR, "llm-course-hw3-dora")


@dataclass(frozen=True)
class Range:
    """The numbers that a flag accepts; `form` describes them in messages."""

    form: str
    low: float
    high: float = float("inf")
    open_low: bool = False  # exclude `low` itself

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and value != float("inf")


AT_LEAST_0, AT_LEAST_1 = Range("0 or more", 0), Range("1 or more", 1)
ABOVE_0 = Range("a number above 0", 0, open_low=True)
SEED = Range(f"0 to {2**32 - 1}", 0, 2**32 - 1)  # NumPy's limits
SHARE = Range("a share, 0 to below 1", 0, 1 - 1e-9)


@dataclass(frozen=True)
class Flag:
    """Properties of a field beyond type, default and help text.

    `affects`: how another value changes the trained adapter. None: not at all. "recipe": a different adapter on any
    machine. "compute": a different way to compute it. "rounding": only its last digits, so a resumed run may use
    another value if the user allows it. Records keep all but the first kind.
    """

    affects: Literal["recipe", "compute", "rounding"] | None = None
    range: Range | None = None
    shown: bool = True  # in --help; --help_all shows all


def flags_of(config_class: type) -> dict[str, Flag]:
    """Return the Flag of each field that has one, by field name."""
    hints = get_type_hints(config_class, include_extras=True)
    marks = {name: getattr(hints.get(name), "__metadata__", ()) for name in hints}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, Flag)}


def check_text_form(csv_delimiter: str | None, encoding: str | None) -> None:
    """Refuse an invalid delimiter or encoding.

    Raises:
        InputError: names the flag.
    """
    if csv_delimiter is not None and (len(csv_delimiter) != 1 or csv_delimiter in '"\r\n'):
        raise InputError(
            f"--csv_delimiter is {csv_delimiter!r}; expected one character, neither a quote nor a line break."
        )
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise InputError(
            f"--encoding is {encoding!r}; expected an encoding that Python knows, such as utf-8, latin-1 or utf-16."
        ) from None


def check_ranges(config: Any) -> None:
    """Refuse numbers outside their flag's range.

    Raises:
        InputError: names the flag, the number and the range.
    """
    for name, flag in flags_of(type(config)).items():
        value = getattr(config, name)
        if flag.range is not None and value is not None and float(value) not in flag.range:
            raise InputError(f"--{name} is {value}; expected {flag.range.form}.")


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
    "torch_compile": "every batch has another shape and would be compiled anew",
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

SYSTEM_PROMPT = (
    "You are a tweet sentiment classifier. For each tweet input, analyze its sentiment and output exactly one word: "
    '"negative", "neutral", or "positive". Do not include any extra text.'
)


LABEL_WORDS = ("negative", "neutral", "positive")
# Arguments of apply_chat_template itself; all others are passed on to the template.
_RENDER_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "tools",
    "documents",
    "kwargs",
}


def make_system_prompt(label_words: list[str]) -> str:
    """Return a system prompt that asks for these words; for the published run's words, the published prompt."""
    if tuple(label_words) == LABEL_WORDS:
        return SYSTEM_PROMPT
    *first, last = (f'"{word}"' for word in label_words)
    return (
        f"Classify the text. Answer with exactly one of these words: {', '.join(first)} or {last}. Write nothing else."
    )


def normalize_label(text: str) -> str:
    """Normalise a text so that words that look alike compare equal: NFC, case-folded, stripped.

    Case folding may decompose characters again, so NFC is applied twice (Unicode 15, section 3.13, D145).
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).strip()


@dataclass(frozen=True)
class TaskConfig:
    """The task: data, label words, and the prompt that asks for one of them."""

    _argument_group_name: ClassVar[str] = "task"

    dataset_name: str = field(
        default="cardiffnlp/tweet_eval",
        metadata={"help": "Data set: Hub id, local data-set folder, or a .csv, .tsv, .json, .jsonl or .parquet file."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration (subset) of the data set. Default for cardiffnlp/tweet_eval: sentiment."},
    )
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the data set on the Hub. Default: the newest commit."},
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "Field delimiter of a .csv file. Default: a comma; in .tsv files a tab."}
    )
    encoding: str | None = field(
        default=None,
        metadata={
            "help": "Encoding of a .csv, .tsv, .json or .jsonl file, such as latin-1 or utf-16. Default: utf-8."
        },
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Split to train on. Slices such as train[:80%%] work; they keep the order."},
    )
    validation_split: str = field(
        default="validation", metadata={"help": "Split to validate on during training; slices work."}
    )
    test_split: str = field(default="test", metadata={"help": "Split that evaluate.py evaluates; slices work."})
    validation_share: Annotated[float, Flag(range=SHARE)] = field(
        default=0.0,
        metadata={"help": "Share of --train_split to hold out for validation, at random and stratified by label."},
    )
    test_share: Annotated[float, Flag(range=SHARE)] = field(
        default=0.0,
        metadata={"help": "Share of --train_split to hold out for testing, at random and stratified by label."},
    )
    split_seed: Annotated[int, Flag(range=SEED)] = field(
        default=42, metadata={"help": "Seed for --validation_share, --test_share and --balance_labels."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text to classify."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the label."})
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Skip and count rows without a text or with an unknown label. If false, refuse them."},
    )
    label_words: list[str] = field(
        default_factory=lambda: list(LABEL_WORDS),
        metadata={"help": "The answer for each label, in the order of the data set's labels."},
    )
    label_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "Values of the label column, in the order of --label_words, if it holds neither label ids nor "
            "the label words (for example: --label_values -1 0 1)."
        },
    )
    system_prompt: str = field(
        default="", metadata={"help": "System prompt that asks for one label word. Default: built from --label_words."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Name of the chat template, if the tokenizer has several. Default: the one named default."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Variables of the chat template, as JSON: \'{"reasoning_effort": "low"}\'. Thinking is off unless '
            "they turn it on."
        },
    )
    max_train_samples: int | None = field(
        default=10_000, metadata={"help": "Train on the first N examples of the train split; 0 for all."}
    )
    balance_labels: bool = field(
        default=False,
        metadata={
            "help": "Train on equally many examples of each label: repeat some of the rare ones and drop some of the "
            "frequent ones, at random. The total stays about the same."
        },
    )
    max_length: int = field(
        default=512,
        metadata={
            "help": "Maximum length of an example in tokens, answer included. Longer texts are truncated and counted."
        },
    )

    def __post_init__(self) -> None:
        # The only way to set fields of a frozen dataclass.
        if self.dataset_config is None and self.dataset_name == "cardiffnlp/tweet_eval":
            object.__setattr__(self, "dataset_config", "sentiment")
        if self.max_train_samples == 0:
            object.__setattr__(self, "max_train_samples", None)
        if not self.system_prompt.strip():
            object.__setattr__(self, "system_prompt", make_system_prompt(self.label_words))
        object.__setattr__(self, "chat_template_kwargs", _template_variables(self.chat_template_kwargs))
        check_ranges(self)
        self._check_shares()
        check_text_form(self.csv_delimiter, self.encoding)
        if self.max_train_samples is not None and self.max_train_samples < 0:
            raise InputError(
                f"--max_train_samples is {self.max_train_samples}; expected a positive number, or 0 for all."
            )
        folded = [normalize_label(word) for word in self.label_words]
        if len(folded) < 2 or len(set(folded)) < len(folded) or "" in folded:
            raise InputError(
                f"--label_words is {self.label_words}; expected at least two words that differ in more than case."
            )
        if self.label_values is not None and len(self.label_values) != len(self.label_words):
            raise InputError(
                f"--label_values has {len(self.label_values)} values and --label_words {len(self.label_words)} words; "
                "give one value per word, in the same order."
            )

    def _check_shares(self) -> None:
        if self.validation_share + self.test_share >= 1:
            raise InputError(
                f"--validation_share {self.validation_share:g} and --test_share {self.test_share:g} leave nothing to "
                "train on; expected less than 1 together."
            )
        for split in ("validation", "test"):
            share, name = getattr(self, f"{split}_share"), getattr(self, f"{split}_split")
            if share and name != split:
                raise InputError(
                    f"--{split}_share {share:g} takes a part of --train_split, but --{split}_split {name} is set too. "
                    "Leave one of them out."
                )


def _template_variables(given: Any) -> dict[str, Any] | None:
    """Return --chat_template_kwargs as a mapping.

    Raises:
        InputError: it is not a JSON object, or it names an argument that is not a template variable.
    """
    found = given
    if isinstance(given, str):
        try:
            found = json.loads(given)
        except ValueError as error:
            raise InputError(f"--chat_template_kwargs is {given!r}, which is not JSON ({error}).") from None
    if found is not None and not isinstance(found, dict):
        raise InputError(f'--chat_template_kwargs is {given!r}; expected a JSON object: {{"name": value}}.')
    if taken := sorted(_RENDER_ARGUMENTS & set(found or ())):
        raise InputError(
            f"--chat_template_kwargs sets {', '.join(taken)}, which tweetdora sets itself; expected variables of "
            "the template, such as enable_thinking."
        )
    return found or None


@dataclass(frozen=True)
class ModelConfig:
    """The base model and the adapter. The adapter's fields have PEFT's names."""

    _argument_group_name: ClassVar[str] = "model and adapter"

    model_name_or_path: str = field(
        default="OuteAI/Lite-Oute-1-300M-Instruct",
        metadata={"help": "Base model: a chat model's Hub id or local folder."},
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the base model on the Hub. Default: the newest commit."},
    )
    method: Literal["dora", "lora"] = field(default="dora", metadata={"help": "Adapter method."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "Numerator of the adapter's scale, lora_alpha / r."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by lora_alpha / sqrt(r) instead (rank-stabilized LoRA)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, from 0 to below 1."})
    target_modules: list[str] = field(
        default_factory=lambda: ["k_proj", "v_proj"],
        metadata={"help": "Names of the linear layers to adapt; all-linear: all except the head."},
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Quantise the base to 4 bits for the training (QDoRA, QLoRA), with bitsandbytes. The adapter is "
            "measured on, and merged into, the base as it is stored."
        },
    )

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise InputError(f"--r is {self.r} and --lora_alpha {self.lora_alpha}; both must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is {self.lora_dropout}; expected 0 or more, and below 1.")


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
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
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
    weight_decay: Annotated[float, Flag(affects="recipe")] = inherited("weight_decay")
    max_grad_norm: Annotated[float, Flag(affects="recipe")] = inherited("max_grad_norm")
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
        if not torch.cuda.is_available():
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
        if self.world_size > 1 and self.train_sampling_strategy not in ("random", "sequential"):
            raise InputError(
                f"--train_sampling_strategy {self.train_sampling_strategy} orders the examples differently for each "
                "number of processes. With several, choose random or sequential."
            )
        if requested not in (None, examples):
            raise InputError(
                f"--per_device_train_batch_size {requested} contradicts --global_batch_size {self.global_batch_size}: "
                f"with {self.world_size} processes and {self.gradient_accumulation_steps} accumulation steps it is "
                f"{examples}. Leave it out, or change --global_batch_size or --gradient_accumulation_steps."
            )
        return examples


# Settings of the task that an evaluation may replace; words, prompt and lengths belong to the model.
CORRECTIONS = (
    *("dataset_name", "dataset_config", "dataset_revision", "train_split", "validation_split", "test_split"),
    *("text_column", "label_column", "label_values", "csv_delimiter", "encoding", "skip_bad_rows"),
)


def _correction(what: str) -> Any:
    return field(
        default=None, metadata={"help": f"Replace the task's {what} for this evaluation; the record says so."}
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Flags of evaluate.py, besides the target."""

    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to evaluate."})
    max_eval_samples: Annotated[int | None, Flag(range=AT_LEAST_1)] = field(
        default=None, metadata={"help": "Evaluate only the first N examples of the split. Default: all."}
    )
    batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(default=128, metadata={"help": "Batch size."})
    max_new_tokens: Annotated[int | None, Flag(range=AT_LEAST_1)] = field(
        default=None,
        metadata={
            "help": "Maximum number of generated tokens per answer. Default: the run's own, otherwise "
            f"{MAX_NEW_TOKENS}."
        },
    )
    precision: Precision = field(
        default="auto",
        metadata={"help": "Compute precision. auto: the run's own, otherwise bf16 if the device supports it."},
    )
    bootstrap_samples: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=10_000, metadata={"help": "Bootstrap resamples for the 95 %% intervals."}
    )
    seed: Annotated[int, Flag(range=AT_LEAST_0)] = field(default=0, metadata={"help": "Seed for the bootstrap."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "Recipe with the task, if the target is not a run folder. Default: the published model's "
            "task.json, otherwise tweet_eval."
        },
    )
    # For data that moved, or other data with the same labels.
    dataset_name: str | None = _correction("data set")
    dataset_config: str | None = _correction("data-set configuration")
    dataset_revision: str | None = _correction("data-set revision")
    train_split: str | None = _correction("train split")
    validation_split: str | None = _correction("validation split")
    test_split: str | None = _correction("test split")
    text_column: str | None = _correction("text column")
    label_column: str | None = _correction("label column")
    label_values: list[str] | None = _correction("label values, in the order of the label words,")
    csv_delimiter: str | None = _correction(".csv delimiter")
    encoding: str | None = _correction("file encoding")
    skip_bad_rows: bool | None = _correction("choice to skip bad rows")
    base_results: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier evaluation. Reuse the base model's answers from it, if it is the same "
            "measurement."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the results. Default: <run folder>/evaluation, or runs/evaluations/<model or adapter>."
        },
    )
    report_to: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "Add the results to the run's W&B run, if it has one."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def corrections(self) -> dict[str, Any]:
        """The CORRECTIONS that are set, by name."""
        given = {name: getattr(self, name) for name in CORRECTIONS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class PredictConfig:
    """Flags of predict.py, besides model and input."""

    output: str | None = field(
        default=None,
        metadata={"help": "File to write: .csv, .tsv, .jsonl or .parquet. Default: standard output."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output if it exists."})
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column that holds the text. Default: that of the model's task, otherwise text."},
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "Field delimiter of a .csv file. Default: a comma; in .tsv files a tab."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of the input, such as latin-1 or utf-16. Default: utf-8."}
    )
    input_format: Literal["txt", "csv", "tsv", "jsonl"] = field(
        default="txt", metadata={"help": "Format of standard input; txt: one text per line."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count rows that cannot be read. If false, refuse them."}
    )
    prior_correction: Literal["none", "em"] = field(
        default="none",
        metadata={
            "help": "em: adapt the probabilities to the label shares in this file, which are estimated from its "
            "texts. For files whose labels are distributed differently than in training. Needs --output."
        },
    )
    batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(default=128, metadata={"help": "Batch size."})
    precision: Precision = field(
        default="auto",
        metadata={"help": "Compute precision. auto: the run's own, otherwise bf16 if the device supports it."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_text_form(self.csv_delimiter, self.encoding)
        ending = os.path.splitext(self.output or "")[1].lower()
        if self.output is not None and ending not in PREDICTION_ENDINGS:
            raise InputError(
                f"--output is {self.output}; expected a name that ends in {', '.join(PREDICTION_ENDINGS)}."
            )
        if self.output is None and self.prior_correction != "none":
            raise InputError("--prior_correction needs all rows before it can write one. Set --output.")


@dataclass(frozen=True)
class PushConfig:
    """Flags of push_to_hub.py, besides the run folder."""

    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, owner/name. Default: the one that the run names."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Build and verify the folder, push nothing."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "dtype of the published weights; the merge itself uses float32."}
    )
    adapter_only: bool = field(
        default=False, metadata={"help": "Publish only the adapter, for PEFT, instead of the merged model."}
    )
    gguf: Literal["none", "q8_0", "f16"] = field(
        default="none",
        metadata={"help": "Also publish a GGUF file, for llama.cpp and Ollama (needs requirements-gguf.txt)."},
    )
    llama_cpp: str = field(
        default=".llama.cpp",
        metadata={"help": "Folder of llama.cpp's converter, for --gguf; `make .llama.cpp` fetches it."},
    )
    onnx: bool = field(
        default=False,
        metadata={
            "help": "Also publish ONNX files, for transformers.js and onnxruntime (needs requirements-onnx.txt)."
        },
    )
    space: str | None = field(
        default=None, metadata={"help": "Also publish a demo page: a Space on the Hub, owner/name."}
    )
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, created if needed. Default: the main branch."}
    )
    tag: str | None = field(default=None, metadata={"help": "Tag for the commit, such as v1.0."})
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request, for a repository that you cannot write to."}
    )
    check_samples: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=32, metadata={"help": "Examples for the comparison of the saved model with the trained one."}
    )
    split: Literal["train", "validation", "test"] = field(
        default="test", metadata={"help": "Split whose evaluation goes on the card and whose examples are compared."}
    )
    sister_runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "More folders to search for runs that differ only in the seed. The card then shows "
            "the mean over seeds."
        },
    )
    allow_chance_level: bool = field(
        default=False, metadata={"help": "Publish a model that is no better than guessing."}
    )
    sample_ids: list[int] = field(
        default_factory=list,
        metadata={"help": "Example ids of the samples on the card. If unset, a rule chooses them."},
    )
    repository_url: str | None = field(
        default=None, metadata={"help": "Web address of your copy of this repository, for a link on the card."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence on the card. Default: the base model's, if its card names one."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder to build the model in: new, empty, or an earlier build. Default: <run folder>/publish."
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            raise InputError(f"--hub_model_id is {self.hub_model_id!r}; expected owner/name.")
        if self.adapter_only and self.dtype != "float32":
            raise InputError(f"--adapter_only true: adapters are float32; leave --dtype {self.dtype} out.")
        if self.repository_url is not None and not self.repository_url.startswith(("https://", "http://")):
            raise InputError(f"--repository_url is {self.repository_url!r}; expected a web address, https://….")
        if self.space is not None and self.space.count("/") != 1:
            raise InputError(f"--space is {self.space!r}; expected owner/name.")
        if self.space and (self.create_pr or self.revision):
            raise InputError(
                "--space cannot be combined with --create_pr or --revision: the page loads the model's main branch."
            )
        if self.space and self.private:
            raise InputError(
                "--space cannot be combined with --private true: the page has no token to load the model with."
            )
        if self.adapter_only and self.space:
            raise InputError("--adapter_only true: the demo page needs the merged model; leave --space out.")
        if self.adapter_only and (self.onnx or self.gguf != "none"):
            raise InputError(
                "--adapter_only true: GGUF and ONNX files need the merged model; leave --gguf and --onnx out."
            )
        if self.create_pr and (self.tag or self.revision or self.private):
            raise InputError(
                "--create_pr true cannot be combined with --tag, --revision or --private: a pull request has a branch "
                "of its own."
            )


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
