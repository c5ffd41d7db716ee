"""Batches are a function of seed, epoch and image alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memvir.config import Affine, Images, RandomResizedCrop
from memvir.data import (
    AUGMENTATION,
    CroppedImages,
    LoadedImages,
    ResidentImages,
    affine_maps,
    epoch_batches,
    random_box,
    random_stream,
)
from memvir.datasets.images import decode
from memvir.pixels import Crop, DecodedImages, PixelStore, open_images, resize_and_crop
from tests import tiny

CPU = torch.device("cpu")


def image_settings(**changes):
    return Images.model_validate({**tiny.recipe()["images"], **changes})


def cropping(size=8):
    train = {"kind": "random_resized_crop", "scale": [0.3, 1.0], "ratio": [0.75, 1.3333], "flip": 0.5}
    return image_settings(size=size, train=train, channels="rgb", mean=[0.1, 0.2, 0.3], std=[1, 2, 3])


@pytest.fixture
def indexed(tmp_path):
    """A folder of images and the index of its training half."""
    from memvir.config import FolderData
    from memvir.datasets import SOURCES, read_index

    tiny.write_images(tmp_path / "source", classes=3, per_class=5)
    folder, index = tmp_path / "images", tmp_path / "index.csv"
    SOURCES["folder"].download(FolderData(source="folder"), tmp_path / "source", tmp_path / "download")
    SOURCES["folder"].prepare(FolderData(source="folder"), tmp_path / "source", tmp_path / "download", folder, index)
    rows = read_index(index)
    return rows[rows["split"] == "train"], folder


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), batch=st.integers(1, 20), epoch=st.integers(1, 10**6)
)
def test_plain_shuffling_visits_every_image_once_and_drops_nothing(counts, batch, epoch):
    labels = np.repeat(np.arange(len(counts)), counts)
    batches = epoch_batches(labels, batch, 1, seed=3, epoch=epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(labels)))
    assert all(len(b) == batch for b in batches[:-1]) and 0 < len(batches[-1]) <= batch


@settings(max_examples=60, derandomize=True, deadline=None)
@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=12), each=st.integers(2, 4), classes=st.integers(1, 5))
def test_balanced_batches_hold_so_many_images_of_each_class_and_every_image(counts, each, classes):
    labels = np.repeat(np.arange(len(counts)), counts)
    batches = epoch_batches(labels, each * classes, each, seed=0, epoch=1)
    assert set(np.concatenate(batches)) == set(range(len(labels)))
    for batch in batches:
        present, sizes = np.unique(labels[batch], return_counts=True)
        assert len(present) <= classes and (sizes == each).all()


def test_epochs_and_seeds_have_orders_of_their_own():
    labels = np.zeros(50, int)
    orders = {tuple(np.concatenate(epoch_batches(labels, 8, 1, s, e))) for s in (1, 2) for e in (1, 2, 3)}
    assert len(orders) == 6


def test_affine_maps_without_strength_are_the_identity():
    still = Affine(kind="affine", rotate=0, scale=(1, 1), shear=0, shift=0)
    maps = affine_maps(still, random_stream(0), 4)
    assert torch.equal(maps, torch.eye(2, 3).expand(4, 2, 3))


def test_affine_maps_stay_within_their_ranges():
    settings = Affine(kind="affine", rotate=20, scale=(0.8, 1.25), shear=10, shift=0.1)
    maps = affine_maps(settings, random_stream(1), 2000).double()
    area = torch.linalg.det(maps[:, :, :2])  # one over the zoom, squared
    assert area.min() >= 1.25**-2 - 1e-6 and area.max() <= 0.8**-2 + 1e-6
    assert maps[:, :, 2].abs().max() <= 0.2
    angle = torch.rad2deg(torch.atan2(maps[:, 1, 0], maps[:, 0, 0]))
    assert 19 < angle.abs().max() <= 20 + 1e-4


def test_a_stored_image_is_the_decoded_one(indexed, tmp_path):
    rows, folder = indexed
    for crop in (None, Crop(12, 8)):
        stored = open_images(rows, folder, "rgb", crop, "tiny", tmp_path / "scratch")
        decoded = open_images(rows, folder, "rgb", crop, "tiny", None)
        assert isinstance(stored, PixelStore) and isinstance(decoded, DecodedImages)
        assert len(stored) == len(rows) == 15
        for i in range(len(rows)):
            assert np.array_equal(stored[i], decoded[i])


def test_a_store_is_reused_and_rebuilt_when_an_image_changes(indexed, tmp_path):
    rows, folder = indexed
    scratch = tmp_path / "scratch"

    def stores():
        return {path.name: path.stat().st_ino for path in (scratch / "pixels").iterdir()}

    open_images(rows, folder, "grey", None, "tiny", scratch)
    first = stores()
    open_images(rows, folder, "grey", None, "tiny", scratch)
    assert stores() == first
    open_images(rows.assign(md5="0" * 32), folder, "grey", None, "tiny", scratch)
    assert len(stores()) == 1 and stores() != first


def test_a_truncated_store_is_built_again(indexed, tmp_path):
    rows, folder = indexed
    before = open_images(rows, folder, "grey", None, "tiny", tmp_path)
    pixels = next(tmp_path.glob("pixels/*/pixels.bin"))
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:100])
    again = open_images(rows, folder, "grey", None, "tiny", tmp_path)
    assert len(again) == len(before) and next(tmp_path.glob("pixels/*/pixels.bin")).read_bytes() == whole


def test_bgr_is_rgb_the_other_way_round(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 3), (10, 20, 30)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", "bgr")[0, 0].tolist() == [30, 20, 10]
    assert decode(tmp_path / "a.png", "rgb").shape == (3, 4, 3)


def test_the_test_crop_is_torchvisions_on_the_pil_image_to_within_rounding():
    from PIL import Image
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    reference = v2.Compose([v2.Resize(32), v2.CenterCrop(24)])(Image.fromarray(pixels))
    difference = resize_and_crop(pixels, Crop(32, 24)).astype(int) - np.asarray(reference).astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("workers", [1, 2])
def test_cropped_batches_do_not_depend_on_the_number_of_workers(indexed, workers):
    rows, folder = indexed
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    labels = np.arange(len(rows))
    batches = epoch_batches(labels, 4, 1, seed=0, epoch=2)

    def epoch(workers):
        loaded = LoadedImages(images, labels, cropping(), 7, CPU, workers, channels_last=False)
        return list(loaded.batches(batches, epoch=2))

    for (a, a_labels), (b, b_labels) in zip(epoch(0), epoch(workers), strict=True):
        assert torch.equal(a, b) and torch.equal(a_labels, b_labels)
    assert a.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("kind", ["resident", "loaded"])
def test_an_epoch_continued_in_the_middle_has_the_same_batches(indexed, kind):
    rows, folder = indexed
    labels = np.arange(len(rows))
    if kind == "resident":
        images = open_images(rows, folder, "grey", Crop(16, 16), "tiny", None)
        source = ResidentImages(images, labels, image_settings(), 7, CPU)
    else:
        images = open_images(rows, folder, "rgb", None, "tiny", None)
        source = LoadedImages(images, labels, cropping(), 7, CPU, 0, channels_last=False)
    batches = epoch_batches(labels, 4, 1, seed=0, epoch=5)
    whole, rest = list(source.batches(batches, 5)), list(source.batches(batches[2:], 5))
    for (a, _), (b, _) in zip(whole[2:], rest, strict=True):
        assert torch.equal(a, b)
    other = next(iter(source.batches(batches, 6)))[0]
    assert not torch.equal(whole[0][0], other)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted).map(tuple),
    seed=st.integers(0, 1000),
)
def test_a_random_box_lies_within_the_image(height, width, scale, ratio, seed):
    crop = RandomResizedCrop(kind="random_resized_crop", scale=scale, ratio=ratio, flip=0.5)
    top, left, h, w = random_box(crop, random_stream(seed), height, width)
    assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0


def test_random_boxes_have_torchvisions_distribution():
    from scipy.stats import ks_2samp
    from torchvision.transforms import v2

    crop = RandomResizedCrop(kind="random_resized_crop", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    stream = random_stream(5)
    ours = np.array([random_box(crop, stream, 480, 700) for _ in range(3000)])
    reference = v2.RandomResizedCrop(224)
    torch.manual_seed(0)
    image = torch.empty(3, 480, 700)
    theirs = [reference.make_params([image]) for _ in range(3000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.01


def test_a_crop_is_torchvisions_on_the_same_box_to_within_rounding(indexed):
    from PIL import Image
    from torchvision.transforms import v2

    rows, folder = indexed
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    settings = cropping(size=8)
    cropped = CroppedImages(images, np.arange(len(rows)), settings, 7)
    for index in range(len(rows)):
        image, _ = cropped[3, index]
        stream = random_stream(7, 3, AUGMENTATION, index)
        box = random_box(settings.train, stream, *images[index].shape[:2])
        pixels = Image.open(folder / rows["file"].iloc[index]).convert("RGB")
        reference = v2.functional.resized_crop(pixels, *box, [8, 8])
        if stream.random() < 0.5:
            reference = v2.functional.horizontal_flip(reference)
        difference = image.permute(1, 2, 0).numpy().astype(int) - np.asarray(reference).astype(int)
        assert np.abs(difference).max() <= 1


def test_loading_leaves_the_global_random_state_alone(indexed):
    rows, folder = indexed
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    before = torch.get_rng_state()
    loaded = LoadedImages(images, np.arange(len(rows)), cropping(), 7, CPU, 0, channels_last=False)
    next(iter(loaded.batches([np.arange(4)], 1)))
    assert torch.equal(before, torch.get_rng_state())
