"""The two sides of a measurement behind one interface: `step(rows)` trains on encoded rows and returns the mean loss.

ours: packed batch, our attention and DoRA layer, base in the compute precision: what train.py builds.

trl: TRL's SFTTrainer with PEFT's DoRA. It gets the token ids that we made, with a completion mask on the answer and
its stop token, so both sides supervise the same tokens. Left to itself it would supervise more: the line end that the
ChatML template writes behind the stop token (given prompt and completion as messages), or every token of the
conversation (given messages only). Its gradient checkpointing, on by default, is off here, which is faster; bf16 is
tried in both of its forms (`trl`: base in float32 under autocast, its default; `trl_bf16`: base in bf16). The step is
collator, SFTTrainer.training_step, clipping and optimizer, without the rest of Trainer's loop (logs, callbacks,
data loader), whose time is thus left out on both sides. On a CPU, SFTTrainer 1.16 computes the logits of every token;
it leaves the others out where it has Triton. Both sides have the threads that importing tweetdora sets up
(GOMP_SPINCOUNT), so what that saves on a busy machine is not in their ratio.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM

from bench.settings import Settings
from tweetdora.config import ModelConfig
from tweetdora.modeling import DTYPES, attach_adapter, load_base, load_tokenizer
from tweetdora.packing import PackedCollator
from tweetdora.prompts import IGNORE_INDEX
from tweetdora.trainer import supervised_loss_sum

CPU = torch.device("cpu")


@dataclass
class Side:
    """A model that is trained, how it makes a batch of rows, and the mean loss of a batch after its backward pass."""

    model: torch.nn.Module
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    forward_and_backward: Callable[[dict[str, Any]], float]
    learning_rate: float = 3e-5

    def __post_init__(self) -> None:
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        # The Trainer's default optimizer, which train.py uses too.
        self.optimizer = torch.optim.AdamW(self.weights, lr=self.learning_rate, weight_decay=0.0, fused=True)

    def step(self, rows: Sequence[dict[str, Any]]) -> float:
        """One optimizer step, collation included; the mean loss of a supervised token."""
        loss = self.forward_and_backward(self.collate(rows))
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def our_side(settings: Settings, precision: str, learning_rate: float = 3e-5) -> Side:
    """Base and adapter as train.py makes them, on packed batches."""
    base = load_base(settings.model, None, DTYPES[precision], CPU)
    torch.manual_seed(42)
    return packed_side(attach_adapter(base, ModelConfig(model_name_or_path=settings.model)), learning_rate)


def packed_side(model: torch.nn.Module, learning_rate: float = 3e-5) -> Side:
    """Any adapter model on packed batches."""

    def forward_and_backward(batch: dict[str, Any]) -> float:
        """The mean loss of a supervised token; gradients in the weights."""
        loss = supervised_loss_sum(model, batch) / batch["labels"].numel()
        loss.backward()
        return loss.item()

    return Side(model.train(), PackedCollator(), forward_and_backward, learning_rate)


def trl_side(settings: Settings, precision: str, rows: list[dict[str, Any]], folder: str, kind: str = "trl") -> Side:
    """SFTTrainer and PEFT's DoRA; it prepares `rows` and may write into `folder`; `kind` is trl or trl_bf16."""
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
            gradient_checkpointing=False,
            completion_only_loss=True,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(given),
        processing_class=load_tokenizer(settings.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["k_proj", "v_proj"], use_dora=True
        ),
    )
    prepared = cast(Any, trainer.train_dataset).to_list()
    if [row["labels"] for row in prepared] != [row["labels"] for row in rows]:
        raise AssertionError("TRL would supervise other tokens than we do")
    model = trainer.accelerator.prepare(trainer.model)  # puts autocast around its forward, as Trainer.train does

    def forward_and_backward(batch: dict[str, Any]) -> float:
        """The mean loss of a supervised token; gradients in the weights."""
        supervised = (batch["labels"] != IGNORE_INDEX).sum()
        return trainer.training_step(model, batch, num_items_in_batch=supervised).item()

    return Side(model, cast(Any, trainer.data_collator), forward_and_backward)


def copy_adapter(source: Side, target: Side) -> None:
    """Give `target` the adapter weights of `source`, name by name."""
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
    """Call every action in every round, one after the other; seconds and results of each, of the warm-up the results.

    Actions of one round meet the same load of a shared machine, so their ratio is worth more than their seconds.
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
