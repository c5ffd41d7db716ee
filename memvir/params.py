"""params.yaml as one validated object; a wrong or unknown key is an error that names it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memvir.errors import UserError
from memvir.experiment.paths import result_file, trials_file
from memvir.experiment.settings import (
    TSNE_VARIANT,
    Recipe,
    Resources,
    Run,
    Runtime,
    Training,
    Variant,
    changed,
    has_section,
    keeps_promise,
)
from memvir.reporting.settings import Reporting
from memvir.sections import Name, Section, Seed, describe, key_name, suggest, validate
from memvir.wrappers import WRAPPERS

if TYPE_CHECKING:
    from memvir.reporting.aggregation import Experiment


class Params(Section):
    datasets: Annotated[list[Name], Field(min_length=1)]
    """The recipes to run."""
    variants: Annotated[list[Name], Field(min_length=1)]
    """The variants of each recipe to run, in the order of the tables."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """One run per variant and seed."""
    runtime: Runtime = Runtime()
    reporting: Reporting = Reporting()
    recipes: dict[Name, Recipe]
    """Every other top-level key of params.yaml, by name."""

    @field_validator("datasets", "variants", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is listed twice")
        return value

    def recipe(self, dataset: str) -> Recipe:
        """The recipe of a data set; UserError listing the recipes there are if it has none."""
        return _choose(self.recipes, dataset, "a recipe for data set")

    def runtime_of(self, dataset: str) -> Runtime:
        """`runtime`; on the CPU where `device: auto` meets a recipe whose `resources` say `gpus: 0`."""
        resources = self.recipe(dataset).resources
        if self.runtime.device == "auto" and "gpus" in resources.model_fields_set and not resources.gpus:
            return self.runtime.model_copy(update={"device": "cpu"})
        return self.runtime

    def resources_of(self, dataset: str) -> Resources:
        """What a run of the data set takes: of GPUs at least one for each of its processes."""
        resources = self.recipe(dataset).resources
        if not resources.gpus or self.runtime.processes == 1:
            return resources
        return resources.model_copy(update={"gpus": max(resources.gpus, float(self.runtime.processes))})

    def run(self, dataset: str, variant: str, seed: int) -> Run:
        """The complete settings of one run.

        Raises UserError if data set or variant is unknown, listing those there are, or if the seed is none.
        """
        recipe = self.recipe(dataset)
        chosen: Variant = _choose(recipe.variants, variant, f"a variant of {dataset}")
        content = {
            "dataset": dataset,
            "variant": variant,
            "seed": seed,
            "data": recipe.data,
            "images": recipe.images,
            "model": recipe.model,
            "training": _training(recipe, chosen, f"{dataset}.variants.{variant}"),
            "evaluation": recipe.evaluation,
            "loss": chosen.loss,
            **{name: getattr(chosen, name) for name in WRAPPERS},
            "snapshots": chosen.snapshots,
        }
        return keeps_promise(validate(Run, content, prefix=""), f"{dataset}.variants.{variant}")

    def settings_of(self, dataset: str, variant: str) -> dict[str, Any]:
        """What the results of a variant's runs tell of their settings, if they were made with the present ones."""
        from memvir.experiment.identity import resolved_settings  # late, as below: most stages read no result

        return resolved_settings(self.run(dataset, variant, self.seeds[0]))

    def experiment(self, dataset: str) -> "Experiment":
        """The results of a data set's runs; UserError if there is none of the present settings."""
        from memvir.reporting.aggregation import read_experiment

        file, settings = functools.partial(result_file, dataset), functools.partial(self.settings_of, dataset)
        searches = functools.partial(trials_file, dataset)
        return read_experiment(self.recipe(dataset), self.variants, self.seeds, file, settings, searches)


SECTIONS = ("datasets", "variants", "seeds", "runtime", "reporting")
DVC_KEYS = ("item", "key")
"""What DVC calls the members of a matrix: it warns at every stage of a data set of that name."""


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Raises UserError, one line naming file and key, for anything that is not a valid configuration.
    """
    path = Path(path)
    try:
        # DVC reads params.yaml with the same parser: YAML 1.2, where 1e-4 is a number and a repeated key an error
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this from the repository's top folder") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    except (YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # besides YAMLError the parser lets errors of its own constructors through (dates, huge numbers, odd tags)
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    try:
        return parse_params(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_params(raw: Any) -> Params:
    """Validate the content of params.yaml. Raises UserError naming the key."""
    if not isinstance(raw, dict):
        raise UserError(f"expected keys such as {', '.join(SECTIONS)} at the top level, found {describe(raw)}")
    for key, value in raw.items():
        if not isinstance(key, str):
            raise UserError(f"{describe(key)}: keys must be text")
        if key not in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{key_name(key)}: unknown key{suggest(key, SECTIONS)}")
        if key in DVC_KEYS:
            raise UserError(f"{key}: the pipeline needs this name for itself; call the data set otherwise")
    known = {key: value for key, value in raw.items() if key in SECTIONS}
    recipes = {key: value for key, value in raw.items() if key not in SECTIONS}
    params = validate(Params, {**known, "recipes": recipes}, prefix="")
    if TSNE_VARIANT in params.variants:
        raise UserError(
            f"variants: {TSNE_VARIANT} is the run of the t-SNE figure, which is trained in any case; to have it in the "
            "tables as well, copy it under another name and list that"
        )
    for dataset in params.datasets:
        for variant in params.variants:
            params.run(dataset, variant, params.seeds[0])
    for dataset, recipe in params.recipes.items():
        _check_studies(params, dataset, recipe)
        for name, variant in recipe.variants.items():
            run = params.run(dataset, name, 0)
            _check_warm_up(run, f"{dataset}.variants.{name}")
            _check_epochs(variant, run.training, f"{dataset}.variants.{name}")
            if name == TSNE_VARIANT and not variant.snapshots:
                raise UserError(f"{dataset}.variants.{name}.snapshots: missing; the t-SNE figure shows these epochs")
    return params


def _training(recipe: Recipe, variant: Variant, prefix: str) -> Training:
    merged = _merge(recipe.training.model_dump(), variant.training)
    return validate(Training, merged, f"{prefix}.training")


def _check_studies(params: Params, dataset: str, recipe: Recipe) -> None:
    """Each key is one of a variant that the study has, each value one that the variant takes."""
    for name, study in recipe.studies.items():
        where = f"{dataset}.studies.{name}"
        runs = [params.run(dataset, variant, study.seeds[0]) for variant in study.variants]
        for keys in [[key] for key in study.over] + [study.varied]:
            if not any(all(has_section(run, key) for key in keys) for run in runs):
                sections = " and ".join(dict.fromkeys(key.partition(".")[0] for key in keys))
                raise UserError(f"{where}.over: none of {', '.join(study.variants)} has {sections}")
        for run in runs:
            over = {key: values for key, values in study.over.items() if has_section(run, key)}
            first = {key: values[0] for key, values in over.items()}
            for key, values in over.items():
                for value in values:
                    _check_warm_up(changed(run, {**first, key: value}, f"{where}.over"), f"{where}.over")


def _check_epochs(variant: Variant, training: Training, prefix: str) -> None:
    for epoch in variant.snapshots:
        if epoch > training.epochs:
            raise UserError(f"{prefix}.snapshots: epoch {epoch} is beyond the last one, {training.epochs}")
    if variant.snapshots and not variant.memvir:
        raise UserError(f"{prefix}.snapshots: only a variant with memvir has past steps to record")


def _check_warm_up(run: Run, prefix: str) -> None:
    wrapper, settings = run.wrapper, run.wrapper_settings
    if wrapper and settings and settings.warm_up_epochs >= run.training.epochs:
        raise UserError(
            f"{prefix}.{wrapper}.warm_up_epochs: {settings.warm_up_epochs} leaves no epoch for "
            f"{WRAPPERS[wrapper].title} out of {run.training.epochs}; use a smaller number"
        )


def _merge(base: Mapping[str, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _choose(choices: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in choices:
        raise UserError(f"{name!r} is not {what}; there are: {', '.join(choices) or 'none'}")
    return choices[name]
