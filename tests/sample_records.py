"""Records of a small run, made by hand, as the scripts write them; dataclasses.replace makes others of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.data import make_examples
from tweetdora.device import Hardware
from tweetdora.record_versions import RECORD_VERSION
from tweetdora.records import (
    AdapterRecord,
    Baseline,
    Baselines,
    BaseModelCard,
    BaseModelRecord,
    Bootstrap,
    DataRecord,
    Difference,
    Environment,
    EvaluationRecord,
    GenerationRecord,
    GitState,
    Intervals,
    LabelMetrics,
    LengthBand,
    LikelihoodMetrics,
    MajorityBaseline,
    McNemar,
    MetricDifference,
    ModelMetrics,
    OtherClassifier,
    PredictionRecord,
    PromptFormat,
    ReliabilityBin,
    RunRecord,
    TrainDataRecord,
    TrainingResult,
    training_settings,
)
from tweetdora.train_config import TrainConfig

WORDS = ["bad", "good"]
BASE = BaseModelRecord("OuteAI/Lite-Oute-1-300M-Instruct", "a" * 40, "M", 1_000_000, None)
PROMPT = PromptFormat("h", "t", WORDS, "<|im_end|>", system_in_user_turn=False)
DATA: dict[str, Any] = {
    "name": "cardiffnlp/tweet_eval",
    "config": "sentiment",
    "revision": "b" * 40,
    "local": False,
    "sha256": "c",
    "skipped": {},
}
ENVIRONMENT = Environment(
    python="3.11.7",
    platform="Linux x86_64",
    packages={"torch": "2.13.0", "peft": "0.21.2"},
    hardware=Hardware("Fast CPU", 2, 8_000_000_000, []),
    git=GitState("e" * 40, dirty=False, changes_sha256=None),
)
LINES = (  # text, label, what the base wrote, what the fine-tuned model wrote, the label word in that
    ("first\nbad | row", "bad", "The tweet <b>", "good", "good"),
    ("fine", "good", "good", "good", "good"),
    ("awful", "bad", "", "bad", "bad"),
    ("so-so", "good", "hm", "bad\n\nralitive", "bad"),
    ("nice", "good", "", "The `tweet`", None),
)


def sample_predictions() -> list[PredictionRecord]:
    """Five answered examples."""
    return [
        PredictionRecord(
            number,
            text,
            label,
            GenerationRecord(base, None, False, [-3.0, -4.0]),
            GenerationRecord(tuned, found, True, [-0.1, -2.5]),
        )
        for number, (text, label, base, tuned, found) in enumerate(LINES)
    ]


def sample_run(**changes: Any) -> RunRecord:
    """A finished run."""
    training = TrainConfig(output_dir="runs/small", precision="fp32", report_to=[])
    run = RunRecord(
        name="small",
        status="finished",
        created="2026-11-25T10:00:00Z",
        command="accelerate launch train.py --max_steps 3",
        task=TaskConfig(label_words=WORDS, system_prompt='Say "bad" or "good".'),
        model=ModelConfig(),
        training=replace(training_settings(training), precision="bf16"),
        device="cpu",
        precision_reason="this CPU computes in bf16",
        max_new_tokens=16,
        hub_model_id=None,
        base_model=BASE,
        base_model_card=BaseModelCard(license="apache-2.0", language=["en"]),
        prompt_format=PROMPT,
        adapter=AdapterRecord(448_000, "f", "d"),
        train_data=TrainDataRecord(
            **DATA,
            split="train",
            num_examples=10_000,
            label_counts={"bad": 4_000, "good": 6_000},
            tokens=830_000,
            supervised_tokens=20_000,
            sequence_lengths={"shortest": 51, "median": 81, "95_percent": 96, "longest": 1024},
            truncated=7,
            first_texts={"bad": "so *sad*", "good": "joy"},
        ),
        validation_data=DataRecord(
            **DATA, split="validation", num_examples=200, label_counts={"bad": 90, "good": 110}
        ),
        steps=625,
        environment=ENVIRONMENT,
        result=TrainingResult(
            finished="2026-11-25T10:20:00Z",
            steps=625,
            seconds=754.2,
            train_loss=0.61234,
            peak_memory_bytes={"process": 2_700_000_000},
            log_history=[{"step": 1, "loss": 2.0}],
        ),
    )
    return replace(run, **changes)


def sample_metrics(macro_f1: float, matrix: list[list[int]], parse_rate: float = 1.0) -> ModelMetrics:
    """What was measured of one model."""
    return ModelMetrics(
        num_examples=5,
        macro_f1=macro_f1,
        macro_recall=0.375,
        accuracy=0.3331,
        parse_rate=parse_rate,
        exact_match=0.5,
        eos_rate=0.75,
        per_label={
            word: LabelMetrics(precision=0.5, recall=0.25 * (1 + number), f1=0.4, support=2 + number)
            for number, word in enumerate(WORDS)
        },
        confusion_matrix=matrix,
        intervals=Intervals(
            macro_f1=(0.1111, 0.8888),
            macro_recall=(0.2222, 0.7777),
            accuracy=(0.1, 0.9),
            per_label_f1=[(0.1234, 0.5678), (0.2345, 0.6789)],
        ),
        by_length=[
            LengthBand((4, 5), num_examples=3, accuracy=2 / 3, interval=(0.2077, 0.9385)),
            LengthBand((5, 1500), num_examples=2, accuracy=0.0, interval=(0.0, 0.6576)),
        ],
        seconds=1.5,
        samples_per_second=3.33,
        likelihood=sample_likelihood(macro_f1 + 0.01),
    )


def sample_likelihood(macro_f1: float) -> LikelihoodMetrics:
    """The scores of the most likely labels."""
    return LikelihoodMetrics(
        macro_f1=macro_f1,
        macro_recall=0.4,
        accuracy=0.6,
        intervals=Intervals((0.3, 0.6), (0.2, 0.5), (0.1, 0.9), per_label_f1=[(0.1, 0.5), (0.2, 0.6)]),
        log_loss=0.6543,
        log_loss_interval=(0.5, 0.8),
        calibration_error=0.0876,
        calibration_error_interval=(0.05, 0.2),
        bins=[ReliabilityBin((0.5, 0.6), num_examples=2, confidence=0.55, accuracy=0.5)],
        seconds=1.0,
        samples_per_second=5.0,
    )


def sample_evaluation(**changes: Any) -> EvaluationRecord:
    """The evaluation of `sample_run()` on the examples of `sample_predictions()`."""
    examples = make_examples([line[0] for line in LINES], [WORDS.index(line[1]) for line in LINES])
    data = {**DATA, "sha256": examples.sha256}
    evaluation = EvaluationRecord(
        created="2026-11-25T10:30:00Z",
        command="python evaluate.py runs/small",
        kind="run",
        split="test",
        data=DataRecord(**data, split="test", num_examples=5, label_counts={"bad": 2, "good": 3}),
        label_words=WORDS,
        precision="bf16",
        max_new_tokens=16,
        bootstrap=Bootstrap(10_000, 0),
        base_model=BASE,
        prompt_format=PROMPT,
        adapter_sha256="d",
        base=sample_metrics(0.0606, [[0, 0, 2], [0, 0, 3]], parse_rate=1 / 6),
        finetuned=sample_metrics(0.4646, [[1, 1, 0], [1, 1, 1]], parse_rate=4 / 5),
        difference=Difference(
            macro_f1=MetricDifference(0.404, (0.2, 0.6)),
            macro_recall=MetricDifference(0.1, (0.0, 0.2)),
            accuracy=MetricDifference(0.2, (0.1, 0.3)),
            mcnemar=McNemar(fixed=3, broken=1, p_value=0.625),
        ),
        baselines=Baselines(
            uniform=Baseline(0.5012, 0.5, 0.5),
            majority=MajorityBaseline(0.3337, 0.5, 0.5, label="good"),
            others=[
                OtherClassifier(
                    0.4444, 0.45, 0.46, name="VADER", version="vaderSentiment 3.3.2", macro_f1_interval=(0.3, 0.55)
                )
            ],
        ),
        environment=ENVIRONMENT,
        notes=[],
        corrections=[],
    )
    return replace(evaluation, **changes)


def write_run(folder: Path, **changes: Any) -> RunRecord:
    """Write `sample_run(**changes)` as a folder's run.json, by json alone; it is returned."""
    run = sample_run(**changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"record_version": RECORD_VERSION, **asdict(run)}))
    return run
