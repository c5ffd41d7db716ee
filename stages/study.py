"""Make a study of a recipe: runs on validation classes over some settings, or for long.

Stop it and run it again as you like; the table is written at the end.
"""

from memvir import libraries
from memvir.experiment.paths import study_file
from memvir.files import write_text
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str, study: str, jobs: int | None) -> None:
    from memvir.tuning.studies import make_study  # late: the handlers of signals come first

    at_once = jobs or max(1, libraries.available_cores() // params.recipe(dataset).resources.cpus)
    table = make_study(params, dataset, study, at_once)
    file = study_file(dataset, study)
    write_text(file, table.to_csv(index=False, lineterminator="\n"))
    print(f"{file}: {len(table)} rows; `dvc repro` draws them")


if __name__ == "__main__":
    main()
