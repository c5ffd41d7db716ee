"""Stage commands as Ray tasks: on this machine, on a cluster that shares the folder, or on one that does not."""

import contextlib
import ctypes
import io
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memvir.errors import UserError

TOKEN = Path("scratch") / "sweep-token"  # a node that can read this sweep's token works in the folder itself
DELIVER_EVERY = 60.0  # seconds, at most, between the checkpoints that a node without the folder sends home


@dataclass(frozen=True)
class Work:
    """A stage's command and, for a node that does not share the folder, the files to carry there and back."""

    stage: str
    run: str
    command: str
    reads: list[str]
    """What other jobs made for it."""
    leaves: list[str]
    """What it makes, its logs, and the checkpoint that it leaves when it is interrupted."""


@dataclass(frozen=True)
class Outcome:
    stage: str
    code: int
    """The exit code; 1 also if it was not run because what it waits for failed."""
    message: str
    """Its last line, if it failed."""


@dataclass(frozen=True)
class Workspace:
    """The folder of the sweep, as a node finds it: in place, or as a copy of its inputs."""

    root: Path
    token: str

    @property
    def copy(self) -> Path:
        return Path(tempfile.gettempdir()) / f"memvir-{self.token}"

    def is_here(self) -> bool:
        """Whether this node sees the sweep's folder."""
        with contextlib.suppress(OSError):
            return (self.root / TOKEN).read_text() == self.token
        return False

    def folder(self, inputs: bytes | None) -> Path:
        """Where to work on this node; unpacks `inputs` there, once."""
        if self.is_here():
            return self.root
        if inputs is None:
            raise FileNotFoundError(
                f"{self.root}: this node joined after the sweep began and does not share the folder"
            )
        with FileLock(f"{self.copy}.lock"):
            if not self.copy.exists():
                with tempfile.TemporaryDirectory(dir=self.copy.parent) as unpacked:
                    unpack(inputs, Path(unpacked) / "inputs")
                    (Path(unpacked) / "inputs").rename(self.copy)
        return self.copy

    def remove_copy(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        Path(f"{self.copy}.lock").unlink(missing_ok=True)


@ray.remote(num_cpus=0)
class Home:
    """The sweep's folder for nodes that do not share it, and the lines that runs print on their way to the display."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[tuple[str, str]] = []

    def put_line(self, run: str, line: str) -> None:
        self.lines.append((run, line))

    def take_lines(self) -> list[tuple[str, str]]:
        taken, self.lines = self.lines, []
        return taken

    def fetch(self, paths: Sequence[str]) -> bytes:
        return pack(self.root, paths)

    def deliver(self, paths: Sequence[str], archive: bytes) -> None:
        replace(paths, archive, self.root)


@ray.remote(max_retries=3, retry_exceptions=False)
def run_stage(
    work: Work, workspace: Workspace, inputs: bytes | None, home: ray.actor.ActorHandle, *before: Outcome
) -> Outcome:
    """Run a stage's command; report the lines that it prints. Ray runs it again elsewhere if its node dies."""
    failed = [outcome.stage for outcome in before if outcome.code]
    if failed:
        return Outcome(work.stage, 1, f"not run, since {failed[0]} failed")
    folder = workspace.folder(inputs)
    away = folder != workspace.root
    if away:
        carried = [*work.reads, *work.leaves]
        replace(carried, ray.get(home.fetch.remote(carried)), folder)  # type: ignore[arg-type]  # an actor has no types
    node = ray.get_runtime_context().get_node_id()[:6]
    home.put_line.remote(work.run, f"{work.stage.split('@')[0]} on {socket.gethostname()} ({node})")
    _, *arguments = shlex.split(work.command)  # "python" stands for the interpreter of this node
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
    delivered = time.monotonic()
    assert process.stderr is not None
    try:
        for line in process.stderr:
            last.append(line.strip())
            home.put_line.remote(work.run, line.strip())
            if away and time.monotonic() - delivered > DELIVER_EVERY:
                ray.get(home.deliver.remote(work.leaves, pack(folder, work.leaves)))
                delivered = time.monotonic()
        code = process.wait()
    except KeyboardInterrupt:  # ray.cancel
        process.send_signal(signal.SIGTERM)  # the run saves a checkpoint
        process.wait()
        raise
    finally:
        if away:
            ray.get(home.deliver.remote(work.leaves, pack(folder, work.leaves)))
    return Outcome(work.stage, code, (last[0] if last else f"exit code {code}") if code else "")


@ray.remote(num_cpus=0, max_retries=0)
def sees_folder(workspace: Workspace) -> bool:
    return workspace.is_here()


@ray.remote(num_cpus=0, max_retries=0)
def remove_copy(workspace: Workspace) -> None:
    workspace.remove_copy()


def on_every_node(task: Any, *arguments: Any) -> list[Any]:
    """What a task returns on each living node; None where it fails."""
    pending = [task.options(scheduling_strategy=_on(node["NodeID"])) for node in ray.nodes() if node["Alive"]]
    results: list[Any] = []
    for result in [remote.remote(*arguments) for remote in pending]:
        try:
            results.append(ray.get(result, timeout=60))
        except (ray.exceptions.RayError, TimeoutError):
            results.append(None)
    return results


def open_home(root: Path) -> ray.actor.ActorHandle:
    """The actor that stands for the sweep's folder, on the node of the sweep itself."""
    return Home.options(scheduling_strategy=_on(ray.get_runtime_context().get_node_id())).remote(root)  # type: ignore[attr-defined]


def pack(folder: Path, paths: Sequence[str]) -> bytes:
    """Files, and all files of folders, below `folder` as a tar archive; what does not exist is left out."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in paths:
            found = [folder / path] if (folder / path).is_file() else sorted((folder / path).rglob("*"))
            for file in found:
                # opened first: a checkpoint may be replaced at this moment
                with contextlib.suppress(FileNotFoundError, IsADirectoryError), file.open("rb") as content:
                    archive.addfile(archive.gettarinfo(arcname=str(file.relative_to(folder)), fileobj=content), content)
    return buffer.getvalue()


def unpack(archive: bytes, folder: Path) -> None:
    """What `pack` made, below `folder`; nothing is written outside it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as members:
        members.extractall(folder, filter="data")


def replace(paths: Sequence[str], archive: bytes, folder: Path) -> None:
    """Make `paths` below `folder` what they are in the archive; a file is never seen half written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".received-") as received:
        unpack(archive, Path(received))
        new = {file.relative_to(received) for file in Path(received).rglob("*") if file.is_file()}
        for path in paths:
            old = [folder / path] if (folder / path).is_file() else (folder / path).rglob("*")
            for file in [file for file in old if file.is_file() and file.relative_to(folder) not in new]:
                file.unlink()
        for name in new:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(received) / name).replace(folder / name)


def _die_with_parent() -> None:
    """Let the system kill the run when the Ray worker dies, so that it can be tried again elsewhere."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def connect(address: str | None, cpus: int | None) -> None:
    """Join the cluster at `address`, or start Ray on this machine alone with so many cores.

    Raises UserError if no cluster answers there.
    """
    # by value: a node without the folder has no module `stages` to import
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        ray.init(
            address="local",  # even if this machine belongs to a cluster
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
        )
        return
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, port = address.rsplit(":", 1)
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({' '.join(str(error).split())})") from None


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)
