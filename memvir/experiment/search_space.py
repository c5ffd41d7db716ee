"""What a search for a recipe's settings tries, and for how much; and what a study varies."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from memvir.sections import Count, Name, Section, Seed, suggest
from memvir.wrappers import WRAPPERS

SECTIONS = ("loss", "training", *WRAPPERS)
"""Of a variant: what a search or a study can change."""


OF_THE_STUDY = {
    "training.check_epoch": "the study's own check_epoch",
    "training.early_stopping": "off in a study, whose runs go on to the end",
}
"""What a study sets itself, and how."""


def _distinct(value: list[Any]) -> list[Any]:
    if any(entry in value[:number] for number, entry in enumerate(value)):
        raise ValueError("an entry is listed twice")
    return value


Values = Annotated[list[Any], Field(min_length=1), AfterValidator(_distinct)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(_distinct)]


class Range(Section):
    low: float
    high: float
    log: bool = True
    """Drawn uniformly on a logarithmic scale."""

    @model_validator(mode="after")
    def _increasing(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 where log is true")
        return self


class Choices(Section):
    choices: list[Any] = Field(min_length=2)
    """Each as likely as another."""


class Tuning(Section):
    """A search over settings, with validation classes cut from the training classes. Changing it re-trains nothing."""

    trials: Count
    """Settings that are tried for each variant, the same number for every one."""
    finalists: Count
    """The best of them, tried again under all `seeds`."""
    seeds: Seeds
    """Of the runs; trials are made under the first. None of them should be a seed of the tables."""
    validation_share: Annotated[float, Field(gt=0, lt=1)]
    """Of the training classes, how many validate; drawn once, the same for all variants."""
    seed: Seed = 0
    """Of the validation classes and of the settings that are drawn."""
    space: dict[str, Range | Choices]
    """Keys of a variant, such as training.optimizer.lr; those of a section that it does not have are left out."""

    @property
    def runs(self) -> int:
        """For each variant."""
        return sum(self.size.values())

    @property
    def size(self) -> dict[int, int]:
        """seed -> how many settings are tried under it."""
        first, *others = self.seeds
        return {first: self.trials, **dict.fromkeys(others, min(self.finalists, self.trials))}

    @field_validator("space")
    @classmethod
    def _of_a_variant(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _keys_of_a_variant(value)


class Study(Section):
    """Runs on the validation classes of `tuning`, every combination of some settings. Changing it re-trains nothing."""

    variants: Annotated[list[Name], Field(min_length=1), AfterValidator(_distinct)]
    over: dict[str, Values]
    """Keys of a variant -> their values, of two keys at most several; those of a section that it does not have are
    left out."""
    seeds: Seeds
    check_epoch: Count | None = None
    """Evaluate every so many epochs; null: after the last one alone."""

    @field_validator("over")
    @classmethod
    def _of_a_variant(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(varied := _several(value)) > 2:
            raise ValueError(f"a figure shows two settings; give one value for all but two of {', '.join(varied)}")
        if taken := value.keys() & OF_THE_STUDY.keys():
            key = min(taken)
            raise ValueError(f"{key} is {OF_THE_STUDY[key]}; leave it out")
        return _keys_of_a_variant(value)

    @property
    def varied(self) -> list[str]:
        """The keys of which there are several values."""
        return _several(self.over)


def _several(over: dict[str, Any]) -> list[str]:
    return [key for key, values in over.items() if len(values) > 1]


def _keys_of_a_variant(value: dict[str, Any]) -> dict[str, Any]:
    for key in value:
        section, _, name = key.partition(".")
        if section not in SECTIONS or not name:
            raise ValueError(f"{key} is no key of a variant such as loss.scale{suggest(section, SECTIONS)}")
    return value
