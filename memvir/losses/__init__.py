"""Proxy losses for deep metric learning: one file each, whose code shows its formula.

A new loss takes a file with a `ProxyLoss` and a line in `LOSSES`; what its constructor takes besides `num_classes` and
`dim` are its options in params.yaml too. Nothing here imports torch before it is used: settings know the losses by name
in no time.
"""

import math
import pkgutil
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from memvir.errors import UserError
from memvir.losses.declarations import RANGES, declaration

if TYPE_CHECKING:
    from memvir.losses.arcface import ArcFace
    from memvir.losses.checks import FiniteRows, checked_labels
    from memvir.losses.cosface import CosFace
    from memvir.losses.cross_entropy import CrossEntropyLoss
    from memvir.losses.norm_softmax import NormSoftMax
    from memvir.losses.proxy_anchor import ProxyAnchor
    from memvir.losses.proxy_loss import ProxyLoss
    from memvir.losses.proxy_nca import ProxyNCA
    from memvir.losses.softmax import SoftMax

__all__ = [
    "DISPLAY_NAMES",
    "LOSSES",
    "ArcFace",
    "CosFace",
    "CrossEntropyLoss",
    "FiniteRows",
    "NormSoftMax",
    "ProxyAnchor",
    "ProxyLoss",
    "ProxyNCA",
    "SoftMax",
    "build_loss",
    "canonical_name",
    "checked_labels",
    "loss_class",
]

LOSSES = {
    "norm_softmax": "memvir.losses.norm_softmax:NormSoftMax",
    "proxy_nca": "memvir.losses.proxy_nca:ProxyNCA",
    "softmax": "memvir.losses.softmax:SoftMax",
    "cosface": "memvir.losses.cosface:CosFace",
    "arcface": "memvir.losses.arcface:ArcFace",
    "proxy_anchor": "memvir.losses.proxy_anchor:ProxyAnchor",
}
"""What `loss.name` can be -> its class."""

DECLARATIONS = {name: declaration(path) for name, path in LOSSES.items()}
DISPLAY_NAMES = {name: declared.display_name for name, declared in DECLARATIONS.items()}


def canonical_name(name: str) -> str:
    """`norm_softmax` for Norm_SoftMax, NormSoftmax, "norm softmax", ...: case and separators are ignored.

    Raises UserError listing the losses there are.
    """
    folded = _folded(name) if isinstance(name, str) else ""
    for canonical in LOSSES:
        if _folded(canonical) == folded:
            return canonical
    raise UserError(f"unknown loss {name!r}; there are: {', '.join(DISPLAY_NAMES.values())}")


def _folded(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def module_of(name: str) -> str:
    """The module that a loss's class is in, without importing it."""
    return LOSSES[canonical_name(name)].partition(":")[0]


def loss_class(name: str) -> "type[ProxyLoss]":
    return pkgutil.resolve_name(LOSSES[canonical_name(name)])


def build_loss(name: str, num_classes: int, dim: int, **options: Any) -> "ProxyLoss":
    """A loss over `num_classes` proxies of `dim` numbers each; case and separators in its name are ignored.

    Options are the loss's own (such as `scale`, `margin`, `alpha`, `delta`), `initialisation` of the proxies, and
    `generator` for it. Raises UserError for a loss or an option that there is not, and a number out of its range.
    """
    declared = DECLARATIONS[canonical_name(name)]
    for option, value in options.items():
        if option == "generator":
            continue
        if option not in declared.options:
            raise UserError(f"{declared.display_name} has no option {option!r}; it has: {', '.join(declared.options)}")
        if not declared.options[option].is_number:
            continue
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{declared.display_name}: {option} must be a number, not {value!r}")
        described, allowed = RANGES.get(declared.options[option].annotation, ("", lambda value: True))
        if not allowed(value):
            raise UserError(f"{declared.display_name}: {option} must be {described}, not {value}")
        options[option] = int(value) if isinstance(value, Integral) else float(value)  # numpy's too
    return loss_class(name)(num_classes, dim, **options)


_LAZY = {path.rpartition(":")[2]: path for path in LOSSES.values()} | {
    "CrossEntropyLoss": "memvir.losses.cross_entropy:CrossEntropyLoss",
    "FiniteRows": "memvir.losses.checks:FiniteRows",
    "ProxyLoss": "memvir.losses.proxy_loss:ProxyLoss",
    "checked_labels": "memvir.losses.checks:checked_labels",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_LAZY[name])
