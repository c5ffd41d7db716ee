"""Image files as arrays: the one place where pixels are decoded.

What every file becomes, whatever its format and name's extension say:
- the first frame of an animation;
- turned upright by its EXIF orientation (an unreadable EXIF block counts as none);
- transparent pixels over white;
- 12 and 16 bits a channel scaled to 8; CMYK, palettes, bilevel and other colour models converted.
A file that cannot be decoded to its last row, holds more than MAX_PIXELS, or whose pixels have no agreed range
(signed, 32 bits, floating-point) is refused by name.
"""

import contextlib
import io
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image

from memvir.errors import UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # they do not say which file; what matters becomes an error here

Channels = Literal["grey", "rgb", "bgr"]
Result = TypeVar("Result")

MAX_PIXELS = 2**26
"""Four times the sensors of today's telephones; an image of more is a mistake or a decompression bomb."""
PIXELS_AT_ONCE = 2 * MAX_PIXELS
"""How many pixels the threads of a process decode at a time, all images together."""
MAX_BYTES = 2**28
"""The largest image file that is looked at; uncompressed TIFFs of MAX_PIXELS fit."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may try. Left out are formats that start other programs (EPS) and rare, little-tested ones."""


def decode(
    path: Path, channels: Channels, then: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels
) -> np.ndarray:
    """Read an image file.

    Returns:
        uint8 pixels, (H, W) for grey (ITU-R 601 luma), (H, W, 3) for rgb and bgr; contiguous. With `then`, what it
        makes of them while they still count as being decoded.

    Raises:
        UserError: names the file and says why it cannot be read.
    """
    with _loaded(read_file(path), str(path)) as image:
        return then(pixels(image, channels))


def read_file(path: Path) -> bytes:
    """The bytes of an image file of acceptable size. Raises UserError naming it."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES:
            return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no system has files of such a name
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: not a file; remove it")  # a pipe would be waited for
    raise UserError(f"{path}: {found.st_size:,} bytes is too large for an image; remove it")


def load(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file completely; the result is upright and of mode L or RGB.

    Raises UserError that begins with `name`.
    """
    with _loaded(content, name) as image:
        return image


@contextlib.contextmanager
def _loaded(content: bytes, name: str) -> Iterator[Image.Image]:
    if not content:
        raise UserError(f"{name}: the file is empty; replace or remove it")
    with contextlib.ExitStack() as stack:
        with _errors(name):
            image = stack.enter_context(Image.open(io.BytesIO(content), formats=FORMATS))
            upright = stack.enter_context(_standard(image, name))
        yield upright


@contextlib.contextmanager
def _standard(image: Image.Image, name: str) -> Iterator[Image.Image]:
    width, height = image.size
    if not width * height:
        raise UserError(f"{name}: {width} x {height} pixels are no image")
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels are more than {MAX_PIXELS:,}; shrink or remove it")
    with _room.take(width * height):
        layout = _layout(image)
        image.load()
        turn = _turn(image)
        upright = _eight_bit(image, layout)
        yield upright if turn is None else upright.transpose(turn)


class _Room:
    """So much of something, of which threads take what they need and wait where it is short."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, size: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.free >= size)
            self.free -= size
        try:
            yield
        finally:
            with self.changed:
                self.free += size
                self.changed.notify_all()


_room = _Room(PIXELS_AT_ONCE)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Whatever decoding raises, as a UserError that begins with `name`."""
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: holds more than {MAX_PIXELS:,} pixels; shrink or remove it") from None
    except Exception as error:  # decoders raise nearly anything over hostile bytes: OSError, SyntaxError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: not a readable image: {reason}; replace or remove it") from None


def standard(image: Image.Image, name: str) -> Image.Image:
    """What `load` makes of a file, of an image that is open already: upright and of mode L or RGB.

    Raises UserError that begins with `name`.
    """
    with _errors(name), _standard(image, name) as upright:
        return upright


def pixels(image: Image.Image, channels: Channels) -> np.ndarray:
    """An image of mode L or RGB as the uint8 array that a recipe's `images.channels` asks for."""
    if channels == "grey":
        return np.array(image.convert("L"))
    rgb = np.array(image.convert("RGB"))
    return np.ascontiguousarray(rgb[..., ::-1]) if channels == "bgr" else rgb


def _layout(image: Image.Image) -> str:
    """How an opened image lies in its file, as Pillow calls it ("L;4"); loading forgets it. Empty for some formats."""
    tiles: Any = getattr(image, "tile", None)
    layout = tiles[0].args if tiles else ""
    return str(layout[0] if isinstance(layout, tuple) else layout)


def _eight_bit(image: Image.Image, layout: str) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    transparent = image.info.get("transparency")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed pixels have no agreed range")
    if image.mode == "I" and image.format != "PPM":  # there Pillow means 16 bits by it
        raise ValueError("32-bit pixels have no agreed range")
    if image.mode.startswith("I"):
        most = 4095 if 12 in tags.get(BITS, ()) else 65535
        table = ((np.arange(most + 1) * 255 + most // 2) // most).astype(np.uint8)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow turns it round for 8 bits only
            table = table[::-1].copy()
        if transparent is not None:
            table[transparent] = 255
        return Image.fromarray(table[np.asarray(image)])
    if layout == "RGB;16B" and transparent is not None:
        raise ValueError("a transparent colour of 16 bits a channel is not supported")
    if layout in ("L;2", "L;4") and transparent is not None:  # Pillow scales the pixels to 8 bits, but not this value
        image = image.copy()  # the caller's stays as it is
        image.info["transparency"] = transparent * (85 if layout == "L;2" else 17)
    elif not layout and image.mode == "L" and transparent in range(1, 16) and not (np.asarray(image) % 17).any():
        raise ValueError("whether its transparent shade is of 2, 4 or 8 bits is lost once it is loaded; give its file")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow knows no direct way to RGBA
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


BITS, SAMPLE_FORMAT, PHOTOMETRIC, WHITE_IS_ZERO = 258, 339, 262, 0

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a loaded image upright, by its EXIF orientation."""
    try:
        return _TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block; the pixels are none the worse
        return None
