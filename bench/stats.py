"""Medians, the operation count of a step, and the table: plain numbers, no model."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def spread(values: Sequence[float]) -> dict[str, float]:
    """Compute the median and the quartiles (the middle half lies between them).

    >>> spread([4.0, 1.0, 2.0, 3.0, 9.0])
    {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'n': 5}
    """
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "n": 1}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Compute the spread of the ratios of pairs; a slowdown that hits both members of a pair cancels.

    >>> ratios([6.0, 9.0, 40.0], [2.0, 3.0, 10.0])
    {'median': 3.0, 'q1': 3.0, 'q3': 3.5, 'n': 3}
    """
    return spread([first / second for first, second in zip(above, below, strict=True)])


@dataclass
class ModelShape:
    """The sizes of a Llama-like model that determine its operation count."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_width: int
    vocabulary: int


def step_operations(
    shape: ModelShape, own_lengths: Sequence[int], prefix: int, supervised: int, rank: int
) -> dict[str, int]:
    """Count the multiplications and additions of a training step on a packed batch, adapter on k_proj and v_proj.

    A product of (T, in) and (in, out) is 2 * T * in * out. T is the number of tokens of the packed batch (`prefix`,
    and `own_lengths` of the rows), P that of weights in the decoder's linear layers, K that of supervised tokens:

        linear     forward 2 P T; backward 2 P T for the gradient of the inputs. The weights are frozen and need no
                   gradient; neither do the inputs of the first layer's q, k and v, which are embeddings. In the last
                   layer, what follows attention is computed for the K supervised tokens only
        attention  for a query and a key that it sees, 2 * heads * head_width for the score and as much for the values;
                   backward twice that. Counts only visible pairs: causal, and no row sees another
        head       2 K hidden vocabulary forward, as much backward; only the supervised tokens have logits
        adapter    for each layer's k and v, 2 T rank (in + out) forward; backward as much for the weights, and again
                   for the input, except in the first layer

    DoRA's norms, normalisation, rotary embedding, softmax and optimizer are work too but not counted, so the share of
    the machine's rate computed from this count is a lower bound. Wasted work (scores that the mask hides, padding
    inside attention) is not counted either.
    """
    tokens = prefix + sum(own_lengths)
    query_width, key_width = shape.heads * shape.head_width, shape.key_value_heads * shape.head_width
    qkv = shape.hidden * (query_width + 2 * key_width)
    last = query_width * shape.hidden + 3 * shape.hidden * shape.intermediate  # behind attention
    weights = shape.layers * (qkv + last)
    pairs = prefix * (prefix + 1) // 2 + sum(own * prefix + own * (own + 1) // 2 for own in own_lengths)
    adapters = 2 * tokens * rank * 2 * (shape.hidden + key_width)  # k and v of one layer, one way
    return {
        "linear": 2 * tokens * weights + 2 * tokens * (weights - qkv) - 2 * 2 * (tokens - supervised) * last,
        "attention": shape.layers * 3 * 4 * query_width * pairs,
        "head": 2 * 2 * supervised * shape.hidden * shape.vocabulary,
        "adapter": adapters * (3 * shape.layers - 1),
    }


def format_spread(found: dict[str, float], unit: str = "") -> str:
    """Format median and quartiles as one cell.

    >>> format_spread({"median": 3.0, "q1": 2.0, "q3": 40.04, "n": 5}, "s")
    '3.00 s [2.00, 40.0]'
    """
    unit = f" {unit}" if unit else ""
    return f"{_short(found['median'])}{unit} [{_short(found['q1'])}, {_short(found['q3'])}]"


def _short(value: float) -> str:
    """Format a number with three digits: 0.123, 1.23, 12.3, 1,230."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.{1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3}f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table, padded so that it is also readable as plain text.

    >>> print(format_table(["what", "ours"], [["step", "1.5 s"]]))
    | what | ours  |
    |------|-------|
    | step | 1.5 s |
    """
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
