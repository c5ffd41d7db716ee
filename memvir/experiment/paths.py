"""Where everything lies, relative to the repository's top folder; dvc.yaml names the same places."""

from dataclasses import dataclass
from pathlib import Path

from memvir.experiment.settings import Run, Runtime

SETTINGS = Path("settings")
REPORTS = Path("reports")
METRICS = REPORTS / "metrics.json"
METRICS_FOLDER = REPORTS / "metrics"


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


def checkpoint_folder(runtime: Runtime, dataset: str, variant: str, seed: int) -> Path:
    """What an unfinished run is continued from, under these settings and earlier ones."""
    return runtime.scratch / "checkpoints" / dataset / variant / str(seed)


def settings_folder(dataset: str) -> Path:
    """The identities of a data set's runs and of their evaluation: what `train` and `evaluate` depend on."""
    return SETTINGS / dataset


def result_file(dataset: str, variant: str, seed: int) -> Path:
    return Path("results") / dataset / variant / f"{seed}.json"


def history_file(dataset: str, variant: str, seed: int) -> Path:
    """A row per epoch of the run: loss, rates, and metrics where it was evaluated."""
    return Path("results") / dataset / variant / f"{seed}.history.csv"


def growth_file(dataset: str, variant: str, seed: int) -> Path:
    """A row for each change of the virtual classes in use."""
    return Path("results") / dataset / variant / f"{seed}.growth.csv"


def trials_file(dataset: str, variant: str) -> Path:
    """What the search for a variant's settings tried."""
    return Path("tuning") / dataset / f"{variant}.csv"


def study_file(dataset: str, study: str) -> Path:
    """What a study has made."""
    return Path("studies") / dataset / f"{study}.csv"


def report_folder(dataset: str) -> Path:
    return REPORTS / dataset


@dataclass(frozen=True)
class RunFiles:
    """Where a run finds and leaves things."""

    index: Path
    """index.csv: one row per image."""
    images: Path
    """The folder that index.csv's files are relative to."""
    weights: Path
    """The folder with the pretrained weight file, if the recipe has one."""
    run: Path
    """Models, history, embeddings: what training leaves."""
    logs: Path
    """TensorBoard, and a record for each identity of what trained it; not tracked."""
    checkpoints: Path
    """States of the run, DATASET/VARIANT/SEED below a folder for all: what it is continued from."""
    settings: Path
    """The identities of all data sets' variants, DATASET/variants/VARIANT.json."""
    scratch: Path
    """Decoded pixels."""

    def record(self, identity: str) -> Path:
        """What trained the run of an identity, when and for how long."""
        return self.logs / f"run-{identity}.json"


def run_files(run: Run, runtime: Runtime) -> RunFiles:
    """Everything that training or evaluating a run reads and writes."""
    return RunFiles(
        index=index_file(run.dataset),
        images=images_folder(run.dataset),
        weights=weights_folder(run.dataset),
        run=run_folder(run.dataset, run.variant, run.seed),
        logs=log_folder(run.dataset, run.variant, run.seed),
        checkpoints=checkpoint_folder(runtime, run.dataset, run.variant, run.seed),
        settings=SETTINGS,
        scratch=runtime.scratch,
    )
