"""Kill a small pipeline again and again at random moments and compare its end with that of an undisturbed one.

    python -m tests.chaos --kills 30 [--command sweep|repro] [--signal TERM] [--seed 0]

Each kill hits the command, and the stages that it has at work, some time after it was started again; once everything is
done, all is deleted and begun anew, until the kills are used up. The long form of the tests
in tests/stages, for a person to run; it prints a line for each kill.
"""

import argparse
import contextlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from tests.stages.project import Project, params

MADE = ("results", "reports", "runs", "settings")
COMMANDS = {"sweep": ["stages.sweep"], "repro": ["dvc", "repro"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--command", choices=COMMANDS, default="sweep")
    parser.add_argument("--signal", choices=["KILL", "TERM", "INT"], default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Project.create(Path(folder) / "project", params())
        began = time.monotonic()
        completed = project.run(*COMMANDS[options.command])
        assert completed.returncode == 0, completed.stdout
        seconds, expected = time.monotonic() - began, project.outputs(*MADE)
        print(f"undisturbed: {seconds:.1f} s, {len(expected)} files")
        start_again(project)
        moments, hit, rounds, different = random.Random(options.seed), Counter[str](), 0, list[str]()
        kill = 0
        while kill < options.kills:
            process = project.start(*COMMANDS[options.command])
            try:
                output, _ = process.communicate(timeout=moments.uniform(0.1, 0.5) * seconds)
                assert process.returncode == 0, output
                rounds += 1
                different += compare(expected, project.outputs(*MADE))
                start_again(project)
            except subprocess.TimeoutExpired:
                at_work = kill_all(psutil.Process(process.pid), getattr(signal, f"SIG{options.signal}"))
                process.communicate()
                kill += 1
                hit.update(at_work)
                print(f"{kill:3d}: {options.signal} during {', '.join(at_work) or 'no stage'}", flush=True)
        completed = project.run(*COMMANDS[options.command])
        assert completed.returncode == 0, completed.stdout
        different += compare(expected, project.outputs(*MADE))
    print(f"{rounds + 1} times to the end, {len(different)} files differ from the undisturbed ones {different or ''}")
    print("hit: " + ", ".join(f"{stage} {count}" for stage, count in hit.most_common()))
    sys.exit(bool(different))


def start_again(project: Project) -> None:
    """As in a fresh clone."""
    for name in (*MADE, "logs", "scratch", ".dvc/cache", ".dvc/tmp", "dataset/tiny/images", "dataset/tiny/download"):
        shutil.rmtree(project.folder / name, ignore_errors=True)
    for name in ("dvc.lock", "dataset/tiny/index.csv"):
        (project.folder / name).unlink(missing_ok=True)


def kill_all(command: psutil.Process, number: int) -> list[str]:
    """Send a signal to a command and all that it started; returns the stages that were at work."""
    stages = set()
    for process in [command, *command.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            stages |= set(re.findall(r"-m stages\.(?!sweep)(\w+)", " ".join(process.cmdline())))
            process.send_signal(number)
    return sorted(stages)


def compare(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]


if __name__ == "__main__":
    main()
