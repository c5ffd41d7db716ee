"""What the files of losses declare, read from their text: so that reading params.yaml does not import torch."""

import ast
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

from memvir.errors import UserError

GIVEN = ("self", "num_classes", "dim", "generator")  # by whoever builds a loss; the rest are its options

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "Positive": ("above 0, at most 1e9", lambda value: 0 < value <= 1e9),
    "NonNegative": ("from 0 to 1e9", lambda value: 0 <= value <= 1e9),
    "Fraction": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "Angle": ("in radians, from 0 to below pi", lambda value: 0 <= value < math.pi),
}
"""What the types of `memvir.sections` that losses' options have allow, for programs, which need not have pydantic."""


@dataclass(frozen=True)
class Option:
    annotation: str
    """As it is written, such as `Positive`: a type of `memvir.sections`."""
    required: bool

    @property
    def is_number(self) -> bool:
        return not self.annotation.startswith(("Literal", "bool", "str"))


@dataclass(frozen=True)
class Declaration:
    """A loss's `display_name`, and the options that its constructor and those that it passes `**kwargs` on to take."""

    display_name: str
    options: dict[str, Option]


def declaration(path: str) -> Declaration:
    """What `module:Class` declares, without importing it. A loss that another builds on counts by its own file."""
    module, _, name = path.partition(":")
    tree = _parsed(module)
    home = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    local = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in local:
        raise UserError(f"{module} has no class {name}; name the file that it is written in")
    display_name, options, passes_on = name, {}, True
    for node in local[name].body:
        match node:
            case ast.Assign(targets=[ast.Name("display_name")], value=ast.Constant(str(text))):
                display_name = text
            case ast.FunctionDef("__init__", args=arguments):
                options, passes_on = _options(arguments), arguments.kwarg is not None
    if passes_on:
        for base in (base.id for base in local[name].bases if isinstance(base, ast.Name)):
            if base in local or home.get(base, "").startswith("memvir.losses"):
                options |= declaration(f"{module}:{base}" if base in local else home[base]).options
    return Declaration(display_name, options)


def _options(arguments: ast.arguments) -> dict[str, Option]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [a for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return {
        argument.arg: Option(_written(argument.annotation), argument in required)
        for argument in [*positional, *arguments.kwonlyargs]
        if argument.arg not in GIVEN
    }


def _written(annotation: ast.expr | None) -> str:
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return annotation.value
    return "float" if annotation is None else ast.unparse(annotation)


def _parsed(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    source = getattr(spec and spec.loader, "get_source", lambda name: None)(module)
    if source is None:
        raise UserError(f"{module}: there is no such module of Python code")
    return ast.parse(source)
