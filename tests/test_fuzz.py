"""Any chat template, label words, CSV dialect and metadata: made by Hypothesis from the parts that real ones have."""

import csv
import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SPECIAL_TOKENS, byte_level_bpe
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tweetdora.config import TaskConfig, normalize_label
from tweetdora.data import load_examples
from tweetdora.errors import InputError
from tweetdora.generation import LabelParser
from tweetdora.model_card import to_yaml
from tweetdora.prompts import PromptTokenizer, freeze_template, read_prompt_format
from tweetdora.training import check_label_words

settings.register_profile(
    "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("here")
BPE = byte_level_bpe()
WORDS = ["negative", "neutral", "positive"]
PROMPT = "Say negative, neutral or positive."

# Chat templates

headers = st.sampled_from(
    ["<|im_start|>ROLE\n", "<|im_start|>ROLE<|im_end|>\n\n", "[ROLE] ", "### ROLE:\n", "\nROLE: "]
)
stops = st.sampled_from(["<|im_end|>\n", "<|im_end|>", "</s>", " </s>\n", "</s>\n\n"])
beginnings = st.sampled_from(["", "<s>", "{{ bos_token }}", "<s>\n"])
thoughts = st.sampled_from(["", "<think>\n", "<think>\n\n</think>\n\n", "<thinking>\n", "QWEN"])
dates = st.sampled_from(["", "{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}"])
systems = st.sampled_from(["a turn", "dropped", "refused", "in the user's turn"])
contents = st.sampled_from(["message['content']", "message['content'] | trim", "(message['content'] | trim)"])


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A template like those of real chat models: who speaks, what ends a turn, what opens an answer."""
    header, stop, content = draw(headers), draw(stops), draw(contents)
    opened, system = draw(thoughts), draw(systems)
    prompt_header = json.dumps(header.replace("ROLE", "assistant"))
    before_answer = json.dumps("<think>\n\n</think>\n\n" if opened in ("QWEN", "<think>\n\n</think>\n\n") else "")
    opening = json.dumps("" if opened == "QWEN" else opened)
    turn = f"{{{{ {json.dumps(header)}.replace('ROLE', message['role']) }}}}"
    answer = f"{{% if message['role'] == 'assistant' %}}{{{{ {before_answer} }}}}{{% endif %}}"
    shown = {
        "a turn": "",
        "dropped": "{% if message['role'] == 'system' %}{% continue %}{% endif %}",
        "refused": "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}",
        "in the user's turn": "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
        "{% continue %}{% endif %}",
    }[system]
    said = f"{{{{ (ns.system if message['role'] == 'user' else '') + {content} }}}}"
    body = f"{turn}{answer}{said}{{{{ {json.dumps(stop)} }}}}"
    generation = ""
    if draw(st.booleans()):
        generation = f"{{% if add_generation_prompt %}}{{{{ {prompt_header} + {opening} }}}}{{% endif %}}"
    start = "{% set ns = namespace(system='') %}" + draw(beginnings) + draw(dates)
    return f"{start}{{% for message in messages %}}{shown}{body}{{% endfor %}}{generation}"


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=BPE, chat_template=template, name_or_path="tiny", **names)


texts = st.text(st.characters(codec="utf-8"), max_size=12).map(str.strip)


@settings(max_examples=300)
@given(template=templates(), text=texts)
def test_prompt_and_answer_are_the_rendered_chat(template, text):
    tokenizer = tokenizer_with(template)
    task = TaskConfig(system_prompt=PROMPT)
    try:
        found = read_prompt_format(tokenizer, task)
        prompt_tokenizer = PromptTokenizer(tokenizer, found, 4096)
    except InputError as refusal:
        assert str(refusal).startswith("the chat template of tiny ")
        return
    assert PROMPT in found.head, "whatever the template does with a system message"
    assume(prompt_tokenizer.is_plain(text) and text and "{{" not in text)
    messages = found.messages(PROMPT, text)
    chat = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "neutral"}], tokenize=False)
    prompt = found.head + text + found.tail
    whole = prompt + found.completions[1] + found.stop_token
    if "<think" in found.tail and not chat.startswith(prompt):
        closed = re.sub(r"<(think|thinking)>\s*</\1>\s*", "", whole)
        assert chat.startswith(closed) or chat.startswith(closed.rstrip()), "but for the thought that was closed"
    else:
        assert chat.startswith(whole)
    ids = prompt_tokenizer.prompt_ids([text])[0][0]
    assert tokenizer.decode(ids) == prompt
    # Published, the template writes this prompt for anybody.
    freeze_template(tokenizer, found, task)
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert tokenizer.decode(rendered["input_ids"]) == prompt and rendered["input_ids"] == ids


# Label words

alphabets = st.sampled_from(
    ["abcABC", "éèüßñçİı", "абвгДЖ", "αβγΣς", "否定肯中立", "ความรูสก", "नकारतमक", "🙂🙁 ", "a-b'c ", "123"]
)


@st.composite
def label_words(draw: st.DrawFn) -> list[str]:
    """Words of scripts of all kinds, in either normal form; some begin like one another."""
    words: list[str] = []
    for _ in range(draw(st.integers(2, 4))):
        word = draw(st.text(draw(alphabets), min_size=1, max_size=6))
        if words and draw(st.booleans()):
            word = draw(st.sampled_from(words)) + word
        words.append(unicodedata.normalize(draw(st.sampled_from(["NFC", "NFD"])), word))
    folded = [normalize_label(word) for word in words]
    assume(len(set(folded)) == len(words) and "" not in folded)
    return words


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@settings(max_examples=300)
@given(words=label_words())
@example(words=["good", "not good"])
@example(words=["शून्य", "शून्यता"])
def test_each_label_word_is_found_in_what_is_trained_or_refused_by_name(words):
    tokenizer = tokenizer_with(CHATML)
    task = TaskConfig(system_prompt="Say it.", label_words=words)
    try:
        prompt_tokenizer = PromptTokenizer(tokenizer, read_prompt_format(tokenizer, task), 4096)
        check_label_words(prompt_tokenizer, task)
    except InputError as refusal:
        assert any(repr(word) in str(refusal) for word in words)
        return
    parse = LabelParser(words)
    for number, (word, ids) in enumerate(zip(words, prompt_tokenizer.completion_ids, strict=True)):
        assert parse(tokenizer.decode(ids, skip_special_tokens=True)) == number
        for form in ("NFC", "NFD"):
            assert parse(f" {unicodedata.normalize(form, word)}.\n") == number


# Files


@st.composite
def dialects(draw: st.DrawFn) -> dict[str, Any]:
    """How a CSV file may be written."""
    return {
        "delimiter": draw(st.sampled_from(",;\t|")),
        "quoting": draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])),
        "lineterminator": draw(st.sampled_from(["\n", "\r\n"])),
    }


encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
cells = st.text(st.characters(codec="utf-8"), max_size=12).filter(str.strip)


@settings(max_examples=200)
@given(
    dialect=dialects(), encoding=encodings, rows=st.lists(st.tuples(cells, st.integers(0, 2)), min_size=1, max_size=4)
)
@example(
    dialect={"delimiter": ";"}, encoding="utf-8", rows=[('"', 0), ("a;b", 1), ("a\n\nb", 2), ("NA", 0), ("\r", 1)]
)
def test_a_file_in_any_dialect_and_encoding_is_read_as_it_was_written(dialect, encoding, rows, tmp_path):
    rows = [(text.encode(encoding, "ignore").decode(encoding), label) for text, label in rows]
    rows = [(text, label) for text, label in rows if text.strip()]
    assume(rows)
    path = tmp_path / f"{abs(hash(repr((dialect, encoding, rows))))}.csv"
    write_csv(path, dialect, encoding, rows)
    flags = {"csv_delimiter": dialect["delimiter"], "encoding": None if encoding.startswith("utf-8") else encoding}
    examples = load_examples(TaskConfig(dataset_name=str(path), **flags), "train", None)
    assert list(zip(examples.texts, examples.labels, strict=True)) == [(text.strip(), label) for text, label in rows]
    # Without the flags: a refusal that names one of them or a line, or the same rows; never other ones.
    try:
        plain = load_examples(TaskConfig(dataset_name=str(path)), "train", None)
    except InputError as refusal:
        assert re.search(r"--encoding|--csv_delimiter|--text_column|line \d+: has", str(refusal)), refusal
    else:
        assert (plain.labels, len(plain.texts)) == (examples.labels, len(examples.texts))


def write_csv(path: Path, dialect: dict[str, Any], encoding: str, rows: list[tuple[str, int]]) -> None:
    with open(path, "w", encoding=encoding, newline="") as stream:
        writer = csv.writer(stream, **dialect)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


# Metadata


class Yaml12(yaml.SafeLoader):
    """YAML 1.2's core schema (section 10.3.2): what the Hub's reader takes for no text."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for tag, pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    Yaml12.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^({pattern})$"), None)

metadata_texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.sampled_from(
        "no yes on off y n true null ~ 1e3 0o14 0x1F 012 1_000 1:30 2026-01-01 .5 1. +1 -.inf .NaN".split()
    ),
    st.sampled_from(
        ["", " ", "---", "- x", "a: b", "a #b", "%a", "@a", "'", '"', "\u2028", "\x85", "\n---\n", "\ufeff"]
    ),
    st.text("0123456789eExo+-._:", max_size=6),
)


@settings(max_examples=500)
@given(license_name=metadata_texts, languages=st.lists(metadata_texts, max_size=3), name=metadata_texts)
@example(license_name="1e3", languages=["no"], name="0o14")
def test_metadata_are_read_back_as_the_same_texts_by_both_versions_of_yaml(license_name, languages, name):
    metadata = {"license_name": license_name, "language": languages, "model_name": name, "value": 0.4646, "set": True}
    written = to_yaml(metadata)
    for loader in (yaml.SafeLoader, Yaml12):
        assert yaml.load(written, loader) == metadata
    for character in "\x85\u2028\u2029":  # line breaks in 1.1, not in 1.2
        assert character not in written
    card = ModelCard(f"---\n{written}\n---\n\n# Title\n")
    assert card.data.to_dict().get("license_name") == license_name and "# Title" in card.text


@pytest.mark.parametrize("text", ["1e3", "0o14", "12e03"])
def test_the_reader_of_version_1_2_is_another_one(text):
    """The companion: plain, these are texts in 1.1 and numbers in 1.2."""
    assert yaml.load(text, yaml.SafeLoader) == text
    assert not isinstance(yaml.compose(text, Yaml12).tag.rpartition(":")[2], type(None))
    assert yaml.compose(text, Yaml12).tag.rpartition(":")[2] in ("int", "float")


def test_the_tokenizer_has_the_tokens_that_the_templates_write():
    assert {"<|im_start|>", "<|im_end|>", "<s>", "</s>"} <= set(SPECIAL_TOKENS)
