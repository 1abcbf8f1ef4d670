"""Measure a run, an adapter or a model with greedy generation, next to its base model.

    python evaluate.py                                    # the published run's folder
    python evaluate.py runs/quickstart                    # any other run folder
    python evaluate.py runs/quickstart --split validation --max_eval_samples 200
    python evaluate.py liuhailin0123/llm-course-hw3-dora  # a model, or an adapter, from the Hub or a folder
    accelerate launch evaluate.py runs/quickstart         # split the examples over all GPUs

Writes <run folder>/evaluation/<split>.json, and predictions.jsonl and the confusion matrices to
<run folder>/evaluation/<split>/. For a model or an adapter, they go to runs/evaluations/owner--name instead.
"""

if __name__ == "evaluate":
    raise ImportError("this is the script evaluate.py; to get the library here, import tweetdora.metrics first")

import tweetdora  # noqa: F401  (before torch, because it sets torch's threads)

# isort: split
import logging
from functools import partial

from tweetdora.cli import check_flags, parse_with_target, run_script
from tweetdora.config import EvaluateConfig

parse = partial(
    parse_with_target,
    config_class=EvaluateConfig,
    description=__doc__.partition("\n")[0],
    target_help="Run folder, or the folder or Hub id of a model or an adapter.",
)
check_flags(__name__, parse, "evaluate.py")  # before the other imports, which take seconds

# isort: split
from tweetdora.device import compute_state, use_cpu_threads
from tweetdora.evaluation import (
    describe,
    evaluation_record,
    format_results,
    load_eval_data,
    measure_base_and_finetuned,
    no_better_than_guessing,
    read_base_results,
    save_generations,
    save_results,
    track_results,
)
from tweetdora.hub import pin_revision, use_cache_if_unreachable
from tweetdora.targets import decide_decoding, find_eval_target
from tweetdora.tracking import wandb_mode

log = logging.getLogger("tweetdora.evaluate")


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    # parse
    config, name = parse(argv)
    state = compute_state()
    use_cpu_threads(state.device, state.num_processes)

    if config.report_to == "wandb":
        wandb_mode()  # rejects an invalid WANDB_MODE before the work starts

    # load
    use_cache_if_unreachable(name)
    target = find_eval_target(name, config)
    decoding = decide_decoding(target, config, state.device.type)
    use_cache_if_unreachable(target.task.dataset_name, target.base)
    base_revision = pin_revision(target.base, target.base_revision)
    data_revision = pin_revision(target.task.dataset_name, target.task.dataset_revision, "dataset")
    trained_on = target.run.train_data.revision if target.run else None
    data = load_eval_data(target, config, data_revision, trained_on)
    if state.is_main_process:
        log.info("\n".join(describe(target, config.split, data, decoding)))

    earlier = None
    if config.base_results is not None:
        earlier = read_base_results(config.base_results, target, data.examples, config, decoding)

    # work
    measured = measure_base_and_finetuned(target, base_revision, data.examples, config, decoding, earlier)
    if not state.is_main_process:
        return 0
    save_generations(data.examples, measured, target, config.split)
    record, missing = evaluation_record(target, data, measured, config, decoding)

    # save
    save_results(record, target)
    if config.report_to == "wandb":
        track_results(record, data.examples, measured, target)
    log.info("\n%s\n\nWrote %s.", format_results(record), target.results_dir)
    for sentence in missing:
        log.info("note: %s", sentence)
    if warning := no_better_than_guessing(record):
        log.info("note: %s", warning)
    if target.kind == "run" and config.output_dir is None:  # push_to_hub.py reads the run folder
        split = "" if config.split == "test" else f" --split {config.split}"
        log.info("Next: python push_to_hub.py %s%s --dry_run true", name, split)
    return 0


if __name__ == "__main__":
    run_script(main, "evaluate.py")
