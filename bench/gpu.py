"""Check and time on one NVIDIA GPU what `python -m bench` measures on a CPU. So far it has only been run on a CPU.

    python -m bench.gpu --out FOLDER                       # everything, in one call: FOLDER/gpu.json and a table
    python -m bench.gpu --out FOLDER --tiny --device cpu   # a smoke test, in seconds

It needs TRL (requirements-dev.txt) in addition to tweetdora's requirements, but only for TRL's column.

The model has the architecture of OuteAI/Lite-Oute-1-300M-Instruct and random weights, unless --model names a folder.
The rows are random ids with the lengths of the recipe's examples. A step is collation, copy, forward, backward,
clipping and fused AdamW on

    ours    what train.py builds: packed batch, our attention and DoRA layer, base in bf16, adapter in float32
    plain   padded batch, logits of the supervised tokens only, PEFT's DoRA, sdpa, base in bf16
    trl     TRL's SFTTrainer, base in float32 under autocast; trl_bf16: base in bf16 (see bench/sides.py, which is for
            the CPU and needs wandb). If TRL is missing or fails, the table says so

If a part fails, its traceback is recorded and the other parts still run. The exit status is 1 if a part or a check
failed.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch.profiler import profile
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from bench.stats import format_spread, format_table, ratios, spread
from tweetdora.block import write_out
from tweetdora.config import ModelConfig
from tweetdora.device import hardware
from tweetdora.files import write_json
from tweetdora.generation import generate_packed, generate_padded
from tweetdora.modeling import attach_adapter, load_base
from tweetdora.packing import PackedCollator, PaddedCollator
from tweetdora.prompts import IGNORE_INDEX
from tweetdora.provenance import git_state, utc_now

# The shape in the base model's config.json, and a tiny one for the test.
FULL: dict[str, Any] = dict(
    vocab_size=32768, hidden_size=896, intermediate_size=3584, num_hidden_layers=20, num_attention_heads=16
)
TINY: dict[str, Any] = dict(
    vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=16
)
COMMON: dict[str, Any] = dict(
    num_key_value_heads=8, max_position_embeddings=4096, sliding_window=4096, tie_word_embeddings=False
)
PREFIX, OWN_LENGTHS = 46, (20, 60)  # tokens of the system prompt; of a text with its answer and stop token
STOP, WORDS = 2, (5, 6, 7)  # token ids: <|im_end|>, and one for each label
TARGETS = {"k_v": ["k_proj", "v_proj"], "all-linear": ["all-linear"]}
FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = 1e-4  # of ||a - b|| / ||b||: float32 is far below it, TF32 above
GOAL = "<= 20 s"  # 625 steps of 16 examples: the published recipe


@dataclass
class Job:
    """What to measure, on what, and how often."""

    model: str
    scratch: str  # a folder that TRL may write into
    device: str
    vocabulary: int
    steps: int = 625
    batch: int = 16
    block: int = 25  # steps of one side before the next side's turn
    rounds: int = 40  # steps of each adapter method, and repeats of the launches
    prompts: int = 2_000
    generation_batch: int = 128  # evaluate.py's default

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Make examples in the format of tokenize_examples, with random ids that are the same in every run."""
        rng, ids, rows = random.Random(0), range(8, self.vocabulary), []
        prefix = rng.choices(ids, k=PREFIX)
        for example_id in range(count):
            prompt = prefix + rng.choices(ids, k=rng.randint(*OWN_LENGTHS) - 2)
            answer = [rng.choice(WORDS), STOP]
            labels = [IGNORE_INDEX] * len(prompt) + answer
            rows.append({"input_ids": prompt + answer, "labels": labels, "example_id": example_id})
        return rows

    def batches(self, count: int) -> list[list[dict[str, Any]]]:
        """Make `count` training batches."""
        rows = self.rows(count * self.batch)
        return [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]

    def seconds(self, action: Callable[[], Any]) -> float:
        """Time an action, from an idle GPU to an idle GPU."""
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        wait()
        started = time.perf_counter()
        action()
        wait()
        return time.perf_counter() - started

    def load(self, plain: bool, dtype: torch.dtype) -> Any:
        """Load the base as train.py does, or with plain transformers."""
        if not plain:
            return load_base(self.model, None, dtype, torch.device(self.device))
        base: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype, attn_implementation="sdpa")
        return base.to(self.device).eval()

    def adapted(self, kind: str, dtype: torch.dtype, targets: str = "k_v", start: Any = None) -> Any:
        """Build a model with an adapter, copied from the model `start` if given.

        `ours` is our layer on our base; `lora` the same with LoRA; `peft` is PEFT's DoRA on our base; `plain` is
        PEFT's DoRA on transformers' base.
        """
        base = self.load(kind == "plain", dtype)
        torch.manual_seed(42)
        if kind in ("ours", "lora"):
            method: Literal["dora", "lora"] = "dora" if kind == "ours" else "lora"
            config = ModelConfig(model_name_or_path=self.model, target_modules=TARGETS[targets], method=method)
            model = attach_adapter(base, config)
            write_out(model)
        else:
            model = get_peft_model(base, lora_config(targets))
        return (copy_adapter(start, model) if start else model).train()


def lora_config(targets: str) -> LoraConfig:
    """Return the recipe's adapter as a PEFT config."""
    modules = targets if targets == "all-linear" else TARGETS[targets]
    return LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=modules, use_dora=True)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the trainable weights by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def copy_adapter(source: Any, target: Any) -> Any:
    """Copy the adapter of `source` to `target`."""
    if adapter_of(source).keys() != adapter_of(target).keys():
        raise AssertionError("the adapters differ in their names")
    target.load_state_dict(adapter_of(source), strict=False)
    return target


def disturb(model: Any) -> Any:
    """Move the adapter away from its initialization, where it changes nothing and lora_A has no gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in adapter_of(model).values():
            weight += 0.02 * torch.randn_like(weight)
    return model


def loss_and_logits(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute mean loss and logits (K, V), as trainer.supervised_loss_sum does, but that module needs wandb."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "example_ids")}
    logits = model(**inputs, use_cache=False).logits.float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten()), logits


class Side:
    """A model to train, its collator, and its backward pass, which returns the loss of a batch."""

    def __init__(self, job: Job, model: Any, collate: Callable[..., Any], backward: Any = None) -> None:
        self.job, self.model, self.collate, self.backward = job, model, collate, backward or self._backward
        self.weights = list(adapter_of(model).values())
        self.losses: list[torch.Tensor] = []
        self.optimizer = torch.optim.AdamW(self.weights, lr=3e-5, weight_decay=0.0, fused=True)

    def _backward(self, batch: dict[str, Any]) -> torch.Tensor:
        loss, _ = loss_and_logits(self.model, batch)
        loss.backward()
        return loss.detach()

    def on_device(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows and move the batch to the model's device."""
        return send_to_device(dict(self.collate(rows)), self.job.device)

    def _step(self, rows: list[dict[str, Any]]) -> None:
        self.losses.append(self.backward(self.on_device(rows)))
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, rows: list[dict[str, Any]]) -> float:
        """Time one optimizer step."""
        return self.job.seconds(partial(self._step, rows))


def trl_side(job: Job, dtype: torch.dtype, rows: list[dict[str, Any]]) -> Side:
    """Build SFTTrainer on our token ids and completion mask; gradient checkpointing is off, which is faster."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    masks = [[int(label != IGNORE_INDEX) for label in row["labels"]] for row in rows]
    given = [{"input_ids": row["input_ids"], "completion_mask": mask} for row, mask in zip(rows, masks, strict=True)]
    words = models.WordLevel({f"t{token}": token for token in range(job.vocabulary)}, unk_token="t0")
    stop = {"unk_token": "t0", "eos_token": f"t{STOP}", "pad_token": f"t{STOP}"}
    settings: dict[str, Any] = {
        "bf16": True,
        "use_cpu": job.device == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings |= {"gradient_checkpointing": False, "completion_only_loss": True}
    trainer: Any = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype),
        args=SFTConfig(output_dir=job.scratch, **settings),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **stop),
        peft_config=lora_config("k_v"),
    )
    if [row["labels"] for row in trainer.train_dataset.to_list()] != [row["labels"] for row in rows]:
        raise AssertionError("TRL would supervise different tokens from ours")
    model = trainer.accelerator.prepare(trainer.model)  # wraps its forward in autocast, as Trainer.train does

    def backward(batch: dict[str, Any]) -> torch.Tensor:
        """Accumulate the gradients and return the mean loss per supervised token."""
        return trainer.training_step(model, batch, num_items_in_batch=(batch["labels"] != IGNORE_INDEX).sum())

    return Side(job, model, trainer.data_collator, backward)


def check_training(job: Job) -> dict[str, Any]:
    """Compute relative errors of loss, logits and adapter gradients, from packing, our layer, both, and bf16."""
    rows, record = job.rows(job.batch), {}
    packed, padded = (send_to_device(make(rows), job.device) for make in (PackedCollator(), PaddedCollator(STOP)))
    for targets in TARGETS:
        ours = disturb(job.adapted("ours", FP32, targets))
        packed_fp32, padded_fp32 = results(ours, packed), results(ours, padded)
        expected = results(job.adapted("plain", FP32, targets, ours), padded)
        record[targets] = {
            "fp32: ours packed to ours padded": relative_errors(packed_fp32, padded_fp32),
            "fp32: our layer to PEFT's, padded": relative_errors(padded_fp32, expected),
            "fp32: ours to plain": relative_errors(packed_fp32, expected),
        }
        for kind, batch in (("ours", packed), ("plain", padded)):
            rounded = results(job.adapted(kind, BF16, targets, ours), batch)
            record[targets][f"bf16: {kind} to plain in fp32"] = relative_errors(rounded, expected)
    exact = [errors.values() for kinds in record.values() for name, errors in kinds.items() if "fp32:" in name]
    return {"errors": record, "passed": all(error < TOLERANCE for errors in exact for error in errors)}


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradient of every adapter weight, after a backward pass."""
    return {name: weight.grad for name, weight in adapter_of(model).items() if weight.grad is not None}


def results(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Compute the loss, the logits and the gradient of every adapter weight."""
    loss, logits = loss_and_logits(model, batch)
    loss.backward()
    gradients = gradients_of(model)
    model.zero_grad()
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients}


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Compute ||a - b|| / ||b|| of each tensor."""
    return {name: ((actual[name] - wanted).norm() / wanted.norm()).item() for name, wanted in expected.items()}


def measure_training(job: Job) -> dict[str, Any]:
    """Time the sides' steps in alternating blocks, and measure each side's peak memory, including its model."""
    batches = job.batches(job.steps)
    makers = {
        "ours": lambda: Side(job, job.adapted("ours", BF16), PackedCollator()),
        "plain": lambda: Side(job, job.adapted("plain", BF16), PaddedCollator(STOP)),
        "trl": lambda: trl_side(job, FP32, batches[0]),
        "trl_bf16": lambda: trl_side(job, BF16, batches[0]),
    }
    sides, memory, left_out = {}, {}, {}
    for name, make in makers.items():
        if "trl" in name and not importlib.util.find_spec("trl"):
            left_out[name] = "TRL is not installed"
            continue
        try:
            sides[name], memory[name] = with_peak_memory(job, make, batches[:3])
        except Exception:  # recorded; an incompatible TRL must not cost the other sides
            if "trl" not in name:
                raise
            left_out[name] = traceback.format_exc()
    for side in sides.values():  # all start from the same adapter, warmed up
        copy_adapter(sides["ours"].model, side.model)
        side.losses.clear()
    seconds = in_turn(sides, batches, job.block)
    losses = {name: [loss.item() for loss in side.losses] for name, side in sides.items()}
    return {"seconds": seconds, "losses": losses, "peak_bytes": memory, "left_out": left_out}


def with_peak_memory(job: Job, make: Callable[[], Side], batches: list[Any]) -> tuple[Side, int | None]:
    """Build a side, do a few steps, and measure the GPU memory in bytes that it added at its peak; None on a CPU."""
    gc.collect()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    side = make()
    for rows in batches:
        side.step(rows)
    return side, torch.cuda.max_memory_allocated() - before if job.device == "cuda" else None


def in_turn(sides: dict[str, Side], batches: list[Any], block: int) -> dict[str, list[float]]:
    """Time each side's steps on the same batches; the sides take turns after each block."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for start in range(0, len(batches), block):
        for name, side in sides.items():
            seconds[name] += [side.step(rows) for rows in batches[start : start + block]]
    return seconds


def measure_methods(job: Job) -> dict[str, dict[str, list[float]]]:
    """Time steps on packed batches with our DoRA, our LoRA, both with layers as one function, and PEFT's DoRA."""
    batches, record = job.batches(job.rounds + 3), {}
    for targets in TARGETS:
        sides = {k: Side(job, job.adapted(k, BF16, targets), PackedCollator()) for k in ("ours", "peft", "lora")}
        record[targets] = {name: seconds[3:] for name, seconds in in_turn(sides, batches, 1).items()}
    return record


def measure_answers(job: Job) -> dict[str, Any]:
    """Compare answers in float32, with a disturbed adapter and rows that stop at different tokens; then time bf16.

    A tuned model writes two tokens, the word and the stop token. Random weights never stop, so max_new_tokens sets the
    count.
    """
    prompts = sorted((row["input_ids"][:-2] for row in job.rows(job.prompts)), key=len, reverse=True)
    batches = [prompts[start : start + job.generation_batch] for start in range(0, len(prompts), job.generation_batch)]
    ours = disturb(job.adapted("ours", FP32))
    plain = job.adapted("plain", FP32, start=ours).eval().get_base_model()
    stop_ids = list(range(STOP, job.vocabulary, 8))
    own = generate_packed(ours.eval().get_base_model(), batches[0], stop_ids, 16)
    others = generate_padded(plain, batches[0], stop_ids, 16)
    # Our answers end with the stop token; generate() pads after it.
    same = [answer + [STOP] * (len(other) - len(answer)) == other for answer, other in zip(own, others, strict=True)]
    record: dict[str, Any] = {"passed": all(same), "same": sum(same), "of": len(same), "lengths": [*map(len, own)]}
    ways = {"ours": partial(generate_packed, job.load(False, BF16))}
    ways["plain"] = partial(generate_padded, job.load(True, BF16))
    for count in (2, 16):
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for batch in [batches[0], *batches]:
            for name, way in ways.items():
                seconds[name].append(job.seconds(partial(way, batch, [STOP], count)))
        record[f"{count} new tokens"] = {name: values[1:] for name, values in seconds.items()}
    return record | {"prompts": [len(batch) for batch in batches]}


def measure_launches(job: Job) -> dict[str, Any]:
    """Measure how long the GPU computes during our step, and the time of forward and backward as a CUDA graph."""
    side, rows = Side(job, job.adapted("ours", BF16), PackedCollator()), job.rows(job.batch)
    seconds = [side.step(rows) for _ in range(3 + job.rounds)][3:]
    for _ in range(2):  # the first one warms up the profiler
        with profile() as profiler:  # of the CPU, and of the GPU if there is one
            side.step(rows)
    found = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    found = [
        event for event in found if not event.is_user_annotation
    ]  # drops spans over kernels, which are counted themselves
    kernels = [{"name": e.key[:120], "count": e.count, "seconds": e.self_device_time_total / 1e6} for e in found]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    record = {
        "step_seconds": seconds,
        "kernels": sum(kernel["count"] for kernel in kernels),
        "kernel_seconds": sum(kernel["seconds"] for kernel in kernels),
        "longest_kernels": kernels[:25],
    }
    try:
        return record | {"graph": replay(job, side, side.on_device(rows))}
    except (RuntimeError, AssertionError) as error:  # an operation that cannot be captured, or no GPU
        return record | {"graph": {"error": f"{type(error).__name__}: {error}"}}


def replay(job: Job, side: Side, batch: dict[str, Any]) -> dict[str, Any]:
    """Time forward and backward on one batch, eagerly and as a CUDA graph, and compute the graph's errors."""

    def once() -> torch.Tensor:
        """Do a forward and backward pass, starting without gradients."""
        side.optimizer.zero_grad()  # to None: the captured pass allocates its gradients in the graph's own memory
        return side.backward(batch)

    stream = torch.cuda.Stream()  # capture needs a warmed-up side stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [job.seconds(once) for _ in range(3 + job.rounds)][3:]
        expected = {"loss": once(), **{name: gradient.clone() for name, gradient in gradients_of(side.model).items()}}
    torch.cuda.current_stream().wait_stream(stream)
    side.optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = side.backward(batch)
    replayed = [job.seconds(graph.replay) for _ in range(3 + job.rounds)][3:]
    actual = {"loss": loss, **gradients_of(side.model)}
    return {"eager_seconds": eager, "replay_seconds": replayed, "errors": relative_errors(actual, expected)}


PARTS = {
    "correctness": check_training,
    "training": measure_training,
    "methods": measure_methods,
    "answers": measure_answers,
    "launches": measure_launches,  # last: a failed capture may leave the GPU's context broken
}


def table(parts: dict[str, Any]) -> str:
    """Format the numbers of the parts that ran, next to their goals or what they are compared with."""
    lines = [[f"{name} FAILED", part["error"].splitlines()[-1], ""] for name, part in parts.items() if "error" in part]
    parts = {name: part for name, part in parts.items() if "error" not in part}
    for targets, kinds in parts.get("correctness", {"errors": {}})["errors"].items():
        for name, errors in kinds.items():
            goal = f"< {TOLERANCE}" if "fp32:" in name else "the rounding"
            lines.append([f"{targets}, {name}: largest error of {len(errors)}", f"{max(errors.values()):.1e}", goal])
    if training := parts.get("training"):
        ours = training["seconds"]["ours"]
        for name, seconds in training["seconds"].items():
            goal = GOAL if name == "ours" else f"{ratios(seconds, ours)['median']:.2f} x ours"
            lines.append([f"{name}: {len(seconds)} steps together", f"{sum(seconds):.1f} s", goal])
            lines.append([f"{name}: a step", format_spread(spread(seconds), "s"), ""])
            peak = training["peak_bytes"][name]
            lines.append([f"{name}: peak GPU memory", f"{peak / 2**30:.2f} GiB" if peak else "no GPU", ""])
        lines += [[f"{name}: left out", why.splitlines()[-1][:80], ""] for name, why in training["left_out"].items()]
    for targets, seconds in parts.get("methods", {}).items():
        for other, name in (("peft", "PEFT's DoRA"), ("lora", "our LoRA")):
            found = format_spread(ratios(seconds["ours"], seconds[other]))
            lines.append([f"{targets}: step of our DoRA / step of {name}", found, ""])
    if answers := parts.get("answers"):
        lines.append(["answers equal to generate's, fp32", f"{answers['same']} of {answers['of']}", "all"])
        for count in (name for name in answers if name.endswith("new tokens")):
            rates = {way: sum(answers["prompts"]) / sum(seconds) for way, seconds in answers[count].items()}
            lines.append([f"{count}: tweets/s, ours", f"{rates['ours']:,.0f}", f"generate {rates['plain']:,.0f}"])
    if launches := parts.get("launches"):
        step, graph = spread(launches["step_seconds"])["median"], launches["graph"]
        busy = f"{launches['kernels']} kernels, {launches['kernel_seconds']:.4f} s of {step:.4f} s"
        lines.append(["GPU time of our step", busy, "the rest waits for launches"])
        text = graph.get("error", "").splitlines()[:1]
        if not text:
            eager, replayed = (spread(graph[name])["median"] for name in ("eager_seconds", "replay_seconds"))
            text = [f"{replayed:.4f} s vs {eager:.4f} s; 625 steps in {625 * (step - eager + replayed):.1f} s at best"]
        lines.append(["forward and backward as a CUDA graph", text[0][:100], "an upper bound on the gain from graphs"])
    return format_table(["what", "measured", "goal, or compared with"], lines)


def describe(job: Job) -> dict[str, Any]:
    """Collect versions, hardware and code; environment() would require packages that may be missing here."""
    wanted = ("torch", "transformers", "peft", "accelerate", "tokenizers", "datasets", "trl", "triton")
    counts = {name: value for name, value in asdict(job).items() if isinstance(value, int)}
    facts: dict[str, Any] = {"created": utc_now(), "job": counts}
    versions = {name: [item.version for item in importlib.metadata.distributions(name=name)][:1] for name in wanted}
    facts |= {"packages": {name: found[0] if found else None for name, found in versions.items()}}
    git = git_state()
    facts |= {"cuda": torch.version.cuda, "tolerance": TOLERANCE, "goal": GOAL}
    return facts | {
        "hardware": asdict(hardware()),
        "git": git and asdict(git),
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def main(argv: list[str] | None = None) -> int:
    """Run the parts, write the record after each, and return the exit status."""
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, metavar="FOLDER", help="Folder for gpu.json.")
    parser.add_argument("--model", metavar="FOLDER", help="Model folder (default: random weights).")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="Smoke test: a tiny model and few steps.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no NVIDIA GPU; to try the program without one, use --tiny --device cpu.")
    torch.set_float32_matmul_precision("highest")  # no TF32: torch's default, made explicit
    torch.backends.cudnn.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        shape = TINY if options.tiny else FULL
        # Wider than the usual 0.02, with which answers would depend on the last token alone and hide attention errors.
        config = MistralConfig(**shape, **COMMON, initializer_range=shape["hidden_size"] ** -0.5)
        if not options.model:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=FP32).save_pretrained(folder)
        vocabulary = AutoConfig.from_pretrained(options.model).vocab_size if options.model else config.vocab_size
        counts = dict(steps=4, batch=4, block=2, rounds=2, prompts=12, generation_batch=6) if options.tiny else {}
        job = Job(options.model or folder, folder, options.device, vocabulary, **counts)
        record = describe(job) | {"model": options.model or "random weights", "parts": {}}
        for name in options.only:
            print(f"{utc_now()} {name}", file=sys.stderr, flush=True)
            try:
                record["parts"][name] = PARTS[name](job)
            except Exception:  # recorded; the other parts' time on the GPU must not be lost
                record["parts"][name] = {"error": traceback.format_exc(), "passed": False}
            write_json(os.path.join(options.out, "gpu.json"), record)
    print(table(record["parts"]))
    return 0 if all(part.get("passed", True) for part in record["parts"].values()) else 1


if __name__ == "__main__":
    disable_progress_bar()
    sys.exit(main())
