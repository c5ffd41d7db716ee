"""What is computed has the golden bits on this machine too."""

import json
import os
import subprocess
import sys

import pytest

from memvir import libraries
from tests.golden import FILE, ROOT

needs_avx2 = pytest.mark.skipif(not libraries.has_avx2(), reason="the bits of x86-64 processors with AVX2")


@needs_avx2
@pytest.mark.parametrize("cores", [1, 2])
def test_everything_has_its_golden_bits_whatever_the_number_of_cores(cores: int) -> None:
    def use_cores() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, set(range(min(cores, os.cpu_count() or 1))))

    # a process of its own, in which the libraries are told before they are imported
    command = [sys.executable, "-m", "tests.golden"]
    outcome = subprocess.run(command, cwd=ROOT, preexec_fn=use_cores, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert len(outcome.stdout.splitlines()) == len(json.loads(FILE.read_text()))
