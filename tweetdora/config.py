"""The settings of the scripts: dataclasses whose defaults are the published run, checked on creation.

They are not changed afterwards. Each field is a flag; its annotation may carry a Flag with more than type and help.

The settings of train.py are in train_config.py, because the Trainer's take seconds to import. This module imports
neither torch nor PEFT, so that --help and mistakes in the flags of the other scripts take two seconds.
"""

import codecs
import inspect
import json
import os
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from transformers import PreTrainedTokenizerBase

from tweetdora.errors import InputError

Precision = Literal["auto", "fp32", "bf16", "fp16"]  # "auto" only as a request
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
    prompt_of: str | None = field(
        default=None,
        metadata={
            "help": "Run folder whose prompt a model is asked with. It matters for chat templates that write the date."
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
        default=False,
        metadata={
            "help": "Skip and count unreadable rows; leave rows without usable text unlabelled. If false, refuse both."
        },
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
