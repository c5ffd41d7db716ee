"""CARS196's recipe at its real counts: from an address to a result, an epoch of 8,054 images long."""

import copy
import json
from pathlib import Path

import pandas as pd
from ruamel.yaml import YAML

from memvir.files import file_hash
from tests import cars196_stand_in as stand_in
from tests.stages.workspace import Workspace

RECIPE = YAML(typ="safe", pure=True).load(Path(__file__).parents[2].joinpath("params.yaml").read_text())["cars196"]


def test_the_papers_recipe_goes_through_at_real_counts(tmp_path, server):
    workspace = Workspace(tmp_path / "work")
    source = workspace.folder / "dataset" / "cars196" / "source"
    source.mkdir(parents=True)
    (source / "annotation.csv").write_bytes(stand_in.ANNOTATION.read_bytes())
    recipe = copy.deepcopy(RECIPE)
    archive = stand_in.write_tar(tmp_path / "car_ims.tgz", stand_in.numbered(), "w:gz")
    recipe["data"] |= {"addresses": [server.serve("car_ims.tgz", archive.read_bytes())], "md5": file_hash(archive)}
    # a network and a size for the laptop; batch, memory, optimiser, channels and transforms are the paper's
    recipe["images"] |= {"size": 8, "test": {"resize": 9}}
    recipe["model"] = {**recipe["model"], "backbone": "convnet", "widths": [4], "pretrained": "none", "weights": None}
    recipe["training"]["threads"] = 1
    variant = recipe["variants"]["memvir_norm_softmax"]
    variant["training"] = {"epochs": 1, "check_epoch": 1, "lr_decay": {"epochs": []}}
    variant["memvir"] = {"num_steps": 3, "step_gap": 10, "warm_up_epochs": 0}
    recipe["variants"] = {"memvir_norm_softmax": variant}
    params = {"datasets": ["cars196"], "variants": ["memvir_norm_softmax"], "seeds": [1], "cars196": recipe}
    workspace.write_params({**params, "runtime": {"progress": "none", "device": "cpu", "workers": 2}})
    run = ("--dataset", "cars196", "--variant", "memvir_norm_softmax", "--seed", "1")
    for stage, arguments in {
        "download": run[:2],
        "prepare": run[:2],
        "weights": run[:2],
        "train": run,
        "evaluate": run,
    }.items():
        outcome = workspace.run(stage, *arguments)
        assert outcome.code == 0, outcome.output
    history = pd.read_csv(workspace.folder / "runs/cars196/memvir_norm_softmax/1/history.csv")
    assert history["step"].tolist() == [63]  # 62 batches of 128 and one of 118
    assert history["num_virtual_classes"].tolist() == [3 * 98]
    assert history["num_virtual_embeddings"].tolist() == [3 * 128]
    result = json.loads((workspace.folder / "results/cars196/memvir_norm_softmax/1.json").read_text())
    assert set(result["last"]) == {"recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "rp", "map"}
