"""Stage commands as Ray tasks: on this machine, on a cluster that shares the folder, or on one that does not."""

import contextlib
import ctypes
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import ray
from filelock import FileLock

TOKEN = Path("scratch") / "sweep-token"  # a node that can read this sweep's token works in the folder itself


@dataclass(frozen=True)
class Outcome:
    stage: str
    code: int
    """The exit code; None of what it waited for may have failed, or it is not run and this is 1."""
    message: str
    """Its last line, if it failed."""
    outputs: bytes | None = None
    """A tar archive of what it made, from a node that does not share the folder."""


@dataclass(frozen=True)
class Workspace:
    """The folder of the sweep, as a node finds it: in place, or as a copy of its inputs."""

    root: Path
    token: str

    def folder(self, inputs: bytes | None) -> Path:
        with contextlib.suppress(OSError):
            if (self.root / TOKEN).read_text() == self.token:
                return self.root
        assert inputs is not None
        copy = Path(tempfile.gettempdir()) / f"memvir-{self.token}"
        with FileLock(f"{copy}.lock"):
            if not copy.exists():
                with tempfile.TemporaryDirectory(dir=copy.parent) as unpacked:
                    unpack(inputs, Path(unpacked) / "inputs")
                    (Path(unpacked) / "inputs").rename(copy)
        return copy


@ray.remote(num_cpus=0)
class Lines:
    """The lines that runs print, on their way to the display. (A task that waits on Ray's own Queue lends its core.)"""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def put(self, run: str, line: str) -> None:
        self.lines.append((run, line))

    def take(self) -> list[tuple[str, str]]:
        taken, self.lines = self.lines, []
        return taken


@ray.remote(max_retries=3, retry_exceptions=False)
def run_stage(
    stage: str,
    run: str,
    command: str,
    outs: list[str],
    workspace: Workspace,
    inputs: bytes | None,
    lines: ray.actor.ActorHandle,
    *before: Outcome,
) -> Outcome:
    """Run a stage's command; report its progress lines. A task whose node dies is run again by Ray elsewhere."""
    failed = [outcome.stage for outcome in before if outcome.code]
    if failed:
        return Outcome(stage, 1, f"not run, since {failed[0]} failed")
    folder = workspace.folder(inputs)
    for outcome in before:
        if outcome.outputs is not None and folder != workspace.root:
            unpack(outcome.outputs, folder)
    _, *arguments = shlex.split(command)  # "python" stands for the interpreter of this node
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C in the terminal reaches the sweep alone, which tells its runs in order
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    last: deque[str] = deque(maxlen=1)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            last.append(line.strip())
            lines.put.remote(run, line.strip())
        code = process.wait()
    except KeyboardInterrupt:  # ray.cancel
        process.send_signal(signal.SIGTERM)  # the run saves a checkpoint
        process.wait()
        raise
    if code:
        return Outcome(stage, code, last[0] if last else f"exit code {code}")
    return Outcome(stage, 0, "", None if folder == workspace.root else pack(folder, outs))


def pack(folder: Path, paths: list[str]) -> bytes:
    """Paths below `folder` as a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in paths:
            if (folder / path).exists():
                archive.add(folder / path, arcname=path)
    return buffer.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """What `pack` made, below `folder`; nothing is written outside it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        members.extractall(folder, filter="data")


def _die_with_parent() -> None:
    """Let the system kill the run when the Ray worker dies, so that it can be tried again elsewhere."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def connect(address: str | None, cpus: int | None) -> None:
    """Join the cluster at `address`, or start Ray on this machine alone with so many cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
