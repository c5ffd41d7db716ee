"""How every command of this project takes its options and ends: what a user can put right is one line."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from memvir.errors import UserError


class Parser(argparse.ArgumentParser):
    """Says what is wrong with an option in one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def describe(error: Exception) -> str:
    """An error as one line; for a full disk or a missing file the path stands first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}"
    return " ".join(str(error).split())


@contextlib.contextmanager
def one_line_errors(describe: Callable[[Exception], str] = describe) -> Iterator[None]:
    """End an error that a user can cause in one line and exit code 1; MEMVIR_DEBUG=1 shows the traceback instead.

    Where nobody reads on, as in `| head`, the end is silent, and the exit code what a shell gives for SIGPIPE.
    """
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  `2>&-` leaves none
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the locale cannot write
    try:
        yield
        print(end="", flush=True)  # what is still in the buffer, while a failure can be told
    except (UserError, OSError) as error:
        try:
            print(end="", flush=True)
        except OSError:  # drop it, or Python would try again at exit, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        if os.environ.get("MEMVIR_DEBUG"):
            raise
        sys.exit(f"error: {describe(error)}")
