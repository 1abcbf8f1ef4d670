"""Records: files in which the scripts save what they did, so that nobody has to retype or guess it.

run.json                      RunRecord, written by train.py
evaluation/<split>.json       EvaluationRecord, written by evaluate.py; next to it, a PredictionRecord per example
<split>.predictions.json      CompactPredictions, for runs whose records a sweep keeps
publish/task.json             PublishedTask, next to the model that push_to_hub.py builds
publish.json                  PublishRecord, written by push_to_hub.py

A file holds exactly the fields of its dataclass and the version of all of them (predictions.jsonl: only the fields).
record_files.py writes and reads these files, and record_versions.py converts those of older versions.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, Literal

from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.device import Hardware
from tweetdora.files import folder_name
from tweetdora.train_config import RESULT_ARGUMENTS, TrainConfig

RUN_FILE = "run.json"
TASK_FILE = "task.json"
ADAPTER_DIR = "adapter"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHOWN_NAMES = {"base": "base", "finetuned": "fine-tuned"}  # of the measured models, for people
PREDICTIONS = "predictions.jsonl"
KEPT_PREDICTIONS = "predictions.json"  # the file's name after <split>.

Interval = tuple[float, float]  # 95 %
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    # A field for each flag that affects the result, as annotated in train_config.py.
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
    were not measured. `likeliest` is the most likely label word as the scores count it: of words that rounding made
    equally likely, it is greedy generation's choice (scoring.choose_labels). None in records older than version 11.
    """

    text: str
    predicted: str | None
    stopped: bool
    log_likelihoods: list[float] | None
    likeliest: str | None = None

    def likeliest_id(self, label_words: Sequence[str]) -> int:
        """The number of the most likely label word; without `likeliest`, the first one of highest likelihood."""
        if self.likeliest is not None:
            return label_words.index(self.likeliest)
        assert self.log_likelihoods is not None
        return self.log_likelihoods.index(max(self.log_likelihoods))


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
    `label_words`, or -1 for an unparsed answer. The `likeliest` fields hold the most likely labels, and are empty if
    likelihoods were not measured. `finetuned` is empty if a model was measured alone.
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
        """The ids of the most likely labels."""
        known = [answer for answer in found if answer is not None and answer.log_likelihoods]
        return number_line(answer.likeliest_id(record.label_words) for answer in known)

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
