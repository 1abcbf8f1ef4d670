"""Merge a run's adapter, verify the result, write its model card, and publish it on the Hugging Face Hub.

    python push_to_hub.py                                     # the published run, to its repository
    python push_to_hub.py runs/quickstart --dry_run true      # build and verify the folder, push nothing
    python push_to_hub.py runs/quickstart --hub_model_id owner/name --private true

Reads <run folder>/run.json, adapter and evaluation/<split>.json; leaves <run folder>/publish, which is what is pushed.
"""

import tweetdora  # noqa: F401  (before torch, whose threads it sets up)

# isort: split
import os

from tweetdora.cli import parse_with_target, run_script
from tweetdora.config import PushConfig, TaskConfig
from tweetdora.data import load_rows
from tweetdora.evaluation import format_results
from tweetdora.hub import (
    build_model,
    check_output_dir,
    check_push,
    copy_adapter,
    copy_figures,
    push_folder,
    read_evaluation,
    replace_folder,
)
from tweetdora.model_card import card_base_name, check_records, render_card
from tweetdora.offline import use_cache_if_unreachable
from tweetdora.precision import compute_state
from tweetdora.records import command_line, read_run, use_cpu_threads


def main(argv: list[str] | None = None) -> int:
    """Run the script; the exit status."""
    # parse
    config = parse_with_target(argv, PushConfig, __doc__.partition("\n")[0], "Run folder of train.py.")
    run_dir = config.target
    run = read_run(run_dir)
    hub_model_id = config.hub_model_id or run["hub_model_id"]
    folder = os.path.normpath(config.output_dir or os.path.join(run_dir, "publish"))
    check_output_dir(folder, run_dir)
    check_push(hub_model_id, config.dry_run)
    device = compute_state().device
    use_cpu_threads(device, 1)

    # load
    evaluation, predictions = read_evaluation(run_dir, config.split)
    check_records(run, evaluation, predictions)
    use_cache_if_unreachable(run["task"]["dataset_name"], run["base"]["name_or_path"])
    rows = load_rows(TaskConfig(**run["task"]), config.split).head(config.check_samples)
    license = config.license or run["base_card"].get("license")
    if license is None:
        print("note: the base model's card names no licence, so the card has none; --license sets one")

    # work
    def build(beside: str) -> dict:
        merge_check = build_model(run_dir, run, rows, config, device, beside)
        copy_adapter(run_dir, beside, card_base_name(run))
        copy_figures(run_dir, beside, config.split)
        commands = [run["command"], evaluation["command"], command_line()]
        card = render_card(run, evaluation, predictions, merge_check, hub_model_id, folder, license, commands)
        with open(os.path.join(beside, "README.md"), "w", encoding="utf-8") as stream:
            stream.write(card)
        return merge_check

    merge_check = replace_folder(folder, build)
    print(
        f"Merged, saved as {merge_check['dtype']} and loaded again: {merge_check['equal_answers']} of "
        f"{merge_check['rows']} answers equal, largest logit difference {merge_check['max_logit_difference']:.1e}."
    )
    rows_text = f"{evaluation['data']['rows']:,} rows of {evaluation['data']['split']}"
    print(f"\n{run['name']}, {rows_text}\n{format_results(evaluation)}\n")
    print(f"Model: {folder}\nCard:  {os.path.join(folder, 'README.md')}")

    # save
    if config.dry_run:
        print("Dry run: nothing was pushed.")
        return 0
    score = evaluation["after"]["macro_f1"]
    message = f"{run['name']}: macro-F1 {score:.3f} on {evaluation['data']['split']}"
    print(f"Published: {push_folder(folder, hub_model_id, config.private, message)}")
    return 0


if __name__ == "__main__":
    run_script(main, "push_to_hub.py")
