"""Where everything lies, relative to the repository's top folder; dvc.yaml names the same places."""

from pathlib import Path
from typing import TYPE_CHECKING

from memvir.config import Params

if TYPE_CHECKING:
    from memvir.runs import RunFiles

REPORTS = Path("reports")
METRICS = REPORTS / "metrics.json"


def source_folder(dataset: str) -> Path:
    """What the user or the repository provides: annotation.csv, or train/CLASS/* and test/CLASS/*."""
    return Path("dataset") / dataset / "source"


def download_folder(dataset: str) -> Path:
    return Path("dataset") / dataset / "download"


def weights_folder(dataset: str) -> Path:
    return Path("dataset") / dataset / "weights"


def images_folder(dataset: str) -> Path:
    """train/CLASS/* and test/CLASS/*, as `prepare` arranged them."""
    return Path("dataset") / dataset / "images"


def index_file(dataset: str) -> Path:
    """One row per image: split, class, file and md5; what training depends on."""
    return Path("dataset") / dataset / "index.csv"


def run_folder(dataset: str, variant: str, seed: int) -> Path:
    return Path("runs") / dataset / variant / str(seed)


def log_folder(dataset: str, variant: str, seed: int) -> Path:
    return Path("logs") / dataset / variant / str(seed)


def checkpoint_files(params: Params, dataset: str, variant: str, seed: int) -> list[Path]:
    """What an unfinished run is continued from."""
    folder = Path(params.runtime.scratch) / "checkpoints" / dataset / variant
    return [folder / f"{seed}.pt", folder / f"{seed}.previous.pt"]


def result_file(dataset: str, variant: str, seed: int) -> Path:
    return Path("results") / dataset / variant / f"{seed}.json"


def report_folder(dataset: str) -> Path:
    return REPORTS / dataset


def run_files(params: Params, dataset: str, variant: str, seed: int) -> "RunFiles":
    """Everything that training or evaluating a run reads and writes."""
    from memvir.runs import RunFiles  # late: it imports torch

    return RunFiles(
        index=index_file(dataset),
        images=images_folder(dataset),
        weights=weights_folder(dataset),
        run=run_folder(dataset, variant, seed),
        logs=log_folder(dataset, variant, seed),
        scratch=Path(params.runtime.scratch),
    )
