"""Figures of a data set's runs: curves over epochs, the growth of the virtual classes, seen and unseen classes."""

from memvir.experiment.paths import growth_file, history_file, report_folder
from memvir.files import write_text
from memvir.params import Params
from memvir.reporting import curves, space
from memvir.reporting.results import table_lines
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    experiment, lines = params.experiment(dataset), table_lines(params.recipe(dataset), params.variants)
    histories = curves.read_tables({run: history_file(dataset, *run) for run in experiment.results})
    growths = curves.read_tables({run: growth_file(dataset, *run) for run in experiment.results})
    folder = report_folder(dataset)
    write_text(folder / "curves.csv", curves.curves_csv(histories, lines))
    curves.draw_curves(histories, lines, len(params.seeds), folder / "curves")
    curves.draw_growth(growths, histories, lines, folder / "curves" / "growth")
    if experiment.space is not None:
        space.draw_space(experiment.space, experiment.summary, experiment.lines, folder / "curves" / "space")


if __name__ == "__main__":
    main()
