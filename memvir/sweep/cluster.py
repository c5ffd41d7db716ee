"""Stage commands as Ray tasks, on a cluster whose nodes share the folder or do not."""

import contextlib
import dataclasses
import io
import logging
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from memvir.errors import UserError
from memvir.experiment import paths
from memvir.files import write_text
from memvir.libraries import available_cores
from memvir.params import Params
from memvir.sweep import local, plan
from memvir.sweep.local import Machine, run_command
from memvir.sweep.plan import Job, Outcome

log = logging.getLogger("memvir")

TOKEN = Path("scratch") / "sweep-token"  # a node that can read this sweep's token works in the folder itself
HEAD_STARTS_IN = 120  # seconds, at most
DELIVER_EVERY = 60.0  # seconds, at most, between the checkpoints that a node without the folder sends home


@dataclasses.dataclass(frozen=True)
class Workspace:
    """The folder of the sweep, as a node finds it: in place, or as a copy of its inputs."""

    root: Path
    token: str
    dataset: str = "none"

    @property
    def copy(self) -> Path:
        return Path(tempfile.gettempdir()) / f"memvir-{self.token}" / self.dataset

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
        self.copy.parent.mkdir(exist_ok=True)
        with FileLock(f"{self.copy}.lock"):
            if not self.copy.exists():
                with tempfile.TemporaryDirectory(dir=self.copy.parent) as unpacked:
                    unpack(inputs, Path(unpacked) / "inputs")
                    (Path(unpacked) / "inputs").rename(self.copy)
        return self.copy

    def remove_copy(self) -> None:
        shutil.rmtree(self.copy.parent, ignore_errors=True)


@ray.remote(num_cpus=0)
class Home:
    """The sweep's folder for nodes that do not share it, and the lines that runs print on their way to the display."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[tuple[Job, str]] = []

    def put_line(self, job: Job, line: str) -> None:
        self.lines.append((job, line))

    def take_lines(self) -> list[tuple[Job, str]]:
        taken, self.lines = self.lines, []
        return taken

    def fetch(self, paths: Sequence[str]) -> bytes:
        return pack(self.root, paths)

    def deliver(self, paths: Sequence[str], archive: bytes) -> None:
        replace(paths, archive, self.root)


@ray.remote(max_retries=3, retry_exceptions=False)
def run_stage(
    job: Job,
    reads: list[str],
    leaves: list[str],
    workspace: Workspace,
    inputs: bytes | None,
    home: ray.actor.ActorHandle,
) -> Outcome:
    """Run a stage's command; report the lines that it prints. Ray runs it again elsewhere if its node dies.

    Args:
        reads: what other stages made for it, for a node without the folder to fetch.
        leaves: what it makes, its logs, and the checkpoints that it leaves when it is interrupted, to send home.
    """
    folder = workspace.folder(inputs)
    away = folder != workspace.root
    if away:
        carried = [*reads, *leaves]
        replace(carried, ray.get(home.fetch.remote(carried)), folder)  # type: ignore[arg-type]  # an actor has no types
    node = ray.get_runtime_context().get_node_id()[:6]
    home.put_line.remote(job, f"{job.name.split('@')[0]} on {socket.gethostname()} ({node})")
    delivered = time.monotonic()

    def say(line: str) -> None:
        nonlocal delivered
        home.put_line.remote(job, line)
        if away and time.monotonic() - delivered > DELIVER_EVERY:
            ray.get(home.deliver.remote(leaves, pack(folder, leaves)))
            delivered = time.monotonic()

    try:
        return run_command(job, folder, {}, say)
    finally:
        if away:
            ray.get(home.deliver.remote(leaves, pack(folder, leaves)))


def on_every_node(function: Any, *arguments: Any) -> list[Any]:
    """What a function returns on each living node; None where it fails."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [_on(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
    results: list[Any] = []
    for result in [task.options(scheduling_strategy=node).remote(*arguments) for node in nodes]:
        try:
            results.append(ray.get(result, timeout=60))
        except (ray.exceptions.RayError, TimeoutError):
            results.append(None)
    return results


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
        members.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        members.extractall(folder)


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


class Cluster:
    """An executor that trains and evaluates on the Ray cluster at `address`, and runs all other stages here.

    Raises UserError if no cluster answers there, or if a run asks for more than any one node has.
    """

    has_other_nodes = True

    def __init__(self, params: Params, address: str) -> None:
        self.params, self.here = params, Machine({}, available_cores())
        connect(address)
        check_resources(params)
        self.workspace = Workspace(Path.cwd(), uuid.uuid4().hex)
        write_text(TOKEN, self.workspace.token)
        self.all_here = all(on_every_node(Workspace.is_here, self.workspace))
        self.home = Home.options(scheduling_strategy=_on(ray.get_runtime_context().get_node_id())).remote(Path.cwd())  # type: ignore[attr-defined]
        self.inputs: dict[str, ray.ObjectRef] = {}  # of each data set, packed
        self.tasks: list[ray.ObjectRef] = []

    def has_room(self, job: Job) -> bool:
        return job.is_run or self.here.has_room(job)  # Ray itself lets what is too much wait

    def start(self, job: Job) -> Future[Outcome]:
        if not job.is_run:
            return self.here.start(job)
        dataset, variant, seed = job.option("dataset"), job.option("variant"), int(job.option("seed"))
        needs = self.params.resources_of(dataset)
        data = [f"dataset/{dataset}/{part}" for part in ("index.csv", "images", "weights")]
        shipped = ["params.yaml", "memvir", "stages", *data]
        if dataset not in self.inputs:
            self.inputs[dataset] = ray.put(None if self.all_here else pack(Path.cwd(), shipped))
        reads = [path for path in job.deps if not path.startswith(tuple(shipped))]
        private = [
            paths.log_folder(dataset, variant, seed),
            paths.checkpoint_folder(self.params.runtime, dataset, variant, seed),
        ]
        leaves = [*job.outs, *(str(path) for path in private if not path.is_absolute())]
        task = run_stage.options(name=job.name, num_cpus=needs.cpus, num_gpus=needs.gpus)
        workspace = dataclasses.replace(self.workspace, dataset=dataset)
        self.tasks.append(task.remote(job, reads, leaves, workspace, self.inputs[dataset], self.home))
        return self.tasks[-1].future()

    def lines(self) -> list[tuple[Job, str]]:
        return self.here.lines() + ray.get(self.home.take_lines.remote())

    def stop(self) -> None:
        if not self.here.stopping:
            self.here.stop()
            for task in self.tasks:
                ray.cancel(task)

    def close(self) -> None:
        self.here.close()
        if not self.all_here:
            on_every_node(Workspace.remove_copy, self.workspace)
        TOKEN.unlink(missing_ok=True)
        ray.shutdown()


def connect(address: str) -> None:
    """Join the cluster at `address`. Raises UserError if none answers there."""
    for module in (sys.modules[__name__], local, plan):  # by value: a node without the folder cannot import them
        ray.cloudpickle.register_pickle_by_value(module)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        if ":" in address:  # Ray itself would try for minutes, and say nothing
            _knock(*address.rsplit(":", 1))
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({' '.join(str(error).split())})") from None


def _knock(host: str, port: str) -> None:
    """Wait for a head that is being started, as beside it in a batch script. Raises OSError if none comes."""
    for second in range(HEAD_STARTS_IN):
        try:
            return socket.create_connection((host, int(port)), timeout=10).close()
        except ConnectionRefusedError:
            if second == 0:
                log.info(
                    "%s:%s: nothing answers yet; waiting up to %d s for a Ray head to start", host, port, HEAD_STARTS_IN
                )
        time.sleep(1)
    socket.create_connection((host, int(port)), timeout=10).close()


def check_resources(params: Params) -> None:
    """UserError if a run asks for more than any one node has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for dataset in params.datasets:
        needs = params.resources_of(dataset)
        if not any(needs.cpus <= node.get("CPU", 0) and needs.gpus <= node.get("GPU", 0) for node in nodes):
            there = " or ".join(sorted({f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes}))
            raise UserError(
                f"{dataset}.resources: a run asks for {needs.cpus} cores and {needs.gpus:g} GPUs, and a node here has "
                f"{there}; ask for less or use a larger machine"
            )


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)
