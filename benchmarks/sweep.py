"""What a sweep adds to the work itself: 180 runs (12 variants x 3 data sets x 5 seeds) whose work is nothing.

    python -m benchmarks.sweep [--jobs 2]

Builds a project with this repository's dvc.yaml and stages that only write their outputs, and times the planning, the
sweep with its commits, and DVC's own commands on that many stages.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]

NOTHING = """
import sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = [options[name] for name in ("--dataset", "--variant", "--seed") if name in options]
for out in {outs!r}:
    path = Path(out.format("/".join(run)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(" ".join(run)) if path.suffix else path.mkdir(exist_ok=True)
    if not path.suffix:
        (path / "file").write_text(" ".join(run))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        build(project)
        for _ in range(2):  # once to import and to compile
            planning = timed(project, "stages.sweep", "--plan")
        sweep = timed(project, "stages.sweep", "--jobs", str(options.jobs))
        status = timed(project, "dvc", "status")
        repro = timed(project, "dvc", "repro")
    print("| 180 runs of nothing | seconds |\n|---|---:|")
    print(f"| planning (`python -m stages.sweep --plan`) | {planning:.1f} |")
    print(f"| the whole sweep: 363 stages, commits, tables | {sweep:.1f} |")
    print(f"| of that per run (training and evaluation) | {sweep / 180:.2f} |")
    print(f"| `dvc status` afterwards | {status:.1f} |")
    print(f"| `dvc repro` with nothing to do | {repro:.1f} |")


def build(project: Path) -> None:
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "scratch", "logs", "results"))
    shutil.rmtree(project / ".dvc" / "tmp", ignore_errors=True)
    shutil.rmtree(project / ".dvc" / "cache", ignore_errors=True)
    (project / "dvc.lock").unlink(missing_ok=True)
    params = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    recipe = copy.deepcopy(params["glyphs"])
    variants = {f"v{i}": recipe["variants"]["norm_softmax"] for i in range(12)}
    recipe["variants"] = {**variants, "tsne": recipe["variants"]["tsne"]}
    datasets = dict.fromkeys(("a", "b", "c"), recipe)
    content = {"datasets": list(datasets), "variants": list(variants), "seeds": [1, 2, 3, 4, 5], **datasets}
    (project / "params.yaml").write_text(json.dumps(content))
    for name in datasets:
        (project / "dataset" / name / "source").mkdir(parents=True)
        (project / "dataset" / name / "source" / "annotation.csv").write_text(name)
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage.get("outs", [])]
        outs += [next(iter(out)) if isinstance(out, dict) else out for out in stage.get("metrics", [])]
        for part in ("dataset", "variant", "seed"):
            outs = [out.replace(f"/${{item.{part}}}", "" if part != "dataset" else "/{0}") for out in outs]
        if name != "train_tsne":
            (project / "stages" / f"{stage['cmd'].split()[2].split('.')[1]}.py").write_text(NOTHING.format(outs=outs))
    subprocess.run(["git", "init", "-q", "."], cwd=project, check=True)


def timed(project: Path, *command: str) -> float:
    started = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    outcome = subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
