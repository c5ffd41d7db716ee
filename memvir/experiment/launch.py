"""Several processes for one run: starting them, and what is said when one of them is lost."""

import contextlib
import logging
import re
import signal
import sys
from collections.abc import Iterator, Sequence

from memvir.errors import UserError
from memvir.experiment.gpu_errors import AGAIN

LOST = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe|timed? ?out|TCPStore", re.IGNORECASE)
"""How torch's backends say that another process has gone."""


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """`python -m MODULE ARGUMENTS` in so many processes under torchrun; ends this one if they did not end well.

    Raises UserError if one of them was killed, or exits with the code with which they ended.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable()  # what torchrun has to say is said below in one line
    command = ["--standalone", f"--nproc_per_node={processes}", "-m", module, *arguments]
    try:
        torchrun.run(torchrun.parse_args(command))
    except SignalException as stop:  # its processes have been told, and have ended
        sys.exit(128 + int(stop.sigval))
    except ChildFailedError as error:
        killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # it has said why
            sys.exit(failure.exitcode)
        name = signal.Signals(killed[rank]).name
        raise UserError(
            f"process {rank} of the {processes} of this run was killed ({name}), perhaps for want of memory; {AGAIN}"
        ) from None


@contextlib.contextmanager
def lost_process(processes: int) -> Iterator[None]:
    """Raise UserError where another process of a run is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if processes == 1 or not LOST.search(reason):
            raise
        raise UserError(f"another process of this run has gone; {AGAIN}") from error
