"""What Ctrl-C, a closed terminal, systemd and Slurm send: one line, 128 + the signal, and nothing half written."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from memvir.signals import STOP
from tests import tiny
from tests.stages.project import ROOT
from tests.stages.test_train import act_at
from tests.stages.workspace import Workspace

RUN = ("--variant", "memvir_norm_softmax", "--seed", "1")
REACHED = [
    ("download", "os:fsync", ()),  # a file is complete under its temporary name
    ("prepare", "memvir.images.arrangement:available_cores", ()),
    ("prepare", "os:fsync", ()),
    ("weights", "os:fsync", ()),
    ("train", "memvir.experiment.data:open_images", RUN),
    ("train", "os:rename", RUN),  # everything is trained, nothing in its place
    ("evaluate", "memvir.retrieval:evaluate", RUN),
    ("evaluate", "os:fsync", RUN),
    ("tsne", "memvir.reporting.tsne:embed_in_two_dimensions", ()),
    ("tsne", "os:fsync", ()),
    ("curves", "os:fsync", ()),
    ("neighbours", "os:fsync", ()),
    ("tables", "os:fsync", ()),
    ("report", "os:fsync", ()),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which every stage has run."""
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "work")
    params = tiny.params()
    params["seeds"] = [1]
    variants = params["tiny"]["variants"]
    variants["tsne"] = {**variants["memvir_norm_softmax"], "snapshots": [1, 3]}
    workspace.write_params(params)
    workspace.prepared()
    for variant in variants:
        assert (outcome := workspace.train(variant)).code == 0, outcome.output
        assert (outcome := workspace.evaluate(variant)).code == 0, outcome.output
    for stage in ("tables", "curves", "tsne", "neighbours", "report"):
        assert (outcome := workspace.run(stage)).code == 0, outcome.output
    return workspace


@pytest.mark.parametrize(("stage", "place", "arguments"), REACHED, ids=lambda value: "".join(value))
def test_a_stage_that_is_told_to_stop_says_so_in_one_line_and_leaves_nothing_half_written(
    finished, stage, place, arguments
):
    before = finished.outputs(".")
    if stage == "evaluate":  # a result that is there already is not written again
        (finished.folder / "results" / "tiny" / "memvir_norm_softmax" / "1.json").unlink()
    for number in STOP:

        def stop(number=number):
            os.setpgid(0, 0)
            os.killpg(0, number)  # as make and a terminal do; the process itself gets it again
            os.kill(os.getpid(), number if number != signal.SIGINT else signal.SIGTERM)

        outcome = finished.run(stage, *arguments, before=lambda stop=stop: act_at(place, 1, stop))
        assert outcome.code == 128 + number, outcome.output
        name = signal.Signals(number).name
        assert outcome.output.splitlines()[-1:] == [f"interrupted by {name}; run the same command again to continue"]
        assert "Traceback" not in outcome.output
        after = finished.outputs(".")
        assert [path for path in after.keys() - before.keys() if path.endswith((".part", ".tmp"))] == []
    assert finished.run(stage, *arguments).code == 0
    after = finished.outputs("runs", "results", "reports", "dataset")
    assert after == {path: content for path, content in before.items() if path in after}


WAITING = """
import os, signal, sys
from memvir.signals import stop_signals
from stages import exit_interrupted

with stop_signals(exit_interrupted):
    try:
        print("ready", flush=True)
        while True:
            signal.pause()
    finally:
        print("cleaning up", flush=True)
        sys.stdin.readline()
        print("cleaned up", flush=True)
"""


@pytest.fixture
def waiting():
    """A process that waits for a signal, and then, as it cleans up, for a line."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", WAITING], **pipes, env=environment, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.parametrize("first", STOP)
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_signals_after_the_first_do_not_disturb_the_end(waiting, first, second):
    waiting.send_signal(first)
    assert waiting.stdout.readline() == "cleaning up\n"
    waiting.send_signal(second)
    output, errors = waiting.communicate("go on\n")
    assert (waiting.returncode, output) == (128 + first, "cleaned up\n")
    assert errors == f"interrupted by {first.name}; run the same command again to continue\n"


def test_a_second_ctrl_c_ends_at_once(waiting):
    waiting.send_signal(signal.SIGINT)
    assert waiting.stdout.readline() == "cleaning up\n"
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait() == 130 and waiting.stdout.read() == ""


def test_a_closed_terminal_is_no_error():
    terminal, end = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", WAITING], stdin=-1, stdout=-1, stderr=end, env=environment) as process:
        os.close(end)
        assert process.stdout.readline() == b"ready\n"
        os.close(terminal)
        process.send_signal(signal.SIGHUP)
        assert process.communicate(b"go on\n")[0] == b"cleaning up\ncleaned up\n"
        assert process.returncode == 128 + signal.SIGHUP


def test_what_a_process_was_started_to_ignore_it_ignores():
    """As under nohup."""
    command = ["sh", "-c", f"trap '' HUP; exec {sys.executable} -c \"$0\"", WAITING]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, env=environment, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        process.communicate("go on\n")
        assert process.returncode == 128 + signal.SIGTERM
