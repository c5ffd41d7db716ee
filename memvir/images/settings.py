"""How an image becomes a network input."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from memvir.sections import Fraction, Positive, Section, Side, pair


class Affine(Section):
    """Random affine augmentation of whole batches on the device; for small images that stay resident in memory."""

    kind: Literal["affine"]
    rotate: Annotated[float, Field(ge=0, le=180)]
    """Largest rotation in degrees, either way."""
    scale: tuple[Positive, Positive]
    """Range of the zoom factor."""
    shear: Annotated[float, Field(ge=0, le=80)]
    """Largest horizontal shear in degrees, either way."""
    shift: Fraction
    """Largest shift as a share of the image's side, in both directions."""
    flip: Fraction = 0.0
    """Probability of a horizontal flip."""

    @field_validator("scale", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        return pair(value)


class RandomResizedCrop(Section):
    """Random area and aspect ratio, resized to `images.size`, then a horizontal flip; runs in the loader's workers."""

    kind: Literal["random_resized_crop"]
    scale: tuple[Positive, Positive]
    """Range of the crop's area as a share of the image's."""
    ratio: tuple[Positive, Positive]
    """Range of the crop's aspect ratio, width over height."""
    flip: Fraction
    """Probability of a horizontal flip."""

    @field_validator("scale", "ratio", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        return pair(value)


class TestTransform(Section):
    """The deterministic crop of a test image (bilinear, antialiased)."""

    resize: Side
    """Length of the shorter side after resizing, in pixels."""


LEFT_TO_THE_BACKBONE = (("size", "test"), ("channels", "value_range", "mean", "std"))
"""Keys of `Images` that a recipe may leave out, each group as a whole: they are then as its backbone wants them.
Interpolation is bilinear in any case."""


class Images(Section):
    size: Side
    """Side of the square network input, in pixels; the test crop has it too."""
    channels: Literal["grey", "rgb", "bgr"]
    """BN-Inception's ImageNet weights expect bgr, those of timm and torchvision rgb."""
    value_range: Literal[1, 255]
    """Pixel values run from 0 to this before the mean is subtracted."""
    mean: list[float]
    """Subtracted, one number per channel in the order of `channels`."""
    std: list[Positive]
    """Divided by, one number per channel."""
    train: Annotated[Affine | RandomResizedCrop, Field(discriminator="kind")]
    test: TestTransform

    @model_validator(mode="after")
    def _consistent(self) -> "Images":
        expected = 1 if self.channels == "grey" else 3
        for key in ("mean", "std"):
            if len(getattr(self, key)) != expected:
                raise ValueError(f"{key} needs {expected} number(s) for channels: {self.channels}")
        if self.test.resize < self.size:
            raise ValueError(f"test.resize ({self.test.resize}) must not be smaller than size ({self.size})")
        return self
