"""Print the three tables of every data set, and where everything else about it is."""

import functools

from memvir.experiment.paths import report_folder, result_file
from memvir.params import Params
from memvir.reporting import aggregation, formats
from stages import stage


@stage
def main(params: Params) -> None:
    for dataset in params.datasets:
        experiment = aggregation.read_experiment(
            params.recipe(dataset), params.variants, params.seeds, functools.partial(result_file, dataset)
        )
        folder = report_folder(dataset)
        print(f"\n{dataset}\n\n{formats.to_terminal(experiment)}")
        print(f"As the paper counts (`best`), other metrics, intervals: {folder / 'tables.md'} (also .csv and .tex)")
        print(f"With curves and pictures: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
