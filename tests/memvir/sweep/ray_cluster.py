"""A Ray cluster of several nodes on this machine, on loopback addresses only."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

import psutil
from ray.cluster_utils import Cluster as RayCluster

HEAD, SECOND = "127.0.0.2", "127.0.0.3"  # Ray resolves 127.0.0.1 to an address of the outside


class Cluster:
    """A head and nodes of one core each."""

    def __enter__(self) -> "Cluster":
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  polite workers hardly move beside other tests
        head = {"num_cpus": 1, "include_dashboard": False, "node_ip_address": HEAD}
        self.ray = RayCluster(initialize_head=True, head_node_args=head)
        self.address: str = self.ray.address
        self.nodes: list[subprocess.Popen[str]] = []
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for node in self.nodes:
            self.kill(node)
        self.ray.shutdown()

    def add_node(self, hide: Path | None = None) -> subprocess.Popen[str]:
        """One more node; it sees an empty folder in the place of `hide`, as another machine would."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}", "--block"]
        command += [f"--node-ip-address={SECOND}", "--num-cpus=1", "--disable-usage-stats"]
        if hide:
            command = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{hide}" && exec "$@"', "sh", *command]
        node = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.nodes.append(node)
        wait_for(node, "Ray runtime started")
        return node

    def wait_for_run_on_second(self, sweep: subprocess.Popen[str]) -> str:
        """The run that a sweep of two trains on the node that is not the head, once it has checkpoints."""
        head = self.ray.head_node.node_id[:6]
        started = wait_for(sweep, "train on", "train on")
        (run,) = [line.split(":")[0] for line in started if head not in line]
        wait_for(sweep, f"{run} epoch 10/")
        return run

    def kill(self, node: subprocess.Popen[str]) -> None:
        """As when a machine loses power."""
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        node.communicate()
        self.nodes.remove(node)


def can_hide() -> bool:
    """Whether this machine lets a process have a view of the file system of its own."""
    if not shutil.which("unshare"):
        return False
    mount = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    return subprocess.run(mount, capture_output=True).returncode == 0


def wait_for(process: subprocess.Popen[str], *texts: str) -> list[str]:
    """Read the process's output until each of the texts, in this order, stood in a line of its own: those lines."""
    assert process.stdout is not None
    seen, matching = [], []
    expected = list(texts)
    while expected:
        line = process.stdout.readline()
        assert line, f"{expected[0]!r} was never printed:\n" + "".join(seen)
        seen.append(line)
        if expected[0] in line:
            expected.pop(0)
            matching.append(line)
    return matching
