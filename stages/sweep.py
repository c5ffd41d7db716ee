"""Run what is out of date on many cores or GPUs at once: `dvc repro`, side by side.

Asks DVC which training and evaluation stages are out of date, runs them with Ray, hands the results back to DVC and
lets `dvc repro` make the tables and reports. The results are those of a plain `dvc repro`, byte for byte.

    python -m stages.sweep                    as many runs as this machine has room for
    python -m stages.sweep --jobs 2           two at a time
    python -m stages.sweep --address auto     on the Ray cluster that this machine belongs to

Ctrl-C saves every run; the same command continues. Each run takes the cores and GPUs of its recipe's `resources`.
"""

import argparse
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memvir.config import Params, load_params
from memvir.errors import UserError
from memvir.files import write_text
from stages import describe, paths
from stages.plan import Job, Stage, ask_dvc, plan, tell_dvc

UPSTREAM = ("download", "prepare", "weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, help="runs at a time on this machine; default: as many as fit")
    where.add_argument("--address", help="a Ray cluster's address, such as auto or ray-head:6379")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    options = parser.parse_args()
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"argument --jobs: {options.jobs} is no number of runs; give 1 or more")
    try:
        sys.exit(sweep(load_params(), options.jobs, options.address, options.plan))
    except (UserError, OSError) as error:
        sys.exit(f"error: {describe(error)}")


def sweep(params: Params, jobs: int | None, address: str | None, only_plan: bool) -> int:
    """The exit code: 0 if everything is up to date in the end, 1 if a run failed, 130 after Ctrl-C."""
    if not only_plan and dvc("repro", *UPSTREAM):
        return 1
    planned = plan(*ask_dvc(), params)
    print(f"{len(planned)} stages are out of date", file=sys.stderr)
    if only_plan:
        for job in planned:
            print(job.stage.name, *(["after", *job.after] if job.after else []))
        return 0
    code = run_all(planned, params, jobs, address) if planned else 0
    return code or min(dvc("repro"), 1)


def run_all(planned: Sequence[Job], params: Params, jobs: int | None, address: str | None) -> int:
    """Run the jobs with Ray and tell DVC what succeeds; a failure is named at once and the rest goes on."""
    try:
        import ray
    except ImportError:
        raise UserError("a sweep needs Ray: pip install -r requirements-cluster.txt") from None
    from stages import cluster

    most = max(params.recipe(job.stage.option("dataset")).resources.cpus for job in planned)
    cluster.connect(address, jobs * most if jobs else None)
    check_resources(planned, params)
    workspace = cluster.Workspace(Path.cwd(), uuid.uuid4().hex)
    write_text(workspace.root / cluster.TOKEN, workspace.token)
    all_here = all(cluster.on_every_node(cluster.sees_folder, workspace))
    inputs = None if all_here else cluster.pack(workspace.root, shipped(planned))
    home = cluster.open_home(workspace.root)
    display = Display(planned)
    record = Record(display)
    failures = 0
    tasks = submit(planned, params, workspace, inputs, home)
    try:
        for outcome in finished(tasks, display, home):
            if outcome.code:
                failures += 1
                display.say(f"{outcome.stage} failed: {outcome.message}")
            else:
                record.add(display.stages[outcome.stage])
    except KeyboardInterrupt:
        display.say("stopping: every run saves a checkpoint")
        for task in tasks.values():
            ray.cancel(task)
        ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=600)
        display.say("stopped; run the same command again to continue")
        return 130
    finally:
        display.close()
        if not all_here:
            cluster.on_every_node(cluster.remove_copy, workspace)
        (workspace.root / cluster.TOKEN).unlink(missing_ok=True)
        ray.shutdown()
        record.close()
    failures += record.refused
    if failures:
        print(f"{failures} of {len(planned)} stages failed; the others are done", file=sys.stderr)
    return min(failures, 1)


def check_resources(planned: Sequence[Job], params: Params) -> None:
    """UserError if a run asks for more than any one node has."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for dataset in {job.stage.option("dataset") for job in planned}:
        needs = params.recipe(dataset).resources
        if not any(needs.cpus <= node.get("CPU", 0) and needs.gpus <= node.get("GPU", 0) for node in nodes):
            there = " or ".join(sorted({f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes}))
            raise UserError(
                f"{dataset}.resources: a run asks for {needs.cpus} cores and {needs.gpus:g} GPUs, and a node here has "
                f"{there}; ask for less or use a larger machine"
            )


def submit(planned: Sequence[Job], params: Params, workspace: Any, inputs: bytes | None, home: Any) -> dict[str, Any]:
    """Hand every job to Ray, which starts it once there is room and what it waits for has ended; stage -> task."""
    import ray

    from stages.cluster import Work, run_stage

    shared = ray.put(inputs)
    tasks: dict[str, Any] = {}
    for job in planned:
        stage = job.stage
        needs = params.recipe(stage.option("dataset")).resources
        work = Work(stage.name, stage.run, stage.command, made_by_others(stage), left_behind(stage, params))
        before = [tasks[name] for name in job.after]
        task = run_stage.options(name=stage.name, num_cpus=needs.cpus, num_gpus=needs.gpus)
        tasks[stage.name] = task.remote(work, workspace, shared, home, *before)
    return tasks


class Record:
    """Tells DVC what is done, as often as takes a small share of the time: half a second for few stages, 30 for 400."""

    SHARE = 0.05

    def __init__(self, display: "Display") -> None:
        self.display = display
        self.waiting: list[Stage] = []
        self.refused = 0
        """Stages that have to run again, since their inputs changed."""
        self.due = 0.0

    def add(self, stage: Stage) -> None:
        self.waiting.append(stage)
        started = time.monotonic()
        if started >= self.due:
            self._tell()
            self.due = time.monotonic() + (time.monotonic() - started) / self.SHARE

    def close(self) -> None:
        """Raises UserError, with what to do, if DVC does not take what is left."""
        problem = self._tell()
        if problem:
            names = " ".join(stage.name for stage in self.waiting)
            raise UserError(f"DVC did not record what is done ({problem}); do it with: dvc commit --force {names}")

    def _tell(self) -> str:
        from dvc.exceptions import DvcException

        if not self.waiting:
            return ""
        try:
            changed = tell_dvc(self.waiting)
        except DvcException as error:  # another dvc command holds the lock, say: later
            return " ".join(str(error).split())
        for stage, inputs in changed.items():
            self.display.say(f"{stage} is not recorded: {', '.join(inputs)} changed while it ran; it has to run again")
        self.refused += len(changed)
        self.waiting.clear()
        return ""


def finished(tasks: dict, display: "Display", home: Any) -> Iterator:
    """The outcomes of the tasks as they end, showing the lines that the runs print meanwhile."""
    import ray

    from stages.cluster import Outcome

    waiting = {task: name for name, task in tasks.items()}
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=0.5)
        for run, line in ray.get(home.take_lines.remote()):
            display.line(run, line)
        for task in ready:
            name = waiting.pop(task)
            try:
                outcome = ray.get(task)
            except ray.exceptions.RayError as error:
                outcome = Outcome(name, 1, " ".join(str(error).split())[:200])
            display.ended(name, outcome.code)
            yield outcome


def shipped(planned: Sequence[Job]) -> list[str]:
    """What every job on a node without the shared folder needs: code, settings, and the data sets."""
    datasets = {job.stage.option("dataset") for job in planned}
    data = [f"dataset/{name}/{part}" for name in sorted(datasets) for part in ("index.csv", "images", "weights")]
    return ["params.yaml", "memvir", "stages", *data]


def made_by_others(stage: Stage) -> list[str]:
    return sorted(stage.deps - stage.inputs.keys())


def left_behind(stage: Stage, params: Params) -> list[str]:
    """What a stage makes, its logs and, if it is interrupted, its checkpoint."""
    run = stage.option("dataset"), stage.option("variant"), int(stage.option("seed"))
    private = [paths.log_folder(*run), *paths.checkpoint_files(params, *run)] if stage.group != "evaluate" else []
    return [*sorted(stage.outs), *(str(path) for path in private if not path.is_absolute())]


def dvc(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments]).returncode


class Display:
    """A live table of the runs at work on a terminal, plain lines elsewhere."""

    def __init__(self, planned: Sequence[Job]) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = Console(stderr=True)
        self.rows: dict[str, tuple[str, ...]] = {}
        self.stages = {job.stage.name: job.stage for job in planned}
        self.total, self.done = len(planned), 0
        self.live = (
            Live(self._table(), console=self.console, refresh_per_second=2) if self.console.is_terminal else None
        )
        if self.live:
            self.live.start()

    def line(self, run: str, text: str) -> None:
        """A line that a run printed; those of its progress become its row of the table."""
        match = re.search(r"epoch (\d+/\d+): loss ([\d.]+), Recall@1 ([\d.]+%), .*, (\S+) left", text)
        if match:
            self.rows[run] = match.groups()
        if not match or not self.live:
            self.say(text if run in text else f"{run}: {text}")
        if self.live:
            self.live.update(self._table())

    def ended(self, stage: str, code: int) -> None:
        self.done += 1
        self.rows.pop(self.stages[stage].run, None)
        if self.live:
            self.live.update(self._table())
        elif not code:
            self.say(f"{stage} done ({self.done} of {self.total})")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self.live:
            self.live.stop()

    def _table(self):  # type: ignore[no-untyped-def]
        from rich.table import Table

        table = Table("run", "epoch", "loss", "Recall@1", "time left", title=f"{self.done} of {self.total} stages done")
        for run, cells in sorted(self.rows.items()):
            table.add_row(run, *cells)
        return table


if __name__ == "__main__":
    main()
