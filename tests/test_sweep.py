"""Sweeps: what they plan, skip and refuse; and one of two runs on a tiny model, stopped and gone on with."""

import json
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import yaml

from tweetdora import sweep as sweeps
from tweetdora.compare import main as compare
from tweetdora.errors import InputError
from tweetdora.files import held_lock
from tweetdora.record_files import read_predictions, read_record
from tweetdora.records import PromptFormat, RunRecord
from tweetdora.sweep import SweepConfig, main, plan_runs, read_sweep, state_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path):
    """write(**keys): a sweep file with these keys beside the needed ones; its path."""

    def to_file(**keys):
        keys = {"output_dir": str(tmp_path / "runs"), "records_dir": str(tmp_path / "kept"), "seeds": [1], **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(
            yaml.safe_dump({name: value for name, value in keys.items() if value is not None}, sort_keys=False)
        )
        return str(path)

    return to_file


def test_every_combination_is_a_run_and_a_seed_comes_after_the_other(write):
    path = write(
        settings={"max_steps": 3},
        variants={"dora": None, "lora": {"method": "lora"}},
        grid={"learning_rate": [1e-3, 1e-4], "target_modules": [["q_proj", "v_proj"]]},
        seeds=[1, 2],
    )
    runs = plan_runs(read_sweep(path))
    assert [run.name for run in runs[:4]] == [
        "dora-learning_rate=0.001-target_modules=q_proj+v_proj-seed=1",
        "dora-learning_rate=0.0001-target_modules=q_proj+v_proj-seed=1",
        "lora-learning_rate=0.001-target_modules=q_proj+v_proj-seed=1",
        "lora-learning_rate=0.0001-target_modules=q_proj+v_proj-seed=1",
    ]
    assert [run.recipe["seed"] for run in runs] == [1] * 4 + [2] * 4
    assert (runs[2].recipe["method"], runs[2].recipe["max_steps"]) == ("lora", 3)


def test_a_recipe_is_what_all_runs_begin_with(write, tmp_path):
    (tmp_path / "recipe.yaml").write_text("r: 4\nlora_alpha: 9\n")
    (run,) = plan_runs(read_sweep(write(config=str(tmp_path / "recipe.yaml"), settings={"r": 2})))
    assert (run.recipe["r"], run.recipe["lora_alpha"]) == (2, 9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seeds": None}, "sweep.yaml has no seeds."),
        ({"sedes": [1]}, "unknown key sedes; expected keys are output_dir, records_dir, seeds, config"),
        ({"seeds": []}, "seeds is []; expected one or more different values"),
        ({"grid": {"r": [4, 4]}}, "r is [4, 4]; expected one or more different values"),
        ({"splits": ["tset"]}, "splits is ['tset']; expected some of train, validation, test"),
        (
            {"variants": {"owner/model": {}}},
            "'owner/model' is the name of a folder, so it may not be empty or contain a slash. Call it owner_model",
        ),
        ({"seeds": 3}, "sweep.yaml.seeds is 3; expected list[int]"),
        ({"settings": {"learning_rat": 1}}, "run seed=1: unknown key 'learning_rat'. Did you mean learning_rate?"),
        ({"settings": {"r": 0}}, "--r is 0 and --lora_alpha 16; both must be 1 or more"),
        ({"grid": {"seed": [1, 2]}}, "seed is set by the sweep for each run"),
        ({"evaluate": {"precision": "fp32"}}, "evaluate sets precision, which the sweep sets for each run"),
        ({"evaluate": {"batch_sise": 4}}, "unknown argument '--batch_sise=4'; did you mean --batch_size?"),
        ({"config": "nowhere.yaml"}, "config nowhere.yaml: there is no such file"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said_before_any_work(write, keys, message):
    with pytest.raises(InputError, match=re.escape(message)):
        plan_runs(read_sweep(write(**keys)))


def test_a_run_of_two_sweeps_is_run_once_for_the_splits_of_both(write, tmp_path):
    first = read_sweep(write(splits=["validation"]))
    second = read_sweep(write(splits=["validation", "test"]))
    (run,) = plan_runs(first)
    assert sweeps._join(None, first, run) == (first, run)
    joined, same = sweeps._join((first, run), second, plan_runs(second)[0])
    assert (joined.splits, same) == (["validation", "test"], run)
    (other,) = plan_runs(read_sweep(write(settings={"r": 4})))
    with pytest.raises(InputError, match="two sweeps have different runs in .*seed=1. Give one of them another"):
        sweeps._join((first, run), second, other)


def test_a_run_of_two_sweeps_is_measured_in_one_way(write):
    first = read_sweep(write(splits=["validation"], evaluate={"max_eval_samples": 200}))
    second = read_sweep(write(splits=["test"]))
    (run,) = plan_runs(first)
    with pytest.raises(
        InputError, match="two sweeps have the run .*, but another evaluate: {'max_eval_samples': 200}"
    ):
        sweeps._join((first, run), second, plan_runs(second)[0])


def test_two_sweeps_at_once_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "sweep.yaml"
    path.write_text(f"output_dir: {tmp_path}/runs\nrecords_dir: {tmp_path}/records\nseeds: [1]\n")
    with held_lock("sweep", "one", "."), pytest.raises(InputError, match="another sweep is running on this machine"):
        main([str(path)])
    assert not (tmp_path / "runs").exists()


# A sweep on the tiny model


@pytest.fixture(scope="module")
def tiny(teachable_dir, data_dir, tmp_path_factory):
    """(folder, path): a sweep file of two runs on the tiny model."""
    folder = tmp_path_factory.mktemp("sweep")
    keys = {
        "output_dir": str(folder / "runs"),
        "records_dir": str(folder / "kept"),
        "settings": {
            **{"model_name_or_path": teachable_dir, "dataset_name": data_dir, "max_train_samples": 0},
            **{"system_prompt": "Say how the day is: negative, neutral or positive.", "precision": "fp32"},
            **{"max_steps": 20, "save_steps": 2, "logging_steps": 1, "max_eval_samples": 0, "max_new_tokens": 3},
        },
        "variants": {"slow": {"learning_rate": 1e-4}, "fast": {"learning_rate": 2e-2}},
        "seeds": [1],
        "splits": ["validation", "test"],
        "evaluate": {"bootstrap_samples": 50},
        "launcher": [sys.executable, str(ROOT / "tests/forked.py"), forked.server_address()],
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    return folder, str(folder / "sweep.yaml")


def start(path, *flags):
    """The sweep in a process of its own."""
    lock = {"TMPDIR": str(Path(path).parent)}  # beside those of other tests
    return forked.start(["-m", "tweetdora.sweep", path, *flags], ROOT, lock)


def wait_for_a_loss(log, process):
    """Until the log of a training shows its first one."""
    limit = time.monotonic() + 300
    while "  loss " not in (log.read_text() if log.is_file() else ""):
        assert process.returncode is None and time.monotonic() < limit, process.said
        time.sleep(0.1)


def test_a_sweep_that_is_stopped_goes_on_and_keeps_records_without_texts(tiny, tmp_path, capsys, monkeypatch):
    folder, path = tiny
    keys = yaml.safe_load(Path(path).read_text())
    del keys["launcher"]  # the training that is stopped is one in a new Python
    (folder / "first.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    process = start(str(folder / "first.yaml"))
    log = folder / "runs/slow-seed=1.log"
    wait_for_a_loss(log, process)
    process.send_signal(signal.SIGTERM)
    said = process.end()
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Stopped after 0 runs; the same command resumes the sweep." in said
    run = json.loads((folder / "runs/slow-seed=1/run.json").read_text())
    assert run["status"] in ("interrupted", "finished") and not (folder / "kept").exists()

    process = start(path)
    said = process.end()
    assert process.returncode == 0, said
    assert f"{path}: 2 runs, 0 of them done" in said
    assert re.search(r"slow-seed=1: test macro-F1 \d\.\d{3} \[.*; 1 of 2 in .*, about .* left", said)
    assert re.search(r"fast-seed=1: test macro-F1 \d\.\d{3} \[.*; 2 of 2 in [^,]*$", said, re.MULTILINE)

    kept = folder / "kept/fast-seed=1"
    assert sorted(entry.name for entry in kept.iterdir()) == [
        *("run.json", "test.json", "test.predictions.json", "validation.json", "validation.predictions.json")
    ]
    texts = {
        line.text for line in read_predictions(str(folder / "runs/fast-seed=1/evaluation/test/predictions.jsonl"))
    }
    everything = "".join(file.read_text() for file in kept.iterdir())
    assert texts and not any(text in everything for text in texts)
    assert not list((folder / "runs/fast-seed=1").glob("checkpoint-*"))

    bases = sorted((folder / "runs").glob("base-*"))
    assert len(bases) == 1, "the base is asked the same by both runs, and answers once"
    measured = json.loads((bases[0] / "test.json").read_text())
    for name in ("slow", "fast"):
        record = json.loads((folder / f"kept/{name}-seed=1/test.json").read_text())
        assert record["base_measured"] == measured["created"] and record["base"] == measured["base"]

    answers = folder / "runs/fast-seed=1/evaluation/test/predictions.jsonl"
    before = answers.stat().st_mtime_ns
    (kept / "test.json").unlink()  # killed just before it was kept
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main([path]) == 0
    assert (kept / "test.json").is_file() and answers.stat().st_mtime_ns == before, "kept, not answered again"

    assert main([path, "--dry_run", "true"]) == 0
    assert "done     slow-seed=1\n  done     fast-seed=1\n" in capsys.readouterr().out
    assert compare([str(folder / "kept"), "--split", "test", "--plot", str(tmp_path / "plot.png")]) == 0
    said = capsys.readouterr().out
    assert said.count("learning_rate 0.02") == 2 and re.search(r"higher in [01] of 1 seeds", said)
    assert (tmp_path / "plot.png").stat().st_size > 5_000


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_no_training_goes_on_alone_when_the_sweep_is_killed(tiny, tmp_path):
    """Its successor would train in the same folder beside it. It stops as by SIGTERM, with a checkpoint."""
    folder, path = tiny
    keys = yaml.safe_load(Path(path).read_text())
    keys |= {"output_dir": str(tmp_path / "runs"), "records_dir": str(tmp_path / "kept")}
    del keys["launcher"]  # new Pythons
    keys["settings"]["max_steps"] = 100_000
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    process = start(str(tmp_path / "sweep.yaml"))
    run_dir = next(iter(plan_runs(read_sweep(str(tmp_path / "sweep.yaml"))))).run_dir
    log, record = Path(f"{run_dir}.log"), Path(run_dir, "run.json")
    wait_for_a_loss(log, process)
    process.send_signal(signal.SIGKILL)
    process.end()
    limit = time.monotonic() + 300
    while time.monotonic() < limit and json.loads(record.read_text())["status"] != "interrupted":
        time.sleep(0.1)
    assert json.loads(record.read_text())["status"] == "interrupted"
    assert list(Path(run_dir).glob("checkpoint-*"))


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tiny, tmp_path, monkeypatch, capsys):
    """The records were removed, as a message had advised, and the run folder was not."""
    _, path = tiny
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    keys = yaml.safe_load(Path(path).read_text()) | {"records_dir": str(tmp_path / "kept")}
    keys["variants"] = {"fast": {"learning_rate": 3e-2}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    assert main([str(tmp_path / "sweep.yaml")]) == 1
    said = capsys.readouterr()
    assert "failed: fast-seed=1: " in said.err and "learning_rate: was 0.02, now 0.03" in said.err
    assert not (tmp_path / "kept").exists()


def test_a_stop_reaches_what_a_launcher_started(tiny, tmp_path):
    """As accelerate launch does, the launcher starts the script as its child and passes no signal on."""
    _, path = tiny
    (tmp_path / "launcher.py").write_text(
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))\n"
    )
    keys = yaml.safe_load(Path(path).read_text())
    keys |= {"output_dir": str(tmp_path / "runs"), "records_dir": str(tmp_path / "kept")}
    keys |= {"launcher": [sys.executable, str(tmp_path / "launcher.py")]}
    keys["settings"]["max_steps"] = 100_000
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    process = start(str(tmp_path / "sweep.yaml"))
    log, record = tmp_path / "runs/slow-seed=1.log", tmp_path / "runs/slow-seed=1/run.json"
    wait_for_a_loss(log, process)
    process.send_signal(signal.SIGINT)
    said = process.end()
    assert process.returncode == 128 + signal.SIGINT, said
    assert json.loads(record.read_text())["status"] == "interrupted", "the sweep waited until it had stopped"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluate": {"bootstrap_samples": 50, "max_eval_samples": 5}}, "max_eval_samples: was all, now 5"),
        ({"evaluate": {}}, "bootstrap_samples: was 50, now 10000"),
        ({"precision": "bf16"}, "precision: was fp32, now bf16"),
        ({"max_new_tokens": 4}, "max_new_tokens: was 3, now 4"),
        ({"evaluate": {"bootstrap_samples": 50, "seed": 1}}, "seed: was 0, now 1"),
        (
            {"evaluate": {"bootstrap_samples": 50, "label_values": ["a", "b", "c"], "dataset_name": None}},
            r"replaced data settings: was none, now \(label_values: was None, now \['a', 'b', 'c'\]\)",
        ),
    ],
)
def test_a_split_that_was_measured_otherwise_is_refused(tiny, tmp_path, change, said):
    """After the sweep above, which measured all rows."""
    keys = yaml.safe_load(Path(tiny[1]).read_text())
    for name, value in change.items():
        (keys if name == "evaluate" else keys["settings"])[name] = value
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    sweep = read_sweep(str(tmp_path / "sweep.yaml"))
    run = plan_runs(sweep)[0]
    with pytest.raises(InputError, match=f"was measured differently: {said}. Remove it and"):
        state_of(run, sweep.splits, sweep.evaluate)


def test_a_kept_run_is_not_trained_again_for_another_split(tiny, tmp_path):
    """Its record would be replaced by another adapter's, beside the old one's scores."""
    folder, path = tiny
    keys = yaml.safe_load(Path(path).read_text()) | {"output_dir": str(tmp_path / "gone")}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    sweep = read_sweep(str(tmp_path / "sweep.yaml"))
    slow, _ = plan_runs(sweep)
    assert state_of(slow, ["validation", "test"], sweep.evaluate) == "done"
    with pytest.raises(InputError, match="lacks a split, and .*gone.* does not hold the run"):
        state_of(slow, ["train"], sweep.evaluate)


def test_records_of_other_settings_are_refused(tiny):
    """After the sweep above: the same folder, another rate."""
    folder, path = tiny
    keys = yaml.safe_load(Path(path).read_text())
    keys["variants"]["fast"] = {"learning_rate": 3e-2}
    (folder / "other.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    sweep = read_sweep(str(folder / "other.yaml"))
    slow, fast = plan_runs(sweep)
    assert state_of(slow, sweep.splits, sweep.evaluate) == "done"
    with pytest.raises(InputError, match="holds a run with other settings: learning_rate: was 0.02, now 0.03"):
        state_of(fast, sweep.splits, sweep.evaluate)


def test_a_run_that_fails_is_said_and_the_others_go_on(tiny, tmp_path, monkeypatch, capsys):
    folder, path = tiny
    keys = yaml.safe_load(Path(path).read_text())
    keys |= {"output_dir": str(tmp_path / "runs"), "records_dir": str(tmp_path / "kept"), "splits": ["test"]}
    keys["variants"] = {
        "wrong": {"target_modules": ["nowhere"]},
        "diverges": {"learning_rate": 1e30},
        "right": {"max_steps": 2},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    process = start(str(tmp_path / "sweep.yaml"), "--jobs", "2")
    said = process.end()
    assert process.returncode == 1, said
    log = tmp_path / "runs/wrong-seed=1.log"
    assert f"failed: wrong-seed=1: a script exited with status 2; see the end of {log}" in said
    assert "--target_modules nowhere matches no linear layer" in log.read_text()
    assert read_record(RunRecord, str(tmp_path / "kept/right-seed=1/run.json")).result.steps == 2

    kept = tmp_path / "kept/diverges-seed=1"
    run_dir = tmp_path / "runs/diverges-seed=1"
    assert (
        f"failed: diverges-seed=1: the training diverged, which is recorded in {kept}; see the end of {run_dir}.log. "
        "With the same settings it would diverge again: add a variant with a lower learning_rate, or with precision "
        "fp32.\n"
    ) in said
    record = read_record(RunRecord, str(kept / "run.json"))
    assert record.status == "diverged" and not record.train_data.first_texts
    assert [entry.name for entry in kept.iterdir()] == ["run.json"]
    (kept / "run.json").unlink()  # killed just before it was kept: the training is not begun again
    del keys["variants"]["wrong"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    log = Path(f"{run_dir}.log")
    before = log.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main([str(tmp_path / "sweep.yaml")]) == 1
    assert (kept / "run.json").is_file() and log.read_text() == before
    assert main([str(tmp_path / "sweep.yaml"), "--dry_run", "true"]) == 0
    said = capsys.readouterr().out
    assert "2 runs, 1 of them done, 1 diverged\n  diverged diverges-seed=1\n  done     right-seed=1\n" in said
    assert main([str(tmp_path / "sweep.yaml")]) == 1, "there is a result less than planned"
    assert f"diverges-seed=1 diverged: see {kept}/run.json. With the same settings" in capsys.readouterr().err

    keys["variants"]["diverges"] = {"learning_rate": 1e-3}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(InputError, match=r"learning_rate: was 1e\+30, now 0\.001"):
        main([str(tmp_path / "sweep.yaml")])
    shutil.rmtree(kept)
    assert main([str(tmp_path / "sweep.yaml")]) == 1
    assert "learning_rate: was 1e+30, now 0.001" in capsys.readouterr().err, "the run folder is of other settings too"


def test_no_run_begins_after_its_time(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main([write(), "--minutes", "0"]) == 0
    assert "1 runs were not started within --minutes; the same command resumes the sweep." in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match="--jobs is 0; expected 1 or more"):
        SweepConfig(jobs=0)


def test_the_base_is_asked_with_the_runs_own_prompt(write, monkeypatch):
    """A chat template may write the date: runs of two days are compared with the base of each."""
    sweep = read_sweep(write())
    (run, *_), runner, calls, folders = plan_runs(sweep), sweeps.Runner(SweepConfig()), [], []
    monkeypatch.setattr(runner, "_call", lambda run, words: calls.append(words))
    for day in ("Monday", "Monday", "Tuesday"):
        record = SimpleNamespace(prompt_format=PromptFormat(day, "", ["a", "b"], "<stop>", False))
        monkeypatch.setattr(sweeps, "read_record", lambda kind, path, found=record: found)
        folders.append(runner._measure_base(sweep, run, "test"))
    assert folders[0] == folders[1] != folders[2]
    assert all(f"--prompt_of={run.run_dir}" in words for words in calls) and len(calls) == 3
