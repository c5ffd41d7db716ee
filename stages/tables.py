"""Tables of a data set's results: Mean, Diff. and Std. over seeds as Markdown, CSV and LaTeX, and their summary."""

from memvir.experiment.paths import report_folder
from memvir.files import write_json, write_text
from memvir.params import Params
from memvir.reporting import formats
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    experiment = params.experiment(dataset)
    folder = report_folder(dataset)
    write_text(folder / "tables.md", formats.to_document(experiment, dataset))
    write_text(folder / "tables.csv", formats.to_csv(experiment.summary, experiment.lines))
    write_text(folder / "tables.tex", formats.to_latex_document(experiment.summary, experiment.lines, dataset))
    write_json(folder / "summary.json", experiment.content)


if __name__ == "__main__":
    main()
