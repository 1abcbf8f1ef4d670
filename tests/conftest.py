"""What the tests share: tiny things made here, and one run of the real small model. Nothing is fetched.

The environment stands at the top because huggingface_hub, datasets and transformers read it when they are imported.
"""

import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

_HOME = tempfile.mkdtemp(prefix="tweetdora-tests-")
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_CACHE=os.path.join(_HOME, "hub"),
    HF_DATASETS_CACHE=os.path.join(_HOME, "datasets"),
    HF_MODULES_CACHE=os.path.join(_HOME, "modules"),
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # tiny matrices: more threads only wait for one another
    CUDA_VISIBLE_DEVICES="",
    MPLBACKEND="Agg",
)
# With several test processes (`make test`), each keeps to its own cores. Otherwise the threads of two trainings would
# wait for each other, and both would take five times as long.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if _worker and hasattr(os, "sched_setaffinity"):
    _cores, _workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, _cores[int(_worker) % len(_cores) :: _workers] or _cores)

# What a launcher, or a user's own settings, would have put there.
for _name in [
    *(name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "DEEPSPEED_"))),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
]:
    os.environ.pop(_name, None)

SYSTEM_PROMPT = "Say how the day is: negative, neutral or positive."
LABEL_WORDS = ["negative", "neutral", "positive"]
# Text that shows its class, a filler before and a filler after; 3 x 4 x 2 different ones.
CLASS_WORDS = ["bad", "plain", "good"]
SPLIT_ROWS = {"train": 48, "validation": 12, "test": 24}

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
# One token each ("Ġ" is a space before the word); "neutral" is two, "neutr" and "al".
WHOLE_WORDS = """Ġnegative Ġneutr Ġpositive Ġgood Ġbad Ġplain Ġday Ġis Ġthe Ġa Ġor Ġhow Ġnews Ġtrip
negative neutr positive good bad plain system user assistant Say The What Such Today""".split()


# Files of tests are shared among processes (`make test`). The slowest come first, so that no process is left with one
# of them at the end. test_formats makes small_run; what else uses it comes later, so that it need not wait.
_FIRST = """test_publish test_formats test_launch test_own_task test_sweep test_page test_memory test_trainer
test_scripts test_compat test_predict test_survival test_hub_server test_package test_tracking test_start""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in the order in which processes take their files."""

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return _FIRST.index(name) if name in _FIRST else len(_FIRST)

    items.sort(key=place)  # stable


def pytest_collection_finish() -> None:
    """The Trainer collects garbage when it starts: 0.4 s each time, unless what is imported by now is left out."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Undo what a script that a test ran may have done: threads, path, a process left over; part of every test."""
    path = sys.path.copy()
    yield
    sys.path[:] = path
    for name in ("forked", "launchers"):
        if module := sys.modules.get(name):
            module.kill_all()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def log_on_the_screen() -> None:
    """What the library logs is printed, as a script prints it; part of every test."""
    from tweetdora.cli import show_log

    show_log()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Any connection but to this machine fails at once; part of every test."""

    def refuse(host: Any) -> None:
        if host not in ("localhost", "127.0.0.1", "::1", b"localhost", "", None):
            raise OSError(f"the tests use no network, but something asked for {host!r}")

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return original(self, address)

        return connect

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


def byte_level_bpe() -> Any:
    """A byte-level BPE whose tokens are the special tokens, the 256 bytes, and WHOLE_WORDS with their beginnings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [("a", "l")]
    for word in WHOLE_WORDS:
        merges += [(word[:end], word[end]) for end in range(1, len(word))]
    merges = list(dict.fromkeys(merges))
    vocabulary += dict.fromkeys(left + right for left, right in merges)
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    assert [bpe.encode(word.replace("Ġ", " ")).tokens for word in WHOLE_WORDS] == [[word] for word in WHOLE_WORDS]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return bpe


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(): a new tiny byte-level ChatML tokenizer; keywords go to PreTrainedTokenizerFast."""
    from transformers import PreTrainedTokenizerFast

    def make(**overrides: Any) -> Any:
        settings = {
            "tokenizer_object": byte_level_bpe(),
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",  # pad = eos, as in the published base model
            "chat_template": CHATML,
            "name_or_path": "tiny",
            "model_max_length": 4096,
        }
        return PreTrainedTokenizerFast(**{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., Any]) -> Any:
    """The tiny ChatML tokenizer: <s> 1, </s> 2, <|im_start|> 3, <|im_end|> 4 = eos = pad; leave it as it is."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer: Any) -> Callable[..., Any]:
    """make_model(kind="llama" | "mistral" | "qwen2", seed=0, **config fields): a new tiny random float32 model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str = "llama", seed: int = 0, **overrides: Any) -> Any:
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            # As in the published base model: not what its chat template writes.
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = AutoConfig.for_model(kind, **{**settings, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def model_dir(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama, its tokenizer, and a generation config that names the wrong eos, 2; read only."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    model = make_model()
    assert (model.generation_config.eos_token_id, tokenizer.eos_token_id) == (2, 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teachable_dir(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with large weights: an adapter on it can learn, on the usual small ones it cannot; read only."""
    folder = tmp_path_factory.mktemp("teachable") / "tiny-base"
    make_model(initializer_range=0.4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tweets(split: str) -> list[dict[str, Any]]:
    """The rows of one split: class 0, 1, 2, 0, … and a text whose middle word shows it."""
    starts, ends = ["What a", "Such a", "The", "Today is a"], ["day", "trip", "news"]
    offset = list(SPLIT_ROWS).index(split)
    return [
        {
            "text": f"{starts[(row // 3 + offset) % 4]} {CLASS_WORDS[row % 3]} {ends[(row // 12 + offset) % 3]}",
            "label": row % 3,
        }
        for row in range(SPLIT_ROWS[split])
    ]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data-set folder as the Hub serves one: parquet, class names in README.md; 48, 12 and 24 rows; read only."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("data") / "tiny-tweets"
    folder.mkdir()
    for split in SPLIT_ROWS:
        parquet.write_table(pyarrow.Table.from_pylist(tweets(split)), folder / f"{split}.parquet")
    write_data_card(folder)
    return str(folder)


def write_data_card(folder: Path) -> None:
    """The README.md from which `datasets` takes splits and class names."""
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in SPLIT_ROWS)
    names = "".join(f"          '{number}': {word}\n" for number, word in enumerate(LABEL_WORDS))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}"
        "dataset_info:\n  features:\n  - name: text\n    dtype: string\n"
        f"  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
        "---\n\n# Tiny tweets\n",
        encoding="utf-8",
    )


@pytest.fixture(scope="session")
def task(data_dir: str) -> Any:
    """The task of `data_dir` with a short system prompt; dataclasses.replace(task, …) for another."""
    from tweetdora.config import TaskConfig

    return TaskConfig(dataset_name=data_dir, system_prompt=SYSTEM_PROMPT, max_train_samples=None)


@pytest.fixture(scope="session")
def prompt_tokenizer(tokenizer: Any, task: Any) -> Any:
    """The Encoder of `tokenizer` and `task`."""
    from tweetdora.prompts import PromptTokenizer, read_prompt_format

    return PromptTokenizer(tokenizer, read_prompt_format(tokenizer, task), task.max_length)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of the real small model on real tweets, 20 steps, and what push_to_hub.py said: it wrote all formats.

    The quickstart recipe, shortened (`make test` makes the assets).
    """
    alone = "PYTEST_XDIST_WORKER" not in os.environ
    folder = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    said = folder / "small.txt"
    with FileLock(folder / "small.lock"):  # for all processes, one of which makes it
        if not said.is_file():
            said.write_text(_make_small_run(folder / "small"), encoding="utf-8")
    return folder / "small", said.read_text(encoding="utf-8")


def _make_small_run(run: Path) -> str:
    import forked

    root = Path(__file__).resolve().parent.parent
    for line in (
        f"train.py --config recipes/quickstart.yaml --output_dir {run} --max_steps 20 --global_batch_size 8 "
        "--eval_steps 20 --max_eval_samples 8",
        f"evaluate.py {run} --max_eval_samples 32 --bootstrap_samples 200",
        f"push_to_hub.py {run} --gguf q8_0 --onnx true --dry_run true --check_samples 12",
    ):
        script, *flags = line.split()
        process = forked.start([root / script, *flags], root)
        said = process.end(seconds=900)
        assert process.returncode == 0, said[-4000:]
    return said


@pytest.fixture
def training(tmp_path: Path) -> Callable[..., Any]:
    """training(**settings): the settings of a run in a folder that does not exist yet."""
    from tweetdora.train_config import TrainConfig

    def make(**settings: Any) -> Any:
        defaults = {"output_dir": str(tmp_path / "run"), "precision": "fp32", "report_to": []}
        return TrainConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def planned(model_dir: str, task: Any, training: Callable[..., Any]) -> Callable[..., Any]:
    """planned(examples=None, task={}, model={}, **training settings): the record of a run before its first step."""
    import dataclasses

    from accelerate import PartialState

    from tweetdora.config import ModelConfig
    from tweetdora.resume import Commits
    from tweetdora.training import load

    def make(examples: int | None = None, **settings: Any) -> Any:
        changes = settings.pop("task", {}) | ({"max_train_samples": examples} if examples else {})
        model = ModelConfig(**{"model_name_or_path": model_dir, **settings.pop("model", {})})
        changed = dataclasses.replace(task, **changes)
        return load(changed, model, training(**settings), Commits(None, None), PartialState())[1]

    return make
