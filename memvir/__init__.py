"""MemVir: learning with memory-based virtual classes for deep metric learning (Ko, Gu, Kim, ICCV 2021)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memvir.losses import build_loss
    from memvir.memory import MemVir
    from memvir.retrieval import evaluate, nearest_neighbours
    from memvir.trained import load_model

__version__ = "0.1.0"
__all__ = ["MemVir", "build_loss", "evaluate", "load_model", "nearest_neighbours"]

_HOMES = {
    "MemVir": "memvir.memory",
    "build_loss": "memvir.losses",
    "evaluate": "memvir.retrieval",
    "nearest_neighbours": "memvir.retrieval",
    "load_model": "memvir.trained",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'memvir' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
