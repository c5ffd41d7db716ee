import numpy as np
import pytest
import torch

from memvir.experiment.settings import PORTABLE_SUMS
from memvir.losses import build_loss
from memvir.losses.products import BLOCK, COLUMNS, Similarities, product
from tests.test_golden import needs_avx2


def added_up_in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What `product` promises, bit by bit: a fused multiply and add after another, and block after block."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for start in range(0, a.shape[1], BLOCK):
        block = np.zeros_like(total)
        for k in range(start, min(start + BLOCK, a.shape[1])):
            exact = np.outer(a[:, k].astype(np.longdouble), b[k].astype(np.longdouble))
            block = (block + exact).astype(np.float32)  # one rounding
        total += block
    return total


@needs_avx2
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(64, 98, 128), (64, 128, 98), (64, 490, 128), (98, 2024, 128), (3, 200, 40), (40, 200, 2), (1, 7, 1)],
)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_a_product_adds_up_in_the_same_order_on_every_processor(m, k, n, layout):
    rng = np.random.default_rng(k)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in [(m, k), (k, n)])
    left = torch.from_numpy(a) if layout == "rows" else torch.from_numpy(a.T.copy()).T
    np.testing.assert_array_equal(product(left, torch.from_numpy(b)).numpy(), added_up_in_order(a, b))


@pytest.mark.parametrize(("a", "k", "d"), [(3, 300, 7), (300, 3, 7), (3, 4, 300)])
def test_similarities_have_the_gradients_of_a_matrix_product(a, k, d):
    anchors, others = torch.randn(a, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)
    weights = torch.randn(a, k, dtype=torch.float64)
    found = []
    for similarities in (Similarities.apply, lambda x, y: x @ y.T):
        inputs = [tensor.clone().requires_grad_() for tensor in (anchors, others)]
        value = similarities(*inputs)
        found.append([value, *torch.autograd.grad((weights * value).sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_settings_know_how_long_and_how_wide_a_product_may_be():
    assert PORTABLE_SUMS == (COLUMNS, BLOCK)


def test_a_backward_pass_within_autocast_is_in_full_precision():
    loss, embeddings = build_loss("norm_softmax", num_classes=3 * BLOCK, dim=8), torch.randn(4, 8, requires_grad=True)
    gradients = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(embeddings, torch.arange(4))
            gradients.append(torch.autograd.grad(value, [embeddings, loss.proxies]))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
