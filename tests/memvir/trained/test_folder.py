"""Folders of pictures: nothing left out in silence, nothing embedded twice."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from memvir import load_model
from memvir.errors import UserError
from memvir.images import decode
from memvir.trained.folder import (
    Embeddings,
    UnreadablePictures,
    embed_folder,
    pictures_in,
    read_embeddings,
    write_embeddings,
)
from tests.models import make_model


@pytest.fixture
def model(tmp_path):
    return load_model(make_model(tmp_path / "model.safetensors"))


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    for number in range(7):
        path = tmp_path / "pictures" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16)).astype(np.uint8)).save(path)
    return tmp_path / "pictures"


def spoil(folder, *names) -> None:
    for name in names:
        (folder / name).write_text("no picture")


def test_pictures_are_found_at_every_depth_whatever_they_are_called(folder):
    (folder / "class_0" / "0.png").rename(folder / "photo without suffix")
    for name in ("notes.txt", "embeddings.npz", ".embeddings.npz.rows", "index.csv", "class_1/Thumbs.db"):
        (folder / name).write_bytes(b"x")
    (folder / "class_1" / "phone.heic").write_bytes(b"x")  # a picture, if one that cannot be read
    numbers = ["class_0/2.png", "class_0/4.png", "class_0/6.png", "class_1/1.png", "class_1/3.png", "class_1/5.png"]
    pictures, others = pictures_in(folder)
    assert sorted(pictures) == sorted([*numbers, "class_1/phone.heic", "photo without suffix"])
    assert others == [".embeddings.npz.rows", "embeddings.npz", "index.csv", "notes.txt"]


@pytest.mark.parametrize(
    ("names", "message"), [(["notes.txt"], "notes.txt"), (["a.csv", "b.txt", "c.txt"], "a.csv and 2 more")]
)
def test_files_that_are_no_pictures_are_named(model, folder, caplog, names, message):
    caplog.set_level(logging.INFO)
    spoil(folder, *names)
    embed_folder(model, folder)
    assert f"{folder}: left out, being no pictures by their names: {message}\n" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not a folder; give the folder that holds the pictures"),
        (lambda path: path.write_text("x"), "not a folder"),
        (lambda path: path.mkdir(), "holds no pictures; give the folder that does"),
    ],
)
def test_a_folder_without_pictures_is_named(tmp_path, make, message):
    make(tmp_path / "empty")
    with pytest.raises(UserError, match=f"empty: {message}"):
        pictures_in(tmp_path / "empty")


def test_a_folder_gives_the_embeddings_of_its_pictures(model, folder):
    found = embed_folder(model, folder)
    assert found.names == pictures_in(folder)[0]
    assert np.array_equal(found.values, model.embed([folder / name for name in found.names]))


def test_unreadable_pictures_fail_with_all_their_names_after_the_others(model, folder, caplog):
    spoil(folder, "class_0/2.png", "class_1/5.png")
    with pytest.raises(
        UnreadablePictures, match=r"2 of 7 pictures cannot be read \(class_0/2\.png, class_1/5\.png\)"
    ) as e:
        embed_folder(model, folder, batch_size=3)
    assert e.value.reasons.keys() == {"class_0/2.png", "class_1/5.png"}
    for name in e.value.reasons:
        assert f"{folder / name}: not an image in a known format" in caplog.text


def test_unreadable_pictures_are_named_and_skipped_if_asked_for(model, folder, caplog):
    spoil(folder, "class_0/2.png")
    found = embed_folder(model, folder, skip_unreadable=True)
    kept = [name for name in pictures_in(folder)[0] if name != "class_0/2.png"]
    assert found.names == kept
    assert np.array_equal(found.values, model.embed([folder / name for name in kept]))
    assert f"skipped: {folder / 'class_0/2.png'}: " in caplog.text


def test_nothing_but_unreadable_pictures_fail_even_if_skipped(model, folder):
    spoil(folder, *pictures_in(folder)[0])
    with pytest.raises(UnreadablePictures, match=r"7 of 7 pictures cannot be read \(.*, \.\.\.\)"):
        embed_folder(model, folder, skip_unreadable=True)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded from now on."""
    names = []
    original = decode.read_file
    monkeypatch.setattr(decode, "read_file", lambda path: names.append(path.name) or original(path))
    return names


def test_an_interrupted_folder_goes_on_to_the_same_bytes(model, folder, tmp_path, monkeypatch, decoded):
    whole = embed_folder(model, folder, batch_size=2)
    original, calls = model._stack, iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(model, "_stack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed_folder(model, folder, batch_size=2, part=part)
    with part.open("ab") as file:
        file.write(b"torn")  # a row that was being written when the power went
    decoded.clear()
    continued = embed_folder(model, folder, batch_size=2, part=part)
    assert len(decoded) == 3 and continued.names == whole.names
    assert np.array_equal(continued.values, whole.values)


@pytest.mark.parametrize("size", [0, 20, 32, 36, 100])
def test_a_part_that_holds_no_batch_is_begun_again(model, folder, tmp_path, size):
    part = tmp_path / "part"
    whole = embed_folder(model, folder, part=part)
    os.truncate(part, size)
    assert np.array_equal(embed_folder(model, folder, part=part).values, whole.values)


def test_a_wrong_device_leaves_no_part(model, folder, tmp_path):
    with pytest.raises(UserError, match="device: 'gpu' is none that torch knows"):
        embed_folder(model, folder, device="gpu", part=tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_what_is_embedded_stays_when_pictures_are_unreadable(model, folder, tmp_path, decoded):
    part = tmp_path / "part"
    spoil(folder, "class_0/2.png")
    with pytest.raises(UnreadablePictures):
        embed_folder(model, folder, part=part)
    decoded.clear()
    found = embed_folder(model, folder, skip_unreadable=True, part=part)
    assert decoded == ["2.png"] and len(found.names) == 6 and not np.isnan(found.values).any()


@pytest.mark.parametrize("change", ["picture", "names", "batches", "model"])
def test_a_part_of_something_else_is_not_continued(model, folder, tmp_path, decoded, change):
    part, options = tmp_path / "part", {"batch_size": 2}
    embed_folder(model, folder, part=part, **options)
    if change == "picture":
        os.utime(folder / "class_0" / "0.png", (1, 1))
    elif change == "names":
        (folder / "class_0" / "0.png").rename(folder / "class_0" / "00.png")
    elif change == "batches":
        options["batch_size"] = 3
    else:
        model = load_model(make_model(tmp_path / "other.safetensors", embedding_dim=4))
    decoded.clear()
    assert np.array_equal(
        embed_folder(model, folder, part=part, **options).values, embed_folder(model, folder, **options).values
    )
    assert len(decoded) == 2 * 7


# --- files of embeddings ---


def test_embeddings_come_back_from_their_file_with_names_in_any_script(model, tmp_path):
    names = ["ä/字.png", os.fsdecode(b"\xff.png")]
    values = np.eye(2, 8, dtype=np.float32)
    for path in (tmp_path / "a.npz", tmp_path / "b.npz"):
        write_embeddings(path, Embeddings(names, values), model)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    found = read_embeddings(tmp_path / "a.npz", model)
    assert found.names == names and np.array_equal(found.values, values)
    with np.load(tmp_path / "a.npz") as arrays:  # as a person reads it
        assert arrays["embeddings"].shape == (2, 8) and arrays["names"][0] == names[0]


def test_another_files_embeddings_are_told_from_this_models(model, tmp_path):
    path = tmp_path / "e.npz"
    write_embeddings(path, Embeddings(["a"], np.ones((1, 8), np.float32)), model)
    other = load_model(make_model(tmp_path / "other.safetensors", widths=[4, 9]))
    with pytest.raises(UserError, match=r"e\.npz: another model made these embeddings"):
        read_embeddings(path, other)
    smaller = load_model(make_model(tmp_path / "smaller.safetensors", embedding_dim=4))
    with pytest.raises(UserError, match=r"e\.npz: embeddings of 8 dimensions, but those of .* have 4"):
        read_embeddings(path, smaller)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:40], b"", b"notes"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"e\.npz: not a whole \.npz of embeddings"):
            read_embeddings(path, model)
    with pytest.raises(UserError, match=r"none\.npz: not found; `memvir embed"):
        read_embeddings(tmp_path / "none.npz", model)
    np.savez(path, embeddings=np.ones((1, 8), np.float32))
    with pytest.raises(UserError, match=r"e\.npz: has no 'names'"):
        read_embeddings(path, model)
    np.savez(path, names=np.array(["a", "b"]), embeddings=np.ones((1, 8), np.float32), model=np.array("x"))
    with pytest.raises(UserError, match=r"e\.npz: its names and embeddings do not fit"):
        read_embeddings(path, model)
