"""Search for a variant's settings on validation classes, which are cut from the training classes.

Stop it and run it again as you like; the trials, and which of them is the choice, are written at the end.
"""

from memvir import libraries
from memvir.experiment.paths import trials_file
from memvir.files import write_text
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str, variant: str, jobs: int | None) -> None:
    from memvir.tuning.search import search  # late: the handlers of signals come first

    at_once = jobs or max(1, libraries.available_cores() // params.recipe(dataset).resources.cpus)
    trials = search(params, dataset, variant, at_once)
    file = trials_file(dataset, variant)
    write_text(file, trials.to_csv(index=False, lineterminator="\n"))
    chosen = trials[trials["chosen"]]
    settings = chosen.iloc[0].drop(["trial", "seed", "map", "chosen"])
    print(f"{file}: of {trials['trial'].nunique()} trials the choice is number {chosen['trial'].iloc[0]}")
    for key, value in settings.items():
        print(f"  {key}: {value}")
    print(f"  MAP on the validation classes, mean of {len(chosen)} seeds: {chosen['map'].mean():.2f} %")


if __name__ == "__main__":
    main()
