"""What a run says of its epochs, and how it hears that it has to stop."""

import signal

from memvir.experiment.settings import Runtime
from memvir.experiment.watch import Watch
from memvir.params import parse_params
from memvir.sweep.run import Display
from tests import tiny


class Board:
    def __init__(self) -> None:
        self.rows = []

    def add_epoch(self, row):
        self.rows.append(row)


def watch(board: Board | None, done: int = 0) -> Watch:
    return Watch(parse_params(tiny.params()).run("tiny", "norm_softmax", 1), Runtime(progress="plain"), done, board)


def test_an_evaluated_epoch_is_a_line_from_which_a_sweep_makes_a_row_of_its_table(caplog):
    caplog.set_level("INFO", logger="memvir")
    board = Board()
    looker_on = watch(board, done=3)
    rows = [{"epoch": 4, "loss": 2.5}, {"epoch": 5, "loss": 1.25, "recall_at_1": 0.5}]
    for row in rows:
        looker_on.epoch_done(row, 99.6)
    assert board.rows == rows
    (line,) = caplog.messages
    assert line.startswith("tiny/norm_softmax/1 epoch 5/6: loss 1.2500, Recall@1 50.00%, 100 images/s, ")
    assert Display.PROGRESS.search(line).groups() == ("5/6", "1.2500", "50.00%", "00:00")


def test_a_run_that_was_not_evaluated_yet_has_a_row_too(caplog, monkeypatch):
    caplog.set_level("INFO", logger="memvir")
    monkeypatch.setattr("memvir.progress.SECONDS_BETWEEN_LINES", 0.0)
    watch(Board()).epoch_done({"epoch": 1, "loss": 2.5}, 10)
    assert Display.PROGRESS.search(caplog.text).group(3) == "–"


def test_the_other_processes_of_a_run_show_nothing(caplog):
    caplog.set_level("INFO", logger="memvir")
    watch(None).epoch_done({"epoch": 1, "loss": 1.0, "recall_at_1": 0.5}, 10)
    assert caplog.messages == []


def test_a_signal_is_a_request_to_stop_and_is_remembered():
    looker_on = watch(None)
    assert not looker_on.stop_requested and looker_on.signal == signal.SIGTERM
    looker_on.stop(signal.SIGINT)
    assert looker_on.stop_requested and looker_on.signal == signal.SIGINT
