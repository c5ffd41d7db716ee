"""The parts: each a generator of what the page shows, numbers and rows of tables, as far as it is known."""

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple


class Part(NamedTuple):
    what: str
    function: str
    """`module:function`, imported in the part's own process."""
    seconds: int
    """How long it may take."""


PARTS = {
    "numbers": Part(
        "every loss, with and without MemVir, against the CPU in float64; training by precision", "numbers:losses", 50
    ),
    "bits": Part("two runs of the same seed, and one that was stopped, end in the same bytes", "bits:check", 40),
    "several": Part("two processes, each with a GPU, against one", "several:check", 40),
    "faiss": Part("metrics by search on this device against those on the CPU", "search:check", 60),
    "step": Part("training steps of CARS196's lines at 224: speed, waiting, memory", "speed:steps", 165),
    "feeding": Part(
        "images that loaders and crops on the device deliver against those that a step takes", "speed:feeding", 45
    ),
    "rest": Part("evaluation and checkpoints as shares of a long run", "speed:rest", 75),
    "run": Part("a run of synthetic images through the stages: killed, continued, evaluated", "whole_run:check", 125),
}


class Skipped(Exception):
    """Why a part shows nothing here."""


def run(part: str, device: str) -> Iterator[dict[str, Any]]:
    module, _, function = (PARTS[part].function if part in PARTS else "machine:describe").partition(":")
    return getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)(device)
