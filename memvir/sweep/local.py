"""Stage commands side by side on this machine, each in a process of its own."""

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from memvir.errors import UserError
from memvir.experiment.settings import Resources
from memvir.sweep.plan import Job, Outcome

GPU_FAILED = ": the GPU failed ("
"""In the last line of a run whose GPU did, as `memvir.experiment.gpu_errors` has it."""


class Machine:
    """Its cores and GPUs, and the stages at work on them.

    Args:
        needs: what a run of each data set takes; other stages take a core. No more is taken than there is.
        most: so many stages at a time, or None.
    """

    has_other_nodes = False

    def __init__(self, needs: Mapping[str, Resources], cores: int, gpus: Sequence[str] = (), most: int | None = None):
        self.needs, self.cores, self.gpus, self.most = needs, cores, list(gpus), most
        self.pool = ThreadPoolExecutor(4096)  # one for each stage at work, waiting for it
        self.running: dict[Future[Outcome], tuple[int, dict[str, float]]] = {}  # the cores and the shares of GPUs taken
        self.processes: set[subprocess.Popen[str]] = set()
        self.printed: SimpleQueue[tuple[Job, str]] = SimpleQueue()
        self.stopping = False

    def has_room(self, job: Job) -> bool:
        """Whether the job may start now."""
        return self._place(job) is not None

    def start(self, job: Job) -> Future[Outcome]:
        place = self._place(job)
        assert place is not None
        future = self.pool.submit(self._work, job, list(place[1]))
        self.running[future] = place
        return future

    def lines(self) -> list[tuple[Job, str]]:
        """What the stages at work have printed since the last call."""
        return [self.printed.get() for _ in range(self.printed.qsize())]

    def stop(self) -> None:
        """Ask every stage at work to save its state and end, the first time that it is called."""
        if not self.stopping:
            self.stopping = True
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        self.pool.shutdown()

    def _place(self, job: Job) -> tuple[int, dict[str, float]] | None:
        """The cores that a job takes now, and its share of each GPU that it gets; None if there is no room."""
        self.running = {future: taken for future, taken in self.running.items() if not future.done()}
        need = self.needs[job.option("dataset")] if job.is_run else Resources()
        cpus, share = min(need.cpus, self.cores), min(need.gpus, len(self.gpus))
        if len(self.running) == self.most or sum(taken for taken, _ in self.running.values()) + cpus > self.cores:
            return None
        free = dict.fromkeys(self.gpus, 1.0)
        for _, shares in self.running.values():
            for gpu, taken in shares.items():
                free[gpu] -= taken
        whole = math.ceil(share)
        found = [gpu for gpu in self.gpus if free[gpu] > min(share, 1.0) - 1e-6][:whole]
        return (cpus, dict.fromkeys(found, min(share, 1.0))) if len(found) == whole else None

    def _work(self, job: Job, gpus: list[str]) -> Outcome:
        def started(process: subprocess.Popen[str]) -> None:
            self.processes.add(process)
            if self.stopping:
                process.send_signal(signal.SIGTERM)

        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        outcome = run_command(job, Path.cwd(), environment, lambda line: self.printed.put((job, line)), started)
        if not (outcome.code and gpus and GPU_FAILED in outcome.message and set(self.gpus) - set(gpus)):
            return outcome
        # or it would be free soonest, each time, and every run would fail there
        self.gpus = [gpu for gpu in self.gpus if gpu not in gpus]
        self.printed.put((job, f"no other run is given GPU {', '.join(gpus)}"))
        return dataclasses.replace(outcome, elsewhere=True)


def run_command(
    job: Job,
    folder: Path,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    started: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> Outcome:
    """Run a stage's command to its end, calling `started` with its process and `say` with each line that it prints.

    The stage is told to save and end when the thread that called this does (`memvir.signals.end_with_parent`).
    """
    _, arguments = job.command.split("python ", 1)  # "exec python" stands for this interpreter
    process = subprocess.Popen(
        [sys.executable, *shlex.split(arguments)],
        cwd=folder,
        env={**os.environ, "DVC_STAGE": job.name, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C in the terminal reaches the sweep alone, which tells its runs in order
    )
    started(process)
    assert process.stderr is not None
    last = ""
    try:
        for line in process.stderr:
            last = line.strip()
            say(last)
        code = process.wait()
    except KeyboardInterrupt:  # how Ray cancels this
        process.terminate()
        process.wait()
        raise
    return Outcome(code, (last or f"exit code {code}") if code else "")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES calls them. UserError if torch can use none."""
    import torch  # late: seconds, and only who asks for GPUs wants to know

    count = torch.cuda.device_count()  # as the driver says, which may be too old for this torch
    if count and not torch.cuda.is_available():
        from memvir.experiment.gpu_errors import no_gpu

        raise UserError(
            f"there are {count} GPUs, and torch can use none ({no_gpu()}); runtime.device: cpu trains without them"
        )
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named[:count] if len(named) >= count and named[0] else [str(number) for number in range(count)]
