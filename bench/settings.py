"""Settings of a measurement: model, examples and counts. Each field is a flag of `python -m bench`."""

import os
from dataclasses import dataclass, field
from typing import Any

from tweetdora.config import SYSTEM_PROMPT, TaskConfig
from tweetdora.data import Examples, load_examples
from tweetdora.hub import pin_revision
from tweetdora.modeling import load_tokenizer
from tweetdora.prompts import PromptTokenizer, read_prompt_format
from tweetdora.tokenized import tokenize_examples

_TWEET_EVAL = os.path.join(os.pardir, "shared", "tweet_eval")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """What to measure, and how often."""

    model: str = _setting("assets/SmolLM2-135M-Instruct", "Base model: local folder or Hub id.")
    dataset_name: str = _setting(
        _TWEET_EVAL if os.path.isdir(_TWEET_EVAL) else "assets/hutto_tweets",
        "Tweets: TweetEval if its folder is in ../shared, else the quickstart's.",
    )
    dataset_config: str = _setting("sentiment", "Configuration of the data set, if it has several.")
    batch_size: int = _setting(16, "Examples in a training step.")
    steps: int = _setting(20, "Measured steps of each side.")
    warmup: int = _setting(2, "Warm-up steps of each side.")
    loss_steps: int = _setting(50, "Steps over which the float32 losses are compared.")
    generation_examples: int = _setting(256, "Validation examples answered by both sides.")
    generation_batch: int = _setting(32, "Examples that both sides answer at once.")
    tune_steps: int = _setting(60, "Training steps of the tuned model, at learning rate 5e-4.")
    validation_examples: int = _setting(2_000, "Validation examples answered by the tuned model.")
    train_examples: int = _setting(10_000, "Training examples of launch, --full and the projection.")

    def task(self, prompt_repeats: int = 1) -> TaskConfig:
        """Return the task, its system prompt repeated to make it longer."""
        config = None if self.dataset_name.startswith("assets") else self.dataset_config
        prompt = " ".join([SYSTEM_PROMPT] * prompt_repeats)
        return TaskConfig(dataset_name=self.dataset_name, dataset_config=config, system_prompt=prompt)

    def prompt_tokenizer(self, prompt_repeats: int = 1) -> PromptTokenizer:
        """Return the tokenizer of prompts and completions."""
        task, tokenizer = self.task(prompt_repeats), load_tokenizer(self.model)
        return PromptTokenizer(tokenizer, read_prompt_format(tokenizer, task), task.max_length)

    def batches(self, count: int, prompt_repeats: int = 1) -> list[list[dict[str, Any]]]:
        """Return the first `count` training batches in the data set's order, which repeats if it is too short."""
        examples = self.load("train", count * self.batch_size, prompt_repeats)
        features = tokenize_examples(examples, self.prompt_tokenizer(prompt_repeats)).features
        places = [range(number * self.batch_size, (number + 1) * self.batch_size) for number in range(count)]
        return [[features[place % len(features)] for place in batch] for batch in places]

    def load(self, split: str, count: int, prompt_repeats: int = 1) -> Examples:
        """Load the first `count` examples of a split."""
        task = self.task(prompt_repeats)
        revision = pin_revision(task.dataset_name, task.dataset_revision, "dataset")
        return load_examples(task, split, revision).head(count)
