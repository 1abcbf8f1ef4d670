"""Records: what their dataclasses say and nothing else, read back as they were written, the version before too."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from sample_records import ENVIRONMENT, sample_evaluation, sample_predictions, sample_run, write_run

from bench.record import read_bench
from tweetdora.config import flags_of
from tweetdora.errors import InputError
from tweetdora.record_files import (
    decode,
    read_predictions,
    read_record,
    read_run,
    run_status,
    write_predictions,
    write_record,
)
from tweetdora.record_versions import RECORD_VERSION
from tweetdora.records import (
    KEPT_PREDICTIONS,
    Bootstrap,
    CompactPredictions,
    EvaluationRecord,
    LengthBand,
    PredictionRecord,
    Published,
    PublishedTask,
    PublishRecord,
    ReadBack,
    RunRecord,
    TrackerRecord,
    compact_predictions,
    training_settings,
)
from tweetdora.train_config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TRACKER = TrackerRecord("id", "online", "https://wandb.test/id", "tweetdora", None)
PUBLISHED = PublishRecord(
    created="2026-11-25T11:00:00Z",
    command="python push_to_hub.py runs/small",
    published=Published("me/small", "f" * 40, "https://hub.test/me/small", True, None, ["old.json"], []),
    read_back=ReadBack(num_examples=32, equal_generations=32, max_logit_difference=0.0, files=12),
    environment=ENVIRONMENT,
)
RECORDS = [
    sample_run(),
    sample_run(status="started", result=None, tracker=TRACKER, validation_data=None, mismatches=["code: was"]),
    sample_evaluation(),
    sample_evaluation(kind="model", adapter_sha256=None, finetuned=None, difference=None),
    PUBLISHED,
    replace(PUBLISHED, read_back=None),
]

# Written and read back


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_back_as_it_was_written(record, tmp_path):
    write_record(str(tmp_path / "record.json"), record)
    assert read_record(type(record), str(tmp_path / "record.json")) == record
    assert json.loads((tmp_path / "record.json").read_text())["record_version"] == RECORD_VERSION


def test_predictions_are_read_back_as_they_were_written(tmp_path):
    alone = replace(sample_predictions()[0], finetuned=None)
    for predictions in (sample_predictions(), [alone], []):
        write_predictions(str(tmp_path / "predictions.jsonl"), predictions)
        assert read_predictions(str(tmp_path / "predictions.jsonl")) == predictions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"example_id": 0', "has a line that is not JSON .*; the file was cut off.$"),
        ('{"example_id": 0}', "line 1 has no base, finetuned, label, text; expected exactly the fields of Prediction"),
        ('{"row": 0}', r"line 1 does not hold the fields of PredictionRecord in version 2 \(KeyError: 'finetuned'\)"),
        ('{"example_id": 0, "base": {}, "finetuned": "x"}', r"version 3 \(TypeError: 'str' object is not a mapping\)"),
        (
            '{"example_id": 0, "text": "", "label": "", "base": {"log_likelihoods": null}, "finetuned": null}',
            "line 1.base has no predicted, stopped, text; expected exactly the fields of GenerationRecord",
        ),
        ("[0]", r"line 1 is \[0\]; expected PredictionRecord. The file was changed, or other code wrote it.$"),
    ],
)
def test_a_broken_line_of_predictions_is_named(content, message, tmp_path):
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        read_predictions(str(tmp_path / "predictions.jsonl"))


def test_the_settings_of_a_training_are_the_flags_that_change_its_result():
    """A flag is added by its field: the record follows."""
    affecting = {name for name, flag in flags_of(TrainConfig).items() if flag.affects}
    settings = training_settings(TrainConfig(output_dir="runs/x", precision="fp32", report_to=[]))
    assert set(vars(settings)) == affecting | {"world_size"}


# Strict


def changed_record(change: Any) -> dict[str, Any]:
    record = json.loads(json.dumps(asdict(sample_evaluation())))
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record.pop("split"),
            "test.json has no split; expected exactly the fields of EvaluationRecord",
        ),
        (
            lambda record: record["base"].pop("seconds"),
            "test.json.base has no seconds; expected exactly the fields of",
        ),
        (lambda record: record.update(extra=1, more=2), "test.json has unknown extra, more; expected exactly the"),
        (
            lambda record: record["data"].update(label_counts={"bad": "2"}),
            "test.json.data.label_counts.bad is '2'; expected int. The file was changed, or other code wrote it.",
        ),
        (lambda record: record["data"].update(local=0), "test.json.data.local is 0; expected bool"),
        (lambda record: record["bootstrap"].update(seed=True), "test.json.bootstrap.seed is True; expected int"),
        (lambda record: record["bootstrap"].update(seed=1.0), "test.json.bootstrap.seed is 1.0; expected int"),
        (lambda record: record.update(kind="robot"), "test.json.kind is 'robot'; expected typing.Literal['run',"),
        (lambda record: record.update(base=None), "test.json.base is None; expected ModelMetrics"),
        (lambda record: record.update(label_words="bad"), "test.json.label_words is 'bad'; expected list[str]"),
        (
            lambda record: record["base"]["confusion_matrix"][1].append(None),
            "confusion_matrix[1][3] is None; expected",
        ),
        (
            lambda record: record["base"]["intervals"].update(macro_f1=[0.1]),
            "intervals.macro_f1 is [0.1]; expected tup",
        ),
        (lambda record: record["data"].update(revision=3), "test.json.data.revision is 3; expected str"),
    ],
)
def test_a_record_that_is_not_what_its_dataclass_says_is_refused_by_name(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        decode(EvaluationRecord, changed_record(change), "test.json")


def test_what_other_programs_write_alike_is_taken():
    """JSON has one kind of number, and no tuple."""
    assert decode(LengthBand, json.loads(json.dumps({**asdict(BAND), "accuracy": 1})), "x") == replace(
        BAND, accuracy=1.0
    )
    card = {**asdict(sample_run().base_model_card), "license": ["mit", "apache-2.0"], "language": "en"}
    assert decode(type(sample_run().base_model_card), card, "x").license == ["mit", "apache-2.0"]
    assert decode(Bootstrap, {"seed": 0, "samples": 10}, "x") == Bootstrap(10, 0)


BAND = LengthBand((1, 2), num_examples=3, accuracy=0.5, interval=(0.1, 0.9))


# The version before

V2 = {
    "num_examples": "rows", "label_counts": "class_counts", "truncated": "cut_texts", "sequence_lengths": "row_tokens",
    "first_texts": "examples", "completions": "answers", "base_model": "base", "base_model_card": "base_card",
    "mismatches": "changes", "exact_match": "exact_rate", "eos_rate": "stop_rate", "per_label": "per_class",
    "samples_per_second": "tweets_per_second", "baselines": "reference_lines", "per_label_f1": "per_class_f1",
    "base": "before", "finetuned": "after", "example_id": "row", "equal_generations": "equal_answers",
}  # fmt: skip


def in_version_2(value: Any, keep: bool = False) -> Any:
    """A record under the names of version 2, as the code of that time wrote it; label words keep theirs."""
    if isinstance(value, list):
        return [in_version_2(item) for item in value]
    if not isinstance(value, dict):
        return value
    by_label = ("label_counts", "first_texts", "per_label")
    return {
        name if keep else V2.get(name, name): in_version_2(item, not keep and name in by_label)
        for name, item in value.items()
    }


def plain(record: Any) -> Any:
    return json.loads(json.dumps(asdict(record)))


def words_that_are_names(record: Any) -> Any:
    """The record with the label words "rows" and "base", which are names of fields too."""
    text = json.dumps(asdict(record)).replace('"bad"', '"rows"').replace('"good"', '"base"')
    return decode(type(record), json.loads(text), "x")


def test_a_run_of_the_version_before_is_read(run_dir):
    expected = words_that_are_names(sample_run(adapter=replace(sample_run().adapter, sha256=SHA256)))
    old = in_version_2(plain(expected))
    old["training"]["batching"] = "packed"
    old["base_card"] = {name: value for name, value in old["base_card"].items() if value}
    del old["tracker"]
    old["result"]["log_history"] = [{"step": 1, "eval_stop_rate": 0.5, "eval_exact_rate": 0.25, "loss": 2.0}]
    (run_dir / "run.json").write_text(json.dumps({"record_version": 2, **old}))
    history = [{"step": 1, "eval_eos_rate": 0.5, "eval_exact_match": 0.25, "loss": 2.0}]
    assert read_run(str(run_dir)) == replace(expected, result=replace(expected.result, log_history=history))


def test_a_run_of_the_version_before_that_was_stopped_is_read_as_unfinished(tmp_path):
    expected = sample_run(status="interrupted", result=None)
    old = in_version_2(plain(replace(expected, adapter=replace(expected.adapter, sha256=None))))
    del old["result"], old["tracker"], old["adapter"]["sha256"]
    (tmp_path / "run.json").write_text(json.dumps({"record_version": 2, **old}))
    with pytest.raises(InputError, match="is interrupted, not finished. Resume it with"):
        read_run(str(tmp_path))
    with pytest.raises(
        InputError, match=f"has record version 2; this code reads version {RECORD_VERSION}. Use the version of"
    ):
        read_record(RunRecord, str(tmp_path / "run.json"), oldest_version=RECORD_VERSION)


def as_version_2_counted(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Scores had `n` where data had `rows`."""
    for name in ("before", "after"):
        if evaluation.get(name):
            for part in (evaluation[name], *evaluation[name]["by_length"]):
                part["n"] = part.pop("rows")
    return evaluation


def test_an_evaluation_of_the_version_before_is_read(tmp_path):
    expected = words_that_are_names(sample_evaluation())
    old = as_version_2_counted(in_version_2(plain(expected)))
    (tmp_path / "test.json").write_text(json.dumps({"record_version": 2, **old}))
    assert read_record(EvaluationRecord, str(tmp_path / "test.json")) == expected


def test_a_model_alone_was_what_came_after(tmp_path):
    expected = sample_evaluation(kind="model", adapter_sha256=None, finetuned=None, difference=None)
    old = as_version_2_counted(in_version_2(plain(expected)))
    old["after"] = old.pop("before")
    del old["difference"]
    (tmp_path / "test.json").write_text(json.dumps({"record_version": 2, **old}))
    assert read_record(EvaluationRecord, str(tmp_path / "test.json")) == expected


def test_predictions_of_the_version_before_are_read(tmp_path):
    def old(line: PredictionRecord) -> dict[str, Any]:
        found = {"before": asdict(line.base), "after": asdict(line.finetuned)}
        for answer in found.values():
            answer["answer"] = answer.pop("text")
        return {"row": line.example_id, "text": line.text, "label": line.label, **found}

    lines = [json.dumps(old(line)) for line in sample_predictions()]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    assert read_predictions(str(tmp_path / "predictions.jsonl")) == sample_predictions()


# Those of the repository


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("*.json*")), ids=lambda path: path.name)
def test_every_record_of_the_repository_loads(path):
    if path.parent.name == "bench":
        assert read_bench(str(path)).parts
    elif path.suffix == ".jsonl":
        assert read_predictions(str(path))
    elif path.name.endswith(KEPT_PREDICTIONS):
        found = read_record(CompactPredictions, str(path))
        record = read_record(EvaluationRecord, str(path.with_name(f"{found.split}.json")))
        assert found.data_sha256 == record.data.sha256 and len(found.labels.split()) == record.data.num_examples
    else:
        record = read_record(RunRecord if path.name == "run.json" else EvaluationRecord, str(path))
        git = record.environment.git
        # A sweep's own records may lie uncommitted beside it; the code is that of the commit.
        assert git.commit and git.changes_sha256 is None


# A run folder

# printf weights | sha256sum
SHA256 = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A finished run as far as read_run looks."""
    folder = tmp_path / "runs" / "mine"
    write_run(folder, adapter=replace(sample_run().adapter, sha256=SHA256))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


def test_the_status_of_a_run_is_told_whatever_its_version(run_dir, tmp_path):
    change(run_dir, record_version=1, status="diverged")
    assert (run_status(str(run_dir)), run_status(str(tmp_path))) == ("diverged", None)


def change(run_dir: Path, **changes: Any) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**run, **changes}))


def test_a_finished_run_is_read(run_dir):
    assert read_run(str(run_dir)).status == "finished"


def test_a_folder_that_is_no_run_is_refused_with_the_run_folders_there_are(run_dir, monkeypatch):
    monkeypatch.chdir(run_dir.parents[1])
    (run_dir.parent / "empty").mkdir()
    (run_dir.parent / "another").mkdir()
    (run_dir.parent / "another" / "run.json").write_text("{}")
    with pytest.raises(
        InputError,
        match="^nowhere is not a run folder: the folder does not exist. Train first with train.py. "
        "Run folders here: runs/another, runs/mine.$",
    ):
        read_run("nowhere")


def test_a_folder_that_is_no_run_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^runs/x is not a run folder: the folder does not exist. Train first"):
        read_run("runs/x")


@pytest.mark.parametrize("status", ["planned", "started", "interrupted", "diverged"])
def test_an_unfinished_run_is_refused_with_its_status_and_the_way_on(status, run_dir):
    change(run_dir, status=status)
    with pytest.raises(
        InputError,
        match=f"^the run in {run_dir} is {status}, not finished. Resume it with its train.py command and "
        "--resume_from_checkpoint true.$",
    ):
        read_run(str(run_dir))


@pytest.mark.parametrize("version", [0, 1, RECORD_VERSION + 1, None, "4"])
def test_a_record_of_another_version_is_refused(version, run_dir):
    change(run_dir, record_version=version)
    known = "2, 3, 4, 5, 6, 7, 8, 9, 10 and 11"
    message = f"^{run_dir}/run.json has record version {version}; this code reads version {known}. Use the version of"
    with pytest.raises(InputError, match=message):
        read_run(str(run_dir))


def test_a_run_without_its_adapter_is_refused(run_dir):
    (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        InputError, match="adapter_model.safetensors is missing, but the run record says that the run "
    ):
        read_run(str(run_dir))


def test_a_run_whose_adapter_was_changed_is_refused(run_dir):
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"Weights")
    with pytest.raises(
        InputError,
        match=f"adapter_model.safetensors is not the adapter that {run_dir}/run.json describes: its SHA-256",
    ):
        read_run(str(run_dir))


# Version 3


NEW_IN_TASK = """csv_delimiter encoding validation_share test_share split_seed skip_bad_rows chat_template
chat_template_kwargs""".split()


def in_version_3(record: Any) -> dict[str, Any]:
    """A record as version 3 wrote it: without what has come since."""
    old = plain(record)
    for name in ("notes", "corrections"):
        old.pop(name, None)
    for name in ("train_data", "validation_data", "data"):
        if old.get(name):
            del old[name]["skipped"]
    for name in NEW_IN_TASK:
        old.get("task", {}).pop(name, None)
    for model in ("base", "finetuned"):
        if isinstance(old.get(model), dict):
            old[model].pop("likelihood", None)
    old.get("baselines", {}).pop("others", None)
    return {**without_what_came_in_5(old), "record_version": 3}


def without_what_came_in_5(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 4 wrote it."""
    old = without_what_came_in_6(without_what_came_in_7(old))
    for name in ("base_measured", "space"):
        old.pop(name, None)
    old.get("task", {}).pop("balance_labels", None)
    old.get("model", {}).pop("use_rslora", None)
    return {**old, "record_version": 4}


def without_what_came_in_10(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 9 wrote it."""
    old.pop("max_length", None)
    return {**old, "record_version": 9}


def without_what_came_in_9(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 8 wrote it."""
    old = without_what_came_in_10(old)
    old.get("model", {}).pop("load_in_4bit", None)
    return {**old, "record_version": 8}


def without_what_came_in_8(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 7 wrote it."""
    old = without_what_came_in_9(old)
    old.get("training", {}).pop("shard_base", None)
    return {**old, "record_version": 7}


def without_what_came_in_7(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 6 wrote it."""
    old = without_what_came_in_8(old)
    old.pop("dataset_card", None)
    for name in ("paper", "citation"):
        old.get("base_model_card", {}).pop(name, None)
    return {**old, "record_version": 6}


def without_what_came_in_6(old: dict[str, Any]) -> dict[str, Any]:
    """A record as version 5 wrote it."""
    for name in ("prior_corrected", "label_shares"):
        old.pop(name, None)
    return {**old, "record_version": 5}


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize(
    "old",
    [without_what_came_in_10, without_what_came_in_9, without_what_came_in_8],
    ids=["version 9", "version 8", "version 7"],
)
def test_a_record_of_version_7_to_9_is_read(record, old, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(old(plain(record))))
    assert read_record(type(record), str(tmp_path / "record.json")) == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_version_6_is_read(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(without_what_came_in_7(plain(record))))
    assert read_record(type(record), str(tmp_path / "record.json")) == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_version_5_is_read(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(without_what_came_in_6(without_what_came_in_7(plain(record)))))
    assert read_record(type(record), str(tmp_path / "record.json")) == record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_version_4_is_read(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(without_what_came_in_5(plain(record))))
    assert read_record(type(record), str(tmp_path / "record.json")) == record


def test_a_published_task_of_version_4_is_read(tmp_path):
    task = PublishedTask(sample_run().task, sample_run().prompt_format, 16)
    (tmp_path / "task.json").write_text(json.dumps(without_what_came_in_5(plain(task))))
    assert read_record(PublishedTask, str(tmp_path / "task.json"), oldest_version=4) == task


@pytest.mark.parametrize(
    ("version", "gone", "error"),
    [(2, "adapter", "KeyError: 'adapter'"), (3, "task", "KeyError: 'task'"), (8, "model", "KeyError: 'model'")],
)
def test_an_older_record_that_lacks_a_field_is_named(version, gone, error, tmp_path):
    record = plain(sample_run())
    old = in_version_2(record) if version == 2 else record
    del old[gone]
    (tmp_path / "run.json").write_text(json.dumps({**old, "record_version": version}))
    with pytest.raises(
        InputError, match=f"run.json does not hold the fields of RunRecord in version {version} \\({error}"
    ):
        read_record(RunRecord, str(tmp_path / "run.json"))


def test_an_older_record_with_a_field_of_another_type_is_named(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**plain(sample_run()), "model": "x", "record_version": 8}))
    with pytest.raises(InputError, match=r"RunRecord in version 8 \(TypeError: 'str' object is not a mapping\)"):
        read_record(RunRecord, str(tmp_path / "run.json"))


def test_compact_predictions_hold_ids_and_no_text(tmp_path):
    found = compact_predictions(sample_predictions(), sample_evaluation())
    assert (found.labels, found.base, found.finetuned) == ("0 1 0 1 1", "-1 -1 -1 -1 -1", "1 1 0 0 -1")
    assert (found.base_likeliest, found.finetuned_likeliest) == ("0 0 0 0 0", "0 0 0 0 0")
    tied = [replace(line, base=replace(line.base, likeliest=line.label)) for line in sample_predictions()]
    assert compact_predictions(tied, sample_evaluation()).base_likeliest == "0 1 0 1 1"
    alone = [replace(line, finetuned=None) for line in sample_predictions()]
    assert compact_predictions(alone, sample_evaluation()).finetuned == ""


def without_what_is_new(record: Any) -> Any:
    """The record as version 3 can tell it."""
    if isinstance(record, EvaluationRecord):
        models = {
            name: found and replace(found, likelihood=None)
            for name, found in (("base", record.base), ("finetuned", record.finetuned))
        }
        return replace(record, **models, baselines=replace(record.baselines, others=[]))
    return record


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_of_version_3_is_read_with_what_has_come_since(record, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(in_version_3(record)))
    assert read_record(type(record), str(tmp_path / "record.json")) == without_what_is_new(record)


def test_the_records_of_the_repository_are_read():
    """They are of whatever version they were made in."""
    for name in ("quickstart/run.json", "quickstart/test.json"):
        kind = RunRecord if name.endswith("run.json") else EvaluationRecord
        assert read_record(kind, str(ROOT / "results" / name)).environment.packages["torch"]


def test_predictions_of_version_3_are_read(tmp_path):
    lines = [plain(line) for line in sample_predictions()]
    for line in lines:
        for model in ("base", "finetuned"):
            del line[model]["log_likelihoods"]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_predictions(str(tmp_path / "predictions.jsonl"))
    assert [line.finetuned.text for line in found] == [line.finetuned.text for line in sample_predictions()]
    assert {line.base.log_likelihoods for line in found} == {None}


def test_predictions_of_version_10_are_read(tmp_path):
    """They do not say which of the most likely label words counted."""
    lines = [plain(line) for line in sample_predictions()]
    for line in lines:
        for model in ("base", "finetuned"):
            assert line[model].pop("likeliest") is None
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_predictions(str(tmp_path / "predictions.jsonl")) == sample_predictions()
