"""Curves of a data set's runs over epochs, and the growth of the virtual classes over steps."""

from memvir.config import Params
from memvir.files import write_text
from memvir.reporting import curves
from memvir.reporting.results import table_lines
from stages import stage
from stages.paths import report_folder, run_folder


@stage
def main(params: Params, dataset: str) -> None:
    lines = table_lines(params.recipe(dataset), params.variants)
    runs = {(v, s): run_folder(dataset, v, s) for v in params.variants for s in params.seeds}
    histories = curves.read_tables({run: folder / "history.csv" for run, folder in runs.items()})
    growths = curves.read_tables({run: folder / "growth.csv" for run, folder in runs.items()})
    folder = report_folder(dataset)
    write_text(folder / "curves.csv", curves.curves_csv(histories, lines))
    curves.draw_curves(histories, lines, len(params.seeds), folder / "curves")
    curves.draw_growth(growths, histories, lines, folder / "curves" / "growth")


if __name__ == "__main__":
    main()
