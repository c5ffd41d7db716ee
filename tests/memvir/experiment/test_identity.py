"""What a run's identity notices of the code, and what it does not."""

import ast
import textwrap
from pathlib import Path

import pytest

from memvir.experiment import identity
from memvir.params import parse_params
from tests import tiny

BEFORE = '''
"""A module."""

import math
from dataclasses import dataclass

SCALE = 23.0


@dataclass
class Point:
    """A point."""

    x: float
    y: float = 1.0


def length(point, scale=SCALE):
    """Its length."""
    total = point.x * point.x  # a comment
    for other in (point.y,):
        total += other * other
    try:
        root = [math.sqrt(part) for part in (total,)]
    except ValueError as error:
        raise RuntimeError(f"no length: {error}") from None

    def scaled(factor):
        product = root[0] * factor
        return product

    return scaled(scale)
'''

WITHOUT_EFFECT = {
    "a comment": ("# a comment", "# another one"),
    "a docstring of a function": ('"""Its length."""', '"""How long it is, in metres."""'),
    "a docstring of the module": ('"""A module."""', ""),
    "a docstring of a class": ('    """A point."""\n', ""),
    "an annotation of an argument": ("scale=SCALE", "scale: float = SCALE"),
    "a return annotation": ("(point, scale=SCALE):", "(point, scale=SCALE) -> float:"),
    "an annotation of a variable": ("total = point.x", "total: float = point.x"),
    "a type declared ahead": ("    total = point.x", "    total: float\n    total = point.x"),
    "an annotation changed": ("x: float", "x: int"),
    "formatting": ("(point.y,)", "(\n        point.y,\n    )"),
    "another spelling of a number": ("23.0", "2.3e1"),
    "other quotes": ('f"no length: {error}"', "f'no length: {error}'"),
    "the name of a local variable": ("total", "sum_of_squares"),
    "the name of a loop's variable": ("other", "coordinate"),
    "the name of a variable that an inner function reads": ("root", "roots"),
    "the name of an inner function's variable": ("product", "result"),
}
WITH_EFFECT = {
    "a number": ("23.0", "24.0"),
    "an operator": ("total += other", "total -= other"),
    "the order of factors": ("root[0] * factor", "factor * root[0]"),
    "a default": ("y: float = 1.0", "y: float = 2.0"),
    "the order of a dataclass's fields": ("    x: float\n    y: float = 1.0", "    y: float = 1.0\n    x: float"),
    "an argument's name": ("scaled(factor)", "scaled(other)"),
    "a function called": ("math.sqrt", "math.cbrt"),
    "a statement taken away": ("    total = point.x * point.x", "    total = 0"),
    "another variable read": ("return scaled(scale)", "return scaled(total)"),
    "two variables swapped": ("root[0] * factor", "total * factor"),
    "a text that a program may read": ("no length", "without length"),
}


def meaning(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / "module.py").write_text(textwrap.dedent(text))
    return identity.code_hashes(["module"], tmp_path)


def change(replacement: tuple[str, str]) -> str:
    assert BEFORE.count(replacement[0]) >= 1
    return BEFORE.replace(*replacement)


@pytest.mark.parametrize("replacement", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_what_only_speaks_to_people_changes_nothing(tmp_path, replacement):
    assert meaning(tmp_path, change(replacement)) == meaning(tmp_path, BEFORE)


@pytest.mark.parametrize("replacement", WITH_EFFECT.values(), ids=WITH_EFFECT)
def test_what_computes_otherwise_is_another_code(tmp_path, replacement):
    assert meaning(tmp_path, change(replacement)) != meaning(tmp_path, BEFORE)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # names that are bound in another way than by assignment are not renamed, or these two would look alike
        ("def f():\n e = 1\n try: g()\n except E as e: h(e)", "def f():\n d = 1\n try: g()\n except E as e: h(d)"),
        ("def f():\n x = 1\n def g(a=x): x = 2", "def f():\n x = 1\n def g(a=y): y = 2"),
        ("x = y = 0\ndef f(a=x): x = 1", "x = y = 0\ndef f(a=y): y = 1"),
        ("def f():\n x = 1\n class A: x = 2", "def f():\n y = 1\n class A: y = 2"),
        ("def f():\n global x\n x = 1", "def f():\n global y\n y = 1"),
        ("def f():\n x = 1\n return lambda x: x", "def f():\n x = 1\n return lambda y: x"),
        ("def f():\n import a as x\n x = x.b", "def f():\n import a as y\n y = y.b"),
        ("def f(a):\n match a:\n  case [x]: x = x + 1", "def f(a):\n match a:\n  case [y]: y = x + 1"),
        ("class A(B):\n a: int", "class A(B):\n b: int"),
    ],
)
def test_two_programs_that_differ_are_told_apart(tmp_path, one, other):
    assert meaning(tmp_path, one) != meaning(tmp_path, other)


@pytest.mark.parametrize("backbone", ["convnet", "bn_inception", "timm/resnet18", "torchvision/resnet18"])
def test_every_part_of_the_code_that_computes_a_run_is_there_and_has_a_hash(backbone):
    run = parse_params(tiny.params()).run("tiny", "memvir_norm_softmax", 1)
    run = run.model_copy(update={"model": run.model.model_copy(update={"backbone": backbone})})
    parts = identity.training_code(run)
    assert len(set(identity.code_hashes(parts).values())) == len(set(parts)) == len(parts)


def test_what_training_imports_is_part_of_the_identity_or_computes_nothing():
    """A module that shapes numbers and is on neither list would let stale results pass for new ones."""
    run = parse_params(tiny.params()).run("tiny", "memvir_norm_softmax", 1)
    known = {f"memvir.{part}" for part in identity.training_code(run)}
    seen, waiting = set(), ["memvir.experiment.training"]
    while waiting:
        module = waiting.pop()
        seen.add(module)
        for node in ast.walk(ast.parse(source_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("memvir"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found = [name for name in names if source_of(name).exists()]
                waiting += [name for name in found or [node.module] if name not in seen]
    within = {module for module in seen if any(f"{module}.".startswith(f"{part}.") for part in known)}
    assert seen - within == {f"memvir.{name}" for name in COMPUTE_NOTHING}


def source_of(module: str) -> Path:
    """The file of a module or of a package; of anything else, one that does not exist."""
    place = identity.PACKAGE.parent / module.replace(".", "/")
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


COMPUTE_NOTHING = {
    "download",
    "errors",
    "experiment.checkpoint",
    "experiment.identity",
    "experiment.lock",
    "experiment.environment",
    "experiment.gpu_errors",
    "experiment.paths",
    "experiment.search_space",
    "experiment.settings",  # what it and the others resolve is in the identity
    "experiment.tensorboard",
    "experiment.watch",
    "extras",
    "files",
    "images.index",  # what it reads is in the identity
    "images.settings",
    "images.sources",
    "images.sources.source",
    "images.store_size",
    "libraries",  # golden bits tell
    "losses",
    "losses.arcface",  # losses of other runs
    "losses.cosface",
    "losses.declarations",
    "losses.proxy_anchor",
    "losses.proxy_nca",
    "losses.settings",
    "losses.softmax",
    "models",
    "models.bn_inception",  # backbones of other runs
    "models.library_network",
    "models.timm_networks",
    "models.settings",
    "models.torchvision_networks",
    "models.weights",  # what it loads is in the identity
    "progress",
    "sections",
    "signals",
    "wrappers",
    "wrappers.broadface",  # wrappers of other runs
    "wrappers.proxy_synthesis",
    "wrappers.settings",
    "wrappers.virtual_softmax",
}


def test_of_the_losses_a_run_has_its_own_and_what_that_builds_on(tmp_path, monkeypatch):
    run = parse_params(tiny.params()).run("tiny", "norm_softmax", 1)
    parts = {part for part in identity.training_code(run) if part.startswith(("losses", "memory", "foreign"))}
    shared = {"losses.checks", "losses.cross_entropy", "losses.logsumexp", "losses.products", "losses.proxy_loss"}
    assert parts == {"losses.norm_softmax", *shared}
    (tmp_path / "losses").mkdir()
    (tmp_path / "losses" / "norm_softmax.py").write_text("from memvir.losses.cosface import CosFace\nimport torch")
    (tmp_path / "losses" / "cosface.py").write_text("import memvir.losses.shared\nfrom memvir.errors import UserError")
    (tmp_path / "losses" / "shared.py").write_text("from memvir.losses import cosface, softmax")
    (tmp_path / "losses" / "softmax.py").touch()
    monkeypatch.setattr(identity, "PACKAGE", tmp_path)
    parts = {part for part in identity.training_code(run) if part.startswith("losses.")}
    assert parts == {"losses.norm_softmax", "losses.cosface", "losses.shared", "losses.softmax"}


@pytest.mark.parametrize("wrapper", ["proxy_synthesis", "virtual_softmax", "broadface"])
def test_of_the_wrappers_a_run_has_its_own_alone(wrapper):
    raw = tiny.params()
    settings = {"queue_size": 3} if wrapper == "broadface" else {}
    raw["tiny"]["variants"]["mine"] = {"loss": {"name": "softmax"}, wrapper: settings}
    run = parse_params(raw).run("tiny", "mine", 1)
    parts = {part for part in identity.training_code(run) if part.startswith(("wrappers", "memory", "foreign"))}
    assert parts == {f"wrappers.{wrapper}", "wrappers.wrapper"}
    resolved = identity.flatten(identity.resolved_settings(run))
    assert resolved[f"{wrapper}.warm_up_epochs"] == 0
    assert not any(key.startswith("memvir") for key in resolved)


def test_a_table_beside_the_code_belongs_to_it(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "layers.csv").write_text("1,2\n")
    before = identity.code_hashes(["part"], tmp_path)
    (tmp_path / "part" / "layers.csv").write_text("1,3\n")
    assert identity.code_hashes(["part"], tmp_path) != before


def test_an_identity_does_not_depend_on_the_order_of_its_keys():
    one, other = ({"a": 1, "b": {"c": 2, "d": None}}, {"b": {"d": None, "c": 2}, "a": 1})
    assert identity.short(identity.flatten(one)) == identity.short(identity.flatten(other))
    assert identity.differences(identity.flatten(one), identity.flatten({"a": 1, "b": {"c": 3, "d": None}})) == [
        "b.c: 2 -> 3"
    ]
