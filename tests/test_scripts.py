"""The scripts as a user starts them: processes, files in, files out, with a tiny model.

The real small model goes through them in test_quickstart_run.py.
"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
from accelerate import PartialState
from sklearn.metrics import f1_score

from tweetdora.cli import parse_train
from tweetdora.device import compute_state
from tweetdora.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["negative", "neutral", "positive"]


def run(*words, cwd=ROOT, ok=True, **environment):
    """Start a script with this Python; its output, both streams together."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def main_of(script):
    """The script's main(), to call in this process: a new one takes seconds only to import."""
    return runpy.run_path(str(ROOT / script))["main"]


def refused(script, *words):
    """What a script's main() says when it refuses."""
    with pytest.raises(UserError) as caught:
        main_of(script)([str(word) for word in words])
    return str(caught.value)


def launch(*words, **options):
    return run("-m", "accelerate.commands.launch", "--config_file", "accelerate_config.yaml", *words, **options)


def train_flags(model_dir, data_dir, output_dir):
    values = {
        "model_name_or_path": model_dir,
        "dataset_name": data_dir,
        "output_dir": output_dir,
        "max_train_samples": 0,
        "system_prompt": "Say how the day is, neutral or not.",
        "method": "dora",
        "r": 8,
        "learning_rate": 2e-2,
        "max_steps": 40,
        "eval_steps": 20,
        "max_eval_samples": 12,
        "logging_steps": 5,
        "save_steps": 20,
        "precision": "fp32",
        "hub_model_id": "owner/tiny-dora",
    }
    flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*flags, "--target_modules", "all-linear"]


@pytest.fixture(scope="module")
def finished(teachable_dir, data_dir, tmp_path_factory):
    """A run folder that all three scripts have been through, and what they printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    printed = [launch("train.py", *train_flags(teachable_dir, data_dir, folder))]
    for script, *flags in (
        ("evaluate.py", "--precision", "fp32", "--bootstrap_samples", "500"),
        ("push_to_hub.py", "--dry_run", "true", "--check_samples", "12"),
    ):
        process = forked.start([ROOT / script, folder, *flags], ROOT)
        printed.append(process.end())
        assert process.returncode == 0, printed[-1]
    return folder, printed


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_the_three_commands_leave_what_the_readme_says(finished):
    folder, _ = finished
    expected = """adapter/adapter_config.json adapter/adapter_model.safetensors adapter/tokenizer.json
        adapter/tokenizer_config.json adapter/chat_template.jinja run.json training.png
        checkpoint-40/trainer_state.json
        evaluation/test.json evaluation/test/predictions.jsonl evaluation/test/confusion_base.png
        evaluation/test/confusion_finetuned.png publish/README.md publish/model.safetensors publish/config.json
        publish/tokenizer.json publish/chat_template.jinja publish/generation_config.json
        publish/adapter/adapter_model.safetensors publish/adapter/adapter_config.json publish/plots/training.png
        publish/plots/confusion_base.png publish/plots/confusion_finetuned.png"""
    assert [name for name in expected.split() if not (folder / name).is_file()] == []
    left_over = [path.name for path in folder.rglob("*") if path.name.endswith(".part")]
    assert left_over == []


def test_a_secret_on_the_card_stops_the_build_and_leaves_no_folder(finished, tmp_path, monkeypatch):
    """The system prompt stands on the card; here it is the password of a service as well."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("PASSWORD=Say how the day is, neutral or not.\n")
    said = refused("push_to_hub.py", finished[0], "--dry_run", "true", "--output_dir", tmp_path / "out")
    assert re.match(r"README\.md, line \d+, holds the value of PASSWORD in \.env\. Nothing was published\.", said)
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_training_teaches_the_tiny_model(finished):
    folder, _ = finished
    record, losses = read(folder / "evaluation/test.json"), read(folder / "run.json")["result"]["log_history"]
    losses = [entry["loss"] for entry in losses if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert record["finetuned"]["macro_f1"] > record["base"]["macro_f1"] + 0.2
    assert record["finetuned"]["eos_rate"] > 0.9


def test_the_run_record_names_everything_that_a_later_script_needs(finished, teachable_dir, data_dir):
    folder, _ = finished
    record = read(folder / "run.json")
    assert (record["status"], record["name"], record["steps"]) == ("finished", "tiny", 40)
    assert record["task"]["label_words"] == WORDS
    assert record["task"]["system_prompt"] == "Say how the day is, neutral or not."
    assert record["model"]["method"] == "dora" and record["training"]["learning_rate"] == 2e-2
    assert record["train_data"]["label_counts"] == {"negative": 16, "neutral": 16, "positive": 16}
    assert record["base_model"]["weights_sha256"]["model.safetensors"] == sha256(f"{teachable_dir}/model.safetensors")
    assert record["adapter"]["sha256"] == sha256(folder / "adapter/adapter_model.safetensors")
    assert record["adapter"]["start_sha256"] and record["environment"]["packages"]["peft"] == "0.21.2"
    assert record["tracker"]["mode"] == "offline" and record["result"]["peak_memory_bytes"]["process"] > 1e8
    assert record["command"].startswith("accelerate launch train.py --model_name_or_path")


def sha256(path):
    return subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]


def test_the_recorded_score_is_that_of_the_recorded_answers(finished):
    """Second computation: scikit-learn on predictions.jsonl."""
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "evaluation/test/predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for when in ("base", "finetuned"):
        predicted = [row[when]["predicted"] or "none" for row in rows]
        score = f1_score([row["label"] for row in rows], predicted, labels=WORDS, average="macro", zero_division=0)
        assert read(folder / "evaluation/test.json")[when]["macro_f1"] == pytest.approx(score, abs=1e-12)
        likeliest = [row[when]["likeliest"] for row in rows]
        score = f1_score([row["label"] for row in rows], likeliest, labels=WORDS, average="macro", zero_division=0)
        recorded = read(folder / "evaluation/test.json")[when]["likelihood"]
        assert recorded["macro_f1"] == pytest.approx(score, abs=1e-12)


def test_the_recipe_on_the_card_makes_the_same_run(finished, tmp_path):
    """Read as --config reads it, it gives every setting that the record holds; folders are named, not located."""
    folder, _ = finished
    card, record = (folder / "publish/README.md").read_text(encoding="utf-8"), read(folder / "run.json")
    path = tmp_path / "recipe.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)[1], encoding="utf-8")
    task, model, training = parse_train(["--config", str(path), "--output_dir", str(tmp_path / "new")], "")
    places = {"dataset_name", "model_name_or_path"}
    for found, expected in ((task, record["task"]), (model, record["model"])):
        assert {k: v for k, v in dataclasses.asdict(found).items() if k not in places} == {
            k: v for k, v in expected.items() if k not in places
        }
    del record["training"]["world_size"]
    for name, value in record["training"].items():
        found = getattr(training, name)
        assert getattr(found, "value", found) == value, name


def test_the_cards_snippet_prints_what_the_card_says(finished, tmp_path):
    """In a fresh process, with nothing of this project on the path."""
    folder, _ = finished
    card = (folder / "publish/README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    snippet = snippet.replace('"owner/tiny-dora"', repr(str(folder / "publish")))
    promised = re.search(r"It prints `(.*?)`\.", card)[1]
    assert promised in WORDS
    assert run("-c", snippet, cwd=tmp_path).splitlines()[-1] == promised


def test_the_published_folder_and_the_adapter_measure_like_the_run(finished, tmp_path, data_dir):
    """evaluate.py takes a run, an adapter and a model, and they are the same model."""
    folder, _ = finished
    recipe = tmp_path / "task.yaml"
    recipe.write_text(f"dataset_name: {data_dir}\nsystem_prompt: Say how the day is, neutral or not.\n")
    expected = read(folder / "evaluation/test.json")
    for target in ("publish", "adapter"):
        out = tmp_path / target
        words = [str(folder / target), "--config", str(recipe), "--output_dir", str(out), "--precision", "fp32"]
        assert main_of("evaluate.py")(words) == 0
        found = read(out / "test.json")
        measured = found["base" if target == "publish" else "finetuned"]  # a model alone is a base, whoever tuned it
        assert measured["confusion_matrix"] == expected["finetuned"]["confusion_matrix"]
        assert measured["macro_f1"] == expected["finetuned"]["macro_f1"]
        assert (found["finetuned"] is None) == (target == "publish")


def test_the_end_shows_the_table_and_the_card(finished):
    _, printed = finished
    end = printed[2]
    for words in ("base", "fine-tuned", "uniform guess", "always negative", "95 % interval", "difference in macro-F1"):
        assert words in end
    assert re.search(r"Card:  .*publish/README\.md\nDry run: nothing was pushed\.\n$", end)
    assert "24 of 24" not in end and "12 of 12 answers equal" in end


def test_scripts_print_no_warnings(finished):
    _, printed = finished
    for text in printed:
        assert "Warning" not in text and "Traceback" not in text


def test_the_same_command_again_is_refused_and_changes_nothing(finished, teachable_dir, data_dir):
    folder, _ = finished
    before = sha256(folder / "run.json")
    said = refused("train.py", *train_flags(teachable_dir, data_dir, folder))
    assert "already holds a run (finished). Choose another --output_dir" in said
    assert sha256(folder / "run.json") == before


def test_a_push_without_a_token_is_refused_and_the_folder_stays(finished):
    """As a process: the message without a traceback, and the exit status."""
    folder, _ = finished
    said = run("push_to_hub.py", str(folder), ok=False)
    assert said.startswith("push_to_hub.py: ") and "Traceback" not in said
    assert "no Hub token: run `hf auth login` or set HF_TOKEN" in said
    assert (folder / "publish/model.safetensors").is_file()


def test_dry_run_shows_plan_and_row_and_leaves_nothing(teachable_dir, data_dir, tmp_path, capsys):
    words = [*train_flags(teachable_dir, data_dir, tmp_path / "dry"), "--dry_run", "true"]
    assert main_of("train.py")(words) == 0
    said = capsys.readouterr().out
    for words in (
        f"48 examples of {data_dir}, train: 16 negative, 16 neutral, 16 positive",
        "40 of 16 examples = 1 process(es) x 1 x 16; learning rate 0.02, linear",
        "trainable parameters",
        "fp32: asked for by --precision fp32",
        "wandb, offline",
        "【negative】【<|im_end|>】",
    ):
        assert words in said
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: write(f / "run.json", status="interrupted"),
            "is interrupted, not finished. Resume it with its train.py",
        ),
        (lambda f: flip(f / "adapter/adapter_model.safetensors"), "its SHA-256 differs"),
        (lambda f: write(f / "evaluation/test.json", adapter_sha256="0"), "its adapter is '0'"),
        (lambda f: shutil.rmtree(f / "evaluation"), "Evaluate it first: python evaluate.py"),
        (
            lambda f: (f / "evaluation/test/predictions.jsonl").unlink(),
            "predictions.jsonl is missing. Evaluate it first: python evaluate.py",
        ),
        (
            lambda f: cut(f / "evaluation/test/predictions.jsonl"),
            "predictions.jsonl has a line that is not JSON",
        ),
        (lambda f: (f / "run.json").unlink(), "is not a run folder"),
    ],
)
def test_push_refuses_a_folder_that_is_not_whole(finished, tmp_path, monkeypatch, damage, message):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    damage(folder)
    monkeypatch.setattr("tweetdora.build.load_for_merge", None)  # refused before the merge
    assert message in refused("push_to_hub.py", folder, "--dry_run", "true")
    assert not (folder / "publish").exists()


def test_the_plots_are_drawn_from_the_records_that_the_numbers_are_from(finished, tmp_path):
    """So that a picture which is missing, or of another measurement, cannot get on the card."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish", "*.png"))
    assert main_of("push_to_hub.py")([str(folder), "--dry_run", "true", "--check_samples", "1"]) == 0
    for drawn in (finished[0] / "publish/plots").iterdir():
        assert (folder / "publish/plots" / drawn.name).read_bytes() == drawn.read_bytes()


def write(path, **changes):
    path.write_text(json.dumps({**read(path), **changes}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("output_dir", ["", "mine"])
def test_a_build_replaces_no_folder_that_is_not_its_own(finished, tmp_path, output_dir):
    """The copied run folder itself, and a folder of somebody's in it."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    (folder / "mine").mkdir()
    (folder / "mine/notes.txt").write_text("mine")
    before = sorted(folder.rglob("*"))
    said = refused("push_to_hub.py", folder, "--dry_run", "true", "--output_dir", f"{folder / output_dir}/")
    assert "is the run folder or contains it" in said or "it holds notes.txt. Choose another --output_dir" in said
    assert sorted(folder.rglob("*")) == before


def test_the_next_command_is_one_that_finds_what_was_measured(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    write(folder / "run.json", tracker=None)
    few = ["--max_eval_samples", "2", "--precision", "fp32", "--bootstrap_samples", "10"]
    assert f"Next: python push_to_hub.py {finished[0]} --dry_run true\n" in finished[1][1]
    main_of("evaluate.py")([str(folder), "--split", "validation", *few])
    assert f"Next: python push_to_hub.py {folder} --split validation --dry_run true\n" in capsys.readouterr().out
    main_of("evaluate.py")([str(folder), "--output_dir", str(tmp_path / "out"), *few])
    assert "Next:" not in capsys.readouterr().out


def test_answers_are_kept_when_the_statistics_fail_and_no_older_record_claims_them(finished, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    (folder / "evaluation/test/predictions.jsonl").unlink()

    def fail(*arguments):
        raise ArithmeticError("no statistics")

    monkeypatch.setattr("tweetdora.evaluation.bootstrap_intervals", fail)
    with pytest.raises(ArithmeticError, match="no statistics"):
        main_of("evaluate.py")([str(folder), "--precision", "fp32"])
    kept, whole = (path / "evaluation/test/predictions.jsonl" for path in (folder, finished[0]))
    assert kept.read_text() == whole.read_text()
    assert not (folder / "evaluation/test.json").exists()


@pytest.fixture
def apple_gpu(monkeypatch):
    """A machine with an Apple GPU, and accelerate as it is before its first use."""
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "0")  # accelerate sets it
    PartialState._reset_state()
    yield
    PartialState._reset_state()


def test_on_a_mac_the_scripts_compute_on_the_cpu(apple_gpu):
    assert compute_state().device.type == "cpu"


def test_a_published_template_writes_the_prompt_that_was_trained(teachable_dir, data_dir, tokenizer, tmp_path):
    """The base's own writes a date, and leaves the assistant's header out."""
    base, run_dir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(teachable_dir, base)
    dated = "{{ 'today is ' + strftime_now('%d %b %Y') }}"
    template = dated + tokenizer.chat_template.partition("{% if add_generation_prompt")[0]
    (base / "chat_template.jinja").write_text(template)
    flags = [*train_flags(base, data_dir, run_dir), "--max_steps", "2", "--max_eval_samples", "0"]
    assert main_of("train.py")([str(flag) for flag in flags]) == 0
    assert main_of("evaluate.py")([str(run_dir), "--max_eval_samples", "6", "--bootstrap_samples", "50"]) == 0
    assert main_of("push_to_hub.py")([str(run_dir), "--dry_run", "true", "--check_samples", "3"]) == 0
    record = read(run_dir / "run.json")
    published = (run_dir / "publish/chat_template.jinja").read_text()
    assert "strftime_now" not in published and json.dumps(record["prompt_format"]["head"]) in published
    assert record["prompt_format"]["tail"].endswith("<|im_start|>assistant\n")


def test_on_a_mac_accelerate_alone_would_take_the_gpu(apple_gpu):
    """The companion: were it not so, the test above could not fail."""
    assert PartialState().device.type == "mps"


def test_another_base_under_the_same_name_is_refused(finished, tmp_path, make_model, tokenizer):
    folder, other = tmp_path / "copy", tmp_path / "base"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    make_model(seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for path in (folder / "run.json", folder / "evaluation/test.json"):
        write(path, base_model={**read(path)["base_model"], "name_or_path": str(other)})
    assert "is not this run's base model" in refused("push_to_hub.py", folder, "--dry_run", "true")
    assert "is not the base model that" in refused("evaluate.py", folder)


def test_the_published_folder_is_asked_its_own_question_and_answers_as_the_run_did(finished, tmp_path, monkeypatch):
    """task.json says what: without it the prompt would be the published run's, and the scores another model's."""
    folder, printed = finished
    out = tmp_path / "results"
    flags = ["--precision", "fp32", "--bootstrap_samples", "50", "--output_dir", str(out), "--report_to", "none"]
    data = read(folder / "run.json")["task"]["dataset_name"]
    monkeypatch.chdir(tmp_path)  # task.json names the data set's folder, which lies elsewhere
    with pytest.raises(
        UserError, match="--dataset_name tiny-tweets: it is neither an existing file or folder nor a Hub id"
    ):
        main_of("evaluate.py")([str(folder / "publish"), *flags])
    assert main_of("evaluate.py")([str(folder / "publish"), *flags, "--dataset_name", data]) == 0
    record, expected = read(out / "test.json"), read(folder / "evaluation/test.json")
    assert record["base"]["macro_f1"] == expected["finetuned"]["macro_f1"]
    assert record["corrections"] == [], "the same data set, found again"
    # What the run's record says of its training stands in task.json too.
    found, known = (one["prior_corrected"] for one in (record, expected))
    assert found["train_shares"] == known["train_shares"]
    assert found["estimated_shares"] == pytest.approx(known["estimated_shares"], abs=1e-3)
    counts = read(folder / "run.json")["train_data"]["label_counts"]
    assert known["train_shares"] == {word: count / sum(counts.values()) for word, count in counts.items()}
    lines = (folder / "evaluation/test/predictions.jsonl").read_text().splitlines()
    likelihoods = [json.loads(line)["finetuned"]["log_likelihoods"] for line in lines]
    plain = np.exp(likelihoods) / np.exp(likelihoods).sum(1, keepdims=True)
    weighted = plain * [known["estimated_shares"][word] / share for word, share in known["train_shares"].items()]
    labels = [list(counts).index(json.loads(line)["label"]) for line in lines]
    assert known["scores"]["accuracy"] == (weighted.argmax(1) == labels).mean()
    mean = (weighted / weighted.sum(1, keepdims=True)).mean(0)
    assert list(known["estimated_shares"].values()) == pytest.approx(mean, abs=1e-3)
    assert record["prompt_format"] == expected["prompt_format"]


def test_runs_with_other_seeds_beside_the_one_that_is_published_are_on_its_card(finished, tmp_path, capsys):
    """A copy that says another seed stands for a second training: its answers are the same, so its spread is 0."""
    for name in ("one", "two"):
        shutil.copytree(
            finished[0], tmp_path / name, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish")
        )
    run = read(tmp_path / "two/run.json")
    write(tmp_path / "two/run.json", training={**run["training"], "seed": 7})
    assert main_of("push_to_hub.py")([str(tmp_path / "one"), "--dry_run", "true", "--check_samples", "1"]) == 0
    seed = run["training"]["seed"]
    said, card = capsys.readouterr().out, (tmp_path / "one/publish/README.md").read_text()
    assert f"The card reports the mean over seeds 7, {seed}:" in said and f"{tmp_path}/two" in said
    assert f"the mean of 2 trainings with seeds 7 and {seed} (standard deviation 0.000;" in card
    assert f"This model is the one with seed {seed}:" in card


def test_a_finished_run_is_measured_on_other_data_and_the_card_says_so(finished, tmp_path, capsys):
    """The run's test split was the wrong one: another is named, and so is the column, which has another name there."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("wandb", "checkpoint-*", "publish"))
    rows = ["tweet,mood", *(f"a {word} day {number},{word}" for number in range(4) for word in ("bad", "good"))]
    rows[-1] = "good" + " day" * 600 + ",good"
    (tmp_path / "other.csv").write_text("\n".join([*rows, "no mood,"]) + "\n")
    flags = ["--dataset_name", tmp_path / "other.csv", "--test_split", "train", "--text_column", "tweet"]
    flags += ["--label_column", "mood", "--label_values", "bad", "-", "good", "--skip_bad_rows", "true"]
    flags += ["--precision", "fp32", "--bootstrap_samples", "50", "--report_to", "none"]
    assert main_of("evaluate.py")([str(word) for word in (folder, *flags)]) == 0
    said = capsys.readouterr().out
    assert "note: measured with another text_column: was 'text', now 'tweet'\n" in said
    assert "note: test: no example has the label neutral" in said and "note: test: only 8 examples" in said
    record = read(folder / "evaluation/test.json")
    truncated = "texts truncated to fit 512 tokens: 1"
    assert f"note: test: {truncated}\n" in said and {"split": "test", "text": truncated} in record["notes"]
    assert (record["data"]["num_examples"], record["data"]["skipped"]) == (8, {"no label": 1})
    assert [line.partition(":")[0] for line in record["corrections"]] == [
        *("dataset_name", "test_split", "text_column", "label_column", "skip_bad_rows", "label_values"),
    ]
    assert main_of("push_to_hub.py")([str(folder), "--dry_run", "true", "--check_samples", "1"]) == 0
    card = (folder / "publish/README.md").read_text()
    assert "- Evaluated on other data than the recipe names: text\\_column: was 'text', now 'tweet'." in card
    assert "- `train`: 1 rows were skipped: 1 with no label." in card and "`train` | 8 | 4 | 0 | 4 |" in card


def test_the_bases_answers_are_taken_from_an_earlier_evaluation_of_the_same(finished, tmp_path):
    """Its scores and answers are those, and every difference in what is asked is refused by name."""
    folder, _ = finished
    out = tmp_path / "again"
    flags = ["--report_to", "none", "--base_results", str(folder / "evaluation")]
    earlier = read(folder / "evaluation/test.json")
    given = ["--bootstrap_samples", str(earlier["bootstrap"]["samples"])]
    assert main_of("evaluate.py")([str(folder), *flags, *given, "--output_dir", str(out)]) == 0
    record = read(out / "test.json")
    assert record["base_measured"] == earlier["created"] and earlier["base_measured"] is None
    for name in ("base", "difference", "baselines"):
        assert record[name] == earlier[name]
    assert record["finetuned"]["confusion_matrix"] == earlier["finetuned"]["confusion_matrix"]
    lines = (folder / "evaluation/test/predictions.jsonl").read_text()
    assert (out / "test/predictions.jsonl").read_text() == lines

    for more, what in (
        ([*given, "--max_new_tokens", "2"], "max_new_tokens: "),
        ([*given, "--max_eval_samples", "5"], "examples: "),
        (["--bootstrap_samples", "7"], "bootstrap: "),
    ):
        said = refused("evaluate.py", folder, *flags, *more, "--output_dir", tmp_path / "no")
        assert "does not match this measurement: " in said and what in said, said
    changed = tmp_path / "changed"
    shutil.copytree(folder / "evaluation", changed)
    (changed / "test.json").write_text(json.dumps(earlier | {"max_length": earlier["max_length"] - 1}))
    flags_changed = ["--report_to", "none", "--base_results", str(changed), *given]
    assert "max_length: " in refused("evaluate.py", folder, *flags_changed, "--output_dir", tmp_path / "no")
    assert "validation.json is missing" in refused("evaluate.py", folder, *flags, "--split", "validation")
    data = read(folder / "run.json")["task"]["dataset_name"]
    assert "needs a run folder; " in refused("evaluate.py", folder / "adapter", *flags, "--dataset_name", data)
