"""One thin script per DVC stage: read params.yaml, call memvir, write files.

`python -m stages.NAME --dataset D ...` runs from the repository's top folder, as DVC runs it.
"""

import argparse
import errno
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memvir.config import load_params
from memvir.errors import UserError

ADVICE = {
    errno.ENOSPC: "; free some space and run the same command again",
    errno.ENOENT: "; `dvc repro` makes what a stage reads",
}

OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"required": True, "metavar": "D", "help": "a recipe of params.yaml, such as glyphs"},
    "variant": {"required": True, "metavar": "V", "help": "a variant of the recipe, such as memvir_norm_softmax"},
    "seed": {"required": True, "metavar": "S", "type": int, "help": "the run's seed"},
    "model": {
        "metavar": "FILE",
        "type": Path,
        "help": "a saved model of this recipe: print its metrics, write nothing",
    },
}


def stage(main: Callable[..., None]) -> Callable[[], None]:
    """Turn `main(params, dataset, ...)` into a command whose options are the function's arguments after `params`.

    An error that a user can cause ends in one line and exit code 1; MEMVIR_DEBUG=1 shows the traceback instead.
    """

    @functools.wraps(main)
    def command() -> None:
        parser = argparse.ArgumentParser(description=inspect.getdoc(inspect.getmodule(main)))
        for name in list(inspect.signature(main).parameters)[1:]:
            parser.add_argument(f"--{name}", **OPTIONS[name])
        arguments = vars(parser.parse_args())
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        logging.getLogger("memvir").setLevel(logging.INFO)
        try:
            main(load_params(), **arguments)
        except (UserError, OSError) as error:
            if os.environ.get("MEMVIR_DEBUG"):
                raise
            sys.exit(f"error: {describe(error)}")

    return command


def describe(error: Exception) -> str:
    """An error as one line; for a full disk or a missing file the path stands first."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}{ADVICE.get(error.errno or 0, '')}"
    return " ".join(str(error).split())
