"""A recipe: all that shapes the numbers of one data set, its variants, and what a run of them takes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from memvir.errors import UserError
from memvir.experiment.search_space import Study, Tuning
from memvir.images.settings import LEFT_TO_THE_BACKBONE, Images
from memvir.images.sources import Data
from memvir.losses import DISPLAY_NAMES
from memvir.losses.settings import Loss
from memvir.models import backbone_class, canonical_backbone
from memvir.models.settings import Model
from memvir.sections import Count, Name, NonNegative, Positive, Section, Seed, UserPath, validate
from memvir.wrappers import WRAPPERS
from memvir.wrappers.settings import Wrapped

TSNE_VARIANT = "tsne"
"""The variant that the figure of embeddings by step is made of; dvc.yaml trains it once, by a stage of its own."""


class Optimizer(Section):
    name: Literal["adam", "adamw", "rmsprop", "sgd"]
    lr: Positive
    """Learning rate of the backbone and the embedding layer."""
    lr_proxies: Positive
    """Learning rate of the class proxies."""
    weight_decay: NonNegative
    """On every parameter, proxies included."""
    eps: Positive = 1e-8
    """Adam, AdamW and RMSprop: added to the denominator. The paper's Adam uses 0.01."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD and RMSprop."""


class LrDecay(Section):
    epochs: list[Count]
    """Epochs (from 1) at whose start the learning rates are multiplied by `factor`; empty for none."""
    factor: Annotated[float, Field(gt=0, le=1)] = 0.1


class Training(Section):
    epochs: Count
    check_epoch: Count
    """Evaluate every so many epochs; the last epoch is always evaluated."""
    batch_size: Count
    """B; the last batch of an epoch is smaller, nothing is dropped."""
    images_per_class: Annotated[int, Field(ge=1, le=4096)] = 1
    """1: plain shuffling. More: class-balanced batches with so many of each class (the original's n_instance)."""
    optimizer: Optimizer
    lr_decay: LrDecay
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Mixed precision of backbone and embedding layer; fp16 scales the loss. The loss itself is always fp32."""
    early_stopping: Count | None = None
    """Stop after so many evaluations without a better Recall@1; null: never. With MemVir, or what else stands around
    the loss, they count from when it is in use."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    """CPU threads of a run. It changes the order of floating-point sums, so it belongs to the recipe."""
    portable: bool = False
    """A promise, on a CPU: the same bytes on every x86-64 processor with AVX2. What is not known to keep it is refused.
    It changes no number."""

    @model_validator(mode="after")
    def _keeps_promise(self) -> "Training":
        if self.portable and (self.optimizer.name == "rmsprop" or self.precision != "fp32"):
            raise ValueError("portable: rmsprop and half precision compute other last digits elsewhere; write false")
        return self

    @model_validator(mode="after")
    def _divisible(self) -> "Training":
        if self.batch_size % self.images_per_class:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of images_per_class ({self.images_per_class})"
            )
        return self


class Evaluation(Section):
    recall_at: Annotated[list[Count], Field(min_length=1, max_length=16)]
    """The k of Recall@k; 1 must be among them."""
    nmi: bool = False
    """Also the normalised mutual information of a k-means clustering."""

    @field_validator("recall_at")
    @classmethod
    def _sorted(cls, value: list[int]) -> list[int]:
        if 1 not in value or sorted(set(value)) != value:
            raise ValueError("recall_at must be increasing and hold 1")
        return value


class Variant(Wrapped):
    loss: Loss
    """That of `control_of`, for a control."""
    training: dict[str, Any] = {}
    """Keys of the recipe's `training` that this variant sets otherwise."""
    snapshots: list[Count] = []
    """Epochs at whose end the batches and proxies in use are recorded for the t-SNE figure."""
    origin: Literal["published", "tuned", "untuned"] = "untuned"
    """Where the settings come from: a publication, a search on validation classes (`tuning`), or neither."""
    control_of: Name | None = None
    """A control is the plain loss of this variant, under the settings that were chosen for it: what they do alone."""

    @property
    def display_name(self) -> str:
        """As the tables call it: "Norm-SoftMax", "MemVir + Norm-SoftMax", "Norm-SoftMax (control)"."""
        plain = DISPLAY_NAMES[self.loss.name]
        wrapped = f"{WRAPPERS[self.wrapper].title} + {plain}" if self.wrapper else plain
        return f"{plain} (control)" if self.control_of else wrapped


class Resources(Section):
    """What one run takes of a machine when `stages.sweep` runs several at once. Changing it re-runs nothing."""

    cpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Cores: training threads and loader workers together."""
    gpus: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """GPUs; a fraction lets several runs share one, and `runtime.processes` GPUs serve one run together."""


PORTABLE_SUMS = (12, 128)
"""Columns and terms of products that every processor adds up in the same order: see `memvir.losses.products`."""


class Recipe(Section):
    """All that shapes the numbers of one data set."""

    data: Data
    images: Images
    model: Model
    training: Training
    evaluation: Evaluation
    resources: Resources = Resources()
    tuning: Tuning | None = None
    """The search that `python -m stages.tune` makes."""
    studies: dict[Name, Study] = {}
    """What `python -m stages.study` makes, for figures: no table and no other run depends on it."""
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _preprocessing(cls, raw: Any) -> Any:
        """Put what `images` leaves out as the backbone wants it, so that settings hold every number.

        A recipe that names them all is read without importing the backbone's library, which takes seconds.
        """
        images, model = (raw.get(key) if isinstance(raw, dict) else None for key in ("images", "model"))
        backbone = model.get("backbone") if isinstance(model, dict) else None
        if not isinstance(images, dict) or not isinstance(backbone, str):
            return raw
        left_out = [key for group in LEFT_TO_THE_BACKBONE if not set(group) & images.keys() for key in group]
        if left_out:
            try:
                name = canonical_backbone(backbone)
            except UserError as error:
                raise UserError(f"model.backbone: {error}") from None
            wanted = backbone_class(name).preprocessing(name)
            return {**raw, "images": {key: wanted[key] for key in left_out if key in wanted} | images}
        return raw

    @field_validator("variants", mode="before")
    @classmethod
    def _controls(cls, variants: Any) -> Any:
        """Give every control the loss and the training of the variant that it belongs to."""
        if not isinstance(variants, dict):
            return variants
        return {name: _control(variants, name) for name in variants}

    def baseline_of(self, variant: str) -> str | None:
        """What a variant with a wrapper, or a control, is compared with: the first plain variant of the same loss.

        One of the same options goes first.
        """
        chosen = self.variants[variant]
        if is_plain(chosen):
            return None
        plain = [name for name, v in self.variants.items() if is_plain(v) and v.loss.name == chosen.loss.name]
        return min(plain, key=lambda name: self.variants[name].loss != chosen.loss, default=None)

    def control_of(self, variant: str) -> str | None:
        """The control of a variant, if the recipe has one."""
        return next((name for name, other in self.variants.items() if other.control_of == variant), None)


def is_plain(variant: Variant) -> bool:
    return variant.wrapper is None and variant.control_of is None


def _control(variants: Mapping[str, Any], name: str) -> Any:
    """A variant as it is written, and a control with what it takes over."""
    raw = variants[name]
    if not isinstance(raw, dict) or raw.get("control_of") is None:
        return raw
    subject = variants.get(str(raw["control_of"]))
    wrapped = isinstance(subject, dict) and any(subject.get(wrapper) is not None for wrapper in WRAPPERS)
    if not isinstance(subject, dict) or subject.get("control_of") is not None or not wrapped:
        raise ValueError(f"{name}.control_of: {raw['control_of']} is no variant with memvir or its like; name one")
    own = sorted(raw.keys() - {"control_of"})
    if own:
        raise ValueError(f"{name}.{own[0]}: a control has nothing of its own but control_of; leave it out")
    return {**{key: subject[key] for key in ("loss", "training", "origin") if key in subject}, **raw}


class Runtime(Section):
    """Speed and comfort. No stage declares these: changing them re-runs nothing."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|meta)$")] = "auto"
    """auto: the first GPU if there is one, else the CPU."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    """Loader processes for recipes with random_resized_crop; results do not depend on it."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """auto: a bar on a terminal, plain lines elsewhere."""
    scratch: UserPath = Path("scratch")
    """Folder of decoded pixels and checkpoints; may be deleted at any time between runs."""
    pixel_store: bool = True
    """Decode the images once into `scratch` instead of at every epoch."""
    pixel_gigabytes: NonNegative = 20.0
    """Images that would take more, such as SOP's for training, are decoded at every epoch all the same."""
    checkpoint_epochs: Count = 10
    """Write a checkpoint at least every so many epochs ..."""
    checkpoint_minutes: Positive = 10.0
    """... and at the end of an epoch once so many minutes have passed."""
    checkpoint_gigabytes: NonNegative = 20.0
    """Room for states of earlier settings and finished runs, which later ones may go on from; the oldest go first."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """GPUs of one run, each with a share of every batch. Changes results in the last digits."""
    deterministic: bool = True
    """Only deterministic GPU kernels: bit-identical runs, at a cost in speed that depends on GPU and network."""
    tf32: bool = False
    """Allow TF32 on GPUs: faster matrix products with 10-bit mantissas. Changes results in the last digits."""
    compile: bool = False
    """torch.compile the embedder. Changes results in the last digits."""
    channels_last: bool = True
    """Memory format of images and convolutions, the faster one with colour images; not where training is `portable`."""


class Run(Wrapped):
    """One training run: the recipe with the variant's own settings applied."""

    dataset: str
    variant: str
    seed: Seed
    data: Data
    images: Images
    model: Model
    training: Training
    evaluation: Evaluation
    loss: Loss
    snapshots: list[int]

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.variant}/{self.seed}"


def keeps_promise(run: Run, where: str) -> Run:
    """The run. Raises UserError, naming `where`, if it is to be portable and is not known to be."""
    if not run.training.portable:
        return run
    if run.model.backbone != "convnet":
        raise UserError(f"{where}.training.portable: only shown for convnet, not for {run.model.backbone}; write false")
    # of the embedding layer's sums: see memvir/losses/products.py, which makes the others
    sums = {"batch_size": run.training.batch_size, "the last width": run.model.widths[-1]}
    least, most = PORTABLE_SUMS
    for name, number in {**sums, "embedding_dim": run.model.embedding_dim}.items():
        if not least <= number <= most:
            raise UserError(
                f"{where}.training.portable: only shown for {name} from {least} to {most}, not {number}; write false"
            )
    return run


def changed(run: Run, settings: Mapping[str, Any], where: str) -> Run:
    """A run under other settings, by keys such as training.optimizer.lr.

    Raises UserError, naming the key in `where`, if the run does not take such a setting.
    """
    content = run.model_dump()
    for key, value in settings.items():
        *sections, last = key.split(".")
        place: Any = content
        for section in sections:
            place = place.get(section)
            if not isinstance(place, dict):
                raise UserError(f"{where}: {key} is no key of a variant")
        place[last] = value
    return keeps_promise(validate(Run, content, prefix=where), where)


def has_section(run: Run, key: str) -> bool:
    """Whether a run has the section that a key such as memvir.num_steps belongs to."""
    return getattr(run, key.partition(".")[0]) is not None
