"""Write down what each run of a data set depends on, so that DVC runs again what that changes, and nothing else."""

import json

from memvir.experiment import identity
from memvir.experiment.paths import index_file, settings_folder, weights_folder
from memvir.files import write_json
from memvir.params import Params
from stages import stage


@stage
def main(params: Params, dataset: str) -> None:
    recipe = params.recipe(dataset)
    weights = json.loads((weights_folder(dataset) / "source.json").read_text(encoding="utf-8")).get("sha256", "none")
    folder = settings_folder(dataset)
    write_json(folder / "evaluation.json", identity.of_evaluation(recipe.evaluation))
    for variant in recipe.variants:
        content = identity.of_variant(params.run(dataset, variant, 0), index_file(dataset), weights)
        write_json(folder / "variants" / f"{variant}.json", content)


if __name__ == "__main__":
    main()
