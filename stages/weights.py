"""Fetch the backbone's pretrained weights, or note that the recipe starts from random ones."""

from memvir.experiment.paths import weights_folder
from memvir.models.weights import fetch_weights
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    fetch_weights(params.recipe(dataset).model, weights_folder(dataset))


if __name__ == "__main__":
    main()
