"""Networks of timm and torchvision as backbones: the smallest of each family, with random weights."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from memvir import models
from memvir.errors import UserError
from memvir.models import Backbone, Embedder, TimmNetwork, TorchvisionNetwork, build_embedder
from memvir.models.settings import Model

FAMILIES = [  # name, pooling, side of its images
    ("timm/resnet10t", "gap", 32),
    ("timm/mobilenetv2_035", "gap_gmp", 32),
    ("timm/mobilenetv3_small_050", "gap", 32),
    ("timm/mobilenetv3_small_050", "head", 32),
    ("timm/convnext_zepto_rms", "gmp", 32),
    ("timm/mambaout_femto", "gap", 32),  # channels last
    ("timm/vit_tiny_patch16_224", "head", 224),
    ("timm/vit_tiny_patch16_224", "gap", 224),
    ("torchvision/resnet18", "gap", 32),
    ("torchvision/mobilenet_v2", "gap", 32),
    ("torchvision/mobilenet_v3_small", "head", 32),
    ("torchvision/convnext_tiny", "gap", 32),
]


def model(backbone: str, pooling: str = "gap", **changes: Any) -> Model:
    settings = {"pretrained": "none", "embedding_dim": 5, "freeze_batch_norm": True, **changes}
    return Model(backbone=backbone, pooling=pooling, **settings)


def build(backbone: str, pooling: str = "gap", in_channels: int = 3, **changes: Any) -> Embedder:
    return build_embedder(model(backbone, pooling, **changes), in_channels, None)


def step(embedder: Embedder, images: Tensor) -> None:
    optimizer = torch.optim.SGD(embedder.parameters(), lr=0.1)
    embeddings = embedder(images)
    assert embeddings.shape == (len(images), 5)
    optimizer.zero_grad()
    nn.functional.cross_entropy(embeddings, torch.arange(len(images), device=images.device) % 5).backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "pooling", "size"), FAMILIES)
def test_a_step_reaches_every_parameter_and_no_frozen_statistic_here_and_on_the_meta_device(
    name: str, pooling: str, size: int
) -> None:
    torch.manual_seed(0)
    embedder = build(name, pooling)
    norms = [module for module in embedder.modules() if isinstance(module, _BatchNorm)]
    before = [norm.running_mean.clone() for norm in norms]
    assert bool(norms) == (not any(family in name for family in ("vit", "convnext", "mambaout")))
    for _ in range(2):  # timm's ResNets start with blocks that are switched off
        step(embedder, torch.rand(3, 3, size, size))
    for key, parameter in embedder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))

    torch.manual_seed(1)
    copy = build(name, pooling)
    copy.load_state_dict(embedder.state_dict())
    step(copy.to("meta"), torch.empty(3, 3, size, size, device="meta"))


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "torchvision/mobilenet_v3_small"])
def test_random_weights_are_a_function_of_torchs_seed(name: str) -> None:
    def draw(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(build(name).parameters())

    first, again, other = draw(3), draw(3), draw(4)
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


# --- pooling ---


def test_a_transformers_positions_are_its_patches_and_its_head_takes_the_class_token() -> None:
    images = torch.rand(2, 3, 224, 224)
    for pooling in ("gap", "gmp", "head"):
        embedder = build("timm/vit_tiny_patch16_224", pooling).eval()
        with torch.inference_mode():
            tokens = embedder.backbone.network.forward_features(images)  # (B, 1 + 196, F), the class token first
            expected = {"gap": tokens[:, 1:].mean(1), "gmp": tokens[:, 1:].amax(1), "head": tokens[:, 0]}[pooling]
            torch.testing.assert_close(embedder.pool(embedder.backbone(images)), expected)


def test_channels_that_come_last_are_put_first() -> None:
    network = TimmNetwork("timm/mambaout_femto", 3, "gap").eval()
    with torch.inference_mode():
        images = torch.rand(1, 3, 64, 96)
        assert network(images).shape == (1, network.features_dim, 2, 3)
        torch.testing.assert_close(network(images), network.network(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "shufflenet_v2_x0_5"])
def test_torchvisions_classifier_on_these_features_gives_torchvisions_answer(name: str) -> None:
    from torchvision.models import get_model

    theirs = get_model(name, weights=None).eval()
    images = torch.rand(2, 3, 64, 64)
    classifier = theirs.fc if hasattr(theirs, "fc") else theirs.classifier
    last = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear)][-1]
    for pooling, layers in (("gap", classifier), ("head", last)):
        ours = TorchvisionNetwork(f"torchvision/{name}", pooling).eval()
        ours.network.load_state_dict({key: theirs.state_dict()[key] for key in ours.network.state_dict()})
        with torch.inference_mode():
            features = ours(images) if pooling == "head" else ours(images).mean((2, 3))
            torch.testing.assert_close(layers(features), theirs(images))


@pytest.mark.parametrize(
    ("name", "pooling", "message"),
    [
        ("timm/inception_next_atto", "gap", r"^model\.pooling: .* has no map of features to pool; write head"),
        ("torchvision/maxvit_t", "gmp", r"^model\.pooling: .* has no map of features to pool; write head"),
        ("torchvision/squeezenet1_1", "head", r"^model\.pooling: .* has no pooled features for head"),
        ("torchvision/googlenet", "gap", r"^model\.backbone: .* has classifiers for training alone"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # torchvision's, of GoogLeNet
def test_what_a_network_cannot_give_is_one_line(name: str, pooling: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(name, pooling)
    assert "\n" not in str(caught.value)


# --- images ---


@pytest.mark.parametrize(
    ("name", "pooling", "size"),
    [
        ("timm/vit_tiny_patch16_224", "head", 32),
        ("torchvision/vit_b_32", "head", 64),
        ("torchvision/densenet121", "gap", 8),
    ],
)
def test_images_of_a_size_that_the_network_does_not_take_are_named_by_their_key(
    name: str, pooling: str, size: int
) -> None:
    embedder = build(name, pooling)
    with pytest.raises(
        UserError, match=rf"^images\.size: {name} does not take images of {size}x{size} \(.+\)$"
    ) as caught:
        embedder(torch.rand(2, 3, size, size))
    assert "\n" not in str(caught.value)


def test_a_failure_of_another_kind_is_not_put_down_to_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = build("timm/mobilenetv3_small_050")
    real = embedder.backbone.network.conv_head.forward

    def out_of_memory(features: Tensor) -> Tensor:
        if features.device.type == "meta":
            return real(features)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(embedder.backbone.network.conv_head, "forward", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        embedder(torch.rand(2, 3, 32, 32))


def test_timms_networks_take_grey_images_and_torchvisions_say_that_they_do_not() -> None:
    assert build("timm/resnet10t", in_channels=1)(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(UserError, match=r"^images\.channels: torchvision/resnet18 takes colour images"):
        build("torchvision/resnet18", in_channels=1)


@pytest.mark.parametrize("name", ["timm/rexnet_100", "torchvision/efficientnet_b0"])  # both with dropout by default
def test_a_network_in_training_mode_draws_no_random_numbers(name: str) -> None:
    for pooling in ("gap", "head"):
        embedder = build(name, pooling)
        state = torch.get_rng_state()
        embedder(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        assert torch.equal(torch.get_rng_state(), state)


# --- names ---


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/vit_smal_patch16_224", "timm/vit_small_patch16_224"),
        ("timm/resnet18.a9_in1k", "timm/resnet18.a1_in1k"),
        ("timm/a/b", ""),
        ("torchvision/mobilenetv2", "torchvision/mobilenet_v2"),
        ("resnet51", "torchvision/resnet50"),
    ],
)
def test_an_unknown_network_suggests_near_ones(name: str, near: str) -> None:
    with pytest.raises(UserError, match=r"^model\.backbone: (timm|torchvision) has no network") as caught:
        build(name)
    assert near in str(caught.value) and "\n" not in str(caught.value)


def test_without_timm_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^model\.backbone: timm/resnet18 needs the package timm; `pip install timm`"):
        build("timm/resnet18")


class Mean(Backbone):
    """A backbone of one's own: the image as its features."""

    @classmethod
    def from_settings(cls, model: Model, in_channels: int) -> "Mean":
        mean = cls()
        mean.in_channels = mean.features_dim = in_channels
        return mean

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_a_new_backbone_is_one_class_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.BACKBONES, "mean", f"{__name__}:Mean")
    assert build("mean", in_channels=1)(torch.rand(2, 1, 4, 4)).shape == (2, 5)
