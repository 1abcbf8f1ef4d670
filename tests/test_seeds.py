"""Runs over seeds: groups, means, intervals and paired differences, against values found another way."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from sample_records import sample_evaluation, sample_metrics, sample_run
from scipy import stats
from sklearn.metrics import f1_score

from tweetdora import seeds
from tweetdora.errors import InputError
from tweetdora.metrics import confusion_matrix
from tweetdora.record_files import read_record, write_record
from tweetdora.records import CompactPredictions, EvaluationRecord, RunRecord, number_line
from tweetdora.seeds import (
    all_pairs,
    difference,
    find_diverged,
    find_runs,
    find_sisters,
    group_runs,
    resample,
    settings_text,
    summarise,
    value_text,
)

WORDS = ["bad", "good"]
LABELS = np.array([0, 1] * 20)


def write_kept(folder: Path, seed: int, finetuned: np.ndarray, *, labels=LABELS, split="test", model=None, **training):
    """A run's records in `folder`, as a sweep keeps them: it answered `finetuned`."""
    run = sample_run()
    run = replace(
        run,
        model=replace(run.model, **(model or {})),
        training=replace(run.training, seed=seed, **training),
        adapter=replace(run.adapter, sha256=f"adapter {seed}"),
    )
    matrix = confusion_matrix(labels.tolist(), finetuned.tolist(), 2).tolist()
    parsed = np.where(finetuned < 0, 2, finetuned)
    score = f1_score(labels, parsed, labels=[0, 1], average="macro")
    evaluation = sample_evaluation()
    evaluation = replace(
        evaluation,
        split=split,
        adapter_sha256=run.adapter.sha256,
        data=replace(evaluation.data, num_examples=len(labels), sha256=number_line(labels)),
        finetuned=replace(sample_metrics(score, matrix, parse_rate=1.0), likelihood=None),
    )
    line = number_line(finetuned)
    answers = CompactPredictions(
        split, evaluation.data.sha256, run.adapter.sha256, WORDS, number_line(labels), line, line, "", ""
    )
    write_record(str(folder / "run.json"), run)
    write_record(str(folder / f"{split}.predictions.json"), answers)
    write_record(str(folder / f"{split}.json"), evaluation)


def write_diverged(folder: Path, seed: int) -> None:
    """The record of a training that diverged, with the settings of write_kept's."""
    run = sample_run(status="diverged", result=None)
    write_record(str(folder / "run.json"), replace(run, training=replace(run.training, seed=seed)))


def flipped(count: int, start: int = 0) -> np.ndarray:
    """The labels with `count` of them wrong, from place `start`."""
    answers = LABELS.copy()
    answers[start : start + count] = 1 - answers[start : start + count]
    return answers


@pytest.fixture
def kept(tmp_path):
    """Two methods with three seeds each: DoRA has 4, 6, 8 of 40 wrong, LoRA 10, 12, 14."""
    for number, seed in enumerate((42, 43, 44)):
        write_kept(tmp_path / f"dora-{seed}", seed, flipped(4 + 2 * number))
        write_kept(tmp_path / f"lora-{seed}", seed, flipped(10 + 2 * number), model={"method": "lora"})
    return tmp_path


def test_runs_that_differ_in_the_seed_alone_are_a_group_named_by_what_differs(kept):
    groups = group_runs(find_runs([str(kept)], "test"))
    assert [group.settings for group in groups] == [{"method": "dora"}, {"method": "lora"}]
    assert [group.seeds for group in groups] == [[42, 43, 44]] * 2
    assert settings_text(groups[0].settings) == "method dora"


def test_mean_and_deviation_are_those_of_the_runs(kept):
    group = group_runs(find_runs([str(kept / "dora-*")], "test"))[0]
    found = summarise(group, samples=200)
    expected = [f1_score(LABELS, flipped(count), average="macro") for count in (4, 6, 8)]
    assert found.values == pytest.approx(expected)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.deviation == pytest.approx(stats.tstd(expected))
    assert found.interval[0] < found.rows_interval[0] < found.mean < found.rows_interval[1] < found.interval[1]


def test_one_run_has_no_deviation_and_its_interval_is_that_of_the_rows(kept):
    found = summarise(group_runs(find_runs([str(kept / "dora-42")], "test"))[0], samples=200)
    assert found.deviation is None and found.interval == found.rows_interval


def test_a_resample_scores_what_copied_rows_would_score(kept, monkeypatch):
    """The rows of a resample are copied and given to scikit-learn."""
    runs = find_runs([str(kept)], "test")
    drawn = resample(runs, samples=5, seed=3)
    generator = np.random.default_rng(3)
    for number in range(5):
        rows = generator.integers(0, 40, 40)
        expected = [f1_score(run.labels[rows], run.finetuned[rows], labels=[0, 1], average="macro") for run in runs]
        assert drawn[number] == pytest.approx(expected)


def test_drawing_k_minus_1_seeds_gives_the_variance_of_a_mean_of_k():
    """Rows that change nothing: what is left is the standard error over seeds, s / sqrt(k)."""
    values = np.array([0.70, 0.72, 0.69, 0.75, 0.71])
    drawn = np.tile(values, (40_000, 1))
    means = seeds._over_seeds(drawn, seeds._draw_seeds(5, 40_000, 0))
    assert means.std() == pytest.approx(stats.sem(values), rel=0.02)


def test_the_interval_over_rows_is_as_wide_as_theory_says(tmp_path):
    """Accuracy's: of two labels alike and answers right by chance, the standard error of a share."""
    generator = np.random.default_rng(0)
    labels = np.arange(2_000) % 2
    right = generator.random(2_000) < 0.8
    write_kept(tmp_path / "a", 1, np.where(right, labels, 1 - labels), labels=labels)
    runs = find_runs([str(tmp_path)], "test")
    spread = resample(runs, 2_000, 0, metric="accuracy").std()
    assert spread == pytest.approx((right.mean() * (1 - right.mean()) / 2_000) ** 0.5, rel=0.1)


def test_a_difference_is_paired_over_rows_and_seeds(kept):
    groups = group_runs(find_runs([str(kept)], "test"))
    ((first, second),) = all_pairs(reversed(groups))
    assert first.settings == {"method": "dora"}, "the better one comes first"
    found = difference(first, second, samples=300)
    means = [np.mean([run.finetuned_metrics.macro_f1 for run in group.runs]) for group in (first, second)]
    assert found.difference == pytest.approx(means[0] - means[1])
    assert (found.same_seeds, found.seeds_above, found.fixed, found.broken) == (True, 3, [6, 6, 6], [0, 0, 0])
    assert found.p_values == pytest.approx([stats.binomtest(0, 6).pvalue] * 3)
    assert found.interval[0] > 0


def test_other_seeds_are_not_paired(kept):
    first, second = group_runs(find_runs([str(kept / "dora-42"), str(kept / "lora-4[34]")], "test"))
    found = difference(first, second, samples=100)
    assert (found.same_seeds, found.common_seeds, found.p_values) == (False, [], [])
    assert found.common_difference is None


def test_of_partly_common_seeds_the_common_ones_are_compared_one_by_one(kept):
    """DoRA has 42 and 44, LoRA 43, 44 and 45. With 44, DoRA has 8 of 40 wrong, and LoRA the same and 6 more."""
    write_kept(kept / "lora-45", 45, flipped(9), model={"method": "lora"})
    first, second = group_runs(find_runs([str(kept / "dora-4[24]"), str(kept / "lora-4[345]")], "test"))
    found = difference(first, second, samples=100)
    assert (found.same_seeds, found.common_seeds, found.seeds_above) == (False, [44], 1)
    assert (found.fixed, found.broken) == ([6], [0])
    assert found.common_difference == pytest.approx(
        first.runs[1].finetuned_metrics.macro_f1 - f1_score(LABELS, flipped(14), average="macro")
    )
    assert found.p_values == pytest.approx([stats.binomtest(0, 6).pvalue]) and found.interval is not None
    assert found.difference == pytest.approx(summarise(first, 10).mean - summarise(second, 10).mean)


def test_runs_that_diverged_are_found_and_have_no_scores(kept):
    for folder, seed in (("dora-45", 45), ("alone", 46)):
        write_diverged(kept / folder, seed)
    write_diverged(kept / "again", 42)  # whose other run did not diverge
    write_diverged(kept / "copy", 45)
    for folder, text in (("damaged", "{"), ("foreign", "[1]"), ("other", '{"status": "finished"}')):
        (kept / folder).mkdir()
        (kept / folder / "run.json").write_text(text)
    found = find_diverged([str(kept), str(kept / "dora-*")])
    assert [Path(folder).name for folder in found] == ["again", "alone", "copy", "dora-45"]
    groups = group_runs(find_runs([str(kept)], "test"), found.values())
    assert [(group.seeds, group.diverged) for group in groups] == [([42, 43, 44], [45, 46]), ([42, 43, 44], [])]
    with pytest.raises(InputError, match=r"alone was measured on the test split; 1 diverged\. Expected run folders"):
        find_runs([str(kept / "alone")], "test")
    group, passed_over = find_sisters(str(kept / "dora-42"), "test")
    assert group is not None and (group.seeds, group.diverged) == ([42, 43, 44], [45, 46])
    assert [sentence.rpartition("/")[2] for sentence in passed_over if "but diverged" in sentence] == [
        *("again differs only in the seed, but diverged", "alone differs only in the seed, but diverged"),
        *("copy differs only in the seed, but diverged", "dora-45 differs only in the seed, but diverged"),
    ]
    (kept / "other/run.json").write_text('{"status": "diverged"}')
    with pytest.raises(InputError, match="has record version None"):
        find_diverged([str(kept)])


def test_a_run_of_which_all_sisters_diverged_is_a_group_that_says_so(tmp_path):
    write_kept(tmp_path / "own", 42, flipped(4))
    for folder, seed in (("a", 43), ("b", 42)):  # of seed 42 there is a run that did not diverge
        write_diverged(tmp_path / folder, seed)
    group, _ = find_sisters(str(tmp_path / "own"), "test")
    assert group is not None and (group.seeds, group.diverged) == ([42], [43])


def test_unparsed_answers_are_wrong(tmp_path):
    answers = LABELS.copy()
    answers[:10] = -1
    write_kept(tmp_path / "a", 1, answers)
    found = summarise(group_runs(find_runs([str(tmp_path)], "test"))[0], samples=50)
    assert found.mean == pytest.approx(
        f1_score(LABELS, np.where(answers < 0, 2, answers), labels=[0, 1], average="macro")
    )


# What is refused


def test_runs_on_other_rows_are_refused(kept):
    write_kept(kept / "other", 1, flipped(3)[:38], labels=LABELS[:38])
    with pytest.raises(
        InputError, match=r"were measured on different examples \(40 and 38 examples\), so their scores"
    ):
        find_runs([str(kept)], "test")


@pytest.mark.parametrize(
    ("change", "said"), [({"precision": "fp32"}, "fp32 and"), ({"max_new_tokens": 5}, "tokens 5")]
)
def test_runs_that_were_measured_otherwise_are_refused(kept, change, said):
    path = str(kept / "lora-42/test.json")
    write_record(path, replace(read_record(EvaluationRecord, path), **change))
    with pytest.raises(InputError, match=f"were measured differently .*{said}.*Measure one again"):
        find_runs([str(kept)], "test")


def test_runs_that_were_measured_as_they_were_trained_may_differ_in_that(kept):
    for path in kept.glob("lora-*"):
        run, evaluation = read_record(RunRecord, str(path / "run.json")), str(path / "test.json")
        write_record(str(path / "run.json"), replace(run, training=replace(run.training, precision="fp32")))
        write_record(evaluation, replace(read_record(EvaluationRecord, evaluation), precision="fp32"))
    assert len(find_runs([str(kept)], "test")) == 6
    path = str(kept / "dora-44/run.json")  # trained in float32, measured in bf16
    run = read_record(RunRecord, path)
    write_record(path, replace(run, training=replace(run.training, precision="fp32")))
    with pytest.raises(InputError, match="were measured differently"):
        find_runs([str(kept)], "test")


def test_the_same_seed_twice_is_refused(kept):
    write_kept(kept / "again", 42, flipped(5))
    with pytest.raises(InputError, match="have the same settings and seed"):
        group_runs(find_runs([str(kept)], "test"))


def test_a_split_that_was_not_measured_is_said(kept):
    with pytest.raises(InputError, match="was measured on the validation split. Expected run folders"):
        find_runs([str(kept)], "validation")


def test_predictions_that_are_not_the_records_are_refused(kept):
    path = kept / "dora-42" / "test.predictions.json"
    answers = json.loads(path.read_text())
    answers["finetuned"] = number_line(flipped(5))
    path.write_text(json.dumps(answers))
    with pytest.raises(InputError, match="dora-42: its records are not of one run, or not of the same answers"):
        find_runs([str(kept)], "test")


def test_another_runs_predictions_are_refused(kept):
    path = kept / "dora-42" / "run.json"
    run = json.loads(path.read_text())
    run["adapter"]["sha256"] = "another"
    path.write_text(json.dumps(run))
    with pytest.raises(InputError, match="dora-42: its records are not of one run"):
        find_runs([str(kept)], "test")


def test_a_kept_record_is_whole(kept):
    """Nothing that a record says is lost by keeping it."""
    (run,) = find_runs([str(kept / "lora-43")], "test")
    assert run.seed == 43 and run.settings["method"] == "lora"
    assert asdict(run.run.task) == asdict(sample_run().task)


def test_runs_of_the_same_settings_on_other_data_or_another_base_are_no_group(tmp_path):
    for seed in (42, 43):
        write_kept(tmp_path / str(seed), seed, flipped(4))
    path = tmp_path / "43/run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, "train_data": {**run["train_data"], "sha256": "other"}}))
    with pytest.raises(
        InputError, match="have the same settings but a different set of training examples: the files at"
    ):
        group_runs(find_runs([str(tmp_path)], "test"))
    assert find_sisters(str(tmp_path / "42"), "test") == (None, [])


# The sisters of a run


def test_the_sisters_of_a_run_are_those_that_differ_in_the_seed_alone(kept, tmp_path):
    found, passed_over = find_sisters(str(kept / "dora-43"), "test")
    assert found is not None and found.seeds == [42, 43, 44] and passed_over == []
    assert [Path(run.folder).name for run in found.runs] == ["dora-42", "dora-43", "dora-44"]


def test_a_run_without_sisters_has_none(tmp_path):
    write_kept(tmp_path / "one", 42, flipped(4))
    write_kept(tmp_path / "other", 43, flipped(4), learning_rate=1.0)
    assert find_sisters(str(tmp_path / "one"), "test") == (None, [])


def test_sisters_are_looked_for_in_other_folders_too_and_of_a_seed_the_nearest_counts(kept, tmp_path):
    write_kept(tmp_path / "elsewhere/a", 43, flipped(20))
    write_kept(tmp_path / "elsewhere/b", 45, flipped(2))
    found, _ = find_sisters(str(kept / "dora-42"), "test", [str(tmp_path / "elsewhere")])
    assert found is not None and found.seeds == [42, 43, 44, 45]
    assert [Path(run.folder).name for run in found.runs] == ["dora-42", "dora-43", "dora-44", "b"]
    one, _ = find_sisters(str(tmp_path / "elsewhere/a"), "test", [str(kept / "dora-42")])
    assert one is not None and one.seeds == [42, 43, 45], "a folder that is a run itself"


def test_sisters_that_cannot_be_compared_are_passed_over_and_said(tmp_path):
    write_kept(tmp_path / "own", 42, flipped(4))
    write_kept(tmp_path / "other-rows", 43, np.array([0, 1, 0, 1]), labels=np.array([0, 1, 0, 1]))
    write_kept(tmp_path / "unmeasured", 44, flipped(4), split="validation")
    write_kept(tmp_path / "damaged", 45, flipped(4))
    (tmp_path / "damaged/test.json").write_text("{")
    found, passed_over = find_sisters(str(tmp_path / "own"), "test")
    assert found is None
    assert [sentence.partition(" ")[0].rpartition("/")[2] for sentence in passed_over] == [
        *("damaged", "other-rows", "unmeasured"),
    ]
    assert "is not readable JSON" in passed_over[0] and "on other examples" in passed_over[1]
    assert passed_over[2].endswith("was not measured on the test split")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1.0, "1"),
        (0.0, "0"),
        (1, "1"),
        (True, "yes"),
        (False, "no"),
        (None, "all"),
        (3e-5, "3e-05"),
        (["a", "b"], "a+b"),
    ],
)
def test_a_number_is_not_taken_for_a_truth_value(value, shown):
    assert value_text(value) == shown
