"""What a training refuses after loading and before its first step."""

import dataclasses
import datetime
import runpy
import shutil
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import CHATML
from sample_records import sample_run
from tokenizers import normalizers

from tweetdora.config import ModelConfig, TaskConfig
from tweetdora.errors import InputError
from tweetdora.prompts import read_prompt_format
from tweetdora.resume import Commits, ResumePlan
from tweetdora.train_config import TrainConfig
from tweetdora.training import check_optimizer, check_processes, load, trained_format

PROMPT = "Say it: negative and I am afraid so, or what you like; or plain."
LONG = ["negative and I am afraid so", "neither of the two of them", "positive and altogether so"]


@pytest.fixture
def load_with(model_dir, task, training, make_tokenizer, tmp_path):
    """load_with(task_fields={}, tokenizer=None, model=None, **training settings): load a run on a tiny model."""

    def run(tokenizer=None, model=None, task_fields=None, **settings):
        folder = model_dir
        if tokenizer is not None or model is not None:
            folder = str(tmp_path / "model")
            shutil.copytree(model_dir, folder)
            for part in (tokenizer, model):
                if part is not None:
                    part.save_pretrained(folder)
        config = ModelConfig(model_name_or_path=folder)
        changed = dataclasses.replace(task, **(task_fields or {}))
        return load(changed, config, training(**settings), Commits(None, None), PartialState())

    return run


def test_an_answer_that_does_not_fit_the_budget_is_refused_with_what_it_needs(load_with):
    loaded, _ = load_with(task_fields={"label_words": LONG, "system_prompt": PROMPT}, max_new_tokens=64)
    needed = max(len(ids) for ids in loaded.prompt_tokenizer.completion_ids)
    assert needed > 16, "the default would not be enough"
    message = f"^--max_new_tokens is {needed - 1}, but '.*' and its stop token are {needed} tokens. Use --max_new_tok"
    fields = {"label_words": LONG, "system_prompt": PROMPT}
    load_with(task_fields=fields, max_new_tokens=needed)
    with pytest.raises(InputError, match=message):
        load_with(task_fields=fields, max_new_tokens=needed - 1)


def test_label_words_that_the_tokenizer_makes_others_of_are_refused(load_with, make_tokenizer):
    """A normaliser that takes accents away: what is trained is never found again, and a perfect model scores 0."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    fields = {"label_words": ["schlecht", "plain", "schön"], "system_prompt": PROMPT}
    with pytest.raises(InputError, match="^--label_words: 'schön' becomes 'schon' in the tokens of .*Choose another"):
        load_with(tokenizer, task_fields=fields)


def test_label_words_in_another_normal_form_than_the_tokenizers_are_fine(load_with, make_tokenizer):
    import unicodedata

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    words = [unicodedata.normalize("NFD", word) for word in ("schlecht", "plain", "schön")]
    load_with(tokenizer, task_fields={"label_words": words, "system_prompt": PROMPT})


def test_ids_that_the_model_has_no_embedding_for_are_refused(load_with, make_tokenizer):
    """A tokenizer with a token more than the weights, as after add_tokens without resize_token_embeddings."""
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    tokenizer.add_tokens(["how the day"])  # words of the system prompt
    message = f"writes 'how the day', id {known}, but .* has embeddings for {known} ids only.*; fetch both again.$"
    with pytest.raises(InputError, match=message):
        load_with(tokenizer)


def test_a_pad_token_that_the_model_has_no_embedding_for_is_refused(load_with, make_tokenizer):
    """Nothing here pads with it, but who loads the published model does."""
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    message = f"pads with '<pad>', id {known}, but .* has embeddings for {known} ids only.* set another pad_token in"
    with pytest.raises(InputError, match=message):
        load_with(tokenizer)


def test_examples_beyond_the_models_last_position_are_refused(load_with, make_model):
    with pytest.raises(InputError, match="^the longest example has [0-9]+ tokens, but .* supports only 24 positions"):
        load_with(model=make_model(max_position_embeddings=24))


def test_a_test_split_that_is_not_there_is_said_before_the_training(load_with):
    with pytest.raises(InputError, match="split 'exam': .*Name an existing split, or a slice of one, with --train"):
        load_with(task_fields={"test_split": "exam"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"label_words": ["bad", "fair", "good"], "system_prompt": TaskConfig().system_prompt},
            "^--system_prompt is the published run's, which asks for negative, neutral, positive instead of "
            "--label_words bad fair good. Omit it, or use one that names them, such as --system_prompt "
            '\'Classify the text. Answer with exactly one of these words: "bad", "fair" or "good". Write nothing '
            "else.'$",
        ),
        (
            {"system_prompt": "How is it?"},
            "^--system_prompt is 'How is it.', which names none of --label_words negative",
        ),
    ],
)
def test_a_prompt_that_asks_for_other_words_is_refused_with_the_line_to_add(fields, message, load_with):
    with pytest.raises(InputError, match=message):
        load_with(task_fields=fields)


def test_the_published_prompt_asks_for_its_own_words_only(load_with):
    """Two of its three words are named in it all the same."""
    published = TaskConfig().system_prompt
    load_with(task_fields={"system_prompt": published})
    load_with(task_fields={"system_prompt": published, "label_words": ["Negative", "NEUTRAL", "positive"]})
    two = {"system_prompt": published, "label_words": ["negative", "neutral", "so positive"]}
    with pytest.raises(
        InputError, match="is the published run's, which asks for negative, neutral, positive instead of"
    ):
        load_with(task_fields=two)


def test_the_template_that_is_named_is_saved_with_the_adapter(load_with, make_tokenizer):
    tokenizer = make_tokenizer(chat_template={"tool_use": "{{ nothing.at_all }}", "rag": CHATML})
    loaded, run = load_with(tokenizer, task_fields={"chat_template": "rag"})
    assert loaded.tokenizer.chat_template == CHATML and run.task.chat_template == "rag"


def test_a_prompt_may_name_the_words_in_another_case(load_with):
    load_with(task_fields={"system_prompt": "Negative or not?"})


def test_a_run_goes_on_on_another_day_with_the_date_that_it_was_begun_with(load_with, make_tokenizer):
    """Some templates write today's date into the system prompt; it is part of what is trained."""
    dated = "{{ 'today is ' + strftime_now('%d %b %Y') }}" + CHATML
    loaded, run = load_with(make_tokenizer(chat_template=dated))
    today = datetime.date.today()
    assert run.prompt_format.head.startswith(f"today is {today:%d %b %Y}")
    begun = today - datetime.timedelta(days=40)
    then = read_prompt_format(loaded.tokenizer, run.task, begun)
    saved = dataclasses.replace(run, created=f"{begun:%Y-%m-%d}T23:59:59Z", prompt_format=then)
    assert trained_format(loaded.tokenizer, run.task, saved) == then != run.prompt_format
    other = dataclasses.replace(then, tail="other")
    assert trained_format(loaded.tokenizer, run.task, dataclasses.replace(saved, prompt_format=other)) is None
    assert trained_format(loaded.tokenizer, run.task, None) is None


def test_train_py_hands_the_interrupted_runs_record_on(monkeypatch, tmp_path):
    """Its prompt, and the commits of base and data, are what the run goes on with."""
    saved, given = sample_run(status="interrupted", result=None), []

    def stop(*arguments):
        given.extend(arguments)
        raise InputError("seen")

    monkeypatch.setattr("tweetdora.resume.plan_resume", lambda training: ResumePlan("checkpoint-1", saved, []))
    monkeypatch.setattr("tweetdora.training.load", stop)
    main = runpy.run_path(str(Path(__file__).resolve().parent.parent / "train.py"))["main"]
    with pytest.raises(InputError, match="^seen$"):
        main(["--output_dir", str(tmp_path / "run"), "--report_to", "none", "--precision", "fp32"])
    assert given[-1] is saved and Commits("a" * 40, "b" * 40) in given


@pytest.mark.parametrize("optim", ["apollo_adamw", "galore_adamw", "grokadamw"])
def test_an_optimizer_that_cannot_be_made_is_refused_by_its_flag(optim, load_with):
    loaded, _ = load_with()
    settings = TrainConfig(output_dir="x", precision="fp32", report_to=[], optim=optim)
    with pytest.raises(InputError, match=f"^--optim {optim} and its settings: [A-Za-z]+: "):
        check_optimizer(settings, loaded.model, 10)
    check_optimizer(TrainConfig(output_dir="x", precision="fp32", report_to=[]), loaded.model, 10)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adam_epsilon": -0.1}, "--optim adamw_torch(_fused)? and its settings: ValueError: Invalid epsilon"),
        ({"adam_beta1": 1.5}, "--optim adamw_torch(_fused)? and its settings: ValueError: Invalid beta parameter"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_kwargs None: ValueError: ",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
            "--lr_scheduler_type cosine with --lr_scheduler_kwargs {'num_cycle': 2}: TypeError: ",
        ),
    ],
)
def test_settings_with_which_no_training_can_begin_are_refused_by_their_flags(settings, said, load_with):
    loaded, _ = load_with()
    with pytest.raises(InputError, match=f"^{said}"):
        check_optimizer(TrainConfig(output_dir="x", precision="fp32", report_to=[], **settings), loaded.model, 10)
    right = {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "optim": "adafactor",
    }
    check_optimizer(TrainConfig(output_dir="x", precision="fp32", report_to=[], **right), loaded.model, 10)


def test_the_model_folder_of_the_tests_is_left_as_it_was(model_dir):
    assert not (Path(model_dir) / "adapter_config.json").exists()


def test_processes_on_other_gpus_may_train_together_in_the_same_precision(load_with, monkeypatch):
    """Why a precision was chosen names the GPU."""
    compared: dict = {}
    monkeypatch.setattr("tweetdora.training.check_same", compared.update)
    settings = TrainConfig(output_dir="x", precision="fp32", report_to=[])
    check_processes(load_with()[1], settings, None)
    assert settings.precision_reason and "--precision_reason" not in compared and compared["--precision"] == "fp32"
