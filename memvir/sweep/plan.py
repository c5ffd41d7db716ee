"""The stages of dvc.yaml, asked of DVC once: their order, which are out of date, what its cache holds; without Ray."""

import contextlib
import logging
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memvir.errors import UserError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage


@dataclass(frozen=True)
class Job:
    """A stage's command to run."""

    name: str
    """As DVC calls it: train@glyphs-norm_softmax-1."""
    command: str
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()

    def option(self, name: str) -> str:
        """The value of an option of its command: "glyphs" for "dataset"; empty if it has none."""
        words = [*shlex.split(self.command), ""]
        return words[words.index(f"--{name}") + 1] if f"--{name}" in words else ""

    @property
    def is_run(self) -> bool:
        """Whether it trains or evaluates one run: it takes the recipe's resources, and a cluster may do it."""
        return bool(self.option("variant"))

    @property
    def label(self) -> str:
        """What people see of it: glyphs/norm_softmax/1, or the stage's name."""
        return "/".join(self.option(name) for name in ("dataset", "variant", "seed")) if self.is_run else self.name


@dataclass(frozen=True)
class Outcome:
    code: int
    """The exit code."""
    message: str
    """Its last line, if it failed."""
    elsewhere: bool = False
    """Whether it may well succeed on another GPU."""


class Pipeline:
    """What `dvc repro` would do, for someone else to do: the stages in order, and DVC's part before and after each.

    Within `lock`, which all of DVC's commands in this folder take: whatever is called here but the constructor.
    """

    SHARE = 0.05  # of the time, for writing dvc.lock: half a second's worth for few stages, 30 for 400

    def __init__(self, repo: "Repo") -> None:
        from dvc.dvcfile import PROJECT_FILE
        from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

        self.repo, self.lock = repo, repo.lock
        graph = get_active_graph(repo.index.graph)
        self.stages: dict[str, Stage] = {
            stage.addressing: stage for stage in plan_repro(graph, collect_stages(repo, [PROJECT_FILE]))
        }
        self.before = {
            name: [earlier.addressing for earlier in graph.successors(stage)] for name, stage in self.stages.items()
        }
        """The stages that make what a stage reads."""
        self.jobs = {
            name: Job(name, stage.cmd or "", tuple(map(str, stage.deps)), tuple(map(str, stage.outs)))
            for name, stage in self.stages.items()
        }
        self.inputs: dict[str, dict[str, str]] = {}
        self.unwritten: list[Stage] = []
        self.due = 0.0

    def out_of_date(self) -> dict[str, list[str]]:
        """The stages to run, if all that they read changes, each with those of them that it waits for."""
        found: dict[str, list[str]] = {}
        for name in self.stages:
            after = [earlier for earlier in self.before[name] if earlier in found]
            if after or self.changed(name):
                found[name] = after
        return found

    def changed(self, name: str) -> bool:
        return self.stages[name].changed()

    def restore(self, name: str) -> bool:
        """Put in place what an earlier run with the same settings, code and data left in DVC's cache, if it has that.

        Data that a user added to DVC (`dvc add`) is taken into the cache as it is now.
        """
        from dvc.stage.cache import RunCacheNotFoundError

        stage = self.stages[name]
        if stage.cmd and (stage.changed_stage() or not stage.deps_cached()):
            stage.save_deps(allow_missing=True)
            for out in stage.outs:  # or DVC would take what the last run left for what these inputs give
                out.hash_info = type(out.hash_info)()
        try:
            if stage.cmd:
                self.repo.stage_cache.restore(stage, dry=True)  # removes nothing if there is nothing to put there
            stage.run()
        except RunCacheNotFoundError:
            return False
        self.unwritten.append(stage)
        return True

    def begin(self, name: str) -> None:
        """Note what the stage is going to read, and remove what it is going to make, as `dvc repro` does."""
        self.inputs[name] = self._hashes(name)
        self.stages[name].remove_outs(ignore_remove=False, force=False)

    def finish(self, name: str) -> str:
        """Record that the stage ran, or say why that cannot be done."""
        from dvc.exceptions import DvcException

        before, now = self.inputs.pop(name), self._hashes(name)
        if changed := [path for path, value in before.items() if now.get(path) != value]:
            return f"not recorded, since {', '.join(changed)} changed while it ran; it has to run again"
        stage = self.stages[name]
        try:
            stage.save()
            stage.commit()
        except DvcException as error:
            return f"not recorded ({' '.join(str(error).split())})"
        self.unwritten.append(stage)
        return ""

    def _hashes(self, name: str) -> dict[str, str]:
        stage = self.stages[name]
        stage.save_deps(allow_missing=True)
        return {str(dep): str(dep.hash_info) for dep in stage.deps}

    def write(self, all_of_them: bool) -> None:
        """One pass over dvc.lock for the stages that are done, now and then; DVC's own commands take one for each."""
        started = time.monotonic()
        if self.unwritten and (all_of_them or started >= self.due):
            if made := [stage for stage in self.unwritten if stage.cmd]:
                made[0].dvcfile.dump_stages(made, update_pipeline=False)
            for stage in self.unwritten:
                if not stage.cmd:
                    stage.dump(update_pipeline=False)
            self.unwritten.clear()
            self.due = time.monotonic() + (time.monotonic() - started) / self.SHARE


@contextlib.contextmanager
def open_pipeline() -> Iterator[Pipeline]:
    """The pipeline of this folder. Raises UserError if DVC cannot read it."""
    from dvc.exceptions import DvcException
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo

    try:
        with Repo() as repo, set_loggers_level(logging.WARNING):
            yield Pipeline(repo)
    except DvcException as error:
        raise UserError(f"DVC cannot say what is out of date: {' '.join(str(error).split())}") from None
