"""The machine a run happens on: threads, device, determinism, and the record of what shaped its result."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from memvir.errors import UserError
from memvir.experiment.settings import Runtime
from memvir.libraries import available_cores, processor

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "torchvision", "numpy", "pillow")


def set_up_device(runtime: Runtime) -> "torch.device":
    """The device of `runtime.device`, with the number formats and kernels that `runtime` allows.

    Raises UserError if a GPU is asked for and there is none.
    """
    import torch

    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            from memvir.experiment.gpu_errors import no_gpu

            count = torch.cuda.device_count()
            why = f"{count} GPUs" if count else f"none ({no_gpu()})"
            raise UserError(f"runtime.device: {name} asked for, but torch sees {why}; use auto or cpu")
        if device.index is None or "WORLD_SIZE" in os.environ:  # of several processes each has a GPU of its own
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with this alone
        torch.use_deterministic_algorithms(runtime.deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        # a kernel for each new tensor, of which none is read before it is written
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = runtime.tf32
    return device


def loader_workers(runtime: Runtime) -> int:
    """Loader processes of each of the run's processes."""
    if runtime.workers != "auto":
        return runtime.workers
    return min(8, max(1, available_cores() // runtime.processes))


@contextlib.contextmanager
def compile_errors() -> Iterator[None]:
    """Raise UserError where torch.compile fails, which it does at the first step."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"runtime.compile: torch cannot compile here ({reason}); install a C++ compiler, or set `compile: false`"
        ) from error


def describe_environment(device: "torch.device", runtime: Runtime) -> dict[str, Any]:
    """What besides its identity a run is made with: recorded, said where it changes, and no reason to run again."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "faiss": _faiss_version(),
        "processor": processor(),
        "device": gpu or device.type,
        "deterministic": runtime.deterministic,
        "processes": runtime.processes,
        "tf32": runtime.tf32,
        "compile": runtime.compile,
    }


def made_by(device: "torch.device", runtime: Runtime) -> dict[str, Any]:
    """What is recorded beside a run and beside a result."""
    return {"environment": describe_environment(device, runtime), "code": git_state()}


def git_state() -> dict[str, Any]:
    """The commit of the code at work, and whether it was changed since; None where there is no git."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "memvir", "stages"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "changed_since": None}
    return {"commit": commit.strip(), "changed_since": bool(changes.strip())}


def _faiss_version() -> str:
    for package in ("faiss-gpu", "faiss-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
