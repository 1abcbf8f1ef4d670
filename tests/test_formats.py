"""GGUF and ONNX: the real small model through train, evaluate and push, and its files in the engines they are for."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tweetdora import conversions, extras, to_gguf, to_onnx
from tweetdora.build import Outputs
from tweetdora.config import PushConfig
from tweetdora.conversions import check_conversions, check_gguf, convert, format_conversions
from tweetdora.errors import InputError, VerificationError
from tweetdora.leaks import check_contents
from tweetdora.records import Conversion, PromptFormat

ROOT = Path(__file__).resolve().parent.parent
CONVERTER = ROOT / ".llama.cpp"
CHATML = PromptFormat(
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    ["good<|im_end|>", "bad<|im_end|>"],
    "<|im_end|>",
    False,
)
needs_converter = pytest.mark.skipif(
    not (CONVERTER / to_gguf.CONVERTER).is_file(), reason="`make .llama.cpp` fetches the converter"
)


# The Modelfile


def modelfile(prompt_format: PromptFormat, system_prompt: str = "Be brief.", added_bos: str = "") -> str:
    return to_gguf.modelfile("m-Q8_0.gguf", prompt_format, system_prompt, 4, added_bos)


def test_the_modelfile_spells_the_prompt_that_the_model_was_trained_with():
    assert modelfile(CHATML) == (
        "FROM ./m-Q8_0.gguf\n"
        'SYSTEM """Be brief."""\n'
        'TEMPLATE """<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n'
        '<|im_start|>assistant\n"""\n'
        "PARAMETER temperature 0\n"
        "PARAMETER num_predict 4\n"
        'PARAMETER stop """<|im_end|>"""\n'
    )


def test_a_template_that_rewrites_the_system_prompt_is_spelled_out_whole():
    upper = dataclasses.replace(CHATML, head="<s>BE BRIEF.\n\n")
    assert 'TEMPLATE """<s>BE BRIEF.\n\n{{ .Prompt }}<|im_end|>' in modelfile(upper)


def test_what_the_engine_puts_before_every_prompt_is_not_spelled_twice():
    begun = dataclasses.replace(CHATML, head="<s><|im_start|>user\n")
    assert 'TEMPLATE """<|im_start|>user\n{{ .Prompt }}' in modelfile(begun, added_bos="<s>")
    assert 'TEMPLATE """<s><|im_start|>user\n{{ .Prompt }}' in modelfile(begun)


def test_braces_in_a_prompt_are_text_to_gos_templates():
    braces = dataclasses.replace(CHATML, head="Answer as {{label}}.\n")
    assert '"""Answer as {{ "{{" }}label}}.\n{{ .Prompt }}' in modelfile(braces, "Answer as {{label}}!")


def test_a_prompt_that_a_modelfile_cannot_hold_is_refused_before_any_work(prompt_tokenizer):
    check_gguf(prompt_tokenizer, "Be brief.", ["a good day"])
    with pytest.raises(InputError, match='the prompt holds """'):
        check_gguf(prompt_tokenizer, 'Say """yes""".', ["a good day"])


def test_examples_of_which_none_can_be_compared_are_refused_before_any_work(prompt_tokenizer):
    check_gguf(prompt_tokenizer, "Be brief.", ["<|im_end|>", "bad " * 4_000, "a good day"])
    with pytest.raises(InputError, match="--gguf: all examples spell special tokens or are truncated"):
        check_gguf(prompt_tokenizer, "Be brief.", ["<|im_end|>", "bad " * 4_000])


# What is missing is said before any work


def refused(**flags: Any) -> str:
    with pytest.raises(InputError) as caught:
        check_conversions(PushConfig(**flags), flags.pop("architecture", "LlamaForCausalLM"))
    return str(caught.value)


def test_a_missing_converter_is_named_with_the_command_that_fetches_it(tmp_path):
    assert refused(gguf="q8_0", llama_cpp=str(tmp_path)) == (
        f"--gguf needs llama.cpp's converter, but {tmp_path}/convert_hf_to_gguf.py does not exist. Fetch it with "
        "`make .llama.cpp`, or name a checkout of llama.cpp with --llama_cpp (git clone --depth 1 "
        "https://github.com/ggml-org/llama.cpp)."
    )


@pytest.mark.parametrize(
    ("flags", "flag", "missing"), [({"gguf": "f16"}, "gguf", "xllamacpp"), ({"onnx": True}, "onnx", "onnxruntime")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, flags, flag, missing):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == missing else name)
    assert refused(**flags) == (
        f"--{flag} needs packages that are not installed ({missing}). Install them with pip install -r "
        f"requirements-{flag}.txt, or pip install tweetdora[{flag}]."
    )


@needs_converter
@pytest.mark.parametrize("flags", [{"gguf": "q8_0", "llama_cpp": str(CONVERTER)}, {"onnx": True}])
def test_an_architecture_that_the_converter_does_not_know_is_refused(flags):
    check_conversions(PushConfig(**flags), "LlamaForCausalLM")
    with pytest.raises(InputError, match=r"does not support LamaForCausalLM\. Leave --(gguf|onnx) out\."):
        check_conversions(PushConfig(**flags), "LamaForCausalLM")


def test_a_converter_that_does_not_run_is_no_converter(tmp_path):
    (tmp_path / to_gguf.CONVERTER).write_text("raise SystemExit('no module named torch')")
    assert refused(gguf="q8_0", llama_cpp=str(tmp_path)) == (
        f"{tmp_path}/convert_hf_to_gguf.py does not run here: no module named torch"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"create_pr": True}, "--space cannot be combined with --create_pr or --revision"),
        ({"revision": "next"}, "--space cannot be combined with --create_pr or --revision"),
        ({"private": True}, "--space cannot be combined with --private true: the page has no token"),
    ],
)
def test_a_page_is_for_what_everybody_can_load(flags, message):
    with pytest.raises(InputError, match=message):
        PushConfig(space="me/page", **flags)


@pytest.mark.parametrize("flags", [{"gguf": "f16"}, {"onnx": True}])
def test_an_adapter_alone_has_no_other_format(flags):
    with pytest.raises(InputError, match="leave --gguf and --onnx out"):
        PushConfig(adapter_only=True, **flags)


# The real small model


@needs_converter
def test_every_format_answers_as_the_published_model_does(small_run):
    run, said = small_run
    found = {line.split(":")[0]: line for line in said.splitlines() if " answers equal in " in line}
    assert list(found) == ["GGUF q8_0", "ONNX float32", "ONNX int8"]
    equal = {name: int(line.split(", ")[1].split(" of ")[0]) for name, line in found.items()}
    assert "12 of 12 answers equal in onnxruntime" in found["ONNX float32"]
    assert min(equal.values()) >= 11, found
    card = (run / "publish/README.md").read_text()
    for name, line in found.items():
        assert line.split(", ", 1)[1].replace(" in ", ", in ") in card, name
    assert "| Ollama | `ollama create small -f Modelfile`; the file contains the prompt | no |" in card


@needs_converter
def test_the_folder_holds_what_the_engines_look_for(small_run):
    run, _ = small_run
    folder = run / "publish"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"small-Q8_0.gguf", "Modelfile", "onnx/model.onnx", "onnx/model.onnx_data"} < names
    assert {"onnx/model_quantized.onnx", "onnx/model_quantized.onnx_data"} < names
    assert [name for name in names if "tmp" in name or name.startswith("onnx/") and "onnx" not in name[5:]] == []
    config = json.loads((folder / "config.json").read_text())
    files = ("model.onnx", "model_quantized.onnx")
    assert config["transformers.js_config"]["use_external_data_format"] == dict.fromkeys(files, 1)
    assert (folder / "small-Q8_0.gguf").stat().st_size < 0.3 * (folder / "model.safetensors").stat().st_size
    check_contents(str(folder), None)


def test_a_secret_in_a_gguf_file_is_found(tmp_path):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_description("hf_" + "a" * 34)
    writer.add_tensor("weight", torch.zeros(2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="m.gguf, line .*, holds a Hugging Face token"):
        check_contents(str(tmp_path), None)


# A conversion that answers otherwise


@pytest.fixture
def reference(prompt_tokenizer, task) -> Any:
    """A stand-in with three examples and the published model's answers."""
    from tweetdora.build import Reference
    from tweetdora.data import make_examples

    examples = make_examples(["a good day", "a bad day", "news"], [0, 1, 2])
    outputs = Outputs([torch.zeros(4)] * 3, ["positive", "negative", "neutral"])
    return Reference(examples, task, prompt_tokenizer, 4, False, outputs)


def converted(folder: Path, config: PushConfig, reference: Any) -> list[Conversion]:
    """What convert found; raises what it says that went wrong."""
    found, failure = convert(str(folder), "m", config, reference)
    if failure is not None:
        raise failure
    return found


def write_a_file(folder: str, *_: Any) -> str:
    Path(folder, "m-F16.gguf").touch()
    return "m-F16.gguf"


@pytest.mark.parametrize(("answers", "fine"), [(["positive", "negative", "neutral "], True), (["x"] * 3, False)])
def test_a_gguf_file_that_answers_otherwise_is_not_published(monkeypatch, tmp_path, reference, answers, fine):
    monkeypatch.setattr(conversions, "write_gguf", write_a_file)
    answered = to_gguf.Answered(answers, "llama.cpp", adds_bos=False)
    monkeypatch.setattr(conversions, "answer_by_llama_cpp", lambda *given: answered)
    config = PushConfig(gguf="f16")
    if fine:
        assert converted(tmp_path, config, reference) == [Conversion("GGUF f16", "m-F16.gguf", "llama.cpp", 3, 3)]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["Modelfile", "m-F16.gguf"]
    else:
        with pytest.raises(VerificationError, match=r"m-F16\.gguf answers differently .*: 0 of 3 answers"):
            converted(tmp_path, config, reference)
        assert list(tmp_path.iterdir()) == [], "nothing of a format that failed"


def test_a_format_that_fails_takes_neither_the_merged_model_nor_the_other_format(monkeypatch, tmp_path, reference):
    def fail(folder: str) -> None:
        Path(folder, "onnx").mkdir()
        Path(folder, "onnx/model.onnx").touch()
        raise RuntimeError("an engine's own error")

    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(conversions, "write_gguf", write_a_file)
    answered = to_gguf.Answered(["positive", "negative", "neutral"], "llama.cpp", adds_bos=False)
    monkeypatch.setattr(conversions, "answer_by_llama_cpp", lambda *given: answered)
    monkeypatch.setattr(conversions, "write_onnx", fail)
    found, failure = convert(str(tmp_path), "m", PushConfig(gguf="f16", onnx=True), reference)
    assert [one.format for one in found] == ["GGUF f16"] and str(failure) == "an engine's own error"
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["Modelfile", "m-F16.gguf", "model.safetensors"]


@pytest.mark.parametrize(("shift", "fine"), [(1e-3, True), (0.1, False), (float("nan"), False)])
def test_float32_onnx_has_the_published_models_logits(monkeypatch, tmp_path, reference, shift, fine):
    words = ["positive", "negative", "neutral"]
    ids = [reference.prompt_tokenizer.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    logits = [torch.full((4,), shift).numpy()] * 3
    monkeypatch.setattr(conversions, "write_onnx", lambda folder: None)
    monkeypatch.setattr(conversions, "declare_onnx", lambda folder: None)
    monkeypatch.setattr(conversions, "answer_by_onnxruntime", lambda *given: ("onnxruntime", ids, logits))
    if fine:
        found = converted(tmp_path, PushConfig(onnx=True), reference)
        assert format_conversions(found) == (
            "ONNX float32: onnx/model.onnx, 3 of 3 answers equal in onnxruntime\n"
            "ONNX int8: onnx/model_quantized.onnx, 3 of 3 answers equal in onnxruntime\n"
        )
    else:
        with pytest.raises(VerificationError, match="onnx/model.onnx does not match the merged model"):
            converted(tmp_path, PushConfig(onnx=True), reference)


def test_logits_of_a_model_in_half_a_precision_may_be_rounded(monkeypatch, tmp_path, reference):
    words = ["positive", "negative", "neutral"]
    ids = [reference.prompt_tokenizer.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    monkeypatch.setattr(conversions, "write_onnx", lambda folder: None)
    monkeypatch.setattr(conversions, "declare_onnx", lambda folder: None)
    for shift, fine in ((0.1, True), (float("nan"), False)):
        logits = [torch.full((4,), shift).numpy()] * 3
        given = ("onnxruntime", ids, logits)
        monkeypatch.setattr(conversions, "answer_by_onnxruntime", lambda *_, given=given: given)
        if fine:
            assert len(converted(tmp_path, PushConfig(onnx=True, dtype="bfloat16"), reference)) == 2
        else:
            with pytest.raises(VerificationError, match="does not match the merged model"):
                converted(tmp_path, PushConfig(onnx=True, dtype="bfloat16"), reference)


def test_a_truncated_text_is_not_compared_in_llama_cpp(monkeypatch, tmp_path, reference):
    examples = dataclasses.replace(reference.examples, texts=["a good day", "bad " * 4_000, "news"])
    monkeypatch.setattr(conversions, "write_gguf", write_a_file)
    asked: list[Any] = []
    monkeypatch.setattr(
        conversions,
        "answer_by_llama_cpp",
        lambda path, texts, *_: asked.append(texts) or to_gguf.Answered(["positive", "neutral"], "x", False),
    )
    found = converted(tmp_path, PushConfig(gguf="f16"), dataclasses.replace(reference, examples=examples))
    assert found[0].num_examples == 2 and [one[-1]["content"] for one in asked[0]] == ["a good day", "news"]


def test_a_failing_builder_is_said(monkeypatch, tmp_path):
    shutil.copy(ROOT / "assets/SmolLM2-135M-Instruct/config.json", tmp_path)  # no weights
    with pytest.raises(VerificationError, match="onnxruntime-genai's builder failed: "):
        to_onnx.write_onnx(str(tmp_path))


@needs_converter
def test_a_failing_converter_is_said(tmp_path):
    shutil.copy(ROOT / "assets/SmolLM2-135M-Instruct/config.json", tmp_path)
    with pytest.raises(VerificationError, match="llama.cpp's converter failed: "):
        to_gguf.write_gguf(str(tmp_path), "m", "q8_0", str(CONVERTER))
