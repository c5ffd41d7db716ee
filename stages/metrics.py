"""reports/metrics.json: the means of all data sets, which `dvc metrics` shows and compares."""

import functools

from memvir.config import Params
from memvir.files import write_json
from memvir.reporting import tables
from stages import stage
from stages.paths import METRICS, result_file


@stage
def main(params: Params) -> None:
    content = {}
    for dataset in params.datasets:
        experiment = tables.read_experiment(
            params.recipe(dataset), params.variants, params.seeds, functools.partial(result_file, dataset)
        )
        content[dataset] = tables.to_metrics(experiment.summary)
    write_json(METRICS, content)


if __name__ == "__main__":
    main()
