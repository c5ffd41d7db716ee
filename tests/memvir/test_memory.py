"""MemVir against its definition, written out here: everything concatenated, every logit computed at every step."""

import copy
import io
import math

import numpy as np
import pytest
import pytorch_metric_learning.losses as pml
import pytorch_metric_learning.reducers
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from memvir.errors import UserError
from memvir.losses import LOSSES, build_loss
from memvir.memory import MemVir

torch.set_num_threads(1)

# --- the definition ---------------------------------------------------------------------------------------------------


def cross_entropy(embeddings, proxies, labels, scale, positive=lambda cosine: cosine, normalise=F.normalize):
    similarity = normalise(embeddings) @ normalise(proxies).T
    own = F.one_hot(labels, len(proxies)).bool()
    return F.cross_entropy(scale * torch.where(own, positive(similarity), similarity), labels)


def arcface_positive(cosine, margin=0.5):
    angle = torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))
    return torch.where(angle + margin > math.pi, cosine - margin * math.sin(margin), torch.cos(angle + margin))


def proxy_anchor(embeddings, proxies, labels, alpha=32.0, delta=0.1):
    cosine = F.normalize(embeddings) @ F.normalize(proxies).T  # (rows, classes)
    own = F.one_hot(labels, len(proxies)).bool()
    minus_infinity = torch.full_like(cosine, -1e30)
    zero = torch.zeros(1, len(proxies), dtype=cosine.dtype)
    positive = torch.where(own, -alpha * (cosine - delta), minus_infinity)
    negative = torch.where(own, minus_infinity, alpha * (cosine + delta))
    positive_term = torch.cat([zero, positive]).logsumexp(0).sum() / own.any(0).sum()
    return positive_term + torch.cat([zero, negative]).logsumexp(0).mean()


DEFINITIONS = {
    "norm_softmax": lambda e, w, y: cross_entropy(e, w, y, 23.0),
    "proxy_nca": lambda e, w, y: F.cross_entropy(
        -12 * (F.normalize(e)[:, None] - F.normalize(w)[None]).square().sum(2), y
    ),
    "softmax": lambda e, w, y: cross_entropy(e, w, y, 1.0, normalise=lambda x: x),
    "cosface": lambda e, w, y: cross_entropy(e, w, y, 64.0, positive=lambda cosine: cosine - 0.35),
    "arcface": lambda e, w, y: cross_entropy(e, w, y, 64.0, positive=arcface_positive),
    "proxy_anchor": proxy_anchor,
}


class Definition:
    """MemVir as published: a list of all past steps, out of which every (M+1)-th is concatenated."""

    def __init__(self, formula, num_steps, step_gap):
        self.formula, self.num_steps, self.step_gap, self.steps = formula, num_steps, step_gap, []

    def __call__(self, embeddings, proxies, labels, enabled):
        if not enabled:
            return self.formula(embeddings, proxies, labels)
        offsets = [k * (self.step_gap + 1) for k in range(1, self.num_steps + 1)]
        past = [self.steps[-offset] for offset in offsets if offset <= len(self.steps)]
        self.steps.append((embeddings.detach().clone(), proxies.detach().clone(), labels))
        self.used = past
        return self.formula(
            torch.cat([embeddings, *(e for e, _, _ in past)]),
            torch.cat([proxies, *(w for _, w, _ in past)]),
            torch.cat([labels, *(y + (k + 1) * len(proxies) for k, (_, _, y) in enumerate(past))]),
        )


# --- exactness --------------------------------------------------------------------------------------------------------


SMALL = st.integers(2, 8)


@st.composite
def runs(draw, num_classes=SMALL, dim=SMALL):
    """N, M, C, D, the batch sizes of all steps (short last batches), how many of the steps are warm-up, and a seed."""
    num_steps, step_gap = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    batch_size = draw(st.integers(1, 8))
    epoch = [batch_size] * draw(st.integers(1, 5)) + [draw(st.integers(1, batch_size))]
    warm_up = draw(st.integers(0, 2 * len(epoch)))
    length = warm_up + (num_steps + 2) * (step_gap + 1) + len(epoch)  # filled up, and every slot overwritten
    batch_sizes = (epoch * length)[:length]
    seed = draw(st.integers(0, 2**32 - 1))
    return num_steps, step_gap, draw(num_classes), draw(dim), batch_sizes, warm_up, seed


def relative_errors(name, run, dtype):
    """The largest relative error of the loss, and of its gradients as vectors, at any step of a run.

    Relative to their size, or a tenth of the loss's scale if that is more: a batch of one that is classified almost
    perfectly has a loss and gradients that are little more than rounding errors, on both sides.
    """
    num_steps, step_gap, num_classes, dim, batch_sizes, warm_up, seed = run
    generator = torch.Generator().manual_seed(seed)
    memvir = MemVir(build_loss(name, num_classes, dim, generator=generator).to(dtype), num_steps, step_gap)
    definition = Definition(DEFINITIONS[name], num_steps, step_gap)
    of_loss = of_gradients = 0.0
    for step, batch_size in enumerate(batch_sizes):
        memvir.enabled = step >= warm_up
        embeddings = torch.randn(batch_size, dim, dtype=dtype, generator=generator).requires_grad_()
        labels = torch.randint(num_classes, (batch_size,), generator=generator)
        inputs = (embeddings, memvir.proxies)
        actual, expected = memvir(embeddings, labels), definition(*inputs, labels, memvir.enabled)
        actual_gradients, expected_gradients = (torch.autograd.grad(loss, inputs) for loss in (actual, expected))
        floor = memvir.loss.factor / 10
        of_loss = max(of_loss, ((actual - expected).abs() / expected.abs().clamp(min=floor)).item())
        for got, want in zip(actual_gradients, expected_gradients, strict=True):
            of_gradients = max(of_gradients, ((got - want).norm() / want.norm().clamp(min=floor)).item())
        if memvir.enabled:
            assert memvir.num_virtual_classes == len(definition.used) * num_classes
            assert memvir.num_virtual_embeddings == sum(len(e) for e, _, _ in definition.used)
        with torch.no_grad():  # proxies change between steps, in place
            memvir.proxies.add_(torch.randn(num_classes, dim, dtype=dtype, generator=generator), alpha=0.1)
    return of_loss, of_gradients


@pytest.mark.parametrize("name", LOSSES)
@given(run=runs())
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_loss_and_gradients_are_those_of_the_definition_in_float64(name, run):
    assert max(relative_errors(name, run, torch.float64)) < 1e-10


@pytest.mark.parametrize("name", LOSSES)
@given(run=runs(num_classes=st.integers(8, 16), dim=st.integers(16, 32)))  # of few, rounding is magnified
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_loss_and_gradients_are_those_of_the_definition_in_float32(name, run):
    assert max(relative_errors(name, run, torch.float32)) < 1e-5


class PlainSoftMax(nn.Module):
    """A user's own loss, which knows nothing of MemVir."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(num_classes, dim, dtype=torch.float64))

    def forward(self, embeddings, labels):
        return F.cross_entropy(embeddings @ self.proxies.T, labels)


def batches(count, batch_size=5, num_classes=4, dim=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        embeddings = torch.randn(batch_size, dim, dtype=dtype, generator=generator).requires_grad_()
        yield embeddings, torch.randint(num_classes, (batch_size,), generator=generator)


def train(memvir, data):
    """Losses of a few optimiser steps."""
    optimiser = torch.optim.Adam(memvir.parameters(), lr=0.1)
    losses = []
    for embeddings, labels in data:
        optimiser.zero_grad()
        loss = memvir(embeddings, labels)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", LOSSES)
def test_concatenating_a_loss_that_can_do_without_gives_the_same(name):
    torch.manual_seed(0)
    loss = build_loss(name, 4, 6).double()
    quick, definition = MemVir(loss, 3, 1), MemVir(loss, 3, 1, concatenate=True)
    for embeddings, labels in batches(15):
        torch.testing.assert_close(quick(embeddings, labels), definition(embeddings, labels), rtol=1e-12, atol=0)
        assert quick.num_virtual_embeddings == definition.num_virtual_embeddings


def test_a_users_own_loss_works_unmodified():
    torch.manual_seed(0)
    memvir, definition = MemVir(PlainSoftMax(4, 6), 3, 1), Definition(DEFINITIONS["softmax"], 3, 1)
    for embeddings, labels in batches(15):
        inputs = (embeddings, memvir.proxies)
        actual, expected = memvir(embeddings, labels), definition(*inputs, labels, enabled=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
        with torch.no_grad():
            memvir.proxies.mul_(0.9)


@pytest.mark.parametrize("concatenate", [False, True])
def test_gradients_accumulate_over_several_forwards_as_those_of_the_definition_do(concatenate):
    torch.manual_seed(0)
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), 3, 1, concatenate=concatenate)
    definition = Definition(DEFINITIONS["norm_softmax"], 3, 1)
    data = list(batches(24))
    for start in range(0, 24, 3):
        parts = data[start : start + 3]
        actual = sum(memvir(*part) for part in parts)
        expected = sum(definition(e, memvir.proxies, y, enabled=True) for e, y in parts)
        inputs = [memvir.proxies, *(embeddings for embeddings, _ in parts)]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
        with torch.no_grad():
            memvir.proxies.mul_(-0.9)


# --- losses of other people -------------------------------------------------------------------------------------------


PYTORCH_METRIC_LEARNING = {
    "NormalizedSoftmaxLoss": {},
    "CosFaceLoss": {},
    "ArcFaceLoss": {},
    "LargeMarginSoftmaxLoss": {},
    "SphereFaceLoss": {},
    "ProxyNCALoss": {"softmax_scale": 12},
    "ProxyAnchorLoss": {},
    "SubCenterArcFaceLoss": {"sub_centers": 3},
    "SoftTripleLoss": {"centers_per_class": 2},
}


def theirs(name, num_classes):
    options = PYTORCH_METRIC_LEARNING[name]
    return getattr(pml, name)(num_classes=num_classes, embedding_size=6, **options).double()


def their_parameter(loss):
    (parameter,) = loss.parameters()
    return parameter, parameter.T if parameter.shape[0] == 6 else parameter


@pytest.mark.parametrize("name", PYTORCH_METRIC_LEARNING)
def test_a_loss_of_pytorch_metric_learning_is_that_loss_built_for_all_classes_and_given_everything(name):
    """The reference is a loss of (n+1)C classes of its own, whose proxies are overwritten with all that are in use."""
    torch.manual_seed(0)
    memvir = MemVir(theirs(name, 4), 3, 1)
    parameter, _ = their_parameter(memvir.loss)

    def formula(embeddings, proxies, labels):
        reference = theirs(name, num_classes=4 * len(proxies) // rows)
        labels = labels // rows * 4 + labels % rows  # the definition counts a class for each proxy
        name_of_parameter, own = next(reference.named_parameters())
        proxies = proxies.T if own.shape[0] == 6 else proxies
        return torch.func.functional_call(reference, {name_of_parameter: proxies}, (embeddings, labels))

    rows = parameter.numel() // 6
    definition = Definition(formula, 3, 1)
    for embeddings, labels in batches(14):
        actual = memvir(embeddings, labels)
        expected = definition(embeddings, their_parameter(memvir.loss)[1], labels, enabled=True)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        inputs = (embeddings, parameter)
        for got, want in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert memvir.num_virtual_classes == 12
    memvir.eval()
    assert memvir(embeddings, labels) == memvir.loss(embeddings, labels)  # and it believes in C classes again


@pytest.mark.parametrize(
    ("ours", "name", "options"),
    [
        ("norm_softmax", "NormalizedSoftmaxLoss", {"temperature": 1 / 23}),
        ("cosface", "CosFaceLoss", {}),
        ("proxy_nca", "ProxyNCALoss", {"softmax_scale": 12}),
        ("proxy_anchor", "ProxyAnchorLoss", {}),
    ],
)
def test_with_virtual_classes_their_losses_are_ours(ours, name, options):
    torch.manual_seed(0)
    loss = getattr(pml, name)(num_classes=4, embedding_size=6, **options).double()
    quick, concatenated = MemVir(build_loss(ours, 4, 6).double(), 3, 1), MemVir(loss, 3, 1)
    with torch.no_grad():
        quick.proxies.copy_(concatenated.proxies)
    for embeddings, labels in batches(10):
        torch.testing.assert_close(quick(embeddings, labels), concatenated(embeddings, labels), rtol=1e-9, atol=0)


def test_a_loss_of_pytorch_metric_learning_trains_saves_and_resumes():
    torch.manual_seed(0)
    memvir, resumed = (MemVir(pml.ArcFaceLoss(4, 6), 2, 1) for _ in range(2))
    data = list(batches(12, dtype=torch.float32))
    train(memvir, data[:7])
    resumed.load_state_dict(memvir.state_dict())
    assert train(resumed, data[7:]) == train(memvir, data[7:])


class Counting(PlainSoftMax):
    """Fixed to its number of classes, and it counts its calls."""

    def __init__(self, num_classes, dim):
        super().__init__(num_classes, dim)
        self.register_buffer("calls", torch.zeros(()))
        self.size = num_classes

    def forward(self, embeddings, labels):
        self.calls += 1
        one_hot = F.one_hot(labels, self.size)
        return (embeddings @ self.proxies.T).mul(one_hot).sum()


def test_a_loss_that_cannot_take_more_classes_is_refused_at_once_and_left_as_it_was():
    loss = Counting(4, 6)
    with pytest.raises(UserError, match=r"Counting with more classes.*fails \(.*\); let it take.*`num_classes`"):
        MemVir(loss, 3, 1)
    assert loss.calls == 0
    MemVir(loss, 0, 0)  # of which none are asked for


class WithProperty(PlainSoftMax):
    @property
    def num_classes(self):
        return len(self.proxies)

    def forward(self, embeddings, labels):
        one_hot = F.one_hot(labels, self.num_classes)
        return -((embeddings @ self.proxies.T).log_softmax(1) * one_hot).sum(1).mean()


def test_a_loss_that_computes_its_number_of_classes_works():
    torch.manual_seed(0)
    memvir, definition = MemVir(WithProperty(4, 6), 2, 0), Definition(DEFINITIONS["softmax"], 2, 0)
    for embeddings, labels in batches(6):
        expected = definition(embeddings, memvir.proxies, labels, enabled=True)
        torch.testing.assert_close(memvir(embeddings, labels), expected, rtol=1e-12, atol=0)


def test_a_loss_that_is_not_one_number_is_refused():
    per_embedding = pml.NormalizedSoftmaxLoss(4, 6, reducer=pytorch_metric_learning.reducers.DoNothingReducer())
    with pytest.raises(UserError, match="the mean loss, one number; NormalizedSoftmaxLoss returns"):
        MemVir(per_embedding, 3, 1)


@pytest.mark.parametrize(
    "loss", [pml.TripletMarginLoss(), pml.P2SGradLoss(6, 4), nn.CrossEntropyLoss(), nn.Linear(4, 6), "softmax"]
)
def test_a_loss_without_proxies_is_an_error(loss):
    with pytest.raises(UserError, match=r"parameter `proxies` \(C, D\), or `W` or `fc`.*; \w+ has none"):
        MemVir(loss, 1, 1)


class Several(PlainSoftMax):
    """Two proxies to a class: those of all classes, and then those of all classes again."""

    def __init__(self, num_classes, dim):
        super().__init__(2 * num_classes, dim)
        self.num_classes = num_classes

    def forward(self, embeddings, labels):
        return F.cross_entropy((embeddings @ self.proxies.T).view(-1, 2, self.num_classes).amax(1), labels)


class Closed(PlainSoftMax):
    def forward(self, embeddings, labels):
        return F.cross_entropy(embeddings @ self.proxies[:4].T, labels % 4)


class Sum(PlainSoftMax):
    def forward(self, embeddings, labels):
        return F.cross_entropy(embeddings @ self.proxies.T, labels, reduction="sum")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Several, "takes all classes alike, the proxies of each side by side; Several does not"),
        (Closed, "over all the proxies that it is given; Closed leaves out those added"),
        (Sum, "needs the mean loss; Sum adds up the losses"),
    ],
)
def test_a_loss_that_would_be_another_with_virtual_classes_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        MemVir(loss(4, 6), 2, 0)


class WithDropout(PlainSoftMax):
    def forward(self, embeddings, labels):
        return F.cross_entropy(embeddings @ F.dropout(self.proxies).T, labels)


def test_a_loss_that_draws_at_random_is_taken_and_its_trial_draws_nothing():
    loss, before = WithDropout(4, 6), torch.get_rng_state()
    MemVir(loss, 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["SubCenterArcFaceLoss", "SoftTripleLoss"])
def test_a_number_of_classes_may_be_one_of_numpy(name):
    assert MemVir(theirs(name, np.int64(4)), 2, 0).num_classes == 4


@pytest.mark.parametrize("training", [False, True])
def test_a_loss_of_other_people_keeps_the_type_of_its_parameter(training):
    memvir = MemVir(pml.ArcFaceLoss(4, 6), 2, 0).half().train(training)
    for embeddings, labels in batches(4, dtype=torch.float16):
        memvir(embeddings, labels).backward()
    assert memvir.loss.W.dtype == memvir.loss.W.grad.dtype == torch.float16


def test_under_autocast_a_loss_of_other_people_is_computed_in_float32_before_and_after_the_warm_up():
    torch.manual_seed(0)
    loss = pml.ArcFaceLoss(4, 6)
    memvir, without = MemVir(loss, 2, 0), MemVir(loss, 2, 0)
    for step, (embeddings, labels) in enumerate(batches(6, dtype=torch.float32)):
        memvir.enabled = without.enabled = step > 2
        half = embeddings.detach().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = memvir(half, labels)
        assert value.dtype == loss.W.dtype == torch.float32
        assert value == without(half.float(), labels)


# --- use in a training loop -------------------------------------------------------------------------------------------


def test_virtual_classes_come_in_every_m_plus_1_steps_until_there_are_n_sets_of_them():
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), num_steps=3, step_gap=1)
    seen = []
    for embeddings, labels in batches(10):
        memvir(embeddings, labels)
        seen.append((memvir.num_virtual_classes, memvir.num_virtual_embeddings))
    assert [classes for classes, _ in seen] == [0, 0, 4, 4, 8, 8, 12, 12, 12, 12]
    assert [embeddings for _, embeddings in seen] == [0, 0, 5, 5, 10, 10, 15, 15, 15, 15]


@pytest.mark.parametrize("concatenate", [False, True])
def test_disabled_or_in_eval_mode_it_is_the_plain_loss_and_stores_nothing(concatenate):
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), num_steps=2, step_gap=0, concatenate=concatenate)
    memvir.enabled = False
    for embeddings, labels in batches(3):
        assert memvir(embeddings, labels) == memvir.loss(embeddings, labels)
    memvir.enabled = True
    memvir.eval()
    for embeddings, labels in batches(3):
        assert memvir(embeddings, labels) == memvir.loss(embeddings, labels)
    assert (memvir.num_virtual_classes, memvir.num_virtual_embeddings, memvir.steps_in_use()) == (0, 0, [])
    assert not any("past" in name for name in memvir.state_dict())


def test_without_steps_it_is_the_plain_loss():
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), num_steps=0, step_gap=3)
    for embeddings, labels in batches(3):
        assert memvir(embeddings, labels) == memvir.loss(embeddings, labels)
    assert (memvir.num_virtual_classes, memvir.num_virtual_embeddings) == (0, 0)


def test_the_proxies_are_those_of_the_loss_and_the_only_parameters():
    memvir = MemVir(build_loss("norm_softmax", 4, 6), num_steps=2, step_gap=0)
    assert memvir.proxies is memvir.loss.proxies
    assert [parameter is memvir.proxies for parameter in memvir.parameters()] == [True]


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor"])
def test_a_larger_batch_than_the_first_makes_the_memory_grow(name):
    memvir = MemVir(build_loss(name, 4, 6).double(), 3, 1)
    definition = Definition(DEFINITIONS[name], 3, 1)
    for batch_size in [2, 3, 1, 5, 4, 2, 7, 3, 1, 6, 2, 2]:
        (embeddings, labels), *_ = batches(1, batch_size, seed=batch_size)
        actual, expected = memvir(embeddings, labels), definition(embeddings, memvir.proxies, labels, enabled=True)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


def test_the_embeddings_and_labels_may_be_overwritten_after_the_step():
    torch.manual_seed(0)
    loss = build_loss("softmax", 4, 6).double()
    memvir, undisturbed = MemVir(loss, 2, 0), MemVir(loss, 2, 0)
    for embeddings, labels in batches(6):
        expected = undisturbed(embeddings.detach().clone(), labels.clone())
        assert memvir(embeddings, labels) == expected
        with torch.no_grad():
            embeddings.zero_()
            labels.zero_()


def test_backward_may_run_twice_and_after_later_steps():
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), 2, 0)
    at_once = MemVir(memvir.loss, 2, 0)
    data = list(batches(6))
    expected = [torch.autograd.grad(at_once(*batch), batch[0])[0] for batch in data]
    losses = [memvir(*batch) for batch in data]
    for loss, (embeddings, _), gradient in zip(losses, data, expected, strict=True):
        assert torch.equal(torch.autograd.grad(loss, embeddings, retain_graph=True)[0], gradient)
        assert torch.equal(torch.autograd.grad(2 * loss, embeddings)[0], 2 * gradient)


def test_without_gradients_the_loss_is_the_same():
    loss = build_loss("proxy_anchor", 4, 6).double()
    memvir, without = MemVir(loss, 2, 0), MemVir(loss, 2, 0)
    for embeddings, labels in batches(5):
        with torch.no_grad():
            value = without(embeddings, labels)
        assert not value.requires_grad
        assert value == memvir(embeddings, labels)


@pytest.mark.parametrize("concatenate", [False, True])
def test_steps_in_use_are_those_of_the_last_forward_newest_first(concatenate):
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), 3, 1, concatenate=concatenate)
    definition = Definition(DEFINITIONS["norm_softmax"], 3, 1)
    for step in range(12):
        (embeddings, labels), *_ = batches(1, 5 if step % 3 else 2, seed=step)
        memvir(embeddings, labels)
        definition(embeddings, memvir.proxies, labels, enabled=True)
        for seen, (e, w, y) in zip(memvir.steps_in_use(), definition.used, strict=True):
            assert torch.equal(seen[2], y)
            torch.testing.assert_close(F.normalize(seen[1]), F.normalize(e))
            torch.testing.assert_close(F.normalize(seen[3]), F.normalize(w))
        assert [k for k, _, _, _ in memvir.steps_in_use()] == list(range(1, len(definition.used) + 1))
        with torch.no_grad():
            memvir.proxies.mul_(-0.9)


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_in_eval_mode_changes_no_later_step(mode, concatenate):
    torch.manual_seed(0)
    loss = build_loss("norm_softmax", 4, 6).double()
    memvir, undisturbed = (MemVir(loss, 2, 1, concatenate=concatenate) for _ in range(2))
    validation = list(batches(2, batch_size=9, seed=1))
    for embeddings, labels in batches(9):
        memvir.eval()
        with mode():
            for batch in validation:
                assert memvir(*batch) == loss(*batch)
        memvir.train()
        assert memvir(embeddings, labels) == undisturbed(embeddings, labels)


@pytest.mark.parametrize("name", ["norm_softmax", "softmax", "proxy_anchor"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_step_without_gradients_is_a_step_and_training_goes_on_after_it(mode, name):
    torch.manual_seed(0)
    memvir, with_gradients = (MemVir(build_loss(name, 4, 6).double(), 2, 0) for _ in range(2))
    with_gradients.load_state_dict(memvir.state_dict())
    for step, (embeddings, labels) in enumerate(batches(9, batch_size=5)):
        expected = with_gradients(embeddings, labels)
        if step % 3 == 0:
            with mode():
                assert memvir(embeddings, labels) == expected
        else:
            actual = memvir(embeddings, labels)
            got, want = (torch.autograd.grad(loss, embeddings)[0] for loss in (actual, expected))
            assert torch.equal(got, want)


@pytest.mark.parametrize("loss", [build_loss(name, 4, 6) for name in LOSSES] + [pml.ProxyAnchorLoss(4, 6)], ids=repr)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(loss, through_a_file):
    memvir = MemVir(copy.deepcopy(loss), 3, 1)
    data = list(batches(16, dtype=torch.float32))
    train(memvir, data[:7])  # the seventh is pending
    if through_a_file:
        file = io.BytesIO()
        torch.save(memvir, file)
        file.seek(0)
        duplicate = torch.load(file, weights_only=False)
    else:
        duplicate = copy.deepcopy(memvir)
    expected = train(memvir, data[7:])
    assert train(duplicate, data[7:]) == expected
    assert all(torch.equal(*pair) for pair in zip(memvir.buffers(), duplicate.buffers(), strict=True))


def test_data_parallel_is_refused_with_what_to_wrap_instead():
    """What torch calls to copy a module for each GPU, at each batch; where there is no GPU it copies nothing."""
    with pytest.raises(UserError, match=r"DataParallel.*wrap the embedder alone"):
        MemVir(build_loss("norm_softmax", 4, 6), 2, 0)._replicate_for_data_parallel()


# --- steps that are not finite ---------------------------------------------------------------------------------------


def broken(embeddings, value, rows):
    embeddings = embeddings.detach().clone()
    embeddings[rows, 1] = value
    return embeddings.requires_grad_()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_not_finite_make_their_own_step_nan_and_are_zeros_to_later_ones(name, step, value):
    torch.manual_seed(0)
    quick = MemVir(build_loss(name, 4, 6).double(), 3, 1)
    concatenated = MemVir(quick.loss, 3, 1, concatenate=True)
    definition = Definition(DEFINITIONS[name], 3, 1)
    for number, (embeddings, labels) in enumerate(batches(18)):
        if number == step:
            bad, zeros = broken(embeddings, value, [0, 3]), embeddings.detach().clone()
            zeros[[0, 3]] = 0
            definition(zeros, quick.proxies, labels, enabled=True)
            for memvir in (quick, concatenated):
                loss = memvir(bad, labels)
                assert loss.isnan()
                for gradient in torch.autograd.grad(loss, (bad, quick.proxies)):
                    assert gradient.isnan().all()  # so that every optimiser's GradScaler skips the step
            continue
        inputs = (embeddings, quick.proxies)
        expected = definition(*inputs, labels, enabled=True)
        gradients = torch.autograd.grad(expected, inputs)
        for memvir in (quick, concatenated):
            actual = memvir(embeddings, labels)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
            for got, want in zip(torch.autograd.grad(actual, inputs), gradients, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_proxies_that_are_not_finite_leave_the_memory_with_the_step(name):
    """As when a user loads the last good proxies into a run that has diverged."""
    torch.manual_seed(0)
    quick = MemVir(build_loss(name, 4, 6), 3, 0)
    concatenated = MemVir(quick.loss, 3, 0, concatenate=True)
    good = quick.proxies.detach().clone()
    for step, (embeddings, labels) in enumerate(batches(10, dtype=torch.float32)):
        with torch.no_grad():
            quick.proxies.copy_(good)
            if step == 4:
                quick.proxies[1, 2] = math.nan
        losses = quick(embeddings, labels), concatenated(embeddings, labels)
        assert all(loss.isnan() if step == 4 else loss.isfinite() for loss in losses)
        torch.testing.assert_close(*losses, equal_nan=True)


def test_a_loss_of_other_people_goes_on_after_a_step_that_is_not_finite():
    torch.manual_seed(0)
    memvir = MemVir(pml.ProxyAnchorLoss(4, 6), 3, 0)
    for step, (embeddings, labels) in enumerate(batches(8, dtype=torch.float32)):
        loss = memvir(broken(embeddings, math.nan, [2]) if step == 3 else embeddings, labels)
        assert loss.isnan() if step == 3 else loss.isfinite()


def test_a_grad_scaler_skips_a_step_that_overflows_and_the_run_goes_on():
    torch.manual_seed(0)
    layer, memvir = nn.Linear(8, 6), MemVir(build_loss("norm_softmax", 4, 6), 2, 0)
    optimisers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in (layer, memvir)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    changed = []
    for step in range(9):
        before = [parameter.clone() for parameter in (*layer.parameters(), memvir.proxies)]
        images = torch.randn(5, 8) * (1e5 if step in (0, 4) else 1)
        loss = memvir(layer(images).half(), torch.randint(4, (5,)))  # beyond 65,504 is infinite
        for optimiser in optimisers:
            optimiser.zero_grad()
        scaler.scale(loss).backward()
        for optimiser in optimisers:
            scaler.step(optimiser)
        scaler.update()
        after = (*layer.parameters(), memvir.proxies)
        changed.append([not torch.equal(*pair) for pair in zip(before, after, strict=True)])
    assert changed == [[step not in (0, 4)] * 3 for step in range(9)]


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("steps_before", [0, 1, 4, 13])
@pytest.mark.parametrize("name", LOSSES)
def test_a_run_continues_bit_for_bit_from_its_state(name, steps_before, concatenate):
    torch.manual_seed(0)
    memvir = MemVir(build_loss(name, 4, 6), 3, 1, concatenate=concatenate)
    data = list(batches(steps_before + 9, dtype=torch.float32))
    data[steps_before - 1 :: 3] = batches(len(data[steps_before - 1 :: 3]), 3, dtype=torch.float32)  # short ones
    train(memvir, data[:steps_before])
    file = io.BytesIO()
    torch.save(memvir.state_dict(), file)
    file.seek(0)

    resumed = MemVir(build_loss(name, 4, 6), 3, 1, concatenate=concatenate)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.num_virtual_classes == memvir.num_virtual_classes
    assert resumed.num_virtual_embeddings == memvir.num_virtual_embeddings
    for ours, theirs in zip(resumed.steps_in_use(), memvir.steps_in_use(), strict=True):
        assert ours[0] == theirs[0]
        assert all(torch.equal(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True))
    assert train(resumed, data[steps_before:]) == train(memvir, data[steps_before:])
    assert torch.equal(resumed.proxies, memvir.proxies)


def test_a_state_may_be_loaded_over_another_memory():
    torch.manual_seed(0)
    fresh, used = (MemVir(build_loss("norm_softmax", 4, 6), 3, 1) for _ in range(2))
    empty_state = {key: value.clone() if torch.is_tensor(value) else value for key, value in fresh.state_dict().items()}
    train(used, batches(9, batch_size=8, dtype=torch.float32))
    used.load_state_dict(empty_state)
    data = list(batches(9, dtype=torch.float32))
    assert train(used, data) == train(fresh, data)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_steps": 4}, r"num_steps \(N\) 3, not 4"),
        ({"step_gap": 2}, r"step_gap \(M\) 1, not 2"),
        ({"num_classes": 5}, r"number of classes \(C\) 4, not 5"),
        ({"dim": 7}, r"embedding dimension \(D\) 6, not 7"),
        ({"storage_dtype": "bfloat16"}, "storage_dtype torch.float32, not torch.bfloat16"),
        ({"name": "proxy_nca"}, "loss NormSoftMax.*, not ProxyNCA"),
        ({"scale": 24.0}, "scale=23.*, not .*scale=24"),
    ],
)
def test_a_state_of_other_settings_is_an_error_that_says_which(other, message):
    def build(name="norm_softmax", num_classes=4, dim=6, num_steps=3, step_gap=1, storage_dtype=None, scale=23.0):
        return MemVir(build_loss(name, num_classes, dim, scale=scale), num_steps, step_gap, storage_dtype=storage_dtype)

    memvir = build()
    train(memvir, batches(5, dtype=torch.float32))
    with pytest.raises(UserError, match=message):
        build(**other).load_state_dict(memvir.state_dict())


@pytest.mark.parametrize(
    ("name", "number"), [("norm_softmax", "scale"), ("arcface", "margin"), ("proxy_anchor", "alpha")]
)
def test_a_loss_may_be_changed_while_it_trains_only_where_nothing_was_computed_with_it(name, number):
    loss = build_loss(name, 4, 6).double()
    memvir, concatenated = MemVir(loss, 2, 0), MemVir(loss, 2, 0, concatenate=True)
    setattr(loss, number, 0.4)
    for embeddings, labels in batches(4):
        torch.testing.assert_close(memvir(embeddings, labels), concatenated(embeddings, labels))
    setattr(loss, number, 0.3)
    saved = memvir.state_dict()
    for module in (memvir, MemVir(loss, 2, 0)):
        module.load_state_dict(saved)
        with pytest.raises(UserError, match=rf"{number}=0.4.* now has .*{number}=0.3.*concatenate=True"):
            module(embeddings, labels)
    assert concatenated(embeddings, labels).isfinite()


def test_a_number_that_differs_in_its_last_digit_is_another_setting():
    memvir, other = (MemVir(build_loss("arcface", 4, 6, margin=np.float64(m)), 2, 0) for m in (0.5, 0.50000001))
    with pytest.raises(UserError, match=r"margin=0.5\), not .*margin=0.50000001"):
        other.load_state_dict(memvir.state_dict())


class Learning(PlainSoftMax):
    def __init__(self, num_classes, dim):
        super().__init__(num_classes, dim)
        self.bias = nn.Parameter(torch.zeros(()))

    def extra_repr(self):
        return f"bias={self.bias.item()}"


def test_a_loss_that_shows_what_it_has_learnt_resumes():
    memvir, resumed = (MemVir(Learning(4, 6), 2, 0) for _ in range(2))
    with torch.no_grad():
        memvir.loss.bias.add_(1)
    resumed.load_state_dict(memvir.state_dict())
    assert resumed.loss.bias == 1


def test_a_state_without_its_memory_is_an_error():
    memvir = MemVir(build_loss("norm_softmax", 4, 6).double(), 2, 0)
    train(memvir, batches(3))
    partial = {key: value for key, value in memvir.state_dict().items() if key != "block_lse"}
    with pytest.raises(UserError, match="lacks part of its memory; load all, or leave _extra_state out too"):
        memvir.load_state_dict(partial, strict=False)


# --- types and devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_runs_on_the_meta_device(name, concatenate):
    memvir = MemVir(build_loss(name, 4, 6), 3, 1, concatenate=concatenate).to("meta")
    for step in range(12):
        embeddings = torch.empty(5 if step % 4 else 3, 6, device="meta", requires_grad=True)
        memvir(embeddings, torch.empty(len(embeddings), dtype=torch.int64, device="meta")).backward()
        assert embeddings.grad.shape == embeddings.shape
    assert memvir.num_virtual_classes == 12


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_under_autocast_the_arithmetic_is_float32(name, concatenate):
    torch.manual_seed(0)
    loss = build_loss(name, 4, 6)
    memvir, without = (MemVir(loss, 3, 1, concatenate=concatenate) for _ in range(2))
    for embeddings, labels in batches(12, dtype=torch.float32):
        half = embeddings.detach().bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = memvir(half, labels)
        value.backward()
        assert value.dtype == torch.float32
        assert half.grad.dtype == torch.bfloat16
        assert torch.equal(value, without(half.detach().float(), labels))


def test_stored_in_bfloat16_the_memory_takes_half_and_the_loss_is_close():
    torch.manual_seed(0)
    loss = build_loss("norm_softmax", 4, 64)
    exact, rounded = MemVir(loss, 3, 1), MemVir(loss, 3, 1, storage_dtype="bfloat16")
    for embeddings, labels in batches(12, dim=64, dtype=torch.float32):
        torch.testing.assert_close(rounded(embeddings, labels), exact(embeddings, labels), rtol=2e-3, atol=0)
    assert rounded.past_embeddings.nbytes * 2 == exact.past_embeddings.nbytes
    assert rounded.past_proxies.nbytes * 2 == exact.past_proxies.nbytes


@pytest.mark.parametrize("concatenate", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_module_that_moves_to_another_device_takes_its_memory_along(name, concatenate):
    memvir = MemVir(build_loss(name, 4, 6), 2, 0, concatenate=concatenate)
    for embeddings, labels in batches(5, dtype=torch.float32):
        memvir(embeddings, labels)
    memvir.to("meta")
    tensors = [*memvir.state_dict().values(), *memvir.get_extra_state()["pending"].values()]
    assert {tensor.device.type for tensor in tensors if torch.is_tensor(tensor)} == {"meta"}
    for embeddings, labels in batches(3, batch_size=7, dtype=torch.float32):
        assert memvir(embeddings.detach().to("meta"), labels.to("meta")).device.type == "meta"
    assert memvir.num_virtual_classes == 8


@pytest.mark.parametrize("name", LOSSES)
def test_a_module_that_is_made_double_goes_on_in_double(name):
    torch.manual_seed(0)
    memvir, definition = MemVir(build_loss(name, 4, 6), 2, 0), Definition(DEFINITIONS[name], 2, 0)
    for step, (embeddings, labels) in enumerate(batches(8, dtype=torch.float32)):
        if step == 4:
            memvir.double()
            definition.steps = [(e.double(), w.double(), y) for e, w, y in definition.steps]
        embeddings = embeddings.to(memvir.proxies.dtype)
        actual, expected = memvir(embeddings, labels), definition(embeddings, memvir.proxies, labels, enabled=True)
        assert actual.dtype == memvir.proxies.dtype == memvir.past_proxies.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)  # the memory itself is that of float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_module_that_is_made_half_keeps_a_memory_that_is_exact(name, dtype):
    torch.manual_seed(0)
    memvir, definition = MemVir(build_loss(name, 4, 6), 2, 0), Definition(DEFINITIONS[name], 2, 0)
    for step, (embeddings, labels) in enumerate(batches(8, dtype=torch.float32)):
        if step == 4:
            memvir.to(dtype)
        embeddings = embeddings.detach().to(memvir.proxies.dtype)
        expected = definition(embeddings.float(), memvir.proxies.float(), labels, enabled=True)
        torch.testing.assert_close(memvir(embeddings, labels), expected, rtol=1e-5, atol=0)
    assert {buffer.dtype for buffer in memvir.buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("storage_dtype", ["bfloat16", "float64"])
def test_what_is_stored_keeps_its_type_when_the_module_changes_its_own(storage_dtype):
    memvir = MemVir(build_loss("norm_softmax", 4, 6), 2, 0, storage_dtype=storage_dtype)
    for embeddings, labels in batches(4, dtype=torch.float32):
        memvir(embeddings, labels)
    memvir.double().to(torch.bfloat16)
    assert memvir.past_embeddings.dtype == memvir.past_proxies.dtype == getattr(torch, storage_dtype)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "step_gap"), [(-1, 0), (0, -1), (2.0, 0), (2, "1"), (None, 0)])
def test_settings_that_are_not_whole_numbers_from_0_are_an_error(num_steps, step_gap):
    with pytest.raises(UserError, match=f"0 or more, not {num_steps} and {step_gap}; use whole numbers"):
        MemVir(build_loss("norm_softmax", 4, 6), num_steps, step_gap)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("loss", [build_loss("proxy_anchor", 4, 6), pml.ProxyAnchorLoss(4, 6), pml.ArcFaceLoss(4, 6)])
@pytest.mark.parametrize(
    ("dim", "labels", "message"),
    [
        (6, [1, 2, 4], "labels must be from 0 to 3, as the loss has 4 classes; these are from 1 to 4"),
        (6, [-1, 2, 3], "these are from -1 to 3"),
        (6, [0, 1], r"labels must be a tensor \(3,\) of integers.*not \(2,\) of torch.int64"),
        (6, [0.0, 1.0, 2.0], r"not \(3,\) of torch.float32"),
        (5, [0, 1, 2], "embeddings have 5 dimensions, the loss has 6"),
    ],
)
def test_a_batch_that_does_not_fit_is_an_error_and_no_step(loss, enabled, dim, labels, message):
    memvir = MemVir(loss, 2, 0)
    memvir.enabled = enabled
    for embeddings, good in batches(4, dtype=torch.float32):
        memvir(embeddings, good)
    with pytest.raises(UserError, match=message):
        memvir(torch.randn(3, dim), torch.tensor(labels))
    assert memvir.get_extra_state()["step"] == 4 * enabled


def test_labels_of_every_integer_type_are_the_same_labels():
    torch.manual_seed(0)
    loss = build_loss("norm_softmax", 4, 6).double()
    memvir, narrow = MemVir(loss, 2, 0), MemVir(loss, 2, 0)
    for dtype, (embeddings, labels) in zip(
        [torch.uint8, torch.int16, torch.uint64, torch.int32], batches(4), strict=True
    ):
        assert narrow(embeddings, labels.to(dtype)) == memvir(embeddings, labels)


@pytest.mark.parametrize("storage_dtype", ["half a byte", "int8", torch.int8, "float16", 32])
def test_an_unknown_storage_type_is_an_error(storage_dtype):
    with pytest.raises(UserError, match="storage_dtype is float32 or bfloat16"):
        MemVir(build_loss("norm_softmax", 4, 6), 1, 1, storage_dtype=storage_dtype)
