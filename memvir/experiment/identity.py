"""What a run is: everything that shapes its numbers, and nothing else.

An identity is a flat dict such as {"training.optimizer.lr": 0.006, "code.losses": "5b1f...", "weights": "none"}. Two
runs with the same identity give the same numbers; so DVC trains again when it changes, a checkpoint is continued under
the same one alone, and a result carries the one that it came from. It holds
- the run's resolved settings, without addresses, paths and what only evaluation and reports read;
- for each part of the code that computes numbers, a hash of what it does, whatever it says about that: comments,
  docstrings, annotations, formatting and the names of local variables may change;
- the hashes of the index of images and of the pretrained weights.
Processor, GPU and versions are not part of it: they are recorded beside a result (`memvir.experiment.environment`).
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memvir import losses, models, wrappers
from memvir.experiment.settings import Evaluation, Run
from memvir.files import file_hash

PACKAGE = Path(__file__).parents[1]

CODE = ("images.batches", "images.decode", "images.pixels", "models.backbone", "models.embedder", "retrieval")
LOOP = tuple(f"experiment.{module}" for module in ("data", "distributed", "history", "optimizer", "training"))
"""Modules and packages of memvir that compute what every run leaves; its backbone, loss and wrapper come to them."""
METHOD = ("losses", "memory", "foreign", "wrappers")
"""Of these a run has the file of its loss and of its wrapper, and those that they import."""
EVALUATION_CODE = (
    "experiment.evaluation",
    "experiment.space",
    "images.batches",
    "images.decode",
    "images.pixels",
    "retrieval",
)
"""Those that compute a result from what a run left."""

Identity = dict[str, Any]


def training_code(run: Run) -> list[str]:
    """The parts of the code that compute a run; a backbone or a loss wrapper that it does not use is not among them."""
    backbone = models.module_of(run.model.backbone).removeprefix("memvir.")
    library = ["models.library_network"] if "/" in run.model.backbone else []
    method = [losses.module_of(run.loss.name), *([wrappers.module_of(run.wrapper)] if run.wrapper else [])]
    return [*CODE, *LOOP, backbone, *library, *_of_the_method(method)]


def _of_the_method(modules: Iterable[str]) -> list[str]:
    """The parts that these modules are, and those that they import, directly or not."""
    waiting, parts = list(modules), set[str]()
    while waiting:
        part = waiting.pop().removeprefix("memvir.")
        files = _files(PACKAGE / part.replace(".", "/"))
        if part in parts or part.partition(".")[0] not in METHOD or not files:
            continue
        parts.add(part)
        for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return sorted(parts)


def resolved_settings(run: Run) -> dict[str, Any]:
    """A run's settings as far as they can shape a number: nothing of where files come from."""
    settings = run.model_dump(mode="json", exclude={"dataset", "variant", "seed"})
    settings["data"] = {"source": run.data.source}
    settings["model"].pop("weights")
    settings["training"].pop("portable")  # a promise, no number
    return {key: value for key, value in settings.items() if value is not None}  # wrappers that it does not have


def of_variant(run: Run, index: Path, weights: str) -> Identity:
    """The identity of a variant's runs, their seeds apart; `weights`: the sha256 of the pretrained ones, or "none"."""
    settings = resolved_settings(run)
    for only_evaluated in ("data", "evaluation"):
        settings.pop(only_evaluated)
    data = {"index": file_hash(index, "sha256"), "weights": weights}
    return flatten({**settings, **data, "code": code_hashes(training_code(run))})


def of_run(run: Run, index: Path, weights: Path | None) -> Identity:
    """The identity of a run from its files; `weights`: the pretrained ones."""
    digest = "none" if weights is None else file_hash(weights, "sha256")
    return with_seed(of_variant(run, index, digest), run.seed)


def with_seed(variant: Mapping[str, Any], seed: int) -> Identity:
    return {**variant, "seed": seed}


def of_evaluation(evaluation: Evaluation) -> Identity:
    """What a result depends on beyond its run."""
    return flatten({"evaluation": evaluation.model_dump(mode="json"), "code": code_hashes(EVALUATION_CODE)})


def code_hashes(parts: Iterable[str], package: Path = PACKAGE) -> dict[str, str]:
    """A hash of what each part's code does: part -> 16 hexadecimal digits."""
    return {part: _hash(map(_meaning, _files(package / part.replace(".", "/")))) for part in parts}


def flatten(content: Mapping[str, Any], prefix: str = "") -> Identity:
    """{"training": {"epochs": 60}} as {"training.epochs": 60}."""
    flat: Identity = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def short(identity: Mapping[str, Any]) -> str:
    """An identity in 12 hexadecimal digits, the order of its keys apart."""
    return _hash([json.dumps(identity, sort_keys=True)])[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities or environments, for a person."""
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)]


def _files(part: Path) -> list[Path]:
    """The source files of a module, or of a package and the tables that it reads."""
    module = part.with_suffix(".py")
    if module.is_file():
        return [module]
    return sorted(file for kind in ("*.py", "*.csv") for file in part.rglob(kind))


def _meaning(file: Path) -> str:
    """The content of a file as far as it matters."""
    text = file.read_text(encoding="utf-8")
    return "".join(_canonical(ast.parse(text), {})) if file.suffix == ".py" else text


def _canonical(node: Any, names: Mapping[str, str]) -> Iterator[str]:
    """A syntax tree as text, the same for every version of Python and whatever local variables are called.

    `names` maps the local variables in sight to numbers.
    """
    if isinstance(node, list):
        for item in node:
            yield from _canonical(item, names)
            yield ","
    elif isinstance(node, ast.Name):
        yield f"<{names.get(node.id, node.id)}>"
    elif isinstance(node, ast.Constant):
        yield repr(node.value)
    elif isinstance(node, ast.AST):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.Assign([node.target], node.value)
        inner = _with_locals(node, names) if isinstance(node, FUNCTIONS) else names
        yield f"({type(node).__name__}"
        for field in node._fields:
            value = getattr(node, field, None)
            if field == "body" and isinstance(value, list):
                value = [statement for statement in value if not _says_only(statement, node)]
            # what is empty is left out: newer versions of Python have fields that older ones do not know
            if field not in WITHOUT_MEANING and value not in (None, []):
                yield f" {field}="
                yield from _canonical(value, inner if field == "body" else names)
        yield ")"
    else:
        yield repr(node)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
WITHOUT_MEANING = ("annotation", "returns", "type_comment", "ctx", "simple")


def _says_only(statement: ast.stmt, place: ast.AST) -> bool:
    """Whether a statement is a docstring, or declares a variable's type (in a class it may make a field)."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is None and not isinstance(place, ast.ClassDef)
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)


def _with_locals(function: Any, names: Mapping[str, str]) -> dict[str, str]:
    """`names` as the function's body sees them: a number for each variable that it assigns.

    What others may know by its name keeps it: arguments, and whatever is bound in another way than by assignment.
    """
    assigned: dict[str, None] = {}
    kept = {argument.arg for argument in ast.walk(function.args) if isinstance(argument, ast.arg)}
    waiting: list[ast.AST] = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned[node.id] = None
        for field in ("name", "names", "asname", "rest"):  # def, class, import, global, except ... as, case ... as
            bound = getattr(node, field, None)
            kept |= {bound} if isinstance(bound, str) else {name for name in bound or () if isinstance(name, str)}
        if isinstance(node, ast.ClassDef):
            kept |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        elif not isinstance(node, FUNCTIONS):
            waiting = [*ast.iter_child_nodes(node), *waiting]
    outer = {name: number for name, number in names.items() if name not in kept}
    local = [name for name in assigned if name not in kept]
    return {**outer, **{name: f"{len(names)}.{number}" for number, name in enumerate(local)}}


def _hash(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]
