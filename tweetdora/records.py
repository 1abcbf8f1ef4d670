"""Records: files in which the scripts save what they did, so that nobody has to retype or guess it.

run.json                      RunRecord, written by train.py
evaluation/<split>.json       EvaluationRecord, written by evaluate.py; next to it, a PredictionRecord per example
<split>.predictions.json      CompactPredictions, for runs whose records a sweep keeps
publish/task.json             PublishedTask, next to the model that push_to_hub.py builds
publish.json                  PublishRecord, written by push_to_hub.py

Only this module writes and reads them. A file holds exactly the fields of its dataclass, and the version of these
dataclasses. Older versions can still be read: see `_from_version_2` and the functions after it.
"""

import dataclasses
import json
import os
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tweetdora.config import RUNS_DIR, ModelConfig, TaskConfig
from tweetdora.device import Hardware
from tweetdora.errors import InputError
from tweetdora.files import file_sha256, read_json, write_json
from tweetdora.train_config import RESULT_ARGUMENTS, TrainConfig

RECORD_VERSION = 10
RUN_FILE = "run.json"
TASK_FILE = "task.json"
ADAPTER_DIR = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHOWN_NAMES = {"base": "base", "finetuned": "fine-tuned"}  # of the measured models, for people
PREDICTIONS = "predictions.jsonl"
KEPT_PREDICTIONS = "predictions.json"  # the file's name after <split>.

Interval = tuple[float, float]  # 95 %
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Record = TypeVar("Record")


# Provenance


@dataclass(frozen=True)
class GitState:
    """The checkout's commit, and the SHA-256 of uncommitted changes to tracked code."""

    commit: str
    dirty: bool
    changes_sha256: str | None


@dataclass(frozen=True)
class Environment:
    """Libraries, machine and code."""

    python: str
    platform: str
    packages: dict[str, str]
    hardware: Hardware
    git: GitState | None


@dataclass(frozen=True)
class DataSource:
    """A split of a data set; `revision` is the commit on the Hub."""

    name: str
    config: str | None
    revision: str | None
    local: bool
    split: str

    @property
    def hub_id(self) -> str | None:
        """The data set's name if it came from the Hub; None for a local folder or file, even if it has since moved."""
        return self.name if _HUB_ID.fullmatch(self.name) and not self.local else None

    @property
    def display_name(self) -> str:
        """The data set's name to display: Hub id or folder name, and its configuration."""
        name = self.hub_id or folder_name(self.name)
        return f"{name} ({self.config})" if self.config else name


@dataclass(frozen=True)
class DataRecord(DataSource):
    """The examples of a split that were used; `sha256` covers their texts and labels.

    `skipped` counts the rows that --skip_bad_rows left out, by reason.
    """

    num_examples: int
    sha256: str
    label_counts: dict[str, int]  # by label word
    skipped: dict[str, int]


@dataclass(frozen=True)
class DataNote:
    """A sentence about the data that a reader of the scores should know; `split` is train, validation or test."""

    split: str
    text: str


@dataclass(frozen=True)
class TrainDataRecord(DataRecord):
    """The training examples, with counts from tokenizing them."""

    tokens: int
    supervised_tokens: int
    sequence_lengths: dict[str, int]  # shortest, median, 95_percent, longest; in tokens
    truncated: int  # texts that did not fit --max_length
    first_texts: dict[str, str]  # by label word


@dataclass(frozen=True)
class BaseModelRecord:
    """The identity of a base model: its commit on the Hub, or the SHA-256 of a local folder's weights."""

    name_or_path: str
    revision: str | None
    architecture: str
    parameters: int
    weights_sha256: dict[str, str] | None


@dataclass(frozen=True)
class BaseModelCard:
    """Metadata from the base model's own card, if it has one.

    For a local folder that is a conversion, `converted_from` is the Hub id of the original model, and
    `converted_file` the file that was converted. A card's `base_model` does not tell this: it names the parent of a
    fine-tuned model.
    """

    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None
    converted_from: str | None = None
    converted_file: str | None = None
    paper: str | None = None
    citation: str | None = None  # its first BibTeX entry


@dataclass(frozen=True)
class DatasetCard:
    """Metadata from the data set's own card, if it has one; `labels` is its text that names all labels."""

    license: str | list[str] | None = None
    paper: str | None = None
    citation: str | None = None
    labels: str | None = None


@dataclass(frozen=True)
class PromptFormat:
    """What a base model's chat template puts around a text, as plain strings.

    `head` and `tail` are the parts before and after the text, up to the start of the completion. `completions` are
    what the template writes for each label word, and `stop_token` is the token that it writes after one.
    """

    head: str
    tail: str
    completions: list[str]
    stop_token: str
    system_in_user_turn: bool

    def messages(self, system_prompt: str, text: str) -> list[dict[str, str]]:
        """The chat messages of a prompt, as apply_chat_template expects them."""
        return chat_messages(system_prompt, text, self.system_in_user_turn)


def chat_messages(system_prompt: str, text: str, system_in_user_turn: bool) -> list[dict[str, str]]:
    """The chat messages of a prompt; some templates take no system message."""
    if system_in_user_turn:
        return [{"role": "user", "content": f"{system_prompt}\n\n{text}"}]
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": text}]


# Training

if TYPE_CHECKING:
    TrainingSettings = Any
else:
    # A field for each flag that affects the result, as annotated in config.py.
    TrainingSettings = make_dataclass("TrainingSettings", [(name, Any) for name in RESULT_ARGUMENTS], frozen=True)


def training_settings(training: TrainConfig) -> TrainingSettings:
    """The training settings that affect the result, with enumerations as their flag values."""
    values = {name: getattr(training, name) for name in RESULT_ARGUMENTS}
    return TrainingSettings(**{name: getattr(value, "value", value) for name, value in values.items()})


@dataclass(frozen=True)
class AdapterRecord:
    """The adapter's size, and the SHA-256 of its random start and of its weights file once that is written."""

    trainable_parameters: int
    start_sha256: str
    sha256: str | None = None


@dataclass(frozen=True)
class TrackerRecord:
    """The W&B run; `url` is None if offline, `entity` is None for the user's default."""

    id: str
    mode: str
    url: str | None
    project: str
    entity: str | None


@dataclass(frozen=True)
class TrainingResult:
    """The result and cost of a finished training; `peak_memory_bytes` is by process: gpu0, …"""

    finished: str
    steps: int
    seconds: float
    train_loss: float
    peak_memory_bytes: dict[str, int]
    log_history: list[dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """A training: its settings, known before the first step, and its result."""

    name: str
    status: Literal["planned", "started", "interrupted", "diverged", "finished"]
    created: str
    command: str
    task: TaskConfig
    model: ModelConfig
    training: TrainingSettings
    device: str
    precision_reason: str
    max_new_tokens: int
    hub_model_id: str | None
    base_model: BaseModelRecord
    base_model_card: BaseModelCard
    prompt_format: PromptFormat
    adapter: AdapterRecord
    train_data: TrainDataRecord
    validation_data: DataRecord | None
    steps: int
    environment: Environment
    dataset_card: DatasetCard = dataclasses.field(default_factory=DatasetCard)
    notes: list[DataNote] = dataclasses.field(default_factory=list)
    mismatches: list[str] = dataclasses.field(default_factory=list)  # what had changed when the run was resumed
    tracker: TrackerRecord | None = None
    result: TrainingResult | None = None

    @property
    def base_hub_id(self) -> str | None:
        """The base model's Hub id; for a local folder, that of the model it was converted from, as its card says."""
        if not self.base_model.weights_sha256:  # recorded for local folders only
            return self.base_model.name_or_path
        name = self.base_model_card.converted_from or ""
        return name if _HUB_ID.fullmatch(name) else None

    @property
    def base_display_name(self) -> str:
        """The base model's Hub id, or its folder's name if it has none."""
        return self.base_hub_id or folder_name(self.base_model.name_or_path)


# Evaluation


@dataclass(frozen=True)
class LabelMetrics:
    """Scores of one label; `support` is the number of its examples."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True)
class Metrics:
    """The scores of generated answers.

    `parse_rate`: share that names a label word. `exact_match`: share that is a label word and nothing else.
    `eos_rate`: share that ended with a stop token. `confusion_matrix`: labels by predictions, unparsed answers last.
    """

    num_examples: int
    macro_f1: float
    macro_recall: float
    accuracy: float
    parse_rate: float
    exact_match: float
    eos_rate: float
    per_label: dict[str, LabelMetrics]
    confusion_matrix: list[list[int]]


@dataclass(frozen=True)
class Intervals:
    """95 % intervals of scores; `per_label_f1` is in the order of the label words."""

    macro_f1: Interval
    macro_recall: Interval
    accuracy: Interval
    per_label_f1: list[Interval]


@dataclass(frozen=True)
class LengthBand:
    """Accuracy on texts whose length is in a range; `characters` holds its ends."""

    characters: tuple[int, int]
    num_examples: int
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class ReliabilityBin:
    """Mean confidence and accuracy of the examples whose most likely label's probability is in a range."""

    probabilities: tuple[float, float]
    num_examples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class LikelihoodMetrics:
    """The scores of the most likely labels, which every example has, and of the labels' probabilities.

    `log_loss` is the mean negative logarithm of the correct label's probability; `calibration_error` the expected
    calibration error over `bins` (Guo et al., On Calibration of Modern Neural Networks, 2017).
    """

    macro_f1: float
    macro_recall: float
    accuracy: float
    intervals: Intervals
    log_loss: float
    log_loss_interval: Interval
    calibration_error: float
    calibration_error_interval: Interval
    bins: list[ReliabilityBin]
    seconds: float
    samples_per_second: float


@dataclass(frozen=True)
class ModelMetrics(Metrics):
    """All measurements of one model; `likelihood` is None in records of version 3 and older."""

    intervals: Intervals
    by_length: list[LengthBand]
    seconds: float
    samples_per_second: float
    likelihood: LikelihoodMetrics | None


@dataclass(frozen=True)
class Baseline:
    """The scores of a baseline."""

    macro_f1: float
    macro_recall: float
    accuracy: float


@dataclass(frozen=True)
class MajorityBaseline(Baseline):
    """The scores of always predicting the most frequent label."""

    label: str


@dataclass(frozen=True)
class OtherClassifier(Baseline):
    """The scores of another kind of classifier on the same examples; `version` is its package's."""

    name: str
    version: str
    macro_f1_interval: Interval


@dataclass(frozen=True)
class Baselines:
    """The baselines for every model; `others` are the classifiers whose packages were installed."""

    uniform: Baseline
    majority: MajorityBaseline
    others: list[OtherClassifier]


@dataclass(frozen=True)
class MetricDifference:
    """Fine-tuned minus base, on the same examples."""

    difference: float
    interval: Interval


@dataclass(frozen=True)
class McNemar:
    """The numbers of examples fixed and broken, and the exact test's p-value."""

    fixed: int
    broken: int
    p_value: float


@dataclass(frozen=True)
class Difference:
    """The fine-tuned model's gains over the base."""

    macro_f1: MetricDifference
    macro_recall: MetricDifference
    accuracy: MetricDifference
    mcnemar: McNemar


@dataclass(frozen=True)
class Bootstrap:
    """How the intervals were drawn."""

    samples: int
    seed: int


@dataclass(frozen=True)
class PriorCorrected:
    """The likelihood scores after prior correction (priors.py), and what it changed.

    Shares are by label word: `train_shares` among the training examples, `estimated_shares` among the measured
    examples, estimated from their texts by EM. `scores` and `difference` (corrected minus uncorrected) take the shares
    as fixed: their intervals are over examples only.
    """

    train_shares: dict[str, float]
    estimated_shares: dict[str, float]
    scores: LikelihoodMetrics
    difference: Difference


@dataclass(frozen=True)
class EvaluationRecord:
    """A measurement of a run or an adapter (`base` and `finetuned`), or of a model alone (`base`).

    `corrections` lists the data settings that were replaced for it (config.CORRECTIONS): name, old and new value.
    `base_measured` is the time of the earlier evaluation that the base's results come from (--base_results), if any.
    `max_length` is None if the record was written before version 10.
    `prior_corrected` is for the fine-tuned model; None if the label shares in its training are unknown.
    """

    created: str
    command: str
    kind: Literal["run", "adapter", "model"]
    split: str
    data: DataRecord
    label_words: list[str]
    precision: str
    max_new_tokens: int
    bootstrap: Bootstrap
    base_model: BaseModelRecord
    prompt_format: PromptFormat
    adapter_sha256: str | None
    base: ModelMetrics
    finetuned: ModelMetrics | None
    difference: Difference | None
    baselines: Baselines
    environment: Environment
    notes: list[DataNote]
    corrections: list[str]
    base_measured: str | None = None
    prior_corrected: PriorCorrected | None = None
    max_length: int | None = None

    @property
    def models(self) -> dict[str, ModelMetrics]:
        """The metrics by model name: base, and finetuned if there is one."""
        return {"base": self.base} | ({"finetuned": self.finetuned} if self.finetuned else {})

    @property
    def likelihoods(self) -> dict[str, LikelihoodMetrics]:
        """The label word likelihood metrics by model name; empty for older records."""
        return {name: found.likelihood for name, found in self.models.items() if found.likelihood is not None}


@dataclass(frozen=True)
class GenerationRecord:
    """A generation: its text, the label word found in it, and whether it ended with a stop token.

    `log_likelihoods` are those of each label word with its stop token, in the order of the label words; None if they
    were not measured.
    """

    text: str
    predicted: str | None
    stopped: bool
    log_likelihoods: list[float] | None


@dataclass(frozen=True)
class PredictionRecord:
    """The generations for one example; a line of predictions.jsonl."""

    example_id: int
    text: str
    label: str
    base: GenerationRecord
    finetuned: GenerationRecord | None


@dataclass(frozen=True)
class CompactPredictions:
    """The predictions for all examples without texts, kept with the records as <split>.predictions.json.

    Each of the last five fields is a line of numbers separated by spaces, one per example and in their order: ids of
    `label_words`, or -1 for an unparsed answer. The `likeliest` fields hold the labels of highest likelihood, and are
    empty if likelihoods were not measured. `finetuned` is empty if a model was measured alone.
    """

    split: str
    data_sha256: str
    adapter_sha256: str | None
    label_words: list[str]
    labels: str
    base: str
    finetuned: str
    base_likeliest: str
    finetuned_likeliest: str


def compact_predictions(lines: list[PredictionRecord], record: EvaluationRecord) -> CompactPredictions:
    """Reduce an evaluation's predictions to label ids, without texts."""
    ids = {word: number for number, word in enumerate(record.label_words)}

    def answers(found: list[GenerationRecord | None]) -> str:
        """The predicted label ids."""
        known = [answer for answer in found if answer is not None]
        return number_line(-1 if answer.predicted is None else ids[answer.predicted] for answer in known)

    def likeliest(found: list[GenerationRecord | None]) -> str:
        """The ids of the labels of highest likelihood."""
        known = [answer.log_likelihoods for answer in found if answer is not None and answer.log_likelihoods]
        return number_line(scores.index(max(scores)) for scores in known)

    base: list[GenerationRecord | None] = [line.base for line in lines]
    finetuned = [line.finetuned for line in lines]
    return CompactPredictions(
        split=record.split,
        data_sha256=record.data.sha256,
        adapter_sha256=record.adapter_sha256,
        label_words=record.label_words,
        labels=number_line(ids[line.label] for line in lines),
        base=answers(base),
        finetuned=answers(finetuned),
        base_likeliest=likeliest(base),
        finetuned_likeliest=likeliest(finetuned),
    )


def number_line(numbers: Iterable[int]) -> str:
    """Format numbers as CompactPredictions stores them; [*map(int, line.split())] reads them back."""
    return " ".join(map(str, numbers))


# Publishing


@dataclass(frozen=True)
class PublishedTask:
    """The task that a published model was trained for, so that evaluate.py needs no recipe."""

    task: TaskConfig
    prompt_format: PromptFormat
    max_new_tokens: int
    label_shares: list[float] | None = None  # among the training examples, in the order of the label words


@dataclass(frozen=True)
class Comparison:
    """How closely two models agree: equal answers, and the largest difference of the first token's logits."""

    num_examples: int
    equal_generations: int
    max_logit_difference: float


@dataclass(frozen=True)
class Conversion:
    """The published model in another format: its file, and how many of its answers equal the published model's."""

    format: str  # such as "GGUF q8_0"
    file: str
    engine: str  # the program that read it, with its version
    num_examples: int
    equal_generations: int


@dataclass(frozen=True)
class Published:
    """The state of the repository on the Hub."""

    repo_id: str
    commit: str
    url: str
    changed: bool  # False: the repository already held these files
    pull_request: str | None
    removed: list[str]
    left_alone: list[str]

    @property
    def revision(self) -> str:
        """The revision to read it at: a pull request's own name, else the commit."""
        return self.pull_request or self.commit


@dataclass(frozen=True)
class ReadBack(Comparison):
    """The result of reading the repository back; `files` of its files had equal hashes."""

    files: int


@dataclass(frozen=True)
class PublishRecord:
    """The Hub's state after a publish, and the result of reading it back; None if that has not been done yet."""

    created: str
    command: str
    published: Published
    read_back: ReadBack | None
    environment: Environment
    space: Published | None = None


# Writing and reading


def write_record(path: str, record: Any) -> None:
    """Write a record atomically: a reader finds either the old file or the complete new one."""
    write_json(path, {"record_version": RECORD_VERSION, **dataclasses.asdict(record)})


def read_record(kind: type[Record], path: str, oldest_version: int = 2) -> Record:
    """Read a record.

    Raises:
        InputError: the file is missing, is not JSON, has a version that cannot be read, or does not match `kind`.
    """
    value = read_json(path)
    version = value.pop("record_version", None) if isinstance(value, dict) else None
    if not isinstance(version, int) or not oldest_version <= version <= RECORD_VERSION:
        older = [str(number) for number in range(oldest_version, RECORD_VERSION)]
        read = f"{', '.join(older)} and {RECORD_VERSION}" if older else RECORD_VERSION
        raise InputError(
            f"{path} has record version {version}; this code reads version {read}. Use the version of "
            "tweetdora that wrote it, or create the record again."
        )
    if version == 2:
        value = _from_version_2(kind, value)
    if version <= 3:
        value = _from_version_3(kind, value)
    if version <= 4:
        value = _from_version_4(kind, value)
    if version <= 5:
        value = _from_version_5(kind, value)
    if version <= 6:
        value = _from_version_6(kind, value)
    if version <= 7:
        value = _from_version_7(kind, value)
    if version <= 8:
        value = _from_version_8(kind, value)
    if version <= 9:
        value = _from_version_9(kind, value)
    return decode(kind, value, path)


def write_predictions(path: str, predictions: Iterable[PredictionRecord]) -> None:
    """Write one JSON line per example."""
    with open(path, "w", encoding="utf-8") as stream:
        for prediction in predictions:
            stream.write(json.dumps(dataclasses.asdict(prediction), ensure_ascii=False) + "\n")


def read_predictions(path: str) -> list[PredictionRecord]:
    """Read the lines that write_predictions wrote, in order.

    Raises:
        InputError: the file is missing, or a line is invalid.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            lines = [json.loads(line) for line in stream]
    except FileNotFoundError:
        raise InputError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} has a line that is not JSON ({error}); the file was cut off.") from None
    if lines and "example_id" not in lines[0]:
        lines = [_from_version_2(PredictionRecord, line) for line in lines]
    lines = [_from_version_3(PredictionRecord, line) if _is_prediction(line) else line for line in lines]
    return [decode(PredictionRecord, line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _is_prediction(line: Any) -> bool:
    return isinstance(line, dict) and isinstance(line.get("base"), dict) and "finetuned" in line


def read_run(run_dir: str) -> RunRecord:
    """Read the record of a finished run.

    Raises:
        InputError: the folder is not a run folder, its training did not finish, or its adapter is missing or changed.
    """
    path = os.path.join(run_dir, RUN_FILE)
    if not os.path.isfile(path):
        runs = sorted(name for name in _folders(RUNS_DIR) if os.path.isfile(os.path.join(RUNS_DIR, name, RUN_FILE)))
        known = f"Run folders here: {', '.join(os.path.join(RUNS_DIR, name) for name in runs)}." if runs else ""
        why = f"it has no {RUN_FILE}" if os.path.isdir(run_dir) else "the folder does not exist"
        raise InputError(f"{run_dir} is not a run folder: {why}. Train first with train.py. {known}".rstrip())
    run = read_record(RunRecord, path)
    if run.status != "finished" or run.result is None:
        raise InputError(
            f"the run in {run_dir} is {run.status}, not finished. Resume it with its train.py command and "
            "--resume_from_checkpoint true."
        )
    weights = os.path.join(run_dir, ADAPTER_DIR, ADAPTER_WEIGHTS)
    if not os.path.isfile(weights):
        raise InputError(f"{weights} is missing, but the run record says that the run finished.")
    if file_sha256(weights) != run.adapter.sha256:
        raise InputError(f"{weights} is not the adapter that {path} describes: its SHA-256 differs.")
    return run


def run_status(run_dir: str) -> str | None:
    """The status of the run in a folder, for any record version; None if there is no record."""
    path = os.path.join(run_dir, RUN_FILE)
    return read_json(path)["status"] if os.path.exists(path) else None


def _folders(path: str) -> list[str]:
    return os.listdir(path) if os.path.isdir(path) else []


def folder_name(path: str) -> str:
    """The last part of a path, which is the only part to publish."""
    return os.path.basename(os.path.normpath(path))


def decode(kind: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to an object of type `kind`.

    >>> decode(Bootstrap, {"samples": 10, "seed": 0}, "test.json")
    Bootstrap(samples=10, seed=0)

    Raises:
        InputError: a field is missing, unknown or of the wrong type; the message names it by `where` and its path.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return decode(options[0], value, where)
        for option in options:
            if isinstance(value, get_origin(option) or option):
                return decode(option, value, where)
    elif origin is list and isinstance(value, list):
        return [decode(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    elif origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(decode(part, item, where) for part, item in zip(arguments, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif (
        kind is Any or (origin is Literal and value in arguments) or type(value) is kind
    ):  # type(), because True is an instance of int
        return value
    elif kind is float and type(value) is int:  # other programs write 1.0 as 1
        return float(value)
    expected = kind.__name__ if isinstance(kind, type) and origin is None else str(kind)
    raise InputError(f"{where} is {value!r}; expected {expected}. The file was changed, or other code wrote it.")


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints, names = get_type_hints(kind), [item.name for item in dataclasses.fields(kind)]
    for what, wrong in (("no", [*filter(lambda n: n not in value, names)]), ("unknown", [*value.keys() - {*names}])):
        if wrong:
            raise InputError(
                f"{where} has {what} {', '.join(sorted(wrong))}; expected exactly the fields of {kind.__name__}. The "
                "file was changed, or other code wrote it."
            )
    return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names})


# Names of record version 2 that have been renamed.
_RENAMED = {
    "after": "finetuned",
    "answer": "text",
    "answers": "completions",
    "base": "base_model",
    "base_card": "base_model_card",
    "before": "base",
    "changes": "mismatches",
    "class_counts": "label_counts",
    "cut_texts": "truncated",
    "equal_answers": "equal_generations",
    "eval_exact_rate": "eval_exact_match",
    "eval_stop_rate": "eval_eos_rate",
    "exact_rate": "exact_match",
    "examples": "first_texts",
    "n": "num_examples",
    "per_class": "per_label",
    "per_class_f1": "per_label_f1",
    "reference_lines": "baselines",
    "row": "example_id",
    "row_tokens": "sequence_lengths",
    "rows": "num_examples",
    "stop_rate": "eos_rate",
    "tweets_per_second": "samples_per_second",
}
_KEYED_BY_LABEL = ("class_counts", "examples", "per_class")  # whose keys are label words, and may equal a name above


def _from_version_2(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 2 to version 3: rename its fields, and fill those that it left out with None."""

    def rename(found: Any, by_label: bool = False) -> Any:
        """Rename the keys at every depth of `found`."""
        if isinstance(found, list):
            return [rename(item) for item in found]
        if not isinstance(found, dict):
            return found
        return {
            name if by_label else _RENAMED.get(name, name): rename(item, not by_label and name in _KEYED_BY_LABEL)
            for name, item in found.items()
        }

    new = rename(value)
    if kind is RunRecord:
        new = {"tracker": None, "result": None, **new}
        new["adapter"] = {"sha256": None, **new["adapter"]}
        new["base_model_card"] = dataclasses.asdict(BaseModelCard(**new["base_model_card"]))
        if new["training"]["batching"] == "packed":
            new["training"]["batching"] = "shared_prefix"
    if kind in (EvaluationRecord, PredictionRecord):
        if "base" not in new:  # version 2 called a model alone `after`
            new["base"] = new.pop("finetuned")
        new = {"finetuned": None, **({"difference": None} if kind is EvaluationRecord else {}), **new}
    return new


# Fields added in version 4 or 5, with the values that older records imply.
_NEW_IN_TASK = {
    "csv_delimiter": None,
    "encoding": None,
    "validation_share": 0.0,
    "test_share": 0.0,
    "split_seed": 42,
    "skip_bad_rows": False,
    "chat_template": None,
    "chat_template_kwargs": None,
}


_NEW_IN_5: dict[str, dict[str, Any]] = {"task": {"balance_labels": False}, "model": {"use_rslora": False}}


def _from_version_9(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 9 to version 10: add the new field."""
    if kind is EvaluationRecord:
        return {"max_length": None, **value}
    return value


def _from_version_8(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 8 to version 9: add the new field."""
    if kind is RunRecord:
        return {**value, "model": {**value["model"], "load_in_4bit": False}}
    return value


def _from_version_7(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 7 to version 8: add the new field."""
    if kind is RunRecord:
        return {**value, "training": {"shard_base": False, **value["training"]}}
    return value


def _from_version_6(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 6 to version 7: add the new fields."""
    if kind is RunRecord:
        card = {"paper": None, "citation": None, **value["base_model_card"]}
        return {"dataset_card": dataclasses.asdict(DatasetCard()), **value, "base_model_card": card}
    return value


def _from_version_5(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 5 to version 6: add the new fields."""
    if kind is EvaluationRecord:
        return {"prior_corrected": None, **value}
    if kind is PublishedTask:
        return {"label_shares": None, **value}
    return value


def _from_version_4(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 4 to version 5: add the new fields."""
    if kind is EvaluationRecord:
        return {"base_measured": None, **value}
    if kind is PublishRecord:
        return {"space": None, **value}
    return value | {name: {**new, **value[name]} for name, new in _NEW_IN_5.items() if name in value}


def _from_version_3(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of version 3 to version 4: add the new fields."""
    if kind is RunRecord:
        data = {name: value[name] and {"skipped": {}, **value[name]} for name in ("train_data", "validation_data")}
        return {"notes": [], **value, **data, "task": {**_NEW_IN_TASK, **value["task"]}}
    if kind is EvaluationRecord:
        models = {name: value[name] and {"likelihood": None, **value[name]} for name in ("base", "finetuned")}
        baselines = {"others": [], **value["baselines"]}
        data = {"skipped": {}, **value["data"]}
        return {"notes": [], "corrections": [], **value, **models, "baselines": baselines, "data": data}
    if kind is PredictionRecord:
        return value | {
            name: value[name] and {"log_likelihoods": None, **value[name]} for name in ("base", "finetuned")
        }
    return value
