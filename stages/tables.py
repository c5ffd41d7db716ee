"""Tables of a data set's results: Mean, Diff. and Std. over seeds as Markdown, CSV and LaTeX, and their summary."""

from memvir.config import Params
from memvir.files import write_json, write_text
from memvir.reporting import results, tables
from stages import stage
from stages.paths import report_folder, result_file


@stage
def main(params: Params, dataset: str) -> None:
    lines = results.table_lines(params.recipe(dataset), params.variants)
    runs = results.read_results({(v, s): result_file(dataset, v, s) for v in params.variants for s in params.seeds})
    summary = tables.summarise(results.run_values(runs, lines, params.seeds), lines)
    checks = results.check_runs(runs, lines, params.seeds)
    folder = report_folder(dataset)
    write_text(folder / "tables.md", tables.to_document(summary, lines, checks, dataset))
    write_text(folder / "tables.csv", tables.to_csv(summary, lines))
    write_text(folder / "tables.tex", tables.to_latex_document(summary, lines, dataset))
    content = {
        "metrics": tables.to_metrics(summary),
        "settings": results.settings_of(runs, lines),
        "environment": results.environment_of(runs),
    }
    write_json(folder / "summary.json", content)


if __name__ == "__main__":
    main()
