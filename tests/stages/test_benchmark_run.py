"""In-Shop's recipe from an address to the paper's table: queries and gallery apart through every stage."""

import copy
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from memvir import retrieval
from memvir.images.index import read_index
from memvir.images.sources.inshop import PARTITION, InShop
from stages import neighbours, table4
from tests import benchmark_stand_ins as stand_ins
from tests.cars196_stand_in import write_zip
from tests.stages.workspace import Workspace

PARAMS = YAML(typ="safe", pure=True).load(Path(__file__).parents[2].joinpath("params.yaml").read_text())
COUNTS = {"train": (140, 20), "query": (50, 10), "gallery": (60, 10)}
VARIANTS = ["norm_softmax", "memvir_norm_softmax"]


def test_in_shop_goes_from_an_address_to_the_papers_table(tmp_path, server, monkeypatch: pytest.MonkeyPatch):
    members = stand_ins.inshop(COUNTS)
    size = sum(len(content) for name, content in members.items() if name.endswith(".jpg"))
    for name, value in {
        "counts": COUNTS,
        "picture_bytes": size,
        "partition_sha256": hashlib.sha256(members[f"Eval/{PARTITION}"]).hexdigest(),
    }.items():
        monkeypatch.setattr(InShop, name, value)  # the stages' processes are forked from this one
    workspace = Workspace(tmp_path / "work")
    (workspace.folder / "dataset" / "inshop" / "source").mkdir(parents=True)
    archive = write_zip(tmp_path / "img.zip", iter(members.items()))
    recipe = copy.deepcopy(PARAMS["inshop"])
    recipe["data"]["addresses"] = [server.serve("img.zip", archive.read_bytes())]
    # a network and a size for the laptop; batch, optimiser, channels and transforms are the recipe's
    recipe["images"] |= {"size": 8, "test": {"resize": 9}}
    recipe["model"] |= {"backbone": "convnet", "widths": [4], "pretrained": "none", "weights": None}
    recipe["training"] |= {"threads": 1, "epochs": 2, "check_epoch": 1}
    recipe["variants"] = {name: recipe["variants"][name] for name in VARIANTS}
    memory = {"num_steps": 2, "step_gap": 0, "warm_up_epochs": 0, "storage_dtype": "bfloat16"}
    recipe["variants"]["memvir_norm_softmax"] |= {"memvir": memory, "training": {}}
    params = {"datasets": ["inshop"], "variants": VARIANTS, "seeds": [1], "inshop": recipe}
    workspace.write_params({**params, "runtime": {"progress": "none", "device": "cpu", "workers": 0}})
    for stage in ("download", "prepare", "weights"):
        outcome = workspace.run(stage, "--dataset", "inshop")
        assert outcome.code == 0, outcome.output
    for variant in VARIANTS:
        for stage in ("train", "evaluate"):
            outcome = workspace.run(stage, "--dataset", "inshop", "--variant", variant, "--seed", "1")
            assert outcome.code == 0, outcome.output

    monkeypatch.chdir(workspace.folder)
    index = read_index(Path("dataset/inshop/index.csv"))
    tested = index[index["split"] != "train"]
    queries, labels = (tested["split"] == "query").to_numpy(), tested["class_id"].to_numpy()
    embeddings = np.load("runs/inshop/memvir_norm_softmax/1/test_embeddings.npz")["embeddings"]
    result = json.loads(Path("results/inshop/memvir_norm_softmax/1.json").read_text())
    expected = retrieval.evaluate(
        embeddings[~queries],
        labels[~queries],
        (1, 10, 20, 40),
        query=embeddings[queries],
        query_labels=labels[queries],
    )
    assert result["last"] == pytest.approx(expected) and result["most_virtual_classes"] == 2 * 20
    assert set(expected) == {"recall_at_1", "recall_at_10", "recall_at_20", "recall_at_40", "rp", "map"}
    monkeypatch.setattr(sys, "argv", ["neighbours", "--dataset", "inshop"])
    neighbours.main()
    assert Path("reports/inshop/neighbours.png").exists()
    monkeypatch.setattr(sys, "argv", ["table4"])
    table4.main()
    table = Path("reports/table4.md").read_text()
    assert f"{100 * result['last']['recall_at_1']:.2f}" in table and "missing" not in table
