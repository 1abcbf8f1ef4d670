"""Training batches in two layouts that give the same loss: examples packed after one prefix, or padded rows.

Every example starts with the same system prompt. In a causal model, the states of these tokens do not depend on what
follows, so they can be computed once per batch instead of once per row. The stop token at the end of an example is
predicted, but nothing is predicted from it, so it is left out of the input:

    padded         <system prompt> great day positive <stop>
                   <pad> <system prompt> rain negative <stop>

    shared prefix  <system prompt> great day positive | rain negative
                   └── prefix ──┘ └─── row 0 ──────┘   └── row 1 ──┘

This is not the packing of TRL and FlashAttention, which concatenates whole examples, each with its own prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch

from tweetdora.prompts import IGNORE_INDEX

FILLER_ID = -1  # the example_id of an example that carries no loss (batches.py)


class PackedCollator:
    """Pack all tokens into one row: the shared prefix, then the rest of each row except its last token.

    Rows 5 6 1 8 2 (id 4) and 5 6 7 3 9 2 (id 7), each with loss on its last two tokens, prefix 5 6:

        input_ids       [[5, 6, 1, 8, 7, 3, 9]]       (1, T)
        position_ids    [[0, 1, 2, 3, 2, 3, 4]]       (1, T), each row continues after the prefix
        attention_mask  [[[[1]]]]                     a placeholder, see below
        logits_to_keep  [2, 3, 5, 6]                  (K,), the tokens whose logits predict a supervised token
        labels          [8, 2, 9, 2]                  (K,)
        example_ids         [4, 7]
        packing         prefix_length 2, row_count 2
                        to_padded   [0, 1, 0, 2, 3, 4]   (N * L,), own tokens of the N rows, padded to length L
                        is_padding  [0, 0, 1, 0, 0, 0]   (N * L,)
                        to_packed   [0, 1, 3, 4, 5]      (T - 2,), the reverse
                        kept        as logits_to_keep, for the last layer (block.py)

    (`to_padded` counts from the end of the prefix. A padding position repeats token 0, and nothing attends to it.)
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        prefix = shared_prefix_length(examples)
        # Nothing is predicted from the last token, so it need not be computed.
        batch, starts = pack([example["input_ids"][:-1] for example in examples], prefix)
        keep, labels = [], []
        for example, start in zip(examples, starts, strict=True):
            for offset, label in enumerate(example["labels"][prefix:]):
                if label != IGNORE_INDEX:
                    # The token before predicts it. Per token, the head costs as much as several layers (eight in
                    # SmolLM2-135M: 49,152 x 576 weights), so it is computed only where there is loss.
                    keep.append(start + offset - 1)
                    labels.append(IGNORE_INDEX if example["example_id"] == FILLER_ID else label)
        batch["packing"]["kept"] = torch.tensor(keep)
        return batch | {
            "logits_to_keep": torch.tensor(keep),
            "labels": torch.tensor(labels),
            "example_ids": torch.tensor([example["example_id"] for example in examples]),
        }


def pack(rows: Sequence[list[int]], prefix: int) -> tuple[dict[str, Any], list[int]]:
    """Build a model's inputs from rows of token ids that all start with the same `prefix` tokens.

    Returns input_ids, position_ids, attention_mask and packing, as PackedCollator describes them, and the place in the
    packed row where each row's own tokens start.
    """
    own_lengths = [len(row) - prefix for row in rows]
    longest = max(own_lengths)
    input_ids, positions = list(rows[0][:prefix]), list(range(prefix))
    starts: list[int] = []
    to_padded: list[int] = []
    is_padding: list[bool] = []
    to_packed: list[int] = []
    for number, (row, length) in enumerate(zip(rows, own_lengths, strict=True)):
        start = len(input_ids)
        starts.append(start)
        input_ids += row[prefix:]
        # A row continues after the prefix, not after the previous row: it is computed as if it were alone.
        positions += range(prefix, prefix + length)
        # Index lists for both directions, built once per batch. Every layer regroups its states with them, and a
        # gather is cheaper than padding and cutting row by row, both forward and backward.
        to_padded += [*range(start - prefix, start - prefix + length), *[0] * (longest - length)]
        is_padding += [False] * length + [True] * (longest - length)
        to_packed += range(number * longest, number * longest + length)
    batch = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([positions]),
        # Given a mask with four dimensions, transformers builds no T x T mask; nothing reads this one.
        "attention_mask": torch.ones(1, 1, 1, 1),
        "packing": {
            "prefix_length": prefix,
            "row_count": len(rows),
            "to_padded": torch.tensor(to_padded),
            "is_padding": torch.tensor(is_padding),
            "to_packed": torch.tensor(to_packed),
        },
    }
    return batch, starts


def prefix_length(prompts: Sequence[list[int]]) -> int:
    """Number of tokens that all prompts share at their start, with at least one token left for each."""
    limit = min(map(len, prompts)) - 1
    return next(
        (place for place in range(limit) if any(prompt[place] != prompts[0][place] for prompt in prompts)), limit
    )


def shared_prefix_length(examples: Sequence[dict[str, Any]]) -> int:
    """Number of tokens that all rows share at their start.

    The token before a row's first supervised token stays in the row, because its logits belong to that row.
    """
    first = examples[0]["input_ids"]
    # Found per batch, not read from the template: if all texts of a batch start alike, that part is shared too.
    limit = min(_first_supervised(example) - 1 for example in examples)
    for position in range(limit):
        if any(example["input_ids"][position] != first[position] for example in examples):
            return position
    return limit


def _first_supervised(example: dict[str, Any]) -> int:
    return next(position for position, label in enumerate(example["labels"]) if label != IGNORE_INDEX)


class PaddedCollator:
    """Pad rows on the left, so that the supervised tokens of all rows are in the same last columns.

    Rows 5 6 8 2 (id 4) and 5 6 7 9 2 (id 7), each with loss on its last two tokens, pad id 0:

        input_ids       [[0, 5, 6, 8, 2], [5, 6, 7, 9, 2]]      (B, T)
        attention_mask  [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]      (B, T)
        position_ids    [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]      (B, T)
        logits_to_keep  [2, 3]                                  (K,), the columns before the supervised ones
        labels          [[8, 2], [9, 2]]                        (B, K), -100 where a shorter completion has no loss
        example_ids         [4, 7]
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        length = max(len(example["input_ids"]) for example in examples)
        # Left padding aligns the completions in the last columns, so that one slice of logits serves all rows.
        supervised = max(len(example["labels"]) - _first_supervised(example) for example in examples)
        padding = [length - len(example["input_ids"]) for example in examples]
        rows = list(zip(examples, padding, strict=True))
        mask = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding])
        return {
            "input_ids": torch.tensor([[self.pad_token_id] * pad + row["input_ids"] for row, pad in rows]),
            "attention_mask": mask,
            # Counted from the row's first token; transformers would count the padding too.
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            "logits_to_keep": torch.arange(length - supervised - 1, length - 1),
            "labels": torch.tensor(
                [
                    [IGNORE_INDEX] * supervised if row["example_id"] == FILLER_ID else row["labels"][-supervised:]
                    for row, _ in rows
                ]
            ),
            "example_ids": torch.tensor([row["example_id"] for row, _ in rows]),
        }


def token_count(batch: dict[str, Any]) -> int | torch.Tensor:
    """Number of tokens in a batch of either layout, without padding."""
    return batch["input_ids"].numel() if "packing" in batch else batch["attention_mask"].sum()
