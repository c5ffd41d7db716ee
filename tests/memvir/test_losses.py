"""Each loss against a second, naive formula written out here, in float64, and against pytorch-metric-learning."""

import math

import pytest
import pytorch_metric_learning.losses as pml
import torch
from torch import nn

from memvir import loss_names
from memvir.errors import UserError
from memvir.losses import LOSSES, build_loss, canonical_name

torch.set_num_threads(1)

SPELLINGS = {
    "norm_softmax": ["Norm_SoftMax", "NormSoftmax", "norm-softmax", "NORM SOFTMAX"],
    "proxy_nca": ["Proxy_NCA", "ProxyNCA", "proxy.nca"],
    "softmax": ["SoftMax", "soft_max"],
    "cosface": ["CosFace", "cos-face"],
    "arcface": ["ArcFace", "ARC_FACE"],
    "proxy_anchor": ["Proxy-Anchor", "ProxyAnchor"],
}


def unit(vector):
    return vector / vector.norm()


def naive_cross_entropy(embeddings, proxies, labels, logit, positive_logit):
    losses = []
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        logits = [(positive_logit if c == label else logit)(embedding, proxy) for c, proxy in enumerate(proxies)]
        losses.append(-torch.log(torch.exp(logits[label]) / sum(torch.exp(value) for value in logits)))
    return sum(losses) / len(losses)


def naive_proxy_anchor(embeddings, proxies, labels, alpha, delta):
    positive_terms, negative_terms = [], []
    for c, proxy in enumerate(proxies):
        cosines = [unit(embedding) @ unit(proxy) for embedding in embeddings]
        own = [cosine for cosine, label in zip(cosines, labels.tolist(), strict=True) if label == c]
        others = [cosine for cosine, label in zip(cosines, labels.tolist(), strict=True) if label != c]
        if own:
            positive_terms.append(torch.log(1 + sum(torch.exp(-alpha * (cosine - delta)) for cosine in own)))
        if others:
            negative_terms.append(torch.log(1 + sum(torch.exp(alpha * (cosine + delta)) for cosine in others)))
    return sum(positive_terms) / len(positive_terms) + sum(negative_terms) / len(proxies)


def cosine(e, w):
    return unit(e) @ unit(w)


def arc_positive(e, w, scale=10.0, margin=0.4):
    angle = torch.acos(cosine(e, w))
    return scale * (
        torch.cos(angle + margin) if angle + margin <= math.pi else cosine(e, w) - margin * math.sin(margin)
    )


def squared_distance(e, w):
    return (unit(e) - unit(w)).square().sum()


NAIVE = {
    "norm_softmax": ({"scale": 7.0}, lambda e, w: 7 * cosine(e, w), lambda e, w: 7 * cosine(e, w)),
    "proxy_nca": ({"scale": 4.0}, lambda e, w: -4 * squared_distance(e, w), lambda e, w: -4 * squared_distance(e, w)),
    "softmax": ({}, lambda e, w: e @ w, lambda e, w: e @ w),
    "cosface": ({"scale": 9.0, "margin": 0.3}, lambda e, w: 9 * cosine(e, w), lambda e, w: 9 * (cosine(e, w) - 0.3)),
    "arcface": ({"scale": 10.0, "margin": 0.4}, lambda e, w: 10 * cosine(e, w), arc_positive),
    "proxy_anchor": ({"alpha": 6.0, "delta": 0.2}, None, None),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradients_are_those_of_the_naive_formula(name, seed):
    torch.manual_seed(seed)
    batch_size, num_classes, dim = 2 + seed, 3 + 2 * seed, 2 + seed
    options, logit, positive_logit = NAIVE[name]
    loss = build_loss(name, num_classes, dim, **options).double()
    embeddings = torch.randn(batch_size, dim, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(num_classes, (batch_size,))
    if name == "proxy_anchor":
        expected = naive_proxy_anchor(embeddings, loss.proxies, labels, **options)
    else:
        expected = naive_cross_entropy(embeddings, loss.proxies, labels, logit, positive_logit)
    actual = loss(embeddings, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    inputs = (embeddings, loss.proxies)
    for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


PYTORCH_METRIC_LEARNING = {
    "norm_softmax": ({"scale": 23.0}, lambda c, d: pml.NormalizedSoftmaxLoss(c, d, temperature=1 / 23.0)),
    "proxy_nca": ({"scale": 12.0}, lambda c, d: pml.ProxyNCALoss(c, d, softmax_scale=12.0)),
    "cosface": ({"scale": 64.0, "margin": 0.35}, lambda c, d: pml.CosFaceLoss(c, d, margin=0.35, scale=64.0)),
    "arcface": (
        {"scale": 64.0, "margin": 0.5},
        lambda c, d: pml.ArcFaceLoss(c, d, margin=math.degrees(0.5), scale=64.0),
    ),
    "proxy_anchor": ({"alpha": 32.0, "delta": 0.1}, lambda c, d: pml.ProxyAnchorLoss(c, d, margin=0.1, alpha=32.0)),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PYTORCH_METRIC_LEARNING)
def test_a_loss_is_that_of_pytorch_metric_learning(name, seed):
    torch.manual_seed(seed)
    batch_size, num_classes, dim = 4 + 3 * seed, 3 + 4 * seed, 3 + seed
    options, build_theirs = PYTORCH_METRIC_LEARNING[name]
    ours, theirs = build_loss(name, num_classes, dim, **options).double(), build_theirs(num_classes, dim).double()
    weight = theirs.W if hasattr(theirs, "W") else theirs.proxies
    with torch.no_grad():
        weight.copy_(ours.proxies.T if hasattr(theirs, "W") else ours.proxies)
    embeddings = torch.randn(batch_size, dim, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(num_classes, (batch_size,))
    actual, expected = ours(embeddings, labels), theirs(embeddings, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    (of_ours,) = torch.autograd.grad(actual, embeddings)
    (of_theirs,) = torch.autograd.grad(expected, embeddings)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-7, atol=1e-9)


def test_proxy_nca_is_norm_softmax_with_twice_the_scale():
    nca, softmax = build_loss("proxy_nca", 5, 4, scale=12.0), build_loss("norm_softmax", 5, 4, scale=24.0)
    softmax.load_state_dict(nca.state_dict())
    embeddings, labels = torch.randn(8, 4), torch.randint(5, (8,))
    assert nca(embeddings, labels) == softmax(embeddings, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_embeddings_of_any_length_except_softmax(name):
    loss = build_loss(name, 5, 4).double()
    embeddings, labels = torch.randn(8, 4, dtype=torch.float64), torch.randint(5, (8,))
    same = torch.isclose(loss(embeddings, labels), loss(nn.functional.normalize(embeddings), labels), rtol=1e-12)
    assert same == (name != "softmax")


@pytest.mark.parametrize(("canonical", "spelling"), [(name, s) for name in SPELLINGS for s in SPELLINGS[name]])
def test_every_spelling_of_a_name_is_accepted(canonical, spelling):
    assert canonical_name(spelling) == canonical
    assert type(build_loss(spelling, 3, 2)) is LOSSES[canonical]


def test_the_losses_agree_with_the_names_and_options_that_params_yaml_is_checked_against():
    assert list(LOSSES) == list(loss_names.DISPLAY_NAMES) == list(loss_names.OPTIONS)
    for name, loss in LOSSES.items():
        assert loss.display_name == loss_names.DISPLAY_NAMES[name]
        loss(3, 2, **dict.fromkeys(loss_names.OPTIONS[name], 0.25))


def test_an_unknown_loss_is_an_error_that_lists_the_choices():
    with pytest.raises(UserError, match=r"'triplet'.*Norm-SoftMax.*Proxy-Anchor"):
        build_loss("triplet", 3, 2)


def test_an_unknown_option_is_an_error_that_names_it():
    with pytest.raises(UserError, match="Norm-SoftMax has no option 'margin'; it has: scale"):
        build_loss("NormSoftmax", 3, 2, margin=0.1)


def test_proxies_are_initialised_as_published():
    """METHOD.md, section 2: of the (D, C) matrix, Norm-SoftMax uniform within 1/sqrt(C), Proxy-NCA std sqrt(2/D)."""
    num_classes, dim = 400, 100
    norm_softmax = build_loss("norm_softmax", num_classes, dim).proxies
    assert norm_softmax.shape == (num_classes, dim)
    assert 0.99 / 20 < norm_softmax.abs().max() <= 1 / 20
    assert build_loss("proxy_nca", num_classes, dim).proxies.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)


@pytest.mark.parametrize("name", LOSSES)
def test_a_generator_decides_the_initial_proxies(name):
    first, second = (build_loss(name, 5, 4, generator=torch.Generator().manual_seed(7)).proxies for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_runs_on_the_meta_device(name):
    loss = build_loss(name, 5, 4).to("meta")
    embeddings = torch.empty(8, 4, device="meta", requires_grad=True)
    loss(embeddings, torch.empty(8, dtype=torch.int64, device="meta")).backward()
    assert embeddings.grad.shape == (8, 4)


@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_the_arithmetic_is_float32(name):
    loss = build_loss(name, 5, 4)
    embeddings, labels = torch.randn(8, 4).bfloat16(), torch.randint(5, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = loss(embeddings, labels)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, loss(embeddings.float(), labels))


def test_arcface_falls_with_the_angle_all_the_way_to_the_opposite():
    loss = build_loss("arcface", 2, 2).double()
    angles = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    positives = loss.positive(torch.cos(angles))
    assert (positives.diff() < 0).all()
