"""What a store of pixels will take, known before it is made."""

import numpy as np
import pytest
from PIL import Image

from memvir.images import store_size
from memvir.images.pixels import Crop, DecodedImages
from memvir.images.store_size import estimated_bytes


@pytest.mark.parametrize("channels", ["grey", "rgb"])
@pytest.mark.parametrize("crop", [None, Crop(12, 8)])
def test_of_few_images_the_estimate_is_what_they_take(channels, crop, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, path in enumerate(files):
        Image.fromarray(np.zeros((20 + number, 30), np.uint8)).save(path)
    images = DecodedImages(files, channels, crop)
    assert estimated_bytes(files, channels, crop) == sum(images[number].nbytes for number in range(5))


def test_of_many_images_some_are_measured_and_what_is_no_image_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(store_size, "SAMPLE", 3)
    files = [tmp_path / f"{number}.png" for number in range(9)]
    for path in files[::3]:
        Image.new("L", (10, 10)).save(path)
    assert estimated_bytes(files, "rgb", None) == 9 * 100 * 3
    files[0].write_bytes(b"no image")
    assert estimated_bytes(files, "rgb", None) == 9 * 100 * 3
