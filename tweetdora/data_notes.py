"""Notes on the data that a reader of the scores should see, for the plan, the records and the card."""

from collections import Counter
from collections.abc import Iterator

from tweetdora.data import Examples, label_counts
from tweetdora.records import DataNote

_FEW_TEST_EXAMPLES = 100
_CURE = "--validation_share and --test_share draw a split at random"


def notes_on_splits(splits: dict[str, Examples], label_words: list[str]) -> list[DataNote]:
    """Return notes on each split and on texts shared by two splits; `splits` in the order train, validation, test.

    >>> notes_on_splits({"train": train, "test": test}, ["bad", "good"])
    [DataNote(split='test', text='24 of 24 texts are in the train split too')]
    """
    notes = []
    for place, (split, examples) in enumerate(splits.items()):
        notes += [DataNote(split, text) for text in _notes_on_one(split, examples, label_words)]
        for other in [*splits][:place]:
            if (text := _note_on_two(examples, other, splits[other])) is not None:
                notes.append(DataNote(split, text))
    return notes


def _notes_on_one(split: str, examples: Examples, label_words: list[str]) -> Iterator[str]:
    counts = label_counts(examples, label_words)
    missing = [word for word, count in counts.items() if not count]
    if len(missing) == len(counts) - 1:
        (only,) = set(counts) - set(missing)
        yield f"all {len(examples):,} examples have the label {only}; {_CURE}"
    elif missing:
        yield f"no example has the label {' or '.join(missing)}; {_CURE}"
    elif examples.is_sorted and examples.is_part:
        yield f"the rows are sorted by label, so a part of them in that order is not a representative sample; {_CURE}"
    if split == "test" and len(examples) < _FEW_TEST_EXAMPLES:
        yield f"only {len(examples)} examples, so the intervals are wide"
    if examples.skipped:
        reasons = ", ".join(f"{count:,} with {reason}" for reason, count in examples.skipped.items())
        yield f"{sum(examples.skipped.values()):,} rows were skipped: {reasons}"


def _note_on_two(examples: Examples, other: str, before: Examples) -> str | None:
    if (examples.source, examples.labels, examples.texts) == (before.source, before.labels, before.texts):
        return f"these are the same examples as in the {other} split"
    own = Counter(examples.texts)  # usually the smaller of the two splits
    shared = sum(own[text] for text in {text for text in before.texts if text in own})
    return f"{shared:,} of {len(examples):,} texts are in the {other} split too" if shared else None
