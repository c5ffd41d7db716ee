"""Batches are a function of seed, epoch and image alone."""

import errno
import multiprocessing
import os
import pickle
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memvir.errors import UserError
from memvir.images.batches import (
    AUGMENTATION,
    CroppedImages,
    LoadedImages,
    ResidentImages,
    affine_grid,
    affine_maps,
    epoch_batches,
    random_box,
    random_stream,
)
from memvir.images.decode import decode
from memvir.images.pixels import Crop, DecodedImages, PixelStore, _centre, _in_threads, open_images, resize_and_crop
from memvir.images.settings import Affine, Images, RandomResizedCrop
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
    from memvir.images.index import read_index
    from memvir.images.sources.folder import OwnFolder

    tiny.write_images(tmp_path / "source", classes=3, per_class=5)
    folder, index = tmp_path / "images", tmp_path / "index.csv"
    data = OwnFolder(source="folder")
    data.download(tmp_path / "source", tmp_path / "download")
    data.prepare(tmp_path / "source", tmp_path / "download", folder, index)
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


@pytest.mark.parametrize("axis", [0, 1])
def test_of_a_very_long_image_only_the_part_that_the_crop_shows_is_enlarged(tmp_path, axis):
    from PIL import Image

    line = (np.arange(65_000) * 37 % 256).astype(np.uint8)
    Image.fromarray(np.expand_dims(line, 1 - axis)).save(tmp_path / "a.png")
    crop = DecodedImages([tmp_path / "a.png"], "grey", Crop(256, 224))[0]
    left = (256 * len(line) - 224) // 2
    along = np.interp((left + np.arange(224) + 0.5) / 256 - 0.5, np.arange(len(line)), line)
    assert crop.shape == (224, 224)
    np.testing.assert_allclose(np.moveaxis(crop, axis, 1), np.tile(along, (224, 1)), atol=1)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(short=st.integers(1, 30), longer=st.integers(1, 40), wide=st.booleans(), resize=st.integers(31, 48))
def test_cut_before_or_after_enlarging_a_long_image_gives_the_same_crop(short, longer, wide, resize):
    long = short * longer
    ramp = np.linspace(0, 255, long).round().astype(np.uint8)
    pixels = np.tile(ramp, (short, 1)) if wide else np.tile(ramp[:, None], (1, short))
    whole = resize_and_crop(pixels, Crop(resize, 24))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memvir.images.pixels.MAX_RESIZED", 0)
        cut = resize_and_crop(pixels, Crop(resize, 24))
    step = 255 / max(long - 1, 1) * short / resize  # from one pixel of the enlarged image to the next
    np.testing.assert_allclose(cut.astype(int), whole.astype(int), atol=step + 1)


@pytest.mark.parametrize("shape", [(3000, 4000), (4000, 3000, 3), (8192, 8192), (200, 30_000), (4, 500)])
def test_ordinary_images_are_resized_whole_as_ever(shape):
    pixels = np.broadcast_to(np.uint8(0), shape)
    assert _centre(pixels, Crop(256, 224)) is pixels


def test_decoded_images_that_wait_are_bounded_by_their_bytes(monkeypatch):
    started = []
    monkeypatch.setattr("memvir.images.pixels.MAX_WAITING", 10)
    results = _in_threads(lambda i: started.append(i) or i, np.array([4, 4, 4, 4, 20, 1, 1, 1]), "testing")
    ahead = [len(started) - 1 - i for i in results]
    assert sorted(started) == list(range(8)) and max(ahead[:4]) <= 2 and max(ahead) <= 3


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


def test_the_grid_of_affine_maps_is_torchs():
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 2, 3)))
    for height, width in ((1, 1), (24, 24), (7, 32)):
        expected = torch.nn.functional.affine_grid(maps, [5, 1, height, width], align_corners=False)
        torch.testing.assert_close(affine_grid(maps, height, width), expected, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- loader processes


def loading(images, workers):
    return LoadedImages(images, np.arange(len(images)), cropping(), 7, CPU, workers, channels_last=False)


def error_of(batches):
    """The text of the error that an epoch ends in; kept itself, it would keep the loader processes."""
    try:
        for _ in batches:
            pass
    except UserError as error:
        return str(error)
    return pytest.fail("no error")


def test_a_store_is_sent_to_another_process_as_its_path(indexed, tmp_path, monkeypatch):
    rows, folder = indexed
    monkeypatch.chdir(tmp_path)
    store = open_images(rows, folder, "rgb", None, "tiny", Path("scratch"))
    sent = pickle.dumps(store)
    assert len(sent) < 300 + len(str(tmp_path)) < store.pixels.nbytes
    monkeypatch.chdir(folder)
    again = pickle.loads(sent)
    assert all(np.array_equal(again[i], store[i]) for i in range(len(store)))


def test_spawned_loader_processes_give_the_same_batches(indexed, tmp_path):
    rows, folder = indexed
    store = open_images(rows, folder, "rgb", None, "tiny", tmp_path / "scratch")
    batches = epoch_batches(np.arange(len(store)), 4, 1, seed=0, epoch=2)
    spawning = loading(store, workers=1)
    spawning.loader.multiprocessing_context = "spawn"
    for (a, a_labels), (b, b_labels) in zip(
        loading(store, workers=0).batches(batches, 2), spawning.batches(batches, 2), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(a_labels, b_labels)


def test_a_store_needs_no_call_that_only_linux_has(indexed, tmp_path, monkeypatch):
    for name in ("posix_fallocate", "sched_getaffinity", "posix_fadvise", "sendfile"):
        monkeypatch.delattr(os, name, raising=False)
    rows, folder = indexed
    assert len(open_images(rows, folder, "grey", None, "tiny", tmp_path)) == len(rows)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EINVAL, errno.EFBIG])
def test_freeing_space_is_advised_where_space_is_what_lacks(indexed, tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    rows, folder = indexed
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        open_images(rows, folder, "grey", None, "tiny", tmp_path)
    assert ("free some space" in str(caught.value)) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert "runtime.pixel_store to false" in str(caught.value)
    assert not list(tmp_path.glob("pixels/.building-*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_that_begins_with_its_name(indexed, workers):
    rows, folder = indexed
    damaged = folder / rows["file"].iloc[6]
    damaged.unlink()  # a hard link
    damaged.write_bytes(b"not an image")
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    message = error_of(loading(images, workers).batches([np.arange(4), np.arange(4, 8)], 1))
    assert message.startswith(f"{damaged}: not an image in a known format (JPEG, ") and "\n" not in message


def test_a_killed_loader_process_is_one_line_that_suggests_workers_0(indexed, monkeypatch):
    rows, folder = indexed
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    loaded = loading(open_images(rows, folder, "rgb", None, "tiny", None), workers=1)
    handler = signal.getsignal(signal.SIGCHLD)

    def killing():
        for batch in loaded.batches([np.arange(4)] * 20, 1):
            for process in multiprocessing.active_children():
                process.kill()
            yield batch

    message = error_of(killing())
    assert re.match(r"runtime\.workers: loader processes failed .*`workers: 0`", message) and "\n" not in message
    assert signal.getsignal(signal.SIGCHLD) == handler


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
        "RuntimeError: unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)\n",
        "unable to open shared memory object </torch_7_1_0> in read-write mode: Too many open files (24)",
        "received 0 items of ancdata",
    ],
)
def test_failures_of_loader_processes_are_one_line_and_others_stay_what_they_are(indexed, monkeypatch, text):
    def failing(error):
        loaded = loading(images, workers=1)
        monkeypatch.setattr(type(loaded.loader), "__iter__", lambda _: (_ for _ in ()).throw(error))
        return loaded.batches([np.arange(4)], 1)

    rows, folder = indexed
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    with pytest.raises(UserError, match=r"^runtime\.workers: loader processes failed \(.*`workers: 0`") as caught:
        next(failing(RuntimeError(text)))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    with pytest.raises(UserError, match=r"^runtime\.workers: loader processes failed \(one ended\)"):
        next(failing(EOFError()))  # it ended while it was asked for a batch that it had announced
    bug = RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{text}\nRuntimeError: a bug")
    with pytest.raises(RuntimeError) as caught:
        next(failing(bug))
    assert caught.value is bug


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_does_not_take_the_loader_processes_from_the_run(indexed, number):
    rows, folder = indexed
    images = open_images(rows, folder, "rgb", None, "tiny", None)
    batches = [np.arange(4)] * 20
    expected = list(loading(images, workers=0).batches(batches, 1))
    seen = []
    for batch in loading(images, workers=1).batches(batches, 1):
        if not seen:
            for process in multiprocessing.active_children():
                os.kill(process.pid, number)
        seen.append(batch)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(seen, expected, strict=True))


def test_where_no_process_can_be_started_the_error_suggests_workers_0(indexed, monkeypatch):
    def fail():
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    rows, folder = indexed
    loaded = loading(open_images(rows, folder, "rgb", None, "tiny", None), workers=1)
    monkeypatch.setattr(multiprocessing, "Lock", fail)
    with pytest.raises(UserError, match=r"^runtime\.workers: .*Function not implemented.*`workers: 0`"):
        list(loaded.batches([np.arange(4)], 1))
