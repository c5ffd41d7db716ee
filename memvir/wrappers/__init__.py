"""What can stand around a proxy loss: ways of making virtual classes, or of using memory, one file each.

A new wrapper takes a file with a `LossWrapper`, a line in `WRAPPERS` and its settings in `settings.py`. Nothing here
imports torch before it is used.
"""

import pkgutil
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from memvir.wrappers.broadface import BroadFace
    from memvir.wrappers.proxy_synthesis import ProxySynthesis
    from memvir.wrappers.virtual_softmax import VirtualSoftmax
    from memvir.wrappers.wrapper import LossWrapper

__all__ = ["WRAPPERS", "BroadFace", "LossWrapper", "ProxySynthesis", "VirtualSoftmax", "module_of", "wrap"]


class Wrapper(NamedTuple):
    title: str
    paper: str
    path: str
    """`module:Class`; it is called with the loss and the settings."""


WRAPPERS = {
    "memvir": Wrapper("MemVir", "Ko, Gu, Kim, ICCV 2021", "memvir.memory:MemVir"),
    "proxy_synthesis": Wrapper(
        "Proxy Synthesis", "Gu, Ko, Kim, AAAI 2021", "memvir.wrappers.proxy_synthesis:ProxySynthesis"
    ),
    "virtual_softmax": Wrapper(
        "Virtual Softmax", "Chen, Deng, Shen, NeurIPS 2018", "memvir.wrappers.virtual_softmax:VirtualSoftmax"
    ),
    "broadface": Wrapper("BroadFace", "Kim, Park, Shin, ECCV 2020", "memvir.wrappers.broadface:BroadFace"),
}
"""The keys of a variant that name what stands around its loss."""


def module_of(name: str) -> str:
    """The module that a wrapper's class is in, without importing it."""
    return WRAPPERS[name].path.partition(":")[0]


def wrap(loss: "nn.Module", name: str, **settings: Any) -> "LossWrapper":
    """The loss within a wrapper. Raises UserError if it does not take that loss, or such settings."""
    return pkgutil.resolve_name(WRAPPERS[name].path)(loss, **settings)


_LAZY = {wrapper.path.rpartition(":")[2]: wrapper.path for wrapper in WRAPPERS.values()} | {
    "LossWrapper": "memvir.wrappers.wrapper:LossWrapper",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pkgutil.resolve_name(_LAZY[name])
