"""The proxy losses' names and options, apart from their code so that reading params.yaml does not import torch."""

from memvir.errors import UserError

DISPLAY_NAMES = {
    "norm_softmax": "Norm-SoftMax",
    "proxy_nca": "Proxy-NCA",
    "softmax": "SoftMax",
    "cosface": "CosFace",
    "arcface": "ArcFace",
    "proxy_anchor": "Proxy-Anchor",
}

OPTIONS: dict[str, tuple[str, ...]] = {
    "norm_softmax": ("scale",),
    "proxy_nca": ("scale",),
    "softmax": (),
    "cosface": ("scale", "margin"),
    "arcface": ("scale", "margin"),
    "proxy_anchor": ("alpha", "delta"),
}


def canonical_name(name: str) -> str:
    """`norm_softmax` for Norm_SoftMax, NormSoftmax, "norm softmax", ...: case and separators are ignored.

    Raises UserError listing the losses there are.
    """
    folded = "".join(character for character in name.casefold() if character.isalnum())
    for canonical in DISPLAY_NAMES:
        if canonical.replace("_", "") == folded:
            return canonical
    raise UserError(f"unknown loss {name!r}; there are: {', '.join(DISPLAY_NAMES.values())}")
