"""Train one run: a variant of a data set's recipe under one seed."""

from memvir.config import Params
from memvir.environment import limit_threads
from stages import stage
from stages.paths import run_files


@stage
def main(params: Params, dataset: str, variant: str, seed: int) -> None:
    run = params.run(dataset, variant, seed)
    limit_threads(run.training.threads)
    from memvir.runs import train_run  # late: numerical libraries read their thread limits when imported

    train_run(run, params.runtime, run_files(params, dataset, variant, seed))


if __name__ == "__main__":
    main()
