"""Training images per second and core: the pixel store against decoding each time.

    python -m benchmarks.images [--images 256]

JPEG files of CARS196's typical size (700 x 480) are read, cropped at random to 224 x 224 and flipped, in one process:
by torchvision's ImageFolder with its transforms on PIL images, and from the store of decoded pixels.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from memvir.images.batches import CroppedImages
from memvir.images.pixels import open_images
from memvir.params import load_params

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    count = parser.parse_args().images
    torch.set_num_threads(1)
    settings = load_params().recipe("cars196").images
    with tempfile.TemporaryDirectory() as folder:
        files = write_photographs(Path(folder) / "images", count)
        crop = settings.train
        transform = v2.Compose(
            [
                v2.RandomResizedCrop(settings.size, scale=crop.scale, ratio=crop.ratio),
                v2.RandomHorizontalFlip(crop.flip),
                v2.PILToTensor(),
            ]
        )
        decoding = ImageFolder(Path(folder) / "images", transform)
        index = pd.DataFrame({"file": files, "md5": files})
        store = open_images(index, Path(folder) / "images", "rgb", None, "benchmark", Path(folder) / "scratch")
        stored = CroppedImages(store, np.zeros(count, int), settings, seed=0)
        seconds = {"ImageFolder, PIL": [], "pixel store": []}
        for epoch in range(ROUNDS + 1):  # the first round warms up
            for name, read in (
                ("ImageFolder, PIL", lambda i: decoding[i]),
                ("pixel store", lambda i, e=epoch: stored[e, i]),
            ):
                start = time.perf_counter()
                for i in range(count):
                    read(i)
                seconds[name].append(time.perf_counter() - start)
    rates = {name: count / statistics.median(times[1:]) for name, times in seconds.items()}
    print("| training images, 700 x 480 -> 224 | images/s and core | ratio |\n|---|---:|---:|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / rates['ImageFolder, PIL']:.1f} |")


def write_photographs(folder: Path, count: int) -> list[str]:
    """JPEG files with a photograph's share of detail: smooth noise over several scales."""
    random = np.random.default_rng(0)
    (folder / "class").mkdir(parents=True)
    files = []
    for number in range(count):
        pixels = np.zeros((480, 700, 3))
        for scale in (4, 16, 64, 256):
            noise = Image.fromarray(random.integers(0, 256, (480 // scale + 2, 700 // scale + 2, 3), dtype=np.uint8))
            pixels += np.asarray(noise.resize((700, 480), Image.Resampling.BICUBIC)) * scale**0.5
        pixels = (pixels / pixels.max() * 255).astype(np.uint8)
        files.append(f"class/{number:05d}.jpg")
        Image.fromarray(pixels).save(folder / files[-1], quality=90)
    return files


if __name__ == "__main__":
    main()
