"""Golden bits: hashes of what the project computes, the same on every x86-64 processor with AVX2.

`python -m tests.golden` prints those of this machine and compares them with golden.json; `--write` replaces it, which a
change that is meant to change numbers does, and says so in its commit. `--mkl intel` or `--mkl amd` has MKL choose its
kernels as it does on a processor of that maker.
"""

import argparse
import ctypes
import hashlib
import itertools
import json
import mmap
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
from memvir.losses.products import product  # noqa: E402
from memvir.losses.proxy_loss import ProxyLoss  # noqa: E402
from memvir.memory import MemVir  # noqa: E402
from memvir.models import build_embedder  # noqa: E402
from memvir.models.embedder import embed_batch  # noqa: E402
from memvir.params import Params, load_params  # noqa: E402
from memvir.reporting import tsne  # noqa: E402
from memvir.wrappers import BroadFace, LossWrapper, ProxySynthesis, VirtualSoftmax  # noqa: E402

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("golden.json")
CPU = torch.device("cpu")
C, B, D, STEPS = 12, 32, 16, 9
Wrapping = Callable[[ProxyLoss], LossWrapper]


def choose_kernels(maker: str) -> None:
    """Have MKL choose its kernels as on a processor of "intel" or of "amd": it asks a function of its own, which is
    replaced here by one that returns 1 or 0. Linux on x86-64; before the first product.
    """
    libtorch = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    is_intel = libtorch.mkl_serv_intel_cpu_true
    address = ctypes.cast(is_intel, ctypes.c_void_p).value
    assert address is not None
    page = address - address % mmap.PAGESIZE
    everything = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(page), ctypes.c_size_t(2 * mmap.PAGESIZE), everything):
        sys.exit("--mkl: this system does not let a process change its code")
    ctypes.memmove(address, b"\xb8" + (maker == "intel").to_bytes(4, "little") + b"\xc3", 6)  # mov eax, 0 or 1; ret
    assert is_intel() == (maker == "intel")


def compute() -> dict[str, str]:
    """What is computed -> the start of the sha256 of its bits."""
    torch.set_num_threads(1)
    return {name: _hash(case()) for name, case in cases()}


def cases() -> Iterator[tuple[str, Callable[[], list]]]:
    for name in LOSSES:
        yield f"{name}: losses, gradients and embeddings of {STEPS} steps", lambda name=name: loss_steps(name, None)
        yield f"{name} with MemVir: the same", lambda name=name: loss_steps(name, with_memvir)
        yield f"{name} with MemVir, of 300 classes", lambda name=name: loss_steps(name, with_memvir, 300)
    others: list[Wrapping] = [lambda loss: BroadFace(loss, 100), ProxySynthesis, VirtualSoftmax]
    for title, wrapping in zip(("BroadFace", "Proxy Synthesis", "Virtual Softmax"), others, strict=True):
        yield f"norm_softmax with {title}, of 300 classes", lambda w=wrapping: loss_steps("norm_softmax", w, 300)
    yield "matrix products, small and large", products
    yield "glyphs' network on one to five images", few_images
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


def loss_steps(name: str, wrapping: Wrapping | None, num_classes: int = C) -> list:
    """A linear embedder and the proxies, trained by Adam; everything that a step computes."""
    torch.manual_seed(0)
    loss = build_loss(name, num_classes, D)
    loss = wrapping(loss) if wrapping else loss
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


def with_memvir(loss: ProxyLoss) -> LossWrapper:
    return MemVir(loss, num_steps=2, step_gap=1)


def products() -> list:
    """Of factors laid out by rows and by columns."""
    sizes = (1, 3, 4, 11, 12, 31, 64, 130)
    found = []
    for m, k, n in itertools.product(sizes, (1, 2, 31, 128, 129, 300, 700), sizes):
        a, b = numbers(m, k), numbers(k, n)
        found += [product(a, b), product(a.T.contiguous().T, b.T.contiguous().T)]
    return found


def few_images() -> list:
    """Of which an evaluation's last batch may consist."""
    torch.manual_seed(1)
    embedder = build_embedder(glyphs_params().run("glyphs", "norm_softmax", 1).model, 1, None).eval()
    return [embed_batch(embedder, numbers(count, 1, 24, 24), torch.float32) for count in (1, 2, 3, 4, 5)]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mkl", choices=["amd", "intel"])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.mkl:
        choose_kernels(options.mkl)
    bits = compute()
    if options.write:
        FILE.write_text(json.dumps(bits, indent=1) + "\n")
    expected = json.loads(FILE.read_text())
    for name, value in bits.items():
        print(f"{value} {name}{'' if expected.get(name) == value else '   differs from ' + str(expected.get(name))}")
    sys.exit(bits != expected)


if __name__ == "__main__":
    main()
