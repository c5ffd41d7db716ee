"""The machine a run happens on: threads, device, determinism, and the record of what shaped its result."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memvir.config import Run, Runtime
from memvir.errors import UserError
from memvir.files import file_hash

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def limit_threads(threads: int) -> None:
    """Let numerical libraries use so many threads; call it before they are imported."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    import torch

    torch.set_num_threads(threads)


def set_up_device(runtime: Runtime) -> "torch.device":
    """The device of `runtime.device`, with the number formats and kernels that `runtime` allows.

    Raises UserError if a GPU is asked for and there is none.
    """
    import torch

    name = runtime.device
    if name == "auto":
        name = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(
                f"runtime.device: {name} asked for, but torch sees {torch.cuda.device_count()} GPUs; use auto or cpu"
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this alone
        torch.use_deterministic_algorithms(runtime.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime.tf32
    return device


def loader_workers(runtime: Runtime) -> int:
    return min(8, os.cpu_count() or 1) if runtime.workers == "auto" else runtime.workers


def describe_environment(run: Run, device: "torch.device", runtime: Runtime, index: Path) -> dict[str, Any]:
    """What besides the settings shapes a result: recorded beside it, and part of a checkpoint's fingerprint."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "faiss": _faiss_version(),
        "threads": run.training.threads,
        "device": gpu or device.type,
        "machine": platform.machine(),
        "deterministic": runtime.deterministic,
        "processes": runtime.processes,
        "tf32": runtime.tf32,
        "compile": runtime.compile,
        "data": file_hash(index),
    }


def fingerprint(run: Run, environment: dict[str, Any], weights: Path | None) -> dict[str, str]:
    """Everything that shapes the result of a run, flat: `training.epochs` -> "60", ..., "code" -> a hash."""
    content = {"settings": run.model_dump(mode="json"), "environment": environment, "code": code_hash()}
    content["weights"] = file_hash(weights, "sha256") if weights else "none"
    return dict(_flatten(content))


def code_hash() -> str:
    """sha256 of memvir's source files, reporting apart: a checkpoint is not continued by other code."""
    package = Path(__file__).parent
    files = [
        file for kind in ("*.py", "*.csv") for file in sorted(package.rglob(kind)) if "reporting" not in file.parts
    ]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package)}\0{file_hash(file)}\0".encode())
    return digest.hexdigest()[:16]


def _faiss_version() -> str:
    for package in ("faiss-gpu", "faiss-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(value, dict):
        return [(prefix, str(value))]
    return [pair for key, item in value.items() for pair in _flatten(item, f"{prefix}.{key}" if prefix else key)]
