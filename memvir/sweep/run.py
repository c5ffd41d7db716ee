"""A sweep: what `dvc repro` does, side by side. A stage that is out of date runs as soon as what it reads is made."""

import contextlib
import math
import re
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from memvir.errors import UserError
from memvir.libraries import available_cores
from memvir.params import Params
from memvir.signals import Interrupted, interrupted, stop_signals
from memvir.sweep.local import Machine, visible_gpus
from memvir.sweep.plan import Job, Outcome, Pipeline

if TYPE_CHECKING:
    from memvir.sweep.cluster import Cluster

    Executor = Machine | Cluster


MOST_MOVES = 20


def open_executor(params: Params, most: int | None, address: str | None) -> "Executor":
    """This machine, for `most` stages at a time, or the Ray cluster at `address`. UserError if there is none."""
    needs = {dataset: params.resources_of(dataset) for dataset in params.datasets}
    if address is None:
        on_gpus = params.runtime.device != "cpu" and any(need.gpus for need in needs.values())
        gpus = visible_gpus() if on_gpus else []
        return Machine(needs, available_cores(), gpus, most)
    try:
        from memvir.sweep.cluster import Cluster
    except ImportError:
        raise UserError("--address needs Ray: pip install -r requirements-cluster.txt") from None
    return Cluster(params, address)


class Sweep:
    """Brings every stage up to date. A failure is said at once, and all that does not depend on it goes on.

    Args:
        open_executor: where stages run; called when the first one has to.
    """

    def __init__(self, pipeline: Pipeline, params: Params, open_executor: "Callable[[], Executor]") -> None:
        self.pipeline, self.params, self.open_executor = pipeline, params, open_executor
        self.executor: Executor | None = None
        self.graph = TopologicalSorter(pipeline.before)
        self.graph.prepare()
        self.waiting: list[str] = []  # out of date, and what they read is made
        self.running: dict[Future[Outcome], str] = {}
        self.moves: Counter[str] = Counter()
        self.failed: list[str] = []
        self.left_out: set[str] = set()  # what failed and what depends on it
        self.signals: list[int] = []
        self.locked_out = False
        self.display = Display(len(pipeline.stages))

    def run(self) -> None:
        """Raises UserError naming the stages that failed.

        When a signal asks to stop, raises Interrupted once the runs at work have saved their state.
        """
        with stop_signals(self.signals.append), contextlib.closing(self.display):
            try:
                while self.graph.is_active() and (self.running or not self.signals):
                    self._listen()
                    if not self.running or any(future.done() for future in self.running):
                        self._advance()
            finally:
                if self.executor:
                    self.executor.stop()  # if something went wrong here
                    self.executor.close()
            if self.signals and self.graph.is_active():
                self.display.say(interrupted(self.signals[0]))
                raise Interrupted(self.signals[0])
        if self.failed:
            count = "1 stage" if len(self.failed) == 1 else f"{len(self.failed)} stages"
            names = ", ".join(self.failed)
            raise UserError(f"{count} failed: {names}; everything that does not depend on this is done")
        if not self.executor:
            self.display.say("everything is up to date")

    def _listen(self) -> None:
        """Wait until a stage ends, but not for long: show what they print, and tell them to stop if asked to."""
        wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        self._show()
        if self.signals and self.executor:
            self.executor.stop()

    def _show(self) -> None:
        for job, line in self.executor.lines() if self.executor else ():
            self.display.line(job, line)

    def _advance(self) -> None:
        from dvc.lock import LockError

        try:
            with self.pipeline.lock:
                try:
                    self._record()
                    self._check()
                    self._start()
                finally:
                    self.pipeline.write(all_of_them=not self.running)
        except LockError:  # later, then
            if not self.locked_out:
                self.display.say("waiting for another dvc command that is at work in this folder")
            self.locked_out = True

    def _record(self) -> None:
        """Tell DVC of the stages that have ended well, and people of the others."""
        done = [future for future in self.running if future.done()]
        self._show()  # all that these printed
        for future in done:
            name = self.running.pop(future)
            self.display.ended(self.pipeline.jobs[name])
            error = future.exception()
            outcome = Outcome(1, " ".join(str(error).split())[:200]) if error else future.result()
            if outcome.code and self.signals:
                continue  # it was told to stop
            if self._goes_on_elsewhere(name, outcome):
                continue
            problem = outcome.message if outcome.code else self.pipeline.finish(name)
            self._ended(name, problem)
            if not problem:
                self.display.progress(f"{name} done ({self.display.done} of {self.display.total})")

    def _goes_on_elsewhere(self, name: str, outcome: Outcome) -> bool:
        """Whether a stage waits for another GPU, as its own failed, or for another node, as its own is to stop."""
        told = outcome.code in [128 + number for number in (signal.SIGTERM, signal.SIGHUP)]
        stopped = told and self.executor is not None and self.executor.has_other_nodes
        if not (outcome.elsewhere or stopped) or self.moves[name] == MOST_MOVES:
            return False
        self.moves[name] += 1
        self.waiting.append(name)
        why = "its node was told to stop" if stopped else outcome.message
        self.display.say(f"{name}: {why}; it goes on elsewhere")
        return True

    def _check(self) -> None:
        """Find what is out of date among the stages whose inputs are made, and restore what DVC's cache holds."""
        restored = []
        while not self.signals and (ready := self.graph.get_ready()):
            for name in ready:
                if self.left_out.intersection(self.pipeline.before[name]):
                    self.left_out.add(name)
                elif self.pipeline.changed(name):
                    if not self.pipeline.restore(name):
                        self.waiting.append(name)
                        continue
                    restored.append(name)
                self._ended(name)
        if restored:
            self.display.say(f"restored from DVC's cache: {', '.join(restored)}")

    def _start(self) -> None:
        """Start the stages that there is room for."""
        self.waiting.sort(key=lambda name: -self._length(self.pipeline.jobs[name]))
        for name in list(self.waiting):
            job = self.pipeline.jobs[name]
            self.executor = self.executor or self.open_executor()
            if not self.signals and self.executor.has_room(job):
                self.waiting.remove(name)
                self.pipeline.begin(name)
                self.display.started(job)
                self.running[self.executor.start(job)] = name

    def _ended(self, name: str, problem: str = "") -> None:
        self.graph.done(name)
        self.display.done += 1
        if problem:
            self.display.say(f"{name} failed: {problem}")
            self.failed.append(name)
            self.left_out.add(name)

    def _length(self, job: Job) -> float:
        """Which to start first: what others wait for and what tells early how runs do, then long training."""
        if not job.name.startswith("train"):
            return math.inf
        run = self.params.run(job.option("dataset"), job.option("variant"), int(job.option("seed")))
        return run.training.epochs


class Display:
    """A live table of the stages at work on a terminal, plain lines elsewhere."""

    PROGRESS = re.compile(r"epoch (\d+/\d+): loss ([\d.]+), Recall@1 (\S+), .*, (\S+) left")

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.rows: dict[str, tuple[str, ...]] = {}
        self.total, self.done = total, 0
        self.live = Live(console=self.console, refresh_per_second=2, transient=True, get_renderable=self._table)

    def close(self) -> None:
        self.live.stop()

    def started(self, job: Job) -> None:
        self.rows[job.name] = ()
        if self.console.is_terminal:
            self.live.start()

    def line(self, job: Job, text: str) -> None:
        """A line that a stage printed; those of a run's progress become its row of the table."""
        if match := self.PROGRESS.search(text):
            self.rows[job.name] = match.groups()
            self.progress(text)
        else:
            self.say(text if job.label in text else f"{job.label}: {text}")

    def ended(self, job: Job) -> None:
        self.rows.pop(job.name, None)

    def progress(self, text: str) -> None:
        """Say what the table shows, where there is none."""
        if not self.console.is_terminal:
            self.say(text)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table(
            "at work", "epoch", "loss", "Recall@1", "time left", title=f"{self.done} of {self.total} stages done"
        )
        for name, cells in self.rows.items():
            table.add_row(name, *cells)
        return table
