"""The two pages in a real browser, headless Chromium: space/app.py (Gradio) and page/index.html (transformers.js)."""

import csv
import gc
import importlib.util
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from conftest import tweets

from tweetdora import Classifier, Prediction
from tweetdora.errors import InputError
from tweetdora.space import about_run

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or find_spec("playwright") is None or find_spec("gradio") is None,
    reason="no chromium, playwright or gradio here",
)
# Without these it looks for its maker's servers, which a closed network refuses.
QUIET = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
# Where screenshots are kept, to be looked at; none: thrown away.
PICTURES = os.environ.get("TWEETDORA_PICTURES")
WORDS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=[*QUIET.split(), "--disable-sync"])
        yield found
        found.close()


def new_page(browser: Any, **settings: Any) -> Any:
    """A new page of the browser, which waits for as long as a busy machine may need."""
    found = browser.new_page(**settings)
    found.set_default_timeout(180_000)
    return found


def picture(page: Any, name: str) -> None:
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png", full_page=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


# The Gradio page


@pytest.fixture(scope="module")
def model(small_run: tuple[Path, str]) -> str:
    return str(small_run[0])


@pytest.fixture(scope="module")
def tmp_dir(tmp_path_factory) -> Path:
    """Where the page's server keeps what it keeps."""
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(model: str, tmp_dir: Path) -> Iterator[str]:
    """The page as `make app` opens it, without the browser."""
    port, log = free_port(), tmp_dir / "log"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_dir / "gradio"), "TMPDIR": str(tmp_dir)}
    with open(log, "w") as stream:
        words = [sys.executable, "space/app.py", model, "--port", str(port)]
        server = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            yield wait_for(f"http://127.0.0.1:{port}/", server, log)
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> str:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return address
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    found = new_page(browser)
    refused = []
    found.on("requestfailed", lambda request: refused.append(request.url))
    found.goto(address)
    found.get_by_role("button", name="Classify", exact=True).wait_for()
    yield found
    found.close()
    assert [url for url in refused if not url.startswith(address)] == [], "the page needs no other server"


def test_of_labels_that_rounding_made_equally_likely_the_page_shows_the_models():
    shares = {"negative": 0.4, "neutral": 0.39, "positive": 0.21}
    assert load_app().label_text(lambda text: [Prediction("neutral", shares, 0.0)], "What a day") == (
        "neutral",
        shares,
    )


def test_a_text_is_typed_and_its_label_read(page, model):
    expected = Classifier(model)("What a good day")[0]
    page.get_by_label("Text", exact=True).fill("What a good day")
    page.get_by_role("button", name="Classify", exact=True).click()
    heading = page.get_by_test_id("label-output-value")
    heading.wait_for()
    assert heading.inner_text().strip() == expected.label
    shown = page.locator("[data-testid$='-confidence-set']").all_inner_texts()
    found = {text.split()[0]: int(re.search(r"(\d+)%", text)[1]) for text in shown}
    assert found == {word: round(100 * value) for word, value in expected.probabilities.items()}
    picture(page, "space")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_light_and_dark(browser, address, scheme):
    page = new_page(browser, color_scheme=scheme)
    page.goto(address)
    button = page.get_by_role("button", name="Classify", exact=True)
    button.wait_for()
    assert (brightness(page, "backgroundColor") > 128) == (scheme == "light")
    picture(page, f"space-{scheme}")
    page.close()


def brightness(page: Any, name: str) -> float:
    """The mean of red, green and blue of this colour of its body, 0 to 255."""
    color = page.evaluate(f"getComputedStyle(document.body).{name}")
    return sum(float(number) for number in re.findall(r"[\d.]+", color)[:3]) / 3


def test_an_example_of_the_card_is_classified_by_a_click(page, model):
    rows = [json.loads(line) for line in Path(model, "evaluation/test/predictions.jsonl").read_text().splitlines()]
    right = next(row for row in rows if row["label"] == row["finetuned"]["predicted"] == "negative")
    page.get_by_text(right["text"][:40]).first.click()
    heading = page.get_by_test_id("label-output-value")
    heading.wait_for()
    assert heading.inner_text().strip() == Classifier(model)(right["text"])[0].label
    page.get_by_text("its answers have a macro-F1 of").wait_for()
    picture(page, "space-example")


def test_no_text_is_said_on_the_page(page):
    page.get_by_role("button", name="Classify", exact=True).click()
    page.get_by_text("Type a text first.").wait_for()


def test_a_file_is_uploaded_and_comes_back_labelled(page, model, tmp_dir, tmp_path):
    texts = [row["text"] for row in tweets("test")]
    file = tmp_path / "tweets.csv"
    file.write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    page.get_by_role("tab", name="A file").click()
    page.locator("input[type=file]").first.set_input_files(str(file))
    page.get_by_text("tweets.csv").first.wait_for()
    page.get_by_role("button", name="Classify the file").click()
    page.get_by_text(f"{len(texts)} rows:").wait_for()
    picture(page, "space-file")
    with page.expect_download() as found:
        page.locator("a[download]").last.click()
    rows = list(csv.DictReader(io.StringIO(Path(found.value.path()).read_text(encoding="utf-8"))))
    assert [row["text"] for row in rows] == texts
    assert [row["label"] for row in rows] == [prediction.label for prediction in Classifier(model)(texts)]
    kept = list(tmp_dir.rglob("tweets-labelled.csv"))
    assert [path.relative_to(tmp_dir).parts[0] for path in kept] == ["gradio"], "where delete_cache finds it"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"first,second\n1,2\n", "its columns are first, second. Name one with “Text column”."),
        ("a.csv", b"id;text\n1;good\n", 'Its fields seem to be separated by a semicolon: set “Delimiter” ";".'),
        ("a.csv", "text\nschön\n".encode("latin-1"), "Set it with “Encoding”, such as latin-1 or cp1252."),
        ("a.parquet", b"PAR1", "a.parquet is not readable Parquet"),
        ("a.csv", b"", "a.csv is empty; expected a header line"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_the_words_of_the_page(model, tmp_path, name, content, said):
    app = load_app()
    (tmp_path / name).write_bytes(content)
    classifier = Classifier(model)
    with pytest.raises(InputError) as caught:
        app.label_file(classifier, str(tmp_path / name), str(tmp_path))
    shown = app.for_the_page(str(caught.value), str(tmp_path / name))
    assert said in shown and shown.startswith("a.") and "--" not in shown


def test_delimiter_and_encoding_are_what_the_page_says(model, tmp_path):
    (tmp_path / "a.csv").write_bytes("id;text\n1;schön\n".encode("latin-1"))
    found = load_app().label_file(Classifier(model), str(tmp_path / "a.csv"), str(tmp_path), "text", ";", " latin-1 ")
    assert found[0]["headers"][:2] == ["id", "text"] and found[0]["data"][0][:2] == ["1", "schön"]


def load_app() -> Any:
    spec = importlib.util.spec_from_file_location("space_app", ROOT / "space/app.py")
    assert spec is not None and spec.loader is not None
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    return app


def test_uploads_are_deleted_after_an_hour(model):
    app = load_app()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # a page that is not launched leaves event loops open
        assert app.make_page(Classifier(model), app.read_about(model)).delete_cache == (3600, 3600)
        gc.collect()


def test_a_run_that_was_not_measured_has_a_page_and_a_damaged_record_none(model, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(model, run, ignore=shutil.ignore_patterns("publish"))
    record = run / "evaluation/test.json"
    record.write_text("{")
    with pytest.raises(InputError, match=r"test\.json"):
        about_run(str(run))
    record.unlink()
    assert about_run(str(run))["notes"] == ["It has not been evaluated yet."]


def test_a_file_without_texts_is_answered_with_its_columns(page, tmp_path):
    file = tmp_path / "numbers.csv"
    file.write_text("first,second\n1,2\n")
    page.get_by_role("tab", name="A file").click()
    page.locator("input[type=file]").first.set_input_files(str(file))
    page.get_by_text("numbers.csv").first.wait_for()
    page.get_by_role("button", name="Classify the file").click()
    page.get_by_text("its columns are first, second").wait_for()


# The page that needs no server


NPM = ROOT / ".npm"
CDN = "https://cdn.jsdelivr.net/npm/"


@pytest.fixture(scope="module")
def hub(model: str) -> Iterator[str]:
    """The page at /, and the model's files where the Hub would have them."""

    class Files(SimpleHTTPRequestHandler):
        """Files of the checkout's page, and of owner/small."""

        def translate_path(self, path: str) -> str:
            path = path.partition("?")[0]
            prefix = "/owner/small/resolve/main/"
            if path.startswith(prefix):
                return f"{model}/publish/{path.removeprefix(prefix)}"
            return f"{ROOT}/page/index.html" if path == "/" else os.devnull + "/none"

        def copyfile(self, source: Any, outputfile: Any) -> None:
            with suppress(ConnectionError):  # a browser asks for a file twice, and drops one answer
                super().copyfile(source, outputfile)

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not (NPM / ".done").is_file(), reason="`make .npm/.done` fetches transformers.js")
def test_the_browser_alone_answers_as_the_model_does(browser, hub, model):
    predictions = Path(model, "evaluation/test/predictions.jsonl")
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()[:4]]
    page = new_page(browser)
    page.route(f"{CDN}**", from_npm)
    page.goto(f"{hub}?model=owner/small&host={hub}")
    page.get_by_text("Ready. It answers every text with one of negative, neutral, positive").wait_for()
    found = []
    for row in rows:
        page.get_by_label("Text").fill(row["text"])
        page.get_by_role("button").click()
        page.get_by_text(re.compile(r"^[\d.]+ s$")).wait_for()
        found.append(page.locator("output").inner_text())
        page.locator("#state").evaluate("state => { state.textContent = ''; }")
    page.get_by_label("Text").fill("  ")
    page.get_by_role("button").click()
    page.get_by_text("Type a text first.").wait_for()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert (brightness(page, "color") > 128) == (scheme == "dark"), "its text"
        picture(page, f"page-{scheme}")
    page.close()
    answers = [row["finetuned"]["text"].strip() for row in rows]
    assert found == [answer if answer in WORDS else "no label" for answer in answers]


@pytest.mark.skipif(not (NPM / ".done").is_file(), reason="`make .npm/.done` fetches transformers.js")
def test_an_answer_that_is_no_label_is_shown_as_such(browser, hub):
    page = new_page(browser)
    page.route(f"{CDN}**", from_npm)
    other = {"task": {"label_words": ["yes", "no"], "system_prompt": "Say one word."}, "prompt_format": {}}
    body = json.dumps({**other, "max_new_tokens": 3})
    page.route("**/task.json", lambda route: route.fulfill(body=body, content_type="application/json"))
    page.goto(f"{hub}?model=owner/small&host={hub}")
    page.get_by_text("Ready. It answers every text with one of yes, no").wait_for()
    page.get_by_label("Text").fill("a good day")
    page.get_by_role("button").click()
    page.get_by_text(re.compile("It answered “.*”, which is not one of its labels")).wait_for()
    assert page.locator("output").inner_text() == "no label"
    page.close()


def test_a_library_that_cannot_be_loaded_is_said(browser, hub):
    page = new_page(browser)
    page.route(f"{CDN}**", lambda route: route.abort())
    page.goto(f"{hub}?model=owner/small&host={hub}")
    page.get_by_text("Error: transformers.js could not be loaded from cdn.jsdelivr.net").wait_for()
    page.close()


def from_npm(route: Any) -> None:
    """The CDN's file, from the packages that `make .npm/.done` fetched."""
    package, _, path = re.fullmatch(rf"{CDN}(.+?)@([^/]+)/?(.*)", route.request.url).groups()
    file = NPM / package.rpartition("/")[2] / (path or "dist/transformers.min.js")
    kind = "application/wasm" if file.suffix == ".wasm" else "text/javascript"
    route.fulfill(path=file, headers={"Access-Control-Allow-Origin": "*", "Content-Type": kind})


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("", "Name a model in the address: ?model=owner/name"),
        ("?model=owner/none&host={hub}", "Error: owner/none has no task.json"),
    ],
)
@pytest.mark.skipif(not (NPM / ".done").is_file(), reason="`make .npm/.done` fetches transformers.js")
def test_the_page_says_what_is_wrong(browser, hub, query, said):
    page = new_page(browser)
    page.route(f"{CDN}**", from_npm)
    page.goto(hub + query.format(hub=hub))
    page.get_by_text(said).wait_for()
    page.close()
