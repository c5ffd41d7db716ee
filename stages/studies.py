"""What a data set's studies have found, as figures for the report."""

import functools

from memvir.experiment.paths import report_folder, study_file
from memvir.files import write_text
from memvir.params import Params
from memvir.reporting import studies
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    folder = report_folder(dataset) / "studies"
    made = studies.read_studies(params.recipe(dataset), functools.partial(study_file, dataset))
    document = [f"# Studies on {dataset}", *([] if made else [studies.NO_STUDY])]
    for study in made:
        studies.draw_study(study, folder / study.name)
        document += [f"## {study.name}", study.caption, f"![]({study.name}.png)"]
    write_text(folder / "studies.md", "\n\n".join(document) + "\n")


if __name__ == "__main__":
    main()
