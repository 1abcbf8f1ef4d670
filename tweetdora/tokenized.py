"""Training examples as token ids, in Arrow arrays; many of them in a file in the cache, which is memory-mapped.

The file's name is a hash of everything that determines its content, so a resumed run, another run on the same data,
and the other processes of a machine read it instead of tokenising again.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import datasets
import numpy as np
import pyarrow
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from tweetdora.data import Examples, data_record, first_text_per_label
from tweetdora.errors import InputError
from tweetdora.prompts import IGNORE_INDEX, PromptTokenizer
from tweetdora.records import TrainDataRecord
from tweetdora.texts import BLOCK

log = logging.getLogger(__name__)
CACHE_FROM = 20_000  # examples; fewer are tokenised in a second or two
# Texts whose token ids tell tokenizers apart: case, spaces, letters, numbers, emoji, and one that is truncated.
_PROBES = (
    "What a GOOD day, isn't it?",
    " two  spaces\n\tand a tab ",
    "na\u00efve \u00c5 \ufb01 \u4f60\u597d",
    "1234567 :-) \U0001f31e",
    "so " * 5000,
)
_DAY = 24 * 3600.0  # seconds
_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("supervised", pyarrow.int32()),  # number of last tokens that carry loss
        ("example_id", pyarrow.int64()),
        ("truncated", pyarrow.bool_()),
    ]
)


class Features(Sequence[dict[str, Any]]):
    """Tokenised examples: a dict of `input_ids`, `labels` and `example_id` for each, made when it is read."""

    def __init__(self, batches: Sequence[pyarrow.RecordBatch]) -> None:
        columns = [{name: batch.column(name) for name in _SCHEMA.names} for batch in batches]
        self._tokens = [found["input_ids"].values.to_numpy() for found in columns]
        self._ends = [found["input_ids"].offsets.to_numpy() for found in columns]
        self._starts = np.cumsum([0, *(len(batch) for batch in batches)])  # first row of each batch
        self.supervised = _joined([found["supervised"].to_numpy() for found in columns], np.int32)  # (N,)
        self.example_ids = _joined([found["example_id"].to_numpy() for found in columns], np.int64)  # (N,)
        self.lengths = _joined([np.diff(ends) for ends in self._ends], np.int32)  # tokens, (N,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[batch])
        start, end = self._ends[batch][place : place + 2]
        ids = self._tokens[batch][start:end].tolist()
        supervised = int(self.supervised[row])
        return {
            "input_ids": ids,
            "labels": [IGNORE_INDEX] * (len(ids) - supervised) + ids[len(ids) - supervised :],
            "example_id": int(self.example_ids[row]),
        }


def _joined(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class TokenizedExamples:
    """Examples ready for the trainer; `from_cache`: they were not tokenised now."""

    features: Features
    truncated: int  # texts that did not fit
    largest_id: int  # of all tokens
    from_cache: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens in all examples."""
        return int(self.features.lengths.sum(dtype=np.int64))

    @property
    def sequence_lengths(self) -> dict[str, int]:
        """Number of tokens in the shortest, the median, the 95th-percentile and the longest example."""
        lengths = np.sort(self.features.lengths)
        places = {"shortest": 0.0, "median": 0.5, "95_percent": 0.95, "longest": 1.0}
        return {name: int(lengths[round(place * (len(lengths) - 1))]) for name, place in places.items()}

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens that carry loss in all examples."""
        return int(self.features.supervised.sum(dtype=np.int64))


def train_data_record(examples: Examples, tokenized: TokenizedExamples, label_words: list[str]) -> TrainDataRecord:
    """The record of the training examples."""
    return TrainDataRecord(
        **vars(data_record(examples, label_words)),
        tokens=tokenized.tokens,
        supervised_tokens=tokenized.supervised_tokens,
        sequence_lengths=tokenized.sequence_lengths,
        truncated=tokenized.truncated,
        first_texts=first_text_per_label(examples, label_words),
    )


def tokenize_examples(examples: Examples, prompt_tokenizer: PromptTokenizer) -> TokenizedExamples:
    """Token ids and labels of every example; those of a large set are kept in the cache.

    With a prompt of ids 5 6 7 and a completion of ids 8 2 (2 the stop token):

        input_ids  [5, 6, 7, 8, 2]
        labels     [-100, -100, -100, 8, 2]

    Raises:
        InputError: an example does not end in the supervised stop token, or starts with more than one BOS token.
    """
    key = _key(examples, prompt_tokenizer) if len(examples) >= CACHE_FROM else None
    if key is not None:
        path = os.path.join(datasets.config.HF_DATASETS_CACHE, "tokenized", f"{key}.arrow")
        cached = _read(path, len(examples))
        if cached is not None:
            return _from_batches(*cached, from_cache=True)
        problem = _write(path, _batches(examples, prompt_tokenizer))
        written = _read(path, len(examples))
        if written is not None:
            return _from_batches(*written)
        log.info(
            "note: %s tokenised examples stay in memory and will be tokenised again on resume: %s cannot be written "
            "and mapped (%s). Set HF_DATASETS_CACHE to another folder to keep them.",
            f"{len(examples):,}",
            os.path.dirname(path),
            problem or "it could not be read again",
        )
    batches = list(_batches(examples, prompt_tokenizer))
    return _from_batches(batches, max(map(_largest_id, batches)))


def _from_batches(batches: list[pyarrow.RecordBatch], largest_id: int, from_cache: bool = False) -> TokenizedExamples:
    truncated = sum(batch.column("truncated").true_count for batch in batches)
    return TokenizedExamples(Features(batches), truncated, largest_id, from_cache)


def _largest_id(batch: pyarrow.RecordBatch) -> int:
    return int(batch.column("input_ids").values.to_numpy().max())


def _batches(examples: Examples, prompt_tokenizer: PromptTokenizer) -> Iterator[pyarrow.RecordBatch]:
    """The tokenised examples in blocks; the tokenizer's own threads share the texts of a block."""
    for start in range(0, len(examples), BLOCK):
        rows = range(start, min(start + BLOCK, len(examples)))
        prompts, truncated = prompt_tokenizer.prompts(examples.texts[start : start + BLOCK])
        completions = [prompt_tokenizer.completion_ids[examples.labels[row]] for row in rows]
        ids = [examples.example_ids[row] for row in rows]
        features = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        for example_id, feature in zip(ids, features, strict=True):
            check_example(example_id, feature, prompt_tokenizer)
        yield record_batch(features, list(map(len, completions)), ids, truncated)


def record_batch(
    input_ids: list[list[int]], supervised: list[int], example_ids: list[int], truncated: list[bool]
) -> pyarrow.RecordBatch:
    """A block of tokenised examples; `supervised` is the number of last tokens that carry loss."""
    columns = (input_ids, supervised, example_ids, truncated)
    arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, _SCHEMA.types, strict=True)]
    return pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def check_example(example_id: int, input_ids: list[int], prompt_tokenizer: PromptTokenizer) -> None:
    """Refuse an example whose last token is not the stop token, or that starts with two BOS tokens.

    Without a supervised stop token, the model would learn to continue after the answer. A second BOS would not be
    there in generation.
    """
    bos = prompt_tokenizer.tokenizer.bos_token_id
    if input_ids[-1] != prompt_tokenizer.stop_token_id:
        raise InputError(
            f"example {example_id}: the last supervised token is {input_ids[-1]}; expected the stop token "
            f"{prompt_tokenizer.format.stop_token!r} ({prompt_tokenizer.stop_token_id}). The chat template does not "
            "fit the tokenizer."
        )
    if bos is not None and input_ids[:2] == [bos, bos]:
        raise InputError(
            f"example {example_id} starts with two BOS tokens ({prompt_tokenizer.tokenizer.bos_token!r}); expected at "
            "most one. The chat template and the tokenizer both add one."
        )


def show_example(feature: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """One example as text, with each supervised token between 【 and 】."""
    ids, labels = feature["input_ids"], feature["labels"]
    first = next(index for index, label in enumerate(labels) if label != IGNORE_INDEX)
    supervised = "".join(f"【{tokenizer.decode([token])}】" for token in ids[first:])
    return f"{tokenizer.decode(ids[:first])}{supervised}"


# Cache


def _key(examples: Examples, prompt_tokenizer: PromptTokenizer) -> str | None:
    """Hash of everything that determines the token ids; None for a tokenizer that cannot be written as text."""
    try:
        written = cast(Any, prompt_tokenizer.tokenizer).backend_tokenizer.to_str()
    except Exception:  # no backend, or one with custom parts, for which tokenizers raises a plain Exception
        return None
    content = {
        "tokenizers": tokenizers.__version__,
        "transformers": transformers.__version__,
        "tokenizer": hashlib.sha256(written.encode()).hexdigest(),
        "max_prompt_length": prompt_tokenizer.max_prompt_length,
        "completions": prompt_tokenizer.completion_ids,
        # For the prompt around a text, and all that is not in the tokenizer's text: its class and settings, our code.
        "probes": prompt_tokenizer.prompts([*_PROBES, *prompt_tokenizer.tokenizer.all_special_tokens]),
        "examples": examples.sha256,
        "example_ids": hashlib.sha256(np.asarray(examples.example_ids, np.int64).tobytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(path: str, count: int) -> tuple[list[pyarrow.RecordBatch], int] | None:
    """The batches of a file, memory-mapped, and the largest token id.

    The largest id is kept beside each batch, because finding it again would read the whole file into memory. None if
    there is no such file, or it is incomplete.
    """
    try:
        with pyarrow.ipc.open_file(pyarrow.memory_map(path)) as reader:
            found = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
        batches, largest = [batch for batch, _ in found], max(int(kept["largest_id"]) for _, kept in found)
    except (OSError, ValueError, TypeError, KeyError):  # ArrowInvalid is a ValueError
        return None
    return (batches, largest) if sum(map(len, batches)) == count and reader.schema == _SCHEMA else None


def _write(path: str, batches: Iterator[pyarrow.RecordBatch]) -> str | None:
    """Write a file of the cache at once: another process sees none of it, or all. Return what went wrong, or None."""
    folder, part = os.path.dirname(path), None
    try:
        os.makedirs(folder, exist_ok=True)
        _remove_old_parts(folder)
        number, part = tempfile.mkstemp(suffix=".part", dir=folder)  # other machines may write here too
        with os.fdopen(number, "wb") as sink:
            with pyarrow.ipc.new_file(sink, _SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch, custom_metadata={"largest_id": str(_largest_id(batch))})
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(part, path)
    except OSError as error:
        return str(error)
    finally:
        if part is not None and os.path.exists(part):
            os.remove(part)
    return None


def _remove_old_parts(folder: str) -> None:
    """Remove what killed processes have left; a file that grows is younger than a day."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError):  # another process was faster
            if name.endswith(".part") and time.time() - os.path.getmtime(path) > _DAY:
                os.remove(path)
