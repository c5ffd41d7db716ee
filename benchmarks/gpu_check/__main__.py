"""Check everything that needs a GPU: numbers, search, speed, feeding, the rest of a run, and a run itself.

    make gpu-check                              # all parts, ten minutes at most
    make gpu-check PARTS="numbers step"         # some of them
    python -m benchmarks.gpu_check --parts numbers

Needs this repository, torch, torchvision and numpy of any recent version, no network and no data set. With these alone
the losses and the search are checked; pandas, pydantic, ruamel.yaml and filelock bring training and its speed, all of
requirements.txt the whole run. A part whose packages are missing is skipped, with the reason. Results are written after
each part, to reports/gpu on a GPU. Without one the parts run on the CPU at small size, into scratch, which shows that
they work and nothing of GPUs.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import parts
from benchmarks.gpu_check.page import to_markdown

PART_FAILED = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts.PARTS, default=list(parts.PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, help="where to write instead of reports/gpu or scratch/gpu")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the part that this process is for
    options = parser.parse_args()
    if options.one:
        return run_here(options.one, options.device)
    machine = in_a_process("machine", options.device)
    if machine["status"] != "done":
        sys.exit(f"error: {machine['why']}")
    found = machine["values"]
    on_gpu = found["device"] != "cpu"
    folder = options.out or Path("reports" if on_gpu else "scratch") / "gpu"
    name = (found["name"] if on_gpu else "cpu").replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": found, "parts": {}}
    print("" if on_gpu else "No GPU here: the parts run on the CPU at small size, and NOTHING ABOUT GPUs IS SHOWN.")
    for part in options.parts:
        print(f"{part}: {parts.PARTS[part].what} ...", flush=True)
        outcome = content["parts"][part] = in_a_process(part, options.device, patience=1 if on_gpu else 5)
        print(f"{part}: {outcome['status']} in {outcome['seconds']} s{'; ' + outcome['why'] if outcome['why'] else ''}")
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (folder / f"{name}.md").write_text(to_markdown(content), encoding="utf-8")
    print(f"written: {folder / name}.json and .md")
    sys.exit(any(outcome["status"] in ("failed", "too slow") for outcome in content["parts"].values()))


def in_a_process(part: str, device: str, patience: int = 1) -> dict[str, Any]:
    """status (done, skipped, failed, too slow), why, seconds and values of a part; whatever it does to its process.

    What it had found before it failed or became too slow is kept. `patience` times its limit, for a CPU that others
    share. Nothing that the part has started outlives it.
    """
    limit = patience * (parts.PARTS[part].seconds if part in parts.PARTS else 60)
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--one", part, "--device", device]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    began, late = time.monotonic(), False
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        try:
            said, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if late:
            said, errors = process.communicate()
    found = [outcome for line in said.splitlines() if (outcome := _outcome(line))]
    outcome = found[-1] if found else {"status": "failed", "why": "", "values": {}}
    if late:
        outcome |= {"status": "too slow", "why": f"ended after {limit} s"}
    elif not found or process.returncode not in (0, PART_FAILED):
        last = (errors.strip().splitlines() or [""])[-1]
        outcome |= {"status": "failed", "why": last or f"exit code {process.returncode}"}
    return {"seconds": round(time.monotonic() - began, 1), **outcome}


def _outcome(line: str) -> dict[str, Any] | None:
    """What `run_here` prints; None for other lines, and for one that was cut."""
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and content.keys() == {"status", "why", "values"} else None


def run_here(part: str, device: str) -> None:
    """Print what the part has found, whenever it has found more: each line holds all of it."""
    status, why, values = "done", "", dict[str, Any]()
    try:
        for more in parts.run(part, device):
            values |= more
            print(json.dumps({"status": "done", "why": "", "values": values}), flush=True)
    except ImportError as error:
        status, why = "skipped", f"{error.name} is not installed here" if error.name else str(error)
    except parts.Skipped as reason:
        status, why = "skipped", str(reason)
    except Exception as error:  # of any kind: it is what the page is to say
        traceback.print_exc()
        status, why = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(json.dumps({"status": status, "why": why, "values": values}))
    sys.exit(PART_FAILED if status == "failed" else 0)


if __name__ == "__main__":
    main()
