"""MemVir against its definition, written out here: everything concatenated, every logit computed at every step."""

import io
import math

import pytest
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


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_steps", "step_gap"), [(-1, 0), (0, -1)])
def test_negative_settings_are_an_error(num_steps, step_gap):
    with pytest.raises(UserError, match=f"0 or more, not {num_steps} and {step_gap}"):
        MemVir(build_loss("norm_softmax", 4, 6), num_steps, step_gap)


def test_a_loss_without_proxies_is_an_error():
    with pytest.raises(UserError, match=r"parameter `proxies`.*CrossEntropyLoss has none"):
        MemVir(nn.CrossEntropyLoss(), 1, 1)


@pytest.mark.parametrize("storage_dtype", ["half a byte", "int8", torch.int8])
def test_an_unknown_storage_type_is_an_error(storage_dtype):
    with pytest.raises(UserError, match="storage_dtype is float32 or bfloat16"):
        MemVir(build_loss("norm_softmax", 4, 6), 1, 1, storage_dtype=storage_dtype)
