"""What a run takes of its machine, and how it says what the machine lacks."""

import io
import os

import pytest
import torch

from memvir.experiment.environment import loader_workers, set_up_device
from memvir.experiment.settings import Runtime
from memvir.libraries import available_cores


def use_machine(monkeypatch: pytest.MonkeyPatch, cores: int, allowed: int, quota: str = "max 100000") -> None:
    """A machine of so many cores, of which taskset allows some and a container a share of the time."""
    from joblib.externals.loky.backend import context

    exists = os.path.exists
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/sys/fs/cgroup/cpu.max" or exists(path))
    monkeypatch.setattr(context, "open", lambda *_: io.StringIO(quota), raising=False)


@pytest.mark.parametrize(
    ("allowed", "quota", "expected"),
    [(64, "max 100000", 64), (1, "max 100000", 1), (64, "300000 100000", 3), (64, "50000 100000", 1)],
)
def test_cores_are_those_that_affinity_and_quota_leave(monkeypatch, allowed, quota, expected):
    use_machine(monkeypatch, 64, allowed, quota)
    assert available_cores() == expected


@pytest.mark.parametrize(("cores", "processes", "expected"), [(1, 1, 1), (6, 1, 6), (64, 1, 8), (8, 4, 2), (2, 4, 1)])
def test_loader_processes_share_the_cores_among_the_processes_of_a_run(monkeypatch, cores, processes, expected):
    use_machine(monkeypatch, 64, cores)
    assert loader_workers(Runtime(processes=processes)) == expected
    assert loader_workers(Runtime(processes=processes, workers=5)) == 5


@pytest.mark.parametrize(
    ("asked", "processes", "expected"),
    [("auto", 1, 0), ("cuda", 1, 0), ("cuda:2", 1, 2), ("cuda:2", 4, 1), ("auto", 4, 1)],
)
def test_a_run_has_the_gpu_that_it_asks_for_and_each_of_several_processes_its_own(
    asked, processes, expected, monkeypatch
):
    """Here CUDA is a list of what it is told."""
    chosen = [1 if processes > 1 else 0]  # by `join_world`
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(device.index))
    for name in ("CUBLAS_WORKSPACE_CONFIG", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if processes > 1:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *arguments, **options: None)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert set_up_device(Runtime(device=asked, processes=processes)) == torch.device("cuda", expected)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert chosen[-1] == expected
