"""What a count says of itself where there is no terminal."""

import pytest

from memvir import progress
from memvir.progress import Counter


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch, caplog) -> Clock:
    caplog.set_level("INFO", logger="memvir")
    monkeypatch.setattr(progress, "time", Clock())
    return progress.time


@pytest.mark.parametrize(
    ("what", "total", "unit", "count", "line"),
    [
        ("embedding", 400, "images", 100, "embedding 100/400: 5 images/s, 01:00 left"),
        ("downloading it", 4_000_000, "B", 1_000_000, "downloading it 1.0 MB of 4.0 MB: 50.0 kB/s, 01:00 left"),
        ("downloading it", None, "B", 1_000_000, "downloading it 1.0 MB: 50.0 kB/s"),
    ],
)
def test_a_line_tells_amount_rate_and_time_left(clock, caplog, what, total, unit, count, line):
    with Counter(what, total, unit) as counter:
        clock.now = 20.0
        counter.add(count)
    assert caplog.messages == [line]


def test_what_an_earlier_process_did_says_nothing_about_this_ones_rate(clock, caplog):
    with Counter("embedding", 400, "images", done=300) as counter:
        clock.now = 20.0
        counter.add(50)
    assert caplog.messages == ["embedding 350/400: 2 images/s, 00:20 left"]


def test_lines_are_seconds_apart_unless_there_is_news(clock, caplog):
    with Counter("a run epoch", 100, "epochs") as counter:
        for second in range(1, 25):
            clock.now = float(second)
            counter.add(1, f"loss {second}", now=second == 13)
    assert [line.partition(": ")[0] for line in caplog.messages] == [f"a run epoch {n}/100" for n in (10, 13, 23)]
    assert caplog.messages[1] == "a run epoch 13/100: loss 13, 01:27 left"


def test_a_count_that_is_not_to_be_shown_is_silent(clock, caplog, capsys):
    with Counter("embedding", 400, "images", style="none") as counter:
        clock.now = 20.0
        counter.add(1, now=True)
    assert caplog.messages == [] and capsys.readouterr().err == ""


def test_a_bar_shows_the_numbers(capsys):
    with Counter("a run epoch", 3, "epochs", style="bar", leave=True) as counter:
        counter.add(3, "loss 1.5")
    shown = capsys.readouterr().err
    assert "a run epoch: 100%" in shown and "loss 1.5" in shown
