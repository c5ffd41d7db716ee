"""Train one run: a variant of a data set's recipe under one seed."""

import os
import sys

from memvir import libraries
from memvir.experiment.paths import run_files
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str, variant: str, seed: int) -> None:
    run, runtime = params.run(dataset, variant, seed), params.runtime_of(dataset)
    libraries.prepare(run.training.threads)
    from memvir.experiment.gpu_errors import warn_without_gpu
    from memvir.experiment.launch import launch
    from memvir.experiment.preflight import check_run
    from memvir.experiment.runs import train_run
    from memvir.images.index import read_index  # late: numerical libraries read their thread limits when imported

    files = run_files(run, runtime)
    processes = runtime.processes
    if "WORLD_SIZE" not in os.environ:  # torchrun's processes need not all say the same
        check_run(run, read_index(files.index), processes)
        if params.recipe(dataset).resources.gpus and runtime.device == "auto":
            warn_without_gpu(f"{dataset}.resources")
        if processes > 1:
            launch(processes, "stages.train", sys.argv[1:])
            return
    train_run(run, runtime, files)


if __name__ == "__main__":
    main()
