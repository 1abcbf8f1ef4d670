"""Going on with a run: from the right checkpoint, and only as the run that it was."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from sample_records import sample_run, write_run

from tweetdora.checkpoints import CHECKSUMS, SAVING_DIR, all_checkpoints, publish_checkpoint
from tweetdora.errors import InputError
from tweetdora.records import GitState, RunRecord, TrackerRecord
from tweetdora.resume import (
    ResumePlan,
    check_same_run,
    check_unchanged,
    continue_record,
    only_training_in,
    plan_resume,
    set_aside_newer,
)
from tweetdora.train_config import TrainConfig


def going_on(settings: TrainConfig) -> tuple[str | None, list[str]]:
    """Where a run goes on from, and what is said of it."""
    plan = plan_resume(settings)
    return plan.checkpoint, plan.notes


def make_checkpoint(run_dir: Path, step: int) -> str:
    """A checkpoint as far as plan_resume looks."""
    return publish_checkpoint_of(run_dir, step, keep=None)


def publish_checkpoint_of(run_dir: Path, step: int, keep: int | None) -> str:
    beside = run_dir / SAVING_DIR / f"checkpoint-{step}"
    beside.mkdir(parents=True)
    (beside / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (beside / "optimizer.pt").write_text("{}")
    return publish_checkpoint(str(run_dir), step, keep)


def make_record(run_dir: Path, status: str) -> RunRecord:
    return write_run(run_dir, status=status, result=None)


# Where to go on from


@pytest.mark.parametrize("asked", [None, "", "false", "False"])
def test_a_new_run_starts_from_nothing(asked, training):
    assert plan_resume(training(resume_from_checkpoint=asked)) == ResumePlan()


def test_a_new_run_may_start_in_a_folder_that_holds_something_else(training, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("")
    assert plan_resume(training()) == ResumePlan()


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        *(
            (status, "Resume it with --resume_from_checkpoint true, or choose")
            for status in ("started", "interrupted")
        ),
        ("finished", "Choose"),
        ("diverged", "Lower --learning_rate and choose"),
    ],
)
def test_a_new_run_is_refused_a_folder_with_a_run(status, advice, training, tmp_path):
    make_record(tmp_path / "run", status)
    message = (
        f"^--output_dir {tmp_path}/run already holds a run \\({status}\\). {advice} another --output_dir, or delete"
    )
    with pytest.raises(InputError, match=message):
        plan_resume(training())


def test_a_new_run_is_refused_a_folder_with_checkpoints(training, tmp_path):
    make_checkpoint(tmp_path / "run", 10)
    with pytest.raises(InputError, match=rf"^--output_dir {tmp_path}/run already holds a run \(unfinished\)"):
        plan_resume(training())


@pytest.mark.parametrize("asked", ["true", "True"])
def test_a_resumed_run_goes_on_from_its_last_checkpoint(asked, training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    for step in (9, 100, 20):
        make_checkpoint(tmp_path / "run", step)
    assert plan_resume(training(resume_from_checkpoint=asked)).checkpoint == str(tmp_path / "run" / "checkpoint-100")


def test_a_resumed_run_goes_on_from_the_checkpoint_that_is_named(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    first = make_checkpoint(tmp_path / "run", 10)
    make_checkpoint(tmp_path / "run", 20)
    assert going_on(training(resume_from_checkpoint=first)) == (first, [])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CHECKSUMS).unlink(), f"{CHECKSUMS} is missing"),
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt cannot be read (No such file or directory)"),
        (lambda folder: (folder / "optimizer.pt").write_text("cut"), "optimizer.pt has changed since"),
    ],
)
def test_a_resumed_run_passes_over_a_damaged_checkpoint_and_says_so(damage, said, training, tmp_path):
    make_record(tmp_path / "run", "started")
    whole, other = make_checkpoint(tmp_path / "run", 10), make_checkpoint(tmp_path / "run", 20)
    damage(Path(other))
    found, (note,) = going_on(training(resume_from_checkpoint="true"))
    assert found == whole
    assert note.startswith(f"note: skipped {other}, which is damaged (") and said in note
    assert note.endswith(f"; resuming from {whole}.") and "\n" not in note
    with pytest.raises(InputError, match=re.escape(f"--resume_from_checkpoint {other}: ") + ".*" + re.escape(said)):
        plan_resume(training(resume_from_checkpoint=other))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "started")
    checkpoint = make_checkpoint(tmp_path / "run", 10)
    Path(checkpoint, "optimizer.pt").unlink()
    with pytest.raises(InputError, match=rf"found no intact checkpoint in .* \({checkpoint} is damaged, optimizer.pt"):
        plan_resume(training(resume_from_checkpoint="true"))


def test_a_checkpoint_that_was_being_written_is_not_looked_at(training, tmp_path):
    make_record(tmp_path / "run", "started")
    whole = make_checkpoint(tmp_path / "run", 10)
    shutil.copytree(whole, tmp_path / "run" / SAVING_DIR / "checkpoint-20")
    assert going_on(training(resume_from_checkpoint="true")) == (whole, [])


def test_a_resumed_run_takes_no_copy_for_its_last_checkpoint(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    last = make_checkpoint(tmp_path / "run", 10)
    shutil.copytree(last, tmp_path / "run" / "checkpoint-10-copy")
    assert going_on(training(resume_from_checkpoint="true")) == (last, [])


def test_a_finished_run_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "finished")
    make_checkpoint(tmp_path / "run", 10)
    with pytest.raises(
        InputError,
        match=f"^the run in {tmp_path}/run is finished; there is nothing to resume. Choose another --output_dir.$",
    ):
        plan_resume(training(resume_from_checkpoint="true"))


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_again_and_says_so(training, tmp_path):
    make_record(tmp_path / "run", "started")
    note = f"note: the run in {tmp_path}/run was stopped before its first checkpoint; it starts over."
    assert plan_resume(training(resume_from_checkpoint="true")) == ResumePlan(None, None, [note])


def test_a_run_goes_on_from_a_checkpoint_of_another_folder_in_an_empty_one_only(training, tmp_path):
    run = make_record(tmp_path / "other", "interrupted")
    other = make_checkpoint(tmp_path / "other", 10)
    assert plan_resume(training(resume_from_checkpoint=other)) == ResumePlan(other, run, [], is_fork=True)
    make_record(tmp_path / "run", "interrupted")
    with pytest.raises(InputError, match="belongs to another run than --output_dir .*/run, which already holds one"):
        plan_resume(training(resume_from_checkpoint=other))


def test_a_folder_that_does_not_exist_is_not_resumed(training):
    with pytest.raises(InputError, match="^--resume_from_checkpoint true: found no checkpoint in "):
        plan_resume(training(resume_from_checkpoint="true"))


def test_two_trainings_in_one_folder_at_once_are_refused(tmp_path, monkeypatch):
    """The second is another process: by its own name for the folder, and until the first has ended, however."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "run").mkdir()
    hold = (
        "import sys, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from tweetdora.resume import only_training_in\n"
        "with only_training_in(sys.argv[2], True): print('held', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", hold, str(tmp_path), str(tmp_path / "run/../run")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        refusal = f"another process is training in {tmp_path}/run .*Wait for it, stop it, or give another --output_dir"
        with pytest.raises(InputError, match=refusal), only_training_in(str(tmp_path / "run"), True):
            pass
        with only_training_in(str(tmp_path / "run"), False):
            pass  # the other processes of the first
        with only_training_in(str(tmp_path / "other"), True):
            pass
        first.kill()
    with only_training_in(str(tmp_path / "run"), True):
        pass


def test_a_named_folder_that_is_no_checkpoint_is_not_resumed(training, tmp_path):
    make_record(tmp_path / "run", "interrupted")
    make_checkpoint(tmp_path / "run", 10)
    named = f"{tmp_path}/run/checkpoint-11"
    with pytest.raises(InputError, match=f"^--resume_from_checkpoint {named}: there is no such checkpoint.$"):
        plan_resume(training(resume_from_checkpoint=named))


# Whether it is the same run


def test_the_same_settings_are_the_same_run(planned):
    check_same_run(planned(), planned())


@pytest.mark.parametrize(
    "difference",
    [
        {"save_steps": 5},
        {"logging_steps": 3},
        {"output_dir": "elsewhere"},
        {"max_eval_samples": 0},
        {"report_to": ["wandb"]},
        {"run_name": "another"},
    ],
)
def test_settings_that_change_no_result_may_change(difference, planned):
    check_same_run(planned(), planned(**difference))


@pytest.mark.parametrize(
    ("difference", "named"),
    [
        ({"learning_rate": 1e-4}, "training.learning_rate: was 3e-05, now 0.0001"),
        ({"lr_scheduler_type": "cosine"}, "training.lr_scheduler_type: was 'linear', now 'cosine'"),
        ({"global_batch_size": 8}, "training.global_batch_size: was 16, now 8"),
        ({"max_steps": 9}, "training.max_steps: was -1, now 9"),
        ({"seed": 7}, "training.seed: was 42, now 7"),
        ({"batching": "padded"}, "training.batching: was 'shared_prefix', now 'padded'"),
        ({"model": {"r": 4}}, "model.r: was 8, now 4"),
        ({"model": {"method": "lora"}}, "model.method: was 'dora', now 'lora'"),
        ({"examples": 40}, "train_data.num_examples: was 48, now 40"),
    ],
)
def test_a_setting_that_differs_is_named_with_both_values(difference, named, planned):
    pair = planned(), planned(**difference)
    with pytest.raises(
        InputError,
        match="^--resume_from_checkpoint: this is not the run that was interrupted. .*another --output_dir.$",
    ) as refusal:
        check_same_run(*pair)
    assert named in str(refusal.value)


def test_another_prompt_is_another_run(planned):
    other = {"system_prompt": "Something else, neutral"}
    with pytest.raises(
        InputError, match="task.system_prompt: was 'Say how the day is.*', now 'Something else, neutral'"
    ):
        check_same_run(planned(), planned(task=other))


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("base_model", "weights_sha256"),
        ("base_model", "revision"),
        ("train_data", "sha256"),
        ("prompt_format", "tail"),
        ("task", "max_length"),
    ],
)
def test_changed_data_base_or_prompt_are_another_run(part, key, planned):
    run = planned()
    changed = dataclasses.replace(run, **{part: dataclasses.replace(getattr(run, part), **{key: "changed"})})
    with pytest.raises(InputError, match=rf"{part}\.{key}: was .*, now 'changed'"):
        check_same_run(planned(), changed)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("training.world_size", {"training": {"world_size": 2}}),
        ("training.batching", {"training": {"batching": "padded"}}),
        ("code", {"environment": {"git": GitState("b" * 40, dirty=False, changes_sha256=None)}}),
        ("code", {"environment": {"git": GitState("e" * 40, dirty=True, changes_sha256="f")}}),
        ("code", {"environment": {"git": None}}),
        ("packages", {"environment": {"packages": {"torch": "9.9", "peft": "0.21.2"}}}),
    ],
)
def test_what_may_differ_is_refused_by_name_and_allowed_by_name(name, change):
    saved = sample_run()
    ((part, fields),) = change.items()
    now = dataclasses.replace(saved, **{part: dataclasses.replace(getattr(saved, part), **fields)})
    assert check_same_run(saved, saved) == []
    with pytest.raises(InputError, match=re.escape(f"(--allow_mismatch {name} resumes anyway)")):
        check_same_run(saved, now)
    (said,) = check_same_run(saved, now, [name])
    assert said.startswith(name) and ": was " in said and ", now " in said


def test_other_validation_examples_are_another_run_and_more_of_them_are_not():
    run = sample_run()
    other = dataclasses.replace(run.validation_data, sha256="other")
    with pytest.raises(InputError, match="validation_data.sha256: was 'c', now 'other'"):
        check_same_run(run, dataclasses.replace(run, validation_data=other))
    more = dataclasses.replace(other, num_examples=300)
    assert check_same_run(run, dataclasses.replace(run, validation_data=more)) == []


def test_what_makes_another_run_is_allowed_by_no_name(planned, training):
    """Said in the first second, and of a run that is not resumed too."""
    with pytest.raises(InputError, match="--allow_mismatch training.learning_rate: expected some of training.world"):
        plan_resume(training(allow_mismatch=["training.learning_rate"]))
    with pytest.raises(InputError, match="training.learning_rate: was 3e-05, now 0.0001. Use"):
        check_same_run(planned(), planned(learning_rate=1e-4), ["code", "packages"])


def test_all_differences_are_named_at_once(planned):
    with pytest.raises(InputError, match="model.r: was 8, now 4.*; training.learning_rate: was 3e-05, now 0.0001"):
        check_same_run(planned(), planned(model={"r": 4}, learning_rate=1e-4))


def test_the_record_goes_on_where_the_interrupted_runs_was():
    tracker = TrackerRecord("id", "online", "https://wandb.test/id", "tweetdora", None)
    saved = sample_run(created="then", command="first", tracker=tracker, mismatches=["code: earlier"], result=None)
    now = sample_run(created="now", command="second", status="planned", result=None)
    now = dataclasses.replace(now, training=dataclasses.replace(now.training, batching="padded"))
    run, mismatches = continue_record(saved, now, ["training.batching"], None, is_fork=False)
    assert (run.created, run.command, run.tracker, run.training.batching) == ("then", "first", tracker, "padded")
    assert len(mismatches) == 1 and run.mismatches == ["code: earlier", *mismatches]


def test_the_repository_of_a_run_stays_unless_another_is_given():
    """A default of the resuming command must not replace it; a fork has its own, and its own tracker's run."""
    tracker = TrackerRecord("id", "online", "https://wandb.test/id", "tweetdora", None)
    saved = sample_run(hub_model_id="me/first", tracker=tracker, result=None)
    now = sample_run(hub_model_id="owner/default", tracker=None, result=None)

    def continued(given: str | None, is_fork: bool):
        run, _ = continue_record(saved, now, [], given, is_fork)
        return run.hub_model_id, run.tracker

    assert continued(None, False) == ("me/first", tracker)
    assert continued("me/second", False) == ("me/second", tracker)
    assert continued(None, True) == ("owner/default", None)


def test_a_checkpoint_of_the_record_version_before_is_refused(training, tmp_path):
    """Its log has other names, and its code was other code."""
    make_record(tmp_path / "run", "interrupted")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "record_version": 2}))
    make_checkpoint(tmp_path / "run", 10)
    with pytest.raises(
        InputError,
        match="has record version 2; this code reads version 3, 4, 5, 6, 7, 8, 9, 10 and 11. Use the version of",
    ):
        plan_resume(training(resume_from_checkpoint="true"))


# Between planning and training


def test_a_run_that_another_process_has_changed_meanwhile_is_not_gone_on_with(training, tmp_path):
    """The process that was stopped still wrote its checkpoint, or its end, while this one was loading."""
    make_record(tmp_path / "run", "interrupted")
    make_checkpoint(tmp_path / "run", 10)
    settings = training(resume_from_checkpoint="true")
    planned = plan_resume(settings)
    check_unchanged(settings, planned)
    make_checkpoint(tmp_path / "run", 20)
    with pytest.raises(InputError, match=f"has changed the run in {tmp_path}/run since this command started. Repeat"):
        check_unchanged(settings, planned)
    make_record(tmp_path / "run", "finished")
    with pytest.raises(InputError, match="is finished; there is nothing to resume"):
        check_unchanged(settings, planned)


def test_a_new_run_whose_folder_another_process_has_taken_meanwhile_is_refused(training, tmp_path):
    make_record(tmp_path / "run", "started")
    with pytest.raises(InputError, match=r"already holds a run \(started\)"):
        check_unchanged(training(), ResumePlan())


def test_checkpoints_newer_than_the_one_that_is_named_are_set_aside(training, tmp_path):
    """Otherwise the next `true` would go on from them, with the steps that were given up."""
    run = tmp_path / "run"
    make_record(run, "interrupted")
    make_checkpoint(run, 5)
    for count in (1, 2):
        old, new = (make_checkpoint(run, step) for step in (10, 20))
        (note,) = set_aside_newer(training(resume_from_checkpoint=old), old)
        assert note == f"note: {new} is newer than {old}; it was renamed to {run}/set-aside-20-{count}."
        assert all_checkpoints(str(run)) == [old, f"{run}/checkpoint-5"], "older ones stay"
    assert plan_resume(training(resume_from_checkpoint="true")).checkpoint == old
    publish_checkpoint_of(run, 11, keep=1)
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == [
        "checkpoint-11",
        "set-aside-20-1",
        "set-aside-20-2",
    ]


def test_no_checkpoint_is_set_aside_but_for_one_that_is_named(training, tmp_path):
    """Nor for a fork, which leaves the other run's alone, nor for a link to the newest."""
    run = tmp_path / "run"
    old, new = (make_checkpoint(run, step) for step in (10, 20))
    assert set_aside_newer(training(resume_from_checkpoint="true"), old) == []
    assert set_aside_newer(training(resume_from_checkpoint=old, output_dir=str(tmp_path / "fork")), old) == []
    assert set_aside_newer(training(), None) == []
    (run / "latest").symlink_to(new)
    assert set_aside_newer(training(resume_from_checkpoint=f"{run}/latest"), f"{run}/latest") == []
    assert all_checkpoints(str(run)) == [new, old]
