"""Fetch the images of a data set: download or render the archive, or find out where it lies."""

from memvir.experiment.paths import download_folder, source_folder
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    params.recipe(dataset).data.download(source_folder(dataset), download_folder(dataset))


if __name__ == "__main__":
    main()
