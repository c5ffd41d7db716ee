"""How far a count of images or bytes has come: a bar on a terminal, now and then a plain line elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("memvir")

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """A context manager; `add` says that so many more are done. Shows amount, rate and time left."""

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.started = self.last_line = time.monotonic()
        scale = unit == "B"
        self.bar = tqdm(
            desc=what,
            total=total,
            initial=done,
            unit="B" if scale else f" {unit}",
            unit_scale=scale,
            unit_divisor=1000,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            total = f" of {self._amount(self.total)}" if self.total else ""
            rate = self._amount(round((self.done - self.first) / (now - self.started)))
            log.info("%s: %s%s, %s/s", self.what, self._amount(self.done), total, rate)

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
