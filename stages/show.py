"""Print the three tables of every data set, and where everything else about it is."""

from memvir.experiment.paths import report_folder
from memvir.params import Params
from memvir.reporting import formats
from stages import stage


@stage
def main(params: Params) -> None:
    for dataset in params.datasets:
        experiment = params.experiment(dataset)
        folder = report_folder(dataset)
        print(f"\n{dataset}\n\n{formats.to_terminal(experiment)}")
        print(f"As the paper counts (`best`), other metrics, intervals: {folder / 'tables.md'} (also .csv and .tex)")
        print(f"With curves and pictures: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
