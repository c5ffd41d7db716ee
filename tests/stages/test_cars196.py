"""CARS196's recipe at its real counts, from an address to a result. Only the pictures are stand-ins."""

import json
import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from memvir.files import file_hash
from memvir.images.decode import decode
from memvir.images.index import read_index
from memvir.images.sources import cars196
from memvir.images.sources.cars196 import Cars196
from tests import cars196_stand_in as stand_in
from tests.http_server import MisbehavingServer
from tests.stages.workspace import Workspace

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


def settings(**given: object) -> Cars196:
    return Cars196(**{"source": "cars196", "addresses": [], "md5": None, **given})


def recipe_for_a_laptop() -> dict:
    """Network and size; batch, memory, optimiser, channels and transforms are the paper's."""
    recipe = YAML(typ="safe", pure=True).load((REPOSITORY / "params.yaml").read_text())["cars196"]
    recipe["images"] |= {"size": 8, "test": {"resize": 9}}
    recipe["model"] |= {"backbone": "convnet", "widths": [4], "pretrained": "none", "weights": None}
    recipe["training"]["threads"] = 1
    variant = recipe["variants"]["memvir_norm_softmax"]
    variant["training"] = {"epochs": 1, "check_epoch": 1, "lr_decay": {"epochs": []}}
    variant["memvir"] = {"num_steps": 3, "step_gap": 10, "warm_up_epochs": 0}
    recipe["variants"] = {"memvir_norm_softmax": variant}
    return recipe


def test_the_stages_go_from_an_address_to_a_result(tmp_path: Path, archive: Path, server: MisbehavingServer) -> None:
    workspace = Workspace(tmp_path)
    (workspace.folder / "dataset/cars196/source").mkdir(parents=True)
    (workspace.folder / "dataset/cars196/source/annotation.csv").write_bytes(stand_in.ANNOTATION.read_bytes())
    addresses = [
        server.address("gone/car_ims.tgz"),
        server.serve("car_ims.tgz", archive.read_bytes(), cut_at=[200_000]),
    ]
    recipe = recipe_for_a_laptop()
    recipe["data"] |= {"addresses": addresses, "md5": file_hash(archive)}
    params = {"datasets": ["cars196"], "variants": ["memvir_norm_softmax"], "seeds": [1], "cars196": recipe}
    workspace.write_params({**params, "runtime": {"progress": "none", "device": "cpu", "workers": 2}})

    def run(stage: str, *arguments: str) -> str:
        outcome = workspace.run(stage, "--dataset", "cars196", *arguments)
        assert outcome.code == 0, outcome.output
        return outcome.output

    assert "answered 404 Not Found" in run("download")
    place = tmp_path / "dataset" / "cars196"
    found = json.loads((place / "download" / "source.json").read_text())
    assert found == {"source": addresses[1], "path": "car_ims.tgz"}
    assert server.ranges() == [None, None, "bytes=200000-"]

    run("prepare")
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
    run("prepare")
    assert (place / "index.csv").read_bytes() == content
    after = {path: path.stat().st_ino for path in (place / "images").rglob("*.jpg")}
    assert after.keys() == before.keys()
    kept = [path for path in before if path not in sample[:2]]
    assert all(after[path] == before[path] for path in kept), "what was right was left alone"

    run("weights")
    variant = ("--variant", "memvir_norm_softmax", "--seed", "1")
    for stage in ("train", "evaluate"):
        run(stage, *variant)
    history = pd.read_csv(tmp_path / "runs/cars196/memvir_norm_softmax/1/history.csv")
    assert history["step"].tolist() == [63]  # 62 batches of 128 and one of 118
    assert history["num_virtual_classes"].tolist() == [3 * 98]
    assert history["num_virtual_embeddings"].tolist() == [3 * 128]
    result = json.loads((tmp_path / "results/cars196/memvir_norm_softmax/1.json").read_text())
    assert set(result["last"]) == {"recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "rp", "map"}


def test_a_tar_of_class_folders_is_accepted_whatever_the_md5_of_the_original(tmp_path: Path, source: Path) -> None:
    path = stand_in.write_tar(tmp_path / "cars196.tar", stand_in.by_class("cars196/images"))
    settings(archive=str(path), md5=cars196.OFFICIAL_MD5).download(source, tmp_path / "download")
    note = json.loads((tmp_path / "download" / "source.json").read_text())
    assert note == {"source": "data.archive", "path": str(path)}


def test_an_unpacked_folder_is_linked_not_copied(tmp_path: Path, source: Path, folder: Path) -> None:
    place = tmp_path / "place"
    settings(folder=str(folder)).download(source, place / "download")
    settings().prepare(source, place / "download", place / "images", place / "index.csv")
    index = read_index(place / "index.csv")
    assert len(index) == 16185
    for file in index["file"].sample(50, random_state=0):
        assert (place / "images" / file).samefile(folder / "car_ims" / Path(file).name)


def test_a_folder_that_is_not_the_original_is_noticed_where_the_md5_is_the_official_one(
    tmp_path: Path, source: Path, folder: Path
) -> None:
    with pytest.raises(ValueError, match=r"000001\.jpg: its md5 is .*not the original images"):
        settings(folder=str(folder), md5=cars196.OFFICIAL_MD5).download(source, tmp_path / "download")


def test_a_folder_put_into_source_is_found(
    tmp_path: Path, source: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "car_ims", source / "car_ims", copy_function=os.link)
    with caplog.at_level(logging.INFO, logger="memvir"):
        settings().download(source, tmp_path / "download")  # no md5: the counts decide
    assert f"using {source / 'car_ims'} (found in {source.as_posix()})" in caplog.text


def test_a_link_to_a_folder_in_source_is_refused_because_dvc_does_not_look_behind_it(
    tmp_path: Path, source: Path, folder: Path
) -> None:
    (source / "car_ims").symlink_to(folder / "car_ims")
    with pytest.raises(ValueError, match="car_ims: a link to a folder, behind which changes would go unnoticed"):
        settings().download(source, tmp_path / "download")
