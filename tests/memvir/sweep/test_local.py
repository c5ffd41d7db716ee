"""Stages side by side on one machine: what they take of it, what they print, and how they are stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memvir.errors import UserError
from memvir.experiment.gpu_errors import gpu_errors
from memvir.experiment.settings import Resources
from memvir.params import parse_params
from memvir.sweep import local
from memvir.sweep.local import Machine
from memvir.sweep.plan import Job
from tests import tiny

ROOT = Path(__file__).parents[3]


def job(code: str, variant: str = "v", dataset: str = "tiny") -> Job:
    """A run whose work is some Python code."""
    return Job(f"train@{dataset}-{variant}", f'python -c "{code}" --dataset {dataset} --variant {variant} --seed 1')


WAIT = job("import sys; print('ready', file=sys.stderr, flush=True); import signal; signal.pause()")


def fill(machine: Machine, work: Job) -> int:
    """Start it as often as there is room."""
    count = 0
    while machine.has_room(work):
        machine.start(work)
        count += 1
    return count


@pytest.fixture
def machine_of():
    machines = []

    def build(needs, *machine):
        machines.append(Machine({"tiny": Resources(**needs)}, *machine))
        return machines[-1]

    yield build
    for machine in machines:
        machine.stop()
        machine.close()


@pytest.mark.parametrize(
    ("cores", "gpus", "most", "needs", "room"),
    [
        (4, 0, None, {"cpus": 1}, 4),
        (4, 0, None, {"cpus": 2}, 2),
        (5, 0, None, {"cpus": 2}, 2),
        (4, 0, 3, {"cpus": 1}, 3),
        (2, 0, None, {"cpus": 8}, 1),  # no more is taken than there is
        (8, 2, None, {"cpus": 1, "gpus": 1}, 2),
        (8, 2, None, {"cpus": 1, "gpus": 0.5}, 4),
        (8, 1, None, {"cpus": 1, "gpus": 0.1}, 8),
        (16, 1, None, {"cpus": 1, "gpus": 0.1}, 10),
        (8, 4, None, {"cpus": 1, "gpus": 2}, 2),
        (2, 0, None, {"cpus": 1, "gpus": 1}, 2),  # without a GPU, as `dvc repro` would
    ],
)
def test_as_many_run_at_once_as_cores_and_gpus_have_room_for(machine_of, cores, gpus, most, needs, room):
    machine = machine_of(needs, cores, [str(number) for number in range(gpus)], most)
    assert fill(machine, WAIT) == room


def test_each_run_sees_the_gpus_that_it_was_given(machine_of):
    machine = machine_of({"gpus": 0.5}, 8, ["3", "GPU-5a"])
    show = (
        "import os, signal, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], file=sys.stderr, flush=True); signal.pause()"
    )
    assert fill(machine, job(show)) == 4
    assert sorted(machine.printed.get()[1] for _ in range(4)) == ["3", "3", "GPU-5a", "GPU-5a"]


def test_a_stage_that_is_no_run_takes_one_core(machine_of):
    machine = machine_of({"cpus": 3}, 4)
    machine.start(WAIT)
    assert not machine.has_room(WAIT)
    assert fill(machine, Job("prepare@tiny", WAIT.command.split(" --variant")[0])) == 1


def test_an_outcome_has_the_exit_code_and_the_last_line_if_it_failed(machine_of):
    machine = machine_of({}, 2)
    fine = machine.start(job("import sys; print('one', file=sys.stderr)"))
    failing = machine.start(job("import sys; print('two', file=sys.stderr); sys.exit('error: three')"))
    assert fine.result() == local.Outcome(0, "")
    assert failing.result() == local.Outcome(1, "error: three")
    assert machine.start(job("import sys; sys.exit(3)")).result() == local.Outcome(3, "exit code 3")
    assert sorted(line for _, line in machine.lines()) == ["error: three", "one", "two"]
    assert machine.has_room(WAIT)


def test_stopping_sends_sigterm_to_every_stage_even_one_that_starts_meanwhile(machine_of):
    machine = machine_of({}, 3)
    futures = [machine.start(WAIT), machine.start(WAIT)]
    ready = [machine.printed.get() for _ in futures]
    assert [line for _, line in ready] == ["ready", "ready"]
    machine.stop()
    futures.append(machine.start(WAIT))
    assert [future.result().code for future in futures] == [-signal.SIGTERM] * 3


@pytest.mark.parametrize(
    ("visible", "count", "named"),
    [(None, 2, ["0", "1"]), ("2,GPU-5a", 2, ["2", "GPU-5a"]), ("", 0, []), ("7,9,x", 2, ["7", "9"])],
)
def test_gpus_are_called_as_cuda_visible_devices_calls_them(monkeypatch, visible, count, named):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    assert local.visible_gpus() == named


def test_gpus_that_torch_cannot_use_are_an_error(monkeypatch):
    import torch

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^there are 8 GPUs, and torch can use none .CUDA_VISIBLE_DEVICES hides all.;"):
        local.visible_gpus()


STAGE = r"""
import os, select
from memvir.signals import end_with_parent, stop_signals

def save(number):
    os.write(fifo, b"saved\n")  # print may be what was interrupted
    os._exit(0)

fifo = os.open("fifo", os.O_WRONLY)
with stop_signals(save):
    end_with_parent()
    os.write(fifo, b"ready\n")
    while True:
        select.select([], [], [], 0.1)  # a signal just before signal.pause() would not wake it
"""
SWEEP = """
from memvir.sweep.local import Machine
from memvir.sweep.plan import Job

Machine({}, 1).start(Job("stage", "python stage.py")).result()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can end a process with its parent")
def test_when_the_sweep_is_killed_its_stages_save_and_end(tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    os.mkfifo(tmp_path / "fifo")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen([sys.executable, "-c", SWEEP], cwd=tmp_path, env=environment)
    with sweep, (tmp_path / "fifo").open() as fifo:
        assert fifo.readline() == "ready\n"
        sweep.kill()
        assert fifo.read() == "saved\n"  # to its end, which is the stage's


def test_a_gpu_that_fails_gets_no_other_run_and_its_run_goes_on_elsewhere(machine_of):
    run = parse_params(tiny.params()).run("tiny", "norm_softmax", 1)
    with pytest.raises(UserError) as caught, gpu_errors(run, 6):
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
    fails = job(f"import sys; sys.exit('error: {caught.value}')")
    machine = machine_of({"gpus": 1}, 8, ["0", "1"])
    first = machine.start(fails).result()
    assert first.code == 1 and first.elsewhere and machine.gpus == ["1"]
    assert "no other run is given GPU 0" in [line for _, line in machine.lines()]
    assert machine.has_room(fails)
    last = machine.start(fails).result()  # the only one that is left is kept: what fails there too is a failure
    assert last.code == 1 and not last.elsewhere and machine.gpus == ["1"]


def test_a_run_of_two_gpus_goes_on_with_the_one_that_is_left(machine_of):
    machine = machine_of({"gpus": 2}, 8, ["0", "1"])
    machine.gpus = ["1"]
    assert machine.has_room(WAIT)
