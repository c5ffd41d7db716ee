"""Kill a small training run again and again at random moments and compare its end with that of an undisturbed one.

    python -m tests.chaos --kills 30 [--signal TERM] [--seed 0]

Each kill hits a process that has just been started by the same command; when the kills are used up the command is run
to its end. The long form of tests/stages/test_train.py, for a person to run; it prints one line per kill.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import tiny
from tests.stages.workspace import Workspace

ROOT = Path(__file__).parents[1]
TRAINING = {"epochs": 40, "check_epoch": 1, "lr_decay": {"epochs": [30]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        expected, seconds = undisturbed(Path(folder) / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files")
        found = disturbed(Path(folder) / "disturbed", seconds, options)
    different = [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
    print(f"{len(found)} files, {len(different)} differ from the undisturbed run's {different or ''}")
    sys.exit(bool(different))


def workspace(folder: Path) -> Workspace:
    made = Workspace(folder)
    params = tiny.params(**TRAINING)
    params["runtime"]["checkpoint_epochs"] = 1  # a checkpoint an epoch, so that many kills hit one being written
    made.write_params(params)
    return made.prepared()


def start(made: Workspace) -> subprocess.Popen:
    run = "--dataset tiny --variant memvir_norm_softmax --seed 1"
    command = f"{sys.executable} -m stages.train {run} && exec {sys.executable} -m stages.evaluate {run}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        shell=True,
        cwd=made.folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def undisturbed(folder: Path) -> tuple[dict[str, bytes], float]:
    made = workspace(folder)
    began = time.monotonic()
    process = start(made)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return made.outputs(), time.monotonic() - began


def disturbed(folder: Path, seconds: float, options: argparse.Namespace) -> dict[str, bytes]:
    made = workspace(folder)
    moments = random.Random(options.seed)
    number = getattr(signal, f"SIG{options.signal}")
    for kill in range(1, options.kills + 1):
        process = start(made)
        delay = moments.uniform(0.3, 1.0) * seconds
        try:
            _, errors = process.communicate(timeout=delay)
            end = f"finished (exit code {process.returncode})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
            _, errors = process.communicate()
            end = f"{options.signal} after {delay:.2f} s"
        if end.startswith("finished"):
            # done before the kill came: begin again, so that every kill hits a run at work
            for name in made.outputs():
                (made.folder / name).unlink()
        said = errors.strip().splitlines()
        print(f"{kill:3d}: {end}{'; ' + said[-1] if said else ''}", flush=True)
    process = start(made)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return made.outputs()


if __name__ == "__main__":
    main()
