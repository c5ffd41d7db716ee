"""How far a count of images, bytes or epochs has come: a bar on a terminal, now and then a plain line elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Literal, TypeVar

from tqdm import tqdm

log = logging.getLogger("memvir")

Item = TypeVar("Item")
Style = Literal["auto", "bar", "plain", "none"]

SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """A context manager; `add` says that so many more are done. Shows amount, rate and time left.

    Args:
        done: what an earlier process did.
        style: auto is a bar on a terminal and plain lines elsewhere.
        leave: the bar stays on the terminal at the end.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, done: int = 0, style: Style = "auto", leave: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.started = self.last_line = time.monotonic()
        self.style = ("bar" if sys.stderr.isatty() else "plain") if style == "auto" else style
        is_bytes = unit == "B"
        self.bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit="B" if is_bytes else f" {unit}",
            unit_scale=is_bytes,
            unit_divisor=1000,
            disable=self.style != "bar",
            leave=leave,
        )

    def add(self, count: int, numbers: str = "", now: bool = False) -> None:
        """Show `numbers` beside the amount, instead of the rate; in a plain line at once if `now`."""
        self.done += count
        self.bar.set_postfix_str(numbers, refresh=False)
        self.bar.update(count)
        due = now or time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES
        if self.style == "plain" and due:
            self.last_line = time.monotonic()
            log.info("%s %s", self.what, self._line(numbers))

    def _line(self, numbers: str) -> str:
        seconds, done = self.last_line - self.started, self.done - self.first
        numbers = numbers or f"{self._amount(round(done / max(seconds, 1e-9)))}/s"
        if not self.total:
            return f"{self._amount(self.done)}: {numbers}"
        left = tqdm.format_interval(seconds / max(done, 1) * (self.total - self.done))
        place = f"{self.done}/{self.total}"
        if self.unit == "B":
            place = f"{size(self.done)} of {size(self.total)}"
        return f"{place}: {numbers}, {left} left"

    def _amount(self, count: int) -> str:
        return size(count) if self.unit == "B" else f"{count:,} {self.unit}"

    def __enter__(self) -> "Counter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()


def counted(items: Iterable[Item], what: str, total: int, unit: str) -> Iterator[Item]:
    """The items, counted as they are taken."""
    with Counter(what, total, unit) as counter:
        for item in items:
            yield item
            counter.add(1)


def size(count: int) -> str:
    """12.3 MB"""
    if count < 1000:
        return f"{count} B"
    power = next((power for power in (1, 2) if count < 999.95 * 1000**power), 3)
    return f"{count / 1000**power:.1f} {' kMG'[power]}B"
