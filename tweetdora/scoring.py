"""Score how likely each label word, followed by the stop token, is as the answer to a prompt.

Generation gives one answer, and an untuned model often names no label word at all. The likelihood of every label word
can be computed for any model: the most likely one is the label, and the likelihoods, normalized to sum to 1, are the
probabilities. The system prompt is computed once per batch, as in training and generation. The tokens of all label
words form one tree after each prompt, and prompts and trees are computed in one pass:

    prompt ─┬─ not ── good ── <stop>
            └─ good ── <stop>
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from peft import PeftModel
from transformers import PreTrainedModel

from tweetdora.attention import ATTENTION
from tweetdora.errors import ResourceError
from tweetdora.packing import pack, prefix_length
from tweetdora.prompts import PromptTokenizer

_ROUNDING = 0.1  # largest difference of log-likelihoods that counts as rounding if the first tokens are equally likely


@dataclass(frozen=True)
class CompletionTree:
    """The tokens of completions that are followed by another token; common beginnings are stored once.

    For the completions 8 2, 9 5 2 and 9 6 2:

        tokens   [8, 9, 5, 6]
        parents  [-1, -1, 1, 1]           places in `tokens`; -1 is the prompt
        paths    [[(-1, 8), (0, 2)],      for each completion, the place that predicts each token, and the token
                  [(-1, 9), (1, 5), (2, 2)],
                  [(-1, 9), (1, 6), (3, 2)]]
    """

    tokens: list[int]
    parents: list[int]
    paths: list[list[tuple[int, int]]]

    @property
    def depths(self) -> list[int]:
        """The distance of each token from the prompt's last token, from 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def ancestors(self) -> torch.Tensor:
        """Which tokens (columns) are on the path from the root to each token (rows), itself included; (K, K)."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                seen[place] |= seen[parent]
        return seen


def make_tree(completions: Sequence[Sequence[int]]) -> CompletionTree:
    """Build the tree of completions that each end in a stop token."""
    places: dict[tuple[int, ...], int] = {(): -1}
    tokens: list[int] = []
    parents: list[int] = []
    paths = []
    for completion in completions:
        path: list[tuple[int, int]] = []
        begun: tuple[int, ...] = ()
        for token in completion:
            path.append((places[begun], token))
            before, begun = begun, (*begun, token)
            if len(begun) < len(completion) and begun not in places:
                places[begun] = len(tokens)
                tokens.append(token)
                parents.append(places[before])
        paths.append(path)
    return CompletionTree(tokens, parents, paths)


@torch.no_grad()
def score_packed(
    model: PreTrainedModel, prompts: list[list[int]], completions: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-likelihood (N, C) of each completion after each prompt, and of its first token alone.

    Both in float32 on the CPU; one pass of the model.
    """
    tree = make_tree(completions)
    logits = model(**send_to_device(pack_with_trees(prompts, tree), model.device), use_cache=False).logits[0]
    logits = logits.view(1 + len(tree.tokens), len(prompts), -1)  # after the prompt, then after each token
    columns: dict[tuple[int, int], torch.Tensor] = {}
    for place in range(-1, len(tree.tokens)):
        tokens = [token for behind, token in _steps(tree) if behind == place]
        found = _log_probabilities(logits[place + 1], tokens)
        columns |= {(place, token): found[:, number] for number, token in enumerate(tokens)}
    sums = [torch.stack([columns[step] for step in path]).sum(0) for path in tree.paths]
    firsts = [columns[path[0]] for path in tree.paths]
    return torch.stack(sums, dim=1).cpu(), torch.stack(firsts, dim=1).cpu()


def pack_with_trees(prompts: list[list[int]], tree: CompletionTree) -> dict[str, Any]:
    """Pack N prompts, followed by a tree of K tokens for each, into one batch.

    In addition to the entries from pack(), `packing` has tree (K, K), see CompletionTree.ancestors, and seen
    (N, P + L), which is True where a padded position holds a token. logits_to_keep names each prompt's last token,
    then the trees' tokens: the first token of every row, then the second of every row, and so on.
    """
    prefix = prefix_length(prompts)
    batch, starts = pack(prompts, prefix)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    last = torch.tensor(starts) + lengths - prefix - 1
    total, count, number = batch["input_ids"].shape[1], len(prompts), len(tree.tokens)
    keep = [last, (total + torch.arange(count * number)).view(count, number).T.reshape(-1)]
    batch["logits_to_keep"] = torch.cat(keep)
    if tree.tokens:
        positions = lengths[:, None] + torch.tensor(tree.depths) - 1  # (N, K)
        batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([tree.tokens * count])], dim=1)
        batch["position_ids"] = torch.cat([batch["position_ids"], positions.view(1, -1)], dim=1)
        batch["packing"]["tree"] = tree.ancestors()
        batch["packing"]["seen"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


def _steps(tree: CompletionTree) -> list[tuple[int, int]]:
    """The distinct pairs of a place in the tree and a token predicted there."""
    return list(dict.fromkeys(step for path in tree.paths for step in path))


def _log_probabilities(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities (N, len(tokens)) of some tokens, in float32, from logits (N, V)."""
    logits = logits.float()
    return logits[:, tokens] - logits.logsumexp(-1, keepdim=True)


@torch.no_grad()
def score_padded(
    model: PreTrainedModel, prompts: list[list[int]], completions: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as score_packed by ordinary passes, one per completion, for models that do not support packing."""
    length = max(map(len, prompts))
    sums, firsts = [], []
    for completion in completions:
        # Nothing is predicted from the last token. Padding on the left puts the completion in the last columns.
        rows = [[0] * (length - len(prompt)) + prompt + list(completion[:-1]) for prompt in prompts]
        mask = torch.tensor(
            [[0] * (length - len(prompt)) + [1] * (len(rows[0]) - length + len(prompt)) for prompt in prompts]
        )
        logits = model(
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=mask.to(model.device),
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0).to(model.device),
            logits_to_keep=len(completion),
        ).logits.float()  # (N, len(completion), V)
        wanted = torch.tensor(completion, device=model.device).expand(len(prompts), -1)[..., None]
        found = logits.gather(-1, wanted)[..., 0] - logits.logsumexp(-1)  # (N, len(completion))
        sums.append(found.sum(-1))
        firsts.append(found[:, 0])
    return torch.stack(sums, dim=1).cpu(), torch.stack(firsts, dim=1).cpu()


def choose_labels(sums: torch.Tensor, firsts: torch.Tensor, first_tokens: Sequence[int]) -> torch.Tensor:
    """The label id (N,) of each row: the most likely label, or greedy generation's choice if rounding made a tie.

    In bf16, neighbouring logits are up to 0.125 apart, so first tokens are often exactly equally likely. Greedy
    generation then takes the one with the smallest id, and so does this function (17 of 800 tweets of the quickstart).
    `firsts` (N, C) are the log-likelihoods of the label words' first tokens alone.
    """
    best = sums.argmax(-1, keepdim=True)
    alike = (firsts == firsts.gather(1, best)) & (sums.gather(1, best) - sums < _ROUNDING)
    tokens = torch.tensor(first_tokens).expand_as(sums)
    smallest = tokens.masked_fill(~alike, torch.iinfo(torch.int64).max).min(-1, keepdim=True).values
    return sums.masked_fill(~(alike & (tokens == smallest)), float("-inf")).argmax(-1)


@dataclass(frozen=True)
class Scores:
    """Log-likelihoods (N, C) of the label words, label ids (N,), the number of truncated texts, and the seconds."""

    log_likelihoods: torch.Tensor
    labels: torch.Tensor
    truncated: int
    seconds: float

    @property
    def probabilities(self) -> torch.Tensor:
        """The likelihoods, normalized to sum to 1 over the labels; (N, C) in float64."""
        return self.log_likelihoods.double().softmax(-1)


def score_all(
    model: PreTrainedModel | PeftModel,
    prompt_tokenizer: PromptTokenizer,
    texts: Sequence[str],
    *,
    batch_size: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score each label word and its stop token after the prompt of each text.

    Prompts of similar length are batched together. With several processes, each scores a share of the texts, and all
    of them get all scores.
    """
    started = time.perf_counter()
    completions = prompt_tokenizer.completion_ids
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    score = score_packed if inner.config._attn_implementation == ATTENTION else score_padded
    with PartialState().split_between_processes(list(range(len(texts)))) as share:
        prompts, truncated = prompt_tokenizer.prompt_ids([texts[index] for index in share])
        sums, firsts = torch.empty(2, len(prompts), len(completions))
        longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        was_training = model.training
        model.eval()
        try:
            for start in range(0, len(longest_first), batch_size):
                batch = longest_first[start : start + batch_size]
                sums[batch], firsts[batch] = score(inner, [prompts[index] for index in batch], completions)
                on_progress(len(batch))
        finally:
            model.train(was_training)
    labels = choose_labels(sums, firsts, [completion[0] for completion in completions])
    gathered = gather_object([(sums, labels, truncated)])
    if any(part.isnan().any() for part, _, _ in gathered):
        dtype = next(inner.parameters()).dtype
        cure = "the model is broken" if dtype == torch.float32 else "use --precision fp32"
        raise ResourceError(f"the model's likelihoods are not numbers (nan) in {dtype}; {cure}.")
    return Scores(
        log_likelihoods=torch.cat([part for part, _, _ in gathered]),
        labels=torch.cat([part for _, part, _ in gathered]),
        truncated=sum(number for _, _, number in gathered),
        seconds=time.perf_counter() - started,
    )
