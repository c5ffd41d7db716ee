"""Whether two processes, each with a GPU, train as one does."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.machine import choose
from benchmarks.gpu_check.parts import Skipped
from benchmarks.gpu_check.small_run import Watch, make_trainer
from memvir.experiment.distributed import World, join_world
from memvir.signals import end_with_parent

EPOCHS = 2


def check(device: str) -> Iterator[dict[str, Any]]:
    target = choose(device)
    if target.type == "cuda" and torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    one = losses(target, World())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "losses.json"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [sys.executable, *launch, "-m", "benchmarks.gpu_check.several", target.type, str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if target.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""  # where there are GPUs all the same
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        two = torch.tensor(json.loads(file.read_text()))
    error = float(((two - one).abs() / one.abs()).max())
    assert error < 1e-2, f"the losses of two processes are {two}, of one {one}"
    backend = "nccl" if target.type == "cuda" else "gloo"
    yield {"backend": backend, f"largest relative difference of {len(one)} steps' losses": f"{error:.1e}"}


def losses(device: torch.device, world: World) -> torch.Tensor:
    """Those of every step. BatchNorm's own processes need GPUs, so on a CPU it is frozen."""
    trainer = make_trainer(device, world=world, freeze_batch_norm=device.type == "cpu")
    found = []
    for _ in range(EPOCHS):
        trainer.train_epoch(Watch())  # type: ignore[arg-type]
        found.append(trainer.losses[: trainer.batch].double().cpu())
        trainer.epoch, trainer.batch = trainer.epoch + 1, 0
    return torch.cat(found)


def main() -> None:
    """One of the processes: what it finds goes to a file."""
    end_with_parent()  # torchrun's processes are in sessions of their own
    kind, file = sys.argv[1:]
    world = join_world()
    device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
    found = losses(device, world)
    if world.is_main:
        Path(file).write_text(json.dumps(found.tolist()))


if __name__ == "__main__":
    main()
