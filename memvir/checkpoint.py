"""Checkpoints that survive a kill, a full disk and a flipped bit: atomic, checksummed, two generations.

A checkpoint belongs to a fingerprint, a flat dict of everything that shapes the result. Under another fingerprint
nothing is continued.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from memvir.errors import UserError
from memvir.files import atomic_write

log = logging.getLogger("memvir")

DIGEST_SIZE = hashlib.sha256().digest_size


class Checkpoint:
    """A run's checkpoint file `NAME.pt`, and `NAME.previous.pt`, the one before it.

    A file is the sha256 of the rest, then what torch.save wrote.
    """

    def __init__(self, path: Path, fingerprint: dict[str, str]) -> None:
        self.path = path
        self.previous = path.with_suffix(".previous" + path.suffix)
        self.fingerprint = fingerprint

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the system lets go of the lock when the process dies, however it dies.

        Raises UserError if another process is at work on the same run.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_suffix(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"{lock.lock_file}: another process is training this run; wait for it or stop it") from None
        try:
            yield
        finally:
            lock.release()

    def save(self, state: dict[str, Any]) -> None:
        """Write `state`, keeping the checkpoint before it. Raises UserError naming path and space on a full disk."""
        buffer = io.BytesIO()
        torch.save({"fingerprint": self.fingerprint, "state": state}, buffer)
        content = buffer.getbuffer()
        try:
            with atomic_write(self.path, keep=self.previous) as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
        except OSError as error:
            raise UserError(
                f"{self.path}: {error.strerror}; a checkpoint needs {len(content) / 1e6:.2f} MB: free some space and "
                "run the same command again, it continues from the checkpoint before"
            ) from None

    def load(self) -> dict[str, Any] | None:
        """The newest intact state of this fingerprint, or None to start afresh; anything unexpected is said."""
        damaged = False
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            content = _read(path)
            if content is None:
                damaged = True
                log.warning("%s: damaged, ignoring it", path)
                continue
            differences = _differences(content["fingerprint"], self.fingerprint)
            if differences:
                log.warning("%s: made with other settings (%s), starting afresh", path, "; ".join(differences))
                return None
            if damaged:
                log.warning("%s: using this one, the checkpoint before", path)
            return content["state"]
        if damaged:
            log.warning("%s: no intact checkpoint, starting afresh", self.path)
        return None

    def remove(self) -> None:
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST_SIZE:]).digest() != content[:DIGEST_SIZE]:
        return None
    return torch.load(io.BytesIO(content[DIGEST_SIZE:]), weights_only=True, map_location="cpu")


def _differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]
