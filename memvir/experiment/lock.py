"""One process at a time: a file that a process holds, and that the system lets go of when it dies, however."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from memvir.errors import UserError

log = logging.getLogger("memvir")


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


@contextlib.contextmanager
def in_turn(path: Path, work: str, seconds: float = 3600.0) -> Iterator[None]:
    """Hold `path` as soon as others do not, for work that is only slower when several do it at once: after so many
    seconds this process goes ahead all the same, as a file system without locks may keep one whose holder died.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: waiting for another process that is %s", path, work)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=seconds)
    try:
        yield
    finally:
        lock.release()
