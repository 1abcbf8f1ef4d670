"""Launches of several processes: the launch files, one machine, two machines on loopback, and what goes wrong."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pyarrow
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from forked import Script, environments, free_port, launch
from launchers import ACCELERATE, finish, read_until, second_of, start
from pyarrow import parquet
from safetensors.torch import load_file
from soak import outcome, same, train_flags
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "recipes/accelerate"


def end(processes: list[Script]) -> str:
    """All that these processes of one launch printed; none of them failed."""
    said = "".join(forked.finish(*processes))
    assert {process.returncode for process in processes} == {0}, said
    return said


def two_machines(script: str, flags: list[str], folders: tuple[Path, Path]) -> list[subprocess.Popen]:
    """The same `accelerate launch` on each of two "machines", one process each; folders: where each works."""
    port = str(free_port())
    words = ["--config_file", str(FILES / "multi_node.yaml"), "--num_machines", "2", "--num_processes", "2"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [
        start([*ACCELERATE, *words, "--machine_rank", str(rank), str(ROOT / script), *flags], folders[rank])
        for rank in (0, 1)
    ]


# Launch files


def parsed(*words: str):
    """What accelerate's own parser makes of a launch."""
    return _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))[0]


@pytest.mark.parametrize(
    ("file", "processes", "machines"), [("cpu", 2, 1), ("multi_gpu", 8, 1), ("fsdp2", 8, 1), ("multi_node", 16, 2)]
)
def test_a_launch_file_starts_as_many_processes_as_it_says(file, processes, machines):
    found = parsed("--config_file", str(FILES / f"{file}.yaml"))
    assert (found.multi_gpu or found.use_fsdp) and not found.cpu, "accelerate's launcher of several processes"
    assert found.use_fsdp == (file == "fsdp2") and (not found.use_fsdp or found.fsdp_version == 2)
    assert (found.num_processes, found.num_machines, found.mixed_precision) == (processes, machines, "no")
    assert parsed("--config_file", str(FILES / f"{file}.yaml"), "--num_processes", "4").num_processes == 4


def test_what_each_machine_passes_wins_over_the_file():
    flags = ["--machine_rank", "1", "--main_process_ip", "127.0.0.1", "--main_process_port", "1234"]
    found = parsed("--config_file", str(FILES / "multi_node.yaml"), *flags)
    assert (found.machine_rank, found.main_process_ip, found.main_process_port) == (1, "127.0.0.1", 1234)


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_a_launch_that_became_one_process_is_refused(script, teachable_dir, data_dir, tmp_path):
    """accelerate starts one without a word: the launcher itself starts train.py, and the others get what it sets."""
    (tmp_path / "in.csv").write_text("text\na good day\n")
    flags = {
        "train.py": train_flags(teachable_dir, data_dir, tmp_path / "run"),
        "evaluate.py": [teachable_dir],
        "predict.py": [teachable_dir, str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")],
    }[script]
    words = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    words += ["--dynamo_backend", "no", str(ROOT / script), *flags]
    if script == "train.py":
        (said,) = finish(start([*ACCELERATE, *words], tmp_path))
    else:
        options, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
        _, environment = prepare_simple_launcher_cmd_env(options)
        said = forked.start([ROOT / script, *flags], tmp_path, environment).end()
    assert f"\n{script}: accelerate launch was asked for several processes, but started one" in f"\n{said}"


# One machine

# Keeps the gradients of every step, of a model in float64.
GRADIENTS = """
import runpy, sys, torch
sys.path.insert(0, {root!r})
from tweetdora import training
from tweetdora.callbacks import StopOnNonFiniteGradient
from transformers.models.llama.modeling_llama import LlamaRMSNorm
def norm(self, x):  # transformers' own computes in float32
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
LlamaRMSNorm.forward = norm
make, check, kept = training.make_trainer, StopOnNonFiniteGradient.on_pre_optimizer_step, []
def in_float64(task, arguments, loaded, stop):
    loaded.model.double()
    return make(task, arguments, loaded, stop)
def keep(self, *arguments, **more):
    model = self.trainer.model
    kept.append({{name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}})
    check(self, *arguments, **more)
training.make_trainer, StopOnNonFiniteGradient.on_pre_optimizer_step = in_float64, keep
sys.argv[0] = "train.py"
status = runpy.run_path({root!r} + "/train.py")["main"]()
torch.save(kept, sys.argv[sys.argv.index("--output_dir") + 1] + f"/gradients{{torch.distributed.get_rank()}}.pt")
torch.distributed.destroy_process_group()
sys.exit(status)
"""


@pytest.mark.parametrize("batching", ["shared_prefix", "padded"])
def test_every_gradient_is_that_of_one_process(batching, teachable_dir, data_dir, tmp_path):
    """In float64. 44 rows: the last step has 12."""
    script, found = tmp_path / "gradients.py", {}
    script.write_text(GRADIENTS.format(root=str(ROOT)))
    for count in (1, 2, 4):
        run_dir = tmp_path / f"run{count}"
        flags = train_flags(teachable_dir, data_dir, run_dir)
        changes = {"--max_train_samples": "44", "--max_steps": "5", "--lora_dropout": "0", "--max_eval_samples": "0"}
        # Not clipped: a common factor would not be seen.
        for flag, value in changes.items():
            flags[flags.index(flag) + 1] = value
        more = ["--max_grad_norm", "1e9", "--save_steps", "100", "--batching", batching]
        end(launch(count, [script, *flags, *more], tmp_path))
        found[count] = torch.load(run_dir / "gradients0.pt")
    assert len(found[1]) == 5 and all(weight.dtype == torch.float64 for weight in found[1][0].values())
    for count in (2, 4):
        for step, (one, several) in enumerate(zip(found[1], found[count], strict=True)):
            for name in one:
                difference = (several[name] - one[name]).abs().max().item()
                assert difference < 1e-9 * one[name].abs().max().item() + 1e-12, (count, step, name, difference)


@pytest.mark.parametrize("file", ["cpu", "fsdp2"])
def test_two_processes_that_are_killed_end_bit_for_bit_as_two_that_were_not(file, teachable_dir, data_dir, tmp_path):
    """With dropout, so that the random states of both processes count."""

    def train(run_dir: Path, *more: str) -> list[Script]:
        words = [ROOT / "train.py", *train_flags(teachable_dir, data_dir, run_dir), *more]
        return launch(2, words, tmp_path, file)

    end(train(tmp_path / "straight"))
    killed = train(tmp_path / "killed")
    killed[0].wait_for("step  5/12")
    for process in killed:
        process.send_signal(signal.SIGKILL)
    forked.finish(*killed)
    left = [path.name for path in (tmp_path / "killed").glob("checkpoint-*")]
    assert left and "checkpoint-12" not in left and not (tmp_path / "killed/adapter").exists()
    end(train(tmp_path / "killed", "--resume_from_checkpoint", "true"))

    expected, found = outcome(tmp_path / "straight"), outcome(tmp_path / "killed")
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(expected)
    assert [name for name in expected if not same(expected[name], found[name])] == []


# A base that is sharded

# Says how much of the base this process holds, when it has been loaded and at the end.
HELD = """
import os, runpy, sys
sys.path.insert(0, {root!r})
from torch.distributed.tensor import DTensor
from tweetdora import training
load, save = training.load, training.save_run
def tell(model):
    base = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    own = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in base)
    print(f"{{os.environ['RANK']}} holds {{own}} of {{sum(weight.numel() for weight in base)}}", flush=True)
def loading(*arguments):
    found = load(*arguments)
    tell(found[0].model)
    return found
def saving(trainer, *arguments):
    tell(trainer.model)
    return save(trainer, *arguments)
training.load, training.save_run = loading, saving
training.write_out = lambda model: []  # a sharded base's layers run the model's own code, so both do
sys.argv[0] = "train.py"
status = runpy.run_path({root!r} + "/train.py")["main"]()
from torch import distributed
distributed.destroy_process_group()
sys.exit(status)
"""


@pytest.mark.parametrize("flags", [["--method", "dora"], ["--method", "lora", "--gradient_accumulation_steps", "2"]])
def test_a_base_that_is_sharded_trains_what_a_whole_one_trains(flags, teachable_dir, data_dir, tmp_path):
    """With validation by generation. 44 rows: the last step of an epoch has 12.

    Shares of the 9 rows of validation would be 2 batches and 1, and the processes would wait for each other.
    """
    script, runs = tmp_path / "held.py", {}
    script.write_text(HELD.format(root=str(ROOT)))
    changes = {
        "--max_train_samples": "44",
        "--learning_rate": "2e-2",
        "--lora_dropout": "0",
        "--max_steps": "30",
        "--eval_steps": "10",
    }
    changes["--max_eval_samples"] = "9"
    for file in ("cpu", "fsdp2"):
        words = train_flags(teachable_dir, data_dir, tmp_path / file)
        words += ["--per_device_eval_batch_size", "4"]
        for flag, value in changes.items():
            words[words.index(flag) + 1] = value
        said = end(launch(2, [script, *words, *flags], tmp_path, file))
        held = {tuple(map(int, found)) for found in re.findall(r"^\d holds (\d+) of (\d+)$", said, re.M)}
        # The head stays gathered after a validation, until the next backward pass.
        assert held and all(own == whole if file == "cpu" else own < 0.7 * whole for own, whole in held), held
        runs[file] = json.loads((tmp_path / file / "run.json").read_text())
    whole, shared = (runs[file]["result"]["log_history"] for file in ("cpu", "fsdp2"))
    assert (runs["cpu"]["training"]["shard_base"], runs["fsdp2"]["training"]["shard_base"]) == (False, True)
    for first, second in zip(whole, shared, strict=True):
        for figure in set(first) & {
            "loss",
            "grad_norm",
            "eval_loss",
            "eval_macro_f1",
            "eval_parse_rate",
            "train_loss",
        }:
            assert second[figure] == pytest.approx(first[figure], abs=1e-5), (first["step"], figure)
    assert any(line.get("eval_parse_rate", 0) > 0.5 for line in whole), "it has learnt to answer"
    adapters = [tmp_path / file / "adapter" for file in ("cpu", "fsdp2")]
    assert_close(*(load_file(folder / "adapter_model.safetensors") for folder in adapters), rtol=0, atol=1e-5)
    assert [sorted(path.name for path in folder.iterdir()) for folder in adapters][0] == sorted(
        path.name for path in adapters[1].iterdir()
    )


# Two machines


@pytest.fixture(scope="module")
def on_two_machines(teachable_dir, data_dir, tmp_path_factory) -> Path:
    """A run folder: trained on two machines, and measured there on 11 rows, which they cannot share evenly."""
    folder = tmp_path_factory.mktemp("machines")
    flags = train_flags(teachable_dir, data_dir, folder / "run")
    flags[flags.index("--lora_dropout") + 1] = "0"
    measure = [str(folder / "run"), "--max_eval_samples", "11", "--bootstrap_samples", "50"]
    trained = two_machines("train.py", flags, (folder, folder))
    printed = [finish(*trained)]
    measured = on_machines([ROOT / "evaluate.py", *measure], (folder, folder))
    printed.append(forked.finish(*measured))
    assert {process.returncode for process in (*trained, *measured)} == {0}, printed
    for first, second in printed:
        assert "macro-F1" in first and "macro-F1" not in second, "one of them speaks"
    return folder / "run"


def test_two_machines_train_what_one_process_trains(on_two_machines, teachable_dir, data_dir, tmp_path):
    flags = train_flags(teachable_dir, data_dir, tmp_path / "run")
    flags[flags.index("--lora_dropout") + 1] = "0"
    assert runpy.run_path(str(ROOT / "train.py"))["main"](flags) == 0
    one, two = (json.loads((folder / "run.json").read_text()) for folder in (tmp_path / "run", on_two_machines))
    assert (one["training"]["world_size"], two["training"]["world_size"]) == (1, 2)
    launch = "accelerate launch --multi_gpu --num_processes 2 --num_machines 2 train.py "
    assert two["command"].startswith(launch), two["command"]
    losses = [[line["loss"] for line in run["result"]["log_history"] if "loss" in line] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    first, second = (
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "run", on_two_machines)
    )
    assert_close(second, first, rtol=0, atol=1e-4)


def test_two_machines_measure_what_one_process_measures(on_two_machines, tmp_path):
    words = [
        str(on_two_machines),
        "--max_eval_samples",
        "11",
        "--bootstrap_samples",
        "50",
        "--output_dir",
        str(tmp_path),
    ]
    end([forked.start([ROOT / "evaluate.py", *words], tmp_path)])
    one, two = (
        json.loads((folder / "test.json").read_text()) for folder in (tmp_path, on_two_machines / "evaluation")
    )
    for model in ("base", "finetuned"):
        for figure in ("macro_f1", "accuracy", "parse_rate", "confusion_matrix"):
            assert one[model][figure] == two[model][figure], (model, figure)
        assert two[model]["likelihood"]["log_loss"] == pytest.approx(one[model]["likelihood"]["log_loss"], abs=1e-4)


def test_two_machines_predict_what_one_process_predicts(on_two_machines, tmp_path):
    rows = [f"{start} {word} day" for start in ("a", "such a", "The") for word in ("good", "bad", "plain")][:7]
    (tmp_path / "in.csv").write_text("text\n" + "".join(f"{row}\n" for row in rows))
    flags = [str(on_two_machines), str(tmp_path / "in.csv"), "--batch_size", "2", "--output"]
    words = [ROOT / "predict.py", *flags]
    end(on_machines([*words, "two.csv"], (tmp_path, tmp_path)))
    end([forked.start([*words, "one.csv"], tmp_path)])
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


def on_machines(words: list, folders: tuple[Path, Path], more: tuple[list, list] = ([], [])) -> list[Script]:
    """A script in one process on each of two "machines"; folders: their working folders; more: flags of each."""
    asked = environments(2, machines=2)
    return [forked.start([*words, *more[n]], folders[n], asked[n]) for n in range(2)]


def test_machines_with_different_data_are_refused(teachable_dir, data_dir, tmp_path):
    """Each machine reads its own copy, by the same relative path; on the second, one label is another."""
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        shutil.copytree(data_dir, folder / "data")
    path = folders[1] / "data/train.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[5]["label"] = (rows[5]["label"] + 1) % 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    words = [ROOT / "train.py", *train_flags(teachable_dir, "data", tmp_path / "run")]
    processes = on_machines(words, folders)
    for process, said in zip(processes, forked.finish(*processes), strict=True):
        assert process.returncode == 2
        (line,) = re.findall(r"^train.py: .*", said, re.M)
        assert re.search(
            r"process 1 on .* differs from process 0 on .*: SHA-256 of the train data: '\w+' instead of", line
        )
    assert not (tmp_path / "run").exists()


def test_machines_with_different_flags_are_refused(teachable_dir, data_dir, tmp_path):
    """Also those that change no result: a process would wait for one that saves at another step."""
    words = [ROOT / "train.py", *train_flags(teachable_dir, data_dir, tmp_path / "run")]
    more = ([], ["--learning_rate", "0.5", "--save_steps", "7"])
    processes = on_machines(words, (tmp_path, tmp_path), more)
    for process, said in zip(processes, forked.finish(*processes), strict=True):
        assert process.returncode == 2
        (line,) = re.findall(r"^train.py: process 1 on .*", said, re.M)
        assert "--learning_rate: 0.5 instead of 0.001; " in line and "--save_steps: 7 instead of 2. " in line


# Half a minute is for network file systems.
IMPATIENT = """
import runpy
from tweetdora import processes
processes._SEEN_WITHIN = 1.0
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_machines_without_a_common_run_folder_are_refused(teachable_dir, data_dir, tmp_path):
    """A relative path, and each machine has a disk of its own."""
    folders = (tmp_path / "one", tmp_path / "two")
    for folder in folders:
        folder.mkdir()
    script = tmp_path / "train.py"
    script.write_text(IMPATIENT.format(root=str(ROOT)))
    processes = on_machines([script, *train_flags(teachable_dir, data_dir, Path("run"))], folders)
    for process, said in zip(processes, forked.finish(*processes), strict=True):
        assert process.returncode == 2
        assert re.search(r"^train.py: --output_dir run is not the same folder in all processes: on ", said, re.M), said


def test_a_killed_process_ends_both_machines_with_a_line(teachable_dir, data_dir, tmp_path):
    flags = train_flags(teachable_dir, data_dir, tmp_path / "run")
    flags[flags.index("--max_steps") + 1] = "100000"
    processes = two_machines("train.py", flags, (tmp_path, tmp_path))
    read_until(processes[0], "  loss ")
    second_of(processes[1]).kill()
    said = finish(*processes)
    assert [process.returncode for process in processes] == [1, 1]
    (line,) = re.findall(r"^train.py: .*", said[0], re.M)
    assert re.fullmatch(
        r"train.py: process 0 on \S+ stops: another process of this launch has ended or cannot be reached \(.*\)\. "
        r"If that one .* resumes \(train.py: with --resume_from_checkpoint true\)\.",
        line,
    )
    assert "pair.cc" not in said[0], "no traceback of gloo"
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "started"


# Slurm's programs, for two machines that are both this one.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=1 "$@" >"$SECOND_LOG" 2>&1 &
SLURM_NODEID=0 "$@" || status=$?
wait $! || status=$?
[[ -z "${status:-}" ]] || cat "$SECOND_LOG"
exit ${status:-0}
"""


def test_the_slurm_script_trains_on_all_machines(teachable_dir, data_dir, tmp_path):
    programs = {"srun": SRUN, "scontrol": "#!/bin/sh\necho 127.0.0.1\necho 127.0.0.2\n"}
    programs["accelerate"] = f'#!/bin/sh\nexec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n'
    for name, content in programs.items():
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "x[1-2]",
        "PROCESSES_PER_NODE": "1",
    }
    words = ["bash", str(FILES / "slurm.sh"), "train.py", *train_flags(teachable_dir, data_dir, tmp_path / "run")]
    path = f"{tmp_path}:{os.environ['PATH']}"
    process = start(words, ROOT, PATH=path, SECOND_LOG=str(tmp_path / "second.log"), **slurm)
    (said,) = finish(process)
    assert process.returncode == 0, said
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (run["status"], run["training"]["world_size"]) == ("finished", 2)
