"""Run what is out of date on every core and GPU at once: `dvc repro`, side by side, to the same bytes.

    python -m stages.sweep                    as many runs as this machine has room for
    python -m stages.sweep --jobs 2           two stages at a time at most
    python -m stages.sweep --address auto     on the Ray cluster that this machine belongs to

Ctrl-C saves every run; the same command continues. Each run takes the cores and GPUs of its recipe's `resources`.
"""

import argparse
from pathlib import Path

from stages import Parser, at_once, exit_codes

LOCK = Path(".dvc") / "tmp" / "sweep.lock"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=at_once, help="stages at a time on this machine; default: as many as fit")
    where.add_argument("--address", help="a Ray cluster's address, such as auto or ray-head:6379")
    parser.add_argument("--plan", action="store_true", help="print what is out of date, and stop")
    options = parser.parse_args()
    with exit_codes():
        from memvir.experiment.lock import locked  # late: the handlers of signals come first
        from memvir.params import load_params
        from memvir.sweep.plan import open_pipeline
        from memvir.sweep.run import Sweep, open_executor

        params = load_params()
        with open_pipeline() as pipeline:
            if options.plan:
                with pipeline.lock:
                    out_of_date = pipeline.out_of_date()
                for name, after in out_of_date.items():
                    print(name, *(["after", *after] if after else []))
            else:
                with locked(LOCK, "at a sweep of this folder"):
                    Sweep(pipeline, params, lambda: open_executor(params, options.jobs, options.address)).run()


if __name__ == "__main__":
    main()
