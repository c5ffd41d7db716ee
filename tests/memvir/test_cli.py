"""The command memvir, on the run that a stage trained: what a person sees, and what is left in files."""

import json
import logging
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from memvir import cli, libraries, load_model, retrieval
from tests.models import make_model
from tests.stages.workspace import Workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("trained") / "work").prepared()
    assert (outcome := workspace.train()).code == 0, outcome.output
    assert (outcome := workspace.evaluate()).code == 0, outcome.output
    return workspace


@pytest.fixture
def run(workspace):
    return workspace.folder / "runs" / "tiny" / "memvir_norm_softmax" / "1"


@pytest.fixture
def folder(workspace, tmp_path):
    """The test images, 6 classes of 8."""
    target = tmp_path / "pictures"
    shutil.copytree(workspace.folder / "dataset" / "tiny" / "source" / "test", target)
    return target


@pytest.fixture
def memvir(monkeypatch, capfd):
    """memvir ARGUMENTS, as from a shell: exit code, stdout, stderr."""
    monkeypatch.setattr(libraries, "prepare", lambda threads=1: None)  # torch is imported long since

    def command(*arguments):
        monkeypatch.setattr(logging.root, "handlers", [])  # pytest's own, which would keep the messages to themselves
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code
        if isinstance(code, str):  # as Python does
            code, message = 1, code + "\n"
        else:
            message = ""
        captured = capfd.readouterr()
        return code, captured.out, captured.err + message

    return command


def one_line(outcome) -> str:
    """The error of a command that failed, which is its last line."""
    code, out, err = outcome
    assert code == 1 and not out and "Traceback" not in err
    return err.splitlines()[-1]


def test_a_run_embeds_its_test_images_as_its_evaluation_did_to_the_bit(workspace, run):
    index = pd.read_csv(workspace.folder / "dataset" / "tiny" / "index.csv")
    files = index.loc[index["split"] == "test", "file"]
    with np.load(run / "test_embeddings.npz") as arrays:
        expected = retrieval.unit_length(arrays["embeddings"], "embeddings")
    found = load_model(run).embed([workspace.folder / "dataset" / "tiny" / "images" / file for file in files])
    assert np.array_equal(found, expected)


def test_a_runs_model_tells_its_classes_its_run_and_its_metrics(workspace, run):
    metadata = load_model(run).metadata
    result = json.loads((workspace.folder / "results/tiny/memvir_norm_softmax/1.json").read_text())
    assert metadata["classes"] == [f"class_{number:02d}" for number in range(6)]
    assert metadata["metrics"] == {name: result["last"][name] for name in ("recall_at_1", "rp", "map")}
    assert metadata["run"]["epoch"] == 6 and metadata["run"]["settings"]["memvir"]["num_steps"] == 2
    assert metadata["weights"] == {"pretrained": "none"}
    best = load_model(run / "models" / f"epoch-{result['best_epochs']['map']:04d}.safetensors").metadata
    assert best["metrics"]["map"] == result["best"]["map"]


def test_embed_writes_names_and_embeddings(memvir, run, folder, tmp_path):
    code, out, _ = memvir("embed", run, folder, "--out", tmp_path / "e.npz")
    assert code == 0 and out == f"{tmp_path / 'e.npz'}: 48 pictures, embeddings of 8 dimensions\n"
    with np.load(tmp_path / "e.npz") as arrays:
        names = arrays["names"].tolist()
        assert names[0] == "class_06/00.png"
        assert np.array_equal(arrays["embeddings"], load_model(run).embed([folder / name for name in names]))
    assert [path.name for path in tmp_path.iterdir() if "e.npz" in path.name] == ["e.npz"]


def test_embed_fails_with_all_names_and_then_skips_if_asked_to(memvir, run, folder, tmp_path):
    for name in ("class_06/01.png", "class_07/bad.jpg"):
        (folder / name).write_text("no picture")
    outcome = memvir("embed", run, folder, "--out", tmp_path / "e.npz")
    assert one_line(outcome).endswith(
        ": 2 of 49 pictures cannot be read (class_06/01.png, class_07/bad.jpg); replace or remove them, or leave them "
        "out with --skip-unreadable"
    )
    assert not (tmp_path / "e.npz").exists()
    code, out, err = memvir("embed", run, folder, "--out", tmp_path / "e.npz", "--skip-unreadable")
    assert code == 0 and "47 pictures" in out
    assert err.count("skipped: ") == 2 and "continuing after 49 of 49 pictures" in err


def test_ctrl_c_says_how_to_go_on(memvir, run, folder, tmp_path, monkeypatch):
    from memvir.trained.model import TrainedModel

    original, calls = TrainedModel._stack, iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    arguments = ("embed", run, folder, "--out", tmp_path / "e.npz", "--batch-size", 10)
    with monkeypatch.context() as patch:
        patch.setattr(TrainedModel, "_stack", interrupted)
        code, out, err = memvir(*arguments)
    assert code == 130 and not out
    assert err.endswith("interrupted; run the same command again, it goes on where it stopped\n")
    code, _, err = memvir(*arguments)
    assert code == 0 and "continuing after 20 of 48 pictures" in err


def test_evaluate_gives_the_figures_of_the_evaluation(memvir, workspace, run, folder, tmp_path):
    code, out, _ = memvir("evaluate", run, folder, "--recall-at", 1, 2, "--out", tmp_path / "metrics.json")
    assert code == 0 and "tiny/memvir_norm_softmax/1 on 48 pictures of 6 classes" in out
    result = json.loads((workspace.folder / "results/tiny/memvir_norm_softmax/1.json").read_text())["last"]
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(result)
    assert re.search(rf"Recall@1 +{100 * result['recall_at_1']:.2f} %\nRecall@2 ", out)


def test_evaluate_names_a_picture_outside_of_any_class_and_a_k_beyond_the_folder(memvir, run, folder):
    error = one_line(memvir("evaluate", run, folder, "--recall-at", 48))
    assert error.startswith("error: recall_at: 48 is more than the 47")
    shutil.copy(folder / "class_06" / "00.png", folder / "loose.png")
    assert f"{folder / 'loose.png'}: lies in no class folder; the form is " in one_line(memvir("evaluate", run, folder))


def test_search_finds_the_nearest_without_the_query_itself(memvir, run, folder, tmp_path):
    query = folder / "class_08" / "03.png"
    code, out, _ = memvir("search", run, query, folder, "--top", 4)
    assert code == 0
    names = [line.split()[2] for line in out.splitlines()[1:]]
    model = load_model(run)
    everything = sorted(path for path in folder.rglob("*.png") if path != query)
    order = np.argsort(-model.embed(everything) @ model.embed(query)[0])[:4]
    assert names == [everything[place].relative_to(folder).as_posix() for place in order]
    memvir("embed", run, folder, "--out", tmp_path / "e.npz")
    assert memvir("search", run, query, folder, "--top", 4, "--embeddings", tmp_path / "e.npz")[:2] == (0, out)


def test_search_by_a_folder_of_queries_writes_a_page_with_all_pictures(memvir, run, folder, tmp_path):
    queries = tmp_path / "queries"
    queries.mkdir()
    Image.new("L", (900, 300), 200).save(queries / "<b>large & wide<b>.png")
    shutil.copy(folder / "class_06" / "00.png", queries / "small.png")
    (queries / "bad.png").write_text("no picture")
    page = tmp_path / "results.html"
    code, out, _ = memvir("search", run, queries, folder, "--top", 3, "--page", page, "--skip-unreadable")
    assert code == 0 and out.count("\n     1  ") == 2
    html = page.read_text(encoding="utf-8")
    assert html.count('role="img"') == html.count('aria-label="') == 2 * (1 + 3)
    shown = re.findall(r'class="picture (p\d+)"', html)
    assert html.count("background-image: url(data:image/") == len(set(shown)) <= len(shown), "each picture once"
    assert "&lt;b&gt;large &amp; wide&lt;b&gt;.png" in html and "<b>large" not in html
    assert not re.search(r"(src|href)=\"(?!data:)|<script|url\((?!data:)", html), "self-contained"


def test_search_names_a_top_beyond_the_folder(memvir, run, folder):
    error = one_line(memvir("search", run, folder / "class_06/00.png", folder, "--top", 49))
    assert error == f"error: --top: 49 is more than the 48 pictures in {folder}; use --top 48"
    only = folder / "class_06"
    code, out, _ = memvir("search", run, only / "00.png", only)
    assert code == 0 and len(out.splitlines()) == 1 + 7  # as many as there are, the query left out


def test_search_refuses_embeddings_of_another_folder(memvir, run, folder, tmp_path):
    memvir("embed", run, folder, "--out", tmp_path / "e.npz")
    inside = folder / "class_06"
    error = one_line(memvir("search", run, inside / "00.png", inside, "--embeddings", tmp_path / "e.npz"))
    assert f"e.npz: of its 48 pictures, {inside} lacks 48 (class_06/00.png); give the folder" in error
    (folder / "class_07" / "03.png").unlink()
    error = one_line(memvir("search", run, inside / "00.png", folder, "--embeddings", tmp_path / "e.npz"))
    assert f"e.npz: of its 48 pictures, {folder} lacks 1 (class_07/03.png)" in error


@pytest.mark.parametrize("top", [2, 7])
def test_search_leaves_out_the_query_but_no_other_link_to_its_file(memvir, run, folder, top):
    only = folder / "class_06"
    for number in range(3):
        (only / f"link {number}.png").hardlink_to(only / "00.png")
    code, out, _ = memvir("search", run, only / "00.png", only, "--top", top)
    assert code == 0 and len(out.splitlines()) == 1 + top and out.count("link") == min(top, 3)
    assert "00.png" not in "".join(out.splitlines()[1:])


@pytest.mark.parametrize("change", ["replaced", "added"])
def test_search_says_that_a_folder_has_changed_since_its_embeddings(memvir, run, folder, tmp_path, change):
    path = tmp_path / "e.npz"
    memvir("embed", run, folder, "--out", path)
    arguments = ("search", run, folder / "class_08" / "03.png", folder, "--embeddings", path)
    code, out, err = memvir(*arguments)
    assert code == 0 and not err
    shutil.copy(folder / "class_06" / "00.png", folder / "class_07" / ("01.png" if change == "replaced" else "new.png"))
    assert memvir(*arguments) == (
        0,
        out,
        f"{path}: pictures of {folder} have changed since; run `memvir embed` again\n",
    )
    with np.load(path) as arrays:  # as an earlier version wrote it
        np.savez(path, **{name: arrays[name] for name in ("names", "embeddings", "model")})
    assert memvir(*arguments) == (0, out, "")


def test_to_skip_pictures_is_no_advice_where_it_was_asked_for(memvir, run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture")
    error = one_line(memvir("embed", run, tmp_path / "bad", "--out", tmp_path / "e.npz", "--skip-unreadable"))
    assert error.endswith("bad: 1 of 1 pictures cannot be read (a.png); replace or remove them")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("m.npz", ("embed", "{file}", "{folder}", "--out", "{file}"), "--out: {file} is the model itself"),
        ("m.json", ("evaluate", "{file}", "{folder}", "--out", "{file}"), "--out: {file} is the model itself"),
        ("m.onnx", ("export", "{file}", "--onnx", "{file}"), "--onnx: {file} is the model itself"),
        ("m.html", ("search", "{run}", "{file}", "{folder}", "--page", "{file}"), "--page: {file} is the query itself"),
        ("m", ("evaluate", "{file}", "{folder}", "--out", "{file}"), "--out: {file} does not end in .json"),
        ("m", ("export", "{file}", "--onnx", "{file}"), "--onnx: {file} does not end in .onnx"),
        ("m", ("search", "{run}", "{file}", "{folder}", "--page", "{file}"), "--page: {file} does not end in .html"),
    ],
)
def test_no_command_writes_over_what_it_reads(memvir, run, folder, tmp_path, name, arguments, message):
    places = {"run": run, "folder": folder, "file": tmp_path / name}
    shutil.copy(run / "model.safetensors", tmp_path / name)
    outcome = memvir(*(argument.format(**places) for argument in arguments))
    assert one_line(outcome).startswith("error: " + message.format(**places))
    assert (tmp_path / name).read_bytes() == (run / "model.safetensors").read_bytes()


def test_a_name_as_long_as_the_system_allows_serves(memvir, run, folder, tmp_path):
    path = tmp_path / f"{'x' * 251}.npz"
    assert memvir("embed", run, folder / "class_06", "--out", path)[0] == 0 and path.exists()
    assert not list(tmp_path.glob(".*"))


def test_export_writes_onnx(memvir, run, tmp_path):
    code, out, _ = memvir("export", run, "--onnx", tmp_path / "model.onnx")
    assert code == 0 and (tmp_path / "model.onnx").exists()
    assert re.match(rf"{tmp_path}/model\.onnx: as torch to [0-9.e-]+, for any batch size\npreprocessing: {{", out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("embed", "none.safetensors", "{folder}", "--out", "{out}"), "none.safetensors: there is no such model file"),
        (("embed", "{run}", "{folder}/none", "--out", "{out}"), "none: not a folder"),
        (("embed", "{run}", "{folder}", "--out", "e.txt"), "--out: e.txt does not end in .npz"),
        (("embed", "{run}", "{folder}", "--out", "{out}", "--sha256", "0" * 64), "model.safetensors: its sha256 is "),
        (("embed", "{run}", "{folder}", "--out", "{out}", "--device", "cuda:77"), "device: cuda:77 asked for"),
        (("embed", "{run}", "{folder}", "--out", "/proc/none/e.npz"), "/proc/none: "),
        (("search", "{run}", "none.jpg", "{folder}"), "none.jpg: cannot be read"),
        (("search", "{run}", "{picture}", "{folder}", "--embeddings", "none.npz"), "none.npz: not found"),
        (("evaluate", "{other}", "{folder}"), "other.pt: not a whole safetensors file (it is a pickle or a zip"),
    ],
)
def test_what_is_wrong_is_one_line(memvir, run, folder, tmp_path, arguments, message):
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    places = {"run": run, "folder": folder, "out": tmp_path / "e.npz", "other": tmp_path / "other.pt"}
    places["picture"] = folder / "class_06" / "00.png"
    outcome = memvir(*(argument.format(**places) for argument in arguments))
    assert message in one_line(outcome) and outcome[2].count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("embed", "m", "f"), "the following arguments are required: --out"),
        (("search", "m", "q", "f", "--top", "0"), "argument --top: 0 is not a number from 1"),
        (("search", "m", "q", "f", "--top", "ten"), "argument --top: invalid number value: 'ten'"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(memvir, arguments, message):
    assert memvir(*arguments) == (2, "", f"error: {message}; --help lists the options\n")


def test_a_colour_model_takes_photographs_and_names_of_any_bytes(memvir, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        name = os.fsdecode([b"\xff.png", "鳥.png".encode(), b"a.png"][number])
        Image.new("RGB", (40 + number, 30), (number * 90, 20, 200)).save(folder / name)
    model = make_model(tmp_path / "model.safetensors", channels="rgb")
    page = tmp_path / "page.html"
    code, out, _ = memvir("search", model, folder / "a.png", folder, "--page", page)
    assert code == 0 and "鳥.png" in out and "\N{REPLACEMENT CHARACTER}.png" in out
    assert "鳥.png" in page.read_text(encoding="utf-8")
