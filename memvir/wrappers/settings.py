"""What stands around a loss, and its settings."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from memvir.sections import Count, Positive, Section
from memvir.wrappers import WRAPPERS

Epochs = Annotated[int, Field(ge=0, le=10**9)]


class WrapperSettings(Section):
    told_apart_by: ClassVar[tuple[str, ...]] = ()
    """What the titles of two variants say if they would be called the same."""

    warm_up_epochs: Epochs = 0
    """The plain loss is trained up to and including this epoch."""

    @property
    def numbers(self) -> str:
        return ", ".join(f"{getattr(self, name):g}" for name in self.told_apart_by)


class MemVirSettings(WrapperSettings):
    told_apart_by: ClassVar = ("num_steps", "step_gap")

    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    """N: how many past steps become virtual classes."""
    step_gap: Annotated[int, Field(ge=0, le=1_000_000)]
    """M: steps left out between two selected ones."""
    warm_up_epochs: Epochs
    """Nothing is stored or used up to and including this epoch."""
    storage_dtype: Literal["float32", "bfloat16"] = "float32"
    """How stored embeddings and proxies are kept."""


class ProxySynthesisSettings(WrapperSettings):
    told_apart_by: ClassVar = ("alpha", "mu")

    alpha: Positive = 0.4
    """Both parameters of the Beta distribution that mixes two classes: 1 is uniform, less keeps near one of them."""
    mu: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Virtual classes per embedding of the batch."""


class VirtualSoftmaxSettings(WrapperSettings):
    """It has none of its own: write `virtual_softmax: {}`."""


class BroadFaceSettings(WrapperSettings):
    told_apart_by: ClassVar = ("queue_size",)

    queue_size: Count
    """How many past embeddings are kept."""


class Wrapped(Section):
    """What may stand around a loss: one of these, or nothing."""

    memvir: MemVirSettings | None = None
    proxy_synthesis: ProxySynthesisSettings | None = None
    virtual_softmax: VirtualSoftmaxSettings | None = None
    broadface: BroadFaceSettings | None = None

    @model_validator(mode="after")
    def _one_at_most(self) -> "Wrapped":
        if len(self._chosen) > 1:
            raise ValueError(f"{' and '.join(self._chosen)} exclude each other; keep one of them")
        return self

    @property
    def _chosen(self) -> list[str]:
        return [name for name in WRAPPERS if getattr(self, name) is not None]

    @property
    def wrapper(self) -> str | None:
        """The name of what stands around the loss."""
        return next(iter(self._chosen), None)

    @property
    def wrapper_settings(self) -> WrapperSettings | None:
        return getattr(self, self.wrapper) if self.wrapper else None
