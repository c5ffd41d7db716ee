"""What MemVir costs per step: exactly in O(N), against the concatenation of the definition, on the same inputs, and
beside its rivals.

    python -m benchmarks.memvir_step [--quick] [--threads 1]

Time is that of forward and backward, the median over steps, with a full memory; both sides take turns in one process
and read the same memory. Working memory is the peak of what torch allocates during a step beyond what it held before
(every allocation and release, from torch's profiler); scratch space of the matrix library is not in it. The run of the
size of Stanford Online Products has a process of its own, whose peak resident size is the system's figure (Linux).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from memvir.losses import DISPLAY_NAMES, build_loss
from memvir.memory import MemVir
from memvir.wrappers import WRAPPERS, wrap
from memvir.wrappers.wrapper import LossWrapper

PAPER = {"batch_size": 128, "num_classes": 98, "dim": 512, "num_steps": 45, "step_gap": 10}  # CARS196, Norm-SoftMax
SOP = {"batch_size": 128, "num_classes": 11_318, "dim": 512, "num_steps": 10, "step_gap": 10}
GLYPHS = {"batch_size": 128, "num_classes": 98, "dim": 64, "num_steps": 5, "step_gap": 5}
QUICK = {"batch_size": 16, "num_classes": 10, "dim": 32, "num_steps": 4, "step_gap": 2}
LENGTHS = (5, 10, 20, 40, 80)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes and few steps, to see that it runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    paper, sop, glyphs = (QUICK, QUICK, QUICK) if arguments.quick else (PAPER, SOP, GLYPHS)
    few, many = (3, 5) if arguments.quick else (7, 50)
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), float32, Norm-SoftMax unless named.")
    memvir = filled(**paper)
    print(against_concatenation(memvir, paper, few))
    print(of_each_loss(paper, few))
    print(beside_its_rivals(paper, few))
    print(beside_its_rivals(sop, few))
    print(stored(memvir, paper))
    print(linear_in_the_number_of_steps(paper, 4 * few))
    print(beside_a_small_step(glyphs, many))
    print(rounded_to_bfloat16(paper, few))
    print(many_classes(sop, few, arguments.threads))


# --- the tables -------------------------------------------------------------------------------------------------------


def against_concatenation(memvir: MemVir, sizes: dict[str, int], steps: int) -> str:
    definition = concatenating(memvir)
    quick, slow = median_seconds([memvir, definition], sizes, steps)
    quick_bytes, slow_bytes = working_memory(memvir, sizes), working_memory(definition, sizes)
    table = markdown(
        ["", "exact, O(N)", "concatenated", "ratio"],
        [
            ["forward and backward, ms", f"{quick * 1000:,.1f}", f"{slow * 1000:,.1f}", f"{slow / quick:,.1f}x"],
            [
                "working memory, MiB",
                f"{quick_bytes / MIB:,.1f}",
                f"{slow_bytes / MIB:,.1f}",
                f"{slow_bytes / quick_bytes:,.1f}x",
            ],
        ],
    )
    return f"\n### {titled(sizes)}\n\n{table}"


def of_each_loss(sizes: dict[str, int], steps: int) -> str:
    seconds = [median_seconds([filled(name, **sizes)], sizes, steps)[0] for name in DISPLAY_NAMES]
    row = ["exact, ms", *(f"{each * 1000:,.1f}" for each in seconds)]
    return f"\n### Each loss, same size\n\n{markdown(['', *DISPLAY_NAMES.values()], [row])}"


def beside_its_rivals(sizes: dict[str, int], steps: int) -> str:
    """Each around the same loss; BroadFace with a queue of as many embeddings as MemVir uses at a time."""
    loss = build_loss("norm_softmax", sizes["num_classes"], sizes["dim"])
    settings = {
        "memvir": {"num_steps": sizes["num_steps"], "step_gap": sizes["step_gap"]},
        "broadface": {"queue_size": sizes["num_steps"] * sizes["batch_size"]},
    }
    wrappers = [wrap(loss, name, **settings.get(name, {})) for name in WRAPPERS]
    for wrapper in wrappers:
        fill(wrapper, sizes)
    losses = [loss, *wrappers]
    rows = [
        [title, f"{seconds * 1000:,.1f}", f"{working_memory(each, sizes) / MIB:,.1f}", f"{held(each) / MIB:,.1f}"]
        for title, each, seconds in zip(
            ["the plain loss", *(wrapper.title for wrapper in WRAPPERS.values())],
            losses,
            median_seconds(losses, sizes, steps),
            strict=True,
        )
    ]
    header = ["", "forward and backward, ms", "working memory, MiB", "stored, MiB"]
    return f"\n### MemVir and its rivals, {titled(sizes)}\n\n{markdown(header, rows)}"


def stored(memvir: MemVir, sizes: dict[str, int]) -> str:
    buffers = dict(memvir.named_buffers())
    steps = sum(buffers[name].nbytes for name in ("past_embeddings", "past_proxies"))
    caches = sum(buffer.nbytes for buffer in buffers.values()) - steps
    of_a_step = (sizes["batch_size"] + sizes["num_classes"]) * sizes["dim"] * 4
    bound = sizes["num_steps"] * (sizes["step_gap"] + 1) * of_a_step
    pending = sum(tensor.nbytes for tensor in memvir.get_extra_state()["pending"].values())
    return "\n### What is stored, same size\n\n" + markdown(
        ["", "MiB"],
        [
            ["embeddings and proxies of past steps", f"{steps / MIB:,.1f}"],
            ["N(M+1)(B+C)D floats", f"{bound / MIB:,.1f}"],
            ["labels and cached log-sum-exps", f"{caches / MIB:,.1f}"],
            ["the last step, not yet in its slot", f"{pending / MIB:,.1f}"],
        ],
    )


def linear_in_the_number_of_steps(sizes: dict[str, int], steps: int) -> str:
    """M = 0 here: it changes neither side's arithmetic, and N = 80 fills eleven times sooner."""
    lengths = [length // 5 for length in LENGTHS] if sizes is QUICK else LENGTHS
    each = [sizes | {"num_steps": length, "step_gap": 0} for length in lengths]
    seconds = median_seconds([filled(**one) for one in each], sizes, steps)
    slope, intercept, r_squared = linear_fit(list(lengths), seconds)
    table = markdown(["N", *map(str, lengths)], [["exact, ms", *(f"{each * 1000:,.2f}" for each in seconds)]])
    fit = f"{intercept * 1000:.2f} ms + N x {slope * 1000:.3f} ms, R^2 = {r_squared:.4f}"
    return f"\n### Time over N, same size, M = 0\n\n{table}\n\nLeast squares: {fit}"


def beside_a_small_step(sizes: dict[str, int], steps: int) -> str:
    memvir = filled(**sizes)
    with_memvir, plain = median_seconds([memvir, memvir.loss], sizes, steps)
    row = [f"{plain * 1000:.2f}", f"{with_memvir * 1000:.2f}", f"{(with_memvir - plain) * 1000:.2f}"]
    return f"\n### {titled(sizes)}\n\n{markdown(['plain loss, ms', 'MemVir, ms', 'added, ms'], [row])}"


def rounded_to_bfloat16(sizes: dict[str, int], steps: int) -> str:
    exact = filled(**sizes)
    rounded = MemVir(exact.loss, exact.num_steps, exact.step_gap, storage_dtype="bfloat16")
    fill(rounded, sizes)
    of_loss, of_gradient = [], []
    for _ in range(steps):
        batch = random_batch(sizes)
        (loss, gradient), (expected, expected_gradient) = (
            (value, torch.autograd.grad(value, batch[0])[0]) for value in (rounded(*batch), exact(*batch))
        )
        of_loss.append(((loss - expected).abs() / expected).item())
        of_gradient.append(((gradient - expected_gradient).norm() / expected_gradient.norm()).item())
    stored_bytes = [m.past_embeddings.nbytes + m.past_proxies.nbytes for m in (exact, rounded)]
    row = [*(f"{size / MIB:,.1f}" for size in stored_bytes), f"{max(of_loss):.1e}", f"{max(of_gradient):.1e}"]
    header = ["float32, MiB", "bfloat16, MiB", "loss differs by at most", "gradient by at most"]
    return f"\n### Stored in bfloat16: relative differences over {steps} steps\n\n{markdown(header, [row])}"


def many_classes(sizes: dict[str, int], steps: int, threads: int) -> str:
    kinds = ("float32", "bfloat16")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        runs = [pool.apply(in_its_own_process, (sizes, steps, threads, kind)) for kind in kinds]
    times = sizes["num_steps"] + 1
    matrix = times**2 * sizes["batch_size"] * sizes["num_classes"] * 4
    table = markdown(
        ["", *(f"stored in {kind}" for kind in kinds)],
        [
            ["forward and backward, ms", *(f"{run['seconds'] * 1000:,.0f}" for run in runs)],
            ["peak resident size of the process, GB", *(f"{run['in_all'] / 1e9:,.2f}" for run in runs)],
            ["of it, Python and torch before the first step", *(f"{run['before'] / 1e9:,.2f}" for run in runs)],
            ["of it, the memory with its caches", *(f"{run['held'] / 1e9:,.2f}" for run in runs)],
            ["of it, the rest: proxies, gradients, strips", *(f"{run['rest'] / 1e9:,.2f}" for run in runs)],
        ],
    )
    return (
        f"\n### {titled(sizes)}\n\n{table}\n\n"
        f"Concatenating, one matrix of logits would take {matrix / 1e9:,.2f} GB, and logits, softmax and gradient "
        f"{3 * matrix / 1e9:,.2f} GB beside the memory (computed)."
    )


def in_its_own_process(sizes: dict[str, int], steps: int, threads: int, storage_dtype: str) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = peak_resident_size()
    memvir = filled(**sizes, storage_dtype=storage_dtype)
    (seconds,) = median_seconds([memvir], sizes, steps)
    in_all, held = peak_resident_size(), sum(buffer.nbytes for buffer in memvir.buffers())
    return {"seconds": seconds, "in_all": in_all, "before": before, "held": held, "rest": in_all - before - held}


# --- measuring --------------------------------------------------------------------------------------------------------


def random_batch(sizes: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings = torch.randn(sizes["batch_size"], sizes["dim"], requires_grad=True)
    return embeddings, torch.randint(sizes["num_classes"], (sizes["batch_size"],))


def filled(
    name: str = "norm_softmax",
    *,
    batch_size: int,
    num_classes: int,
    dim: int,
    num_steps: int,
    step_gap: int,
    storage_dtype: str = "float32",
) -> MemVir:
    """MemVir around a new loss, all N past steps in use."""
    memvir = MemVir(build_loss(name, num_classes, dim), num_steps, step_gap, storage_dtype=storage_dtype)
    sizes = {"batch_size": batch_size, "num_classes": num_classes, "dim": dim}
    fill(memvir, sizes | {"num_steps": num_steps, "step_gap": step_gap})
    return memvir


@torch.no_grad()
def fill(wrapper: LossWrapper, sizes: dict[str, int]) -> None:
    """With random batches, the same ones for every memory of a size."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range((sizes["num_steps"] + 1) * (sizes["step_gap"] + 1)):
            wrapper(*random_batch(sizes))


def held(loss: torch.nn.Module) -> int:
    """The bytes of what is kept from step to step, the loss's proxies apart."""
    return sum(buffer.nbytes for buffer in loss.buffers())


def concatenating(memvir: MemVir) -> MemVir:
    """The definition, with the same loss, and its memory holding the same steps."""
    definition = MemVir(memvir.loss, memvir.num_steps, memvir.step_gap, concatenate=True)
    state, extra = memvir.state_dict(), memvir.get_extra_state()
    stored = ("past_embeddings", "past_labels", "past_proxies")
    extra["settings"] = definition.get_extra_state()["settings"]
    extra["pending"] = {name: extra["pending"][name] for name in stored}
    kept = {name: state[name] for name in ("loss.proxies", *stored)}
    definition.load_state_dict({**kept, "_extra_state": extra})
    return definition


def median_seconds(losses: list[torch.nn.Module], sizes: dict[str, int], steps: int) -> list[float]:
    """Of forward and backward of each; they take turns, on the same batch, so that noise falls on all."""
    seconds: list[list[float]] = [[] for _ in losses]
    for _ in range(steps + 1):
        embeddings, labels = random_batch(sizes)
        for loss, taken in zip(losses, seconds, strict=True):
            embeddings.grad = loss.proxies.grad = None
            start = time.perf_counter()
            loss(embeddings, labels).backward()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken[1:]) for taken in seconds]


def working_memory(loss: torch.nn.Module, sizes: dict[str, int]) -> int:
    """The most that torch held during a step beyond what it held before, in bytes."""
    embeddings, labels = random_batch(sizes)
    loss.proxies.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(embeddings, labels).backward()
    held = most = 0
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def peak_resident_size() -> int:
    """Of this process, in bytes. (On Linux the figure of getrusage starts from the parent's.)"""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def linear_fit(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept, statistics.correlation(x, y) ** 2


# --- printing ---------------------------------------------------------------------------------------------------------


def titled(sizes: dict[str, int]) -> str:
    symbols = {"batch_size": "B", "num_classes": "C", "dim": "D", "num_steps": "N", "step_gap": "M"}
    return ", ".join(f"{symbols[name]} = {size:,}" for name, size in sizes.items())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


if __name__ == "__main__":
    main()
