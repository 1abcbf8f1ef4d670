"""A page to try a model in the browser: type a text, or upload a file.

    python space/app.py runs/quickstart     # a run folder, a published folder, or a model on the Hub
    python app.py                           # as a Space: the model that space.json names
    python app.py --check                   # classify space.json's examples and exit

push_to_hub.py --space owner/name publishes it, together with the package tweetdora.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# In a Space, the package is next to this file; in the repository, it is one folder up.
sys.path.insert(0, str(HERE if (HERE / "tweetdora").is_dir() else HERE.parent))
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from tweetdora import Classifier  # noqa: E402
from tweetdora.config import PredictConfig  # noqa: E402
from tweetdora.errors import UserError  # noqa: E402
from tweetdora.prediction import find_text_column, predict_file, scan  # noqa: E402
from tweetdora.tables import read_any_rows  # noqa: E402

SHOWN_ROWS = 20
# The page's fields for flags of predict.py.
FIELDS = {"--text_column": "Text column", "--csv_delimiter": "Delimiter", "--encoding": "Encoding"}
DELIMITERS = [("a comma (a tab in .tsv)", ""), ("a semicolon ;", ";"), ("a tab", "\t"), ("a bar |", "|")]
_KEPT_SECONDS = 3600  # uploads and results are deleted after this time
_LIMIT = "It gives every text one of {count} labels, even if none of them fits."


def main(argv: list[str] | None = None) -> int:
    """Load the model and open the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", help="Run folder, published folder or Hub id (default: space.json's).")
    parser.add_argument("--port", type=int, help="Port of the page (default: 7860, or the next free one).")
    parser.add_argument("--open", action="store_true", help="Open the page in a browser.")
    parser.add_argument("--check", action="store_true", help="Classify space.json's examples, print JSON, and exit.")
    flags = parser.parse_args(argv)
    about = read_about(flags.model)
    classifier = Classifier(about["model"])
    if flags.check:
        labels = [prediction.label for prediction in classifier([one["text"] for one in about["examples"]])]
        print(json.dumps(labels))
        return 0
    import gradio

    make_page(classifier, about).launch(
        server_port=flags.port,
        inbrowser=flags.open,
        max_file_size="20mb",
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no font is fetched
    )
    return 0


def read_about(model: str | None) -> dict[str, Any]:
    """Collect the facts about the model: from space.json, from a run's records, or else little more than its name."""
    path = HERE / "space.json"
    if path.is_file():
        about = json.loads(path.read_text(encoding="utf-8"))
        return about if model is None else {**about, "model": model}
    if model is None:
        sys.exit("app.py: name a model: python space/app.py <run folder, published folder or Hub id>")
    if os.path.isfile(os.path.join(model, "run.json")):
        from tweetdora.space import about_run  # not in a Space: it imports the code for cards

        return about_run(model)
    return {"model": model, "title": os.path.basename(os.path.abspath(model)), "notes": [], "examples": []}


def make_page(classifier: Classifier, about: dict[str, Any]) -> Any:
    """Build the page, which classifies one text or a file."""
    import gradio

    def classify_text(text: str) -> tuple[str, dict[str, float]]:
        """Answer as label_text does."""
        if not text.strip():
            raise gradio.Error("Type a text first.", print_exception=False)
        return label_text(classifier, text)

    def classify_file(
        path: str | None, column: str | None, delimiter: str, encoding: str | None
    ) -> Iterator[tuple[Any, str, str]]:
        """Yield the first rows with the added columns, a summary, and the file to download."""
        if path is None:
            raise gradio.Error("Choose a file first.", print_exception=False)
        try:
            with tempfile.TemporaryDirectory() as folder:
                # Gradio copies the file to its own cache before it requests the next value.
                yield label_file(classifier, path, folder, column, delimiter, encoding)
        except UserError as error:
            raise gradio.Error(for_the_page(str(error), path), print_exception=False) from error

    words = classifier.label_words
    notes = [*about["notes"], _LIMIT.format(count=len(words))]
    with gradio.Blocks(title=about["title"], delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)) as page:
        gradio.Markdown(f"# {about['title']}\n\nClassifies a text as {', '.join(words[:-1])} or {words[-1]}.")
        with gradio.Tab("One text"):
            text = gradio.Textbox(label="Text", lines=3, placeholder="Type a text", autofocus=True)
            button = gradio.Button("Classify", variant="primary")
            answer = gradio.Label(label="Label")
            shares = gradio.Label(label="Probabilities", num_top_classes=len(words), show_heading=False)
            if about["examples"]:
                texts = [[one["text"]] for one in about["examples"]]
                gradio.Examples(texts, text, [answer, shares], classify_text, run_on_click=True, cache_examples=False)
            gradio.on([button.click, text.submit], classify_text, text, [answer, shares], api_name="classify")
        with gradio.Tab("A file"):
            gradio.Markdown(
                "A .csv, .tsv, .jsonl, .parquet or .txt file. Each row gets a label, its probabilities and a margin."
            )
            file = gradio.File(label="File", file_types=[".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
            column = gradio.Textbox(label=FIELDS["--text_column"], placeholder="text, or the only column")
            with gradio.Accordion("If the file cannot be read", open=False):
                delimiter = gradio.Dropdown(DELIMITERS, value="", label=FIELDS["--csv_delimiter"])
                encoding = gradio.Textbox(label=FIELDS["--encoding"], placeholder="utf-8")
            start = gradio.Button("Classify the file", variant="primary")
            done = gradio.Markdown()
            table = gradio.Dataframe(label=f"The first {SHOWN_ROWS} rows", wrap=True)
            labelled = gradio.File(label="All rows")
            given, shown = [file, column, delimiter, encoding], [table, done, labelled]
            start.click(classify_file, given, shown, api_name="classify_file")
        gradio.Markdown("\n".join(f"- {note}" for note in notes))
    return page


def label_text(classifier: Classifier, text: str) -> tuple[str, dict[str, float]]:
    """Return the label and all probabilities. If rounding made some equal, the label's need not be the largest."""
    (found,) = classifier(text)
    return str(found.label), found.probabilities


def for_the_page(message: str, path: str) -> str:
    """Rewrite a message of predict.py for the page: fields instead of flags, and no upload folder."""
    for flag, label in FIELDS.items():
        message = message.replace(flag, f"“{label}”")
    return message.replace(os.path.join(os.path.dirname(path), ""), "")


def label_file(
    classifier: Classifier,
    path: str,
    folder: str,
    column: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> tuple[Any, str, str]:
    """Classify a file as predict.py does; return its first rows, a summary, and the file written to `folder`."""
    name, ending = os.path.splitext(os.path.basename(path))
    ending = ".csv" if ending.lower() == ".txt" else ending.lower()
    output = os.path.join(folder, f"{name}-labelled{ending}")
    config = PredictConfig(
        output=output,
        text_column=(column or "").strip() or None,
        csv_delimiter=delimiter or None,
        encoding=(encoding or "").strip() or None,
        skip_bad_rows=True,
    )
    table = scan(path, config)
    found = find_text_column(table.columns, config, classifier.target.task.text_column, path)
    summary = predict_file(classifier, table, config, found)
    rows = [row.values for row in itertools.islice(read_any_rows(output, config.csv_delimiter), SHOWN_ROWS)]
    columns = list(dict.fromkeys(name for row in rows for name in row))  # a JSON line may lack some
    shown = {"headers": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    return shown, ". ".join(summary.lines(classifier.target.task.max_length)) + ".", output


if __name__ == "__main__":
    sys.exit(main())
