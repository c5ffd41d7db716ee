"""Train one run: a variant of a data set's recipe under one seed."""

import os
import sys

from memvir.config import Params
from memvir.environment import limit_threads
from stages import stage
from stages.paths import run_files


@stage
def main(params: Params, dataset: str, variant: str, seed: int) -> None:
    run = params.run(dataset, variant, seed)
    if params.runtime.processes > 1 and "WORLD_SIZE" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        processes = f"--nproc_per_node={params.runtime.processes}"
        os.execv(sys.executable, [*launcher, processes, "-m", "stages.train", *sys.argv[1:]])
    limit_threads(run.training.threads)
    from memvir.runs import train_run  # late: numerical libraries read their thread limits when imported

    train_run(run, params.runtime, run_files(params, dataset, variant, seed))


if __name__ == "__main__":
    main()
