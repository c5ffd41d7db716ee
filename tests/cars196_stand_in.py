"""CARS196 as it is but for the pictures: all 16,185 names, over tiny JPEGs of the kinds that the real set holds."""

import functools
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from memvir.images.annotation import ImageClass, read_annotation

ANNOTATION = Path(__file__).parents[1] / "dataset" / "cars196" / "source" / "annotation.csv"
IMAGES = 16185


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """A thousand distinct JPEGs: colour, grey and CMYK, baseline and progressive, several shapes, some with EXIF.

    Of fewer so many would tie that evaluation sorted the whole gallery for most of them.
    """
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    result = []
    for number in range(1000):
        height, width = (int(side) for side in random.integers(6, 20, 2))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(("RGB", "RGB", "RGB", "L", "CMYK")[number % 5])
        file = io.BytesIO()
        options = {"exif": exif.tobytes()} if number % 7 == 0 else {}
        image.save(file, "JPEG", quality=60, progressive=number % 3 == 0, **options)
        result.append(file.getvalue())
    return tuple(result)


def picture(number: int) -> bytes:
    return pictures()[number % len(pictures())]


@functools.cache
def classes() -> tuple[ImageClass, ...]:
    return tuple(read_annotation(ANNOTATION))


def numbered() -> Iterator[tuple[str, bytes]]:
    """The members of car_ims.tgz."""
    for number in range(1, IMAGES + 1):
        yield f"car_ims/{number:06}.jpg", picture(number)


def by_class(top: str = "car_data/car_data") -> Iterator[tuple[str, bytes]]:
    """The members of the by-class zip: both halves of the classification split, each numbered from 1."""
    for name in ("names.csv", "anno_train.csv", "anno_test.csv"):
        yield name, b"a,b\n"
    counts = {"train": 0, "test": 0}
    for cls in classes():
        for position, number in enumerate(cls.images):
            half = "train" if position % 2 == 0 else "test"
            counts[half] += 1
            yield f"{top}/{half}/{cls.name.replace('/', '-')}/{counts[half]:05}.jpg", picture(number)


def write_tar(path: Path, members: Iterator[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(path, mode, format=tarfile.USTAR_FORMAT, **options) as tar:  # type: ignore[call-overload]
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_zip(path: Path, members: Iterator[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_folder(path: Path, members: Iterator[tuple[str, bytes]]) -> Path:
    for name, content in members:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path
