"""What every part of params.yaml is made of: frozen, validated sections whose errors are one line that names the key.

Each room of the package declares the settings of what it holds, in a file `settings.py`; a field is documented where it
is declared. Nothing here or there imports torch, so that a stage which only makes tables starts quickly.
"""

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any

from memvir.errors import UserError
from memvir.extras import require

require("experiment", "pydantic")

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError  # noqa: E402


def _radians(value: float) -> float:
    if not 0 <= value < math.pi:
        raise ValueError(f"expected an angle in radians, from 0 to below pi, found {value}")
    return value


Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Angle = Annotated[float, AfterValidator(_radians)]
Side = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=64)]


def user_path(value: Any) -> Path:
    """A path as a person writes it, `~` and `~name` included. Raises UserError if it is none."""
    if not isinstance(value, (str, Path)) or not str(value).strip() or "\0" in str(value):
        raise UserError(f"expected a path, found {describe(value)}")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise UserError(f"{value}: there is no such user, or no home folder; write the whole path") from None


UserPath = Annotated[Path, BeforeValidator(user_path)]


class Section(BaseModel):
    """A part of params.yaml: frozen, strictly typed, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def validate(section: type[Section], raw: Any, prefix: str) -> Any:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, raw, prefix)) from None
    except RecursionError:
        raise UserError(f"{prefix or 'params'}: nested too deeply") from None


def _one_line(error: ValidationError, raw: Any, prefix: str) -> str:
    first, *others = error.errors(include_url=False)
    key = _key_of(first, raw, prefix)
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{suggest(str(first['loc'][-1]), _field_names())}"
    if first["type"] == "union_tag_invalid":
        tag, choices = (first["ctx"][name].replace("'", "") for name in ("discriminator", "expected_tags"))
        return f"{key}.{tag}: expected one of {choices}, found {describe(first['input'].get(tag))}"
    if first["type"] == "missing":
        return f"{key}: missing"
    # of a union every member says what it expects
    same = [first, *(other for other in others if _key_of(other, raw, prefix) == key)]
    message = ", or ".join(
        text[:1].lower() + text[1:] for text in dict.fromkeys(one["msg"].removeprefix("Value error, ") for one in same)
    )
    if isinstance(first["input"], dict) or first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message}, found {describe(first['input'])}"


def _key_of(error: Any, raw: Any, prefix: str) -> str:
    """What the file calls the place of one of pydantic's errors: glyphs.training.epochs."""
    keys: list[str] = [prefix] if prefix else []
    place = raw
    for position, part in enumerate(error["loc"]):
        found = isinstance(place, dict) and part in place
        found = found or (isinstance(place, (list, tuple)) and isinstance(part, int) and part < len(place))
        if found:
            place = place[part]
        elif position < len(error["loc"]) - 1 or error["type"] != "missing":
            continue  # the name of a union's member, or pydantic's "[key]", which are not keys of the file
        if keys or (position, part) != (0, "recipes"):  # a level that the file does not have
            keys.append(key_name(part))
    return ".".join(keys) or "params"


def _field_names(section: type[Section] = Section) -> set[str]:
    """Every key that some section knows, to guess what a misspelt one was meant to be."""
    return set(section.model_fields).union(*map(_field_names, section.__subclasses__()))


def suggest(key: str, choices: Any) -> str:
    close = difflib.get_close_matches(key, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def key_name(part: Any) -> str:
    return part if isinstance(part, str) and re.fullmatch(r"[\w-]{1,64}", part) else describe(part)


def describe(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value)) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def pair(value: Any) -> Any:
    """YAML has no tuples: let a list of two increasing numbers stand for a range."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("expected a range of two numbers, [smallest, largest]")
    if all(isinstance(v, (int, float)) for v in value) and value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is the wrong way round")
    return tuple(value)
