"""Packages that `pip install memvir` does not bring, but one of its extras, as pyproject.toml lists them."""

import importlib.util

from memvir.errors import MissingExtra

EXTRAS = {
    "experiment": (
        "filelock",
        "matplotlib",
        "openTSNE",
        "optuna",
        "pandas",
        "pydantic",
        "ruamel.yaml",
        "sklearn",
        "scipy",
        "tabulate",
        "tensorboard",
        "threadpoolctl",
    ),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
"""By the names that they are imported under."""


def require(extra: str, *packages: str) -> None:
    """Raise MissingExtra, which says how to get them, unless these packages of the extra, or all, are installed."""
    assert set(packages) <= set(EXTRAS[extra])
    missing = [package for package in packages or EXTRAS[extra] if not _is_there(package)]
    if missing:
        raise MissingExtra(f'{", ".join(missing)}: not installed; pip install "memvir[{extra}]" brings what is missing')


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # ruamel.yaml without ruamel
        return False
