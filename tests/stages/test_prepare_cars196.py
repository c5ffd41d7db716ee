"""CARS196 at its real counts, from download to index, as a user runs it. Only the pictures are stand-ins."""

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from memvir.config import Cars196Data
from memvir.datasets import cars196, read_index
from memvir.datasets.images import decode
from memvir.files import file_hash
from tests import cars196_stand_in as stand_in
from tests.http_server import MisbehavingServer

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_in.write_tar(tmp_path_factory.mktemp("archive") / "car_ims.tgz", stand_in.numbered(), "w:gz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, unpacked."""
    return stand_in.write_folder(tmp_path_factory.mktemp("folder"), stand_in.numbered())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """dataset/cars196/source as a fresh clone has it."""
    folder = tmp_path / "dataset" / "cars196" / "source"
    folder.mkdir(parents=True)
    (folder / "annotation.csv").write_bytes(stand_in.ANNOTATION.read_bytes())
    return folder


def settings(**given: object) -> Cars196Data:
    return Cars196Data(**{"source": "cars196", "addresses": [], "md5": None, **given})


def run_stage(name: str, workspace: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"stages.{name}", "--dataset", "cars196"],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )


def test_the_stages_take_the_archive_from_an_address_to_the_index(
    tmp_path: Path, source: Path, archive: Path, server: MisbehavingServer
) -> None:
    addresses = [
        server.address("gone/car_ims.tgz"),
        server.serve("car_ims.tgz", archive.read_bytes(), cut_at=[200_000]),
    ]
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load((REPOSITORY / "params.yaml").read_text())
    params["datasets"] = ["cars196"]
    params["cars196"]["data"].update(addresses=addresses, md5=file_hash(archive))
    (tmp_path / "params.yaml").write_text(json.dumps(params))  # JSON is YAML

    done = run_stage("download", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "answered 404 Not Found" in done.stderr
    place = tmp_path / "dataset" / "cars196"
    found = json.loads((place / "download" / "source.json").read_text())
    assert found == {"source": addresses[1], "path": "car_ims.tgz"}
    assert server.ranges() == [None, None, "bytes=200000-"]

    done = run_stage("prepare", tmp_path)
    assert done.returncode == 0, done.stderr
    index = read_index(place / "index.csv")
    assert Counter(index["split"]) == {"train": 8054, "test": 8131}
    assert index.groupby("split")["class_id"].nunique().to_dict() == {"train": 98, "test": 98}
    assert index["class_id"].is_monotonic_increasing
    assert index["file"][0] == "train/001_AM_General_Hummer_SUV_2000/000001.jpg"
    files = {path.relative_to(place / "images").as_posix() for path in (place / "images").rglob("*") if path.is_file()}
    assert files == set(index["file"])
    for row in index.sample(30, random_state=0).itertuples():
        path = place / "images" / row.file
        assert path.read_bytes() == stand_in.picture(int(path.stem)) and file_hash(path) == row.md5
        assert decode(path, "bgr").ndim == 3

    before = {path: path.stat().st_ino for path in (place / "images").rglob("*.jpg")}
    content = (place / "index.csv").read_bytes()
    sample = sorted(before)[5000:5003]
    sample[0].unlink()
    sample[1].write_bytes(b"overwritten")
    (sample[2].parent / "stranger.jpg").write_bytes(b"")
    done = run_stage("prepare", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (place / "index.csv").read_bytes() == content
    after = {path: path.stat().st_ino for path in (place / "images").rglob("*.jpg")}
    assert after.keys() == before.keys()
    kept = [path for path in before if path not in sample[:2]]
    assert all(after[path] == before[path] for path in kept), "what was right was left alone"


def test_a_tar_of_class_folders_is_accepted_whatever_the_md5_of_the_original(tmp_path: Path, source: Path) -> None:
    path = stand_in.write_tar(tmp_path / "cars196.tar", stand_in.by_class("cars196/images"))
    cars196.download(settings(archive=str(path), md5=cars196.OFFICIAL_MD5), source, tmp_path / "download")
    note = json.loads((tmp_path / "download" / "source.json").read_text())
    assert note == {"source": "archive of params.yaml", "path": str(path)}


def test_an_unpacked_folder_is_linked_not_copied(tmp_path: Path, source: Path, folder: Path) -> None:
    place = tmp_path / "place"
    cars196.download(settings(folder=str(folder)), source, place / "download")
    cars196.prepare(settings(), source, place / "download", place / "images", place / "index.csv")
    index = read_index(place / "index.csv")
    assert len(index) == 16185
    for file in index["file"].sample(50, random_state=0):
        assert (place / "images" / file).samefile(folder / "car_ims" / Path(file).name)


def test_a_folder_that_is_not_the_original_is_noticed_where_the_md5_is_the_official_one(
    tmp_path: Path, source: Path, folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"000001\.jpg: its md5 is .*not the original images"):
        cars196.download(settings(folder=str(folder), md5=cars196.OFFICIAL_MD5), source, tmp_path / "download")


def test_a_folder_put_into_source_is_found(
    tmp_path: Path, source: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "car_ims").symlink_to(folder / "car_ims")
    with caplog.at_level(logging.INFO, logger="memvir"):
        cars196.download(settings(), source, tmp_path / "download")  # no md5: the counts decide
    assert f"using {source / 'car_ims'} (found in {source.as_posix()})" in caplog.text
