"""One thin script per DVC stage: read params.yaml, call memvir, write files.

`python -m stages.NAME --dataset D ...` runs from the repository's top folder, as DVC runs it.
"""

import argparse
import contextlib
import errno
import functools
import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memvir import commands, libraries
from memvir.commands import Parser
from memvir.errors import NotMade, UserError
from memvir.signals import Interrupted, end_with_parent, interrupted, stop_signals

__all__ = ["Parser", "at_once", "exit_codes", "exit_interrupted", "one_line_errors", "stage"]

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # `python -m stages.NAME` begins here: a Ctrl-C shows no traceback

if "TORCHELASTIC_RUN_ID" not in os.environ:  # batch scripts set these for programs that torchrun does not start
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)

libraries.prepare()  # before any stage imports them

ADVICE = {
    errno.ENOSPC: "; free some space and run the same command again",
    errno.ENOENT: "; `dvc repro` makes what a stage reads",
}


def _path(text: str) -> Path:
    from memvir.sections import user_path  # late, as below: the handlers of signals come first

    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_once(text: str) -> int:
    """How many of something run at a time."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text!r}")
    return int(text)


OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"required": True, "metavar": "D", "help": "a recipe of params.yaml, such as glyphs"},
    "variant": {"required": True, "metavar": "V", "help": "a variant of the recipe, such as memvir_norm_softmax"},
    "seed": {"required": True, "metavar": "S", "type": int, "help": "the run's seed"},
    "study": {"required": True, "metavar": "NAME", "help": "one of the recipe's studies, such as memory"},
    "jobs": {"metavar": "N", "type": at_once, "help": "runs at a time; by default as many as there are cores for"},
    "model": {
        "metavar": "FILE",
        "type": _path,
        "help": "a saved model of this recipe: print its metrics, write nothing",
    },
}


def stage(main: Callable[..., None]) -> Callable[[], None]:
    """Turn `main(params, dataset, ...)` into a command whose options are the function's arguments after `params`."""

    @functools.wraps(main)
    def command() -> None:
        parser = Parser(description=inspect.getdoc(inspect.getmodule(main)))
        for name in list(inspect.signature(main).parameters)[1:]:
            parser.add_argument(f"--{name}", **OPTIONS[name])
        arguments = vars(parser.parse_args())
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("memvir").setLevel(logging.INFO)
        # set by DVC, by a sweep, by torchrun: nothing works on when these were killed
        if {"DVC_STAGE", "WORLD_SIZE"} & os.environ.keys():
            end_with_parent()
        with exit_codes():
            from memvir.params import load_params

            main(load_params(), **arguments)

    return command


def exit_interrupted(number: int) -> None:
    """End this process with one line and exit code 128 + the signal; everything open is cleaned up on the way."""
    os.write(2, f"{interrupted(number)}\n".encode())  # print may be what was interrupted
    sys.exit(128 + number)


def describe(error: Exception) -> str:
    """An error as one line, and what DVC can do about it."""
    if isinstance(error, NotMade):
        return f"{commands.describe(error)}; run `dvc repro`, which makes it"
    advice = ADVICE.get(error.errno or 0, "") if isinstance(error, OSError) else ""
    return commands.describe(error) + advice


one_line_errors = functools.partial(commands.one_line_errors, describe)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the process by 128 + the signal that asked it to stop, or by 1 and one line for what a user can put right."""
    with stop_signals(exit_interrupted), one_line_errors():
        try:
            yield
        except Interrupted as stop:
            sys.exit(128 + stop.signal)
