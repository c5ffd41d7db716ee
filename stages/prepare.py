"""Arrange the images of a data set by split and class, check each, and write the index that training depends on."""

from memvir.experiment.paths import download_folder, images_folder, index_file, source_folder
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    params.recipe(dataset).data.prepare(
        source_folder(dataset), download_folder(dataset), images_folder(dataset), index_file(dataset)
    )


if __name__ == "__main__":
    main()
