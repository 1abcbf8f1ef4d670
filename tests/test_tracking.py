"""Weights & Biases: when it is online, and what an offline run leaves on disk, read back from its own file."""

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tweetdora.callbacks import LogGenerations
from tweetdora.data import Examples, make_examples
from tweetdora.errors import InputError
from tweetdora.generation import UNPARSED, Generation
from tweetdora.plan import _tracker_line
from tweetdora.records import TrackerRecord
from tweetdora.tracking import SAMPLE_ROWS, finish_wandb, log_generations, open_run, start_wandb, wandb_mode

WORDS = ["negative", "neutral", "positive"]
EXAMPLES = make_examples(["awful", "fine", "a table", "great", "?"], [0, 2, 1, 2, 1])
ANSWERS = [
    Generation("negative", True, 0),
    Generation("positive", True, 2),
    Generation("negative", True, 0),
    Generation("I think it is", False, UNPARSED),
    Generation("Neutral.", True, 1),
]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path) -> None:
    """No login, no home folder of the user's, and no terminal to ask on."""
    for name in (
        "WANDB_MODE",
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
        "WANDB_PROJECT",
        "WANDB_ENTITY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a training asked a question that nobody is there to answer")

    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("getpass.getpass", refuse)


def write_netrc(text: str) -> None:
    path = Path(os.environ["NETRC"])
    path.write_text(text)
    path.chmod(0o600)


# Which mode, and why


def test_without_a_login_the_run_is_offline_and_says_why():
    assert wandb_mode() == ("offline", "no W&B login was found (wandb login, or WANDB_API_KEY)")


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_wandb_mode_in_the_environment_decides_over_a_login(mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode() == (mode, "WANDB_MODE is set")


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_login_in_the_environment_is_online(name, monkeypatch):
    monkeypatch.setenv(name, "x" * 40)
    assert wandb_mode() == ("online", "the environment holds a W&B login")


def test_a_login_in_netrc_is_online():
    write_netrc("machine api.wandb.ai login user password " + "x" * 40)
    assert wandb_mode() == ("online", "there is a login for api.wandb.ai")


def test_a_host_without_a_password_is_no_login():
    write_netrc("machine api.wandb.ai login user")
    assert wandb_mode()[0] == "offline"


def test_a_login_for_another_host_is_no_login():
    write_netrc("machine github.com login user password x")
    assert wandb_mode()[0] == "offline"


def test_a_login_for_ones_own_server_is_looked_up_by_its_name(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/")
    write_netrc("machine wandb.example.org:8080 login user password x")  # as `wandb login` writes it
    assert wandb_mode() == ("online", "there is a login for wandb.example.org:8080")


def test_the_server_that_wandb_login_has_stored_is_the_one_of_the_login(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = http://localhost:8080\n")
    write_netrc("machine localhost:8080 login user password x")
    assert wandb_mode() == ("online", "there is a login for localhost:8080")
    (tmp_path / "settings").write_text("no settings\n")
    assert wandb_mode()[0] == "offline"


def test_a_disabled_session_leaves_the_tracker_of_a_run_as_it_was(monkeypatch, tmp_path):
    """W&B calls the entity of a disabled run "dummy", for which the next session would ask the server."""
    monkeypatch.setenv("WANDB_DISABLED", "true")
    known = TrackerRecord("abc", "online", "https://wandb.test/abc", "tweetdora", "me")
    try:
        assert start_wandb(str(tmp_path), "run", {}).entity is None
        finish_wandb()
        assert start_wandb(str(tmp_path), "run", {}, known) is known
        assert open_run() is not None, "without a run, transformers' callback would open one, and not a disabled one"
    finally:
        finish_wandb()
    assert list(tmp_path.rglob("*.wandb")) == []


def test_an_unreadable_netrc_is_no_login():
    write_netrc("machine api.wandb.ai login user password x\nthis is no netrc line\n")
    assert wandb_mode()[0] == "offline"


def test_an_empty_wandb_mode_is_none(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "")
    assert wandb_mode()[0] == "offline"


@pytest.mark.parametrize(
    ("report_to", "line"),
    [
        ([], "none"),
        (["tensorboard"], "tensorboard"),
        (["wandb"], "wandb, offline: no W&B login was found (wandb login, or WANDB_API_KEY)"),
        (
            ["wandb", "tensorboard"],
            "wandb, offline: no W&B login was found (wandb login, or WANDB_API_KEY); tensorboard",
        ),
    ],
)
def test_the_plan_names_tracker_mode_and_reason(report_to, line):
    assert _tracker_line(SimpleNamespace(report_to=report_to)) == line


# What is left on disk


def read_log(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: 7 bytes of header, then LevelDB's log format, in which a record may be in parts.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        left_in_block = 32768 - place % 32768
        if left_in_block < 7:
            place += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def log_files(run_dir: Path) -> list[Path]:
    """Those of all runs; wandb.finish() may return a moment before W&B's own process has written the end."""
    paths = list(run_dir.glob("wandb/offline-run-*/*.wandb"))
    patience = time.monotonic() + 20
    while not all(any(record.HasField("exit") for record in read_log(path)) for path in paths):
        assert time.monotonic() < patience, "W&B did not write the end of the run"
        time.sleep(0.05)
    return paths


def log_of(run_dir: Path) -> list[Record]:
    """The one run's records."""
    (path,) = log_files(run_dir)
    return list(read_log(path))


def as_dict(items: Any) -> dict[str, Any]:
    """Keys, nested ones with a slash between, and values."""
    return {"/".join([*filter(None, [item.key]), *item.nested_key]): json.loads(item.value_json) for item in items}


def table(run_dir: Path, name: str) -> dict[str, Any]:
    """A logged table; W&B keeps its rows in a file beside the log."""
    (path,) = run_dir.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple[Path, TrackerRecord]:
    """A run folder with a finished offline run, and what start_wandb returned."""
    run_dir = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for name in ("HOME", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(run_dir / "home"))
        started = start_wandb(str(run_dir), "a run", {"task": {"label_words": WORDS}, "steps": 12})
        wandb.log({"train/loss": 0.5, "train/global_step": 1})
        log_generations("validation", EXAMPLES, ANSWERS, WORDS, step=7)
        finish_wandb({"adapter_sha256": "0123"})
    return run_dir, started


def test_what_the_record_keeps_is_id_mode_project_entity_and_no_address(tracked):
    run_dir, started = tracked
    expected = TrackerRecord(id=started.id, mode="offline", url=None, project="tweetdora", entity=None)
    assert started == expected
    assert [path.name for path in log_files(run_dir)] == [f"run-{started.id}.wandb"]


def test_the_run_on_disk_has_name_project_and_the_whole_configuration(tracked):
    (run,) = (record.run for record in log_of(tracked[0]) if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == (tracked[1].id, "a run", "tweetdora")
    config = as_dict(run.config.update)
    assert (config["task"], config["steps"]) == ({"label_words": WORDS}, 12)


def test_the_run_on_disk_has_the_logged_loss(tracked):
    history = [as_dict(record.history.item) for record in log_of(tracked[0]) if record.HasField("history")]
    assert [(line["train/loss"], line["train/global_step"]) for line in history if "train/loss" in line] == [(0.5, 1)]


def test_the_run_on_disk_has_answers_and_matrix_at_the_step_of_the_validation(tracked):
    history = [as_dict(record.history.item) for record in log_of(tracked[0]) if record.HasField("history")]
    (line,) = (line for line in history if "validation/generations/nrows" in line)
    assert (line["train/global_step"], line["validation/generations/nrows"]) == (7, 5)
    assert line["validation/confusion_matrix_table/_type"] == "table-file"


def test_the_table_of_answers_has_the_right_rows(tracked):
    answers = table(tracked[0], "validation/generations")
    assert answers["columns"] == ["example_id", "text", "label", "generation", "predicted", "stopped"]
    assert answers["data"] == [
        [0, "awful", "negative", "negative", "negative", True],
        [1, "fine", "positive", "positive", "positive", True],
        [2, "a table", "neutral", "negative", "negative", True],
        [3, "great", "positive", "I think it is", "unparsed", False],
        [4, "?", "neutral", "Neutral.", "neutral", True],
    ]


def test_the_confusion_matrix_counts_every_answer_and_unparsed_ones_apart(tracked):
    """Counted by hand; the rows that are zero are left out here."""
    matrix = table(tracked[0], "validation/confusion_matrix_table")
    assert matrix["columns"] == ["Actual", "Predicted", "nPredictions"]
    assert sorted(row for row in matrix["data"] if row[2]) == [
        ["negative", "negative", 1],
        ["neutral", "negative", 1],
        ["neutral", "neutral", 1],
        ["positive", "positive", 1],
        ["positive", "unparsed", 1],
    ]


def test_the_confusion_matrix_says_which_step_it_is_of(tracked):
    records = [record.config for record in log_of(tracked[0]) if record.HasField("config")]
    charts = [value for config in records for key, value in as_dict(config.update).items() if "confusion" in key]
    assert [chart["panel_config"]["stringSettings"]["title"] for chart in charts] == ["validation, step 7"]


def test_the_summary_names_the_adapter(tracked):
    summary: dict[str, Any] = {}
    for record in log_of(tracked[0]):
        if record.HasField("summary"):
            summary.update(as_dict(record.summary.update))
    assert summary["adapter_sha256"] == "0123"


def test_the_run_is_closed(tracked):
    assert [record.exit.exit_code for record in log_of(tracked[0]) if record.HasField("exit")] == [0]
    assert wandb.run is None


def test_a_long_table_of_answers_is_cut_and_the_matrix_is_not(tmp_path):
    count = SAMPLE_ROWS + 10
    examples = make_examples([f"text {number}" for number in range(count)], [1] * count)
    start_wandb(str(tmp_path), "long", {})
    log_generations("test", examples, [Generation("neutral", True, 1)] * count, WORDS, step=1)
    finish_wandb()
    log_files(tmp_path)  # waits until all is written
    assert [row[0] for row in table(tmp_path, "test/generations")["data"]] == list(range(50))
    assert sum(row[2] for row in table(tmp_path, "test/confusion_matrix_table")["data"]) == 60


def test_a_run_goes_on_under_its_own_id(tmp_path):
    first = start_wandb(str(tmp_path), "a run", {})
    finish_wandb(exit_code=130)
    again = start_wandb(str(tmp_path), "a run", {}, tracker=first)
    finish_wandb()
    ids = [record.run.run_id for path in log_files(tmp_path) for record in read_log(path) if record.HasField("run")]
    assert again.id == first.id
    assert set(ids) == {first.id}


def test_a_run_goes_on_in_its_own_project_and_entity(tmp_path, monkeypatch):
    """Whatever the environment says later: the same id elsewhere would be another run."""
    monkeypatch.setenv("WANDB_PROJECT", "other")
    saved = TrackerRecord(id="0a1b2c3d", mode="offline", url=None, project="first", entity="team")
    assert start_wandb(str(tmp_path), "a run", {}, tracker=saved) == saved
    finish_wandb()
    (run,) = (record.run for record in log_of(tmp_path) if record.HasField("run"))
    assert (run.run_id, run.project, run.entity) == ("0a1b2c3d", "first", "team")


def test_another_run_has_another_id(tmp_path):
    ids = set()
    for _ in range(2):
        ids.add(start_wandb(str(tmp_path), "a run", {}).id)
        finish_wandb()
    assert len(ids) == 2


def test_an_interrupted_run_is_closed_with_its_exit_status(tmp_path):
    start_wandb(str(tmp_path), "a run", {})
    finish_wandb(exit_code=130)
    assert [record.exit.exit_code for record in log_of(tmp_path) if record.HasField("exit")] == [130]


def test_the_project_is_the_one_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    started = start_wandb(str(tmp_path), "a run", {})
    finish_wandb()
    assert started.project == "mine"


@pytest.mark.parametrize("value", ["true", "TRUE", "1", "yes", "on"])
def test_a_tracker_that_is_switched_off_gets_nothing(value, tmp_path, monkeypatch):
    """The variable is transformers' own; W&B does not know it."""
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_mode() == ("disabled", "WANDB_DISABLED is set")
    assert start_wandb(str(tmp_path), "a run", {}).mode == "disabled"
    log_generations("validation", EXAMPLES, ANSWERS, WORDS, step=1)
    finish_wandb()
    assert list(tmp_path.rglob("*.wandb")) == []


@pytest.mark.parametrize("value", ["false", "0", ""])
def test_a_tracker_that_is_not_switched_off_is_not(value, monkeypatch):
    monkeypatch.setenv("WANDB_DISABLED", value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode()[0] == "offline"


@pytest.mark.parametrize(("value", "mode"), [("dryrun", "offline"), ("run", "online"), ("shared", "shared")])
def test_the_modes_of_wandb_have_their_other_names(value, mode, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", value)
    assert wandb_mode() == (mode, "WANDB_MODE is set")


def test_a_mode_that_is_none_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(InputError, match="^WANDB_MODE is 'ofline'; expected one of online, offline, disabled, shared"):
        wandb_mode()


# A server that fails


class Server:
    """As much of W&B's server as a run needs that logs a few numbers; `state` is "up", "down" or "slow"."""

    def __init__(self) -> None:
        self.state, self.names = "up", []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if outer.state == "down":
                    self.send_error(503)
                    return
                time.sleep(2.0 if outer.state == "slow" else 0.0)
                answer = json.dumps(
                    {"data": outer.answer(json.loads(body))} if self.path == "/graphql" else {}
                ).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What a query gets; the name of each run that was begun or gone on with is noted."""
        name = (asked.get("variables") or {}).get("name")
        if asked.get("operationName") == "UpsertBucket":
            self.names.append(name)
        project = {"id": "p", "name": "tweetdora", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": name,
            "displayName": "d",
            "config": "{}",
            "project": project,
            "historyLineCount": 0,
        }
        return {
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "model": None,
            "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
        }


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    """A W&B server of our own, and a login for it."""
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    wandb.teardown()  # W&B reads the environment once a process
    yield server
    wandb.teardown()
    server.server.shutdown()
    server.server.server_close()


def saved_loss(folder: Path) -> list[str]:
    """Every value of "loss" in the run files below a folder."""
    return [
        item.value_json
        for path in folder.rglob("*.wandb")
        for record in read_log(path)
        for item in record.history.item
        if "loss" in (item.key, *item.nested_key)
    ]


def holds_losses(folder: Path, *losses: str) -> bool:
    """Whether the run files hold these values of "loss"; W&B's own process writes them, later on a busy machine."""
    deadline = time.monotonic() + 20
    while not set(losses) <= set(saved_loss(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return set(losses) <= set(saved_loss(folder))


def test_a_server_that_is_down_at_the_start_leaves_an_offline_run_and_a_line(server, tmp_path, monkeypatch, capsys):
    server.state = "down"
    monkeypatch.setattr("tweetdora.tracking._INIT_SECONDS", 1.0)
    tracker = start_wandb(str(tmp_path), "a run", {})
    wandb.log({"loss": 1.5})
    finish_wandb()
    assert (tracker.mode, tracker.url) == ("offline", None)
    said = capsys.readouterr().err
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert said.startswith("note: W&B cannot start the run (") and f"upload it with `wandb sync {folder}`." in said
    assert said.count("\n") == 1 and holds_losses(folder, "1.5")


def test_a_server_that_goes_down_in_the_middle_leaves_a_whole_run_and_a_line(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tweetdora.tracking._FINISH_SECONDS", 1.0)
    tracker = start_wandb(str(tmp_path), "a run", {})
    assert tracker.mode == "online" and tracker.url == f"{server.address}/me/tweetdora/runs/{tracker.id}"
    wandb.log({"loss": 1.5})
    server.state = "down"
    wandb.log({"loss": 2.5})
    began = time.monotonic()
    finish_wandb()
    assert time.monotonic() - began < 20
    (folder,) = tmp_path.glob("wandb/run-*")
    assert (
        "note: W&B did not upload the whole run in 1 s. It is complete locally; upload it with "
        f"`wandb sync {folder}`." in capsys.readouterr().err
    )
    assert holds_losses(folder, "1.5", "2.5")


def test_a_run_that_is_gone_on_with_while_the_server_is_down_keeps_its_id(server, tmp_path, monkeypatch, capsys):
    first = start_wandb(str(tmp_path), "a run", {})
    finish_wandb(exit_code=130)
    server.state = "down"
    monkeypatch.setattr("tweetdora.tracking._INIT_SECONDS", 1.0)
    again = start_wandb(str(tmp_path), "a run", {}, tracker=first)
    finish_wandb()
    assert (again.id, again.mode) == (first.id, "offline")
    assert "note: W&B cannot start the run (" in capsys.readouterr().err


def test_a_slow_server_keeps_no_step_waiting(server, tmp_path):
    start_wandb(str(tmp_path), "a run", {})
    server.state = "slow"
    began = time.monotonic()
    for step in range(20):
        wandb.log({"loss": step})
    assert time.monotonic() - began < 2.0, "one answer of the server alone takes that long"
    server.state = "up"
    finish_wandb()


def test_an_online_run_goes_on_under_its_own_id(server, tmp_path):
    first = start_wandb(str(tmp_path), "a run", {})
    finish_wandb(exit_code=130)
    assert start_wandb(str(tmp_path), "a run", {}, tracker=first).id == first.id
    finish_wandb()
    assert set(server.names) == {first.id} and len(server.names) >= 2


def test_a_disabled_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_wandb(str(tmp_path), "a run", {})
    log_generations("validation", EXAMPLES, ANSWERS, WORDS, step=1)
    finish_wandb()
    assert list(tmp_path.rglob("*.wandb")) == []


def test_finishing_without_a_run_is_nothing():
    finish_wandb({"adapter_sha256": "0123"})
    assert wandb.run is None


# After each validation


class Logged:
    """In the place of log_generations."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, *arguments: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def logged(monkeypatch) -> Logged:
    logged = Logged()
    monkeypatch.setattr("tweetdora.callbacks.log_generations", logged)
    return logged


def after_validation(examples: Examples) -> None:
    """Call the callback as the Trainer does at step 40."""
    trainer = SimpleNamespace(
        validation_examples=examples, last_generations=ANSWERS, task=SimpleNamespace(label_words=WORDS)
    )
    LogGenerations(trainer).on_evaluate(None, SimpleNamespace(global_step=40), None)


def test_each_validation_logs_its_answers(logged, monkeypatch):
    monkeypatch.setattr(wandb, "run", object())
    after_validation(EXAMPLES)
    assert logged.calls == [("validation", EXAMPLES, ANSWERS, WORDS, 40)]


def test_without_a_tracker_nothing_is_logged(logged):
    after_validation(EXAMPLES)
    assert logged.calls == []
