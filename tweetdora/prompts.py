"""Token ids of prompts and answers in the base model's own chat template.

    head    <|im_start|>system\\nAnswer in one word.<|im_end|>\\n<|im_start|>user\\n
    text    Great day!
    tail    <|im_end|>\\n<|im_start|>assistant\\n
    answer  positive<|im_end|>

Head, text and tail are the prompt. Loss is on the answer and on the stop token behind it, nothing else.
"""

import bisect
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from tweetdora.config import TaskConfig
from tweetdora.data import Rows
from tweetdora.errors import InputError

IGNORE_INDEX = -100  # what torch.nn.functional.cross_entropy leaves out
_TEXT_MARK = "THE-TEXT-STANDS-HERE"


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
        messages = _messages(task.system_prompt, _TEXT_MARK, system_in_user_turn)
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

    def messages(self, system_prompt: str, text: str) -> list[dict[str, str]]:
        """The chat messages of a prompt, as apply_chat_template takes them."""
        return _messages(system_prompt, text, self.system_in_user_turn)


def _messages(system_prompt: str, text: str, system_in_user_turn: bool) -> list[dict[str, str]]:
    if system_in_user_turn:
        return [{"role": "user", "content": f"{system_prompt}\n\n{text}"}]
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": text}]


def _takes_system_role(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> bool:
    """Whether the template shows a system message; some refuse the role, some leave it out without a word."""
    try:
        rendered = tokenizer.apply_chat_template(_messages(system_prompt, _TEXT_MARK, False), tokenize=False)
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
    specials = _control_tokens(tokenizer).search(after)
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
        self._control = _control_tokens(tokenizer)
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
        # An unknown token has the id of <unk>, or None.
        if prompt_format.stop_token not in tokenizer.get_vocab():
            raise InputError(
                f"the stop token {prompt_format.stop_token!r} is no token of {tokenizer.name_or_path}; the prompt "
                "format belongs to another tokenizer."
            )
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
        plain = [text for text in texts if self.is_plain(text)]
        encoded = iter(self._middle_ids(plain))
        prompts, cut = [], 0
        for text in texts:
            middle = next(encoded) if self.is_plain(text) else self._spelled_out_ids(text)
            prompt = self._around(middle)
            if len(prompt) > self.max_prompt_length:
                prompt, cut = self._cut(text), cut + 1
            prompts.append(prompt)
        return prompts, cut

    def is_plain(self, text: str) -> bool:
        """Whether a text spells out no control token."""
        return not self._control.search(text)

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
        pieces[0] = self._before_text + pieces[0]
        pieces[-1] += self._after_text  # the same piece, if there is only one
        return [token for piece in pieces for token in self._ids(piece)]

    def _cut(self, text: str) -> list[int]:
        """The prompt of as many of the text's first tokens as fit."""
        ends = [0, *(end for _, end in self._offsets(text)[: self._room_for_text])]
        # How many fit is searched for: where the text meets the template, and where control tokens are taken apart,
        # there are more tokens than the text has by itself.
        count = bisect.bisect_right(
            range(1, len(ends)), self.max_prompt_length, key=lambda n: len(self._up_to(text, ends[n]))
        )
        return self._up_to(text, ends[count])

    def _up_to(self, text: str, end: int) -> list[int]:
        return self._around(self._spelled_out_ids(text[:end]))

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


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Finds added tokens in a text; runs of spaces or line ends, which some tokenizers add, control nothing."""
    tokens = map(str, tokenizer.added_tokens_decoder.values())
    return re.compile(_any_of(token for token in tokens if token.strip()))


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
    def row_tokens(self) -> dict[str, int]:
        """How many tokens the shortest row has, the middle one, one longer than 95 % of the others, the longest."""
        lengths = sorted(len(example["input_ids"]) for example in self.examples)
        places = {"shortest": 0.0, "median": 0.5, "95_percent": 0.95, "longest": 1.0}
        return {name: lengths[round(place * (len(lengths) - 1))] for name, place in places.items()}

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
