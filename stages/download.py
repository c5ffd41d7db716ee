"""Fetch the images of a data set: download or render the archive, or find out where it lies."""

from memvir.config import Params
from memvir.datasets import SOURCES
from stages import stage
from stages.paths import download_folder, source_folder


@stage
def main(params: Params, dataset: str) -> None:
    data = params.recipe(dataset).data
    SOURCES[data.source].download(data, source_folder(dataset), download_folder(dataset))


if __name__ == "__main__":
    main()
