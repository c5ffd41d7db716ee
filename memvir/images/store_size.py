"""How much disk a store of decoded pixels will take, before it is made."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from memvir.images.pixels import Channels, Crop

SAMPLE = 500
"""Images whose headers are read; the mean of so many is within a few per cent of that of all."""


def estimated_bytes(files: Sequence[Path], channels: Channels, crop: Crop | None) -> int:
    """What the images take, cropped or in full; without a crop an estimate from some of them, evenly chosen."""
    depth = 1 if channels == "grey" else 3
    if crop is not None:
        return len(files) * crop.size**2 * depth
    pixels = []
    for path in files[:: max(1, len(files) // SAMPLE)]:
        with contextlib.suppress(Exception), Image.open(path) as image:  # decoding will say what is wrong with it
            pixels.append(image.width * image.height)
    return round(len(files) * sum(pixels) / max(1, len(pixels))) * depth
