"""Tables of a data set's results: Mean, Diff. and Std. over seeds as Markdown, CSV and LaTeX, and their summary."""

import functools

from memvir.config import Params
from memvir.files import write_json, write_text
from memvir.reporting import tables
from stages import stage
from stages.paths import report_folder, result_file


@stage
def main(params: Params, dataset: str) -> None:
    experiment = tables.read_experiment(
        params.recipe(dataset), params.variants, params.seeds, functools.partial(result_file, dataset)
    )
    folder = report_folder(dataset)
    write_text(folder / "tables.md", tables.to_document(experiment, dataset))
    write_text(folder / "tables.csv", tables.to_csv(experiment.summary, experiment.lines))
    write_text(folder / "tables.tex", tables.to_latex_document(experiment.summary, experiment.lines, dataset))
    write_json(folder / "summary.json", experiment.content)


if __name__ == "__main__":
    main()
