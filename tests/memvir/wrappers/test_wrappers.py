"""MemVir's rivals against naive formulas in float64, and what all wrappers promise a training loop."""

import copy
import io
import math

import numpy as np
import pytest
import torch

from memvir.errors import UserError
from memvir.losses import LOSSES, build_loss
from memvir.memory import MemVir
from memvir.wrappers import WRAPPERS, BroadFace, ProxySynthesis, VirtualSoftmax, wrap
from memvir.wrappers.settings import Wrapped

torch.set_num_threads(1)

C, D = 5, 6
SETTINGS = {
    "memvir": {"num_steps": 2, "step_gap": 1},
    "proxy_synthesis": {"alpha": 0.4, "mu": 0.75, "seed": 3},
    "virtual_softmax": {},
    "broadface": {"queue_size": 11},
}
REFUSED = {("proxy_synthesis", "softmax"), ("virtual_softmax", "proxy_anchor")}
PAIRS = [(wrapper, loss) for wrapper in WRAPPERS for loss in LOSSES if (wrapper, loss) not in REFUSED]
RIVALS = [pair for pair in PAIRS if pair[0] != "memvir"]
SIZES = (8, 8, 5, 8, 8)  # a queue of 11 runs over twice


def wrapped(wrapper, loss="norm_softmax", dtype=torch.float64):
    torch.manual_seed(0)
    return wrap(build_loss(loss, C, D).to(dtype), wrapper, **SETTINGS[wrapper]).to(dtype)


def batch(step, dtype=torch.float64, size=8):
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return embeddings, torch.randint(C, (size,), generator=generator)


# --- the formulas ----------------------------------------------------------------------------------------------------


def unit(vector):
    return vector / vector.norm()


def anchored(loss, embeddings, proxies, labels):
    """The plain loss of lists of vectors, through a loss of as many classes."""
    larger = copy.deepcopy(loss)
    del larger._parameters["proxies"]
    larger.proxies = torch.stack(proxies)
    return larger(torch.stack(embeddings), torch.tensor(labels))


def naive_proxy_synthesis(wrapper, embeddings, labels, step):
    share = np.float32(np.random.Generator(np.random.PCG64([3, step])).beta(0.4, 0.4)).item()
    size, labels, proxies = len(embeddings), labels.tolist(), list(wrapper.proxies)
    rows, targets = list(embeddings), list(labels)
    for i in range(round(0.75 * size)):
        j = (i + 1) % size
        rows.append(share * unit(embeddings[i]) + (1 - share) * unit(embeddings[j]))
        proxies.append(share * unit(proxies[labels[i]]) + (1 - share) * unit(proxies[labels[j]]))
        targets.append(C + i)
    return anchored(wrapper.loss, rows, proxies, targets)


def naive_virtual_softmax(wrapper, embeddings, labels, step):
    loss, values = wrapper.loss, []
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        if not loss.normalised:
            proxies = [*wrapper.proxies, wrapper.proxies[label].norm() * unit(embedding)]
        else:
            proxies = [*wrapper.proxies, unit(embedding)]
        values.append(anchored(loss, [embedding], proxies, [label]))
    return sum(values) / len(values)


def naive_broadface(wrapper, embeddings, labels, step):
    """The queue is made from the batches that the test has seen, newest first, as a list."""
    loss, plain = wrapper.loss, wrapper.loss.normalised
    now = wrapper.proxies.detach()
    rows, targets = [row.detach() for row in embeddings], labels.tolist()
    past = [entry for seen in reversed(wrapper.seen) for entry in reversed(seen)][:11]
    for x, label, then in past:
        if plain:
            rows.append(unit(x) + unit(now[label]) - unit(then))
        else:
            rows.append(x + x.norm() / then.norm() * (now[label] - then))
        targets.append(label)
    wrapper.seen.append([(x.detach(), y, now[y].clone()) for x, y in zip(embeddings, labels.tolist(), strict=True)])
    of_embedder = anchored(loss, list(embeddings), list(now), labels.tolist())
    return of_embedder + anchored(loss, rows, list(wrapper.proxies), targets)


NAIVE = {
    "proxy_synthesis": naive_proxy_synthesis,
    "virtual_softmax": naive_virtual_softmax,
    "broadface": naive_broadface,
}


@pytest.mark.parametrize(("wrapper", "loss"), RIVALS)
def test_a_wrapper_and_its_gradients_are_those_of_the_naive_formula(wrapper, loss):
    module = wrapped(wrapper, loss)
    module.seen = []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    for step, size in enumerate(SIZES):
        embeddings, labels = batch(step, size=size)
        expected = NAIVE[wrapper](module, embeddings, labels, step)
        actual = module(embeddings, labels)
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
        inputs = (embeddings, module.proxies)
        wanted = torch.autograd.grad(expected, inputs)
        for got, want in zip(torch.autograd.grad(actual, inputs, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
        optimizer.zero_grad()
        actual.backward()
        optimizer.step()


def test_virtual_softmax_adds_the_constant_s_to_the_sum():
    embeddings, labels = batch(0)
    loss = build_loss("norm_softmax", C, D, scale=4.0).double()
    similarity = torch.nn.functional.normalize(embeddings) @ torch.nn.functional.normalize(loss.proxies).T
    total = (4 * similarity).exp().sum(1) + math.exp(4)
    expected = (total.log() - 4 * similarity[range(8), labels]).mean()
    torch.testing.assert_close(VirtualSoftmax(loss)(embeddings, labels), expected)


def test_proxy_synthesis_mixes_every_batch_otherwise_and_the_same_in_every_process():
    module, other = (ProxySynthesis(build_loss("norm_softmax", C, D), seed=4) for _ in range(2))
    shares = []
    for step in range(200):
        shares.append(module._share())
        if step < 3:
            torch.rand(step + 1)  # what else a process draws changes nothing
            assert other._share() == shares[-1]
            other(*batch(step, torch.float32))
        module.step += 1
    assert len(set(shares)) == 200 and all(0 <= share <= 1 for share in shares)
    near_an_end = np.mean([min(share, 1 - share) < 0.1 for share in shares])
    assert 0.35 < near_an_end < 0.65  # of a Beta(0.4, 0.4) nearly a half
    torch.manual_seed(7)
    torch.rand(3)
    assert ProxySynthesis(build_loss("norm_softmax", C, D)).seed == 7


@pytest.mark.parametrize("size", [1, 2])
def test_proxy_synthesis_of_the_smallest_batches_has_a_virtual_class(size):
    module = wrap(build_loss("norm_softmax", C, D), "proxy_synthesis", mu=0.1)
    assert module(*batch(0, torch.float32, size)).isfinite() and module.num_virtual_classes == 1


def test_broadface_keeps_the_end_of_a_batch_that_is_longer_than_its_queue():
    module = BroadFace(build_loss("norm_softmax", C, D), 3)
    embeddings, labels = batch(0, torch.float32)
    module(embeddings, labels)
    assert module.past_labels.tolist() == labels[-3:].tolist()
    torch.testing.assert_close(module.past_embeddings, torch.nn.functional.normalize(embeddings[-3:]))
    module(*batch(1, torch.float32, size=2))
    assert module.past_labels.tolist() == [*batch(1, size=2)[1].tolist(), labels[-1].item()]


def test_a_row_that_is_not_finite_makes_one_step_of_broadface_nan_and_no_other():
    module = wrapped("broadface", dtype=torch.float32)
    embeddings, labels = batch(0, torch.float32)
    with torch.no_grad():
        embeddings[2, 1] = math.inf
    loss = module(embeddings, labels)
    loss.backward()
    assert loss.isnan() and module.proxies.grad.isnan().all()
    assert not module.past_embeddings[2].any() and module.past_embeddings.isfinite().all()
    module.zero_grad()
    loss = module(*batch(1, torch.float32))
    loss.backward()
    assert loss.isfinite() and module.proxies.grad.isfinite().all()


# --- what a training loop relies on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrapper", "loss"), PAIRS)
def test_a_wrapper_is_the_plain_loss_during_the_warm_up_and_in_eval_mode(wrapper, loss):
    module = wrapped(wrapper, loss)
    before = str(module.state_dict())
    for enabled, training in ((False, True), (True, False)):
        module.enabled = enabled
        module.train(training)
        assert module(*batch(0)) == module.loss(*batch(0))
        assert (module.num_virtual_classes, module.num_virtual_embeddings) == (0, 0)
        assert str(module.state_dict()) == before


IN_USE = {
    "memvir": [(0, 0), (0, 0), (5, 8), (5, 8), (10, 13)],
    "proxy_synthesis": [(6, 6), (6, 6), (4, 4), (6, 6), (6, 6)],
    "virtual_softmax": [(8, 0), (8, 0), (5, 0), (8, 0), (8, 0)],
    "broadface": [(0, 0), (0, 8), (0, 11), (0, 11), (0, 11)],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_says_what_is_in_use(wrapper):
    module = wrapped(wrapper)
    for step, size in enumerate(SIZES):
        module(*batch(step, size=size))
        assert (module.num_virtual_classes, module.num_virtual_embeddings) == IN_USE[wrapper][step]


def steps(module, first, last):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    values = []
    for step in range(first, last):
        embeddings, labels = batch(step, torch.float32, SIZES[step % len(SIZES)])
        optimizer.zero_grad()
        value = module(embeddings, labels)
        value.backward()
        optimizer.step()
        values += [value.detach(), embeddings.grad, module.proxies.detach().clone()]
    return values


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_run_that_is_saved_and_resumed_goes_on_to_the_bit(wrapper, stop):
    uninterrupted = steps(wrapped(wrapper, dtype=torch.float32), 0, 9)
    first = wrapped(wrapper, dtype=torch.float32)
    values = steps(first, 0, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loss = build_loss("norm_softmax", C, D)
    second = wrap(loss, wrapper, **{**SETTINGS[wrapper], **({"seed": 99} if wrapper == "proxy_synthesis" else {})})
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.num_virtual_classes == first.num_virtual_classes
    assert second.num_virtual_embeddings == first.num_virtual_embeddings
    values += steps(second, stop, 9)
    assert all(torch.equal(one, other) for one, other in zip(values, uninterrupted, strict=True))


@pytest.mark.parametrize(
    ("wrapper", "loss", "settings", "message"),
    [
        ("broadface", "softmax", {}, "state of BroadFace was saved with loss NormSoftMax, not SoftMax; build"),
        ("broadface", "norm_softmax", {"queue_size": 12}, "queue_size 11, not 12"),
        (
            "proxy_synthesis",
            "norm_softmax",
            {"alpha": 0.9},
            "ProxySynthesis was saved with alpha 0.4, not 0.9",
        ),
        ("proxy_synthesis", "norm_softmax", {"mu": 1}, "mu 0.75, not 1.0"),
    ],
)
def test_a_state_of_other_settings_is_refused(wrapper, loss, settings, message):
    other = wrap(build_loss(loss, C, D), wrapper, **SETTINGS[wrapper] | settings)
    with pytest.raises(UserError, match=message):
        other.load_state_dict(wrapped(wrapper).state_dict())


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_settings_may_be_numbers_of_numpy(wrapper):
    file = io.BytesIO()
    settings = {key: np.asarray(value)[()] for key, value in SETTINGS[wrapper].items()}
    module = wrap(build_loss("norm_softmax", C, D), wrapper, **settings)
    module(*batch(0, torch.float32))
    torch.save(module.state_dict(), file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True))


def test_a_queue_stays_in_full_precision_in_a_module_that_is_made_half():
    module = wrapped("broadface", "softmax", torch.float32).half()
    for step, size in enumerate((1e5, 1, 1)):  # beyond 65,504 is infinite
        embeddings, labels = batch(step, torch.float32)
        assert module(size * embeddings, labels).isfinite()
    assert module.past_embeddings.dtype == module.past_proxies.dtype == torch.float32
    assert module.double().past_embeddings.dtype == torch.float64


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_copy_goes_on_like_the_original_and_apart_from_it(wrapper):
    module = wrapped(wrapper, dtype=torch.float32)
    steps(module, 0, 4)
    twin = copy.deepcopy(module)
    values = steps(module, 4, 7)
    assert all(torch.equal(one, other) for one, other in zip(values, steps(twin, 4, 7), strict=True))


@pytest.mark.parametrize(("wrapper", "loss"), PAIRS)
def test_a_second_derivative_is_refused(wrapper, loss):
    module = wrapped(wrapper, loss)
    for step in range(3):
        embeddings, labels = batch(step)
        for one in (module, module.loss):
            with pytest.raises(UserError, match="no second derivatives; leave out create_graph=True"):
                torch.autograd.grad(one(embeddings, labels), embeddings, create_graph=True)


@pytest.mark.parametrize(("wrapper", "loss"), PAIRS)
def test_a_step_of_a_wrapper_runs_without_numbers(wrapper, loss):
    module = wrapped(wrapper, loss).to("meta")
    for size in (8, 5, 8):
        embeddings = torch.empty(size, D, device="meta", dtype=torch.float64, requires_grad=True)
        module(embeddings, torch.empty(size, dtype=torch.int64, device="meta")).backward()
    assert embeddings.grad.shape == (8, D) and module.proxies.grad.shape == (C, D)


@pytest.mark.parametrize(("wrapper", "loss"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_arithmetic_is_in_float32_under_autocast_and_for_shorter_embeddings(wrapper, loss, dtype):
    module, same = (wrapped(wrapper, loss, torch.float32) for _ in range(2))
    for step in range(4):
        embeddings, labels = batch(step, dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = module(embeddings, labels)
        assert value.dtype == torch.float32
        assert torch.equal(value, same(embeddings.detach().float(), labels))
        value.backward()
        assert embeddings.grad.dtype == dtype and embeddings.grad.isfinite().all()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_labels_are_checked_as_by_the_loss(wrapper):
    module = wrapped(wrapper)
    embeddings, labels = batch(0)
    with pytest.raises(UserError, match="labels must be from 0 to 4, as the loss has 5 classes"):
        module(embeddings, labels + 3)
    with pytest.raises(UserError, match="the batch is empty"):
        module(embeddings[:0], labels[:0])
    assert module(embeddings, labels.to(torch.uint8)).isfinite()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_data_parallel_is_refused_by_every_wrapper(wrapper):
    with pytest.raises(UserError, match=r"DataParallel.*wrap the embedder alone"):
        wrapped(wrapper)._replicate_for_data_parallel()


@pytest.mark.parametrize(
    ("wrapper", "loss", "settings", "message"),
    [
        ("proxy_synthesis", "softmax", {}, "Proxy Synthesis needs a loss of memvir.losses that normalises .*SoftMax$"),
        ("virtual_softmax", "proxy_anchor", {}, "Virtual Softmax needs a cross-entropy loss .*not ProxyAnchor$"),
        ("proxy_synthesis", None, {}, "Proxy Synthesis needs a loss of memvir.losses .*not Linear$"),
        ("virtual_softmax", None, {}, "Virtual Softmax needs .*not Linear$"),
        ("broadface", None, {"queue_size": 3}, "BroadFace needs a loss of memvir.losses, not Linear$"),
        ("memvir", None, SETTINGS["memvir"], "MemVir needs a loss with a parameter `proxies`"),
        (
            "proxy_synthesis",
            "arcface",
            {"alpha": 0},
            "an alpha above 0 and a mu above 0, at most 1; not 0 and 1.0",
        ),
        ("proxy_synthesis", "arcface", {"mu": 1.5}, "not 0.4 and 1.5"),
        ("proxy_synthesis", "arcface", {"alpha": "1"}, "not 1 and 1.0"),
        ("proxy_synthesis", "arcface", {"mu": math.nan}, "not 0.4 and nan"),
        ("proxy_synthesis", "arcface", {"seed": -1}, "Proxy Synthesis: seed must be a whole number from 0, not -1"),
        ("proxy_synthesis", "arcface", {"seed": 1.5}, "not 1.5"),
        ("broadface", "arcface", {"queue_size": 0}, "BroadFace: queue_size must be a whole number from 1, not 0"),
        ("broadface", "arcface", {"queue_size": 2.5}, "not 2.5"),
    ],
)
def test_what_a_wrapper_cannot_work_with_is_one_sentence(wrapper, loss, settings, message):
    with pytest.raises(UserError, match=message) as refusal:
        wrap(build_loss(loss, C, D) if loss else torch.nn.Linear(D, C), wrapper, **settings)
    assert "\n" not in str(refusal.value)


def test_memvir_is_one_of_the_wrappers_and_all_have_their_settings():
    assert type(wrapped("memvir")) is MemVir
    assert list(Wrapped.model_fields) == list(WRAPPERS)
