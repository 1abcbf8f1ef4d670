"""Merge a run's adapter, verify the result, write its model card, and publish it on the Hugging Face Hub.

    python push_to_hub.py                                     # the published run, to its repository
    python push_to_hub.py runs/quickstart --dry_run true      # build and verify the folder, push nothing
    python push_to_hub.py runs/quickstart --hub_model_id owner/name --private true
    python push_to_hub.py --adapter_only true --hub_model_id owner/name-adapter   # for PEFT, not merged

Reads <run folder>/run.json, adapter and evaluation/<split>.json; leaves <run folder>/publish, which is what is pushed,
and publish.json, which says what the Hub holds then and what reading it back has shown (publish_adapter and
publish_adapter.json with --adapter_only).
"""

import tweetdora  # noqa: F401  (before torch, whose threads it sets up)

# isort: split
import os
from typing import Any

import torch

from tweetdora.build import (
    Reference,
    build_model,
    check_output_dir,
    copy_figures,
    read_evaluation,
    replace_folder,
)
from tweetdora.card_facts import Publication, Records
from tweetdora.cli import parse_with_target, run_script
from tweetdora.config import PushConfig
from tweetdora.errors import InputError
from tweetdora.evaluation import format_results
from tweetdora.hub import use_cache_if_unreachable
from tweetdora.leaks import check_contents
from tweetdora.model_card import check_license, check_records, front_matter, render_card
from tweetdora.precision import compute_state
from tweetdora.publish import (
    Published,
    Target,
    add_tag,
    check_free_space,
    check_kind,
    check_metadata,
    find_target,
    publish,
    read_back,
)
from tweetdora.records import (
    RECORD_VERSION,
    command_line,
    environment,
    read_run,
    use_cpu_threads,
    utc_now,
    write_json,
)


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit status."""
    # parse
    config = parse_with_target(argv, PushConfig, __doc__.partition("\n")[0], "Run folder of train.py.")
    run_dir = config.target
    run = read_run(run_dir)
    kind = "publish_adapter" if config.adapter_only else "publish"
    folder = os.path.normpath(config.output_dir or os.path.join(run_dir, kind))
    check_output_dir(folder, run_dir)

    # load
    records = Records(run, *read_evaluation(run_dir, config.split))
    check_records(records)
    publication = plan_publication(records, config, folder)
    use_cache_if_unreachable(run["base"]["name_or_path"])
    target = None if config.dry_run else find_target(publication.hub_model_id, config)
    if target is not None:
        check_kind(target, config.adapter_only)
        check_metadata(front_matter(records, publication))
    # The merged model, and the copy that is read back, or the base in the cache.
    check_free_space(folder, 2 * 4 * run["base"]["parameters"])
    device = compute_state().device
    use_cpu_threads(device, 1)

    # work
    if publication.license is None:
        print("note: the base model's card names no licence, so the card has none; --license sets one")

    def build(beside: str) -> tuple:
        """Fill the folder; what comparing showed, and what the published model is to answer."""
        rows = records.rows().head(config.check_samples)
        check, reference = build_model(run_dir, run, rows, config, device, beside)
        copy_figures(run_dir, beside, config.split)
        with open(os.path.join(beside, "README.md"), "w", encoding="utf-8") as stream:
            stream.write(render_card(records, publication, check, answers=reference.found[1]))
        check_contents(beside, publication.hub_model_id)
        return check, reference

    check, reference = replace_folder(folder, build)
    what = "Saved the adapter" if config.adapter_only else f"Merged, saved as {check['dtype']}"
    print(
        f"{what} and loaded again: {check['equal_answers']} of {check['rows']} answers equal, largest logit "
        f"difference {check['max_logit_difference']:.1e}."
    )
    evaluation = records.evaluation
    rows_text = f"{evaluation['data']['rows']:,} rows of {evaluation['data']['split']}"
    print(f"\n{run['name']}, {rows_text}\n{format_results(evaluation)}\n")
    print(f"Model: {folder}\nCard:  {os.path.join(folder, 'README.md')}")

    # save
    if config.dry_run:
        print("Dry run: nothing was pushed.")
        return 0
    score = evaluation["after"]["macro_f1"]
    message = f"{run['name']}: macro-F1 {score:.3f} on {evaluation['data']['split']}"
    print(push(folder, target, message, config, os.path.join(run_dir, f"{kind}.json"), reference, device))
    return 0


def plan_publication(records: Records, config: PushConfig, folder: str) -> Publication:
    """What is to be made of the run.

    Raises:
        InputError: a flag is missing or does not go with the run.
    """
    run = records.run
    hub_model_id = config.hub_model_id or (None if config.adapter_only else run["hub_model_id"])
    if hub_model_id is None and not config.dry_run:
        why = "an adapter alone needs one of its own" if config.adapter_only else "the run names no repository"
        raise InputError(f"{why}; give --hub_model_id owner/name, or --dry_run true.")
    license = config.license or run["base_card"].get("license")
    check_license(license, run["base_card"])
    if config.adapter_only and run["base"]["weights_sha256"]:
        raise InputError(
            f"--adapter_only true: the base model of this run is the folder {run['base']['name_or_path']}, which "
            "nobody else has to put an adapter on. Leave the flag out; the merged model is whole."
        )
    commands = [run["command"], records.evaluation["command"], command_line()]
    return Publication(hub_model_id, folder, license, commands, config.adapter_only)


def push(
    folder: str,
    target: Target,
    message: str,
    config: PushConfig,
    record_path: str,
    reference: Reference,
    device: torch.device,
) -> str:
    """Publish the folder, write publish.json, read back what the Hub holds; what to say of it."""
    published = publish(folder, target, message, config.private)
    write_record(record_path, published, None)  # what is on the Hub is known, whatever reading it back says
    if config.tag:
        add_tag(published, config.tag)
    check = read_back(published, folder, reference, device)
    write_record(record_path, published, check)
    return describe(published, check)


def write_record(path: str, published: Published, check: dict[str, Any] | None) -> None:
    """Write publish.json: what the Hub holds, and what reading it back has shown."""
    record = {"record_version": RECORD_VERSION, "created": utc_now(), "command": command_line()}
    record |= {"published": published.to_dict(), "read_back": check, "environment": environment()}
    write_json(path, record)


def describe(published: Published, check: dict[str, Any]) -> str:
    """What was done, in lines for a person."""
    what = "Published" if published.changed else "Nothing to publish, it is there already"
    lines = [
        f"{what}: {published.url}",
        f"Read back from an empty cache: {check['files']} files equal by hash, {check['equal_answers']} of "
        f"{check['rows']} answers equal, largest logit difference {check['max_logit_difference']:.1e}.",
    ]
    if published.pull_request:
        lines.append(f"Pull request: revision {published.pull_request}")
    if published.removed:
        lines.append(f"Removed, from an earlier publish: {', '.join(published.removed)}")
    if published.left_alone:
        lines.append(f"Left alone, not ours: {', '.join(published.left_alone)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, "push_to_hub.py")
