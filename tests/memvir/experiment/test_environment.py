"""What a run takes of its machine, and how it says what the machine lacks."""

import io
import os

import pytest

from memvir.experiment.environment import loader_workers
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
