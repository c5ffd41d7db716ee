"""Arrange the images of a data set by split and class, check each, and write the index that training depends on."""

from memvir.config import Params
from memvir.datasets import SOURCES
from stages import stage
from stages.paths import download_folder, images_folder, index_file, source_folder


@stage
def main(params: Params, dataset: str) -> None:
    data = params.recipe(dataset).data
    SOURCES[data.source].prepare(
        data, source_folder(dataset), download_folder(dataset), images_folder(dataset), index_file(dataset)
    )


if __name__ == "__main__":
    main()
