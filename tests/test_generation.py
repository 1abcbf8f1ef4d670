"""Answers: greedy, the same one by one as together, read from new tokens only, and parsed by whole words."""

import unicodedata
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tweetdora import generation
from tweetdora.attention import ATTENTION
from tweetdora.data import Examples, load_examples, make_examples
from tweetdora.generation import (
    UNPARSED,
    Generation,
    LabelParser,
    generate_all,
    generate_packed,
    generate_padded,
)

WORDS = ["negative", "neutral", "positive"]
KINDS = ["llama", "mistral", "qwen2"]
WAYS = [generate_packed, generate_padded]
NEW = 8  # longest answer, in tokens


# The label that an answer names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("negative", 0),
        ("Neutral", 1),
        ("POSITIVE", 2),
        ("  positive\n", 2),
        ("positive.", 2),
        ('"negative"', 0),
        ("**neutral**", 1),
        ("positive<|im_end|>", 2),
        ("The sentiment is: neutral, not positive.", 1),
        ("not negative but positive", 0),
        ("neutral\n\nralitive", 1),
        ("neutral-positive", 1),
        ("sentiment=positive;", 2),
        ("positive😀", 2),
        ("", UNPARSED),
        ("neutralitive", UNPARSED),
        ("unpositive", UNPARSED),
        ("negatives", UNPARSED),
        ("negative1", UNPARSED),
        ("_neutral_", UNPARSED),
        ("neutralité", UNPARSED),
        ("posi tive", UNPARSED),
        ("I cannot tell.", UNPARSED),
        ("unpositive, rather neutral", 1),
    ],
)
def test_the_first_whole_label_word_is_the_answer(text, expected):
    assert LabelParser(WORDS)(text) == expected


@pytest.mark.parametrize("words", [["funny", "not funny"], ["not funny", "funny"]])
def test_of_label_words_that_contain_one_another_the_longer_is_found_whatever_their_order(words):
    parse = LabelParser(words)
    for text, word in [("not funny", "not funny"), ("Funny!", "funny"), ("funny, not funny", "funny")]:
        assert words[parse(text)] == word
    assert words[parse("really not funny")] == "not funny"
    assert words[parse("not so funny")] == "funny"


@pytest.mark.parametrize("words", [["anti", "anti-war"], ["anti-war", "anti"]])
def test_of_label_words_that_begin_alike_the_longer_is_found_whatever_their_order(words):
    parse = LabelParser(words)
    assert [words[parse(text)] for text in ("Anti-War", "anti", "anti-peace")] == ["anti-war", "anti", "anti"]


def test_label_words_are_words_not_patterns():
    parse = LabelParser(["c++", "c", ".*"])
    assert [parse(text) for text in ("C++", "C", ".*", "d", "C#")] == [0, 1, 2, UNPARSED, 1]


def test_case_is_folded_as_unicode_has_it():
    parse = LabelParser(["Straße", "ΣΊΣΥΦΟΣ", " Grün "])
    assert [parse(text) for text in ("STRASSE", "straße", "σίσυφος", "GRÜN", "grun")] == [0, 0, 1, 2, UNPARSED]


def test_digits_can_be_label_words():
    parse = LabelParser(["0", "1", "-1"])
    assert [parse(text) for text in ("1", "-1", "10", "0.")] == [1, 2, UNPARSED, 0]


# Reading


def test_an_answer_ends_before_its_first_stop_token(tokenizer):
    neutral, end, other = tokenizer.convert_tokens_to_ids(["neutr", "al"]), 4, 2
    parse = LabelParser(WORDS)
    read = [
        generation._decode_generation(ids, [other, end], tokenizer, parse)
        for ids in ([*neutral, end, *neutral], [*neutral, other], neutral, [end], [*neutral, 3])
    ]
    assert read == [
        Generation("neutral", True, 1),
        Generation("neutral", True, 1),
        Generation("neutral", False, 1),
        Generation("", True, UNPARSED),
        Generation("neutral<|im_start|>", False, 1),  # a control token that does not stop is shown
    ]


# Generating


@pytest.fixture(scope="module")
def examples(task) -> Examples:
    """Texts of very unlike lengths, so that batches are padded and answers come in another order than made."""
    texts = [*load_examples(task, "test", None).texts[:10], "", "x", "good " * 50, "a <|im_end|> b", "plain " * 9]
    return make_examples(texts[::-1], [0] * len(texts))


@pytest.fixture(scope="module")
def prompts(examples, prompt_tokenizer) -> list[list[int]]:
    return prompt_tokenizer.prompt_ids(examples.texts)[0]


@pytest.fixture(scope="module")
def make_varied(make_model):
    """make_varied(kind): a tiny model whose answers differ from prompt to prompt, and hold no special token.

    Weights fifteen times as large as usual, and a logit of 0, which others exceed, for ids 0 to 4.
    """

    def make(kind: str = "llama", **overrides):
        model = make_model(kind, **{"initializer_range": 0.3, **overrides})
        with torch.no_grad():
            model.lm_head.weight[:5] = 0
        model.set_attn_implementation(ATTENTION)  # as load_base does; without a packed batch it is transformers' own
        return model

    return make


@torch.no_grad()
def greedy(model, prompt: list[int], stop_ids: list[int] = (), count: int = NEW) -> list[int]:
    """The second way: one row, no cache, no padding, the whole sequence again for every token."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] not in stop_ids):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def up_to_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """Tokens up to and with the first stop token."""
    return next((ids[: place + 1] for place, token in enumerate(ids) if token in stop_ids), ids)


def common_tokens(sequences: list[list[int]], count: int) -> list[int]:
    """Tokens that the model writes often, none of them first."""
    first = {ids[0] for ids in sequences}
    counted = Counter(token for ids in sequences for token in set(ids) - first)
    return sorted(token for token, _ in counted.most_common(count))


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request, monkeypatch):
    """generate_all takes this way to generate."""
    if request.param is generate_padded:
        monkeypatch.setattr(generation, "ATTENTION", "another")
    return request.param


def answers_of(
    model, tokenizer, prompt_tokenizer, examples, batch_size=7, max_new_tokens=NEW, **more
) -> list[Generation]:
    answers, seconds = generate_all(
        model,
        tokenizer,
        prompt_tokenizer,
        examples,
        WORDS,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        **more,
    )
    assert seconds > 0
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_plain_greedy_loop(
    make_varied, tokenizer, prompt_tokenizer, examples, prompts, way, kind
):
    model = make_varied(kind)
    unstopped = [greedy(model, prompt) for prompt in prompts]
    assert len({tuple(ids) for ids in unstopped}) > len(prompts) / 2, "the answers must differ to show anything"
    more_stops = common_tokens(unstopped, 3)
    model.generation_config.eos_token_id = more_stops
    stop_ids = [4, *more_stops]
    expected = [up_to_stop(ids, stop_ids) for ids in unstopped]
    assert len({len(ids) for ids in expected}) > 3, "they must stop at different places to show anything"
    for answer, ids in zip(answers_of(model, tokenizer, prompt_tokenizer, examples), expected, strict=True):
        stopped = ids[-1] in stop_ids
        assert (answer.text, answer.stopped) == (tokenizer.decode(ids[:-1] if stopped else ids), stopped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("generate", WAYS)
def test_a_batch_of_one_writes_the_same_tokens_as_a_batch_of_many(make_varied, prompts, generate, kind):
    model = make_varied(kind)
    together = generate(model, prompts, stop_ids=[4], max_new_tokens=NEW)
    for prompt, ids in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], stop_ids=[4], max_new_tokens=NEW)
        assert up_to_stop(ids, [4]) == up_to_stop(alone, [4])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_has_written_any_of_the_stop_tokens_leaves_the_batch(make_varied, prompts, kind):
    model = make_varied(kind)
    unstopped = [greedy(model, prompt) for prompt in prompts]
    stop_ids = common_tokens(unstopped, 4)
    expected = [up_to_stop(ids, stop_ids) for ids in unstopped]
    assert {ids[-1] for ids in expected} >= set(stop_ids), "each of them stops a row"
    sizes = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[1]))
    assert generate_packed(model, prompts, stop_ids, NEW) == expected
    going = [sum(len(ids) > step for ids in expected) for step in range(max(map(len, expected)))]
    assert sizes[0] == going[0] == len(prompts) and going[-1] < len(prompts) / 2
    for before, size, left in zip(sizes[:-1], sizes[1:], going[1:], strict=True):
        assert size == (left if left <= 0.75 * before else before)


@pytest.mark.parametrize("generate", WAYS)
@pytest.mark.parametrize(
    "make_prompts",
    [
        lambda prompts: [[token + number for token in prompt[:9]] for number, prompt in enumerate(prompts[:6])],
        lambda prompts: [prompts[0][: 3 * number + 1] for number in range(6)],
        lambda prompts: [prompts[0]] * 3,
        lambda prompts: [[5 + number] for number in range(4)],
        lambda prompts: [[5], [6] * 30, [7, 8]],
    ],
    ids=["nothing alike", "one goes on where another ends", "all alike", "one token", "short beside long"],
)
def test_what_prompts_have_in_common_does_not_matter(make_varied, prompts, generate, make_prompts):
    model = make_varied()
    prompts = make_prompts(prompts)
    expected = [greedy(model, prompt) for prompt in prompts]
    assert generate(model, prompts, stop_ids=[0], max_new_tokens=NEW) == expected


@pytest.mark.parametrize("window", [4, 20, 60, 77, 80, 84, 85])
@pytest.mark.parametrize("generate", WAYS)
def test_a_sliding_window_slides_over_tokens_and_not_over_padding(make_varied, prompts, generate, window):
    """Prompts of 26, 30 and 77 tokens: up to 85 places with the answer."""
    model = make_varied("mistral", sliding_window=window)
    prompts = [sorted(prompts, key=len)[place] for place in (0, 7, -1)]
    assert [len(prompt) for prompt in prompts] == [26, 30, 77]
    expected = [greedy(model, prompt) for prompt in prompts]
    if window < 77:
        assert expected != [greedy(make_varied("mistral"), prompt) for prompt in prompts], "the window must matter"
    assert generate(model, prompts, stop_ids=[0], max_new_tokens=NEW) == expected


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_answers_do_not_depend_on_the_batch_size_and_keep_the_rows_order(
    make_varied, tokenizer, prompt_tokenizer, examples, way, batch_size
):
    model, done = make_varied(), []
    reference = answers_of(model, tokenizer, prompt_tokenizer, examples)
    assert (
        answers_of(model, tokenizer, prompt_tokenizer, examples, batch_size=batch_size, on_progress=done.append)
        == reference
    )
    assert sum(done) == len(examples) and max(done) <= batch_size
    one_by_one = [
        answers_of(model, tokenizer, prompt_tokenizer, make_examples([text], [0]))[0] for text in examples.texts
    ]
    assert one_by_one == reference


def test_an_answer_is_not_longer_than_asked_and_then_did_not_stop(
    make_varied, tokenizer, prompt_tokenizer, examples, prompts, way
):
    model = make_varied()
    for count in (1, 3):
        for answer, prompt in zip(
            answers_of(model, tokenizer, prompt_tokenizer, examples, max_new_tokens=count), prompts, strict=True
        ):
            expected = greedy(model, prompt, count=count)
            assert answer == Generation(tokenizer.decode(expected), False, UNPARSED)


@pytest.mark.parametrize("source", ["generation config", "tokenizer", "chat template"])
def test_each_of_the_stop_tokens_stops(
    make_varied, make_tokenizer, prompt_tokenizer, examples, prompts, way, source, monkeypatch
):
    model, tokenizer = make_varied(), make_tokenizer()
    first = greedy(model, prompts[0], count=3)
    stop = first[1]
    assert stop != first[0]
    if source == "generation config":
        model.generation_config.eos_token_id = stop
    elif source == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stop)
    else:
        monkeypatch.setattr(prompt_tokenizer, "stop_token_id", stop)
    only, calls = make_examples(examples.texts[:1], [0]), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output))
    assert answers_of(model, tokenizer, prompt_tokenizer, only) == [
        Generation(tokenizer.decode(first[:1]), True, UNPARSED)
    ]
    assert len(calls) <= 3, "no token is made behind the stop token"


def test_a_stop_token_at_once_is_an_empty_answer_that_stopped(
    make_varied, tokenizer, prompt_tokenizer, examples, prompts, way
):
    model = make_varied()
    model.generation_config.eos_token_id = sorted({greedy(model, prompt, count=1)[0] for prompt in prompts})
    assert answers_of(model, tokenizer, prompt_tokenizer, examples) == [Generation("", True, UNPARSED)] * len(examples)


def test_a_shipped_generation_config_changes_no_answer_and_is_there_afterwards(
    make_varied, tokenizer, prompt_tokenizer, examples, way
):
    model = make_varied()
    reference = answers_of(model, tokenizer, prompt_tokenizer, examples)
    shipped = GenerationConfig(
        **{"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "min_new_tokens": 3, "suppress_tokens": [36, 106]},
        **{"do_sample": True, "temperature": 2.0, "top_k": 5, "max_length": 3, "eos_token_id": 2, "num_beams": 2},
    )
    model.generation_config = shipped
    before = shipped.to_dict()
    assert answers_of(model, tokenizer, prompt_tokenizer, examples) == reference
    assert model.generation_config is shipped and shipped.to_dict() == before


def test_a_shipped_repetition_penalty_would_change_answers(make_varied, prompts):
    """The companion: transformers' own generate() fills a config from the model's."""
    model = make_varied()
    expected = [greedy(model, prompt) for prompt in prompts]
    model.generation_config.repetition_penalty = 1.3
    asked = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 0, "pad_token_id": 0}
    with torch.no_grad():
        written = [
            model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **asked)[
                0, len(prompt) :
            ]
            for prompt in prompts
        ]
    assert [ids.tolist() for ids in written] != expected


def test_training_mode_and_generation_config_are_as_before(make_varied, tokenizer, prompt_tokenizer, examples, way):
    """With dropout on, answers would be drawn by lot."""
    model = make_varied(attention_dropout=0.5)
    reference = answers_of(model, tokenizer, prompt_tokenizer, examples)
    assert not model.training
    model.train()
    assert answers_of(model, tokenizer, prompt_tokenizer, examples) == reference
    assert model.training and all(layer.training for layer in model.modules())


def test_training_mode_and_generation_config_are_as_before_even_if_generating_fails(
    make_varied, tokenizer, prompt_tokenizer, examples, way
):
    model = make_varied().train()
    shipped = model.generation_config

    def fail(*args, **kwargs):
        assert not model.training
        raise RuntimeError("out of memory")

    model.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        answers_of(model, tokenizer, prompt_tokenizer, examples)
    assert model.training and model.generation_config is shipped


def test_generating_leaves_no_graph_behind(make_varied, tokenizer, prompt_tokenizer, examples, way):
    model = make_varied()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    answers_of(model, tokenizer, prompt_tokenizer, examples)
    assert seen and not any(seen)
    assert torch.is_grad_enabled()


def test_an_adapters_answers_are_its_own(make_varied, tokenizer, prompt_tokenizer, examples, prompts, way):
    """A fresh adapter changes nothing, so it is moved first, its magnitudes too."""
    model = make_varied()
    base_answers = answers_of(model, tokenizer, prompt_tokenizer, examples)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["k_proj", "v_proj"], use_dora=True)).eval()
    assert answers_of(tuned, tokenizer, prompt_tokenizer, examples) == base_answers
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    answers = answers_of(tuned, tokenizer, prompt_tokenizer, examples)
    assert answers != base_answers
    assert [answer.text for answer in answers] == [tokenizer.decode(greedy(tuned, prompt)) for prompt in prompts]


def test_what_is_packable_shares_its_prefix_and_what_is_not_is_answered_too(
    make_varied, make_model, tokenizer, prompt_tokenizer, examples, monkeypatch
):
    taken = []
    for original in WAYS:

        def spy(*args, original=original, **kwargs):
            taken.append(original.__name__)
            return original(*args, **kwargs)

        monkeypatch.setattr(generation, original.__name__, spy)
    few = examples.head(3)
    answers_of(make_varied(), tokenizer, prompt_tokenizer, few)
    gemma2 = {"head_dim": 8, "attn_logit_softcapping": 50.0, "pad_token_id": 0}
    assert len(answers_of(make_model("gemma2", **gemma2), tokenizer, prompt_tokenizer, few)) == 3
    assert taken == ["generate_packed", "generate_padded"]


# Words of every script


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        (["否定", "肯定"], "这是肯定的。", 1),  # Chinese: nothing stands between words
        (["悪い", "良い"], "とても良いです", 1),
        (["ลบ", "บวก"], "ความรู้สึกบวกมาก", 1),
        (["부정", "긍정"], "긍정입니다.", 1),  # Korean: the ending is written on
        (["बुरा", "अच्छा"], "यह अच्छा है", 1),
        (["सकार", "नकार"], "सकारात्मक", UNPARSED),  # Hindi: a vowel sign goes on with the word
        (["müde", "wach"], unicodedata.normalize("NFD", "Müde!"), 0),  # an accent as a character of its own
        ([unicodedata.normalize("NFD", "müde"), "wach"], "MÜDE", 0),
        (["STRASSE", "weg"], "straße", 0),
        (["ΣΊΣΥΦΟΣ", "x"], "σίσυφος", 0),  # the same capital for two small letters
        (["a b", "a"], "a bc", 1),  # the longer word is no whole one there
        (["not funny", "funny"], "not funny", 0),
        (["positive", "x"], "_positive positive9 positively", UNPARSED),
        (["positive", "x"], "(positive)", 0),
    ],
)
def test_a_label_word_is_found_as_its_script_writes_it(words, text, found):
    assert LabelParser(words)(text) == found
