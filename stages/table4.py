"""Recall@1 of every loss on every data set, beside the paper's Table 4, as Markdown, CSV and LaTeX."""

from memvir.experiment.paths import REPORTS, result_file
from memvir.files import write_text
from memvir.params import Params
from memvir.reporting import formats, table4
from stages import stage


@stage
def main(params: Params) -> None:
    columns = table4.read_columns(params.recipes, params.variants, params.seeds, result_file, params.settings_of)
    tables = {protocol: table4.to_table(columns, protocol, len(params.seeds)) for protocol in table4.PROTOCOLS}
    parts = [f"`{protocol}`: {table.caption}\n\n{formats.to_markdown(table)}" for protocol, table in tables.items()]
    write_text(REPORTS / "table4.md", "\n\n".join(["# Every loss on every data set", *map(str.strip, parts)]) + "\n")
    write_text(REPORTS / "table4.csv", table4.to_csv(columns))
    latex = [formats.to_latex(table, f"tab:table4-{protocol}") for protocol, table in tables.items()]
    write_text(REPORTS / "table4.tex", "% needs \\usepackage{booktabs}\n\n" + "\n".join(latex))


if __name__ == "__main__":
    main()
