"""Likelihoods of label words: against a model asked token by token, on the CPU in float32."""

import pytest
import torch

from tweetdora.attention import ATTENTION, is_packable
from tweetdora.errors import ResourceError
from tweetdora.generation import generate_packed
from tweetdora.prompts import PromptTokenizer
from tweetdora.scoring import CompletionTree, choose_labels, make_tree, score_all, score_packed, score_padded

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20], [5, 6, 30, 31, 32], [5, 6, 40]]
COMPLETIONS = {
    "one token": [[60, 4], [61, 4], [62, 4]],
    "shared beginnings": [[60, 4], [61, 62, 4], [61, 63, 64, 4], [61, 63, 65, 66, 4]],
    "one inside another": [[60, 4], [60, 61, 4]],
    "the stop token alone": [[4], [60, 4]],
}


def log_likelihood(model, prompt: list[int], completion: list[int]) -> float:
    """The plain way: the whole text through the model, alone, and the log-probability of each token picked out."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(logits[place, token].item() for place, token in zip(places, completion, strict=True))


# The tree


def test_the_tree_of_the_docstring():
    assert make_tree([[8, 2], [9, 5, 2], [9, 6, 2]]) == CompletionTree(
        tokens=[8, 9, 5, 6],
        parents=[-1, -1, 1, 1],
        paths=[[(-1, 8), (0, 2)], [(-1, 9), (1, 5), (2, 2)], [(-1, 9), (1, 6), (3, 2)]],
    )


def test_a_token_sees_its_ancestors_and_itself():
    tree = make_tree([[8, 2], [9, 5, 7, 2], [9, 6, 2]])
    assert (tree.tokens, tree.depths) == ([8, 9, 5, 7, 6], [1, 1, 2, 3, 2])
    assert tree.ancestors().int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]


# The likelihoods


@pytest.mark.parametrize("score", [score_packed, score_padded])
@pytest.mark.parametrize("completions", COMPLETIONS.values(), ids=COMPLETIONS)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 2}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
    ],
    ids=["llama", "qwen2", "window 4", "window 2", "no shared heads", "one key head"],
)
def test_the_likelihoods_are_those_of_the_model_asked_alone(make_model, kind, settings, completions, score):
    model = make_model(kind, initializer_range=0.4, **settings)
    expected = [[log_likelihood(model, prompt, completion) for completion in completions] for prompt in PROMPTS]
    if score is score_packed:
        assert is_packable(model)
        model.set_attn_implementation(ATTENTION)
    sums, firsts = score(model, PROMPTS, completions)
    torch.testing.assert_close(sums, torch.tensor(expected), atol=2e-5, rtol=1e-5)
    first = [[log_likelihood(model, prompt, completion[:1]) for completion in completions] for prompt in PROMPTS]
    torch.testing.assert_close(firsts, torch.tensor(first), atol=2e-5, rtol=1e-5)


@pytest.fixture
def packed_model(make_model):
    model = make_model(initializer_range=0.4)
    model.set_attn_implementation(ATTENTION)
    return model


TEXTS = ["What a good day", "Such a bad trip", "The plain news", "x", "Today is a good trip, a good trip"]


@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_the_order_of_the_texts_is_kept_whatever_the_batches(packed_model, prompt_tokenizer, batch_size):
    scores = score_all(packed_model, prompt_tokenizer, TEXTS, batch_size=batch_size)
    prompts, _ = prompt_tokenizer.prompt_ids(TEXTS)
    expected = [
        [log_likelihood(packed_model, prompt, ids) for ids in prompt_tokenizer.completion_ids] for prompt in prompts
    ]
    torch.testing.assert_close(scores.log_likelihoods, torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert scores.labels.tolist() == torch.tensor(expected).argmax(-1).tolist()
    torch.testing.assert_close(scores.probabilities.sum(-1), torch.ones(len(TEXTS), dtype=torch.float64))
    assert scores.truncated == 0


def test_texts_that_do_not_fit_are_counted_and_progress_is_told(packed_model, prompt_tokenizer):
    short = PromptTokenizer(prompt_tokenizer.tokenizer, prompt_tokenizer.format, prompt_tokenizer.max_prompt_length)
    done = []
    scores = score_all(packed_model, short, ["a day " * 500, *TEXTS], batch_size=4, on_progress=done.append)
    assert (scores.truncated, done) == (1, [4, 2])


def test_likelihoods_that_are_no_numbers_are_refused(packed_model, prompt_tokenizer):
    """They would all be the first label."""
    with torch.no_grad():
        packed_model.lm_head.weight[5] = float("inf")
    with pytest.raises(ResourceError, match=r"are not numbers \(nan\) in torch.float32; the model is broken"):
        score_all(packed_model, prompt_tokenizer, TEXTS, batch_size=2)


def test_the_most_likely_word_is_what_greedy_generation_writes_where_it_writes_one(packed_model, prompt_tokenizer):
    """The completions are made from what the model writes, so that it does write one of them."""
    prompts, _ = prompt_tokenizer.prompt_ids(TEXTS)
    written = generate_packed(packed_model, prompts, [], max_new_tokens=2)
    completions = [list(ids) for ids in dict.fromkeys(map(tuple, written))]
    sums, firsts = score_packed(packed_model, prompts, completions)
    chosen = choose_labels(sums, firsts, [completion[0] for completion in completions])
    found = [completions[number] for number in chosen.tolist()]
    equal = sum(a == b for a, b in zip(found, written, strict=True))
    assert len(completions) > 1 and equal == len(written)


# Ties


@pytest.mark.parametrize(
    ("sums", "firsts", "expected"),
    [
        ([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], 0),
        ([-1.00, -1.01, -3.0], [-1.0, -1.0, -3.0], 1),  # alike at first: the smaller id
        ([-1.01, -1.00, -3.0], [-1.0, -1.0, -3.0], 1),
        ([-1.00, -1.01, -3.0], [-1.0, -1.001, -3.0], 0),  # not alike
        ([-1.00, -1.50, -3.0], [-1.0, -1.0, -3.0], 0),  # what follows tells them apart
        ([-1.00, -1.00, -1.0], [-1.0, -1.0, -1.0], 2),
    ],
)
def test_where_rounding_makes_two_alike_greedys_choice_counts(sums, firsts, expected):
    """First tokens 30, 20 and 10: greedy takes the smallest id of those that are equally likely."""
    assert choose_labels(torch.tensor([sums]), torch.tensor([firsts]), [30, 20, 10]).tolist() == [expected]


def test_of_words_that_begin_alike_the_likelier_is_taken():
    sums, firsts = torch.tensor([[-1.05, -1.0, -1.02]]), torch.tensor([[-1.0, -1.0, -1.0]])
    assert choose_labels(sums, firsts, [20, 20, 30]).tolist() == [1]
