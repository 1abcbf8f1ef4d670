"""The two sides of a measurement, with one interface: `step(rows)` trains on tokenized rows and returns the mean loss.

ours: what train.py builds: packed batch, our attention and DoRA layer, base in the compute precision.

trl: TRL's SFTTrainer with PEFT's DoRA. It gets our token ids, with a completion mask on the answer and its stop token,
so both sides supervise the same tokens. With its own tokenization it would supervise more: the line end that the
ChatML template writes after the stop token (given prompt and completion as messages), or every token of the
conversation (given messages only). bf16 is tried in both of TRL's forms: `trl` has the base in float32 under autocast,
its default; `trl_bf16` has it in bf16. Both are without gradient checkpointing, which TRL has on by default, because
they are faster so. `trl_documented` is what its documentation shows: `trl` with gradient checkpointing.

A step of TRL is collator, SFTTrainer.training_step, clipping and optimizer. The rest of Trainer's loop (logs,
callbacks, data loader) is left out on both sides. On a CPU, SFTTrainer 1.16 computes the logits of every token; where
it has Triton, it leaves the unsupervised ones out. Both sides use the thread settings that importing tweetdora makes
(GOMP_SPINCOUNT), so the time that these save on a busy machine does not show in the ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from bench.settings import Settings
from tweetdora.block import write_out
from tweetdora.config import ModelConfig
from tweetdora.modeling import DTYPES, attach_adapter, load_base, load_tokenizer
from tweetdora.packing import PackedCollator
from tweetdora.prompts import IGNORE_INDEX
from tweetdora.trainer import supervised_loss_sum

CPU = torch.device("cpu")


@dataclass
class Side:
    """A model to train, its collator, and its forward and backward pass, which returns the mean loss of a batch."""

    model: torch.nn.Module
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    forward_and_backward: Callable[[dict[str, Any]], float]
    learning_rate: float = 3e-5

    def __post_init__(self) -> None:
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        # The Trainer's default optimizer, as in train.py.
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.learning_rate, weight_decay=0.0, fused=True)

    def step(self, rows: Sequence[dict[str, Any]]) -> float:
        """Do one optimizer step, including collation, and return the mean loss per supervised token."""
        loss = self.forward_and_backward(self.collate(rows))
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def our_side(settings: Settings, precision: str, learning_rate: float = 3e-5) -> Side:
    """Build base and adapter as train.py does, on packed batches."""
    base = load_base(settings.model, None, DTYPES[precision], CPU)
    torch.manual_seed(42)
    model = attach_adapter(base, ModelConfig(model_name_or_path=settings.model))
    write_out(model)
    return packed_side(model, learning_rate)


def packed_side(model: torch.nn.Module, learning_rate: float = 3e-5) -> Side:
    """Train any adapter model on packed batches."""

    def forward_and_backward(batch: dict[str, Any]) -> float:
        """Accumulate the gradients and return the mean loss per supervised token."""
        loss = supervised_loss_sum(model, batch) / batch["labels"].numel()
        loss.backward()
        return loss.item()

    return Side(model.train(), PackedCollator(), forward_and_backward, learning_rate)


def trl_side(settings: Settings, precision: str, rows: list[dict[str, Any]], folder: str, kind: str = "trl") -> Side:
    """Build SFTTrainer with PEFT's DoRA; it prepares `rows` and may write to `folder`. `kind` is said above."""
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    masks = [[int(label != IGNORE_INDEX) for label in row["labels"]] for row in rows]
    given = [{"input_ids": row["input_ids"], "completion_mask": mask} for row, mask in zip(rows, masks, strict=True)]
    base = AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.bfloat16 if kind == "trl_bf16" else torch.float32
    )
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=folder,
            report_to="none",
            use_cpu=True,
            bf16=precision == "bf16",
            gradient_checkpointing=kind == "trl_documented",
            completion_only_loss=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=load_tokenizer(settings.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"], use_dora=True
        ),
    )
    if trainer.args.gradient_checkpointing:  # as Trainer.train does
        cast(Any, trainer.model).activation_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    prepared = cast(Any, trainer.train_dataset).to_list()
    if [row["labels"] for row in prepared] != [row["labels"] for row in rows]:
        raise AssertionError("TRL would supervise different tokens from ours")
    model = trainer.accelerator.prepare(trainer.model)  # wraps its forward in autocast, as Trainer.train does

    def forward_and_backward(batch: dict[str, Any]) -> float:
        """Accumulate the gradients and return the mean loss per supervised token."""
        supervised = (batch["labels"] != IGNORE_INDEX).sum()
        return trainer.training_step(model, batch, num_items_in_batch=supervised).item()

    return Side(model, cast(Any, trainer.data_collator), forward_and_backward)


def copy_adapter(source: Side, target: Side) -> None:
    """Copy the adapter weights of `source` to `target`, name by name."""
    weights = {name: weight for name, weight in source.model.named_parameters() if weight.requires_grad}
    own = {name: weight for name, weight in target.model.named_parameters() if weight.requires_grad}
    if weights.keys() != own.keys():
        raise AssertionError(f"the adapters differ: {sorted(weights.keys() ^ own.keys())[:4]}")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def time_in_turn(
    actions: Mapping[str, Callable[[int], Any]], rounds: int, warmup: int
) -> dict[str, dict[str, list[Any]]]:
    """Call every action in every round, one after the other; return the seconds and results of each action.

    Warm-up rounds give results but no seconds. The actions of a round see the same load of a shared machine, so their
    ratio is more reliable than their seconds.
    """
    measured: dict[str, dict[str, list[Any]]] = {name: {"seconds": [], "results": []} for name in actions}
    for number in range(warmup + rounds):
        for name, action in actions.items():
            started = time.perf_counter()
            result = action(number)
            seconds = time.perf_counter() - started
            measured[name]["results"].append(result)
            if number >= warmup:
                measured[name]["seconds"].append(seconds)
    return measured
