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
        run(project, "dvc", "repro", "download", "prepare", "weights")
        planning = run(project, "stages.sweep", "--plan")
        whole = run(project, "stages.sweep", "--jobs", str(options.jobs))
        idle = run(project, "stages.sweep")
        status = run(project, "dvc", "status")
        repro = run(project, "dvc", "repro")
    print("| 180 runs of nothing: 363 stages to train and evaluate, 16 of reports | seconds |\n|---|---:|")
    print(f"| planning (`python -m stages.sweep --plan`) | {planning:.1f} |")
    print(f"| the whole sweep, {options.jobs} stages at a time | {whole:.1f} |")
    print(f"| so a sweep adds to a run | {whole / 180:.2f} |")
    print(f"| a sweep with nothing to do | {idle:.1f} |")
    print(f"| `dvc status` | {status:.1f} |")
    print(f"| `dvc repro` with nothing to do | {repro:.1f} |")


def build(project: Path) -> None:
    for name in (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    for name in ("memvir", "stages"):
        shutil.copytree(ROOT / name, project / name)
    params = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    recipe = copy.deepcopy(params["glyphs"])
    variants = {f"v{i}": recipe["variants"]["norm_softmax"] for i in range(12)}
    recipe["variants"] = {**variants, "tsne": recipe["variants"]["tsne"]}
    datasets = dict.fromkeys(("a", "b", "c"), recipe)
    lists = {"datasets": list(datasets), "variants": list(variants), "seeds": [1, 2, 3, 4, 5]}
    content = {**lists, **datasets, "reporting": params["reporting"]}
    (project / "params.yaml").write_text(json.dumps(content))
    for name in datasets:
        (project / "dataset" / name / "source").mkdir(parents=True)
        (project / "dataset" / name / "source" / "annotation.csv").write_text(name)
    stages = YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        kinds = [out for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in kinds]
        for part in ("dataset", "variant", "seed"):
            outs = [out.replace(f"/${{item.{part}}}", "" if part != "dataset" else "/{0}") for out in outs]
        if name != "train_tsne":
            (project / "stages" / f"{stage['cmd'].split()[2].split('.')[1]}.py").write_text(NOTHING.format(outs=outs))
    subprocess.run(["git", "init", "-q", "."], cwd=project, check=True)


def run(project: Path, *command: str) -> float:
    """Seconds that a command takes."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", *command], cwd=project, env=environment, capture_output=True, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
