"""A folder of one's own: what the stages read there is what DVC hashes, so that no change goes unnoticed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from dvc.repo import Repo

from memvir.errors import UserError
from memvir.images.sources.folder import OwnFolder
from tests import tiny
from tests.stages.project import ROOT

SOURCE = Path("dataset") / "tiny" / "source"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """A DVC project with one stage, which reads dataset/tiny/source."""
    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    shutil.copy(ROOT / ".dvcignore", ".dvcignore")
    stage = {"cmd": "echo done > out", "deps": [SOURCE.as_posix()], "outs": ["out"]}
    Path("dvc.yaml").write_text(json.dumps({"stages": {"prepare": stage}}))
    tiny.write_images(SOURCE, classes=2, per_class=2)
    return Repo.init(no_scm=True)


def prepare() -> None:
    data, place = OwnFolder(source="folder"), SOURCE.parent
    data.download(SOURCE, place / "download")
    data.prepare(SOURCE, place / "download", place / "images", place / "index.csv")


def replaced(picture: Path) -> None:
    picture.write_bytes((SOURCE / "train" / "class_01" / "00.png").read_bytes())


def link_source() -> Path:
    SOURCE.rename("../elsewhere")
    Path("../second").symlink_to("elsewhere")
    SOURCE.symlink_to(Path("../second").absolute())
    return Path("../elsewhere/train/class_00/00.png")


def link_picture() -> Path:
    picture = SOURCE / "train" / "class_00" / "00.png"
    picture.rename("../picture.png")
    Path("../second.png").symlink_to("picture.png")
    picture.symlink_to(Path("../second.png").absolute())
    return Path("../picture.png")


def link_all_pictures_of_a_class() -> Path:
    """As `cp -rs` does it."""
    linked = SOURCE / "train" / "class_00"
    elsewhere = linked.rename("../elsewhere").absolute()
    linked.mkdir()
    for picture in elsewhere.iterdir():
        (linked / picture.name).symlink_to(picture)
    return elsewhere / "00.png"


def put_a_dot_in_front() -> Path:
    (SOURCE / "train" / "class_00").rename(SOURCE / "train" / ".22 rifle")
    (SOURCE / "train" / ".22 rifle" / "00.png").rename(SOURCE / "train" / ".22 rifle" / ".hidden.png")
    return SOURCE / "train" / ".22 rifle" / ".hidden.png"


def leave_it() -> Path:
    return SOURCE / "train" / "class_00" / "00.png"


@pytest.mark.parametrize(
    "arranged", [leave_it, link_source, link_picture, link_all_pictures_of_a_class, put_a_dot_in_front]
)
def test_a_replaced_picture_makes_the_stage_run_again(repository: Repo, arranged: Callable[[], Path]) -> None:
    picture = arranged()
    prepare()
    before = (SOURCE.parent / "index.csv").read_bytes()
    repository.reproduce()
    assert repository.status() == {}
    replaced(picture)
    assert "prepare" in repository.status()
    prepare()
    assert (SOURCE.parent / "index.csv").read_bytes() != before


def link_train() -> Path:
    (SOURCE / "train").rename("../elsewhere")
    (SOURCE / "train").symlink_to(Path("../elsewhere").absolute())
    return Path("../elsewhere/class_00/00.png")


def link_class() -> Path:
    (SOURCE / "train" / "class_00").rename("../elsewhere")
    (SOURCE / "train" / "class_00").symlink_to(Path("../elsewhere").absolute())
    return Path("../elsewhere/00.png")


def put_a_dvc_project_there() -> Path:
    (SOURCE / "train" / "class_00" / ".dvc").mkdir()
    return SOURCE / "train" / "class_00" / "00.png"


@pytest.mark.parametrize("arranged", [link_train, link_class, put_a_dvc_project_there])
def test_where_dvc_does_not_look_nothing_is_read(repository: Repo, arranged: Callable[[], Path]) -> None:
    picture = arranged()
    repository.reproduce()
    picture.write_bytes(b"another")
    assert repository.status() == {}, "DVC looks there now: it need not be refused any more"
    with pytest.raises(UserError, match="would go unnoticed"):
        prepare()
