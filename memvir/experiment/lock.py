"""One process at a time: a file that a process holds, and that the system lets go of when it dies, however."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from memvir.errors import UserError


@contextlib.contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Hold `path` for this process. Raises UserError, saying that another one is at `work`, if another holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise UserError(f"{path}: another process is {work}; wait for it or stop it") from None
    with lock:
        yield
