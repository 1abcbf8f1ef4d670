"""Token ids of prompts and completions in the base model's own chat template.

    head        <|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n
    text        Great day!
    tail        <|im_end|>\n<|im_start|>assistant\n
    completion  positive<|im_end|>

Head, text and tail form the prompt. Only the label word and the stop token after it carry loss.
"""

import bisect
import datetime
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from tweetdora.config import TaskConfig
from tweetdora.errors import InputError
from tweetdora.records import PromptFormat, chat_messages

# Variables that turn thinking off in some templates; others ignore them.
_WITHOUT_THOUGHT: dict[str, Any] = {"enable_thinking": False, "thinking": False}
_OPEN_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")
# Head and tail as in training, with the user's last text between them, followed by the answer if there is one.
_FROZEN = """{{%- set found = namespace(text="", answer=none) -%}}
{{%- for message in messages -%}}
{{%- set said = message["content"] -%}}
{{%- if said is not string -%}}{{%- set said = said | map(attribute="text") | join -%}}{{%- endif -%}}
{{%- if message["role"] == "user" -%}}{{%- set found.text = said -%}}{{%- set found.answer = none -%}}
{{%- elif message["role"] == "assistant" -%}}{{%- set found.answer = said -%}}{{%- endif -%}}
{{%- endfor -%}}
{{%- if {prefix} and found.text.startswith({prefix}) -%}}
{{%- set found.text = found.text.replace({prefix}, "", 1) -%}}{{%- endif -%}}
{{{{- {head} }}}}{{{{- found.text | trim }}}}{{{{- {tail} }}}}
{{%- if found.answer is not none -%}}{{{{- found.answer + {stop} }}}}{{%- endif -%}}"""
IGNORE_INDEX = -100  # ignored by torch.nn.functional.cross_entropy
_TEXT_MARK = "THE-TEXT-STANDS-HERE"


def read_prompt_format(
    tokenizer: PreTrainedTokenizerBase, task: TaskConfig, date: datetime.date | None = None
) -> PromptFormat:
    """Read the prompt format from the tokenizer's chat template as rendered on `date`, by default today.

    The model should not think. If the template opens a thought before an answer, or writes an empty one there, the
    prompt closes it.

    Raises:
        InputError: there is no chat template, it fails, or it changes the text.
    """
    template = _Template(tokenizer, task, date)
    system_in_user_turn = not template.takes_system_role()
    messages = chat_messages(task.system_prompt, _TEXT_MARK, system_in_user_turn)
    prompt = template.render(messages, True)
    if prompt.count(_TEXT_MARK) != 1:
        raise InputError(f"the chat template of {tokenizer.name_or_path} does not write the user's text exactly once.")
    answers = [_answer_in_template(template, messages, prompt, word) for word in task.label_words]
    openings = {opening for opening, _, _ in answers}
    if len(openings) > 1:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} starts answers in {len(openings)} ways "
            f"({', '.join(map(repr, sorted(openings)))}); expected one."
        )
    head, tail = prompt.split(_TEXT_MARK)
    completions = [completion for _, completion, _ in answers]
    return PromptFormat(head, tail + openings.pop(), completions, answers[-1][2], system_in_user_turn)


def writes_a_date(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> bool:
    """True if the chat template writes the current date into the prompt."""
    dates = (datetime.date(2001, 2, 3), datetime.date(2034, 10, 21))
    first, second = (read_prompt_format(tokenizer, task, date) for date in dates)
    return first != second


class _Template:
    """The chat template that the task names, with the task's variables, thinking turned off, on a given date."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, date: datetime.date | None = None
    ) -> None:
        self.tokenizer, self.task = tokenizer, task
        self.source = _choose_template(tokenizer, task)
        self.variables: dict[str, Any] = {**_WITHOUT_THOUGHT, **cast(dict, task.chat_template_kwargs or {})}
        if date is not None:
            self.source = _as_of(date, self.source)
        # Some templates of multimodal models accept text only as a list of parts, and drop a plain string.
        self.in_parts = _TEXT_MARK not in self._try(in_parts=False) and _TEXT_MARK in self._try(in_parts=True)

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """Render a chat with the template.

        Raises:
            InputError: the template fails.
        """
        try:
            return self._write(messages, add_generation_prompt, self.in_parts)
        except Exception as error:  # a template is a third-party program: it may fail in any way
            roles = ", ".join(message["role"] for message in messages)
            said = " ".join(str(error).split())[:200]
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path} fails for the roles {roles}: "
                f"{type(error).__name__}: {said}. Choose another chat model, or fix its template."
            ) from error

    def takes_system_role(self) -> bool:
        """True if the template shows a system message; some templates reject the role, some silently drop it."""
        try:
            rendered = self.render(chat_messages(self.task.system_prompt, _TEXT_MARK, False))
        except InputError:
            return False
        return self.task.system_prompt.strip() in rendered

    def _try(self, in_parts: bool) -> str:
        """Render a user's turn; empty if the template fails."""
        try:
            return self._write([{"role": "user", "content": _TEXT_MARK}], False, in_parts)
        except Exception:  # noqa: BLE001  (render reports it if the other form fails too)
            return ""

    def _write(self, messages: list[dict[str, str]], add_generation_prompt: bool, in_parts: bool) -> str:
        chat: Any = messages
        if in_parts:
            chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        written = self.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
            **self.variables,
        )
        return str(written)


def _choose_template(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> str:
    """The source of the template to use; if there are several, the one that --chat_template names.

    Raises:
        InputError: there is no template, or there are several and none was chosen.
    """
    templates, name = tokenizer.chat_template, task.chat_template
    if not templates:
        raise InputError(
            f"--model_name_or_path {tokenizer.name_or_path} has no chat template; "
            "choose an instruction-tuned (chat) model."
        )
    if isinstance(templates, str):
        if name not in (None, "default"):
            raise InputError(
                f"--chat_template {name}: {tokenizer.name_or_path} has only one chat template, without a name. Omit "
                "the flag."
            )
        return templates
    if (name or "default") not in templates:
        asked = f"--chat_template {name} is not among them" if name else "none of them is called default"
        raise InputError(
            f"{tokenizer.name_or_path} has the chat templates {', '.join(sorted(templates))}; {asked}. Name one with "
            "--chat_template."
        )
    return templates[name or "default"]


def use_template(tokenizer: PreTrainedTokenizerBase, task: TaskConfig) -> None:
    """Keep only the chosen template in the tokenizer: it is saved that way, and nobody has to name it again.

    Raises:
        InputError: there is no template, or there are several and none was chosen.
    """
    tokenizer.chat_template = _choose_template(tokenizer, task)


def _as_of(date: datetime.date, template: str) -> str:
    """The template with `date` in place of today's, by redefining strftime_now, which templates call for the date.

    apply_chat_template accepts no functions, so a macro is put in front, with the result for each date format used.
    """
    forms = {form for _, form in re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", template)}
    answers = json.dumps({form: date.strftime(form) for form in forms})
    return (
        f"{{%- set dates_as_of = {answers} -%}}{{%- macro strftime_now(form) -%}}{{{{- dates_as_of[form] -}}}}"
        f"{{%- endmacro -%}}{template}"
    )


def _answer_in_template(
    template: _Template, messages: list[dict[str, str]], prompt: str, word: str
) -> tuple[str, str, str]:
    """Split what the template writes after the prompt for the answer `word` into opening, completion and stop token.

    The opening is an empty thought, or the assistant's header if the template's generation prompt leaves it out.
    """
    tokenizer = template.tokenizer
    full = template.render([*messages, {"role": "assistant", "content": word}])
    thought = _OPEN_THOUGHT.search(prompt)
    if full.startswith(prompt):
        before, found, after = full[len(prompt) :].partition(word)
    else:  # finished answers lack something that the generation prompt opens, most likely a thought
        _, found, after = full[max(full.rfind(word), 0) :].partition(word)
        before = f"\n</{thought[1]}>\n\n" if thought else ""
    if thought and f"</{thought[1]}>" not in before:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} opens {thought[0].strip()} for an answer and never closes "
            "it; the label would be part of a thought. Choose a model that can answer without thinking."
        )
    specials = _control_tokens(tokenizer).search(after)
    stop_token = specials[0] if specials else tokenizer.eos_token
    if not found or not stop_token:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path} writes {before + found + after!r} for the answer "
            f"{word!r}; expected the word and then a stop token."
        )
    # Llama 2 writes a space between word and stop token.
    written = word + (after[: specials.start()] if specials else "")
    # White space belongs to the word: some tokenizers merge both into one token.
    return ("", before + written, stop_token) if not before.strip() else (before, written, stop_token)


def freeze_template(tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, task: TaskConfig) -> bool:
    """Replace the tokenizer's template by one that always writes this prompt, if its own does not; True if replaced.

    Its own does not if it writes a date, thinks by default, was given variables, accepts only content parts, or leaves
    out the assistant's header.
    """
    messages = prompt_format.messages(task.system_prompt, _TEXT_MARK)
    unnamed = replace(task, chat_template=None, chat_template_kwargs=None)  # as users of the published model call it
    template, own = _Template(tokenizer, unnamed), None
    template.variables = {}
    if not template.in_parts:
        with suppress(InputError):  # it may fail without its variables
            own = template.render(messages, True)
    if own == prompt_format.head + _TEXT_MARK + prompt_format.tail and not writes_a_date(tokenizer, unnamed):
        return False
    prefix = f"{task.system_prompt}\n\n" if prompt_format.system_in_user_turn else ""
    literals = {name: json.dumps(text) for name, text in (("prefix", prefix), ("stop", prompt_format.stop_token))}
    tokenizer.chat_template = _FROZEN.format(
        head=json.dumps(prompt_format.head), tail=json.dumps(prompt_format.tail), **literals
    )
    return True


class PromptTokenizer:
    """Tokenise prompts and completions, with the same code for training, evaluation and publishing.

    The ids are those of the rendered template tokenised as one text, with two exceptions. First, text between the
    template's own special tokens is data: a special token spelled out in a tweet is split into ordinary tokens.
    Second, the completion's ids are appended to the prompt's, so that the boundary between them is where generation
    starts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.format = prompt_format
        # Tokenizers split a text at added tokens before anything else, so parts can be tokenised up to or from one.
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
        self.stop_token_id = cast(int, tokenizer.convert_tokens_to_ids(prompt_format.stop_token))
        # The conversion above returns the id of <unk>, or None, for an unknown token.
        if prompt_format.stop_token not in tokenizer.get_vocab():
            raise InputError(
                f"the stop token {prompt_format.stop_token!r} is not a token of {tokenizer.name_or_path}; the prompt "
                "format belongs to another tokenizer."
            )
        self.completion_ids = [self._completion_ids(completion) for completion in prompt_format.completions]
        completion_length = max(map(len, self.completion_ids))
        self.max_prompt_length = max_length - completion_length
        around = len(self._around(self._spelled_out_ids("")))
        self._room_for_text = self.max_prompt_length - around
        if self._room_for_text < 1:
            raise InputError(
                f"--max_length {max_length} leaves no room for the text: the prompt around it has {around} tokens and "
                f"the longest answer has {completion_length}. Use a larger --max_length or a shorter --system_prompt."
            )

    def prompt_ids(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of each text's prompt, up to where the answer starts, and the number of truncated texts."""
        prompts, truncated = self.prompts(texts)
        return prompts, sum(truncated)

    def prompts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each text's prompt, up to where the answer starts, and whether the text was truncated."""
        plain = [text for text in texts if self.is_plain(text)]
        encoded = iter(self._middle_ids(plain))
        prompts, truncated = [], []
        for text in texts:
            middle = next(encoded) if self.is_plain(text) else self._spelled_out_ids(text)
            prompt = self._around(middle)
            truncated.append(len(prompt) > self.max_prompt_length)
            prompts.append(self._cut(text) if truncated[-1] else prompt)
        return prompts, truncated

    def is_plain(self, text: str) -> bool:
        """True if a text spells out no control token."""
        return not self._control.search(text)

    def _around(self, middle: list[int]) -> list[int]:
        return [*self.head_ids, *middle, *self.tail_ids]

    def _middle_ids(self, texts: Sequence[str]) -> list[list[int]]:
        framed = [self._before_text + text + self._after_text for text in texts]
        return self.tokenizer(framed, add_special_tokens=False)["input_ids"] if framed else []

    def _spelled_out_ids(self, text: str) -> list[int]:
        """Ids of a text that spells out control tokens; each one is split, so that it is no longer a token."""
        pieces, rest = [], text
        while found := self._control.search(rest):
            pieces.append(rest[: found.start() + 1])
            rest = rest[found.start() + 1 :]
        pieces = [*pieces, rest]
        pieces[0] = self._before_text + pieces[0]
        pieces[-1] += self._after_text  # the same piece if there is only one
        return [token for piece in pieces for token in self._ids(piece)]

    def _cut(self, text: str) -> list[int]:
        """The prompt with as many of the text's first tokens as fit."""
        ends = [0, *(end for _, end in self._offsets(text)[: self._room_for_text])]
        # Search for the number that fits: where the text meets the template, and where control tokens are split, there
        # are more tokens than in the text alone.
        count = bisect.bisect_right(
            range(1, len(ends)), self.max_prompt_length, key=lambda n: len(self._up_to(text, ends[n]))
        )
        return self._up_to(text, ends[count])

    def _up_to(self, text: str, end: int) -> list[int]:
        return self._around(self._spelled_out_ids(text[:end]))

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]

    def _completion_ids(self, completion: str) -> list[int]:
        """Ids of a completion and the stop token, tokenised after the tail if that does not change the tail's ids."""
        behind = self._ids(self.format.tail + completion)
        tail = self._ids(self.format.tail)
        apart = behind[len(tail) :] if behind[: len(tail)] == tail else self._ids(completion)
        return [*apart, self.stop_token_id]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern for added tokens; it skips runs of spaces or newlines, which some tokenizers add as tokens."""
    tokens = map(str, tokenizer.added_tokens_decoder.values())
    return re.compile(_any_of(token for token in tokens if token.strip()))


def _any_of(words: Iterable[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)"


def stop_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase, stop_token_id: int) -> list[int]:
    """Every id that ends generation: the template's stop token, the tokenizer's EOS and the generation config's EOS.

    A generation config often names another id than the one that the chat template writes (transformers issue 23530
    and many others). If generation waited only for that id, the answer would not end.
    """
    configured = model.generation_config.eos_token_id
    ids = {stop_token_id, tokenizer.eos_token_id}
    ids.update(configured if isinstance(configured, list) else [configured])
    return sorted(token for token in ids if token is not None)
