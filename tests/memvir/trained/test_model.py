"""A trained model in use: the evaluation's embeddings, from whatever holds a picture."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from memvir import load_model, retrieval
from memvir.errors import UserError
from memvir.experiment.training import PRECISIONS, embed
from memvir.images.batches import TestImages
from memvir.images.pixels import Crop, DecodedImages
from tests.models import make_model, settings


@pytest.fixture
def pictures(tmp_path):
    """Colour pictures of several sizes, one of them lying on its side by its EXIF block."""
    random = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate([(40, 60), (33, 20), (16, 16), (70, 35), (24, 24)]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(paths[-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    paths.append(tmp_path / "turned.jpg")
    Image.fromarray(random.integers(0, 256, (30, 50, 3)).astype(np.uint8)).save(paths[-1], exif=exif)
    return paths


@pytest.fixture
def model(tmp_path):
    return load_model(make_model(tmp_path / "model.safetensors", channels="rgb"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": "rgb"},
        {"channels": "rgb", "backbone": "resnet18", "size": 64},
        {"channels": "bgr", "backbone": "bn_inception", "size": 64, "embedding_dim": 32},
        {"channels": "rgb", "backbone": "timm/test_vit", "size": 160, "pooling": "head"},
    ],
    ids=lambda options: f"{options.get('backbone', 'convnet')}-{options.get('channels', 'grey')}",
)
def test_embeddings_are_those_of_the_evaluation_to_the_bit(tmp_path, pictures, options):
    run = settings(**options)
    model = load_model(make_model(tmp_path / "model.safetensors", **options))
    crop = Crop(run.images.test.resize, run.images.size)
    test = TestImages(DecodedImages(pictures, run.images.channels, crop), run.images, torch.device("cpu"))
    evaluated = embed(model.file.build(), test, PRECISIONS[run.training.precision])
    found = model.embed(pictures)
    assert found.dtype == np.float32 and found.shape == (6, run.model.embedding_dim)
    assert np.array_equal(found, retrieval.unit_length(evaluated, "embeddings"))
    assert np.array_equal(found, model.embed([model.transform(picture) for picture in pictures]))


def test_embeddings_have_length_1_whatever_the_batches_are(model, pictures):
    whole = model.embed(pictures)
    np.testing.assert_allclose(np.linalg.norm(whole.astype(np.float64), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(model.embed(pictures, batch_size=4), whole, atol=1e-6)
    assert np.array_equal(model.embed(picture for picture in pictures), whole)


def test_one_picture_is_the_same_by_path_image_array_and_tensor(model, pictures):
    path = pictures[0]
    image = Image.open(path)
    array = np.asarray(image)
    expected = model.embed([path])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [str(path), path, image, array, tensor, model.transform(path)]
    for form in forms:
        assert np.array_equal(model.embed(form), expected), type(form)
    assert np.array_equal(model.embed(array[None]), expected) and np.array_equal(model.embed(tensor[None]), expected)
    np.testing.assert_allclose(model.embed(forms), np.repeat(expected, len(forms), axis=0), atol=1e-6)


def test_an_open_image_is_turned_upright_and_laid_over_white_as_its_file_is(model, pictures, tmp_path):
    transparent = tmp_path / "transparent.png"
    Image.new("RGBA", (20, 20), (200, 30, 30, 100)).save(transparent)
    palette = tmp_path / "palette.gif"
    Image.open(pictures[0]).convert("P").save(palette)
    deep = tmp_path / "deep.png"
    Image.fromarray((np.arange(400).reshape(20, 20) * 160).astype(np.uint16)).save(deep)
    for path in (pictures[-1], transparent, palette, deep):
        assert np.array_equal(model.embed(Image.open(path)), model.embed(path)), path


def test_grey_pictures_serve_a_colour_model_and_colour_ones_a_grey_model(model, tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(model.embed([grey]), model.embed([np.repeat(grey[..., None], 3, axis=2)]))
    grey_model = load_model(make_model(tmp_path / "grey.safetensors"))
    assert np.array_equal(grey_model.embed(torch.from_numpy(grey)[None]), grey_model.embed([grey]))
    for count in (1, 2, 4, 5):
        assert grey_model.embed(np.zeros((count, 16, 16), np.uint8)).shape == (count, 8)


@pytest.mark.parametrize("shape", [(20, 24, 1), (20, 24, 2), (20, 24, 4), (3, 20, 24)])
def test_an_array_that_may_be_one_picture_or_many_is_refused(model, shape):
    with pytest.raises(UserError, match=r"an array of shape \(.*\) may be one picture or many; give one as \(H, W\)"):
        model.embed(np.zeros(shape, np.uint8))


def frames_of_one_file(folder):
    random = np.random.default_rng(0)
    frames = [Image.fromarray(random.integers(0, 256, (16, 16)).astype(np.uint8)) for _ in range(3)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(folder / "a.gif") as image:
        yield from ImageSequence.Iterator(image)


def one_canvas(folder):
    canvas = Image.new("RGB", (16, 16))
    for side in (4, 8, 12):
        canvas.paste((side * 20, 200, 0), (0, 0, side, 8))
        yield canvas


def one_array(folder):
    array = np.zeros((16, 16), np.uint8)
    for row in range(3):
        array[row * 4] = 200
        yield array


@pytest.mark.parametrize("pictures", [frames_of_one_file, one_canvas, one_array])
def test_a_picture_that_its_iterator_changes_is_taken_as_it_was_handed_out(model, tmp_path, pictures):
    expected = model.embed([picture.copy() for picture in pictures(tmp_path)])
    assert len(np.unique(expected, axis=0)) == 3
    assert np.array_equal(model.embed(pictures(tmp_path)), expected)


def test_an_opened_image_may_come_many_times_in_one_call(model, tmp_path):
    Image.effect_noise((1000, 1000), 50).save(tmp_path / "large.png")
    for _ in range(3):
        found = model.embed([Image.open(tmp_path / "large.png")] * 20, batch_size=7)
        np.testing.assert_allclose(found, np.repeat(found[:1], 20, axis=0), atol=1e-6)


@pytest.mark.parametrize("when", ["before loading", "after loading"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_type_of_torch_changes_no_embedding(model, tmp_path, pictures, when, default):
    expected = model.embed(pictures)
    torch.set_default_dtype(default)
    try:
        model = load_model(tmp_path / "model.safetensors") if when == "before loading" else model
        assert np.array_equal(model.embed(pictures), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_transform_is_the_crop_normalised(tmp_path):
    model = load_model(make_model(tmp_path / "model.safetensors"))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    found = model.transform(pixels)
    assert found.shape == (1, 16, 16) and found.dtype == torch.float32
    torch.testing.assert_close(found[0].numpy(), ((pixels / 255 - 0.4) / 0.3).astype(np.float32))


def test_none_are_no_rows(model):
    assert model.embed([]).shape == (0, 8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"pictures\[0\]: an array of float32 and shape \(4, 4, 3\) is no picture"),
        ([np.zeros((4, 4, 4), np.uint8)], r"pictures\[0\]: an array of uint8 and shape \(4, 4, 4\) is no picture"),
        ([np.zeros(4, np.uint8)], r"pictures\[0\]: an array of uint8 and shape \(4,\) is no picture"),
        ([np.zeros((0, 4), np.uint8)], r"pictures\[0\]: .* no image"),
        (torch.zeros(3, 5, 5), r"pictures\[0\]: a float tensor of shape \(3, 5, 5\) .* give \(3, 16, 16\)"),
        ([torch.zeros(5, 4, 4, dtype=torch.uint8)], r"pictures\[0\]: an array of uint8 and shape \(4, 4, 5\)"),
        ([None], r"pictures\[0\]: NoneType is no picture"),
        (7, "int is no picture"),
        ("a\0b.png", "a\0b.png: cannot be read: embedded null byte"),
        ("none.jpg", r"none\.jpg: cannot be read: No such file"),
    ],
)
def test_what_is_no_picture_is_named(model, picture, message):
    with pytest.raises(UserError, match=message):
        model.embed(picture)


def test_a_file_that_is_no_picture_is_named(model, pictures, tmp_path):
    (tmp_path / "notes.jpg").write_text("notes")
    with pytest.raises(UserError, match=r"notes\.jpg: not an image in a known format"):
        model.embed([*pictures, tmp_path / "notes.jpg"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"batch_size": size}, f"batch_size: {size!r} is none") for size in (0, 2.5, "8", None)),
        ({"device": "gpu"}, "device: 'gpu' is none that torch knows"),
        ({"device": "cuda:99"}, "device: cuda:99 asked for, but torch sees"),
        ({"device": []}, r"device: \[\] is none that torch knows"),
    ],
)
def test_an_impossible_option_is_named(model, pictures, options, message):
    with pytest.raises(UserError, match=message):
        model.embed(pictures, **options)


@pytest.mark.parametrize("device", ["meta", "xla"])
def test_a_device_that_nothing_runs_on_leaves_the_model_as_it_was(model, pictures, device):
    expected = model.embed(pictures)
    with pytest.raises(UserError, match=rf"device: nothing can run on {device} \(.*\); use cpu"):
        model.embed(pictures, device=device)
    assert np.array_equal(model.embed(pictures), expected)


def test_a_network_that_someone_put_into_training_mode_embeds_the_same(tmp_path, pictures):
    model = load_model(make_model(tmp_path / "model.safetensors", channels="rgb", backbone="resnet18", size=64))
    expected = model.embed(pictures)
    model.embedder.train()
    assert np.array_equal(model.embed(pictures), expected)


def test_a_search_finds_the_most_similar_first(model, pictures):
    gallery = model.embed(pictures)
    similarities, places = model.search(pictures[:2], pictures, k=3)
    expected = gallery[:2].astype(np.float64) @ gallery.T.astype(np.float64)
    assert places.tolist() == np.argsort(-expected, axis=1)[:, :3].tolist() and places[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(similarities, np.sort(expected, axis=1)[:, ::-1][:, :3], atol=1e-6)
    again = model.search(gallery[:2], torch.from_numpy(gallery), k=3)
    assert np.array_equal(again[1], places)


def test_a_search_names_what_does_not_fit(model, pictures):
    gallery = model.embed(pictures)
    with pytest.raises(UserError, match="k: 7 pictures asked for, and the gallery holds 6"):
        model.search(pictures[0], gallery, k=7)
    for k in ("3", None, 2.5, 0):
        with pytest.raises(UserError, match=f"k: {k!r} is not a number of neighbours"):
            model.search(pictures[0], gallery, k=k)
    with pytest.raises(UserError, match=r"gallery: uint8 of shape \(6, 8\) may be embeddings or a picture"):
        model.search(pictures[0], gallery.astype(np.uint8))
    with pytest.raises(
        UserError, match=r"gallery: embeddings of 7 dimensions, but those of tiny/norm_softmax/1 have 8"
    ):
        model.search(pictures[0], gallery[:, :7])
    with pytest.raises(UserError, match="queries: embeddings of 9 dimensions"):
        model.search(np.ones((1, 9), np.float32), gallery, k=1)
    with pytest.raises(UserError, match="the gallery holds 0"):
        model.search(pictures[0], [], k=1)


# --- where a model comes from ---


@pytest.mark.parametrize("source", [None, 5, b"model.safetensors"])
def test_what_is_no_path_to_a_model_is_named(source):
    with pytest.raises(UserError, match=r"source: .* is no path; give a model file"):
        load_model(source)


def test_a_model_is_loaded_from_an_address_once(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    content = make_model(tmp_path / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    address = server.serve("model.safetensors", content)
    for _ in range(2):
        assert load_model(address, sha256=digest.upper()).name == "tiny/norm_softmax/1"
    assert len(server.requests) == 1


def test_an_address_needs_its_sha256_and_the_right_one(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    address = server.serve("model.safetensors", make_model(tmp_path / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"/model\.safetensors: give its sha256 too"):
        load_model(address)
    with pytest.raises(UserError, match=r"gave a file with sha256 [0-9a-f]+, expected 00000000"):
        load_model(address, sha256="0" * 64)
    assert not list((tmp_path / "torch").rglob("*.safetensors"))


def test_a_file_with_another_sha256_is_refused(tmp_path):
    path = make_model(tmp_path / "model.safetensors")
    assert load_model(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    with pytest.raises(UserError, match=r"model\.safetensors: its sha256 is [0-9a-f]{16}\.\.\., expected 0{16}"):
        load_model(path, sha256="0" * 64)
    for no_digest in ("", "0" * 7, "g" * 64, 5, b"0" * 8):
        with pytest.raises(UserError, match=r"sha256: .* is none; give 8 to 64 hexadecimal digits"):
            load_model(path, sha256=no_digest)
