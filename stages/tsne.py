"""The t-SNE figure of embeddings by step, from what the variant `tsne` recorded while it trained."""

from memvir.config import Params
from memvir.reporting import tsne
from stages import stage
from stages.paths import report_folder, run_folder

VARIANT, SEED = "tsne", 1  # the run that dvc.yaml's stage train_tsne makes


@stage
def main(params: Params, dataset: str) -> None:
    snapshots = tsne.read_snapshots(run_folder(dataset, VARIANT, SEED) / "snapshots")
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
