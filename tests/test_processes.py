"""What is said of launches; those of real processes are in test_launch.py."""

import pytest
from torch import distributed

from tweetdora.errors import InputError
from tweetdora.processes import check_launch, check_same, check_shared_folder, lost_process, machines


@pytest.mark.parametrize(
    ("environment", "refused"),
    [
        ({}, False),
        ({"MASTER_ADDR": "x"}, False),  # a plain python in a job whose script exports it
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "x"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "x", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "x", "OMPI_COMM_WORLD_SIZE": "2"}, False),  # mpirun
    ],
)
def test_a_launch_of_several_that_has_one_is_refused(environment, refused, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if refused:
        with pytest.raises(InputError, match=r"but started one .* Add --multi_gpu, .* unset MASTER_ADDR\.$"):
            check_launch()
    else:
        check_launch()


def test_one_process_agrees_with_itself(tmp_path):
    check_same({"a": 1})
    check_shared_folder(str(tmp_path / "run"), "--output_dir")
    assert list(tmp_path.iterdir()) == [], "nothing is written for it"
    assert machines() == 1


@pytest.mark.parametrize(
    ("error", "size", "lost"),
    [
        (
            RuntimeError("[pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"),
            2,
            "Connection reset by peer",
        ),
        (distributed.DistBackendError("NCCL error: unhandled"), 2, "NCCL error: unhandled"),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), 2, "Timed out waiting"),
        (RuntimeError("DataLoader timed out after 5 seconds"), 2, None),
        (RuntimeError("The size of tensor a (3) must match"), 2, None),
        (RuntimeError("Connection reset by peer"), 1, None),  # from the Hub, say
    ],
)
def test_the_loss_of_another_process_is_told_from_other_errors(error, size, lost, monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: size)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    said = lost_process(error)
    assert said is None if lost is None else f"has ended or cannot be reached ({lost})." in said


def test_a_folder_that_cannot_be_made_is_refused_in_all_processes(tmp_path, monkeypatch):
    """The others wait for the name of a file in it."""
    (tmp_path / "run").write_text("a file")
    state = type("State", (), {"num_processes": 2, "is_main_process": True})
    told = []
    monkeypatch.setattr("tweetdora.processes.PartialState", state)
    monkeypatch.setattr("tweetdora.processes.broadcast_object_list", lambda found: told.append(found) or found)
    with pytest.raises(InputError, match="--output_dir .*/run cannot be written: .*File exists.* another folder"):
        check_shared_folder(str(tmp_path / "run"), "--output_dir")
    assert "File exists" in told[0][1]


def test_without_other_processes_none_is_lost():
    assert lost_process(RuntimeError("Connection reset by peer")) is None
