"""What `pip install .` puts on a machine: the library, typed, which needs none of the experiment's packages."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from memvir.extras import EXTRAS
from tests.models import make_model

ROOT = Path(__file__).parents[1]

PROGRAM = """
import numpy as np
import torch
from memvir import MemVir, build_loss, evaluate, load_model, nearest_neighbours

loss = MemVir(build_loss("norm_softmax", num_classes=3, dim=4), num_steps=2, step_gap=1)
value: torch.Tensor = loss(torch.ones(2, 4), torch.tensor([0, 1]))
number: int = evaluate(np.eye(2), [0, 0], (1,))  # type: ignore[assignment]  # types are known
metrics: dict[str, float] = evaluate(np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1]), (1,))
similarities, places = nearest_neighbours(np.eye(4, dtype=np.float32), 1)
embeddings: np.ndarray = load_model(MODEL).embed(np.zeros((2, 16, 16), np.uint8))
assert embeddings.shape == (2, 8)
"""

WITHOUT_TORCH = "[mypy-torch.*,torchvision.*]\nfollow_imports = skip\n"  # whose types take ten seconds to read

WITHOUT_EXTRAS = f"""
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted({module.split(".")[0] for extra in EXTRAS.values() for module in extra})}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import memvir
assert "torch" not in sys.modules, "import memvir costs nothing"
exec(open(sys.argv[1]).read())
import memvir.cli, memvir.trained.folder, memvir.trained.onnx, memvir.trained.page
for room in ("experiment.settings", "reporting.tables", "images.sources"):
    try:
        __import__(f"memvir.{{room}}")
        raise SystemExit(f"memvir.{{room}} could be imported")
    except ImportError as error:
        assert 'pip install "memvir[experiment]"' in str(error), error
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An empty folder with the wheel unpacked, as pip leaves it."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "site"
    source.mkdir()
    for name in ("memvir", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    build = (
        f"import os; os.chdir({str(source)!r}); from setuptools.build_meta import build_wheel as b; b({str(folder)!r})"
    )
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_everything_is_in_the_wheel(installed):
    for name in ("py.typed", "trained/page.html", "reporting/page.html", "models/bn_inception_layers.csv"):
        assert (installed / "memvir" / name).is_file(), name
    assert not list(installed.glob("stages")) and not list(installed.glob("tests"))
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert "memvir = memvir.cli:main" in entry_points.read_text()


def test_a_users_program_is_type_checked_and_runs_without_the_packages_of_any_extra(installed, tmp_path):
    model = make_model(tmp_path / "model.safetensors")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("MODEL", repr(str(model))))
    environment = {**os.environ, "PYTHONPATH": str(installed), "MYPYPATH": ""}
    (tmp_path / "mypy.ini").write_text("[mypy]\nwarn_unused_ignores = True\n" + WITHOUT_TORCH)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", program.name]
    checked = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    runs = [sys.executable, "-c", WITHOUT_EXTRAS, str(program)]
    ran = subprocess.run(runs, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
