"""What asks a process to stop: Ctrl-C, a closed terminal, systemd, Slurm, or the end of whoever started it."""

import contextlib
import ctypes
import errno
import os
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals(ask: Callable[[int], None]) -> Iterator[None]:
    """Call `ask` with the first signal that asks this process to stop; a second Ctrl-C ends it at once.

    Others after the first change nothing, since whoever stops a whole job may send several (to a process and to its
    group; SIGTERM and then SIGHUP). What the process was started to ignore, by nohup say, it goes on to ignore.
    """
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        again = number == signal.SIGINT and number in received
        if again and "WORLD_SIZE" not in os.environ:  # torchrun hands on the Ctrl-C that its processes have got already
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # a live table hides the cursor
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if len(received) == 1:
            ask(number)

    before = {number: signal.getsignal(number) for number in STOP}
    heeded = [number for number in STOP if before[number] != signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


def _leave_closed_terminal() -> None:
    """If the terminal is gone, write to nowhere, since writing to it is an error from now on."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


class Interrupted(Exception):
    """A signal asked to stop, and what was done so far is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(interrupted(number))
        self.signal = number


def interrupted(number: int) -> str:
    return f"interrupted by {signal.Signals(number).name}; run the same command again to continue"


def end_with_parent() -> None:
    """Let the system send SIGTERM when the process that started this one ends, even by kill -9; Linux alone can."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
