"""Merge a run's adapter, verify the result, write its model card, and publish it on the Hugging Face Hub.

    python push_to_hub.py                                     # the published run, to its repository
    python push_to_hub.py runs/quickstart --dry_run true      # build and verify the folder, push nothing
    python push_to_hub.py runs/quickstart --hub_model_id owner/name --private true
    python push_to_hub.py --adapter_only true --hub_model_id owner/name-adapter   # for PEFT, not merged
    python push_to_hub.py --space owner/name                  # also a Space to try the model on
    python push_to_hub.py --gguf q8_0 --onnx true             # also for llama.cpp, Ollama and transformers.js

Reads <run folder>/run.json, the adapter and evaluation/<split>.json. Writes <run folder>/publish, the folder that is
pushed, and publish.json, which records what the Hub holds after the push and the result of reading it back
(publish_adapter and publish_adapter.json with --adapter_only).
"""

import tweetdora  # noqa: F401  (before torch, whose threads it sets up)

# isort: split
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tweetdora.cli import check_flags, parse_with_target, run_script
from tweetdora.config import PushConfig

parse = partial(
    parse_with_target,
    config_class=PushConfig,
    description=__doc__.partition("\n")[0],
    target_help="Run folder of train.py.",
)
check_flags(__name__, parse, "push_to_hub.py")  # before the other imports, which take seconds

# isort: split
import torch

from tweetdora.build import Reference, build_model, check_output_dir, draw_plots, format_check, staged_folder
from tweetdora.card_facts import Publication, Records, read_records, title
from tweetdora.conversions import check_conversions, check_gguf, convert, format_conversions
from tweetdora.device import compute_state, use_cpu_threads
from tweetdora.errors import UserError
from tweetdora.evaluation import format_results
from tweetdora.hub import use_cache_if_unreachable
from tweetdora.leaks import check_contents
from tweetdora.model_card import (
    check_records,
    check_skill,
    eval_results_file,
    front_matter,
    plan_publication,
    render_card,
)
from tweetdora.modeling import load_tokenizer
from tweetdora.portable import check_portable, make_portable, model_type
from tweetdora.prompts import PromptTokenizer
from tweetdora.provenance import command_line, environment, utc_now
from tweetdora.publish import (
    HubRepo,
    add_tag,
    check_files,
    check_free_space,
    check_kind,
    check_metadata,
    format_published,
    inspect_repo,
    publish,
    read_back,
)
from tweetdora.record_files import read_run, write_record
from tweetdora.records import ADAPTER_DIR, Comparison, Conversion, Published, PublishRecord, ReadBack, RunRecord
from tweetdora.seeds import find_sisters
from tweetdora.space import build_page, check_page, check_space, check_space_dir

log = logging.getLogger("tweetdora.push_to_hub")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    config, run_dir = parse(argv)
    run = read_run(run_dir)
    kind = "publish_adapter" if config.adapter_only else "publish"
    folder = os.path.normpath(config.output_dir or os.path.join(run_dir, kind))
    check_output_dir(folder, run_dir)
    space_folder = os.path.join(run_dir, "space")
    if config.space:
        check_space_dir(space_folder)

    # load
    records = load_records(run, run_dir, config)
    publication = plan_publication(records, config, folder)
    examples = records.examples().head(config.check_samples)
    check_formats(run, run_dir, config, examples.texts)
    use_cache_if_unreachable(run.base_model.name_or_path)
    repo, space = inspect_repos(records, publication, config)
    # Space for the merged model, its conversions, and the copy that is read back (or the base in the cache).
    check_free_space(folder, (2 + 2 * config.onnx + (config.gguf != "none")) * 4 * run.base_model.parameters)
    device = compute_state().device
    use_cpu_threads(device, 1)

    # work
    if publication.license is None:
        log.info("note: the base model's card names no licence, so this card has none either; set one with --license")
    with staged_folder(folder) as beside:
        check, reference = build_model(run_dir, run, examples, config, device, beside)
        conversions, failure = convert(beside, title(run, publication.hub_model_id), config, reference)
        complete(beside, records, publication, config, check, reference, conversions)
    log.info("%s", format_build(records, folder, config, check, conversions))
    if failure is not None:
        log.info(
            "One format failed, so nothing was published. The folder is complete without it. To publish, run the same "
            "command without that format."
        )
        raise failure
    labels: list[str | None] = []
    if config.space:
        with staged_folder(space_folder) as beside:
            labels = build_page(beside, folder, config.space, records, publication)
        log.info("Page:  %s, checked: it gives the model's labels for its examples", space_folder)

    # save
    if repo is None:
        log.info("Dry run: nothing was pushed.")
        return 0
    record_path = os.path.join(run_dir, f"{kind}.json")
    message = f"{run.name}: macro-F1 {records.finetuned.macro_f1:.3f} on {records.evaluation.data.split}"
    model = push_model(folder, repo, message, config, reference, device, record_path)
    if space is not None:
        push_page(space_folder, space, config, model, labels, record_path)
    return 0


def load_records(run: RunRecord, run_dir: str, config: PushConfig) -> Records:
    """Load the records of a run and of its sisters, and log the notes that the card's reader should see.

    Raises:
        InputError: A record is missing, the records do not belong together, or the model is no better than guessing.
    """
    records = read_records(run, run_dir, config.split)
    check_records(records)
    if warning := check_skill(records, config):
        log.info("note: %s", warning)
    return with_sisters(records, run_dir, config)


def check_formats(run: RunRecord, run_dir: str, config: PushConfig, texts: Sequence[str]) -> None:
    """Check that the requested formats work with this model, its prompt and the texts of the comparison.

    Raises:
        InputError: One of them does not.
    """
    check_conversions(config, run.base_model.architecture)
    if config.gguf != "none":
        tokenizer = load_tokenizer(os.path.join(run_dir, ADAPTER_DIR))
        prompts = PromptTokenizer(tokenizer, run.prompt_format, run.task.max_length)
        check_gguf(prompts, run.task.system_prompt, texts)


def inspect_repos(
    records: Records, publication: Publication, config: PushConfig
) -> tuple[HubRepo | None, HubRepo | None]:
    """Look up the current state of the model's repository and of its Space; None for one that is not pushed to.

    Done before the merge, so that a push that the Hub would refuse fails early.

    Raises:
        UserError: The Hub would refuse the push.
    """
    if publication.hub_model_id is None or config.dry_run:
        return None, None
    repo = inspect_repo(publication.hub_model_id, config)
    check_kind(repo, config.adapter_only)
    check_metadata(front_matter(records, publication))
    if not config.space:
        return repo, None
    space = inspect_repo(config.space, config, "space")
    check_space(space, repo)
    return repo, space


def push_model(
    folder: str,
    repo: HubRepo,
    message: str,
    config: PushConfig,
    reference: Reference,
    device: torch.device,
    record_path: str,
) -> PublishRecord:
    """Push the folder, then load it back from the Hub. The record is written after each of the two steps."""
    published = publish(folder, repo, message, config.private)
    save_record(record_path, published, None)
    if config.tag and repo.tag is None:
        add_tag(published, config.tag)
    seen = read_back(published, folder, reference, device)
    record = save_record(record_path, published, seen)
    log.info("%s", format_published(published, seen))
    return record


def push_page(
    folder: str, space: HubRepo, config: PushConfig, model: PublishRecord, labels: list[str | None], record_path: str
) -> None:
    """Push the Space, compare it with its folder, and run it on the published model.

    The page must give the labels that it gave on the model in the build folder.

    Raises:
        UserError: The push failed, or the Space does not match what was pushed.
    """
    published = model.published
    try:
        page = publish(folder, space, f"Page for {published.repo_id}", config.private)
        save_record(record_path, published, model.read_back, page)
        check_files(page, space, folder)
        check_page(folder, published.repo_id, labels)
    except UserError as error:
        said = f"the model is published and checked ({published.url}), but its page is not: {error}"
        raise type(error)(f"{said} Run the same command again; it does not commit the model twice.") from error
    log.info("%s", format_page(page))


def with_sisters(records: Records, run_dir: str, config: PushConfig) -> Records:
    """Add the records of the runs that differ in the seed alone, and log which were found and which were skipped."""
    sisters, passed_over = find_sisters(run_dir, config.split, config.sister_runs)
    for sentence in passed_over:
        log.info("note: %s", sentence)
    if sisters is None:
        return records
    if len(sisters.runs) > 1:
        log.info("The card reports the mean over seeds %s:", ", ".join(map(str, sisters.seeds)))
        for run in sisters.runs:
            log.info("    seed %d, macro-F1 %.3f: %s", run.seed, run.finetuned_metrics.macro_f1, run.folder)
    return replace(records, sisters=sisters)


def complete(
    folder: str,
    records: Records,
    publication: Publication,
    config: PushConfig,
    check: Comparison,
    reference: Reference,
    conversions: list[Conversion],
) -> None:
    """Write the card and the plots to the build folder, and check that the folder can be published."""
    draw_plots(folder, records.run.name, records.result, records.evaluation)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        answers = reference.outputs.generations
        text = render_card(
            records, publication, config.dtype, check, answers, model_type(folder), conversions, reference.base_dtype
        )
        stream.write(text)
    if (results := eval_results_file(records)) is not None:
        os.makedirs(os.path.join(folder, ".eval_results"))
        with open(os.path.join(folder, ".eval_results", "tweetdora.yaml"), "w", encoding="utf-8") as stream:
            stream.write(results)
    make_portable(folder)  # the card and the plots too
    check_portable(folder)
    check_contents(folder, publication.hub_model_id)


def save_record(
    path: str, published: Published, seen: ReadBack | None, space: Published | None = None
) -> PublishRecord:
    """Write publish.json: what the Hub holds, and the result of reading it back."""
    record = PublishRecord(utc_now(), command_line(), published, seen, environment(), space)
    write_record(path, record)
    return record


def format_page(page: Published) -> str:
    """Summarize the push of the Space."""
    what = "Published the page" if page.changed else "The page is already up to date"
    return f"{what}: {page.url}\nRead back: the file hashes match, and the page gives the model's labels."


def format_build(
    records: Records, folder: str, config: PushConfig, check: Comparison, conversions: list[Conversion]
) -> str:
    """Summarize what was built."""
    what = "Saved the adapter" if config.adapter_only else f"Merged, saved as {config.dtype}"
    data = records.evaluation.data
    return (
        f"{what} and reloaded: {format_check(check)}\n{format_conversions(conversions)}\n"
        f"{records.run.name}, {data.num_examples:,} examples of {data.split}\n"
        f"{format_results(records.evaluation)}\n\n"
        f"Model: {folder}\nCard:  {os.path.join(folder, 'README.md')}"
    )


if __name__ == "__main__":
    run_script(main, "push_to_hub.py")
