"""Evaluate one trained run: its last model, and the best one of each metric. Or any saved model, by --model."""

import json
from pathlib import Path

from memvir import libraries
from memvir.experiment.paths import growth_file, history_file, result_file, run_files
from memvir.files import write_text
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str, variant: str, seed: int, model: Path | None) -> None:
    run, runtime = params.run(dataset, variant, seed), params.runtime_of(dataset)
    libraries.prepare(run.training.threads)
    from memvir.experiment import evaluation  # late: numerical libraries read their thread limits when imported

    files = run_files(run, runtime)
    if model is not None:
        print(json.dumps(evaluation.evaluate_model(run, runtime, files, model), indent=2))
    else:
        evaluation.evaluate_run(run, runtime, files, result_file(dataset, variant, seed))
        for kept, file in (("history.csv", history_file), ("growth.csv", growth_file)):  # for a reader without the run
            write_text(file(dataset, variant, seed), (files.run / kept).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
