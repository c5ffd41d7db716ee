"""Golden bits: hashes of what the project computes, the same on every x86-64 processor with AVX2.

`python -m tests.golden` prints those of this machine and compares them with golden.json; `--write` replaces it, which a
change that is meant to change numbers does, and says so in its commit.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from memvir import libraries

libraries.prepare()

import numpy as np  # noqa: E402  the libraries read their settings when they are imported
import torch  # noqa: E402

from memvir import retrieval  # noqa: E402
from memvir.experiment.optimizer import build_optimizer  # noqa: E402
from memvir.images import batches, pixels  # noqa: E402
from memvir.losses import LOSSES, build_loss  # noqa: E402
from memvir.memory import MemVir  # noqa: E402
from memvir.models import build_embedder  # noqa: E402
from memvir.params import Params, load_params  # noqa: E402
from memvir.reporting import tsne  # noqa: E402

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("golden.json")
CPU = torch.device("cpu")
C, B, D, STEPS = 12, 32, 16, 9


def compute() -> dict[str, str]:
    """What is computed -> the start of the sha256 of its bits."""
    torch.set_num_threads(1)
    return {name: _hash(case()) for name, case in cases()}


def cases() -> Iterator[tuple[str, Callable[[], list]]]:
    for name in LOSSES:
        yield f"{name}: losses, gradients and embeddings of {STEPS} steps", lambda name=name: loss_steps(name, None)
        yield f"{name} with MemVir: the same", lambda name=name: loss_steps(name, (2, 1))
        yield f"{name} with MemVir, of 300 classes", lambda name=name: loss_steps(name, (2, 1), 300)
    for optimizer in ("adam", "adamw", "sgd"):
        yield f"glyphs' network under {optimizer}", lambda optimizer=optimizer: network_steps(optimizer)
    yield "affine augmentation", affine
    yield "random resized crops", crops
    yield "test crops", cropped
    yield "glyphs, rendered", rendered
    yield "Recall@k, RP, MAP and NMI", evaluation
    yield "nearest neighbours", lambda: list(retrieval.nearest_neighbours(embeddings(300, 24), 7))
    yield "t-SNE coordinates", lambda: [tsne.embed_in_two_dimensions(embeddings(90, 16), 10.0, 0, (50, 100))]


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers as float32; NumPy's generator is the same everywhere."""
    return torch.from_numpy(np.random.Generator(np.random.PCG64(len(shape))).standard_normal(shape).astype(np.float32))


def embeddings(count: int, dim: int) -> np.ndarray:
    return numbers(count, dim).numpy()


def loss_steps(name: str, memory: tuple[int, int] | None, num_classes: int = C) -> list:
    """A linear embedder and the proxies, trained by Adam; everything that a step computes."""
    loss = build_loss(name, num_classes, D, generator=torch.Generator().manual_seed(0))
    loss = MemVir(loss, *memory) if memory else loss
    inputs, weights = numbers(STEPS, B, D), torch.nn.Parameter(numbers(D, D) / D**0.5)
    labels = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).integers(0, num_classes, (STEPS, B)))
    optimizer = torch.optim.Adam([weights, *loss.parameters()], lr=0.01, fused=True)
    kept: list = [loss.proxies.detach().clone()]
    for step in range(STEPS):
        rows = inputs[step] @ weights
        value = loss(rows, labels[step])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        kept += [value, rows, weights.grad.clone(), loss.proxies.grad.clone()]
    return kept


def network_steps(optimizer: str) -> list:
    params = glyphs_params()
    run = params.run("glyphs", "norm_softmax", 1)
    torch.manual_seed(1)
    embedder = build_embedder(run.model, 1, None)
    loss = build_loss("norm_softmax", C, run.model.embedding_dim)
    settings = run.training.optimizer.model_copy(update={"name": optimizer, "weight_decay": 1e-4})
    stepper = build_optimizer(settings, embedder, loss)
    images, labels = numbers(B, 1, 24, 24), torch.arange(B) % C
    for _ in range(3):
        value = loss(embedder(images), labels)
        stepper.zero_grad()
        value.backward()
        stepper.step()
    embedder.eval()
    return [value, embedder(images), *embedder.state_dict().values(), loss.proxies]


def affine() -> list:
    run = glyphs_params().run("glyphs", "norm_softmax", 1)
    images = [picture(24, 24) for _ in range(B)]
    source = batches.ResidentImages(images, np.arange(B), run.images, 1, CPU)
    return [batch for batch, _ in source.batches([np.arange(B)], epoch=3)]


def crops() -> list:
    run = glyphs_params().run("cars196", "norm_softmax", 1)
    images = [picture(90 + number, 120, 3) for number in range(4)]
    source = batches.LoadedImages(images, np.arange(4), run.images, 1, CPU, workers=0, channels_last=False)
    return [batch for batch, _ in source.batches([np.arange(4)], epoch=3)]


def cropped() -> list:
    return [pixels.resize_and_crop(picture(300, 400, 3), pixels.Crop(256, 224))]


def rendered() -> list:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        two = {"images_per_class": 2, "test_images_per_class": 2}
        data = glyphs_params().recipe("glyphs").data.model_copy(update=two)
        data.download(ROOT / "dataset" / "glyphs" / "source", place)
        return [file.read_bytes() for file in sorted(place.iterdir()) if file.name != "source.json"]


def evaluation() -> list:
    metrics = retrieval.evaluate(embeddings(400, 24), np.arange(400) % 37, nmi=True)
    return [json.dumps(metrics).encode()]


def picture(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(shape[0])).integers(0, 256, shape, dtype=np.uint8)


def glyphs_params() -> Params:
    return load_params(ROOT / "params.yaml")


def _hash(values: list) -> str:
    digest = hashlib.sha256()
    for value in values:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else value
        digest.update(array if isinstance(array, bytes) else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    bits = compute()
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(bits, indent=1) + "\n")
    expected = json.loads(FILE.read_text())
    for name, value in bits.items():
        print(f"{value} {name}{'' if expected.get(name) == value else '   differs from ' + str(expected.get(name))}")
    sys.exit(bits != expected)


if __name__ == "__main__":
    main()
