"""What this machine is, and how much of the work it is given."""

import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

import torch


def describe(device: str) -> Iterator[dict[str, Any]]:
    chosen = choose(device)
    versions = {}
    for package in ("torchvision", "numpy", "faiss-gpu", "faiss-cpu", "pandas", "pydantic"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    content: dict[str, Any] = {"device": chosen.type, "name": platform.processor() or platform.machine()}
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        content |= {"name": properties.name, "memory, GiB": round(properties.total_memory / 2**30, 1)}
        content |= {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    yield {**content, "python": platform.python_version(), "torch": torch.__version__, **versions}


def choose(device: str) -> torch.device:
    """The device asked for; `auto` is a GPU that really computes, else the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)  # small work, and others may share the cores
        return torch.device("cpu")
    torch.zeros(1, device="cuda").add_(1).item()  # a driver that is too old shows itself here
    return torch.device("cuda", torch.cuda.current_device())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
