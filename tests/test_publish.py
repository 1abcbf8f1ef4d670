"""The user's own words against the test Hub: three scripts as processes, then anyone's from_pretrained."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import Hub, User

ROOT = Path(__file__).resolve().parent.parent
BASE, DATA, REPO = "OuteAI/Lite-Oute-1-300M-Instruct", "cardiffnlp/tweet_eval", "liuhailin0123/llm-course-hw3-dora"
TOKEN = "hf_" + "a" * 34
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

    def run(self, *words: str, home: str = "home", ok: bool = True) -> str:
        """A process with nothing but the Hub's three variables of its own; its output, both streams together."""
        kept = {
            name: text for name, text in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))
        }
        env = kept | {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.folder / home),
            "HF_TOKEN": TOKEN,
            "NO_PROXY": "127.0.0.1,localhost",
            "HOME": str(self.folder),  # no login of the developer's
        }
        if self.transport == "lfs":
            env["HF_HUB_DISABLE_XET"] = "1"
        done = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) == ok, done.stdout[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def trained(make_model: Callable, tokenizer, data_dir: str, tmp_path_factory) -> Iterator[Desk]:
    """train.py and evaluate.py have run, without one flag."""
    folder = tmp_path_factory.mktemp("desk")
    with Hub(folder / "hub") as hub:
        hub.tokens[TOKEN] = User(REPO.split("/")[0])
        put_base(hub, make_model, tokenizer, folder / "base")
        put_data(hub, Path(data_dir))
        desk = Desk(hub, folder, "xet", [])
        desk.run("-m", "accelerate.commands.launch", str(ROOT / "train.py"))
        desk.run(str(ROOT / "evaluate.py"))
        yield desk


@pytest.fixture(scope="module", params=["xet", "lfs"])
def desk(request, trained: Desk) -> Desk:
    """And push_to_hub.py, to a repository that is not there yet."""
    trained.hub.store.repositories.pop(("models", REPO), None)
    trained.hub.requests.clear()
    desk = Desk(trained.hub, trained.folder, request.param, [])
    desk.printed.append(desk.run(str(ROOT / "push_to_hub.py")))
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


def test_what_was_published_answers_as_the_adapter_does_token_for_token(desk: Desk):
    texts = ["What a good day", "Such a bad trip", "The plain news", "Today is a good trip", ""]
    prompt = json.loads((desk.folder / "runs/llm-course-hw3-dora/run.json").read_text())["task"]["system_prompt"]
    conversations = [[{"role": "system", "content": prompt}, {"role": "user", "content": text}] for text in texts]
    (desk.folder / "conversations.json").write_text(json.dumps(conversations))
    published = desk.run("-c", LOAD, "conversations.json", home="empty")
    adapter = desk.run("-c", LOAD_ADAPTER, "conversations.json", "runs/llm-course-hw3-dora/adapter")
    answers = json.loads(published.splitlines()[-1])
    assert answers == json.loads(adapter.splitlines()[-1])
    assert len({tuple(answer) for answer in answers}) > 1


def test_the_publish_says_and_records_what_it_read_back(desk: Desk):
    record = json.loads((desk.folder / "runs/llm-course-hw3-dora/publish.json").read_text())
    head = desk.hub.store.repositories["models", REPO].commit_of("main")
    assert record["published"]["commit"] == head.oid
    assert record["read_back"]["files"] == len(head.files) - 1  # without .gitattributes, the Hub's own
    assert record["read_back"]["equal_answers"] == record["read_back"]["rows"] == 24
    assert record["read_back"]["max_logit_difference"] == 0.0
    assert f"Published: {desk.hub.endpoint}/{REPO}/commit/{head.oid}" in desk.printed[0]
    assert "24 of 24 answers equal, largest logit difference 0.0e+00." in desk.printed[0]
    assert TOKEN not in json.dumps(record)


def test_the_run_names_the_revisions_that_it_used(desk: Desk):
    run = json.loads((desk.folder / "runs/llm-course-hw3-dora/run.json").read_text())
    repositories = desk.hub.store.repositories
    assert run["base"]["revision"] == repositories["models", BASE].commit_of("main").oid
    assert run["train_data"]["revision"] == repositories["datasets", DATA].commit_of("main").oid


def test_it_is_one_commit_over_the_transport_that_was_asked_for(desk: Desk):
    history = [commit.title for commit in desk.hub.store.repositories["models", REPO].history("main")]
    assert len(history) == 2 and history[1] == "initial commit"
    assert any("/cas/v1/xorbs/" in line for line in desk.hub.requests) == (desk.transport == "xet")


def test_a_repository_in_which_another_file_lies_than_was_sent_is_not_called_published(trained: Desk):
    trained.hub.tampered["config.json"] = b"{}"
    try:
        said = trained.run(str(ROOT / "push_to_hub.py"), "--hub_model_id", f"{REPO}-2", ok=False)
    finally:
        trained.hub.tampered.clear()
    assert "does not hold what runs/llm-course-hw3-dora/publish does: config.json. Do not use it" in said
    assert "Published" not in said
    record = json.loads((trained.folder / "runs/llm-course-hw3-dora/publish.json").read_text())
    assert record["read_back"] is None and record["published"]["repo_id"] == f"{REPO}-2"
