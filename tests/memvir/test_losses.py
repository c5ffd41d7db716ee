"""Each loss against a second, naive formula written out here, in float64, and against pytorch-metric-learning."""

import inspect
import math
import sys

import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from memvir import sections
from memvir.errors import UserError
from memvir.losses import DECLARATIONS, DISPLAY_NAMES, LOSSES, build_loss, canonical_name, loss_class
from memvir.losses.declarations import RANGES, declaration

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
    assert type(build_loss(spelling, 3, 2)) is loss_class(canonical)


def test_the_losses_agree_with_the_names_and_options_that_params_yaml_is_checked_against():
    for name in LOSSES:
        loss, declared = loss_class(name), DECLARATIONS[name]
        assert loss.display_name == DISPLAY_NAMES[name]
        ours = [cls for cls in loss.__mro__ if cls.__module__.startswith("memvir")]
        taken = {name for cls in ours for name in inspect.signature(cls.__init__).parameters}
        assert declared.options.keys() == taken - {"self", "num_classes", "dim", "generator", "kwargs"}
        assert not any(option.required for option in declared.options.values())


def test_what_a_file_declares_is_read_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "two_losses.py").write_text(WRITTEN)
    monkeypatch.syspath_prepend(tmp_path)
    narrow = declaration("two_losses:Narrow")
    assert narrow.display_name == "Narrow"
    assert {name: (it.annotation, it.required) for name, it in narrow.options.items()} == {
        "width": ("Positive", True),
        "depth": ("float", False),
        "kind": ("Literal['a', 'b']", False),
        "margin": ("NonNegative", False),
        "initialisation": (DECLARATIONS["cosface"].options["initialisation"].annotation, False),
        "scale": ("Positive", False),
    }
    assert declaration("two_losses:Closed").options.keys() == {"width"}
    assert "two_losses" not in sys.modules
    with pytest.raises(UserError, match="two_losses has no class Wide; name the file that it is written in"):
        declaration("two_losses:Wide")
    with pytest.raises(UserError, match="no_losses: there is no such module"):
        declaration("no_losses:Wide")


WRITTEN = """
from torch import nn
from memvir.losses.cosface import CosFace as Base

raise RuntimeError("imported")

class Closed(Base):
    def __init__(self, num_classes, dim, width): ...

class Middle(Base):
    factor = 1.0

class Narrow(Middle, nn.Module):
    display_name = "Narrow"

    def __init__(self, num_classes, dim, width: "Positive", depth=1, *, kind: Literal["a", "b"] = "a", **kwargs): ...
"""


def test_an_unknown_loss_is_an_error_that_lists_the_choices():
    with pytest.raises(UserError, match=r"'triplet'.*Norm-SoftMax.*Proxy-Anchor"):
        build_loss("triplet", 3, 2)


def test_an_unknown_option_is_an_error_that_names_it():
    with pytest.raises(UserError, match=r"Norm-SoftMax has no option 'margin'; it has: scale, initialisation$"):
        build_loss("NormSoftmax", 3, 2, margin=0.1)


def test_proxies_are_initialised_as_published():
    """docs/METHOD.md, section 2: of a (D, C) matrix, Norm-SoftMax uniform within 1/sqrt(C), Proxy-NCA std sqrt(2/D)."""
    num_classes, dim = 400, 100
    norm_softmax = build_loss("norm_softmax", num_classes, dim).proxies
    assert norm_softmax.shape == (num_classes, dim)
    assert 0.99 / 20 < norm_softmax.abs().max() <= 1 / 20
    assert build_loss("proxy_nca", num_classes, dim).proxies.std().item() == pytest.approx(math.sqrt(2 / 100), rel=0.02)


@pytest.mark.parametrize("name", LOSSES)
def test_the_initialisation_of_the_proxies_can_be_chosen_for_every_loss(name):
    num_classes, dim = 400, 100
    for initialisation, size in {"uniform_c": 400, "uniform_d": 100}.items():
        proxies = build_loss(name, num_classes, dim, initialisation=initialisation).proxies
        assert 0.99 < proxies.abs().max() * math.sqrt(size) <= 1
    for initialisation, size in {"normal_c": 400, "normal_d": 100}.items():
        proxies = build_loss(name, num_classes, dim, initialisation=initialisation).proxies
        assert proxies.std().item() == pytest.approx(math.sqrt(2 / size), rel=0.02)
    default = {"proxy_nca": "normal_d", "proxy_anchor": "normal_c"}.get(name, "uniform_c")
    same = [{}, {"initialisation": None}, {"initialisation": default}]
    first, *others = (build_loss(name, 5, 4, **it, generator=torch.Generator().manual_seed(7)).proxies for it in same)
    assert all(torch.equal(first, other) for other in others)
    with pytest.raises(UserError, match="initialisation is uniform_c, uniform_d, normal_c or normal_d, not 'zeros'"):
        build_loss(name, 5, 4, initialisation="zeros")


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


# --- batches that do not fit -----------------------------------------------------------------------------------------


FOUR = torch.randn(4, 6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (
            FOUR,
            torch.tensor([1, 2, 3, 5]),
            "labels must be from 0 to 4, as the loss has 5 classes; these are from 1 to 5",
        ),
        (FOUR, torch.tensor([7, 8, 9, 9]), "these are from 7 to 9"),
        (FOUR, torch.tensor([0, -1, 2, 3]), "these are from -1 to 3"),
        (FOUR, torch.tensor([0, 1, 2, 2**63 + 1], dtype=torch.uint64), "labels must be from 0 to 4"),
        (FOUR, torch.tensor([[0], [1], [2], [3]]), r"a tensor \(4,\) of integers.*not \(4, 1\) of torch.int64"),
        (FOUR, torch.tensor([0, 1, 2]), r"not \(3,\) of torch.int64"),
        (FOUR, torch.tensor(2), r"not \(\) of torch.int64"),
        (FOUR, torch.tensor([0.0, 1.0, 2.0, 3.0]), r"not \(4,\) of torch.float32"),
        (FOUR, torch.tensor([True, False, True, True]), r"not \(4,\) of torch.bool"),
        (FOUR, torch.eye(4, 5), r"not \(4, 5\) of torch.float32"),
        (FOUR, [0, 1, 2, 3], "labels must be a tensor.*not a list"),
        (FOUR, None, "labels must be a tensor.*not a NoneType"),
        (FOUR[:0], torch.tensor([], dtype=torch.int64), "the batch is empty"),
        (FOUR[0], torch.tensor([0]), r"embeddings must be a tensor \(B, D\).*not \(6,\) of torch.float32"),
        (FOUR[None], torch.tensor([0]), r"not \(1, 4, 6\) of torch.float32"),
        (FOUR[:, :5], torch.tensor([0, 1, 2, 3]), "embeddings have 5 dimensions, the loss has 6"),
        (FOUR.long(), torch.tensor([0, 1, 2, 3]), r"not \(4, 6\) of torch.int64"),
        (FOUR.cfloat(), torch.tensor([0, 1, 2, 3]), r"not \(4, 6\) of torch.complex64"),
        (FOUR.to_sparse(), torch.tensor([0, 1, 2, 3]), r"not \(4, 6\) of torch.float32, torch.sparse_coo"),
        (FOUR.numpy(), torch.tensor([0, 1, 2, 3]), "not a ndarray"),
        (
            FOUR,
            torch.empty(4, dtype=torch.int64, device="meta"),
            "labels on meta and the loss on cpu; move them to one",
        ),
        (FOUR.to("meta"), torch.empty(4, dtype=torch.int64, device="meta"), "embeddings are on meta.*the loss on cpu"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_in_one_sentence_by_every_loss(name, embeddings, labels, message):
    with pytest.raises(UserError, match=message) as refusal:
        build_loss(name, 5, 6)(embeddings, labels)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint64])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_any_integer_type_and_layout_are_the_same_labels(name, dtype):
    loss, labels = build_loss(name, 5, 6), torch.tensor([0, 4, 2, 2])
    assert loss(FOUR, labels.to(dtype)) == loss(FOUR, labels)
    strided = torch.stack([labels, labels - 9], 1)[:, 0]
    assert loss(FOUR, strided) == loss(FOUR, labels)


@pytest.mark.parametrize("name", LOSSES)
def test_embeddings_that_are_not_finite_are_no_fault_of_the_batch(name):
    embeddings = FOUR.clone()
    embeddings[1, 2] = math.nan
    assert build_loss(name, 5, 6)(embeddings, torch.tensor([0, 1, 2, 3])).isnan()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 6), "NormSoftMax: num_classes must be a whole number from 1, not 0"),
        ((5, -1), "dim must be a whole number from 1, not -1"),
        ((5.0, 6), "num_classes must be a whole number from 1, not 5.0"),
        (("5", 6), "num_classes must be a whole number from 1, not '5'"),
        ((5, None), "dim must be a whole number from 1, not None"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_an_error(sizes, message):
    with pytest.raises(UserError, match=message):
        build_loss("norm_softmax", *sizes)


@pytest.mark.parametrize("value", ["23", None, math.nan, math.inf, True, [1.0]])
def test_an_option_that_is_no_number_is_an_error(value):
    with pytest.raises(UserError, match="Norm-SoftMax: scale must be a number, not "):
        build_loss("norm_softmax", 5, 6, scale=value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("norm_softmax", {"scale": 0}, "Norm-SoftMax: scale must be above 0, at most 1e9, not 0"),
        ("arcface", {"scale": -5.0}, "ArcFace: scale must be above 0, at most 1e9, not -5.0"),
        ("arcface", {"margin": 28.6}, "ArcFace: margin must be in radians, from 0 to below pi, not 28.6"),
        ("cosface", {"margin": -0.5}, "CosFace: margin must be from 0 to 1e9, not -0.5"),
        ("proxy_anchor", {"alpha": 1e10}, "Proxy-Anchor: alpha must be above 0"),
        ("softmax", {"generator": 5}, "SoftMax: generator must be a torch.Generator, not 5"),
    ],
)
def test_an_option_out_of_its_range_is_an_error(name, options, message):
    with pytest.raises(UserError, match=message):
        build_loss(name, 5, 6, **options)


@pytest.mark.parametrize("kind", RANGES)
def test_a_program_and_params_yaml_may_give_the_same_numbers(kind):
    _, allowed = RANGES[kind]
    of_params = TypeAdapter(getattr(sections, kind))
    for value in (-1.0, -1e-9, 0.0, 1e-9, 1.0, 1.1, 3.141592, math.pi, 1e9, 1.1e9):
        try:
            of_params.validate_python(value)
        except ValidationError:
            assert not allowed(value)
        else:
            assert allowed(value)


@pytest.mark.parametrize("name", [name for name in LOSSES if "scale" in DECLARATIONS[name].options])
def test_a_scale_that_is_changed_counts_from_the_next_step(name):
    changed, built = build_loss(name, 5, 6), build_loss(name, 5, 6, scale=np.float64(3.0))
    built.load_state_dict(changed.state_dict())
    changed(FOUR, torch.tensor([0, 4, 2, 2]))
    changed.scale = 3
    assert changed(FOUR, torch.tensor([0, 4, 2, 2])) == built(FOUR, torch.tensor([0, 4, 2, 2]))
    assert repr(changed) == repr(built)


def test_numbers_of_numpy_are_numbers_and_shown_to_their_last_digit():
    loss = build_loss("arcface", 5, 6, scale=np.float32(30), margin=np.float64(0.12345678901))
    assert type(loss.scale) is type(loss.margin) is float
    assert repr(loss) == "ArcFace(5, 6, scale=30.0, margin=0.12345678901)"


@pytest.mark.parametrize("name", [None, 3, ["softmax"]])
def test_a_name_that_is_none_is_an_unknown_loss(name):
    with pytest.raises(UserError, match="unknown loss"):
        build_loss(name, 5, 6)
