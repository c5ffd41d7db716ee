"""Add this machine to docs/machines.csv: the processors that made the committed results and reports, byte for byte.

Run it after `make repro` in a clone whose `git status` shows no change.
"""

import csv
import datetime
import hashlib
import subprocess
from pathlib import Path

from memvir.errors import UserError
from memvir.libraries import processor
from memvir.params import Params
from stages import stage

TABLE = Path("docs") / "machines.csv"
MADE = ("results", "reports", "settings", "dvc.lock")


@stage
def main(params: Params) -> None:
    if changed := _git("status", "--porcelain", *MADE).split("\n")[0]:
        raise UserError(f"{changed.split()[-1]}: is not what is committed, so this machine does not belong there")
    if not Path("runs").is_dir():
        raise UserError("runs: nothing was trained here; run `make repro` first")
    digest = hashlib.sha256()
    for name in sorted(_git("ls-files", *MADE).split("\n")):
        digest.update(f"{name}\0".encode() + Path(name).read_bytes())
    row = [
        processor(),
        datetime.date.today().isoformat(),
        _git("rev-parse", "--short", "HEAD"),
        digest.hexdigest()[:16],
    ]
    with TABLE.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerow(row)
    print(",".join(row))


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, check=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
