"""In what order a sweep runs stages, and what it leaves out; with a pipeline and an executor that only take notes."""

import signal
from concurrent.futures import Future

import pytest

from memvir.errors import UserError
from memvir.params import parse_params
from memvir.signals import Interrupted
from memvir.sweep.plan import Job, Outcome
from memvir.sweep.run import Sweep
from tests import tiny

TRAINED = {
    f"train@tiny-{variant}-{seed}": f"--dataset tiny --variant {variant} --seed {seed}"
    for variant in ("norm_softmax", "memvir_norm_softmax")
    for seed in (1, 2)
}


class Pipeline:
    """prepare, four runs and their evaluations, tables: as `memvir.sweep.plan.Pipeline`, without DVC."""

    def __init__(self, changed=(), cached=()):
        self.changed_stages, self.cached, self.finished, self.written = set(changed), set(cached), [], []
        evaluated = {name.replace("train", "evaluate"): name for name in TRAINED}
        self.before = {
            "prepare@tiny": [],
            **{name: ["prepare@tiny"] for name in TRAINED},
            **{name: [train] for name, train in evaluated.items()},
            "tables@tiny": list(evaluated),
        }
        self.stages = self.before
        options = {**TRAINED, **{name: TRAINED[train] for name, train in evaluated.items()}}
        self.jobs = {name: Job(name, f"python -m stage {options.get(name, '')}") for name in self.before}
        self.lock = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def changed(self, name):
        return name in self.changed_stages or any(before in self.finished for before in self.before[name])

    def restore(self, name):
        if name in self.cached:
            self.finished.append(name)
        return name in self.cached

    def begin(self, name):
        assert not any(self.changed(before) and before not in self.finished for before in self.before[name])

    def finish(self, name):
        self.finished.append(name)
        return "data changed while it ran" if name == "careless" else ""

    def write(self, all_of_them):
        self.written = list(self.finished)


class Executor:
    """Has room for two; a stage ends when there is room no more, with the code that `codes` has for it."""

    has_other_nodes = False

    def __init__(self, codes=None, act=lambda name: None):
        self.codes, self.act, self.begun, self.running, self.stopped = codes or {}, act, [], {}, 0

    def has_room(self, job):
        return len(self.running) < 2

    def start(self, job):
        self.begun.append(job.name)
        self.running[job.name] = Future()
        return self.running[job.name]

    def lines(self):
        for name, future in self.running.items():
            self.act(name)
            code = self.codes.get(name, 0)
            future.set_result(Outcome(code, f"error: {name}" if code else ""))
        self.running = {}
        return []

    def stop(self):
        self.stopped += 1

    def close(self):
        assert not self.running


def params():
    raw = tiny.params()
    raw["tiny"]["variants"]["memvir_norm_softmax"]["training"] = {"epochs": 9}
    return parse_params(raw)


def sweep(pipeline, executor):
    Sweep(pipeline, params(), lambda: executor).run()
    assert pipeline.written == pipeline.finished
    return executor.begun


def test_nothing_out_of_date_starts_nothing_and_says_so(capsys):
    assert sweep(Pipeline(), Executor()) == []
    assert capsys.readouterr().err == "everything is up to date\n"


def test_long_training_comes_first_an_evaluation_as_soon_as_it_can_and_everything_after_what_it_reads():
    begun = sweep(Pipeline(["prepare@tiny"]), Executor())
    assert begun[:6] == [
        "prepare@tiny",
        "train@tiny-memvir_norm_softmax-1",
        "train@tiny-memvir_norm_softmax-2",
        "evaluate@tiny-memvir_norm_softmax-1",
        "evaluate@tiny-memvir_norm_softmax-2",
        "train@tiny-norm_softmax-1",
    ]
    assert begun[-1] == "tables@tiny" and len(begun) == 10


def test_what_did_not_change_is_not_run_and_what_reads_nothing_new_neither():
    begun = sweep(Pipeline(["evaluate@tiny-norm_softmax-2"]), Executor())
    assert begun == ["evaluate@tiny-norm_softmax-2", "tables@tiny"]


def test_what_the_cache_holds_is_restored_and_said_in_one_line(capsys):
    restored = ["train@tiny-norm_softmax-1", "evaluate@tiny-norm_softmax-1"]
    assert sweep(Pipeline(restored[:1], restored), Executor()) == ["tables@tiny"]
    assert f"restored from DVC's cache: {', '.join(restored)}\n" in capsys.readouterr().err


class Cluster(Executor):
    """Whose nodes are told to stop now and then: each stage of `codes` ends so once."""

    has_other_nodes = True

    def lines(self):
        told = {name: self.codes.pop(name) for name in list(self.codes) if name in self.running}
        for name, code in told.items():
            self.running.pop(name).set_result(Outcome(code, "interrupted by SIGTERM"))
        return super().lines()


def test_a_stage_whose_node_is_told_to_stop_goes_on_elsewhere(capsys):
    name = "train@tiny-norm_softmax-1"
    begun = sweep(Pipeline([name]), Cluster({name: 128 + signal.SIGTERM}))
    assert begun == [name, name, name.replace("train", "evaluate"), "tables@tiny"]
    assert f"{name}: its node was told to stop; it goes on elsewhere\n" in capsys.readouterr().err


def test_a_stage_whose_gpu_failed_goes_on_elsewhere_but_not_for_ever(capsys):
    class FaultyGpus(Executor):
        def start(self, job):
            future = super().start(job)
            self.running.pop(job.name).set_result(Outcome(1, "error: the GPU failed", elsewhere=True))
            return future

    name, executor = "train@tiny-norm_softmax-1", FaultyGpus()
    with pytest.raises(UserError, match=f"^1 stage failed: {name}"):
        Sweep(Pipeline([name]), params(), lambda: executor).run()
    assert executor.begun == [name] * 21
    assert f"{name}: error: the GPU failed; it goes on elsewhere\n" in capsys.readouterr().err


@pytest.mark.parametrize("executor", [Executor, Cluster])
def test_a_stage_that_fails_or_is_stopped_here_is_a_failure(executor):
    name = "train@tiny-norm_softmax-1"
    code = 1 if executor is Cluster else 128 + signal.SIGTERM
    with pytest.raises(UserError, match=f"^1 stage failed: {name}"):
        Sweep(Pipeline([name]), params(), lambda: executor({name: code})).run()


def test_what_fails_is_named_and_all_that_does_not_depend_on_it_runs(capsys):
    failing = "train@tiny-norm_softmax-1"
    pipeline, executor = Pipeline(TRAINED), Executor({failing: 1})
    with pytest.raises(
        UserError, match=rf"^1 stage failed: {failing}; everything that does not depend on this is done"
    ):
        Sweep(pipeline, params(), lambda: executor).run()
    assert f"{failing} failed: error: {failing}\n" in capsys.readouterr().err
    left_out = {"evaluate@tiny-norm_softmax-1", "tables@tiny"}
    assert set(executor.begun) == pipeline.before.keys() - left_out - {"prepare@tiny"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_stages_at_work_records_what_they_finished_and_starts_no_other(capsys, number):
    def ring(name):
        if name == "train@tiny-memvir_norm_softmax-1":
            signal.raise_signal(number)

    stopped = "train@tiny-memvir_norm_softmax-2"
    pipeline, executor = Pipeline(["prepare@tiny"]), Executor({stopped: 143}, ring)
    with pytest.raises(Interrupted) as end:
        Sweep(pipeline, params(), lambda: executor).run()
    assert end.value.signal == number and executor.stopped
    assert pipeline.written == ["prepare@tiny", "train@tiny-memvir_norm_softmax-1"]
    assert executor.begun == [*pipeline.written, stopped]
    name = signal.Signals(number).name
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted by {name}; run the same command again to continue"
