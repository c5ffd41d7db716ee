"""Image files as arrays: the one place where pixels are decoded.

What every file becomes, whatever its format and name's extension say:
- the first frame of an animation;
- turned upright by its EXIF orientation (an unreadable EXIF block counts as none);
- transparent pixels over white;
- 16 bits a channel scaled to 8; CMYK, palettes, bilevel and other colour models converted.
A file that cannot be decoded to its last row, or holds more than MAX_PIXELS, is refused by name.
"""

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from memvir.errors import UserError

warnings.filterwarnings("ignore", module=r"PIL\.")  # they do not say which file; what matters becomes an error here

Channels = Literal["grey", "rgb", "bgr"]

MAX_PIXELS = 2**26
"""Four times the sensors of today's telephones; an image of more is a mistake or a decompression bomb."""
MAX_BYTES = 2**28
"""The largest image file that is looked at; uncompressed TIFFs of MAX_PIXELS fit."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""What Pillow may try. Left out are formats that start other programs (EPS) and rare, little-tested ones."""


def decode(path: Path, channels: Channels) -> np.ndarray:
    """Read an image file.

    Returns:
        uint8 pixels, (H, W) for grey (ITU-R 601 luma), (H, W, 3) for rgb and bgr; contiguous.

    Raises:
        UserError: names the file and says why it cannot be read.
    """
    return pixels(load(read_file(path), str(path)), channels)


def read_file(path: Path) -> bytes:
    """The bytes of an image file of acceptable size. Raises UserError naming it."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: {size:,} bytes is too large for an image; remove it")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def load(content: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file completely; the result is upright and of mode L or RGB.

    Raises UserError that begins with `name`.
    """
    if not content:
        raise UserError(f"{name}: the file is empty; replace or remove it")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{name}: {width} x {height} pixels are more than {MAX_PIXELS:,}; shrink or remove it")
            image.load()
            turn = _turn(image)
            upright = _eight_bit(image)
            return upright if turn is None else upright.transpose(turn)
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: holds more than {MAX_PIXELS:,} pixels; shrink or remove it") from None
    except Exception as error:  # decoders raise nearly anything over hostile bytes: OSError, SyntaxError, struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: not a readable image: {reason}; replace or remove it") from None


def pixels(image: Image.Image, channels: Channels) -> np.ndarray:
    """An image of mode L or RGB as the uint8 array that a recipe's `images.channels` asks for."""
    if channels == "grey":
        return np.array(image.convert("L"))
    rgb = np.array(image.convert("RGB"))
    return np.ascontiguousarray(rgb[..., ::-1]) if channels == "bgr" else rgb


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range")
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("L" if image.mode in ("L", "1") else "RGB")


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
