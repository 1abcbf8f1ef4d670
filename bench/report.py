"""Format a record as a table; a row holds what was measured, our number, the other's, and their ratio."""

from collections.abc import Sequence
from typing import Any

from bench.record import BenchPart
from bench.settings import Settings
from bench.stats import format_spread, format_table, ratios, spread

HEADER = ("what", "ours", "other", "other / ours")


def table(parts: dict[str, BenchPart]) -> str:
    """Format all parts of a record as one table of medians, with quartiles in brackets."""
    rows: list[Sequence[str]] = []
    for name, lines in _LINES.items():
        if name in parts:
            part = parts[name]
            rows += lines(part.samples, part.settings)
            if part.stolen_share is not None:
                rows.append([f"cores' time that the host took, {name}", f"{part.stolen_share:.1%}", "", ""])
    return format_table(HEADER, rows)


def _seconds_row(what: str, ours: Sequence[float], other: Sequence[float]) -> list[str]:
    cells = [format_spread(spread(seconds), "s") for seconds in (ours, other)]
    return [what, *cells, format_spread(ratios(other, ours))]


def _training(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for precision, sample in samples.items():
        ours, trl = sample["our_seconds"], sample["trl_seconds"]
        rows.append(_seconds_row(f"training step, {precision}, TRL ({sample['trl_kind']})", ours, trl))
        apart = max(abs(a - b) for a, b in zip(sample["our_losses"], sample["trl_losses"], strict=True))
        steps = len(sample["our_losses"])
        rows.append([f"largest difference of the loss, {precision}, {steps} steps", f"{apart:.1e}", "", ""])
        share = [
            sum(operations.values()) / seconds / rate
            for operations, seconds, rate in zip(
                sample["operations"], ours, sample["gemm_operations_per_second"], strict=True
            )
        ]
        rate = spread([rate / 1e9 for rate in sample["gemm_operations_per_second"]])
        rows.append([f"share of the GEMM rate, {precision}", format_spread(spread(share)), "", ""])
        rows.append([f"GEMM rate, {precision}", "", format_spread(rate, "Gop/s"), ""])
        steps = -(-settings.train_examples // settings.batch_size)
        minutes = [f"{spread(seconds)['median'] * steps / 60:.1f} min" for seconds in (ours, trl)]
        rows.append([f"projected: {steps} steps, {precision}", *minutes, ""])
    return rows


def _memory(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for variant, sample in samples.items():
        precision, side = variant.split(":")
        if side == "ours":
            continue
        for key, what in (("peak_bytes", "peak memory"), ("growth_bytes", "memory beyond the loaded model")):
            ours, other = samples[f"{precision}:ours"][key], sample[key]
            cells = [f"{size / 1e9:.2f} GB" for size in (ours, other)]
            rows.append([f"{what}, {precision}, TRL ({side})", *cells, f"{other / ours:.2f}"])
    return rows


def _documented(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    return [
        _seconds_row(f"training step, {precision}, TRL as documented", sample["ours"], sample["trl"])
        for precision, sample in samples.items()
    ]


def _axolotl(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    sample = samples["all"]
    ours, other = (spread(sample[f"{side}_seconds"]) for side in ("ours", "axolotl"))
    ratio = f"{other['median'] / ours['median']:.2f}"
    pairs = [*zip(sample["ours_losses"], sample["axolotl_losses"], strict=True)]
    apart = max(abs(ours - other) for ours, other in pairs)
    return [
        ["training step, fp32, axolotl, as processes", format_spread(ours, "s"), format_spread(other, "s"), ratio],
        [f"largest difference of the logged loss, axolotl, {len(pairs)} steps", f"{apart:.1e}", "", ""],
    ]


def _methods(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for variant, sample in samples.items():
        precision, targets = variant.split(":")
        ratio = {side: ratios(sample[f"{side}_dora"], sample[f"{side}_lora"]) for side in ("ours", "peft")}
        cells = [format_spread(ratio[side]) for side in ("ours", "peft")]
        rows.append([f"DoRA step / LoRA step, {targets}, {precision}, PEFT", *cells, ""])
        rows.append(_seconds_row(f"DoRA step, {targets}, {precision}, PEFT", sample["ours_dora"], sample["peft_dora"]))
    return rows


def _prompts(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for precision, sample in samples.items():
        for length in (1, 2, 4):
            ours, trl = sample[f"ours_{length}_seconds"], sample[f"trl_{length}_seconds"]
            rows.append(_seconds_row(f"step with {length} x the prompt, {precision}, TRL", ours, trl))
            if length == 1:
                continue
            cells = [
                format_spread(ratios(sample[f"{side}_{length}_seconds"], sample[f"{side}_1_seconds"]))
                for side in ("ours", "trl")
            ]
            rows.append([f"step with {length} x the prompt / ordinary step, {precision}, TRL", *cells, ""])
    return rows


def _generation(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    sample, rows = samples["all"], []
    for name in ("base_fp32", "base_bf16", "tuned_fp32", "tuned_bf16"):
        found = sample[name]
        speeds = [
            spread([count / seconds for count, seconds in zip(found["num_examples"], found[key], strict=True)])
            for key in ("our_seconds", "plain_seconds")
        ]
        model, precision = name.split("_")
        rows.append(
            [
                f"answers, {model} model, {precision}, generate",
                *(format_spread(speed, "samples/s") for speed in speeds),
                format_spread(ratios(found["plain_seconds"], found["our_seconds"])),
            ]
        )
        equal = f"{found['same_tokens']} of {sum(found['num_examples'])}"
        rows.append([f"answers equal token for token, {model}, {precision}", equal, "", ""])
    done = sample["validation"]
    rows.append([f"{done['num_examples']:,} validation examples, tuned, bf16", f"{done['seconds']:.1f} s", "", ""])
    return rows


def _prediction(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for precision, sample in samples.items():
        count = sample["num_examples"]
        speeds = {
            name: format_spread(spread([count / seconds for seconds in sample[f"{name}_seconds"]]), "samples/s")
            for name in ("scores", "generation", "pipeline")
        }
        size = sample["pipeline_batch"]
        for other, what in (("generation", "generated"), ("pipeline", f"pipeline, batches of {size}")):
            ratio = format_spread(ratios(sample[f"{other}_seconds"], sample["scores_seconds"]))
            name = f"classified by likelihood, tuned, {precision}; {what}"
            rows.append([name, speeds["scores"], speeds[other], ratio])
        equal = f"{sample['equal_to_generation']} of {sample['exact']}"
        rows.append([f"labels equal to exact generations, tuned, {precision}", equal, "", ""])
    return rows


def _launches(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    rows = []
    for precision, sample in samples.items():
        ours = sum(sample["ours"].values())
        for kind, found in sample.items():
            if kind != "ours":
                other = sum(found.values())
                what = f"operations of a step that are no views, {precision}, TRL ({kind})"
                rows.append([what, f"{ours:,}", f"{other:,}", f"{other / ours:.2f}"])
    return rows


def _launch(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    sample, what = samples["all"], f"accelerate launch to the first step, {settings.train_examples:,} examples"
    rows = [[what, f"{sample['runs'][-1]['to_first_step']:.1f} s", "", ""]]
    names = ("launcher", "imports", "data_tokens_and_model", "trainer_and_first_step")
    return rows + [[f"    of it {name.replace('_', ' ')}", f"{sample['spent'][name]:.1f} s", "", ""] for name in names]


def _saving(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    sample = samples["all"]
    cells = [format_spread(spread(sample[f"{what}_seconds"]), "s") for what in ("save", "step")]
    share = format_spread(ratios(sample["save_seconds"], sample["step_seconds"]))
    return [
        [f"saving a checkpoint of {sample['checkpoint_bytes'] / 1e6:.1f} MB, next to a bf16 step", *cells, ""],
        ["    save / step", share, "", ""],
    ]


def _full(samples: dict[str, Any], settings: Settings) -> list[list[str]]:
    sample = samples["all"]
    return [[f"the published recipe, bf16, {sample['steps']} steps", f"{sample['seconds'] / 60:.1f} min", "", ""]]


_LINES = {
    "training": _training,
    "memory": _memory,
    "documented": _documented,
    "axolotl": _axolotl,
    "methods": _methods,
    "prompts": _prompts,
    "generation": _generation,
    "prediction": _prediction,
    "launches": _launches,
    "saving": _saving,
    "launch": _launch,
    "full": _full,
}
