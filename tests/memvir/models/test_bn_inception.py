"""memvir.models.BNInception against the layer table of the weights' authors, run by hand."""

import csv
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memvir.errors import UserError
from memvir.models import BNInception

DATA = Path(__file__).parent / "data"


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


LAYERS = rows("bninception_layers.csv")


def layer(row: dict[str, str], state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """One row of the table: a pooling, or a convolution with BatchNorm in eval mode, written out, and ReLU."""
    name = row["name"]
    assert inputs.shape[1] == int(row["in_channels"]), name
    kernel, stride, padding = (int(row[key].partition("x")[0]) for key in ("kernel", "stride", "padding"))
    if row["type"] == "MaxPool2d":
        return F.max_pool2d(inputs, kernel, stride, padding, ceil_mode=row["ceil_mode"] == "True")
    if row["type"] == "AvgPool2d":
        return F.avg_pool2d(
            inputs, kernel, stride, padding, row["ceil_mode"] == "True", row["count_include_pad"] == "True"
        )
    outputs = F.conv2d(inputs, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)
    mean, variance, weight, bias = (
        state[f"{name}_bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    outputs = (outputs - mean) / (variance + 1e-5).sqrt() * weight + bias
    assert outputs.shape[1] == int(row["out_channels"]), name
    return outputs.clamp(min=0)


def by_hand(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The whole table: layers before the blocks in a chain, then block after block."""
    features = images
    for block, block_rows in groupby(LAYERS, key=lambda row: row["name"][: len("inception_3a")]):
        if not block.startswith("inception"):
            for row in block_rows:
                features = layer(row, state, features)
            continue
        inputs, outputs = features, {}
        for row in block_rows:
            name = row["name"].removeprefix(block + "_")
            before = {
                "3x3": "3x3_reduce",
                "double_3x3_1": "double_3x3_reduce",
                "double_3x3_2": "double_3x3_1",
                "pool_proj": "pool",
            }
            outputs[name] = layer(row, state, outputs[before[name]] if name in before else inputs)
        last = "pool_proj" if "pool_proj" in outputs else "pool"
        order = [name for name in ("1x1", "3x3", "double_3x3_2", last) if name in outputs]
        features = torch.cat([outputs[name] for name in order], 1)
    return features


@pytest.fixture(scope="module")
def network() -> BNInception:
    """In float64, with BatchNorm statistics and affine parameters that matter."""
    torch.manual_seed(0)
    network = BNInception().double()
    for name, value in network.state_dict().items():
        if "_bn." in name and value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith(("running_var", "weight")) else value.uniform_(-0.5, 0.5)
    return network


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_the_output_is_that_of_the_layer_table_run_by_hand(network: BNInception, size: tuple[int, int]) -> None:
    images = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 50
    with torch.inference_mode():
        expected = by_hand(network.state_dict(), images)
        found = network.eval()(images)
    assert found.shape == (1, network.features_dim, size[0] // 32, size[1] // 32)
    assert expected.std() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_every_layer_has_the_resolution_of_the_table(network: BNInception) -> None:
    sizes, hooks = {}, []
    for row in LAYERS:
        hook = lambda module, inputs, output, name=row["name"]: sizes.__setitem__(name, tuple(output.shape[2:]))  # noqa: E731
        hooks.append(getattr(network, row["name"]).register_forward_hook(hook))
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224, dtype=torch.float64))
    for hook in hooks:
        hook.remove()
    assert sizes == {row["name"]: tuple(map(int, row["output_hw_at_224"].split("x"))) for row in LAYERS}


def test_keys_and_shapes_are_those_of_the_weight_file_in_its_order() -> None:
    found = [(key, tuple(value.shape)) for key, value in BNInception().state_dict().items()]
    expected = [
        (row["key"], () if row["shape"] == "scalar" else tuple(map(int, row["shape"].split("x"))))
        for row in rows("bninception_state_dict.csv")
    ]
    assert found == expected


def test_random_weights_keep_the_scale_of_activations_even_under_frozen_batch_norm() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        features = BNInception().eval()(torch.randn(2, 3, 64, 64))
    assert 0.1 < features.std() < 10


def test_a_size_that_the_blocks_cannot_halve_is_an_error_that_says_what_fits(network: BNInception) -> None:
    with pytest.raises(UserError, match=r"multiples of 32 .* not 200x224"):
        network(torch.zeros(1, 3, 200, 224))
