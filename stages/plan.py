"""Which runs are out of date, in what order they may run, and what DVC is told of them; without Ray."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from memvir.config import Params
from memvir.errors import UserError

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage as DVCStage

PARALLEL = ("train", "train_tsne", "evaluate")  # the stages of dvc.yaml that a sweep runs side by side


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml after its matrix was filled in."""

    name: str
    """As DVC calls it: train@glyphs-norm_softmax-1."""
    command: str
    deps: frozenset[str]
    outs: frozenset[str]
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The present hashes of those deps that no parallel stage makes: settings, code, data."""

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
    candidates = {stage.name: stage for stage in stages if stage.group in PARALLEL}
    makes = {out: name for name, stage in candidates.items() for out in stage.outs}
    reads = {
        name: {makes[path] for dep in stage.deps for path in (dep, *_folders(dep)) if path in makes} - {name}
        for name, stage in candidates.items()
    }
    changed = set(out_of_date)
    jobs: dict[str, Job] = {}
    for name in TopologicalSorter(reads).static_order():
        after = sorted(reads[name] & jobs.keys())
        if name in changed or after:
            jobs[name] = Job(candidates[name], after)
    return sorted(
        (jobs[name] for name in candidates if name in jobs),
        key=lambda job: (bool(job.after), -_epochs(job.stage, params)),
    )


def ask_dvc() -> tuple[list[Stage], list[str]]:
    """All stages, and the names of those that are out of date. Raises UserError if DVC cannot tell."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo() as repo:
            return _ask(repo)
    except DvcException as error:
        raise UserError(f"DVC cannot say what is out of date: {error}") from None


def _ask(repo: "Repo") -> tuple[list[Stage], list[str]]:
    out_of_date = list(repo.status())
    parallel = [stage for stage in repo.index.stages if stage.addressing.split("@")[0] in PARALLEL]
    made = {str(out) for stage in parallel for out in stage.outs}
    inputs = {
        stage.addressing: {dep: value for dep, value in _hashes(stage).items() if dep not in made} for stage in parallel
    }
    stages = [
        Stage(
            stage.addressing,
            stage.cmd,
            frozenset(str(dep) for dep in stage.deps),
            frozenset(str(out) for out in stage.outs),
            inputs.get(stage.addressing, {}),
        )
        for stage in repo.index.stages
    ]
    return stages, out_of_date


def tell_dvc(done: Sequence[Stage]) -> dict[str, list[str]]:
    """Record that these stages ran, as `dvc commit --force` does, but with one pass over dvc.lock for all of them.

    (The command parses and writes that file once per stage: minutes for hundreds.) A stage whose settings, code or data
    are not those that `ask_dvc` saw is not recorded, since nobody knows which of the two it ran with: such stages are
    returned, with the inputs that changed.
    """
    from dvc.repo import Repo, lock_repo

    before = {stage.name: stage.inputs for stage in done}
    changed: dict[str, list[str]] = {}
    with Repo() as repo, lock_repo(repo):
        recorded = []
        for stage in repo.index.stages:
            if (inputs := before.get(stage.addressing)) is None:
                continue
            now = _hashes(stage)
            if differing := [dep for dep, value in inputs.items() if now.get(dep) != value]:
                changed[stage.addressing] = differing
                continue
            stage.save()
            stage.commit()
            recorded.append(stage)
        if recorded:
            recorded[0].dvcfile.dump_stages(recorded, update_pipeline=False)
    return changed


def _hashes(stage: "DVCStage") -> dict[str, str]:
    stage.save_deps(allow_missing=True)
    return {str(dep): str(dep.hash_info) for dep in stage.deps}


def _folders(path: str) -> list[str]:
    return [str(parent) for parent in PurePosixPath(path).parents]


def _epochs(stage: Stage, params: Params) -> int:
    if stage.group == "evaluate":
        return 0
    run = params.run(stage.option("dataset"), stage.option("variant"), int(stage.option("seed")))
    return run.training.epochs
