"""A trained model in use: pictures in, embeddings out, the same as those of its evaluation."""

import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from memvir import retrieval
from memvir.errors import UserError
from memvir.files import file_hash
from memvir.images import decode
from memvir.images.batches import TestImages
from memvir.images.pixels import resize_and_crop
from memvir.libraries import available_cores
from memvir.models.embedder import PRECISIONS, embed_batch
from memvir.progress import Counter
from memvir.retrieval.arguments import whole_number
from memvir.trained.file import ModelFile, find, read

Picture: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A file; a PIL image; uint8 pixels, an array (H, W) or (H, W, 3) in RGB, or a tensor (3, H, W) or (1, H, W); or a
float tensor (C, S, S), which is taken as `TrainedModel.transform` made it."""

LOADING = [threading.Lock() for _ in range(64)]
"""A PIL image takes one by its place in memory, since it cannot be loaded by two threads when it is given twice."""

BATCH_SIZE = 256  # as the evaluation's: other batches may differ in the last bit


def load_model(source: str | os.PathLike[str], sha256: str | None = None) -> "TrainedModel":
    """The model of a file, of a run's folder (its last epoch), or of an http or https address.

    Args:
        source: such as "runs/glyphs/norm_softmax/1", "model.safetensors" or "https://example.org/model.safetensors".
        sha256: of the file, or at least its first 8 digits; an address needs it. A downloaded file is kept below
            torch's cache folder (TORCH_HOME) and not fetched again.

    Raises:
        UserError: there is no such model, it is damaged or of a newer format, or another file than `sha256` says.
    """
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"source: {source!r} is no path; give a model file, the folder of a finished run or an address")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{8,64}", sha256 := str(sha256).lower()):
        raise UserError(f"sha256: {sha256!r} is none; give 8 to 64 hexadecimal digits, as sha256sum prints them")
    if re.match(r"https?://", str(source)):
        return TrainedModel(read(_download(str(source), sha256)))
    path = find(Path(source).expanduser())
    if sha256 is not None and not (found := file_hash(path, "sha256")).startswith(sha256):
        raise UserError(f"{path}: its sha256 is {found[:16]}..., expected {sha256[:16]}...; get the right file")
    return TrainedModel(read(path))


class TrainedModel:
    """A model that embeds pictures; `load_model` makes one.

    `metadata` is what its file holds beside the weights (`memvir.trained.file`), `embedder` the network, in eval mode,
    and `dim` the length of an embedding.
    """

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.metadata = file.metadata
        self.preprocessing = file.preprocessing
        self.embedder = file.build()
        self.dim: int = self.metadata["architecture"]["embedding_dim"]
        self.precision = PRECISIONS[self.metadata["architecture"]["precision"]]

    @property
    def name(self) -> str:
        """DATASET/VARIANT/SEED"""
        run = self.metadata["run"]
        return f"{run['dataset']}/{run['variant']}/{run['seed']}"

    def embed(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        batch_size: int = BATCH_SIZE,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """(n, D) float32 embeddings of length 1, in the order of the pictures.

        With the default `batch_size`, those of the run's test images are the evaluation's to the bit, in a process that
        `memvir.libraries.prepare` set up for as many threads (other kernels round otherwise).

        Args:
            pictures: one or many; an array (n, H, W), n not 3, or (n, H, W, 3), or a tensor (n, C, H, W), is many.
            device: where the network runs, and stays, in eval mode; default: the first GPU if there is one, or the CPU.
            progress: show how far it is.

        Raises:
            UserError: a picture cannot be read, which it names; or is none.
        """
        items = _as_list(pictures)
        parts = []
        with Counter("embedding", len(items), "images", style="auto" if progress else "none") as counter:
            for rows, unreadable in self.embed_batches(items, batch_size, device):
                for error in unreadable.values():
                    raise error
                parts.append(rows)
                counter.add(len(rows))
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def embed_batches(
        self, pictures: Sequence[Picture], batch_size: int = BATCH_SIZE, device: str | torch.device | None = None
    ) -> Iterator[tuple[np.ndarray, dict[int, UserError]]]:
        """For each batch its embeddings (b, D) as `embed` gives them, NaN for what cannot be read, and why it cannot.

        The next batch is decoded while the network is at work.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise UserError(f"batch_size: {batch_size!r} is none; give a whole number from 1")
        self.embedder.to(target := usable_device(device)).eval()
        with ThreadPoolExecutor(available_cores()) as pool:

            def decoding(start: int) -> list[Future[np.ndarray | Tensor]]:
                numbers = range(start, min(start + batch_size, len(pictures)))
                return [pool.submit(self._input, pictures[n], f"pictures[{n}]") for n in numbers]

            waiting = decoding(0)
            try:
                for start in range(0, len(pictures), batch_size):
                    current, waiting = waiting, decoding(start + batch_size)
                    inputs, unreadable = [], {}
                    for number, future in enumerate(current):
                        try:
                            inputs.append(future.result())
                        except UserError as error:
                            unreadable[number] = error
                    rows = np.full((len(current), self.dim), np.nan, np.float32)
                    if inputs:
                        read = [number for number in range(len(current)) if number not in unreadable]
                        embeddings = embed_batch(self.embedder, self._stack(inputs, target), self.precision)
                        rows[read] = retrieval.unit_length(embeddings.cpu().numpy(), "embeddings")
                    yield rows, unreadable
            finally:
                for future in waiting:
                    future.cancel()

    def transform(self, picture: Picture) -> Tensor:
        """A picture as the network takes it: the evaluation's crop, (C, S, S) float32 on the CPU."""
        return self._stack([self._input(picture, "the picture")], torch.device("cpu"))[0]

    def search(
        self,
        queries: Picture | Iterable[Picture],
        gallery: Picture | Iterable[Picture],
        k: int = 10,
        *,
        batch_size: int = BATCH_SIZE,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of a gallery, nearest first: similarities (Q, k), and places (Q, k) in the gallery.

        Args:
            queries, gallery: pictures, as `embed` takes them, or embeddings (n, D) as it gives them.

        Raises:
            UserError: k is none or beyond the gallery, embeddings have another dimension, or what `embed` raises.
        """
        options: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
        k = whole_number(k, "k")
        found = self._embeddings(gallery, "gallery", options)
        if k > len(found):
            raise UserError(f"k: {k} pictures asked for, and the gallery holds {len(found)}; use a k within that")
        return retrieval.nearest_neighbours(found, k, query=self._embeddings(queries, "queries", options))

    def _embeddings(self, values: Any, what: str, options: dict[str, Any]) -> np.ndarray:
        is_float = (isinstance(values, Tensor) and values.is_floating_point()) or (
            isinstance(values, np.ndarray) and values.dtype.kind == "f"
        )
        if is_float and values.ndim == 2:
            self.check_dimension(values.shape[1], what)
            return values
        if isinstance(values, np.ndarray | Tensor) and values.shape[1:] == (self.dim,):
            raise UserError(
                f"{what}: {values.dtype} of shape {tuple(values.shape)} may be embeddings or a picture; give "
                "embeddings as floats, a picture in a list"
            )
        return self.embed(values, **options)

    def check_dimension(self, dim: int, what: str) -> None:
        """UserError unless embeddings of that many numbers can be this model's."""
        if dim != self.dim:
            raise UserError(
                f"{what}: embeddings of {dim} dimensions, but those of {self.name} have {self.dim}; embed the pictures "
                "with this model"
            )

    def _input(self, picture: Picture, name: str) -> np.ndarray | Tensor:
        """uint8 pixels (S, S) or (S, S, 3) after the crop, or a float tensor as it is."""
        settings = self.preprocessing
        if isinstance(picture, Tensor):
            if picture.is_floating_point():
                return self._checked(picture, name)
            picture = picture.detach().cpu().numpy()
            picture = np.moveaxis(picture, 0, -1) if picture.ndim == 3 else picture
            picture = picture[..., 0] if picture.shape[-1] == 1 else picture
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
                raise UserError(
                    f"{name}: an array of {picture.dtype} and shape {picture.shape} is no picture; give uint8 (H, W) "
                    "or (H, W, 3) in RGB"
                )
            picture = Image.fromarray(np.ascontiguousarray(picture)) if picture.size else Image.new("L", (0, 0))
        if isinstance(picture, Image.Image):
            with LOADING[id(picture) // 64 % len(LOADING)]:
                upright = decode.standard(picture, name)
            whole = decode.pixels(upright, settings.channels)
        elif isinstance(picture, str | os.PathLike):
            whole = decode.decode(Path(picture), settings.channels)
        else:
            raise UserError(
                f"{name}: {type(picture).__name__} is no picture; give a path, a PIL image, an array, a tensor"
            )
        return resize_and_crop(whole, settings.crop)

    def _checked(self, tensor: Tensor, name: str) -> Tensor:
        side, channels = self.preprocessing.size, self.metadata["architecture"]["in_channels"]
        if tensor.shape != (channels, side, side):
            raise UserError(
                f"{name}: a float tensor of shape {tuple(tensor.shape)} is no input of this model; give "
                f"({channels}, {side}, {side}), as `transform` makes it"
            )
        return tensor.detach().float()

    def _stack(self, inputs: list[np.ndarray | Tensor], device: torch.device) -> Tensor:
        """(b, C, S, S) on the device, laid out in memory as the evaluation's, whose last bits follow from that."""
        pixels = [item for item in inputs if isinstance(item, np.ndarray)]
        if len(pixels) == len(inputs):
            return next(TestImages(pixels, self.preprocessing, device).batches(len(pixels)))
        tensors = [item if isinstance(item, Tensor) else self._stack([item], device)[0] for item in inputs]
        batch = torch.stack([tensor.to(device) for tensor in tensors])
        return batch if batch.shape[1] == 1 else batch.contiguous(memory_format=torch.channels_last)


def _as_list(pictures: Picture | Iterable[Picture]) -> Sequence[Picture]:
    if isinstance(pictures, str | os.PathLike | Image.Image):
        return [pictures]
    if isinstance(pictures, np.ndarray | Tensor):
        if pictures.ndim != 3 or isinstance(pictures, Tensor) or pictures.shape[2] == 3:
            return [pictures] if pictures.ndim < 4 else list(pictures)
        if pictures.shape[2] in (1, 2, 4) or pictures.shape[0] == 3:
            raise UserError(
                f"an array of shape {pictures.shape} may be one picture or many; give one as (H, W) or (H, W, 3), many "
                "as a list or (n, H, W, 3)"
            )
        return list(pictures)
    if isinstance(pictures, Iterator):
        return [_drawn(picture, f"pictures[{number}]") for number, picture in enumerate(pictures)]
    if isinstance(pictures, Iterable):
        return list(pictures)
    raise UserError(f"{type(pictures).__name__} is no picture; give a path, a PIL image, an array, a tensor, or many")


def _drawn(picture: Picture, name: str) -> Picture:
    """What an iterator gives, as it is now: it may hand out one object again and again, with other pixels."""
    if isinstance(picture, np.ndarray | Tensor):
        return picture.copy() if isinstance(picture, np.ndarray) else picture.clone()
    if isinstance(picture, Image.Image) and (
        getattr(picture, "is_animated", False) or not getattr(picture, "tile", None)
    ):
        return np.asarray(decode.standard(picture, name))
    return picture


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; without one, the first GPU, or the CPU. Raises UserError if nothing can run on it."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else name)
    except (RuntimeError, TypeError):
        raise UserError(f"device: {name!r} is none that torch knows; use cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {device} asked for, but torch sees {torch.cuda.device_count()} GPUs; use cpu")
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # each kind of device has its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise UserError(f"device: nothing can run on {device} ({reason}); use cpu, cuda or cuda:1") from None
    return device


def _download(address: str, sha256: str | None) -> Path:
    from memvir.download import fetch  # late: a model on disk needs no network

    if sha256 is None:
        raise UserError(f"{address}: give its sha256 too, so that no other file is taken for it")
    target = Path(torch.hub.get_dir()) / "memvir" / f"{sha256}.safetensors"
    fetch([address], target, algorithm="sha256", digest=sha256, what=address.rpartition("/")[2] or address)
    return target
