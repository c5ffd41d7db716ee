"""The t-SNE figure of embeddings by step, from what the variant `tsne` recorded while it trained."""

from memvir.experiment.paths import report_folder, run_folder
from memvir.experiment.settings import TSNE_VARIANT
from memvir.params import Params
from memvir.reporting import tsne
from stages import stage

SEED = 1  # of the run that dvc.yaml's stage train_tsne makes


@stage
def main(params: Params, dataset: str) -> None:
    snapshots = tsne.read_snapshots(run_folder(dataset, TSNE_VARIANT, SEED) / "snapshots")
    settings = params.reporting
    tsne.draw_tsne(
        snapshots,
        report_folder(dataset) / "tsne",
        perplexity=settings.tsne_perplexity,
        max_points=settings.tsne_points,
        seed=settings.tsne_seed,
    )


if __name__ == "__main__":
    main()
