"""From decoded pixels to training batches on the device.

All randomness is a function of (seed, epoch, sample): the order of an epoch is drawn from (seed, epoch), an image's
augmentation from (seed, epoch, image). So batches do not depend on the number of workers, and resuming at any batch
of any epoch needs no loader state.
"""

import math
import multiprocessing
import re
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, default_collate

from memvir.errors import UserError
from memvir.images.pixels import Images, PixelStore

if TYPE_CHECKING:
    from memvir.images.settings import Affine, RandomResizedCrop
    from memvir.images.settings import Images as ImageSettings

ORDER, AUGMENTATION = 0, 1  # what a random stream is for
GRACE = 10  # seconds that a loader process lives on after SIGTERM
LOADER_FAILURE = re.compile(r"^DataLoader worker|^Pin memory thread|shared memory|ancdata|^Too many open files")


def random_stream(*key: int) -> np.random.Generator:
    """An independent random generator for each key, the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def epoch_batches(
    labels: np.ndarray, batch_size: int, images_per_class: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The image indices of each batch of an epoch.

    images_per_class 1: a shuffle of all images; the last batch is smaller and nothing is dropped.
    More: each batch holds batch_size / images_per_class classes with so many images each (fewer classes in the last
    ones); every image appears at least once an epoch, and a class that does not divide evenly repeats some of its own.
    """
    stream = random_stream(seed, epoch, ORDER)
    if images_per_class == 1:
        order = stream.permutation(len(labels))
        return np.split(order, range(batch_size, len(order), batch_size))
    groups: list[list[np.ndarray]] = []  # per class, its images in groups of images_per_class
    for label in np.unique(labels):
        images = stream.permutation(np.flatnonzero(labels == label))
        images = np.resize(images, math.ceil(len(images) / images_per_class) * images_per_class)  # wraps around
        groups.append(np.split(images, len(images) // images_per_class))
    batches = []
    while any(groups):
        # the classes with most groups left go first, so that classes of unequal size end together
        left = np.array([len(group) for group in groups])
        first = np.lexsort((stream.random(len(left)), -left))[: batch_size // images_per_class]
        batches.append(np.concatenate([groups[c].pop() for c in first if groups[c]]))
    return [batches[i] for i in stream.permutation(len(batches))]


class PixelRange(Protocol):
    """What a network wants pixel values to be: a recipe's `images`, or the preprocessing of a trained model."""

    @property
    def value_range(self) -> int: ...
    @property
    def mean(self) -> Sequence[float]: ...
    @property
    def std(self) -> Sequence[float]: ...


class Normalise:
    """uint8 (B, H, W[, 3]) or (B, C, H, W) pixels on the device -> float (B, C, H, W) network input."""

    def __init__(self, images: PixelRange, device: torch.device) -> None:
        self.scale = images.value_range / 255
        self.mean = torch.tensor(images.mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(images.std, dtype=torch.float32, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.float() * self.scale - self.mean) / self.std


class TrainImages(Protocol):
    """Yields (images (B, C, S, S) float, labels (B,) int64), both on the device."""

    def batches(self, batches: Sequence[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor]]: ...


class ResidentImages:
    """Small images of one size, all on the device; random affine maps are applied to whole batches."""

    def __init__(
        self, images: Images, labels: np.ndarray, settings: "ImageSettings", seed: int, device: torch.device
    ) -> None:
        pixels = torch.from_numpy(_stack(images))  # (images, S, S[, 3])
        pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        self.pixels = pixels.to(device)  # (images, C, S, S) uint8
        self.labels = torch.from_numpy(labels).to(device)
        self.normalise = Normalise(settings, device)
        assert settings.train.kind == "affine"
        self.augmentation = settings.train
        self.seed = seed
        self.device = device

    def batches(self, batches: Sequence[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        maps = affine_maps(self.augmentation, random_stream(self.seed, epoch, AUGMENTATION), len(self.labels))
        maps = maps.to(self.device, non_blocking=True)
        for batch in batches:
            chosen = torch.from_numpy(batch).to(self.device, non_blocking=True)
            images = self.normalise(self.pixels[chosen])
            grid = affine_grid(maps[chosen], *images.shape[2:])
            yield functional.grid_sample(images, grid, padding_mode="border", align_corners=False), self.labels[chosen]


def affine_maps(settings: "Affine", stream: np.random.Generator, count: int) -> Tensor:
    """`count` random maps (count, 2, 3) from output to input coordinates, as torch's affine_grid takes them.

    The input is sheared and rotated, zoomed, shifted and perhaps mirrored about the centre; row i is image i's.
    """
    u = stream.random((count, 6))
    angle, shear = np.deg2rad((u[:, :2] * 2 - 1) * [settings.rotate, settings.shear]).T
    zoom = settings.scale[0] + u[:, 2] * (settings.scale[1] - settings.scale[0])
    shift = (u[:, 3:5] * 2 - 1) * 2 * settings.shift  # coordinates run from -1 to 1
    mirror = np.where(u[:, 5] < settings.flip, -1.0, 1.0)
    cos, sin, tan = np.cos(angle), np.sin(angle), np.tan(shear)
    maps = np.stack(
        [
            np.stack([mirror * cos, mirror * (cos * tan - sin), shift[:, 0]], axis=1),
            np.stack([sin, sin * tan + cos, shift[:, 1]], axis=1),
        ],
        axis=1,
    )
    maps[:, :, :2] /= zoom[:, None, None]
    return torch.from_numpy(maps.astype(np.float32))


def affine_grid(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (B, 2, 3) -> input coordinates of every output pixel (B, H, W, 2): torch's affine_grid, align_corners False.

    Torch takes a batched matrix product, whose sums differ from processor to processor.
    """
    x = (torch.arange(width, device=maps.device) * 2 + 1) / width - 1  # (W,) centres of pixels, from -1 to 1
    y = ((torch.arange(height, device=maps.device) * 2 + 1) / height - 1)[:, None]  # (H, 1)
    by_x, by_y, shift = maps[:, :, None, None].unbind(-1)  # (B, 2, 1, 1) each
    return (by_x * x + by_y * y + shift).permute(0, 2, 3, 1)


class CroppedImages(Dataset):
    """Random resized crops; an item is addressed by (epoch, image), so that workers hold no state."""

    def __init__(self, images: Images, labels: np.ndarray, settings: "ImageSettings", seed: int) -> None:
        assert settings.train.kind == "random_resized_crop"
        self.images, self.labels, self.seed = images, labels, seed
        self.size, self.crop = settings.size, settings.train

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = item
        stream = random_stream(self.seed, epoch, AUGMENTATION, index)
        pixels = self.images[index]  # (H, W[, 3]) uint8
        top, left, height, width = random_box(self.crop, stream, *pixels.shape[:2])
        box = torch.from_numpy(pixels[top : top + height, left : left + width])
        box = box.reshape(1, height, width, -1).permute(0, 3, 1, 2)
        # on uint8 straight from the stored pixels: a third of the time of torchvision's transforms, the same pixels
        image = functional.interpolate(box, (self.size, self.size), mode="bilinear", antialias=True)[0]
        return (image.flip(-1) if stream.random() < self.crop.flip else image), int(self.labels[index])

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]] | UserError:
        """A batch, as torch's loader asks for it, or why it cannot be had: an error that is raised in a loader process
        arrives as the text of its traceback."""
        try:
            return [self[item] for item in items]
        except UserError as error:
            return error


def random_box(crop: "RandomResizedCrop", stream: np.random.Generator, height: int, width: int) -> tuple[int, ...]:
    """Top, left, height and width of a random crop of the given ranges of area and aspect ratio.

    The distribution is that of torchvision's RandomResizedCrop: ten tries, then the largest central crop of an
    allowed aspect ratio.
    """
    for _ in range(10):
        area = stream.uniform(*crop.scale) * height * width
        ratio = math.exp(stream.uniform(math.log(crop.ratio[0]), math.log(crop.ratio[1])))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return int(stream.integers(height - h + 1)), int(stream.integers(width - w + 1)), h, w
    ratio = min(max(width / height, crop.ratio[0]), crop.ratio[1])
    h, w = min(height, round(width / ratio)), min(width, round(height * ratio))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


class LoadedImages:
    """Images of any size, cropped in worker processes and normalised on the device."""

    def __init__(
        self,
        images: Images,
        labels: np.ndarray,
        settings: "ImageSettings",
        seed: int,
        device: torch.device,
        workers: int,
        channels_last: bool,
    ) -> None:
        self.dataset = CroppedImages(images, labels, settings, seed)
        self.normalise = Normalise(settings, device)
        self.device = device
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.sampler = _Batches()
        self.loader: DataLoader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_outlive_signals,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            prefetch_factor=4 if workers else None,
            generator=torch.Generator(),  # else every epoch would draw from the global one
        )

    def batches(self, batches: Sequence[np.ndarray], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.batches = [[(epoch, int(i)) for i in batch] for batch in batches]
        for batch in self._loaded():
            if isinstance(batch, UserError):
                raise UserError(str(batch))  # one that no frame holds: a cycle would keep the loader processes waiting
            pixels, labels = batch
            pixels = pixels.to(self.device, non_blocking=True, memory_format=self.memory_format)
            yield self.normalise(pixels), labels.to(self.device, non_blocking=True)

    def _loaded(self) -> Iterator[Any]:
        """What the loader yields. Raises UserError if its processes fail, rather than an image."""
        if not self.loader.num_workers:
            yield from self.loader
            return
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            multiprocessing.Lock()  # needs what the loader needs, which would print a traceback of its own besides
            loaded = iter(self.loader)
            # torch's own handler raises a process's death in the middle of a step; without, it shows in a missing batch
            signal.signal(signal.SIGCHLD, handler)
            yield from loaded
        except (OSError, EOFError, RuntimeError) as error:
            *_, reason = str(error).strip().splitlines() or ["one ended"]  # of a traceback, what it ends with
            if isinstance(error, RuntimeError) and not LOADER_FAILURE.search(reason):
                raise
            raise UserError(
                f"runtime.workers: loader processes failed ({reason.removeprefix('RuntimeError: ')}), likely for want "
                "of memory or of shared memory (/dev/shm); set `workers: 0` or fewer, or give a container more (docker "
                "run --shm-size)"
            ) from error


def _collate(items: list[Any] | UserError) -> Any:
    return items if isinstance(items, UserError) else default_collate(items)


def _outlive_signals(_: int) -> None:
    """Leave the signals to a whole job (Ctrl-C, Slurm, a closed terminal) to the run, which saves and ends its loaders.

    SIGTERM may also be that end, so it takes effect after a while.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))


class _Batches:
    """A batch sampler whose content the next epoch replaces while the workers live on."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class TestImages:
    """Test images after their deterministic crop, in the order of the index."""

    __test__ = False  # not a test case, whatever pytest thinks of its name

    def __init__(self, images: Images, settings: PixelRange, device: torch.device) -> None:
        self.images, self.device = images, device
        self.normalise = Normalise(settings, device)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int = 256) -> Iterator[Tensor]:
        """Float images (b, C, S, S) on the device."""
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            pixels = torch.from_numpy(np.stack([self.images[i] for i in range(start, stop)])).to(self.device)
            yield self.normalise(pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2))


def _stack(images: Images) -> np.ndarray:
    if isinstance(images, PixelStore):
        return np.array(images.stacked())
    return np.stack([images[i] for i in range(len(images))])
