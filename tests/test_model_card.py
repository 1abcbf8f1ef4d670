"""The model card, rendered whole from records made here and parsed back."""

import copy
import json
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from sample_records import WORDS, sample_evaluation, sample_predictions, sample_run
from test_seeds import flipped, write_diverged, write_kept

from tweetdora.card_facts import Publication, Records, choose_samples, make_records, recipe
from tweetdora.config import PushConfig
from tweetdora.errors import InputError
from tweetdora.model_card import (
    LICENSES,
    TEMPLATE,
    check_license,
    check_records,
    check_skill,
    eval_results_file,
    fence,
    inline_code,
    plan_publication,
    render_card,
    table_cell,
)
from tweetdora.record_files import decode
from tweetdora.records import BaseModelCard, Comparison, DatasetCard, EvaluationRecord, PredictionRecord, RunRecord
from tweetdora.seeds import find_sisters, summarise
from tweetdora.space import build_space

CHECK = Comparison(num_examples=32, equal_generations=31, max_logit_difference=4.6e-05)


@pytest.fixture
def records() -> dict[str, Any]:
    """Run, evaluation and predictions of a small run as JSON, which a test may change."""
    found = {"run": sample_run(), "evaluation": sample_evaluation()}
    texts = {name: json.dumps(asdict(record)) for name, record in found.items()}
    return {name: json.loads(text) for name, text in texts.items()} | {
        "predictions": [asdict(line) for line in sample_predictions()]
    }


def made(records: dict[str, Any]) -> Records:
    """The records, as push_to_hub.py reads them."""
    run = decode(RunRecord, records["run"], "run.json")
    evaluation = decode(EvaluationRecord, records["evaluation"], "test.json")
    return make_records(run, evaluation, [decode(PredictionRecord, line, "line") for line in records["predictions"]])


def base_card(**fields: str) -> dict[str, Any]:
    """What a base model's own card says, as a record holds it."""
    return asdict(BaseModelCard(**fields))


def test_the_headline_is_the_mean_over_seeds_where_there_are_several(records, tmp_path):
    """By hand: macro-F1 of 36, 34 and 32 of 40 right, half of each label; published is one of them."""
    for number, seed in enumerate((42, 43, 44)):
        write_kept(tmp_path / str(seed), seed, flipped(4 + 2 * number))
    sisters, _ = find_sisters(str(tmp_path / "43"), "test")
    assert sisters is not None
    values = [run.finetuned_metrics.macro_f1 for run in sisters.runs]
    mean, low, high = (f"{value:.3f}" for value in (np.mean(values), *summarise(sisters).interval))
    plain = made(records)
    publication = Publication("owner/small-dora", "publish", "mit", [])
    generations = [line["finetuned"]["text"] for line in records["predictions"]]
    card = render_card(replace(plain, sisters=sisters), publication, "float32", CHECK, generations)
    assert mean == "0.850" and f"{np.std(values, ddof=1):.3f}" == "0.050"
    assert (
        "macro-F1 went from **0.061** (95 % interval [0.111, 0.889]) to **0.850**, the mean of 3 trainings with seeds "
        f"42, 43 and 44 (standard deviation 0.050; 95 % interval over examples and seeds [{low}, {high}]). This model "
        f"is the one with seed {plain.run.training.seed}: 0.465 ([0.111, 0.889]). The numbers below are its own.\n\n"
        "## Labels and intended use\n"
    ) in card
    found = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert found["macro-F1"] == 0.4646, "the Hub's metadata are the model's own"


def render(records, hub_model_id="owner/small-dora", license="apache-2.0", folder="runs/small/publish", **more):
    commands = [records["run"]["command"], records["evaluation"]["command"], "python push_to_hub.py runs/small"]
    generations = [line["finetuned"]["text"] for line in records["predictions"]]
    publication = Publication(hub_model_id, folder, license, commands, **more)
    return render_card(made(records), publication, "float32", CHECK, generations)


def test_passes_of_batches_that_do_not_fill_the_last_one_are_whole(records):
    """By hand: 100 examples are 7 batches of 16, so 21 steps are 3 passes and 24 are 3.48."""
    records["run"]["train_data"]["num_examples"] = 100
    for steps, passes in ((21, "3.00 passes"), (24, "3.48 passes"), (7, "one pass")):
        records["run"]["result"]["steps"] = steps
        assert f"16 examples each: {passes} over the training examples" in render(records)
    records["run"]["training"]["dataloader_drop_last"] = True
    records["run"]["result"]["steps"] = 18
    assert "16 examples each: 2.88 passes" in render(records)


def test_the_settings_that_change_the_scale_or_the_clipping_are_on_the_card(records):
    assert "rsLoRA" not in render(records)
    records["run"]["model"]["use_rslora"] = True
    records["run"]["training"]["max_grad_norm"] = 0.0
    card = render(records)
    assert "alpha 16 with rsLoRA (scaled by alpha over the root of r)" in card and ", gradients not clipped |" in card


def test_the_metadatas_data_set_is_that_of_the_training(records):
    records["evaluation"]["data"]["name"] = "owner/elsewhere"
    card = ModelCard(render(records)).data
    assert card.datasets == ["cardiffnlp/tweet_eval"] and card.eval_results[0].dataset_type == "owner/elsewhere"


def test_metadata_parses_back_to_the_records(records):
    card = ModelCard(render(records)).data
    assert (card.base_model, card.datasets) == ("OuteAI/Lite-Oute-1-300M-Instruct", ["cardiffnlp/tweet_eval"])
    assert (card.license, card.library_name, card.pipeline_tag) == ("apache-2.0", "transformers", "text-generation")
    assert card.language == ["en"] and card.model_name == "small-dora"
    assert card.to_dict()["base_model_relation"] == "finetune"
    found = {result.metric_name: result.metric_value for result in card.eval_results}
    assert found == {"macro-F1": 0.4646, "macro recall": 0.375, "accuracy": 0.3331}
    first = card.eval_results[0]
    assert (first.dataset_type, first.dataset_config, first.dataset_split) == (
        "cardiffnlp/tweet_eval",
        "sentiment",
        "test",
    )
    assert first.dataset_revision == "b" * 40


@pytest.mark.parametrize(
    "line",
    [
        "On 5 examples of cardiffnlp/tweet_eval (sentiment), test, by greedy generation, macro-F1 went from "
        "**0.061** (95 % interval [0.111, 0.889]) to **0.465** ([0.111, 0.889]).",
        "| base (OuteAI/Lite-Oute-1-300M-Instruct) | 0.061 | [0.111, 0.889] | 0.375 | [0.222, 0.778] | 0.333 |",
        "| **fine-tuned** (this model) | **0.465** | [0.111, 0.889] | 0.375 | [0.222, 0.778] | 0.333 |",
        "| uniform guessing | 0.501 | | 0.500 | | 0.500 |",
        '| always "good" | 0.334 | | 0.500 | | 0.500 |',
        "| base | 16.7% | 50.0% | 75.0% |",
        "| fine-tuned | 80.0% | 50.0% | 75.0% |",
        "| good | 3 | 0.500 | 0.500 | 0.400 | [0.234, 0.679] | 0.400 |",
        "The paired difference in macro-F1 is +0.404 (95 % interval [+0.200, +0.600]): 3 examples fixed, 1 broken "
        "(McNemar's exact test, p = 0.62).",
        "| trainable parameters | 448,000 of 1,000,000 (44.800%) |",
        "| steps | 625 steps, 16 examples each: one pass over the training examples |",
        "| learning rate | 3e-05, linear |",
        "| loss | only on the answer and its stop token, 20,000 of the training set's 830,000 tokens; mean training "
        "loss 0.612 |",
        "| time | 12.6 minutes on 2 cores of Fast CPU |",
        "| peak memory | 2.7 GB of one process's memory |",
        "| `train` | 10,000 | 4,000 | 6,000 |",
        "7 texts were truncated to fit 512 tokens.",
        "31 of 32 answers are equal token for token, and the largest logit difference is 4.6e-05.",
        "\n# Lite-Oute-1-300M-Instruct fine-tuned on cardiffnlp/tweet_eval (sentiment)\n",
        "The labels are `bad`, `good`. [The data set's card](https://huggingface.co/datasets/cardiffnlp/tweet_eval)",
        "- **Intended use**: labelling texts like those of [cardiffnlp/tweet_eval]",
        "- **Out of scope**: decisions about individual people;",
        "- The weakest label is bad: 25% of its examples are found (recall 0.250).",
        "- 1 of 2 examples labelled bad are answered good (50.0%).\n"
        "- 1 of 3 examples labelled good are answered bad (33.3%).",
        "- 1 of 5 answers name no label word, such as `` The `tweet` ``.",
        "| 5 to 1,500 | 2 | 0.000 | [0.000, 0.658] |",
        "a training example has 51 to 1,024 tokens (median 81); 95 % have at most 96.",
        "| bad | so \\*sad\\* |\n| good | joy |",
        f"configuration `sentiment`, revision `{'b' * 40}`.\n- **Base model**: [OuteAI/Lite-Oute-1-300M-Instruct]",
        f"OuteAI/Lite-Oute-1-300M-Instruct), revision `{'a' * 40}`; licence apache-2.0.\n",
        "TweetEval's official score for sentiment",
        "stops at `<|im_end|>`",
        "drops DoRA's magnitude vectors",
        "accelerate launch train.py --max_steps 3",
    ],
)
def test_the_card_says(records, line):
    assert line in render(records)


def test_no_placeholder_no_none_no_double_blank_line(records):
    card = render(records)
    words = card.partition("## Citation")[0]  # BibTeX has double braces
    assert not re.search(r"None|More Information Needed|\{\{|\}\}|\{%|undefined", words)
    assert "\n\n\n" not in card and card.endswith("\n") and not re.search(r"[ \t]\n", card)


def test_samples_are_the_first_right_and_the_first_wrong_of_each_label():
    chosen, left_out = choose_samples(sample_predictions(), WORDS)
    assert left_out == {}
    assert [(row["label"], row["text"], row["wrong"]) for row in chosen] == [
        ("bad", "awful", False),
        ("bad", "first\nbad | row", True),
        ("good", "fine", False),
        ("good", "so-so", True),
    ]


def test_sample_rows_keep_the_table_whole(records):
    card = render(records)
    assert "| first bad \\| row | bad | `The tweet <b>` | `good` ✗ |" in card
    assert "| so-so | good | `hm` | `bad⏎⏎ralitive` ✗ |" in card
    table = card[card.index("| text | label |") :].split("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b", "a\\|b"), ("<b>&", "&lt;b&gt;&amp;"), ("*x* _y_ `z`", "\\*x\\* \\_y\\_ \\`z\\`"), (" a\n\tb ", "a b")],
)
def test_table_cell_has_no_markup(text, expected):
    assert table_cell(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("a`b", "`` a`b ``"), ("", "(empty)"), ("a\nb", "`a⏎b`")])
def test_inline_code_holds_anything(text, expected):
    assert inline_code(text) == expected


def test_a_missing_fact_leaves_its_sentence_out(records):
    run = records["run"]
    run["base_model_card"] = base_card()
    run["base_model"]["revision"] = run["environment"]["git"] = run["validation_data"] = None
    run["train_data"] |= {"truncated": 0, "revision": None}
    run["model"]["method"] = "lora"
    card = render(records, license=None)
    for absent in (
        "license",
        "language:",
        f"revision `{'a' * 40}`",
        "at commit",
        "were truncated",
        "magnitude",
        "`validation`",
    ):
        assert absent not in card
    assert "fine-tuned with LoRA" in card and "@inproceedings{hu2022lora," in card and "\n\n\n" not in card


def test_local_folders_do_not_pass_for_hub_ids(records, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    for record in (records["run"], records["evaluation"]):
        record["base_model"] = {
            **record["base_model"],
            "name_or_path": str(folder),
            "weights_sha256": {"model.safetensors": "f"},
        }
    records["run"]["train_data"] |= {"name": str(folder), "local": True}
    records["evaluation"]["data"] |= {"name": str(folder), "local": True}
    text = render(records, hub_model_id=None)
    card = ModelCard(text).data
    assert card.base_model is None and card.datasets is None and card.model_name == "small"
    assert str(tmp_path) not in text and "`base`" in text


def test_a_data_file_is_one_although_it_is_not_there_any_more(records):
    """Published from another machine: what does not exist is not therefore on the Hub."""
    for data in (records["run"]["train_data"], records["evaluation"]["data"]):
        data |= {"name": "data/tweets.csv", "local": True}
    text = render(records)
    assert ModelCard(text).data.datasets is None and "`tweets.csv`" in text and "datasets/data" not in text


def test_a_run_that_went_on_otherwise_says_so(records):
    assert "Resumed with" not in render(records)
    records["run"]["mismatches"] = ["code: was 'a|b', now 'c' (another state)"]
    expected = "- Resumed with a changed setting: code: was 'a\\|b', now 'c' (another state).\n- "
    assert expected in render(records)


def test_the_limits_hold_what_was_noted_on_the_data_and_what_was_corrected(records):
    """Of the split that was measured, what its own record says; of the others, what the run's says."""
    records["run"]["notes"] = [
        {"split": "train", "text": "3 rows were skipped: 3 with no text"},
        {"split": "test", "text": "an older note"},
    ]
    records["evaluation"]["notes"] = [{"split": "test", "text": "2 of 5 texts are in the train split too"}]
    records["evaluation"]["data"]["split"] = "holdout[:5]"
    records["evaluation"]["corrections"] = ["test_split: was 'test', now 'holdout[:5]'"]
    limits = render(records).partition("## Limits\n")[2]
    assert (
        "- Evaluated on other data than the recipe names: test\\_split: was 'test', now 'holdout\\[:5\\]'.\n" in limits
    )
    assert "- `train`: 3 rows were skipped: 3 with no text.\n" in limits
    assert "- `holdout[:5]`: 2 of 5 texts are in the train split too.\n" in limits
    assert "older" not in limits


def test_the_card_has_the_likelihoods_and_what_other_classifiers_score(records):
    text = render(records)
    assert "| VADER (vaderSentiment 3.3.2) | 0.444 | [0.300, 0.550] | 0.450 | | 0.460 |" in text
    row = "| fine-tuned | 0.475 | [0.300, 0.600] | 0.600 | 0.654 | [0.500, 0.800] | 0.088 | [0.050, 0.200] |"
    assert row in text and "(plots/reliability.png)" in text and "**Log loss** is" in text


def test_a_card_of_older_records_does_without_both(records):
    for name in ("base", "finetuned"):
        records["evaluation"][name]["likelihood"] = None
    records["evaluation"]["baselines"]["others"] = []
    text = render(records)
    for words in ("VADER", "ikelihood", "reliability.png", "Log loss"):
        assert words not in text


def test_a_model_that_is_no_better_than_guessing_says_so(records):
    words = "- The fine-tuned model's macro-F1, 0.465, is not above that of uniform guessing, 0.501."
    assert words in render(records)
    records["evaluation"]["baselines"]["uniform"]["macro_f1"] = 0.3
    assert "guessing, 0" not in render(records).partition("## Limits")[2]


@pytest.mark.parametrize(
    ("flags", "refused"), [({}, True), ({"dry_run": True}, False), ({"allow_chance_level": True}, False)]
)
def test_a_model_that_is_no_better_than_guessing_is_not_published_unless_asked_for(records, flags, refused):
    message = "is not above that of uniform guessing, 0.501. Train with .* publish it anyway with --allow_chance"
    if refused:
        with pytest.raises(InputError, match=message):
            check_skill(made(records), PushConfig(**flags))
    else:
        assert check_skill(made(records), PushConfig(**flags)).endswith("uniform guessing, 0.501.")
    records["evaluation"]["baselines"]["uniform"]["macro_f1"] = 0.3
    assert check_skill(made(records), PushConfig(**flags)) is None


@pytest.mark.parametrize("adapter_only", [False, True])
def test_the_code_generates_as_many_tokens_as_the_run_was_trained_for(records, adapter_only):
    records["run"]["max_new_tokens"], records["evaluation"]["max_new_tokens"] = 64, 5
    text = render(records, adapter_only=adapter_only)
    assert "max_new_tokens=64" in text and "max_new_tokens=5" not in text
    assert "answers that end within 5 tokens" in text


def test_the_weakest_label_is_one_that_has_examples(records):
    records["evaluation"]["finetuned"]["per_label"]["bad"] |= {"support": 0, "recall": 0.0}
    assert "The weakest label is good: 50% of its examples" in render(records)


def use_local_base(records, **fields):
    """Let the run's base be the local folder copies/Tiny-Instruct, whose own card holds `fields`."""
    for record in (records["run"], records["evaluation"]):
        record["base_model"] |= {"name_or_path": "copies/Tiny-Instruct", "weights_sha256": {"model.safetensors": "f"}}
    records["run"]["base_model_card"] = base_card(**fields)


def test_a_local_base_is_named_after_its_folder(records):
    use_local_base(records)
    text = render(records)
    assert ModelCard(text).data.base_model is None
    assert made(records).run.base_display_name == "Tiny-Instruct"
    assert "`Tiny-Instruct`, fine-tuned with" in text and "\n# Tiny-Instruct fine-tuned on" in text


def test_a_local_base_that_is_a_conversion_says_of_what_and_by_way_of_what(records):
    use_local_base(records, converted_from="owner/Tiny-Instruct", converted_file="Tiny.Q4_1.gguf")
    text = render(records)
    assert ModelCard(text).data.base_model == made(records).run.base_display_name == "owner/Tiny-Instruct"
    link = "[owner/Tiny-Instruct](https://huggingface.co/owner/Tiny-Instruct)"
    said = f"revision `{'a' * 40}`, here converted from `Tiny.Q4_1.gguf` and therefore not identical to the original"
    assert f"- **Base model**: {link}, {said}" in text


@pytest.mark.parametrize("folder", ["out/publish", "publish", "runs/small/publish"])
def test_a_folder_never_passes_for_a_hub_id_and_a_hub_id_never_for_a_folder(records, folder):
    """None of these folders exists: what does not exist is not therefore on the Hub."""
    local, public = render(records, hub_model_id=None, folder=folder), render(records, folder=folder)
    assert ModelCard(local).data.model_name == "small" and f'model_id = "{folder}"' in local
    assert ModelCard(public).data.model_name == "small-dora" and 'model_id = "owner/small-dora"' in public


@pytest.mark.parametrize(
    ("device", "processes", "hardware", "memory"),
    [
        ("cuda", 2, "2 x Big GPU", "5.5 GB of one GPU's memory"),
        ("cuda", 1, "1 x Big GPU", "5.5 GB of one GPU's memory"),
        ("cpu", 2, "2 cores of Fast CPU", "2.7 GB of one process's memory"),
    ],
)
def test_hardware_is_what_was_used_not_what_was_there(records, device, processes, hardware, memory):
    run = records["run"]
    run["environment"]["hardware"]["gpus"] = ["Big GPU"] * 4
    run["device"], run["training"]["world_size"] = device, processes
    run["result"]["peak_memory_bytes"] |= {"gpu0": 5_500_000_000, "gpu1": 0}
    card = render(records)
    assert f"| time | 12.6 minutes on {hardware} |" in card and f"| peak memory | {memory} |" in card


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (0, "3e-05, linear |"),
        (0.05, "3e-05, linear, warm-up over the first 5 % of the steps |"),
        (30, "3e-05, linear, 30 warm-up steps |"),
    ],
)
def test_warm_up_below_one_is_a_share_of_the_steps(records, steps, text):
    records["run"]["training"]["warmup_steps"] = steps
    assert f"| learning rate | {text}" in render(records)


def test_the_trainer_reads_warm_up_so_too(tmp_path):
    from transformers import TrainingArguments

    steps = [TrainingArguments(str(tmp_path), warmup_steps=value).get_warmup_steps(200) for value in (0.05, 30)]
    assert steps == [10, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r["evaluation"].update(adapter_sha256="other"),
            "its adapter is 'other', the run's 'd'. Run evaluate.py",
        ),
        (lambda r: r["evaluation"].update(label_words=["a", "b"]), "its label words is"),
        (lambda r: r["evaluation"]["prompt_format"].update(tail=""), "its prompt is"),
        (lambda r: r["evaluation"]["base_model"].update(parameters=3), "its base model is"),
        (lambda r: r["predictions"].pop(), "its number of predictions is 4, the run's 5"),
        (lambda r: r["predictions"][1].update(label="bad"), "its hash of the predictions' texts and labels is"),
        (lambda r: r["predictions"][1].update(label="fair"), "its hash of the predictions' texts and labels is"),
        (lambda r: r["evaluation"].update(kind="model", finetuned=None), "the evaluation is of a model; expected one"),
    ],
)
def test_contradicting_records_stop_the_card(records, change, message):
    check_records(made(records))
    change(records)
    with pytest.raises(InputError, match=re.escape(message)):
        check_records(made(records))


def test_every_number_of_the_results_follows_the_record(records):
    """The companion of test_the_card_says: other records, another card."""
    other = copy.deepcopy(records)
    other["evaluation"]["finetuned"]["macro_f1"] = 0.7777
    assert "**0.778**" in render(other) and "**0.465**" not in render(other)


def test_the_example_is_one_that_the_saved_model_answers_so(records):
    """Measured in bf16, a row may be answered otherwise than by the float32 weights that the snippet loads."""
    publication = Publication("owner/small", "out", None, [])
    for answers, text, printed in (
        (["good", "bad", "bad"], "awful", "`bad`"),  # its answer to "fine" in the record is right
        (["good", "bad"], "first\\nbad | row", "`good`"),
    ):
        card = render_card(made(records), publication, "float32", CHECK, answers)
        assert f'"content": "{text}"' in card and f"It prints {printed}. Generation" in card


def test_a_placeholder_is_in_the_snippet_if_no_example_may_be_shown(records):
    """The first text, and the answer to the second, are what a card does not show; other texts have no answer."""
    records["predictions"][0]["text"] = "you idiot"
    card = render_card(
        made(records), Publication("owner/small", "out", None, []), "float32", CHECK, ["good", "no, you idiot"]
    )
    snippet = re.search(r"```python\n(.*?)```\n\n(.*)", card, re.DOTALL)
    assert '"content": "the text to classify"}' in snippet[1] and snippet[2].startswith("Generation is greedy")
    assert "idiot" not in card


@pytest.mark.parametrize(
    ("seeds", "diverged", "said"),
    [
        ([43, 44], [], None),
        ([43], [44, 45], "- The same training diverged with seeds 44 and 45.\n"),
        ([43, 44], [45], "- The same training diverged with seed 45; the mean over seeds leaves that out.\n"),
    ],
)
def test_seeds_that_diverged_are_told(records, tmp_path, seeds, diverged, said):
    for seed in seeds:
        write_kept(tmp_path / str(seed), seed, flipped(seed - 40))
    for seed in diverged:
        write_diverged(tmp_path / str(seed), seed)
    sisters, _ = find_sisters(str(tmp_path / "43"), "test")
    card = render_card(
        replace(made(records), sisters=sisters),
        Publication("owner/small", "out", None, []),
        "float32",
        CHECK,
        ["good"],
    )
    assert (said in card) if said else ("diverged" not in card)
    assert ("the mean of 2 trainings" in card) == (len(seeds) > 1)
    assert ("- One seed. The intervals" in card) == (len(seeds) == 1)


def test_the_usage_snippet_is_python(records):
    snippet = re.search(r"```python\n(.*?)```", render(records), re.DOTALL)[1]
    compile(snippet, "snippet", "exec")
    assert '"Say \\"bad\\" or \\"good\\"."' in snippet and 'model_id = "owner/small-dora"' in snippet


# Labels, sources, and what is not shown


def test_labels_licences_and_papers_come_from_the_cards_of_data_set_and_base(records):
    records["run"]["dataset_card"] = asdict(
        DatasetCard("cc-by-4.0", "https://arxiv.org/abs/1", "@misc{tweets, title={T}}", "Below 0 is *bad*, else good.")
    )
    records["run"]["base_model_card"] |= {"license": ["mit", "gpl"], "paper": "https://arxiv.org/abs/2"}
    text = render(records, license="mit", repository_url="https://git.example/tweetdora")
    assert "The data set's card describes them:\n\n> Below 0 is \\*bad\\*, else good.\n" in text
    assert f"revision `{'b' * 40}`; licence cc-by-4.0; [paper](https://arxiv.org/abs/1).\n" in text
    assert "; licence mit, gpl; [paper](https://arxiv.org/abs/2).\n" in text
    assert "Trained with [tweetdora](https://git.example/tweetdora) at commit `" in text
    citations = text.partition("## Citation\n\n```bibtex\n")[2]
    assert re.findall(r"^@\w+\{(\w+),", citations, re.MULTILINE) == ["liu2024dora", "tweets", "base_model"]
    address = "  url   = {https://huggingface.co/OuteAI/Lite-Oute-1-300M-Instruct}\n}\n```"
    assert citations.rstrip().endswith(address)


def test_insults_and_personal_data_are_passed_over_and_counted(records):
    """Examples 2 and 1, the only right ones, are not shown; another that is right is."""
    lines = records["predictions"]
    lines[2]["text"], lines[1]["text"] = "you idiot", "write to me@example.org"
    lines.append({**copy.deepcopy(lines[1]), "text": "grand", "example_id": 5})
    lines[0]["base"]["text"] = "call 555 123 4567"  # an answer is shown too
    chosen, left_out = choose_samples(made(records).predictions, WORDS)
    assert [(row["label"], row["text"]) for row in chosen] == [("good", "grand"), ("good", "so-so")]
    assert left_out == {"personal data": 2, "insult": 1}
    records["run"]["train_data"]["first_texts"] = {"bad": "so @somebody_else", "good": "joy"}
    text = render(records)
    for hidden in ("idiot", "example.org", "somebody", "4567"):
        assert hidden not in text
    assert (
        "The rule skipped examples with personal data (2) and insults (1), found by a short English word list" in text
    )
    widget = ModelCard(text).data.to_dict()["widget"]
    assert [example["messages"][1]["content"] for example in widget] == ["grand"]


def test_a_system_prompt_with_markup_is_shown_as_it_is(records):
    prompt = 'Classify the text inside <review>: "bad" or *good*.\n- Write one word.'
    records["run"]["task"]["system_prompt"] = prompt
    assert f"was trained with:\n\n```text\n{prompt}\n```\n" in render(records)


@pytest.mark.parametrize(("rate", "said"), [(0.5, "Some answers contain no label word. Taking"), (1.0, "\nTaking")])
def test_that_some_answers_contain_no_label_word_is_said_only_if_it_is_so(rate, said, records):
    for name in ("base", "finetuned"):
        records["evaluation"][name]["parse_rate"] = rate
    assert f"{said} the most likely label word instead gives a label" in render(records)


def test_the_split_that_was_evaluated_is_in_the_data_table_once(records):
    """It was evaluated on all of it, and trained with some of it as validation."""
    records["evaluation"]["split"] = records["evaluation"]["data"]["split"] = "validation"
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", render(records), re.MULTILINE)
    assert rows == [("train", "10,000"), ("validation", "5")]


def test_a_folder_that_is_not_published_is_named_without_its_place(records):
    """Or the check for secrets would refuse a home folder that no setting holds."""
    publication = Publication(None, "/home/someone/runs/demo/publish", None, ["train", "evaluate", "push"])
    card = render_card(made(records), publication, "float32", CHECK, ["good"])
    assert 'model_id = "publish"' in card and "/home/" not in card


def test_the_user_can_name_the_samples(records, tmp_path):
    chosen, left_out = choose_samples(sample_predictions(), WORDS, [4, 1])
    assert ([row["text"] for row in chosen], left_out) == (["nice", "fine"], {})
    text = render(records, sample_ids=[4, 1])
    assert "\nChosen by the publisher; ✗ marks a wrong answer" in text and "awful |" not in text
    assert '"content": "nice"' in render(records, sample_ids=[4]), "the code shows one of them too"
    publication = Publication(None, "out", None, [], sample_ids=[4])
    assert build_space(str(tmp_path), "out", made(records), publication) == ["nice"], "so do the page's examples"
    assert [example["example_title"] for example in ModelCard(text).data.to_dict()["widget"]] == ["good"]
    with pytest.raises(InputError, match=r"--sample_ids 9: the evaluation has no such example"):
        plan_publication(made(records), PushConfig(dry_run=True, sample_ids=[1, 9]), "out")


def test_a_model_without_mistakes_has_no_weakest_label(records):
    metrics = records["evaluation"]["finetuned"]
    for word in WORDS:
        metrics["per_label"][word]["recall"] = 1.0
    metrics["confusion_matrix"] = [[2, 0, 0], [0, 3, 0]]
    for line in records["predictions"]:
        line["finetuned"] = {**line["finetuned"], "text": line["label"], "predicted": line["label"]}
    text = render(records)
    assert "weakest" not in text and "### Where it fails\n\nOn these 5 examples:\n\n- no mistakes.\n" in text


# Metadata


@pytest.mark.parametrize(
    ("license", "card", "message"),
    [
        ("apache2", {}, "the Hub knows no licence 'apache2'; expected one of its identifiers, such as apache-2.0"),
        ("", {}, "the Hub knows no licence ''; expected one of its identifiers (huggingface"),
        (["mit"], {}, "the Hub knows no licence ['mit']; expected one of its identifiers, such as mit"),
        ("other", {"license_name": "mine"}, "the licence is `other`, which on the Hub needs license_name and"),
    ],
)
def test_a_licence_that_the_hub_would_not_take_is_refused(license, card, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_license(license, BaseModelCard(**card))


def test_the_base_models_own_licence_goes_on_the_card(records):
    fields = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    for license, card in ((None, {}), ("apache-2.0", {}), ("other", fields), (LICENSES[-1], fields)):
        check_license(license, BaseModelCard(**card))
    records["run"]["base_model_card"] = base_card(**fields)
    data = ModelCard(render(records, license="other")).data.to_dict()
    assert {name: data[name] for name in fields} == fields
    assert "license_name" not in ModelCard(render(records, license="mit")).data.to_dict()


def test_the_newer_format_of_results_holds_macro_f1(records):
    (entry,) = parse_eval_result_entries(yaml.safe_load(eval_results_file(made(records))))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cardiffnlp/tweet_eval", "sentiment", 0.4646)
    assert (entry.dataset_revision, entry.date) == ("b" * 40, records["evaluation"]["created"])
    assert entry.notes == "macro-F1 by greedy generation, test, n = 5, 95 % [0.111, 0.889]"
    records["evaluation"]["data"] |= {"name": "tweets.csv", "local": True}
    assert eval_results_file(made(records)) is None, "the data set is not on the Hub"


def test_the_widget_shows_right_answers_with_the_prompt(records):
    widget = ModelCard(render(records)).data.to_dict()["widget"]
    assert [(example["example_title"], example["output"]) for example in widget] == [
        ("bad", {"text": "bad"}),
        ("good", {"text": "good"}),
    ]
    assert widget[1]["messages"] == [
        {"role": "system", "content": 'Say "bad" or "good".'},
        {"role": "user", "content": "fine"},
    ]
    for row in records["predictions"]:
        row["finetuned"]["text"] += "!"
    assert "widget" not in ModelCard(render(records)).data.to_dict()


# What is there only sometimes


def test_the_scores_of_others_stand_on_the_whole_test_split_only(records):
    assert "BERTweet" not in render(records)
    records["evaluation"]["data"]["num_examples"] = 12_284
    card = render(records)
    row = "| BERTweet, by [TweetEval's leaderboard](https://github.com/cardiffnlp/tweeteval) |  | | 0.734 | | |"
    assert row in card and "| LoRA model of the same owner, by its card | 0.51 | |  | | |" in card
    for change in ({"split": "validation"}, {"config": "irony"}, {"name": "someone/tweet_eval"}):
        records["evaluation"]["data"] |= {
            "split": "test",
            "config": "sentiment",
            "name": "cardiffnlp/tweet_eval",
        } | change
        assert "BERTweet" not in render(records)


def test_a_run_that_is_followed_online_is_linked(records):
    assert "Weights & Biases" not in render(records)
    tracker = {"id": "1", "mode": "online", "url": "https://wandb.ai/o/p/runs/1", "project": "p", "entity": "o"}
    records["run"]["tracker"] = tracker
    assert "| curves and samples | [Weights & Biases](https://wandb.ai/o/p/runs/1) |" in render(records)
    tracker["url"] = None
    assert "Weights & Biases" not in render(records)


def test_the_card_of_an_adapter_alone(records):
    text = render(records, adapter_only=True)
    card = ModelCard(text).data.to_dict()
    assert (card["base_model_relation"], card["library_name"]) == ("adapter", "peft")
    assert "A DoRA adapter for [OuteAI/Lite-Oute-1-300M-Instruct](https://" in text
    assert "import torch\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n" in text
    assert "> [!WARNING]\n> Load it with PEFT" in text and "drops DoRA's trained magnitude vectors" in text
    assert "do_sample=False, eos_token_id=stop" in text and "merged" not in text and "\n\n\n" not in text
    compile(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], "snippet", "exec")
    records["run"]["model"]["method"] = "lora"
    assert "WARNING" not in render(records, adapter_only=True)


# The recipe


def test_the_recipe_holds_all_settings_and_the_commits(records):
    found = recipe(made(records).run)
    assert (found["model_revision"], found["dataset_revision"]) == ("a" * 40, "b" * 40)
    assert found["learning_rate"] == 3e-5 and "world_size" not in found and None not in found.values()
    records["run"]["task"]["dataset_name"] = "/srv/someone/data"
    assert recipe(made(records).run)["dataset_name"] == "data"


@pytest.mark.parametrize(("text", "marks"), [("a: b", "```"), ("a: ```` b", "`````")])
def test_a_block_of_code_holds_anything(text, marks):
    assert fence(text + "\n", "yaml") == f"{marks}yaml\n{text}\n{marks}"


# Its numbers


def numbers(text):
    """The numbers of a text, as they are written."""
    return set(re.findall(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?%?", text))


def written(value):
    """The ways in which the card may write a number of a record, or the numbers of a text."""
    if isinstance(value, dict):
        return set().union(*(written(item) for pair in value.items() for item in pair), set())
    if isinstance(value, list | tuple):
        return set().union(*map(written, value), set())
    if isinstance(value, str):
        return numbers(value)
    if isinstance(value, bool) or value is None:
        return set()
    forms = ["", ",", "g", ".2g", ".3f", "+.3f", ".1%", ".0%", ".1e"]
    return {format(value, form) for form in forms if not (form == "," and isinstance(value, float))} | {str(value)}


def test_every_number_on_the_card_stands_in_the_records(records):
    """What is not in a record is a text of the template's own, or follows by one division from two that are."""
    with open(TEMPLATE, encoding="utf-8") as stream:
        own = numbers(re.sub(r"\{\{.*?\}\}|\{%.*?%\}", " ", stream.read()))
    divided = {"44.800%", "12.6", "2.7", "50.0%", "33.3%"}  # parameters, minutes, gigabytes, shares of mistakes
    text = render(records).split("\n---\n", 1)[1].partition("## Citation")[0]
    recorded = written([*records.values(), asdict(CHECK), {"r": len(WORDS)}])
    strange = numbers(text) - recorded - own - divided
    assert strange == set()
    assert len(numbers(text) - own) > 50
