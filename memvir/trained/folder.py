"""Folders of pictures as embeddings: whole or not at all, continued when interrupted, nothing left out in silence."""

import contextlib
import hashlib
import logging
import mimetypes
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from memvir.errors import UserError
from memvir.files import atomic_write, file_hash, npz
from memvir.images.archives import Folder
from memvir.progress import Counter
from memvir.trained.model import BATCH_SIZE, TrainedModel, usable_device

log = logging.getLogger("memvir")

TYPES = mimetypes.MimeTypes()  # Python's own, not this machine's
OTHER_SUFFIXES = (".npy", ".npz", ".onnx", ".part", ".pt", ".pth", ".rows", ".safetensors", ".toml", ".yaml", ".yml")
"""Of files beside pictures that those types do not know."""


class UnreadablePictures(UserError):
    """Some pictures of a folder cannot be read; `reasons` says of each why."""

    def __init__(self, folder: Path, reasons: dict[str, str], total: int) -> None:
        self.reasons = reasons
        names = ", ".join(list(reasons)[:5]) + (", ..." if len(reasons) > 5 else "")
        super().__init__(
            f"{folder}: {len(reasons)} of {total} pictures cannot be read ({names}); replace or remove them"
        )


@dataclass(frozen=True)
class Embeddings:
    """The pictures of a folder, by their names in it, and their embeddings (n, D)."""

    names: list[str]
    values: np.ndarray
    state: str = ""
    """What `folder_state` gave before; empty if that is not known."""


def pictures_in(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the pictures of a folder and the folders in it, sorted, and those of its other files.

    Every file is taken for a picture but those that say by their names that they are something else. What systems
    scatter about is in neither list. Raises UserError if there is no picture.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder that holds the pictures")
    files = [name for name, _ in Folder(folder).contents()]
    names = [name for name in files if _may_be_a_picture(name)]
    others = [name for name in files if not _may_be_a_picture(name)]
    if not names:
        raise UserError(f"{folder}: holds no pictures; give the folder that does")
    return names, others


def folder_state(folder: Path, names: Sequence[str]) -> str:
    """A digest of the names, sizes and times of a folder's pictures: another once one is changed, added or removed."""
    digest = hashlib.sha256()
    for name in names:
        state = "gone"
        with contextlib.suppress(OSError):
            found = (folder / name).stat()
            state = f"{found.st_size} {found.st_mtime_ns}"
        digest.update(f"\0{name}\0{state}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def embed_folder(
    model: TrainedModel,
    folder: Path,
    *,
    skip_unreadable: bool = False,
    batch_size: int = BATCH_SIZE,
    device: str | None = None,
    part: Path | None = None,
) -> Embeddings:
    """The embeddings of a folder's pictures.

    Args:
        skip_unreadable: leave out, with a warning, what cannot be read.
        part: a file that keeps what is done; after an interruption, or an error over unreadable pictures, the same call
            goes on from there. It stays: remove it once the result is safe.

    Raises:
        UnreadablePictures: names them all, after the others are embedded.
    """
    target = usable_device(device)  # before there is a part
    names, others = pictures_in(folder)
    state = folder_state(folder, names)
    if others:
        more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
        log.info("%s: left out, being no pictures by their names: %s%s", folder, others[0], more)
    paths = [folder / name for name in names]
    values = np.full((len(names), model.dim), np.nan, np.float32)
    reasons: dict[str, str] = {}

    def embed(rows: Sequence[int]) -> Iterator[np.ndarray]:
        """Embed these pictures, a batch of their embeddings after the other."""
        for embeddings, unreadable in model.embed_batches([paths[row] for row in rows], batch_size, target):
            batch, rows = rows[: len(embeddings)], rows[len(embeddings) :]
            values[list(batch)] = embeddings
            reasons.update({names[batch[place]]: str(error) for place, error in unreadable.items()})
            yield embeddings

    with contextlib.nullcontext() if part is None else part.open("a+b") as file:
        start = 0
        if file is not None:
            start = _continue(file, _key(model, state, batch_size), values, batch_size)
        if start:
            log.info("%s: continuing after %d of %d pictures", folder, start, len(names))
        with Counter("embedding", len(names), "images", start) as counter:
            for embeddings in embed(range(start, len(names))):
                if file is not None:
                    file.write(embeddings.tobytes())
                    file.flush()
                counter.add(len(embeddings))
    for _ in embed(np.flatnonzero(np.isnan(values[:start, 0])).tolist()):  # those that an earlier call could not read
        pass
    for reason in reasons.values():
        log.warning("%s%s", "skipped: " if skip_unreadable else "", reason)
    if reasons and (not skip_unreadable or len(reasons) == len(names)):
        raise UnreadablePictures(folder, reasons, len(names))
    kept = [row for row, name in enumerate(names) if name not in reasons]
    return Embeddings([names[row] for row in kept], values[kept], state)


def write_embeddings(path: Path, embeddings: Embeddings, model: TrainedModel) -> None:
    """An .npz of `names`, `embeddings`, the `model`'s sha256 and the `folder`'s state; same content, same bytes."""
    content = npz(
        names=np.array(embeddings.names),
        embeddings=embeddings.values,
        model=np.array(file_hash(model.file.path, "sha256")),
        folder=np.array(embeddings.state),
    )
    with atomic_write(path) as file:
        file.write(content)


def read_embeddings(path: Path, model: TrainedModel) -> Embeddings:
    """What `write_embeddings` wrote. Raises UserError if it is another file, or another model's."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, values, made_by = arrays["names"], arrays["embeddings"], str(arrays["model"])
            state = str(arrays.get("folder", ""))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; `memvir embed MODEL FOLDER --out {path}` makes it") from None
    except KeyError as error:
        key = str(error).split()[0].strip("'\"")
        raise UserError(f"{path}: has no {key!r}; give a file that `memvir embed` wrote") from None
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError):
        raise UserError(f"{path}: not a whole .npz of embeddings; give a file that `memvir embed` wrote") from None
    if values.ndim != 2 or names.shape != values.shape[:1] or names.dtype.kind != "U" or values.dtype != np.float32:
        raise UserError(f"{path}: its names and embeddings do not fit; give a file that `memvir embed` wrote")
    model.check_dimension(values.shape[1], str(path))
    if made_by != file_hash(model.file.path, "sha256"):
        raise UserError(f"{path}: another model made these embeddings; run `memvir embed` again with this one")
    return Embeddings(names.tolist(), values, state)


def _may_be_a_picture(name: str) -> bool:
    kind = TYPES.guess_type(PurePosixPath(name).name)[0]
    return (kind is None or kind.startswith("image/")) and not name.lower().endswith(OTHER_SUFFIXES)


def _key(model: TrainedModel, state: str, batch_size: int) -> bytes:
    """What a part belongs to: this model, these files as they are, these batches."""
    return hashlib.sha256(f"{file_hash(model.file.path, 'sha256')} {state} {batch_size}".encode()).digest()


def _continue(part: BinaryIO, key: bytes, values: np.ndarray, batch_size: int) -> int:
    """Fill the first rows of `values` with those that lie in `part` behind their key; returns how many.

    Only whole batches, since the last bits of an embedding depend on the size of its batch. What follows is cut off.
    """
    part.seek(0)
    rows = 0
    if part.read(len(key)) == key:
        found = np.frombuffer(part.read(values.nbytes), np.uint8)
        rows = len(found) // values[0].nbytes
        if rows < len(values):
            rows -= rows % batch_size
        values[:rows] = found[: rows * values[0].nbytes].view(np.float32).reshape(rows, values.shape[1])
        part.truncate(len(key) + rows * values[0].nbytes)
    else:
        part.truncate(0)
        part.write(key)
    return rows
