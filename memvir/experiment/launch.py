"""Several processes for one run: starting them, and what is said when one of them is lost."""

import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence

from memvir.errors import UserError
from memvir.experiment.gpu_errors import AGAIN

LOST = re.compile(r"connection (was )?(reset|closed|refused)|broken pipe|remote (process|error)|by peer", re.IGNORECASE)
"""How gloo and nccl say that another process has gone."""
PATIENCE = "86400"
"""Seconds that torchrun gives its processes to save, which they do at the end of an epoch; 30 unless told."""


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """`python -m MODULE ARGUMENTS` in so many processes under torchrun; ends this one if they did not end well.

    Raises UserError if one of them was killed, or exits with the code with which they ended.
    """
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(
            f"runtime.processes: {processes} processes of a run need a GPU each, and torch sees {gpus}; use fewer, or "
            "give the run as many by its recipe's resources.gpus"
        )
    logging.disable()  # what torchrun has to say is said below in one line
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", PATIENCE)
    command = ["--standalone", f"--nproc_per_node={processes}", "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as stop:  # its processes have been told, and have ended
        sys.exit(128 + int(stop.sigval))
    except ChildFailedError as error:
        killed = {rank: failure for rank, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL}
        rank, failure = next(iter(killed.items())) if killed else error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        why = signal.Signals(-failure.exitcode).name + (", perhaps for want of memory" if killed else "")
        raise UserError(f"process {rank} of the {processes} of this run was killed ({why}); {AGAIN}") from None


@contextlib.contextmanager
def lost_process(processes: int) -> Iterator[None]:
    """Raise UserError where another process of a run is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if processes == 1 or not LOST.search(str(error)):
            raise
        raise UserError(f"another process of this run has gone ({reason}); {AGAIN}") from error
