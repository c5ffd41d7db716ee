"""Which runs are out of date, and in what order they may run: asked of DVC, without Ray."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from memvir.config import Params

PARALLEL = ("train", "train_tsne", "evaluate")  # the stages of dvc.yaml that a sweep runs side by side


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml after its matrix was filled in."""

    name: str
    """As DVC calls it: train@glyphs-norm_softmax-1."""
    command: str
    deps: frozenset[str]
    outs: frozenset[str]

    @property
    def group(self) -> str:
        return self.name.split("@")[0]

    def option(self, name: str) -> str:
        """The value of an option of its command: "glyphs" for "dataset"."""
        words = shlex.split(self.command)
        return words[words.index(f"--{name}") + 1]

    @property
    def run(self) -> str:
        return "/".join(self.option(name) for name in ("dataset", "variant", "seed"))


@dataclass(frozen=True)
class Job:
    """A stage to run, once those that make what it reads have succeeded."""

    stage: Stage
    after: list[str] = field(default_factory=list)


def plan(stages: Sequence[Stage], out_of_date: Iterable[str], params: Params) -> list[Job]:
    """The parallel stages that are out of date or read what such a one makes, longest training first.

    A job stands behind those that it waits for.
    """
    candidates = [stage for stage in stages if stage.group in PARALLEL]
    changed = set(out_of_date)
    jobs: dict[str, Job] = {}
    grown = True
    while grown:  # a chain of dependent stages takes a round per link
        grown = False
        for stage in candidates:
            if stage.name in jobs:
                continue
            after = [job.stage.name for job in jobs.values() if _reads(stage, job.stage)]
            if stage.name in changed or after:
                jobs[stage.name] = Job(stage)
                grown = True
    for name, job in jobs.items():
        after = [other.stage.name for other in jobs.values() if _reads(job.stage, other.stage)]
        jobs[name] = Job(job.stage, after)
    return sorted(jobs.values(), key=lambda job: (bool(job.after), -_epochs(job.stage, params)))


def ask_dvc() -> tuple[list[Stage], list[str]]:
    """All stages, and the names of those that are out of date."""
    from dvc.repo import Repo

    with Repo() as repo:
        stages = [
            Stage(
                stage.addressing,
                stage.cmd,
                frozenset(str(dep) for dep in stage.deps),
                frozenset(str(out) for out in stage.outs),
            )
            for stage in repo.index.stages
        ]
        return stages, list(repo.status())


def _reads(reader: Stage, writer: Stage) -> bool:
    """Whether one stage depends on what another makes: the same path, or one within the other."""
    if reader is writer:
        return False
    if reader.deps & writer.outs:
        return True
    folders = {str(parent) for dep in reader.deps for parent in PurePosixPath(dep).parents}
    return bool(folders & writer.outs)


def _epochs(stage: Stage, params: Params) -> int:
    if stage.group == "evaluate":
        return 0
    run = params.run(stage.option("dataset"), stage.option("variant"), int(stage.option("seed")))
    return run.training.epochs
