"""reports/metrics.json, the means of all data sets; from it reports/metrics/, which `dvc metrics` shows and compares.

DVC gives each file a line and each number a column: so a file per variant, and the few numbers that a terminal has room
for.
"""

import shutil

from memvir.experiment.paths import METRICS, METRICS_FOLDER
from memvir.files import write_json
from memvir.params import Params
from memvir.reporting import aggregation
from stages import stage

COLUMNS = {
    "R@1": ("recall_at_1", "mean"),
    "R@1 std": ("recall_at_1", "std"),
    "R@1 diff": ("recall_at_1", "diff"),
    "RP": ("rp", "mean"),
    "MAP": ("map", "mean"),
}


@stage
def main(params: Params) -> None:
    content = {}
    shutil.rmtree(METRICS_FOLDER, ignore_errors=True)  # files of variants that are no longer asked for
    for dataset in params.datasets:
        experiment = params.experiment(dataset)
        content[dataset] = aggregation.to_metrics(experiment.summary)
        for variant, metrics in content[dataset].items():
            shown = {column: metrics[m].get(what) for column, (m, what) in COLUMNS.items() if m in metrics}
            shown = {column: value for column, value in shown.items() if value is not None}
            write_json(METRICS_FOLDER / dataset / f"{variant}.json", shown)
    write_json(METRICS, content)


if __name__ == "__main__":
    main()
