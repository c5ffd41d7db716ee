"""Evaluate one trained run: its last model, and the best one of each metric. Or any saved model, by --model."""

import json
from pathlib import Path

from memvir.config import Params
from memvir.environment import limit_threads
from stages import stage
from stages.paths import result_file, run_files


@stage
def main(params: Params, dataset: str, variant: str, seed: int, model: Path | None) -> None:
    run = params.run(dataset, variant, seed)
    limit_threads(run.training.threads)
    from memvir.runs import evaluate_model, evaluate_run  # late: libraries read their thread limits when imported

    files = run_files(params, dataset, variant, seed)
    if model is not None:
        print(json.dumps(evaluate_model(run, params.runtime, files, model), indent=2))
    else:
        evaluate_run(run, params.runtime, files, result_file(dataset, variant, seed))


if __name__ == "__main__":
    main()
