"""params.yaml as frozen, validated objects. A wrong or unknown key is an error that names it.

Every field is documented where it is declared; `load_params` is the only way in. Nothing here imports torch, so that
a stage which only makes tables starts quickly.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from memvir.errors import UserError
from memvir.loss_names import DISPLAY_NAMES, OPTIONS, canonical_name

Positive = Annotated[float, Field(gt=0, le=1e9)]
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Side = Annotated[int, Field(ge=1, le=4096)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$", max_length=64)]


class Section(BaseModel):
    """A part of params.yaml: frozen, strictly typed, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


# --- where images come from ---


class GlyphsData(Section):
    """The embedded data set: characters rendered from the typefaces that Matplotlib ships."""

    source: Literal["glyphs"]
    images_per_class: Annotated[int, Field(ge=2, le=1000)]
    """Rendered instances of each character."""
    size: Side
    """Side of a rendered image in pixels."""
    seed: Seed
    """Seed of the distortions; the data set is a function of this section alone."""


class Cars196Data(Section):
    """CARS196 from an archive or a folder, whichever of these is given (METHOD.md, section 4)."""

    source: Literal["cars196"]
    addresses: list[str]
    """Where to download the archive; tried in order. car_ims.tgz, or a zip or tar of class folders."""
    md5: str | None
    """md5 of car_ims.tgz; archives in another form are verified by the number of images of each class."""
    archive: str | None = None
    """A local archive to use instead of downloading."""
    folder: str | None = None
    """A folder that already holds the unpacked images, in any of the accepted forms."""


class FolderData(Section):
    """Your own images: dataset/NAME/source/train/CLASS/* and dataset/NAME/source/test/CLASS/*."""

    source: Literal["folder"]


Data = Annotated[GlyphsData | Cars196Data | FolderData, Field(discriminator="source")]


# --- how an image becomes a network input ---


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
        return _pair(value)


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
        return _pair(value)


class TestTransform(Section):
    """The deterministic crop of a test image (bilinear, antialiased)."""

    resize: Side
    """Length of the shorter side after resizing, in pixels."""


class Images(Section):
    size: Side
    """Side of the square network input, in pixels; the test crop has it too."""
    channels: Literal["grey", "rgb", "bgr"]
    """BN-Inception's ImageNet weights expect bgr, torchvision's ResNets rgb."""
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


# --- model, training, evaluation ---


class Weights(Section):
    """Pretrained weights as a file: downloaded once, checked by hash, loaded with strict keys."""

    addresses: list[str]
    """Where to download the file; tried in order."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
    """The file's sha256 or the start of it."""
    path: str | None = None
    """A local file to use instead of downloading."""


class Model(Section):
    backbone: Literal["convnet", "bn_inception", "resnet18", "resnet34", "resnet50", "resnet101"]
    widths: list[Annotated[int, Field(ge=1, le=4096)]] = Field(default=[16, 32, 64], min_length=1, max_length=8)
    """convnet only: output channels of its stride-2 convolutions."""
    pretrained: Literal["none", "imagenet"]
    """`none` starts from random weights and must be said; `imagenet` needs `weights` for bn_inception."""
    weights: Weights | None = None
    """The ImageNet weight file: needed for bn_inception; without it ResNets take torchvision's own."""
    pooling: Literal["gap", "gmp", "gap_gmp"]
    """Global average pooling, global max pooling, or their sum."""
    embedding_dim: Annotated[int, Field(ge=1, le=65536)]
    """D, the embedding's length."""
    freeze_batch_norm: bool
    """Keep BatchNorm's running statistics (eval mode); its affine parameters train all the same."""

    @model_validator(mode="after")
    def _has_weights(self) -> "Model":
        if self.pretrained == "imagenet":
            if self.backbone == "convnet":
                raise ValueError("there are no ImageNet weights for convnet: write pretrained: none")
            if self.backbone == "bn_inception" and self.weights is None:
                raise ValueError(
                    "weights is missing: bn_inception with pretrained: imagenet needs addresses and sha256"
                )
        return self


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
    """Stop after so many evaluations without a better Recall@1; null: never."""
    threads: Annotated[int, Field(ge=1, le=1024)]
    """CPU threads of a run. It changes the order of floating-point sums, so it belongs to the recipe."""

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


# --- variants ---


class Loss(Section):
    name: str
    """A proxy loss; every spelling of its name is accepted."""
    scale: Positive | None = None
    """s, on the logits. Null: the loss's own default."""
    margin: NonNegative | None = None
    """m, CosFace and ArcFace."""
    alpha: Positive | None = None
    """Proxy-Anchor's scale."""
    delta: NonNegative | None = None
    """Proxy-Anchor's margin."""

    @field_validator("name")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return canonical_name(value)

    @model_validator(mode="after")
    def _options_apply(self) -> "Loss":
        for option in self.options:
            if option not in OPTIONS[self.name]:
                raise ValueError(
                    f"{option} is not an option of {self.name} ({', '.join(OPTIONS[self.name]) or 'none'})"
                )
        return self

    @property
    def options(self) -> dict[str, float]:
        return {key: value for key, value in self.model_dump(exclude={"name"}).items() if value is not None}


class MemVirSettings(Section):
    num_steps: Annotated[int, Field(ge=1, le=10_000)]
    """N: how many past steps become virtual classes."""
    step_gap: Annotated[int, Field(ge=0, le=1_000_000)]
    """M: steps left out between two selected ones."""
    warm_up_epochs: Annotated[int, Field(ge=0, le=10**9)]
    """Nothing is stored or used up to and including this epoch."""
    storage_dtype: Literal["float32", "bfloat16"] = "float32"
    """How stored embeddings and proxies are kept."""


class Variant(Section):
    loss: Loss
    memvir: MemVirSettings | None = None
    training: dict[str, Any] = {}
    """Keys of the recipe's `training` that this variant sets otherwise."""
    snapshots: list[Count] = []
    """Epochs at whose end the batches and proxies in use are recorded for the t-SNE figure."""

    @property
    def display_name(self) -> str:
        return ("MemVir + " if self.memvir else "") + DISPLAY_NAMES[self.loss.name]


class Resources(Section):
    """What one run takes of a machine when `stages.sweep` runs several at once. Changing it re-runs nothing."""

    cpus: Annotated[int, Field(ge=1, le=1024)] = 1
    """Cores: training threads and loader workers together."""
    gpus: Annotated[float, Field(ge=0, le=1024)] = 0.0
    """GPUs; a fraction lets several runs share one, and `runtime.processes` GPUs serve one run together."""


class Recipe(Section):
    """All that shapes the numbers of one data set."""

    data: Data
    images: Images
    model: Model
    training: Training
    evaluation: Evaluation
    resources: Resources = Resources()
    variants: Annotated[dict[Name, Variant], Field(min_length=1)]

    def baseline_of(self, variant: str) -> str | None:
        """The variant that a MemVir variant is compared with: the first one of the same loss without MemVir."""
        chosen = self.variants[variant]
        if chosen.memvir is None:
            return None
        same = (n for n, v in self.variants.items() if v.memvir is None and v.loss.name == chosen.loss.name)
        return next(same, None)


class Runtime(Section):
    """Speed and comfort. No stage declares these: changing them re-runs nothing."""

    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|meta)$")] = "auto"
    """auto: the first GPU if there is one, else the CPU."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=1024)] = "auto"
    """Loader processes for recipes with random_resized_crop; results do not depend on it."""
    progress: Literal["auto", "bar", "plain", "none"] = "auto"
    """auto: a bar on a terminal, plain lines elsewhere."""
    scratch: str = "scratch"
    """Folder of decoded pixels and checkpoints; may be deleted at any time between runs."""
    pixel_store: bool = True
    """Decode the training images once into `scratch` instead of at every epoch."""
    checkpoint_epochs: Count = 10
    """Write a checkpoint at least every so many epochs ..."""
    checkpoint_minutes: Positive = 10.0
    """... and at the end of an epoch once so many minutes have passed."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """GPUs of one run, each with a share of every batch. Changes results in the last digits."""
    deterministic: bool = True
    """Only deterministic GPU kernels: bit-identical runs, at a cost in speed that depends on GPU and network."""
    tf32: bool = False
    """Allow TF32 on GPUs: faster matrix products with 10-bit mantissas. Changes results in the last digits."""
    compile: bool = False
    """torch.compile the embedder. Changes results in the last digits."""
    channels_last: bool = True
    """Memory format of the images and convolutions on a GPU."""


class Reporting(Section):
    """How figures are made. Changing it re-trains nothing."""

    tsne_perplexity: Annotated[float, Field(ge=2, le=1000)] = 30.0
    """About how many neighbours a point of the t-SNE figure keeps near."""
    tsne_points: Annotated[int, Field(ge=10, le=20_000)] = 1000
    """At most so many embeddings a panel; every class weight is shown besides."""
    tsne_seed: Seed = 0
    """Seed of the t-SNE figure and of the choice of its points."""
    queries: Annotated[int, Field(ge=1, le=20)] = 2
    """Retrieval pictures: queries of each kind (best, typical, worst)."""
    neighbours: Annotated[int, Field(ge=1, le=20)] = 5
    """Nearest images shown for a query."""


class Run(Section):
    """One training run: the recipe with the variant's own settings applied."""

    dataset: str
    variant: str
    seed: int
    data: Data
    images: Images
    model: Model
    training: Training
    evaluation: Evaluation
    loss: Loss
    memvir: MemVirSettings | None
    snapshots: list[int]

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.variant}/{self.seed}"


class Params(Section):
    datasets: Annotated[list[Name], Field(min_length=1)]
    """The recipes to run."""
    variants: Annotated[list[Name], Field(min_length=1)]
    """The variants of each recipe to run, in the order of the tables."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """One run per variant and seed."""
    runtime: Runtime = Runtime()
    reporting: Reporting = Reporting()
    recipes: dict[Name, Recipe]
    """Every other top-level key of params.yaml, by name."""

    @field_validator("datasets", "variants", "seeds")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is listed twice")
        return value

    def recipe(self, dataset: str) -> Recipe:
        """The recipe of a data set; UserError listing the recipes there are if it has none."""
        return _choose(self.recipes, dataset, "a recipe for data set")

    def run(self, dataset: str, variant: str, seed: int) -> Run:
        """The complete settings of one run; UserError listing the choices if data set or variant is unknown."""
        recipe = self.recipe(dataset)
        chosen: Variant = _choose(recipe.variants, variant, f"a variant of {dataset}")
        return Run(
            dataset=dataset,
            variant=variant,
            seed=seed,
            data=recipe.data,
            images=recipe.images,
            model=recipe.model,
            training=_training(recipe, chosen, f"{dataset}.variants.{variant}"),
            evaluation=recipe.evaluation,
            loss=chosen.loss,
            memvir=chosen.memvir,
            snapshots=chosen.snapshots,
        )


SECTIONS = ("datasets", "variants", "seeds", "runtime", "reporting")


def load_params(path: Path | str = "params.yaml") -> Params:
    """Read and validate params.yaml.

    Raises UserError, one line naming file and key, for anything that is not a valid configuration.
    """
    path = Path(path)
    try:
        # DVC reads params.yaml with the same parser: YAML 1.2, where 1e-4 is a number and a repeated key an error
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this from the repository's top folder") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    except (YAMLError, ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError) as error:
        # besides YAMLError the parser lets errors of its own constructors through (dates, huge numbers, odd tags)
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split()) or type(error).__name__}") from None
    try:
        return parse_params(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_params(raw: Any) -> Params:
    """Validate the content of params.yaml. Raises UserError naming the key."""
    if not isinstance(raw, dict):
        raise UserError(f"expected keys such as {', '.join(SECTIONS)} at the top level, found {_describe(raw)}")
    for key, value in raw.items():
        if not isinstance(key, str):
            raise UserError(f"{_describe(key)}: keys must be text")
        if key not in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{_key(key)}: unknown key{_suggest(key, SECTIONS)}")
    known = {key: value for key, value in raw.items() if key in SECTIONS}
    recipes = {key: value for key, value in raw.items() if key not in SECTIONS}
    params = _validate(Params, {**known, "recipes": recipes}, prefix="")
    for dataset in params.datasets:
        for variant in params.variants:
            params.run(dataset, variant, params.seeds[0])
    for dataset, recipe in params.recipes.items():
        for name, variant in recipe.variants.items():
            _check_epochs(variant, params.run(dataset, name, 0).training, f"{dataset}.variants.{name}")
    return params


def _training(recipe: Recipe, variant: Variant, prefix: str) -> Training:
    merged = _merge(recipe.training.model_dump(), variant.training)
    return _validate(Training, merged, f"{prefix}.training")


def _check_epochs(variant: Variant, training: Training, prefix: str) -> None:
    if variant.memvir and variant.memvir.warm_up_epochs >= training.epochs:
        raise UserError(
            f"{prefix}.memvir.warm_up_epochs: {variant.memvir.warm_up_epochs} leaves no epoch for MemVir "
            f"out of {training.epochs}; use a smaller number"
        )
    for epoch in variant.snapshots:
        if epoch > training.epochs:
            raise UserError(f"{prefix}.snapshots: epoch {epoch} is beyond the last one, {training.epochs}")
    if variant.snapshots and not variant.memvir:
        raise UserError(f"{prefix}.snapshots: only a variant with memvir has past steps to record")


def _merge(base: Mapping[str, Any], changes: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _choose(choices: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in choices:
        raise UserError(f"{name!r} is not {what}; there are: {', '.join(choices) or 'none'}")
    return choices[name]


def _validate(section: type[Section], raw: Any, prefix: str) -> Any:
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise UserError(_one_line(error, raw, prefix)) from None
    except RecursionError:
        raise UserError(f"{prefix or 'params'}: nested too deeply") from None


def _one_line(error: ValidationError, raw: Any, prefix: str) -> str:
    first = error.errors(include_url=False)[0]
    keys: list[str] = [prefix] if prefix else []
    place = raw
    for position, part in enumerate(first["loc"]):
        found = isinstance(place, dict) and part in place
        found = found or (isinstance(place, (list, tuple)) and isinstance(part, int) and part < len(place))
        if found:
            place = place[part]
        elif position < len(first["loc"]) - 1 or part == "[key]":
            continue  # the name of a union's member, which is not a key of the file
        if part != "recipes":
            keys.append(_key(part))
    key = ".".join(keys) or "params"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_suggest(str(first['loc'][-1]), _field_names())}"
    if first["type"] == "union_tag_invalid":
        tag, choices = (first["ctx"][name].replace("'", "") for name in ("discriminator", "expected_tags"))
        return f"{key}.{tag}: expected one of {choices}, found {_describe(first['input'].get(tag))}"
    if first["type"] == "missing":
        return f"{key}: missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(first["input"], dict) or first["type"] == "value_error":
        return f"{key}: {message}"
    return f"{key}: {message}, found {_describe(first['input'])}"


def _field_names() -> set[str]:
    """Every key that some section knows, to guess what a misspelt one was meant to be."""
    return {name for section in Section.__subclasses__() for name in section.model_fields}


def _suggest(key: str, choices: Any) -> str:
    close = difflib.get_close_matches(key, choices, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _key(part: Any) -> str:
    return part if isinstance(part, str) and re.fullmatch(r"[\w-]{1,64}", part) else _describe(part)


def _describe(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value)) if not isinstance(value, int) or abs(value) < 10**20 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."


def _pair(value: Any) -> Any:
    """YAML has no tuples: let a list of two increasing numbers stand for a range."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError("expected a range of two numbers, [smallest, largest]")
    if all(isinstance(v, (int, float)) for v in value) and value[0] > value[1]:
        raise ValueError(f"the range [{value[0]}, {value[1]}] is the wrong way round")
    return tuple(value)
