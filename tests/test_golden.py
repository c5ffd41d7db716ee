"""What is computed has the golden bits on this machine too."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memvir import libraries
from tests import golden
from tests.golden import FILE, ROOT

DIFFERENT = {
    *(
        "acos",
        "asin",
        "atan",
        "erf",
        "erfc",
        "erfinv",
        "exp",
        "log",
        "log10",
        "log2",
        "sqrt",
        "tan",
    ),  # MKL's, of vectors
    *("addbmm", "addmv", "addr", "baddbmm", "bmm", "dot", "mv"),
}
"""Operations of float32 whose last digits were seen to differ under `--mkl intel` and `--mkl amd`, and their kin."""

needs_avx2 = pytest.mark.skipif(not libraries.has_avx2(), reason="the bits of x86-64 processors with AVX2")


@needs_avx2
@pytest.mark.skipif(sys.platform != "linux", reason="tests.golden exchanges a function of MKL's in memory")
@pytest.mark.parametrize(("mkl", "cores"), [("intel", 1), ("amd", 2)])
def test_everything_has_its_golden_bits_with_the_kernels_of_either_maker_on_any_number_of_cores(mkl, cores) -> None:
    def use_cores() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, set(range(min(cores, os.cpu_count() or 1))))

    # a process of its own, in which the libraries are told before they are imported
    command = [sys.executable, "-m", "tests.golden", "--mkl", mkl]
    outcome = subprocess.run(command, cwd=ROOT, preexec_fn=use_cores, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert len(outcome.stdout.splitlines()) == len(json.loads(FILE.read_text()))


class Operations(TorchDispatchMode):
    """Which operations of float32 run, backward passes and optimizers included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in arguments):
            self.seen.add(operation.overloadpacket.__name__.rstrip("_"))
        return operation(*arguments, **(options or {}))


def test_nothing_that_trains_takes_an_operation_whose_last_digits_depend_on_the_maker():
    for title, case in golden.cases():
        with Operations() as operations:
            case()
        assert not operations.seen & DIFFERENT, title
        assert "with MemVir" not in title or {"mm", "_softmax", "mul"} <= operations.seen
