"""What this machine is, and how much of the work it is given."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.parts import Skipped

DRIVER = Path("/proc/driver/nvidia/version")
"""There where NVIDIA's driver is loaded."""


def describe(device: str) -> Iterator[dict[str, Any]]:
    chosen = choose(device)
    versions = {}
    for package in ("torchvision", "numpy", "faiss-gpu", "faiss-cpu", "pandas", "pydantic"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    content: dict[str, Any] = {"device": chosen.type, "name": platform.processor() or platform.machine()}
    if device == "auto" and chosen.type == "cpu":
        content["why not a GPU"] = why_not()
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        content |= {"name": properties.name, "memory, GiB": round(properties.total_memory / 2**30, 1)}
        content |= {"cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
    yield {**content, "python": platform.python_version(), "torch": torch.__version__, **versions}


def why_not() -> str:
    """Why torch sees no GPU; an error where the machine has one all the same."""
    try:
        from memvir.experiment.gpu_errors import no_gpu

        reason = no_gpu()
    except ImportError:
        reason = "torch sees none" if torch.version.cuda else "this torch is built without CUDA"
    if DRIVER.exists() and "CUDA_VISIBLE_DEVICES" not in os.environ:
        raise Skipped(
            f"this machine has a GPU that torch cannot use: {reason}; --device cpu tries the parts all the same"
        )
    return reason


def choose(device: str) -> torch.device:
    """The device asked for; `auto` is a GPU that really computes, else the CPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        torch.set_num_threads(1)  # small work, and others may share the cores
        return torch.device("cpu")
    torch.zeros(1, device="cuda").add_(1).item()
    return torch.device("cuda", torch.cuda.current_device())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
