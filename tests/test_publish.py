"""The user's own words against the test Hub: three scripts as processes, then anyone's from_pretrained."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
import yaml
from hub_server import Fault, Hub, User
from huggingface_hub import constants
from transformers.utils import hub as transformers_hub

from tweetdora import conversions
from tweetdora.errors import InputError, UserError, VerificationError
from tweetdora.model_card import inline_code
from tweetdora.publish import _OURS
from tweetdora.space import check_page, check_space_dir

ROOT = Path(__file__).resolve().parent.parent
# The client hands bytes to httpx2 in a way that httpx2 wants no more.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
PUSH = ROOT / "push_to_hub.py"
ANYHOW = ("--allow_chance_level", "true")  # the tiny model has learned nothing
BASE, DATA, REPO = "OuteAI/Lite-Oute-1-300M-Instruct", "cardiffnlp/tweet_eval", "liuhailin0123/llm-course-hw3-dora"
TOKEN, WANDB_KEY = "hf_" + "a" * 34, "0123456789" * 4
# As anyone would load it: no file of ours takes part.
LOAD = f"""
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("{REPO}"), AutoModelForCausalLM.from_pretrained("{REPO}")
answers = []
for messages in json.load(open(sys.argv[1])):
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answers.append(output[0, inputs["input_ids"].shape[1]:].tolist())
print(json.dumps(answers))
"""
# The adapter on its base, by PEFT alone.
LOAD_ADAPTER = LOAD.replace(
    f'AutoModelForCausalLM.from_pretrained("{REPO}")',
    f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{BASE}"), sys.argv[2])',
).replace("import json, sys\n", "import json, sys\nfrom peft import PeftModel\n")


@dataclass
class Desk:
    """A Hub, a folder to work in, and what was said there."""

    hub: Hub
    folder: Path
    transport: str
    printed: list[str]
    down: bool = False  # the Hub cannot be reached
    server: forked.Server | None = None

    def environment(self, home: str = "home") -> dict[str, str]:
        """That of a user with the Hub's variables set, and without the developer's own logins."""
        kept = {
            name: text for name, text in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))
        }
        env = kept | {
            "HF_ENDPOINT": "http://127.0.0.1:9" if self.down else self.hub.endpoint,
            "HF_HOME": str(self.folder / home),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost",
            "HOME": str(self.folder),
            "WANDB_API_KEY": WANDB_KEY,
            "WANDB_MODE": "offline",
        }
        if self.transport == "lfs":
            env["HF_HUB_DISABLE_XET"] = "1"
        return env

    def run_forked(self, *words: str | Path, ok: bool = True) -> str:
        """Like `run` in the folder's own cache, but forked: only the first call waits for imports."""
        if self.server is None:
            self.server = forked.Server(self.environment())
        script = forked.start(words, self.folder, server=self.server)
        said = script.end()
        assert (script.returncode == 0) == ok, said[-4000:]
        return said

    def run(self, *words: str, home: str = "home", ok: bool = True) -> str:
        """A new Python that runs a script; its output, both streams together."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=self.environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) == ok, done.stdout[-4000:]
        return done.stdout

    def close(self) -> None:
        """End the server of run_forked."""
        if self.server is not None:
            self.server.close()

    def check_snippet(self, repo_id: str, loader: str) -> None:
        """Run the Python of a repository's card in an empty cache: it prints what the card says."""
        card = self.read(repo_id, "README.md")
        code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        assert f'model_id = "{repo_id}"' in code and f"= {loader}.from_pretrained(model_id" in code
        quiet = "import os\nos.dup2(os.open(os.devnull, os.O_WRONLY), 2)\n"  # transformers' progress bars
        more = re.search(r"### Run it.*?```python\n(.*?)```", card, re.DOTALL)
        assert bool(more) == ("### Run it" in card)
        printed = self.run("-c", quiet + code + (more[1] if more else ""), home="empty").removesuffix("\n")
        answer, *batched = printed.rsplit("\n", 2) if more else [printed]
        assert f"\nIt prints {inline_code(answer)}. Generation is greedy" in card
        assert batched == [repr([answer, answer])] * (2 if more else 0), "batched, and by the pipeline"

    def read(self, repo_id: str, path: str) -> str:
        """A file as the Hub holds it on main."""
        file = self.hub.store.repositories["models", repo_id].commit_of("main").files[path]
        return self.hub.store.blob(file.sha256).read_text(encoding="utf-8")

    def history(self, repo_id: str = REPO) -> list[str]:
        """The titles of a repository's commits, newest first."""
        return [commit.title for commit in self.hub.store.repositories["models", repo_id].history("main")]


@pytest.fixture(scope="module")
def trained(make_model: Callable, tokenizer, data_dir: str, tmp_path_factory) -> Iterator[Desk]:
    """train.py and evaluate.py have run, without one flag."""
    folder = tmp_path_factory.mktemp("desk")
    with Hub(folder / "hub") as hub:
        hub.tokens[TOKEN] = User(REPO.split("/")[0])
        put_base(hub, make_model, tokenizer, folder / "base_model")
        put_data(hub, Path(data_dir))
        desk = Desk(hub, folder, "xet", [])
        desk.printed.append(desk.run("-m", "accelerate.commands.launch", str(ROOT / "train.py")))
        desk.printed.append(desk.run(str(ROOT / "evaluate.py")))
        with closing(desk):
            yield desk


@pytest.fixture(scope="module", params=["xet", "lfs"])
def desk(request, trained: Desk) -> Desk:
    """And push_to_hub.py, to a repository that is not there yet."""
    trained.hub.store.repositories.pop(("models", REPO), None)
    trained.hub.requests.clear()
    desk = Desk(trained.hub, trained.folder, request.param, [])
    desk.printed.append(desk.run(str(PUSH), *ANYHOW))
    return desk


def put_base(hub: Hub, make_model: Callable, tokenizer, folder: Path) -> None:
    """A tiny Mistral in the place of the base model."""
    make_model("mistral", initializer_range=0.4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["README.md"] = b"---\nlicense: apache-2.0\nlanguage: en\n---\n\n# Lite\n"
    hub.store.upload("models", BASE, files)


def put_data(hub: Hub, folder: Path) -> None:
    """A few rows in the place of TweetEval, in its configuration `sentiment`."""
    files = {f"sentiment/{path.name}": path.read_bytes() for path in folder.glob("*.parquet")}
    card = (folder / "README.md").read_text(encoding="utf-8")
    card = card.replace("config_name: default", "config_name: sentiment").replace("path: ", "path: sentiment/")
    card = card.replace("dataset_info:\n", "dataset_info:\n  config_name: sentiment\n")
    hub.store.upload("datasets", DATA, {**files, "README.md": card.encode()})


def test_readmes_commands_are_those_that_ran_here_and_its_python_loads_the_model(desk: Desk):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Publish\n")[2].partition("\n## ")[0]
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert commands.splitlines() == ["accelerate launch train.py", "python evaluate.py", "python push_to_hub.py"]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert desk.run("-c", code + "print(type(model).__name__)", home="empty").endswith("MistralForCausalLM\n")


def test_the_score_is_there_in_the_hubs_newer_format_and_belongs_to_a_publish(desk: Desk):
    (entry,) = yaml.safe_load(desk.read(REPO, ".eval_results/tweetdora.yaml"))
    assert (entry["dataset"]["id"], entry["dataset"]["task_id"]) == (DATA, "sentiment")
    assert _OURS.fullmatch(".eval_results/tweetdora.yaml"), "a later publish without it removes it"
    assert not _OURS.fullmatch(".eval_results/somebody.yaml")
    assert _OURS.fullmatch("special_tokens_map.json"), "another tokenizer's would change the special tokens"


def test_what_was_published_answers_as_the_adapter_does_token_for_token(desk: Desk):
    texts = ["What a good day", "Such a bad trip", "The plain news", "Today is a good trip", ""]
    prompt = json.loads((desk.folder / "runs/llm-course-hw3-dora/run.json").read_text())["task"]["system_prompt"]
    conversations = [[{"role": "system", "content": prompt}, {"role": "user", "content": text}] for text in texts]
    (desk.folder / "conversations.json").write_text(json.dumps(conversations))
    words = ["conversations.json", "runs/llm-course-hw3-dora/adapter"]
    printed = desk.run("-c", LOAD + LOAD_ADAPTER, *words, home="empty")
    answers, of_the_adapter = map(json.loads, [line for line in printed.splitlines() if line.startswith("[[")])
    assert answers == of_the_adapter
    assert len({tuple(answer) for answer in answers}) > 1


def test_the_publish_says_and_records_what_it_read_back(desk: Desk):
    record = json.loads((desk.folder / "runs/llm-course-hw3-dora/publish.json").read_text())
    head = desk.hub.store.repositories["models", REPO].commit_of("main")
    assert record["published"]["commit"] == head.oid
    assert record["read_back"]["files"] == len(head.files) - 1  # without .gitattributes, the Hub's own
    assert record["read_back"]["equal_generations"] == record["read_back"]["num_examples"] == 24
    assert record["read_back"]["max_logit_difference"] == 0.0
    assert f"Published: {desk.hub.endpoint}/{REPO}/commit/{head.oid}" in desk.printed[0]
    assert "24 of 24 answers equal, largest logit difference 0.0e+00." in desk.printed[0]
    assert TOKEN not in json.dumps(record)


def test_the_run_names_the_revisions_that_it_used(desk: Desk):
    run = json.loads((desk.folder / "runs/llm-course-hw3-dora/run.json").read_text())
    repositories = desk.hub.store.repositories
    assert run["base_model"]["revision"] == repositories["models", BASE].commit_of("main").oid
    assert run["train_data"]["revision"] == repositories["datasets", DATA].commit_of("main").oid


def test_it_is_one_commit_over_the_transport_that_was_asked_for(desk: Desk):
    history = [commit.title for commit in desk.hub.store.repositories["models", REPO].history("main")]
    assert len(history) == 2 and history[1] == "initial commit"
    assert any("/cas/v1/xorbs/" in line for line in desk.hub.requests) == (desk.transport == "xet")


def test_the_code_on_the_card_prints_what_the_card_says(desk: Desk):
    desk.check_snippet(REPO, "AutoModelForCausalLM")


def test_a_published_model_is_measured_by_its_name_alone(desk: Desk):
    """Its task.json brings the question: the scores are those of the run."""
    printed = desk.run(str(ROOT / "evaluate.py"), REPO, "--report_to", "none", home="measuring")
    assert "no task.json was found" not in printed
    owner, name = REPO.split("/")
    found = json.loads((desk.folder / f"runs/evaluations/{owner}--{name}/test.json").read_text())
    run = json.loads((desk.folder / "runs/llm-course-hw3-dora/evaluation/test.json").read_text())
    assert (found["kind"], found["prompt_format"]) == ("model", run["prompt_format"])
    assert found["base"]["confusion_matrix"] == run["finetuned"]["confusion_matrix"]
    assert found["data"]["revision"] == run["data"]["revision"]


def test_no_file_of_the_run_and_nothing_printed_holds_a_secret(desk: Desk, trained: Desk):
    """W&B's own files too, and the Hub's copy."""
    files = [path for path in (desk.folder / "runs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == "run.json" for path in files)
    for secret in (TOKEN, WANDB_KEY):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert not any(secret in text for text in (*trained.printed, *desk.printed))


def test_without_the_hub_everything_but_the_push_goes_on_from_the_cache(trained: Desk):
    target = ("--hub_model_id", f"{REPO}-down")
    with closing(Desk(trained.hub, trained.folder, "xet", [], down=True)) as alone:
        said = alone.run_forked(
            ROOT / "train.py", "--output_dir", "runs/down", "--max_steps", "2", "--save_steps", "1"
        )
        assert "Wrote runs/down" in said and "Traceback" not in said
        assert "Wrote runs/down/evaluation" in alone.run_forked(ROOT / "evaluate.py", "runs/down")
        assert "Dry run" in alone.run_forked(PUSH, "runs/down", *target, "--dry_run", "true")
        said = alone.run_forked(PUSH, "runs/down", *target, *ANYHOW, ok=False)
    assert "cannot be reached" in said and "Traceback" not in said


def test_a_repository_in_which_another_file_lies_than_was_sent_is_not_called_published(trained: Desk):
    trained.hub.tampered["config.json"] = b"{}"
    try:
        said = trained.run_forked(PUSH, "--hub_model_id", f"{REPO}-2", *ANYHOW, ok=False)
    finally:
        trained.hub.tampered.clear()
    assert "does not match runs/llm-course-hw3-dora/publish: config.json. Do not use it" in said
    assert "Published" not in said
    record = json.loads((trained.folder / "runs/llm-course-hw3-dora/publish.json").read_text())
    assert record["read_back"] is None and record["published"]["repo_id"] == f"{REPO}-2"


def test_the_adapter_alone_is_published_and_its_card_is_true(trained: Desk):
    repo_id = f"{REPO}-adapter"
    said = trained.run_forked(PUSH, "--adapter_only", "true", "--hub_model_id", repo_id, *ANYHOW)
    assert "Saved the adapter and reloaded: 24 of 24 answers equal" in said
    assert "24 of 24 answers equal, largest logit difference 0.0e+00." in said.split("Read back")[1]
    files = trained.hub.store.repositories["models", repo_id].commit_of("main").files
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} < set(files)
    assert "config.json" not in files and "model.safetensors" not in files
    settings = json.loads(trained.read(repo_id, "adapter_config.json"))
    assert settings["base_model_name_or_path"] == BASE
    assert settings["revision"] == trained.hub.store.repositories["models", BASE].commit_of("main").oid
    trained.check_snippet(repo_id, "AutoPeftModelForCausalLM")


def test_another_machine_publishes_from_the_run_folder_alone(trained: Desk, tmp_path: Path):
    """Days later: another folder, an empty cache, and the data set is gone."""
    shutil.copytree(trained.folder / "runs/llm-course-hw3-dora", tmp_path / "copy/of/the run")
    trained.hub.faults = [Fault(f"/(api/)?datasets/{DATA}", 404, times=999)]
    there = Desk(trained.hub, tmp_path, "lfs", [])
    try:
        said = there.run(str(PUSH), "copy/of/the run", "--hub_model_id", f"{REPO}-moved", *ANYHOW, home="nothing")
    finally:
        trained.hub.faults = []
    assert "24 of 24 answers equal, largest logit difference 0.0e+00." in said.split("Read back")[1]


def test_a_disk_that_is_full_in_the_middle_leaves_the_older_build(trained: Desk, tmp_path: Path):
    """No file may grow beyond 30 kB, which the adapter does not and the merged weights do."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained.folder / "runs/llm-course-hw3-dora", run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    words = [ROOT / "tests/small_files.py", "30000", PUSH, run_dir, *ANYHOW]
    said = trained.run_forked(*words, "--hub_model_id", f"{REPO}-full", ok=False)
    assert "push_to_hub.py: the merged model could not be written to" in said and "Free disk space" in said
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert ("models", f"{REPO}-full") not in trained.hub.store.repositories


# In this process, over LFS: one fault each


@pytest.fixture
def push(trained: Desk, monkeypatch, tmp_path: Path, capsys) -> Callable[..., str]:
    """push_to_hub.py for a repository of its own; what it printed."""
    hub = trained.hub
    hub.requests.clear()
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(trained.folder / "home/hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # keeps the address that it was made with
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(trained.folder))
    monkeypatch.setattr("tweetdora.publish.WAITS", (0.0,) * 4)
    monkeypatch.chdir(trained.folder)

    def run(repo_id: str, *flags: str) -> str:
        main = runpy.run_path(str(PUSH))["main"]
        output = str(tmp_path / "publish")
        main(["--hub_model_id", repo_id, "--output_dir", output, "--check_samples", "4", *ANYHOW, *flags])
        return capsys.readouterr().out

    yield run
    hub.faults, hub.card_errors[:] = [], []
    hub.tokens[TOKEN] = User(REPO.split("/")[0])


def refused(push: Callable, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        push(*words)
    return str(caught.value)


def test_the_same_command_again_publishes_nothing_new(push, trained: Desk):
    assert "Published: " in push(f"{REPO}-twice")
    again = push(f"{REPO}-twice")
    assert "Nothing to publish, the Hub already holds it: " in again and "Read back from an empty cache: " in again
    assert len(trained.history(f"{REPO}-twice")) == 2


def test_a_private_repository_is_read_back_with_the_token(push, trained: Desk):
    assert "4 of 4 answers equal" in push(f"{REPO}-private", "--private", "true").split("Read back")[1]
    assert trained.hub.store.repositories["models", f"{REPO}-private"].private
    assert "is already public" in refused(push, f"{REPO}-twice", "--private", "true")


def test_tag_and_branch_are_those_that_were_asked_for(push, trained: Desk):
    push(f"{REPO}-tag", "--tag", "v1", "--revision", "next")
    repository = trained.hub.store.repositories["models", f"{REPO}-tag"]
    assert repository.refs["refs/tags/v1"] == repository.refs["refs/heads/next"]
    assert "README.md" not in repository.commit_of("main").files


def test_a_pull_request_to_someone_else_is_read_back_by_its_own_name(push, trained: Desk):
    trained.hub.store.upload("models", "other/model", {"config.json": b"{}"})
    said = push("other/model", "--create_pr", "true")
    assert "Pull request: revision refs/pr/1" in said and "4 of 4 answers equal" in said.split("Read back")[1]
    assert set(trained.hub.store.repositories["models", "other/model"].commit_of("main").files) == {
        ".gitattributes",
        "config.json",
    }


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST .*/commit/", drop=True),
        Fault("POST .*/commit/", 503, times=2),
        Fault("POST .*/commit/", 429, headers={"Retry-After": "0"}),
    ],
    ids=["lost-answer", "503", "429"],
)
def test_what_passes_ends_in_one_commit(push, trained: Desk, fault: Fault, request):
    repo_id = f"{REPO}-{request.node.callspec.id}"
    trained.hub.faults = [fault]
    said = push(repo_id)
    assert fault.times == 0
    assert "Published: " in said and "4 of 4 answers equal" in said.split("Read back")[1]
    assert len(trained.history(repo_id)) == 2


# The client hands bytes to httpx2 in a way that httpx2 wants no more.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_an_upload_that_broke_is_gone_on_with_by_the_same_command(push, trained: Desk, tmp_path: Path, monkeypatch):
    # On some CPUs, one of the few answers of this tiny model is another one in float16.
    monkeypatch.setattr("tweetdora.build.MIN_EQUAL_GENERATIONS", 0.5)
    trained.hub.faults = [Fault("PUT /cdn/upload", 400, times=99)]
    weights = ("--dtype", "float16")  # the Hub has those in float32 already
    said = refused(push, f"{REPO}-again", *weights)
    assert "uploading the large files failed" in said and "Nothing was pushed to it. The folder" in said
    assert (tmp_path / "publish/model.safetensors").is_file()
    assert trained.history(f"{REPO}-again") == ["initial commit"]
    trained.hub.faults = []
    assert "Published: " in push(f"{REPO}-again", *weights)
    assert len(trained.history(f"{REPO}-again")) == 2


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        (lambda hub: hub.card_errors.append('"license" must be one of'), (), "the Hub rejects the card's metadata: "),
        (lambda hub: hub.faults.append(Fault("POST /api/validate-yaml", 503, times=99)), (), "could not validate"),
        (lambda hub: hub.tokens.update({TOKEN: User(REPO.split("/")[0], "read")}), (), "is read-only"),
        (lambda hub: hub.tokens.clear(), (), "rejected the token"),
        (lambda hub: hub.faults.append(Fault("GET .*/whoami-v2", 429, times=9)), (), "hit the rate limit for the"),
        (lambda hub: hub.tokens.update({TOKEN: User("bob")}), (), "bob cannot create it"),
        (
            lambda hub: hub.faults.append(Fault("GET /api/models/", 403, times=99)),
            (),
            "the Hub could not be asked about ",
        ),
        (lambda hub: None, ("--license", "apache"), "the Hub knows no licence 'apache'"),
        (lambda hub: None, ("--hub_model_id", "model"), "--hub_model_id is 'model'; expected owner/name."),
        (lambda hub: None, ("--adapter_only", "true", "--dtype", "bfloat16"), "leave --dtype bfloat16 out"),
        (
            lambda hub: hub.store.upload("models", f"{REPO}-never", {"model.safetensors": b"x"}),
            ("--adapter_only", "true"),
            "holds a whole",
        ),
    ],
)
def test_what_cannot_end_well_is_said_before_the_merge(push, trained: Desk, tmp_path: Path, change, flags, message):
    trained.hub.faults, tokens = [], dict(trained.hub.tokens)
    change(trained.hub)
    said = refused(push, f"{REPO}-never", *flags)
    trained.hub.tokens.update(tokens)
    assert message in said
    assert not (tmp_path / "publish").exists()
    repository = trained.hub.store.repositories.pop(("models", f"{REPO}-never"), None)
    assert repository is None or len(list(repository.history("main"))) == 2, "nothing was made or changed"


def test_an_adapter_alone_has_no_repository_by_default(push):
    with pytest.raises(InputError, match="^an adapter needs its own repository; give --hub_model_id"):
        runpy.run_path(str(PUSH))["main"](["--adapter_only", "true", *ANYHOW])


def test_too_little_room_is_said_before_the_merge(push, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 10, 1000))
    assert " GB. Free disk space" in refused(push, f"{REPO}-never")
    assert not (tmp_path / "publish").exists()


def test_a_format_that_fails_leaves_the_merged_model_with_a_true_card(push, trained: Desk, tmp_path, monkeypatch):
    failure = VerificationError("onnx/model.onnx does not answer as the published model does.")
    monkeypatch.setattr(conversions, "check_conversions", lambda *given: None)
    monkeypatch.setattr(conversions, "convert", lambda *given: ([], failure))
    with pytest.raises(VerificationError, match=r"onnx/model\.onnx does not answer"):
        push(f"{REPO}-no-onnx", "--onnx", "true")
    assert ("models", f"{REPO}-no-onnx") not in trained.hub.store.repositories
    assert (tmp_path / "publish/model.safetensors").is_file()
    assert "onnxruntime" not in (tmp_path / "publish/README.md").read_text().partition("## Run it")[0]


# A page to try the model on

SPACE = f"{REPO.split('/')[0]}/try-it"


def test_the_page_is_published_beside_the_model_and_gives_its_labels(trained: Desk):
    words = (PUSH, "--hub_model_id", f"{REPO}-page", "--space", SPACE, *ANYHOW)
    said = trained.run_forked(*words)
    space = trained.hub.store.repositories["spaces", SPACE]
    head = space.commit_of("main")
    assert f"Published the page: {trained.hub.endpoint}/spaces/{SPACE}/commit/{head.oid}" in said
    assert "Read back: the file hashes match, and the page gives the model's labels." in said
    assert [commit.title for commit in space.history("main")] == [f"Page for {REPO}-page", "initial commit"]
    assert {"README.md", "app.py", "space.json", "requirements.txt", "tweetdora/classifier.py"} < set(head.files)
    record = json.loads((trained.folder / "runs/llm-course-hw3-dora/publish.json").read_text())
    assert (record["space"]["repo_id"], record["space"]["commit"]) == (SPACE, head.oid)

    def read(name: str) -> str:
        return trained.hub.store.blob(head.files[name].sha256).read_text(encoding="utf-8")

    about = json.loads(read("space.json"))
    assert (about["model"], about["title"]) == (f"{REPO}-page", f"{REPO}-page".split("/")[1])
    assert len(about["examples"]) >= 3 and "have a macro-F1 of" in about["notes"][0]
    front = yaml.safe_load(read("README.md").split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", [f"{REPO}-page"])
    assert f"gradio=={front['sdk_version']}" in (ROOT / "requirements-app.txt").read_text()
    pins = dict(line.split("==") for line in read("requirements.txt").split())
    here = (ROOT / "requirements.txt").read_text()
    assert "torch" in pins and all(f"{name}=={version}" in here for name, version in pins.items())

    assert "The page is already up to date" in trained.run_forked(*words)
    assert space.commit_of("main").oid == head.oid


def test_a_page_that_fails_is_said_beside_the_model_that_is_published(push, trained: Desk):
    trained.hub.faults = [Fault("POST /api/spaces/.*/commit/", 403, times=9)]
    said = refused(push, f"{REPO}-half", "--space", f"{SPACE}-half")
    head = trained.hub.store.repositories["models", f"{REPO}-half"].commit_of("main").oid
    assert said.startswith(
        f"the model is published and checked ({trained.hub.endpoint}/{REPO}-half/commit/{head}), but its page is not: "
        f"pushing to {SPACE}-half failed: "
    )
    assert said.endswith("Run the same command again; it does not commit the model twice.")


def test_somebodys_other_app_is_left_alone(trained: Desk):
    trained.hub.store.upload("spaces", f"{SPACE}-2", {"app.py": b"print('mine')", "README.md": b"# Mine"})
    words = ("--hub_model_id", f"{REPO}-other", "--space", f"{SPACE}-2", *ANYHOW)
    said = trained.run_forked(PUSH, *words, ok=False)
    assert f"--space {SPACE}-2 holds another app (app.py). Choose another name." in said
    assert ("models", f"{REPO}-other") not in trained.hub.store.repositories, "found before any work"


def test_a_dry_run_builds_the_page_and_checks_it(trained: Desk):
    said = trained.run_forked(PUSH, "--space", SPACE, "--dry_run", "true", "--output_dir", "dry")
    folder = trained.folder / "runs/llm-course-hw3-dora/space"
    assert "/space, checked: it gives the model's labels for its examples" in said and (folder / "app.py").is_file()
    assert not list(folder.rglob("*.pyc")), "what its check leaves would be pushed"
    (folder / "app.py").write_text("raise SystemExit('broken')")
    with pytest.raises(VerificationError, match="the page's own check failed: broken; expected "):
        check_page(str(folder), str(trained.folder / "dry"), ["positive"])
    (folder / "app.py").write_text("print('[\"another label\"]')")
    with pytest.raises(VerificationError, match="the page's own check failed"):
        check_page(str(folder), str(trained.folder / "dry"), ["positive"])


def test_a_folder_of_another_kind_is_not_replaced_by_a_page(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not an earlier build of a Space"):
        check_space_dir(str(tmp_path))
    (tmp_path / "space.json").write_text("{}")
    check_space_dir(str(tmp_path))
