"""Images decoded once: a memory-mapped uint8 store in the scratch folder, rebuilt whenever what it holds is stale."""

import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from memvir.errors import UserError
from memvir.images.decode import MAX_PIXELS, decode
from memvir.libraries import available_cores

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("memvir")

FORMAT = 2  # raise it when decoding or resizing changes, so that older stores are not used

MAX_RESIZED = MAX_PIXELS // 4
"""An image that resizing would enlarge to more pixels is cut first."""
MAX_WAITING = 2**29
"""Bytes of decoded images that may wait to be written."""

Channels = Literal["grey", "rgb", "bgr"]


class Crop(NamedTuple):
    """Shorter side resized to `resize` (bilinear, antialiased), then the centre `size` x `size` pixels."""

    resize: int
    size: int


class Images(Protocol):
    """A sequence of uint8 images, (H, W) or (H, W, 3) each."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


@dataclass(frozen=True)
class DecodedImages:
    """Decodes at every access: slow, but needs no disk."""

    files: Sequence[Path]
    channels: Channels
    crop: Crop | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        if self.crop is None:
            return decode(self.files[index], self.channels)
        return decode(self.files[index], self.channels, functools.partial(resize_and_crop, crop=self.crop))


class PixelStore:
    """One flat file of uint8 pixels, and each image's shape and place in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.shapes = np.load(folder / "shapes.npy")  # (images, 2) or (images, 3)
        self.offsets = _offsets(self.shapes)
        # copy-on-write, so that torch takes views of it without a copy; nothing writes
        self.pixels = np.memmap(folder / "pixels.bin", dtype=np.uint8, mode="c")
        if len(self.pixels) != self.offsets[-1]:
            raise ValueError("pixels.bin has the wrong length")

    def __reduce__(self) -> tuple[type["PixelStore"], tuple[Path]]:
        return PixelStore, (self.folder,)  # a loader process gets the place, not gigabytes of pixels

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.pixels[self.offsets[index] : self.offsets[index + 1]].reshape(self.shapes[index])

    def stacked(self) -> np.ndarray:
        """All images as one array (images, H, W[, 3]), without a copy; they must have one size."""
        assert (self.shapes == self.shapes[0]).all(), "only images of one size can be stacked"
        return self.pixels.reshape(len(self), *self.shapes[0])


def open_images(
    index: "pd.DataFrame", folder: Path, channels: Channels, crop: Crop | None, name: str, scratch: Path | None
) -> Images:
    """The images of `index` (columns file, md5) below `folder`, decoded once into `scratch`; None decodes each time.

    `crop` None keeps full resolution. `name` says whose store it is: an older one of that name is removed.
    Raises UserError if an image cannot be read or the disk has no room for the store.
    """
    files = [folder / file for file in index["file"]]
    decoded = DecodedImages(files, channels, crop)
    if scratch is None:
        return decoded
    content = json.dumps([FORMAT, channels, crop, index["file"].tolist(), index["md5"].tolist()])
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    stores = scratch / "pixels"
    target = stores / f"{name}-{key}"
    try:
        return PixelStore(target)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.info("%s: damaged (%s), decoding the images again", target, error)
        shutil.rmtree(target, ignore_errors=True)
    for stale in stores.glob(f"{name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    _build(decoded, target)
    return PixelStore(target)


def resize_and_crop(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """(H, W[, 3]) uint8 -> (size, size[, 3]) uint8."""
    if pixels.shape[:2] == (crop.size, crop.size) and crop.resize == crop.size:
        return pixels
    import torch
    from torchvision.transforms.v2 import functional as transforms  # late: a second that small images need not pay

    pixels = _centre(pixels, crop)
    image = torch.from_numpy(np.array(pixels)).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    image = transforms.resize(image, [crop.resize], antialias=True)
    image = transforms.center_crop(image, [crop.size, crop.size])
    return image.permute(1, 2, 0).contiguous().numpy().reshape(crop.size, crop.size, *pixels.shape[2:])


def _centre(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    """Of an image so long and thin that resizing would make it huge, the part that the crop shows."""
    short, long = sorted(pixels.shape[:2])
    if crop.resize <= short or crop.resize * (crop.resize * long // short) <= MAX_RESIZED:
        return pixels
    length = max(short, math.ceil(crop.size * short / crop.resize) + 4)  # enlarging blends no more than neighbours
    length = min(long, length + (long - length) % 2)  # so that the centre stays where it was
    start = (long - length) // 2
    return pixels[start : start + length] if pixels.shape[0] == long else pixels[:, start : start + length]


def _build(images: DecodedImages, target: Path) -> None:
    shapes = _shapes(images)
    offsets = _offsets(shapes)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target, int(offsets[-1]))
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=".building-"))
    try:
        np.save(temporary / "shapes.npy", shapes)
        with (temporary / "pixels.bin").open("wb") as file:
            for image, shape in zip(_in_threads(images.__getitem__, np.diff(offsets), "decoding"), shapes, strict=True):
                assert image.shape == tuple(shape)
                file.write(image.tobytes())
            file.flush()
            os.fsync(file.fileno())
        if not target.exists():  # another run may have built it meanwhile
            os.rename(temporary, target)
    except OSError as error:
        if isinstance(error, FileExistsError) or target.exists():
            return
        advice = "free some space, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise UserError(
            f"{target}: {error.strerror}; the decoded images need {_gigabytes(int(offsets[-1]))}: {advice}set "
            "runtime.scratch to a folder on another disk or runtime.pixel_store to false"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _shapes(images: DecodedImages) -> np.ndarray:
    if images.crop is not None:
        extra = () if images.channels == "grey" else (3,)
        return np.tile((images.crop.size, images.crop.size, *extra), (len(images), 1))
    return np.array(list(_in_threads(lambda i: images[i].shape, np.zeros(len(images)), "measuring")))


def _in_threads(function: Callable[[int], object], sizes: np.ndarray, what: str) -> Iterator:
    """function(0), function(1), ... in order, some calls at a time (decoding releases Python's lock).

    The results take so many bytes; those that wait take no more than MAX_WAITING, but for a single larger one.
    """
    with ThreadPoolExecutor(available_cores()) as pool:
        waiting: deque[Future] = deque()
        try:
            for index in tqdm(range(len(sizes)), f"{what} images", unit="image", disable=None, leave=False):
                while waiting and (len(waiting) == 64 or sizes[index - len(waiting) : index + 1].sum() > MAX_WAITING):
                    yield waiting.popleft().result()
                waiting.append(pool.submit(function, index))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if size > free:
        raise UserError(
            f"{target}: decoding the images once needs {_gigabytes(size)} and the disk has {_gigabytes(free)} free; "
            "free some space, or set runtime.scratch to a folder on another disk or runtime.pixel_store to false"
        )
    if size > 2**30:
        log.info("decoding the images once into %s (%s)", target, _gigabytes(size))


def _offsets(shapes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(shapes.astype(np.int64).prod(axis=1))])


def _gigabytes(size: int) -> str:
    return f"{math.ceil(size / 1e7) / 100:.2f} GB"
