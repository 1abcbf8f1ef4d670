"""The settings of a script: dataclasses whose defaults are the published run, each checked when it is made.

They are not changed afterwards. A field is a flag; what is known of it beside its type and help stands in its
annotation, as a Flag.
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

PUBLISHED_REPO = "liuhailin0123/llm-course-hw3-dora"
RUNS_DIR = "runs"
MAX_NEW_TOKENS = 16  # for one label word and the stop token; a run's own record says otherwise where it differs
PREDICTION_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")  # that predict.py writes
DEFAULT_RUN_DIR = os.path.join(RUNS_DIR, "llm-course-hw3-dora")


@dataclass(frozen=True)
class Range:
    """The numbers that a flag may be; `form` says it in a message."""

    form: str
    low: float
    high: float = float("inf")
    open_low: bool = False  # `low` itself is not among them

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        return above and value <= self.high and value != float("inf")


AT_LEAST_0, AT_LEAST_1 = Range("0 or more", 0), Range("1 or more", 1)
ABOVE_0 = Range("a number above 0", 0, open_low=True)
SEED = Range(f"0 to {2**32 - 1}", 0, 2**32 - 1)  # what NumPy takes
SHARE = Range("a share, 0 to below 1", 0, 1 - 1e-9)


@dataclass(frozen=True)
class Flag:
    """What a field is beside a type, a default and a help text.

    `affects`: what another value does to the adapter that a training makes. None: nothing. "recipe": it is another
    one, on whatever machine. "compute": it is computed otherwise. "rounding": its last digits differ, so a resumed run
    may have it otherwise where the user allows it. A record names all but the first.
    """

    affects: Literal["recipe", "compute", "rounding"] | None = None
    range: Range | None = None
    shown: bool = True  # in --help; --help_all shows all


def flags_of(config_class: type) -> dict[str, Flag]:
    """The Flag of each field that has one, by the field's name."""
    hints = get_type_hints(config_class, include_extras=True)
    marks = {name: getattr(hints.get(name), "__metadata__", ()) for name in hints}
    return {name: mark for name, found in marks.items() for mark in found if isinstance(mark, Flag)}


def check_text_form(csv_delimiter: str | None, encoding: str | None) -> None:
    """Refuse a delimiter or an encoding that no file can have.

    Raises:
        InputError: names the flag.
    """
    if csv_delimiter is not None and (len(csv_delimiter) != 1 or csv_delimiter in '"\r\n'):
        raise InputError(f"--csv_delimiter is {csv_delimiter!r}; expected one character, no quote and no line's end.")
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise InputError(
            f"--encoding is {encoding!r}; expected one that Python knows, such as utf-8, latin-1 or utf-16."
        ) from None


def check_ranges(config: Any) -> None:
    """Refuse numbers outside the range of their flag.

    Raises:
        InputError: names the flag, the number and the range.
    """
    for name, flag in flags_of(type(config)).items():
        value = getattr(config, name)
        if flag.range is not None and value is not None and float(value) not in flag.range:
            raise InputError(f"--{name} is {value}; expected {flag.range.form}.")


def inherited(name: str) -> Any:
    """A field of the Trainer's own arguments as it stands there, declared again to give it a Flag."""
    (found,) = (item for item in dataclasses.fields(TrainingArguments) if item.name == name)
    return field(default=found.default, metadata=found.metadata)


# Trainer arguments that would do something else here than they say, or contradict the record, each with the reason.
_ONE_WHOLE_MODEL = "adapter and checkpoints are written from a whole model in each process"
_REFUSED_ARGUMENTS = {
    "label_smoothing_factor": "the loss is plain cross-entropy",
    "average_tokens_across_devices": "the loss is always the mean over the answer tokens of all processes",
    "auto_find_batch_size": "a step always takes --global_batch_size examples; where memory runs out, raise "
    "--gradient_accumulation_steps",
    "accelerator_config": "how processes share the examples follows from --global_batch_size",
    "load_best_model_at_end": "the adapter is that of the last step, as record and card say",
    "metric_for_best_model": "the adapter is that of the last step, as record and card say",
    "save_only_model": "a run cannot go on from a checkpoint without its optimizer",
    "ignore_data_skip": "a resumed run would see examples twice and others never",
    "use_liger_kernel": "it replaces layers of the model, and evaluate.py would measure another one",
    "bf16_full_eval": "validation computes in --precision, as training does",
    "fp16_full_eval": "validation computes in --precision, as training does",
    "fsdp": _ONE_WHOLE_MODEL,
    "deepspeed": _ONE_WHOLE_MODEL,
    "parallelism_config": _ONE_WHOLE_MODEL,
    "torch_compile": "each batch has another shape, and would be compiled for itself",
}

# What `accelerate launch` puts into the environment, often from a config file of the machine that nobody remembers.
_REFUSED_LAUNCHES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
_LAUNCH_ADVICE = (
    "Launch with --config_file accelerate_config.yaml, or change the machine's own config by `accelerate config`."
)

SYSTEM_PROMPT = (
    "You are a tweet sentiment classifier. For each tweet input, analyze its sentiment and output exactly one word: "
    '"negative", "neutral", or "positive". Do not include any extra text.'
)


LABEL_WORDS = ("negative", "neutral", "positive")
# Arguments of apply_chat_template itself; what else it is given goes to the template.
_RENDER_ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "tools",
    "documents",
    "kwargs",
}


def make_system_prompt(label_words: list[str]) -> str:
    """A system prompt that asks for these words; for those of the published run the published one."""
    if tuple(label_words) == LABEL_WORDS:
        return SYSTEM_PROMPT
    *first, last = (f'"{word}"' for word in label_words)
    return (
        f"Classify the text. Answer with exactly one of these words: {', '.join(first)} or {last}. Write nothing else."
    )


def normalize_label(text: str) -> str:
    """A text in which words that look alike are alike: composed (NFC), without upper case, without spaces around.

    Folding may take a text apart again, so it is composed twice (Unicode 15, section 3.13, D145).
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold()).strip()


@dataclass(frozen=True)
class TaskConfig:
    """What is classified: data, label words and the prompt that asks for one of them."""

    _argument_group_name: ClassVar[str] = "task"

    dataset_name: str = field(
        default="cardiffnlp/tweet_eval",
        metadata={"help": "Data set: a Hub id, a local data-set folder, or one .csv, .json, .jsonl or .parquet file."},
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration (subset) of the data set; none: 'sentiment' for cardiffnlp/tweet_eval."},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the data set on the Hub; none: the newest."}
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "Character between the fields of a .csv file; none: a comma, in .tsv a tab."}
    )
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of a .csv, .tsv, .json or .jsonl file, such as latin-1 or utf-16; none: utf-8."},
    )
    train_split: str = field(
        default="train",
        metadata={"help": "Split to train on; slices such as train[:80%%] work, and are taken unshuffled, in order."},
    )
    validation_split: str = field(
        default="validation", metadata={"help": "Split to validate on while training; slices work, in order."}
    )
    test_split: str = field(
        default="test", metadata={"help": "Split that evaluate.py measures; slices work, in order."}
    )
    validation_share: Annotated[float, Flag(range=SHARE)] = field(
        default=0.0,
        metadata={"help": "Take this share of --train_split for validation: at random, with the labels' proportions."},
    )
    test_share: Annotated[float, Flag(range=SHARE)] = field(
        default=0.0,
        metadata={"help": "Take this share of --train_split for the test: at random, with the labels' proportions."},
    )
    split_seed: Annotated[int, Flag(range=SEED)] = field(
        default=42, metadata={"help": "Seed of --validation_share, --test_share and --balance_labels."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text to classify."})
    label_column: str = field(default="label", metadata={"help": "Column that holds the label."})
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out, and count, rows without a text or with an unknown label; false: refuse them."},
    )
    label_words: list[str] = field(
        default_factory=lambda: list(LABEL_WORDS),
        metadata={"help": "The answer for each label, in the order of the data set's labels."},
    )
    label_values: list[str] | None = field(
        default=None,
        metadata={
            "help": "Values of the label column in the order of --label_words, where it holds neither label ids "
            "nor the label words themselves (for example: --label_values -1 0 1)."
        },
    )
    system_prompt: str = field(
        default="", metadata={"help": "System prompt that asks for one label word; empty: made from --label_words."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Name of the chat template, for a tokenizer with several; none: the one called default."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Variables of the chat template, as JSON: \'{"reasoning_effort": "low"}\'. Thinking is off anyway.'
        },
    )
    max_train_samples: int | None = field(
        default=10_000, metadata={"help": "Train on the first N examples of the train split; 0: all."}
    )
    balance_labels: bool = field(
        default=False,
        metadata={
            "help": "Train on as many examples of each label: of rare ones some are taken again, of frequent ones "
            "some left out, at random; altogether as many as before."
        },
    )
    max_length: int = field(
        default=512,
        metadata={"help": "Longest example in tokens, answer included; a longer text is truncated, and counted."},
    )

    def __post_init__(self) -> None:
        # A frozen dataclass is filled in this way while it is made.
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
            raise InputError(f"--max_train_samples is {self.max_train_samples}; give a positive number, or 0 for all.")
        folded = [normalize_label(word) for word in self.label_words]
        if len(folded) < 2 or len(set(folded)) < len(folded) or "" in folded:
            raise InputError(
                f"--label_words is {self.label_words}; expected at least two words that differ in more than case."
            )
        if self.label_values is not None and len(self.label_values) != len(self.label_words):
            raise InputError(
                f"--label_values has {len(self.label_values)} values and --label_words {len(self.label_words)} words; "
                "give one value for each word, in the same order."
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
                    f"--{split}_share {share:g} is a part of --train_split, but --{split}_split {name} is given too. "
                    "Leave one of them out."
                )


def _template_variables(given: Any) -> dict[str, Any] | None:
    """--chat_template_kwargs as a mapping.

    Raises:
        InputError: it is no JSON object, or names an argument that is no variable of templates.
    """
    found = given
    if isinstance(given, str):
        try:
            found = json.loads(given)
        except ValueError as error:
            raise InputError(f"--chat_template_kwargs is {given!r}, which is no JSON ({error}).") from None
    if found is not None and not isinstance(found, dict):
        raise InputError(f'--chat_template_kwargs is {given!r}; expected a JSON object: {{"name": value}}.')
    if taken := sorted(_RENDER_ARGUMENTS & set(found or ())):
        raise InputError(
            f"--chat_template_kwargs sets {', '.join(taken)}, which is decided here; expected variables of the "
            "template, such as enable_thinking."
        )
    return found or None


@dataclass(frozen=True)
class ModelConfig:
    """Which model is tuned, and how the adapter is made. The adapter's fields have PEFT's own names."""

    _argument_group_name: ClassVar[str] = "model and adapter"

    model_name_or_path: str = field(
        default="OuteAI/Lite-Oute-1-300M-Instruct",
        metadata={"help": "Base model: Hub id or local folder of a chat model."},
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base model on the Hub; none: the newest."}
    )
    method: Literal["dora", "lora"] = field(default="dora", metadata={"help": "Adapter method."})
    r: int = field(default=8, metadata={"help": "Rank of the adapter matrices."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale the adapter by lora_alpha / sqrt(r) instead (rank-stabilized LoRA)."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, 0 to below 1."})
    target_modules: list[str] = field(
        default_factory=lambda: ["k_proj", "v_proj"],
        metadata={"help": "Names of the linear layers that get an adapter; all-linear: every one but the head."},
    )

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha < 1:
            raise InputError(f"--r is {self.r} and --lora_alpha {self.lora_alpha}; both must be 1 or more.")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is {self.lora_dropout}; expected 0 or more, and below 1.")


@dataclass
class TrainConfig(TrainingArguments):
    """The Trainer's own arguments with this project's defaults, and a few fields the Trainer does not have."""

    _argument_group_name: ClassVar[str] = "training (transformers.TrainingArguments; --help_all lists the rest)"

    output_dir: str = field(
        default=DEFAULT_RUN_DIR, metadata={"help": "Run folder; adapter, run.json and checkpoints go there."}
    )
    learning_rate: Annotated[float, Flag(affects="recipe", range=Range("a number, 0 or more", 0))] = field(
        default=3e-5, metadata={"help": "Peak learning rate of AdamW."}
    )
    num_train_epochs: Annotated[float, Flag(affects="recipe")] = field(
        default=1.0, metadata={"help": "Passes over the training examples."}
    )
    global_batch_size: Annotated[int, Flag(affects="recipe", range=AT_LEAST_1)] = field(
        default=16,
        metadata={"help": "Examples in one optimizer step, over all processes and accumulation steps together."},
    )
    per_device_train_batch_size: Annotated[int | None, Flag(shown=False)] = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Examples in one forward pass of one process. It follows from --global_batch_size, the number of "
            "processes and --gradient_accumulation_steps; a different value is refused."
        },
    )
    batching: Annotated[Literal["shared_prefix", "padded"], Flag(affects="rounding")] = field(
        default="shared_prefix",
        metadata={
            "help": "shared_prefix: what all prompts begin with is computed once; padded: each alone, the same loss."
        },
    )
    precision: Annotated[Precision, Flag(affects="compute")] = field(
        default="auto",
        metadata={"help": "Compute precision. auto: what accelerate launch says, else bf16 where the device has it."},
    )
    cpu_threads: Annotated[int, Flag(range=AT_LEAST_0)] = field(
        default=0, metadata={"help": "Threads of one process on the CPU; 0: all cores, shared between the processes."}
    )
    max_eval_samples: Annotated[int, Flag(range=AT_LEAST_0)] = field(
        default=200, metadata={"help": "First N validation examples to answer by generation while training; 0: none."}
    )
    eval_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=100, metadata={"help": "Validate every N steps; below 1: a share of all steps."}
    )
    max_new_tokens: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=MAX_NEW_TOKENS, metadata={"help": "Longest generated answer, in tokens."}
    )
    logging_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=10,
        metadata={"help": "Log loss, learning rate and speed every N steps; below 1: a share of all steps."},
    )
    save_steps: Annotated[float, Flag(range=ABOVE_0)] = field(
        default=100, metadata={"help": "Write a checkpoint every N steps; below 1: a share of all steps."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    per_device_eval_batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=128, metadata={"help": "Examples answered or scored at once."}
    )
    max_steps: Annotated[int, Flag(affects="recipe")] = field(
        default=-1, metadata={"help": "Stop after N optimizer steps, whatever --num_train_epochs says; -1: do not."}
    )
    gradient_accumulation_steps: Annotated[int, Flag(affects="rounding", range=AT_LEAST_1)] = field(
        default=1,
        metadata={"help": "Passes of an optimizer step; --global_batch_size examples are shared out over them."},
    )
    run_name: str | None = field(
        default=None, metadata={"help": "Name of the run in its record and in W&B; none: the run folder's name."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "true: go on from the newest whole checkpoint of --output_dir; or a checkpoint folder."},
    )
    allow_mismatch: list[str] = field(
        default_factory=list,
        metadata={"help": "What may differ in a resumed run, by the names that its refusal gives."},
    )
    report_to: list[str] = field(
        default_factory=lambda: ["wandb"],
        metadata={"help": "Trackers; wandb runs offline when there is no login. none: no tracker."},
    )
    logging_nan_inf_filter: Annotated[bool, Flag(shown=False)] = field(
        default=False, metadata={"help": "Hide NaN losses from the log."}
    )
    disable_tqdm: bool | None = field(
        default=None, metadata={"help": "No progress bar; unset: none where the output is not a terminal."}
    )
    remove_unused_columns: Annotated[bool, Flag(shown=False)] = field(
        default=False, metadata={"help": "The collator needs all columns."}
    )
    ddp_find_unused_parameters: Annotated[bool | None, Flag(shown=False)] = field(
        default=False, metadata={"help": "Every adapter weight gets a gradient, so there is nothing to look for."}
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={
            "help": "Where push_to_hub.py publishes: owner/name. A run of the published recipe has "
            f"{PUBLISHED_REPO} as default."
        },
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Load and check everything, print the plan and one row, and stop."}
    )
    # The Trainer's own, as they are: declared again for their flags.
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
    # Decided here, not given: what the precision is and why.
    precision_reason: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._refuse_what_is_not_ours()
        check_ranges(self)
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
        # bf16 is mixed precision without autocast: the frozen base is held in bf16, the adapter in float32, and PEFT
        # casts between them. Autocast would cast at every operation (2.6 s against 1.5 s a step on two CPU cores).
        # fp16 needs autocast and the loss scaling that come with the Trainer's flag.
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
        self.mixed_precision = "fp16" if self.fp16 else "no"
        # Started by plain `python`, the Trainer would wrap the model in DataParallel on several GPUs, which splits
        # examples that belong together and is slower than one process for each GPU.
        self.visible_gpus = self._n_gpu
        self._n_gpu = min(self._n_gpu, 1)
        self.per_device_train_batch_size = self._examples_per_pass(batch_size)

    def _refuse_what_is_not_ours(self) -> None:
        """Flags of the Trainer that do not fit this script."""
        if self.push_to_hub:
            raise InputError("--push_to_hub is not train.py's: train first, then python push_to_hub.py publishes.")
        if self.hub_token is not None:
            raise InputError("--hub_token: a token in a flag ends up in logs; set HF_TOKEN or run `hf auth login`.")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) not in ("no", "steps"):
            raise InputError(
                "--eval_strategy: --max_eval_samples (0: none) and --eval_steps ask for validation; leave it out."
            )
        fields = {item.name: item for item in dataclasses.fields(self)}
        for name, reason in _REFUSED_ARGUMENTS.items():
            if (value := getattr(self, name)) not in (fields[name].default, None, ""):
                raise InputError(f"--{name} is {value!r}, which does not fit here: {reason}. Leave it out.")
        for name, what in _REFUSED_LAUNCHES.items():
            if os.environ.get(name, "").lower() in ("true", "1"):
                raise InputError(
                    f"accelerate launch asks for {what} ({name}), which does not fit here: {_ONE_WHOLE_MODEL}. "
                    f"{_LAUNCH_ADVICE}"
                )
        backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
        if backend.lower() != "no":
            raise InputError(
                f"accelerate launch asks for torch.compile (ACCELERATE_DYNAMO_BACKEND={backend}), which does not fit "
                f"here: {_REFUSED_ARGUMENTS['torch_compile']}. {_LAUNCH_ADVICE}"
            )
        # Imported late: it says that W&B runs offline, which scripts without a tracker need not hear.
        from transformers.integrations import get_available_reporting_integrations

        trackers = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        installed = get_available_reporting_integrations()
        if trackers not in (["none"], ["all"]) and not set(trackers) <= set(installed):
            raise InputError(
                f"--report_to is {' '.join(trackers)}; expected none, all, or some of the trackers that are installed "
                f"here: {', '.join(installed)}."
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
                f"--lr_scheduler_type {name} follows the validations, one of which a stop may "
                "put off; such a run would not go on as it was. Choose one that follows the steps, such as linear."
            )

    def _check_the_last_step_is_saved(self) -> None:
        if self.save_strategy == SaveStrategy.BEST:
            raise InputError("--save_strategy best: the adapter is that of the last step. Give steps, epoch or no.")

    def _check_noise_goes_with_the_batching(self) -> None:
        if self.neftune_noise_alpha is not None and self.batching == "shared_prefix":
            raise InputError(
                "--neftune_noise_alpha: its noise is scaled by the length of a row of a batch, and a shared_prefix "
                "batch is one long row. Add --batching padded, or leave it out."
            )

    def _examples_per_pass(self, requested: int | None) -> int:
        """Examples of one forward pass of one process: an optimizer step always sees --global_batch_size of them."""
        parts = self.world_size * self.gradient_accumulation_steps
        examples, rest = divmod(self.global_batch_size, parts)
        if rest or examples == 0:
            raise InputError(
                f"--global_batch_size {self.global_batch_size} cannot be shared evenly by {self.world_size} processes "
                f"x {self.gradient_accumulation_steps} accumulation steps; give a multiple of {parts}."
            )
        if requested not in (None, examples):
            raise InputError(
                f"--per_device_train_batch_size {requested} contradicts --global_batch_size {self.global_batch_size}: "
                f"with {self.world_size} processes and {self.gradient_accumulation_steps} accumulation steps it is "
                f"{examples}. Leave it out, or change --global_batch_size or --gradient_accumulation_steps."
            )
        return examples


# What a measurement may have otherwise than the task that was trained; words, prompt and lengths belong to the model.
CORRECTIONS = (
    *("dataset_name", "dataset_config", "dataset_revision", "train_split", "validation_split", "test_split"),
    *("text_column", "label_column", "label_values", "csv_delimiter", "encoding", "skip_bad_rows"),
)


def _correction(what: str) -> Any:
    return field(default=None, metadata={"help": f"Measure with another {what} than the task's; it is recorded."})


@dataclass(frozen=True)
class EvaluateConfig:
    """Flags of evaluate.py beside the target."""

    split: Literal["train", "validation", "test"] = field(
        default="test", metadata={"help": "Which of the task's splits to answer."}
    )
    max_eval_samples: Annotated[int | None, Flag(range=AT_LEAST_1)] = field(
        default=None, metadata={"help": "Measure the first N examples of the split only; none: all."}
    )
    batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=128, metadata={"help": "Examples answered at once."}
    )
    max_new_tokens: Annotated[int | None, Flag(range=AT_LEAST_1)] = field(
        default=None,
        metadata={"help": f"Longest generated answer, in tokens; none: the run's own, else {MAX_NEW_TOKENS}."},
    )
    precision: Precision = field(
        default="auto",
        metadata={"help": "Compute precision; auto: the run's own, else bf16 where the device has it."},
    )
    bootstrap_samples: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=10_000, metadata={"help": "Resamples behind the 95 %% intervals."}
    )
    seed: Annotated[int, Flag(range=AT_LEAST_0)] = field(default=0, metadata={"help": "Seed of the bootstrap."})
    config: str | None = field(
        default=None,
        metadata={
            "help": "Recipe that names the task, for a target that is not a run folder; none: the task.json beside a "
            "published model, else tweet_eval."
        },
    )
    # Where the target's own task no longer fits: data that lie elsewhere, or other data for the same labels.
    dataset_name: str | None = _correction("data set")
    dataset_config: str | None = _correction("configuration of the data set")
    dataset_revision: str | None = _correction("revision of the data set")
    train_split: str | None = _correction("train split")
    validation_split: str | None = _correction("validation split")
    test_split: str | None = _correction("test split")
    text_column: str | None = _correction("text column")
    label_column: str | None = _correction("label column")
    label_values: list[str] | None = _correction("list of label values, in the order of the label words,")
    csv_delimiter: str | None = _correction("delimiter in a .csv file")
    encoding: str | None = _correction("encoding of a file")
    skip_bad_rows: bool | None = _correction("choice on bad rows")
    base_results: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier evaluation: take the base model's answers from there, if it is the same "
            "measurement, instead of answering again."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where results go; none: <run folder>/evaluation, or runs/evaluations/<model or adapter>."},
    )
    report_to: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "Add the results to the training run's W&B run, if it has one."}
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def corrections(self) -> dict[str, Any]:
        """What is given of CORRECTIONS, by name."""
        given = {name: getattr(self, name) for name in CORRECTIONS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class PredictConfig:
    """Flags of predict.py beside model and input."""

    output: str | None = field(
        default=None,
        metadata={"help": "File to write: .csv, .tsv, .jsonl or .parquet; none: standard output."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output if it is there."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column that holds the text; none: that of the model's own task, else text."}
    )
    csv_delimiter: str | None = field(
        default=None, metadata={"help": "Character between the fields of a .csv file; none: a comma, in .tsv a tab."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of the input, such as latin-1 or utf-16; none: utf-8."}
    )
    input_format: Literal["txt", "csv", "tsv", "jsonl"] = field(
        default="txt", metadata={"help": "What comes from standard input; txt: a text in each line."}
    )
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Leave out, and count, rows that cannot be read; false: refuse them."}
    )
    prior_correction: Literal["none", "em"] = field(
        default="none",
        metadata={
            "help": "em: correct the probabilities for the shares of the labels in this file, as estimated from its "
            "texts; for a file whose labels are not as frequent as those in training. Needs --output."
        },
    )
    batch_size: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=128, metadata={"help": "Texts classified at once."}
    )
    precision: Precision = field(
        default="auto",
        metadata={"help": "Compute precision; auto: the run's own, else bf16 where the device has it."},
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
            raise InputError("--prior_correction needs all rows before it writes one. Give an --output.")


@dataclass(frozen=True)
class PushConfig:
    """Flags of push_to_hub.py beside the run folder."""

    hub_model_id: str | None = field(
        default=None, metadata={"help": "Repository on the Hub, owner/name; none: the one the run names."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Build and verify the folder, push nothing."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Number format of the published weights; merging is always in float32."}
    )
    adapter_only: bool = field(
        default=False, metadata={"help": "Publish the adapter alone, for PEFT, in place of the merged model."}
    )
    gguf: Literal["none", "q8_0", "f16"] = field(
        default="none",
        metadata={"help": "Publish a GGUF file too, for llama.cpp and Ollama (needs requirements-gguf.txt)."},
    )
    llama_cpp: str = field(
        default=".llama.cpp", metadata={"help": "Folder with llama.cpp's converter, for --gguf; `make .llama.cpp`."}
    )
    onnx: bool = field(
        default=False,
        metadata={
            "help": "Publish ONNX files too, for transformers.js and onnxruntime (needs requirements-onnx.txt)."
        },
    )
    space: str | None = field(
        default=None, metadata={"help": "Publish a page to try the model on too: a Space of the Hub, owner/name."}
    )
    private: bool = field(default=False, metadata={"help": "Make new repositories private."})
    revision: str | None = field(
        default=None, metadata={"help": "Branch to commit to, made if it is not there; none: the default one."}
    )
    tag: str | None = field(default=None, metadata={"help": "Tag to put on the commit, such as v1.0."})
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request, in a repository that one may not write to."}
    )
    check_samples: Annotated[int, Flag(range=AT_LEAST_1)] = field(
        default=32, metadata={"help": "Examples on which the saved model is compared with the adapter model."}
    )
    split: Literal["train", "validation", "test"] = field(
        default="test", metadata={"help": "Split whose evaluation goes on the card, and whose examples are compared."}
    )
    sister_runs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Folders to look in, beside the run's own, for runs that differ in the seed alone; the card says "
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
        default=None, metadata={"help": "Licence on the card; none: the base model's, where its card names one."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to build, new, empty or an earlier build; none: <run folder>/publish."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.hub_model_id is not None and self.hub_model_id.count("/") != 1:
            raise InputError(f"--hub_model_id is {self.hub_model_id!r}; expected owner/name.")
        if self.adapter_only and self.dtype != "float32":
            raise InputError(f"--adapter_only true: an adapter is float32; leave --dtype {self.dtype} out.")
        if self.repository_url is not None and not self.repository_url.startswith(("https://", "http://")):
            raise InputError(f"--repository_url is {self.repository_url!r}; expected a web address, https://….")
        if self.space is not None and self.space.count("/") != 1:
            raise InputError(f"--space is {self.space!r}; expected owner/name.")
        if self.space and (self.create_pr or self.revision):
            raise InputError(
                "--space goes with neither --create_pr nor --revision: the page loads the model's default branch."
            )
        if self.space and self.private:
            raise InputError(
                "--space goes with no --private true: the page has no token, and could not load the model."
            )
        if self.adapter_only and self.space:
            raise InputError("--adapter_only true: the page is for a whole model; leave --space out.")
        if self.adapter_only and (self.onnx or self.gguf != "none"):
            raise InputError(
                "--adapter_only true: GGUF and ONNX files hold a whole model; leave --gguf and --onnx out."
            )
        if self.create_pr and (self.tag or self.revision or self.private):
            raise InputError(
                "--create_pr true goes with none of --tag, --revision and --private: a pull request has its own."
            )


# The settings that a record keeps, as all of them make the result. world_size is no field: the launcher decides it.
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
    """Whether data, prompt, base model, adapter and training settings are those of the published run."""
    defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
    return (
        dataclasses.replace(task, dataset_revision=None) == TaskConfig()
        and dataclasses.replace(model, model_revision=None) == ModelConfig()
        and all(getattr(training, name) == defaults[name] for name in RECIPE_ARGUMENTS)
    )
