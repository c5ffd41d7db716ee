"""Backbones, pooling and the embedder, as recipes ask for them."""

import subprocess
import sys
from typing import Any, get_args

import pytest
import torch
from torch import nn

from memvir.errors import UserError
from memvir.losses import build_loss
from memvir.memory import MemVir
from memvir.models import BACKBONES, ConvNet, Embedder, TorchvisionNetwork, backbone_class, build_embedder
from memvir.models.backbone import Backbone
from memvir.models.embedder import POOLINGS
from memvir.models.settings import Model, Weights


def model(**changes: Any) -> Model:
    settings = {
        "backbone": "convnet",
        "widths": [4, 6],
        "pretrained": "none",
        "pooling": "gap",
        "embedding_dim": 5,
        "freeze_batch_norm": False,
    }
    return Model(**{**settings, **changes})


# --- backbones ---


def test_the_registries_hold_exactly_the_choices_of_the_configuration() -> None:
    assert set(POOLINGS) == set(get_args(Model.model_fields["pooling"].annotation))
    for name in BACKBONES:
        assert issubclass(backbone_class(name.replace("NAME", "resnet18")), Backbone)


OURS = ["convnet", "bn_inception"]
RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]


@pytest.mark.parametrize("name", OURS + RESNETS)
def test_every_backbone_gives_features_of_its_dimension_and_the_embedder_rows_of_d(name: str) -> None:
    embedder = build_embedder(model(backbone=name), in_channels=3, weights=None)
    stride = 4 if name == "convnet" else 32
    with torch.inference_mode():
        images = torch.rand(2, 3, 64, 32)
        features = embedder.backbone(images)
        assert features.shape == (2, embedder.backbone.features_dim, 64 // stride, 32 // stride)
        assert features.min() >= 0, "features come after ReLU"
        assert embedder(images).shape == (2, 5)


def test_a_resnet_is_torchvisions_up_to_its_last_convolution_under_the_same_names() -> None:
    from torchvision.models import resnet18

    theirs, ours = resnet18(weights=None).eval(), TorchvisionNetwork("torchvision/resnet18", "gap").eval()
    expected = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(ours.network.state_dict()) == list(expected)
    ours.network.load_state_dict(expected)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        features = ours(images).mean((2, 3))
        torch.testing.assert_close(theirs.fc(features), theirs(images))


@pytest.mark.parametrize("name", ["bn_inception", "resnet18"])
def test_a_backbone_for_colour_images_refuses_grey_ones_by_the_key_to_change(name: str) -> None:
    with pytest.raises(UserError, match=rf"images\.channels: .*{name} takes colour images"):
        build_embedder(model(backbone=name), in_channels=1, weights=None)


def test_the_convnet_takes_grey_images_and_odd_sizes() -> None:
    assert ConvNet([3, 4, 5], in_channels=1)(torch.rand(2, 1, 33, 20)).shape == (2, 5, 5, 3)


def test_runs_without_a_resnet_do_not_pay_for_torchvision() -> None:
    code = "import sys, memvir.models as m; m.BNInception(); sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the embedder ---


def test_pooling_is_the_average_the_maximum_or_their_sum_over_positions() -> None:
    features = torch.randn(3, 4, 5, 2)
    flat = features.reshape(3, 4, 10)
    average = torch.stack([flat[..., i] for i in range(10)]).sum(0) / 10
    maximum = flat.sort(-1).values[..., -1]
    torch.testing.assert_close(POOLINGS["gap"](features), average)
    torch.testing.assert_close(POOLINGS["gmp"](features), maximum)
    torch.testing.assert_close(POOLINGS["gap_gmp"](features), average + maximum)
    assert torch.equal(POOLINGS["head"](average), average), "pooled already"


def test_embeddings_are_the_linear_layer_of_the_pooled_features_and_not_normalised() -> None:
    embedder = build_embedder(model(pooling="gmp"), in_channels=1, weights=None)
    images = torch.rand(4, 1, 16, 16)
    pooled = embedder.backbone(images).amax((2, 3))
    found = embedder(images)
    torch.testing.assert_close(found, pooled @ embedder.embedding.weight.T + embedder.embedding.bias)
    assert (found.norm(dim=1) - 1).abs().min() > 1e-3


def test_the_linear_layer_starts_uniform_within_one_over_the_root_of_its_inputs() -> None:
    torch.manual_seed(0)
    layer = build_embedder(model(backbone="bn_inception", embedding_dim=512), 3, None).embedding
    for values in (layer.weight, layer.bias):
        assert 0.98 / 32 < values.abs().max() <= 1 / 32


def test_random_weights_are_a_function_of_torchs_seed() -> None:
    def draw() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return build_embedder(model(), 1, None).state_dict()

    for first, second in zip(draw().values(), draw().values(), strict=True):
        assert torch.equal(first, second)


def statistics(embedder: Embedder) -> list[torch.Tensor]:
    norms = [module for module in embedder.modules() if isinstance(module, nn.BatchNorm2d)]
    return [tensor.clone() for norm in norms for tensor in (norm.running_mean, norm.running_var)]  # type: ignore[misc]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_batch_norm_keeps_its_statistics_while_its_affine_parameters_train(frozen: bool) -> None:
    torch.manual_seed(0)
    embedder = build_embedder(model(freeze_batch_norm=frozen), in_channels=1, weights=None)
    before = statistics(embedder)
    for mode in (None, True, False, True):  # None: as it comes from build_embedder
        if mode is not None:
            assert embedder.train(mode) is embedder
        assert embedder.training is (mode is not False)
        embedder(torch.rand(6, 1, 16, 16) + 3).square().sum().backward()
    unchanged = [torch.equal(a, b) for a, b in zip(before, statistics(embedder), strict=True)]
    assert all(unchanged) if frozen else not any(unchanged)
    for module in embedder.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.requires_grad and module.weight.grad.abs().sum() > 0
            assert module.bias.requires_grad and module.bias.grad.abs().sum() > 0


def test_pretrained_weights_are_never_silently_left_out() -> None:
    weights = Weights(addresses=[], sha256="52deb4733")
    for name in ("bn_inception", "resnet18"):
        with pytest.raises(UserError, match=rf"model\.pretrained: imagenet needs a weight file for .*{name}"):
            build_embedder(model(backbone=name, pretrained="imagenet", weights=weights), 3, None)


# --- one training step ---


def train(embedder: Embedder, images: torch.Tensor, steps: int = 1) -> list[torch.Tensor]:
    """The recipe's step on the same images again and again; the losses."""
    device = images.device
    labels = torch.arange(len(images), device=device) % 98
    with device:
        loss = MemVir(build_loss("Norm-SoftMax", 98, 512, scale=23.0), num_steps=1, step_gap=0)
    groups = [{"params": list(embedder.parameters())}, {"params": list(loss.parameters()), "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups, lr=1e-4, eps=0.01, weight_decay=1e-4)
    values = []
    for _ in range(steps):
        value = loss(embedder(images), labels)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        values.append(value.detach())
    return values


def bn_inception_model(pooling: str = "gap") -> Model:
    return model(backbone="bn_inception", pooling=pooling, embedding_dim=512, freeze_batch_norm=True)


def test_a_training_step_of_bn_inception_changes_every_parameter_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    embedder = build_embedder(bn_inception_model(), in_channels=3, weights=None)
    before = {name: value.detach().clone() for name, value in embedder.named_parameters()}
    first, _, third = train(embedder, torch.randn(2, 3, 224, 224), steps=3)
    assert torch.isfinite(first) and third < first
    for name, value in embedder.named_parameters():
        assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("pooling", sorted(POOLINGS.keys() - {"head"}))
def test_a_training_step_of_the_papers_size_runs_on_the_meta_device(pooling: str) -> None:
    embedder = build_embedder(bn_inception_model(pooling), in_channels=3, weights=None).to("meta")
    train(embedder, torch.empty(128, 3, 224, 224, device="meta"), steps=2)
