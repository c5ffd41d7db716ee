"""Which runs a sweep would start, and in what order; without Ray."""

from memvir.config import parse_params
from stages.plan import Stage, plan
from tests import tiny


def stage(group: str, variant: str, seed: int, deps=(), outs=()) -> Stage:
    command = f"python -m stages.{group} --dataset tiny --variant {variant} --seed {seed}"
    return Stage(f"{group}@tiny-{variant}-{seed}", command, frozenset(deps), frozenset(outs))


def project() -> list[Stage]:
    stages = [Stage("prepare@tiny", "python -m stages.prepare --dataset tiny", frozenset(), frozenset({"index.csv"}))]
    for variant in ("norm_softmax", "memvir_norm_softmax"):
        for seed in (1, 2):
            run = f"runs/tiny/{variant}/{seed}"
            stages.append(stage("train", variant, seed, ["index.csv"], [run]))
            stages.append(stage("evaluate", variant, seed, ["index.csv", run], [f"results/{variant}/{seed}.json"]))
    return [*stages, Stage("tables@tiny", "python -m stages.tables", frozenset({"results"}), frozenset({"tables.md"}))]


def params():
    raw = tiny.params()
    raw["tiny"]["variants"]["memvir_norm_softmax"]["training"] = {"epochs": 9}
    return parse_params(raw)


def names(jobs):
    return [job.stage.name for job in jobs]


def test_nothing_out_of_date_is_nothing_to_do():
    assert plan(project(), [], params()) == []
    assert plan(project(), ["tables@tiny"], params()) == []


def test_a_run_to_train_again_is_evaluated_again_after_it():
    jobs = plan(project(), ["train@tiny-norm_softmax-1"], params())
    assert names(jobs) == ["train@tiny-norm_softmax-1", "evaluate@tiny-norm_softmax-1"]
    assert jobs[0].after == [] and jobs[1].after == ["train@tiny-norm_softmax-1"]


def test_an_evaluation_alone_waits_for_nothing():
    (job,) = plan(project(), ["evaluate@tiny-norm_softmax-2"], params())
    assert job.after == []


def test_long_trainings_start_first_and_every_job_stands_behind_what_it_waits_for():
    jobs = plan(project(), [s.name for s in project()], params())
    assert names(jobs)[:4] == [
        "train@tiny-memvir_norm_softmax-1",
        "train@tiny-memvir_norm_softmax-2",
        "train@tiny-norm_softmax-1",
        "train@tiny-norm_softmax-2",
    ]
    for position, job in enumerate(jobs):
        assert set(job.after) <= set(names(jobs)[:position])
    assert len(jobs) == 8


def test_a_dependency_within_an_out_counts_as_reading_it():
    writer = stage("train", "norm_softmax", 1, [], ["runs/a"])
    reader = stage("evaluate", "norm_softmax", 1, ["runs/a/models/last.pt"], ["b"])
    assert names(plan([reader, writer], [writer.name], params())) == [writer.name, reader.name]
