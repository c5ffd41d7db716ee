"""The numerical libraries, told how to compute before they are imported, so that every processor computes the same.

Left alone, oneDNN, MKL, OpenBLAS, NumPy and faiss choose kernels by what the processor has, and kernels differ in the
order of their sums. With these variables an x86-64 processor that has AVX2 gives the same bits as any other, whoever
made it; what remains different (MKL's exp, log and sqrt of whole tensors on AMD and Intel) the code that computes
results avoids: see `memvir.losses.logsumexp`. tests/golden.py has the bits.
"""

import os
import platform
import sys
import warnings
from pathlib import Path

AVX2_ONLY = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2,STRICT",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "FAISS_SIMD_LEVEL": "AVX2",
}
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def prepare(threads: int = 1) -> None:
    """Let the libraries use so many threads and nothing beyond AVX2; call it before they are imported.

    Where the processor is no x86-64 or lacks AVX2 the results are its own.
    """
    os.environ |= {**dict.fromkeys(THREADS, str(threads)), "MPLBACKEND": "agg"}  # a notebook sets one of its own
    if has_avx2():
        os.environ |= AVX2_ONLY
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def available_cores() -> int:
    """The cores that this process may use: by its affinity (taskset, Slurm) and its container's CPU quota."""
    with warnings.catch_warnings(action="ignore"):  # where there is no shared memory; nothing of it is used here
        import joblib  # late: most commands need not load it

    return joblib.cpu_count()


def has_avx2() -> bool:
    """Whether this is an x86-64 processor with AVX2, as all are since 2013 (Intel) and 2015 (AMD)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not Linux; a Mac or a PC without AVX2 is older than what torch supports


def processor() -> str:
    """The processor's name, family and model, for the record."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        known = {key.strip(): value.strip() for key, value in (line.split(":", 1) for line in lines if ":" in line)}
        return f"{known['model name']}, family {known['cpu family']}, model {known['model']}"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
