"""Evaluate one trained run: its last model, and the best one of each metric."""

from memvir.config import Params
from memvir.environment import limit_threads
from stages import stage
from stages.paths import result_file, run_files


@stage
def main(params: Params, dataset: str, variant: str, seed: int) -> None:
    run = params.run(dataset, variant, seed)
    limit_threads(run.training.threads)
    from memvir.runs import evaluate_run  # late: numerical libraries read their thread limits when imported

    evaluate_run(run, params.runtime, run_files(params, dataset, variant, seed), result_file(dataset, variant, seed))


if __name__ == "__main__":
    main()
