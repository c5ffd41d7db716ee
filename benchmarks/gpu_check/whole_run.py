"""A run through the stages as a user has it: images in folders, decoded, trained, killed, continued, evaluated."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu_check.machine import choose
from memvir.experiment.paths import result_file, run_folder

ROOT = Path(__file__).parents[2]
RUN = ["--dataset", "check", "--variant", "memvir", "--seed", "1"]


def check(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    on_gpu = target.type == "cuda"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "dataset" / "check" / "source", classes=98 if on_gpu else 10, side=256 if on_gpu else 32)
        (folder / "params.yaml").write_text(json.dumps(params(on_gpu)))
        for stage in ("download", "prepare", "weights", "settings"):
            run(folder, stage, "--dataset", "check")
        killed_at = train_and_kill(folder)
        yield {"killed by kill -9": killed_at}
        start = time.monotonic()
        said = run(folder, "train", *RUN)
        seconds = time.monotonic() - start
        assert "continuing at epoch" in said, said
        last = [line for line in said.splitlines() if "images/s" in line][-1]
        yield {"continued": f"to the end in {seconds:.0f} s", "last line": last}
        run(folder, "evaluate", *RUN)
        result = json.loads((folder / result_file("check", "memvir", 1)).read_text())
        yield {
            "Recall@1 on classes that it has not seen": f"{result['last']['recall_at_1']:.1%}",
            "virtual classes in use": result["most_virtual_classes"],
        }
        whole, kept = folder / run_folder("check", "memvir", 1), folder / "killed-and-continued"
        whole.rename(kept)
        shutil.rmtree(folder / "scratch" / "checkpoints")
        run(folder, "train", *RUN)
        names = [file.relative_to(kept) for file in sorted(kept.rglob("*")) if file.is_file()]
        other = [str(name) for name in names if (kept / name).read_bytes() != (whole / name).read_bytes()]
        assert not other, f"a run that was not killed has other bytes in {', '.join(other)}"
        yield {"a run that was not killed": f"the same bytes in {len(names)} files"}


def params(on_gpu: bool) -> dict[str, Any]:
    size = 224 if on_gpu else 32
    optimizer = {"name": "adam", "lr": 1e-4 if on_gpu else 1e-3, "lr_proxies": 1e-2, "weight_decay": 1e-4, "eps": 0.01}
    network = {"backbone": "bn_inception"} if on_gpu else {"backbone": "convnet", "widths": [8, 16]}
    variant = {
        "loss": {"name": "Norm-SoftMax", "scale": 23.0},
        "memvir": {"num_steps": 5, "step_gap": 2, "warm_up_epochs": 1},
    }
    recipe = {
        "data": {"source": "folder"},
        "images": {
            "size": size,
            "channels": "bgr",
            "value_range": 255,
            "mean": [104, 117, 128],
            "std": [1, 1, 1],
            "train": {"kind": "random_resized_crop", "scale": [0.3, 1.0], "ratio": [0.75, 1.33], "flip": 0.5},
            "test": {"resize": size},
        },
        "model": {**network, "pretrained": "none", "pooling": "gap", "embedding_dim": 64, "freeze_batch_norm": False},
        "training": {
            "epochs": 8,
            "check_epoch": 4,
            "batch_size": 64 if on_gpu else 16,
            "optimizer": optimizer,
            "lr_decay": {"epochs": []},
            "precision": "bf16" if on_gpu else "fp32",
            "threads": 1,
        },
        "evaluation": {"recall_at": [1, 2]},
        "variants": {"memvir": variant},
    }
    runtime = {"progress": "plain", "checkpoint_epochs": 1, "device": "auto" if on_gpu else "cpu", "workers": 2}
    return {"datasets": ["check"], "variants": ["memvir"], "seeds": [1], "runtime": runtime, "check": recipe}


def write_images(source: Path, classes: int, side: int) -> None:
    random = np.random.default_rng(0)
    for split, first in (("train", 0), ("test", classes)):
        for label in range(first, first + classes):
            pattern = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((side, side))
            folder = source / split / f"class_{label:03d}"
            folder.mkdir(parents=True)
            for number in range(6):
                noise = random.normal(0, 40, (side, side, 3))
                pixels = np.clip(np.asarray(pattern) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")


def start(folder: Path, stage: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"stages.{stage}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def run(folder: Path, stage: str, *arguments: str) -> str:
    process = start(folder, stage, *arguments)
    said, _ = process.communicate()
    assert process.returncode == 0, f"stages.{stage}: {said}"
    return said


def train_and_kill(folder: Path) -> str:
    """Kill the run at its second epoch, when a checkpoint is there."""
    process = start(folder, "train", *RUN)
    assert process.stdout is not None
    checkpoints = folder / "scratch" / "checkpoints" / "check" / "memvir" / "1"
    while process.poll() is None and not list(checkpoints.glob("*.pt")):
        time.sleep(0.05)  # the run says nothing at the moment in which it has saved
    assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return "after its first checkpoint"
