"""A proxy loss and its options."""

import functools
import typing
from typing import Any

from pydantic import ConfigDict, create_model, field_validator, model_validator

from memvir import sections
from memvir.errors import UserError
from memvir.losses import DECLARATIONS, canonical_name
from memvir.sections import Section, key_name, suggest


class Loss(Section):
    """Besides the name: what the loss's constructor takes, as its file declares it. Null: the loss's own default."""

    model_config = ConfigDict(extra="allow")

    name: str
    """A proxy loss; every spelling of its name is accepted."""

    @field_validator("name")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return canonical_name(value)

    @model_validator(mode="before")
    @classmethod
    def _checked_options(cls, raw: Any) -> Any:
        try:
            name = canonical_name(raw["name"])
        except (TypeError, KeyError, UserError):
            return raw  # which the fields complain about
        given = {key: value for key, value in raw.items() if key != "name" and value is not None}
        known = DECLARATIONS[name].options
        for option in given:
            if option not in known:
                close = suggest(str(option), known)
                raise ValueError(f"{key_name(option)} is not an option of {name} ({', '.join(known)}){close}")
        return {"name": name, **_options_of(name).model_validate(given).model_dump(exclude_none=True)}

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


@functools.cache
def _options_of(name: str) -> type[Section]:
    """The options of a loss as a section, in which pydantic gives the names of their types a meaning."""
    fields: dict[str, Any] = {
        option: (it.annotation, ...) if it.required else (f"{it.annotation} | None", None)
        for option, it in DECLARATIONS[name].options.items()
    }
    options = create_model(f"OptionsOf_{name}", __base__=Section, **fields)
    options.model_rebuild(_types_namespace={**vars(typing), **vars(sections)})
    return options
