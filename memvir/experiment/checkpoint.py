"""Checkpoints that survive a kill, a full disk and a flipped bit: atomic, checksummed, two generations.

A checkpoint belongs to an identity (`memvir.experiment.identity`) and is called by its hash. So a run under other
settings or code does not touch it, and going back finds it again; the last state of a finished run stays too, for a
longer run to go on from.
"""

import contextlib
import hashlib
import io
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from memvir.errors import UserError
from memvir.experiment.identity import Identity, differences, short
from memvir.experiment.lock import locked
from memvir.files import atomic_write

log = logging.getLogger("memvir")

Continues = Callable[[Identity, Identity, dict[str, Any]], bool]
"""Whether a state of the first identity is one of the second too."""

DIGEST_SIZE = hashlib.sha256().digest_size


class Checkpoint:
    """`HASH.pt` in a run's folder of checkpoints, HASH that of the identity, and `HASH.previous.pt`, the one before.

    A file is the sha256 of the rest, then what torch.save wrote: identity, environment and state.

    Args:
        environment: what the run is made with, said where it changes on the way.
    """

    def __init__(self, folder: Path, identity: Identity, environment: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self.path = folder / f"{short(identity)}.pt"
        self.previous = folder / f"{short(identity)}.previous.pt"
        self.identity = identity
        self.environment = environment or {}
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process, under whatever settings; the system lets go when the process dies, however.

        What is being written is written before it is let go. Raises UserError if another process is at work on it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.with_name(f"{self.folder.name}.lock"), "training this run"):
            try:
                yield
                self.flush()
            except BaseException:
                try:
                    self.flush()
                except UserError as error:  # what ends the run is another
                    log.warning("warning: %s", error)
                raise
            finally:
                self.writer.shutdown()

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state` and let a thread write it while training goes on, keeping the checkpoint before it.

        One is written at a time. What went wrong with it is raised by the next `save` or `flush`, as a UserError that
        names path and space.
        """
        self.flush()
        gpus: set[torch.device] = set()
        copy = _in_host_memory(state, gpus)
        for gpu in gpus:
            torch.cuda.synchronize(gpu)  # the copies are under way all at once
        self.writing = self.writer.submit(self._write, copy)

    def flush(self) -> None:
        """Wait until what was saved is on the disk."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def _write(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"identity": self.identity, "environment": self.environment, "state": state}, buffer)
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

    def load(self, continues: Continues = lambda old, new, state: False) -> dict[str, Any] | None:
        """The newest intact state of this identity, else the furthest of another that this one continues, else None.

        Anything unexpected is said.
        """
        self.flush()
        damaged = False
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            content = _read(path)
            if content is None:
                damaged = True
                log.warning("%s: damaged, ignoring it", path)
                continue
            if damaged:
                log.warning("%s: using this one, the checkpoint before", path)
            self._compare_environment(path, content["environment"])
            return content["state"]
        if damaged:
            log.warning("%s: no intact checkpoint, starting afresh", self.path)
            return None
        return self._load_other(continues)

    def finish(self) -> None:
        """The run is complete: its last state stays, what came before is not needed any more."""
        self.flush()
        self.previous.unlink(missing_ok=True)

    def _load_other(self, continues: Continues) -> dict[str, Any] | None:
        others = sorted(self.folder.glob("*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
        contents = [(path, content) for path in others if (content := _read(path))]
        usable = [it for it in contents if continues(it[1]["identity"], self.identity, it[1]["state"])]
        if usable:
            path, content = max(usable, key=lambda it: it[1]["state"]["position"]["step"])
            log.info("%s: this run goes on from there (%s)", path, self._differences(content))
            self._compare_environment(path, content["environment"])
            return content["state"]
        if contents:
            path, content = contents[0]
            log.warning("%s: cannot be continued (%s) and is kept; starting afresh", path, self._differences(content))
        return None

    def _differences(self, content: dict[str, Any]) -> str:
        return "; ".join(differences(content["identity"], self.identity))

    def _compare_environment(self, path: Path, before: dict[str, Any]) -> None:
        changes = [
            f"{key}: {before.get(key)} -> {value}"
            for key, value in self.environment.items()
            if before.get(key) != value
        ]
        if changes:
            log.warning("%s: continued elsewhere (%s); the last digits may differ", path, "; ".join(changes))


def _in_host_memory(value: Any, gpus: set[torch.device]) -> Any:
    """A copy that training does not change, of tensors and of what holds them; from a GPU, which is added to `gpus`,
    through pinned memory, and not there before the GPU has done its work.
    """
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            gpus.add(value.device)
        host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return host.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {key: _in_host_memory(item, gpus) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_in_host_memory(item, gpus) for item in value)
    return value


def prune(folder: Path, budget: float, keep: Callable[[Path], bool]) -> None:
    """Remove checkpoints below `folder`, the oldest first, until they take `budget` bytes; never those to keep."""
    found = []
    for path in folder.rglob("*.pt"):
        with contextlib.suppress(FileNotFoundError):  # runs that start together prune together
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total > budget and not keep(path):
            total -= size
            path.unlink(missing_ok=True)
            log.info("%s: removed, as checkpoints take more than runtime.checkpoint_gigabytes", path)


def _read(path: Path) -> dict[str, Any] | None:
    content = path.read_bytes()
    if hashlib.sha256(content[DIGEST_SIZE:]).digest() != content[:DIGEST_SIZE]:
        return None
    return torch.load(io.BytesIO(content[DIGEST_SIZE:]), weights_only=True, map_location="cpu")
