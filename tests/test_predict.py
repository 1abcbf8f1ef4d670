"""predict.py and Classifier: every format in and out, the order, resuming, memory, and what is refused."""

import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from conftest import tweets
from forked import finish, launch
from sample_records import sample_run

import tweetdora
from tweetdora import Classifier, prediction
from tweetdora.build import write_task
from tweetdora.classifier import Prediction
from tweetdora.cli import show_log
from tweetdora.errors import InputError
from tweetdora.modeling import load_base, load_tokenizer
from tweetdora.prompts import PromptTokenizer, read_prompt_format
from tweetdora.scoring import score_padded
from tweetdora.tables import read_any_rows

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["negative", "neutral", "positive"]
ADDED = ["label", "probability_negative", "probability_neutral", "probability_positive", "margin"]


@pytest.fixture(autouse=True)
def log_where_it_was():
    """predict.py logs to standard error, and this process goes on behind it."""
    yield
    show_log()


@pytest.fixture(scope="module")
def model(teachable_dir, task, tmp_path_factory) -> str:
    """A tiny model with a task.json, as push_to_hub.py leaves one."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    shutil.copytree(teachable_dir, folder)
    found = read_prompt_format(load_tokenizer(str(folder)), task)
    write_task(str(folder), sample_run(task=task, prompt_format=found))
    return str(folder)


@pytest.fixture(scope="module")
def classifier(model) -> Classifier:
    return Classifier(model, precision="fp32", batch_size=4)


TEXTS = [row["text"] for row in tweets("train")][:20]


def main(*words: object) -> int:
    return runpy.run_path(str(ROOT / "predict.py"))["main"]([*map(str, words), "--precision", "fp32"])


def refused(*words: object) -> str:
    with pytest.raises(InputError) as caught:
        main(*words)
    return str(caught.value)


# Classifier


def test_the_probabilities_are_those_of_the_words_behind_the_prompt(classifier, model, task):
    """Second way: by ordinary passes of a model that is loaded plainly."""
    plain = load_base(model, None, torch.float32, torch.device("cpu"))
    plain.set_attn_implementation("sdpa")
    tokenizer = load_tokenizer(model)
    prompt_tokenizer = PromptTokenizer(tokenizer, read_prompt_format(tokenizer, task), 512)
    sums, _ = score_padded(plain, prompt_tokenizer.prompt_ids(TEXTS)[0], prompt_tokenizer.completion_ids)
    expected = sums.double().softmax(-1)
    found = classifier(TEXTS)
    for row, one in zip(expected.tolist(), found, strict=True):
        assert list(one.probabilities.values()) == pytest.approx(row, abs=2e-5)
        assert one.label == WORDS[row.index(max(row))]
        first, second = sorted(row, reverse=True)[:2]
        assert one.margin == pytest.approx(first - second, abs=4e-5)
    assert len({one.label for one in found}) > 1


def test_one_text_is_a_list_of_one_and_an_empty_text_has_no_label(classifier):
    (one,) = classifier("What a good day")
    assert one.label in WORDS and list(one.probabilities) == WORDS
    assert classifier(["", " \n", "What a good day"]) == [Prediction(None, {}, None)] * 2 + [one]
    assert classifier([]) == []


def test_which_task_a_model_without_one_is_given_is_said(teachable_dir, model, capsys):
    """Or labels and prompt of the published run would be taken for the model's own."""
    Classifier(model, precision="fp32")
    assert "task.json" not in capsys.readouterr().err
    Classifier(teachable_dir, precision="fp32")
    assert f"note: no task.json was found with {teachable_dir}, so the published" in capsys.readouterr().err


def test_the_package_offers_the_classifier_without_importing_torch():
    assert tweetdora.Classifier is Classifier
    with pytest.raises(AttributeError, match="has no attribute 'Clasifier'"):
        _ = tweetdora.Clasifier
    code = "import sys, tweetdora; assert 'torch' not in sys.modules and 'Classifier' in tweetdora.__all__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


# Files of every kind


def write_table(path: Path, rows: list[dict]) -> None:
    frame = pandas.DataFrame(rows)
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
        ".parquet": lambda: frame.to_parquet(path),
        ".txt": lambda: path.write_text("".join(row["text"] + "\n" for row in rows)),
    }[path.suffix]()


def read_table(path: Path) -> list[dict]:
    return [row.values for row in read_any_rows(str(path))]


@pytest.mark.parametrize("output", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("given", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_rows_keep_their_order_and_columns_and_get_what_was_found(given, output, model, classifier, tmp_path, capsys):
    texts = [*TEXTS[:9], "", 'a "quoted", text']
    rows = [{"id": number, "text": text, "more": f"m{number}"} for number, text in enumerate(texts)]
    write_table(tmp_path / f"in{given}", rows)
    assert main(model, tmp_path / f"in{given}", "--output", tmp_path / f"out{output}", "--batch_size", 4) == 0
    found = read_table(tmp_path / f"out{output}")
    kept = ["text"] if given == ".txt" else ["id", "text", "more"]
    assert [list(row) for row in found] == [[*kept, *ADDED]] * len(texts)
    assert [row["text"] or "" for row in found] == texts
    if given != ".txt":
        assert [(int(row["id"]), row["more"]) for row in found] == [(row["id"], row["more"]) for row in rows]
    for row, expected in zip(found, classifier(texts), strict=True):
        assert (row["label"] or None) == expected.label
        numbers = [row[name] for name in ADDED[1:]]
        if expected.label is None:
            assert set(numbers) <= {"", None}
        else:
            wanted = [*expected.probabilities.values(), expected.margin]
            assert [float(number) for number in numbers] == pytest.approx(wanted, abs=5e-5)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == [f"out{output}"]
    said = capsys.readouterr().err
    assert "rows without a text, left without a label: 1\n" in said and f"Wrote {tmp_path}/out{output}\n" in said


def test_values_keep_their_types_where_the_formats_have_types(model, tmp_path):
    row = {"text": "a good day", "n": 1, "x": 0.5, "ok": True, "tags": ["a", "b"], "none": None}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"text": "x", "extra": 1}) + "\n")
    main(model, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    first, second = read_table(tmp_path / "out.jsonl")
    assert {name: first[name] for name in row} == row
    assert (second["text"], second["extra"]) == ("x", 1)
    main(model, tmp_path / "in.jsonl", "--output", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as stream:
        first, second = csv.DictReader(stream)
    assert (first["n"], first["ok"], first["tags"], first["none"], first["extra"]) == (
        "1",
        "true",
        '["a", "b"]',
        "",
        "",
    )
    assert (second["n"], second["extra"]) == ("", "1")


def test_columns_that_are_taken_are_left_alone(model, tmp_path):
    (tmp_path / "in.csv").write_text("text,label,margin\na good day,gold,wide\n")
    main(model, tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    (row,) = read_table(tmp_path / "out.csv")
    assert list(row) == ["text", "label", "margin", *(f"predicted_{name}" for name in ADDED)]
    assert (row["label"], row["margin"]) == ("gold", "wide") and row["predicted_label"] in WORDS


def test_a_file_in_another_dialect_and_encoding_is_read_with_the_flags(model, tmp_path):
    (tmp_path / "in.csv").write_bytes("id;text\n1;schöner Tag\n".encode("latin-1"))
    flags = ["--output", tmp_path / "out.csv"]
    assert "--encoding, such as latin-1" in refused(model, tmp_path / "in.csv", *flags)
    assert 'set --csv_delimiter ";"' in refused(model, tmp_path / "in.csv", *flags, "--encoding", "latin-1")
    main(model, tmp_path / "in.csv", *flags, "--encoding", "latin-1", "--csv_delimiter", ";")
    assert (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()[1].startswith("1;schöner Tag;")


# Standard input and output


def through(monkeypatch, capsys, given: str, *words: object) -> tuple[str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    assert main(*words) == 0
    found = capsys.readouterr()
    return found.out, found.err


def test_lines_of_text_become_csv(model, classifier, monkeypatch, capsys):
    out, said = through(monkeypatch, capsys, "a good day\n\nthe bad news", model)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["text"] for row in rows] == ["a good day", "", "the bad news"]
    labels = [one.label or "" for one in classifier(["a good day", "", "the bad news"])]
    assert [row["label"] for row in rows] == labels
    assert "3 rows: " in said and "rows: " not in out


def test_json_lines_come_out_as_json_lines(model, monkeypatch, capsys):
    given = '{"text": "a good day", "id": 7}\n'
    out, _ = through(monkeypatch, capsys, given, model, "--input_format", "jsonl")
    assert json.loads(out)["id"] == 7 and json.loads(out)["label"] in WORDS


def test_a_file_without_an_output_is_printed(model, tmp_path, monkeypatch, capsys):
    (tmp_path / "in.tsv").write_text("id\ttext\n1\ta good day\n")
    out, _ = through(monkeypatch, capsys, "", model, tmp_path / "in.tsv")
    assert out.splitlines()[0].split("\t") == ["id", "text", *ADDED]


def test_standard_input_is_read_in_its_encoding(model, monkeypatch, capsys):
    words = (model, "--input_format", "csv", "--encoding")
    given = "text\nschön\n".encode("latin-1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert main(*words, "latin-1") == 0
    assert next(csv.DictReader(io.StringIO(capsys.readouterr().out)))["text"] == "schön"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert "standard input is not in the encoding ascii" in refused(*words, "ascii")


def test_a_byte_order_mark_at_the_start_of_standard_input_is_no_text(model, monkeypatch, capsys):
    """Excel writes one."""
    given = "\ufefftext\nschön\n".encode()
    for flags in (
        ["--input_format", "csv"],
        ["--input_format", "csv", "--encoding", "UTF8"],
        ["--input_format", "txt"],
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        assert main(model, *flags) == 0
        rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
        assert [row["text"] for row in rows] == (["schön"] if "csv" in flags else ["text", "schön"])


def test_an_output_needs_an_input_file(model, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("a good day\n"))
    said = refused(model, "--output", tmp_path / "out.csv")
    assert said == (
        f"--output {tmp_path}/out.csv needs an input file; rows of standard input are answered on standard output."
    )


def test_a_label_in_a_later_line_is_not_replaced(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "a"}\n{"text": "b", "label": "gold"}\n'))
    assert "line 2 has a column 'label', which the first line lacks" in refused(model, "--input_format", "jsonl")


def test_a_carriage_return_in_a_text_comes_back_in_one_field(model, tmp_path):
    texts = ["a\rgood day", "a\r\nbad day", "plain"]
    write_table(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    main(model, tmp_path / "in.jsonl", "--output", tmp_path / "out.csv")
    content = (tmp_path / "out.csv").read_bytes().decode()
    assert [row["text"] for row in csv.DictReader(io.StringIO(content, newline=""))] == texts
    assert content.endswith("\n") and not content.endswith("\r\n")


def test_what_json_has_no_form_for_is_a_string(model, tmp_path):
    frame = pandas.DataFrame({"text": ["a day"], "at": [pandas.Timestamp("2026-01-02")], "cost": [Decimal("1.50")]})
    frame.to_parquet(tmp_path / "in.parquet")
    main(model, tmp_path / "in.parquet", "--output", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["at"], row["cost"]) == ("2026-01-02 00:00:00", "1.50")


def test_what_is_no_text_is_not_classified_by_its_spelling(model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": NaN}\n{"text": null}\n{"text": 5}\n')
    main(model, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    found = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found[:2] == [None, None] and found[2] in WORDS
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n{"text": ["b"]}\n')
    said = refused(model, tmp_path / "list.jsonl", "--output", tmp_path / "out2.jsonl")
    assert "list.jsonl, line 2: column 'text' holds ['b']; expected text" in said
    assert not (tmp_path / "out2.jsonl.part").exists()
    main(model, tmp_path / "list.jsonl", "--output", tmp_path / "out2.jsonl", "--skip_bad_rows", "true")
    labels = [json.loads(line)["label"] for line in (tmp_path / "out2.jsonl").read_text().splitlines()]
    assert labels[0] in WORDS and labels[1] is None


def test_half_of_a_surrogate_pair_is_a_row_that_cannot_be_read(model, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"text": "a day"}\n{"text": "b", "by": ["\\ud83d"]}\n')
    words = (model, tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert "line 2: holds half of a surrogate pair" in refused(*words)
    main(*words, "--skip_bad_rows", "true")
    assert "unreadable rows skipped: 1" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_nothing_on_standard_input_is_refused(model, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "standard input is empty; expected one text per line" in refused(model)


# Interrupted


@pytest.fixture
def long_file(tmp_path) -> Path:
    path = tmp_path / "in.csv"
    write_table(path, [{"id": number, "text": TEXTS[number % 20]} for number in range(90)])
    return path


def counted(monkeypatch, fail_after: int | None = None) -> list[int]:
    """How many texts each call of the classifier was given; it fails when so many have been answered."""
    asked: list[int] = []
    original = Classifier.predict

    def call(self, texts, *rest):
        if fail_after is not None and sum(asked) >= fail_after:
            raise KeyboardInterrupt
        asked.append(len(texts))
        return original(self, texts, *rest)

    monkeypatch.setattr(Classifier, "predict", call)
    return asked


def test_an_interrupted_command_goes_on_and_answers_nothing_twice(model, long_file, tmp_path, monkeypatch):
    main(model, long_file, "--output", tmp_path / "whole.csv", "--batch_size", 2)
    words = (model, long_file, "--output", tmp_path / "out.csv", "--batch_size", 2)
    with monkeypatch.context() as patch:
        asked = counted(patch, fail_after=48)
        with pytest.raises(KeyboardInterrupt):
            main(*words)
        assert sum(asked) == 48, "three chunks of 16"
    assert not (tmp_path / "out.csv").exists()
    with open(tmp_path / "out.csv.part", "a", encoding="utf-8") as stream:
        stream.write("[1, 0.1, 0.2, 0.7]\n[2, 0.1, ")  # a chunk that was cut
    with monkeypatch.context() as patch:
        asked = counted(patch)
        assert main(*words) == 0
        assert sum(asked) == 90 - 48
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not (tmp_path / "out.csv.part").exists()


def test_what_was_computed_stays_when_the_output_cannot_be_written(model, long_file, tmp_path, monkeypatch):
    words = (model, long_file, "--output", tmp_path / "out.csv")
    with monkeypatch.context() as patch:
        patch.setattr(prediction.RowWriter, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            main(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv.part"]
    with monkeypatch.context() as patch:
        asked = counted(patch)
        main(*words)
        assert asked == []
    assert len(read_table(tmp_path / "out.csv")) == 90


def test_predictions_of_another_command_are_not_gone_on_with(model, long_file, tmp_path, monkeypatch):
    words = (model, long_file, "--output", tmp_path / "out.csv", "--batch_size", 2)
    with monkeypatch.context() as patch:
        counted(patch, fail_after=16)
        with pytest.raises(KeyboardInterrupt):
            main(*words)
    before = (tmp_path / "out.csv.part").read_bytes()
    assert "out.csv.part holds predictions of another command" in refused(*words, "--encoding", "latin-1")
    long_file.write_text(long_file.read_text() + "90,one more\n")
    assert "out.csv.part holds predictions of another command" in refused(*words)
    assert (tmp_path / "out.csv.part").read_bytes() == before


# Prior correction


@pytest.fixture(scope="module")
def model_with_shares(model, tmp_path_factory) -> str:
    """The tiny model, of whose training the shares of the labels are known."""
    folder = tmp_path_factory.mktemp("shares") / "tiny"
    shutil.copytree(model, folder)
    task = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps({**task, "label_shares": [0.2, 0.3, 0.5]}))
    return str(folder)


def test_an_estimate_that_leaves_a_label_without_a_row_is_said():
    summary = prediction.Summary(Counter(bad=10), corrected={"bad": (0.95, 0.5), "good": (0.05, 0.5)})
    assert summary.lines(512)[-1] == (
        "the estimate leaves no row for good: this model's probabilities are too uncertain for it. Compare with "
        "--prior_correction none"
    )
    summary.corrected["good"] = (0.1, 0.5)
    assert "leaves no row" not in " ".join(summary.lines(512))


def test_prior_correction_makes_the_probabilities_add_up_to_the_estimated_shares(
    model_with_shares, long_file, tmp_path, capsys
):
    """EM ends where the mean of the corrected probabilities is the share: a fixed point (the paper's equation 2.9)."""
    main(model_with_shares, long_file, "--output", tmp_path / "plain.csv")
    main(model_with_shares, long_file, "--output", tmp_path / "out.csv", "--prior_correction", "em")
    said = capsys.readouterr().err
    found = re.search(r"shares of (.*)% negative \(in training 20.0%\), (.*)% neutral .*, (.*)% positive", said)
    assert found is not None, said
    rows = {name: read_table(tmp_path / f"{name}.csv") for name in ("plain", "out")}
    columns = [f"probability_{word}" for word in WORDS]
    plain, corrected = (np.array([[float(row[c]) for c in columns] for row in table]) for table in rows.values())
    assert corrected.mean(0) * 100 == pytest.approx([float(share) for share in found.groups()], abs=0.06)
    weighted = plain * [float(share) / train for share, train in zip(found.groups(), (20, 30, 50), strict=True)]
    assert corrected == pytest.approx(weighted / weighted.sum(1, keepdims=True), abs=0.01)
    assert corrected != pytest.approx(plain, abs=0.01)
    assert [row["label"] for row in rows["out"]] == [WORDS[number] for number in corrected.argmax(-1)]
    assert [row["id"] for row in rows["out"]] == [row["id"] for row in rows["plain"]]


def test_prior_correction_of_a_model_whose_training_is_not_known_is_refused(model, long_file, tmp_path):
    said = refused(model, long_file, "--output", tmp_path / "out.csv", "--prior_correction", "em")
    assert said.startswith(f"--prior_correction em: the label shares in the training data of {model} are not")
    assert not (tmp_path / "out.csv.part").exists()


def test_prior_correction_needs_all_rows_first(model, long_file):
    assert refused(model, long_file, "--prior_correction", "em").startswith("--prior_correction needs all rows")


def test_prior_correction_of_empty_texts_alone_has_nothing_to_estimate(model_with_shares, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("id,text\n1,\n")
    main(model_with_shares, tmp_path / "in.csv", "--output", tmp_path / "out.csv", "--prior_correction", "em")
    assert read_table(tmp_path / "out.csv")[0]["label"] in ("", None) and "corrected" not in capsys.readouterr().err


def test_an_output_that_is_there_is_replaced_only_if_asked_for(model, long_file, tmp_path):
    (tmp_path / "out.csv").write_text("mine")
    words = (model, long_file, "--output", tmp_path / "out.csv")
    assert "out.csv already exists; choose another file, or pass --overwrite true" in refused(*words)
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert main(*words, "--overwrite", "true") == 0
    assert len(read_table(tmp_path / "out.csv")) == 90


def test_memory_does_not_grow_with_the_file(model, tmp_path, monkeypatch):
    """The model is left out: what is read, kept and written of 400 and of 40,000 rows."""

    def answer(self, texts, *rest):
        return [Prediction("neutral", {"negative": 0.1, "neutral": 0.8, "positive": 0.1}, 0.7)] * len(texts), 0

    monkeypatch.setattr(Classifier, "predict", answer)
    peaks = {}
    for rows in (4_000, 40_000):
        path = tmp_path / f"{rows}.csv"
        path.write_text("text\n" + f"{'a day ' * 20}\n" * rows)
        classifier = Classifier(model, precision="fp32")
        config = prediction.PredictConfig(output=str(tmp_path / f"out{rows}.csv"))
        tracemalloc.start()
        table = prediction.scan(str(path), config)
        prediction.predict_file(classifier, table, config, "text")
        peaks[rows] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert os.path.getsize(tmp_path / "40000.csv") > 4_000_000
    assert peaks[40_000] < peaks[4_000] + 500_000, peaks


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("in.csv", "a,b\n1,2\n", [], "has no column 'text'; its columns are a, b. Name one with --text_column."),
        ("in.csv", "a,b\n1,2\n", ["--text_column", "c"], "has no column 'c'; its columns are a, b. Name one"),
        ("in.csv", "text,b\n1\n2,3\n", [], "1 rows cannot be read: line 2: has 1 fields, the header 2"),
        ("in.jsonl", '{"text": "a"}\n{', [], "1 rows cannot be read: line 2: is no JSON"),
        ("in.csv", "", [], "is empty; expected a header line"),
        ("in.csv", "text\n", [], "in.csv has no rows; the first line of a .csv names the columns."),
        ("in.parquet", "PAR", [], "in.parquet is not readable Parquet"),
        ("in.xlsx", "x", [], "expected a file name that ends in .csv, .tsv, .jsonl, .parquet or .txt"),
        ("in.csv", "text\na\n", ["--output", "out.xlsx"], "--output is out.xlsx; expected a name that ends in .csv"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(model, tmp_path, name, content, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    assert message in refused(model, name, "--output", "result.csv", *flags)
    assert not Path("result.csv.part").exists()


def test_a_file_that_is_not_there_is_refused_before_the_model_is_loaded(tmp_path):
    assert "nix.csv: there is no such file" in refused("no-model", tmp_path / "nix.csv")


def test_a_model_that_is_not_there_is_refused(long_file):
    assert "runs/nix is not a run folder" in refused("runs/nix", long_file, "--output", long_file.parent / "out.csv")


def test_rows_that_cannot_be_read_can_be_left_out(model, tmp_path, capsys):
    (tmp_path / "in.csv").write_text("text,b\na good day,1\nx\nthe news,2\n")
    main(model, tmp_path / "in.csv", "--output", tmp_path / "out.csv", "--skip_bad_rows", "true")
    assert [row["b"] for row in read_table(tmp_path / "out.csv")] == ["1", "2"]
    assert "unreadable rows skipped: 1\n" in capsys.readouterr().err


def test_the_only_column_is_taken_whatever_its_name(model, tmp_path):
    (tmp_path / "in.csv").write_text("tweet\na good day\n")
    main(model, tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert read_table(tmp_path / "out.csv")[0]["label"] in WORDS


def test_a_text_of_a_megabyte_is_truncated_and_counted(model, tmp_path, capsys):
    (tmp_path / "in.csv").write_text(f"text\n{'a good day ' * 100_000}\n")
    main(model, tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert "texts truncated to fit 512 tokens: 1\n" in capsys.readouterr().err


# Several processes


def test_two_processes_share_the_rows_and_write_one_file(model, long_file, tmp_path):
    main(model, long_file, "--output", tmp_path / "one.csv", "--batch_size", 4)
    words = [long_file, "--output", tmp_path / "two.csv", "--batch_size", "4", "--precision", "fp32"]
    processes = launch(2, [ROOT / "predict.py", model, *words], tmp_path)
    said = "".join(finish(*processes))
    assert [process.returncode for process in processes] == [0, 0], said
    assert said.count("90 rows: ") == 1, "one of them speaks"
    one, two = (read_table(tmp_path / name) for name in ("one.csv", "two.csv"))
    assert [row["label"] for row in one] == [row["label"] for row in two] and len(two) == 90
    for name in ADDED[1:]:
        assert [float(row[name]) for row in one] == pytest.approx([float(row[name]) for row in two], abs=1e-4)


def test_standard_input_is_refused_with_several_processes(model, monkeypatch, capsys):
    """Each would read a part of it, and all would say that it was the whole."""
    state = type("State", (), {"num_processes": 2})()
    predict = runpy.run_path(str(ROOT / "predict.py"))["main"]
    monkeypatch.setitem(predict.__globals__, "compute_state", lambda: state)
    with pytest.raises(InputError, match="standard input can be read by one process only.* Name a file"):
        predict([model])


def test_a_process_may_have_no_row_at_all(model, tmp_path):
    (tmp_path / "in.csv").write_text("text\na good day\n")
    words = [tmp_path / "in.csv", "--output", tmp_path / "out.csv", "--precision", "fp32"]
    processes = launch(2, [ROOT / "predict.py", model, *words], tmp_path)
    said = finish(*processes)
    assert [process.returncode for process in processes] == [0, 0], said
    assert len(read_table(tmp_path / "out.csv")) == 1


# The page's file tab


@pytest.mark.parametrize("ending", [".csv", ".TSV", ".jsonl", ".parquet", ".txt"])
def test_the_page_labels_every_kind_of_file_that_it_offers(classifier, tmp_path, ending):
    """And shows its first rows; keys that a JSON line lacks are empty there."""
    label_file = runpy.run_path(str(ROOT / "space/app.py"))["label_file"]
    texts = ["a good day", "bad news"]
    path = tmp_path / f"tweets{ending}"
    if ending == ".parquet":
        pandas.DataFrame({"text": texts}).to_parquet(path)
    elif ending == ".jsonl":
        path.write_text(json.dumps({"text": texts[0], "id": 1}) + "\n" + json.dumps({"text": texts[1]}) + "\n")
    else:
        path.write_text("\n".join([*([] if ending == ".txt" else ["text"]), *texts]) + "\n")
    shown, said, output = label_file(classifier, str(path), str(tmp_path))
    place = shown["headers"].index("label")
    assert len(shown["data"]) == 2 and {row[place] for row in shown["data"]} <= {"negative", "neutral", "positive"}
    assert [row[shown["headers"].index("text")] for row in shown["data"]] == texts
    assert Path(output).is_file() and said.startswith("2 rows")
