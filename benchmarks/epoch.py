"""What MemVir costs an epoch of the embedded recipe: the same epochs with and without it, in turn.

    python -m benchmarks.epoch [--epochs 20] [--num-steps 5] [--step-gap 5]

Needs the prepared images of glyphs (`dvc repro prepare`).
"""

import argparse
import statistics
import time
from pathlib import Path

from memvir import libraries
from memvir.params import load_params
from memvir.wrappers.settings import MemVirSettings

libraries.prepare()

import torch  # noqa: E402

from memvir.experiment.data import open_training_data  # noqa: E402
from memvir.experiment.paths import run_files  # noqa: E402
from memvir.experiment.training import Trainer  # noqa: E402
from memvir.images.index import read_index  # noqa: E402


class Quiet:
    stop_requested = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--step-gap", type=int, default=5)
    options = parser.parse_args()
    params = load_params()
    files = run_files(params.run("glyphs", "norm_softmax", 1), params.runtime)
    index = read_index(Path(files.index))
    trainers = {}
    for variant in ("norm_softmax", "memvir_norm_softmax"):
        run = params.run("glyphs", variant, 1)
        if run.memvir:
            memvir = MemVirSettings(num_steps=options.num_steps, step_gap=options.step_gap, warm_up_epochs=0)
            run = run.model_copy(update={"memvir": memvir})
        data = open_training_data(run, params.runtime, files, index, torch.device("cpu"))
        trainers[variant] = Trainer(run, data, torch.device("cpu"), None, params.runtime)
    seconds: dict[str, list[float]] = {variant: [] for variant in trainers}
    for epoch in range(options.epochs + 4):  # the first epochs fill the memory
        for variant, trainer in trainers.items():
            trainer.epoch, trainer.batch = epoch + 1, 0
            start = time.perf_counter()
            trainer.train_epoch(Quiet())
            if epoch >= 4:
                seconds[variant].append(time.perf_counter() - start)
    pairs = zip(seconds["memvir_norm_softmax"], seconds["norm_softmax"], strict=True)
    in_use = trainers["memvir_norm_softmax"].loss.num_virtual_classes
    print("| epoch of glyphs, one thread | ms (median) |\n|---|---:|")
    for variant, times in seconds.items():
        print(f"| {variant} | {statistics.median(times) * 1e3:.1f} |")
    print(
        f"\nratio, median of pairs: {statistics.median(a / b for a, b in pairs):.3f} ({in_use} virtual classes in use)"
    )


if __name__ == "__main__":
    main()
