"""What the same bytes on every processor cost: epochs of the embedded recipe with and without kernels beyond AVX2.

    python -m benchmarks.portable [--epochs 30] [--pairs 5]

Each side runs in a process of its own, in turn, because the libraries choose their kernels as they are imported. Needs
the prepared images of glyphs (`dvc repro prepare`), and says little on a processor that has no more than AVX2.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from memvir import libraries
from memvir.params import load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--side", choices=["portable", "native"], help="(what the processes of the two sides are told)")
    options = parser.parse_args()
    if options.side:
        return print(epoch_seconds(options.side, options.epochs))
    seconds: dict[str, list[float]] = {"native": [], "portable": []}
    for _ in range(options.pairs):
        for side, times in seconds.items():
            command = [sys.executable, "-m", "benchmarks.portable", "--side", side, "--epochs", str(options.epochs)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
            times.append(float(done.stdout))
    print(f"{libraries.processor()}\n\n| kernels | epoch of glyphs, one thread, ms (median) |\n|---|---:|")
    for side, times in seconds.items():
        print(f"| {side} | {statistics.median(times) * 1e3:.1f} |")
    pairs = zip(seconds["portable"], seconds["native"], strict=True)
    print(f"\nratio, median of pairs: {statistics.median(a / b for a, b in pairs):.3f}")


def epoch_seconds(side: str, epochs: int) -> float:
    if side == "native":
        libraries.AVX2_ONLY.clear()
    libraries.prepare()

    import torch  # late: it chooses its kernels now

    from memvir.experiment.data import open_training_data
    from memvir.experiment.paths import run_files
    from memvir.experiment.training import Trainer
    from memvir.images.index import read_index

    class Quiet:
        stop_requested = False

    params = load_params()
    run = params.run("glyphs", "norm_softmax", 1)
    files = run_files(run, params.runtime)
    data = open_training_data(run, params.runtime, files, read_index(Path(files.index)), torch.device("cpu"))
    trainer, times = Trainer(run, data, torch.device("cpu"), None, params.runtime), []
    for epoch in range(1, epochs + 1):
        trainer.epoch, trainer.batch = epoch, 0
        start = time.perf_counter()
        trainer.train_epoch(Quiet())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
