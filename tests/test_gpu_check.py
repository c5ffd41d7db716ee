import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torchvision.transforms.v2.functional import resized_crop

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import crops, machine, parts
from benchmarks.gpu_check.page import to_markdown

ROOT = Path(__file__).parents[1]


def test_a_part_runs_on_the_cpu_and_the_page_says_that_nothing_about_gpus_is_shown(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", tmp_path, "--parts", "bits"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOTHING ABOUT GPUs IS SHOWN" in done.stdout
    page, content = (tmp_path / "cpu.md").read_text(), json.loads((tmp_path / "cpu.json").read_text())
    assert "nothing about GPUs" in page and "## bits" in page
    assert content["parts"]["bits"]["status"] == "done"
    values = content["parts"]["bits"]["values"]
    assert values.pop("operations that are not deterministic here") == "none"
    assert len(values) == 4 and len(set(values.values())) == 1


@pytest.mark.parametrize("part", parts.PARTS)
def test_every_part_is_a_function_that_there_is(part):
    module, _, function = parts.PARTS[part].function.partition(":")
    source = (ROOT / "benchmarks" / "gpu_check" / f"{module}.py").read_text()
    assert f"def {function}(device: str) -> Iterator[dict[str, Any]]:" in source


def test_all_parts_together_keep_to_ten_minutes():
    assert sum(part.seconds for part in parts.PARTS.values()) <= 600


def test_what_a_part_had_found_is_kept_and_nothing_that_it_started_lives_on(monkeypatch, tmp_path):
    (tmp_path / "part.py").write_text(
        f"""
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
print(json.dumps({{"status": "done", "why": "", "values": {{"images": 3}}}}))
print('{{"status": "done", "wh', flush=True)
time.sleep(600)
"""
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/part.py\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setitem(parts.PARTS, "bits", parts.Part("hangs", "bits:check", 6))
    outcome = gpu_check.in_a_process("bits", "cpu")
    assert (outcome["status"], outcome["values"]) == ("too slow", {"images": 3})
    assert ends(int((tmp_path / "child").read_text()))


def ends(pid: int) -> bool:
    """Whether a process that was killed ends within a minute, of which it needs some where others share the cores."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while time.monotonic() < deadline:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # nobody has asked how it ended
                return True
        return False
    return True


@pytest.mark.parametrize("box", [(0, 0, 60, 80), (10, 20, 31, 17), (3, 70, 57, 10), (0, 0, 1, 1)])
def test_crops_by_matrix_products_are_torchvisions(box):
    pixels = torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    expected = resized_crop(pixels.double(), *box, [24, 24], antialias=True)
    found = crops.resized_crops(pixels, torch.tensor([box], dtype=torch.float64), 24)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


def test_a_part_that_hangs_is_ended_and_named(monkeypatch):
    monkeypatch.setitem(parts.PARTS, "bits", parts.Part("hangs", "bits:check", 0))
    outcome = gpu_check.in_a_process("bits", "cpu")
    assert (outcome["status"], outcome["why"]) == ("too slow", "ended after 0 s")


@pytest.mark.parametrize(
    ("error", "status", "why"),
    [
        (RuntimeError("the driver\nis too old"), "failed", "RuntimeError: the driver is too old"),
        (ModuleNotFoundError("no", name="pandas"), "skipped", "pandas is not installed here"),
        (parts.Skipped("one GPU only"), "skipped", "one GPU only"),
    ],
)
def test_what_a_part_raises_is_told_with_its_status(error, status, why, monkeypatch, capsys):
    def fail(part, device):
        raise error

    monkeypatch.setattr(parts, "run", fail)
    with pytest.raises(SystemExit) as end:
        gpu_check.run_here("bits", "cpu")
    assert end.value.code == (gpu_check.PART_FAILED if status == "failed" else 0)
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["status"], outcome["why"]) == (status, why)
    content = {"machine": {"name": "x", "device": "cuda"}, "parts": {"bits": {**outcome, "seconds": 1.0}}}
    assert f"({status}: {why}; 1.0 s)" in to_markdown(content)


def test_losses_and_search_are_checked_where_torch_is_all_that_there_is():
    script = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("faiss", "pandas", "pydantic", "ruamel", "scipy", "sklearn"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Nothing())
import numpy as np
import torch
from benchmarks.gpu_check import numbers, search
cpu = torch.device("cpu")
numbers.STEPS = 6
assert max(numbers.errors("norm_softmax", True, torch.float32, cpu)) < 1e-5
assert "100.0000%" in search.in_place_of_faiss(search.clustered(500, 10, 16)[0], cpu)["torch in place of faiss"]
assert search.evaluate(*search.clustered(500, 10, 16))["map"] > 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_try_the_cpu_instead(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    with pytest.raises(parts.Skipped, match=r"^this machine has a GPU that torch cannot use: .*; --device cpu tries"):
        next(machine.describe("auto"))
    assert next(machine.describe("cpu"))["device"] == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert next(machine.describe("auto"))["why not a GPU"] == "CUDA_VISIBLE_DEVICES hides all"
