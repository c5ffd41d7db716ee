"""Retrieval pictures: what a baseline and the first variant around it find for the best, typical and worst queries."""

from memvir.experiment.paths import images_folder, index_file, report_folder, run_folder
from memvir.images.index import evaluated, read_index
from memvir.params import Params
from memvir.reporting import neighbours
from memvir.reporting.results import table_lines
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    lines = table_lines(params.recipe(dataset), params.variants)
    pairs = [(line.baseline, line.variant) for line in lines if line.baseline in params.variants]
    shown = pairs[0] if pairs else params.variants[:1]
    embeddings = {
        line.title: neighbours.read_embeddings(
            run_folder(dataset, line.variant, params.seeds[0]) / "test_embeddings.npz"
        )
        for line in sorted(lines, key=lambda line: line.baseline is not None)
        if line.variant in shown
    }
    test = evaluated(read_index(index_file(dataset)))
    is_query = (test["split"] == "query").to_numpy()
    queries, rankings = neighbours.rank(
        embeddings,
        test["class_id"].to_numpy(),
        is_query if is_query.any() else None,
        per_kind=params.reporting.queries,
        num_neighbours=params.reporting.neighbours,
    )
    stem = report_folder(dataset) / "neighbours"
    neighbours.draw_neighbours(queries, rankings, test, images_folder(dataset), stem)


if __name__ == "__main__":
    main()
