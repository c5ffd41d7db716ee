"""A user's folder in which stages run as DVC runs them, each in a process of its own.

The process is forked from the test's, so that it does not spend two seconds importing torch; it is a real one all the
same, with an exit code, and can be killed.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.utils.tensorboard  # noqa: F401  imported once, for every stage to be forked

from tests import tiny


class Outcome(NamedTuple):
    code: int  # the exit code, or minus the signal that ended it
    output: str


class Workspace:
    def __init__(self, folder: Path, **training: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.write_params(tiny.params(**training))
        tiny.write_images(folder / "dataset" / "tiny" / "source")

    def write_params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(json.dumps(params))  # JSON is YAML

    def run(self, stage: str, *arguments: str, before: Callable[[], None] = lambda: None) -> Outcome:
        """python -m stages.STAGE --dataset tiny ARGUMENTS; `before` runs first, in the stage's process."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os._exit(self._child(stage, arguments, before))
        os.close(writer)
        with os.fdopen(reader) as pipe:
            output = pipe.read()
        _, status = os.waitpid(child, 0)
        return Outcome(os.waitstatus_to_exitcode(status), output)

    def _child(self, stage: str, arguments: tuple[str, ...], before: Callable[[], None]) -> int:
        sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        logging.root.handlers.clear()  # pytest's own, which would keep the messages to themselves
        sys.argv = [stage, "--dataset", "tiny", *arguments]
        try:
            os.chdir(self.folder)
            before()
            importlib.import_module(f"stages.{stage}").main()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
                return 1
            return end.code or 0
        except BaseException:
            traceback.print_exc()
            return 99
        return 0

    def prepared(self) -> "Workspace":
        for stage in ("download", "prepare", "weights"):
            outcome = self.run(stage)
            assert outcome.code == 0, outcome.output
        return self

    def train(self, variant: str = "memvir_norm_softmax", seed: int = 1, **options: Any) -> Outcome:
        return self.run("train", "--variant", variant, "--seed", str(seed), **options)

    def evaluate(self, variant: str = "memvir_norm_softmax", seed: int = 1) -> Outcome:
        return self.run("evaluate", "--variant", variant, "--seed", str(seed))

    def outputs(self, *folders: str) -> dict[str, bytes]:
        """Every file below the folders, by name."""
        files = {}
        for folder in folders or ("runs", "results"):
            for path in sorted((self.folder / folder).rglob("*")):
                with contextlib.suppress(IsADirectoryError):
                    files[str(path.relative_to(self.folder))] = path.read_bytes()
        return files
