"""How a data set's settings were chosen: a figure of every trial, and the tables, for the report."""

import functools

from memvir.experiment.paths import report_folder, trials_file
from memvir.files import write_text
from memvir.params import Params
from memvir.reporting import formats, trials
from memvir.reporting.results import table_lines
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    recipe, folder = params.recipe(dataset), report_folder(dataset) / "trials"
    lines = table_lines(recipe, params.variants)
    file = functools.partial(trials_file, dataset)
    search = trials.describe(recipe, lines, file)
    document = [f"# How the settings on {dataset} were chosen", search.text if search else trials.NO_SEARCH]
    for table in search.tables if search else ():
        document += [f"## {table.caption}", formats.to_markdown(table).strip()]
    write_text(folder / "trials.md", "\n\n".join(document) + "\n")
    if search and recipe.tuning:
        found = trials.read_trials({line.variant: file(line.variant) for line in lines})
        trials.draw_trials(recipe.tuning, found, lines, folder / "trials")


if __name__ == "__main__":
    main()
