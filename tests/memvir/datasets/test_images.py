"""Every image file is read correctly or refused by name."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memvir.datasets.images import MAX_PIXELS, decode, load
from memvir.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::RuntimeWarning:PIL")

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def save(path: Path, pixels: np.ndarray | Image.Image, **options: object) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats_give_their_pixels(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", RGB, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(decode(path, "rgb"), RGB)


def test_bgr_is_rgb_the_other_way_round_and_contiguous(tmp_path: Path) -> None:
    pixels = decode(save(tmp_path / "a.png", RGB), "bgr")
    np.testing.assert_array_equal(pixels, RGB[..., ::-1])
    assert pixels.flags.c_contiguous and pixels.dtype == np.uint8


def test_grey_is_the_luma_of_colours_and_grey_images_are_spread_over_three_channels(tmp_path: Path) -> None:
    luma = decode(save(tmp_path / "a.png", RGB), "grey")
    assert luma.shape == (6, 9)
    np.testing.assert_allclose(luma, RGB @ [0.299, 0.587, 0.114], atol=1)
    np.testing.assert_array_equal(decode(save(tmp_path / "g.png", GREY), "rgb"), np.stack([GREY] * 3, -1))


def test_a_wrong_extension_does_not_matter(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RGB)
    np.testing.assert_array_equal(decode(path.rename(tmp_path / "a.jpg"), "rgb"), RGB)


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, suffix: str) -> None:
    wide = np.array([[0, 128, 129, 256], [257, 32768, 65534, 65535]], dtype=np.uint16)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(wide))
    np.testing.assert_array_equal(decode(path, "grey"), np.rint(wide / 257))


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = [0, 51, 255]
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", rgba), "grey"), [[255, 204, 0]])


def test_a_palette_with_a_transparent_colour_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    path = save(tmp_path / "a.png", image, transparency=0)
    np.testing.assert_array_equal(decode(path, "rgb"), [[[255, 255, 255], [200, 100, 50]]])


def test_bilevel_images_are_black_and_white(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(GREY > 100))
    np.testing.assert_array_equal(decode(path, "grey"), (GREY > 100) * np.uint8(255))


def test_cmyk_jpegs_are_converted(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), quality=100)
    np.testing.assert_allclose(decode(path, "rgb"), np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((16, 32), dtype=np.uint8)
    upright[:8, :8] = 255  # top left
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(turned)).convert("RGB")
    pixels = decode(save(tmp_path / f"a.{suffix}", image, exif=exif.tobytes()), "grey")
    assert pixels.shape == (16, 32)
    np.testing.assert_allclose(pixels, upright, atol=60)


def test_a_damaged_exif_block_counts_as_none(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", RGB, exif=b"Exif\0\0" + b"MM\0*\xff\xff\xff\xff" + b"\xee" * 20)
    assert decode(path, "rgb").shape == RGB.shape


@pytest.mark.parametrize("shape", [(1, 1), (3, 20_000), (20_000, 1)])
def test_extreme_shapes_are_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint64).astype(np.uint8).reshape(shape)
    np.testing.assert_array_equal(decode(save(tmp_path / "a.png", pixels), "grey"), pixels)


def test_the_first_frame_of_an_animation_counts(tmp_path: Path) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(tmp_path / "a.gif", "grey"), np.full((4, 4), 10))


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10_000))


@pytest.mark.parametrize("width", [8193, 12_000, 20_000, 10**6])
def test_a_decompression_bomb_is_refused_by_name(tmp_path: Path, width: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(width, max(width, MAX_PIXELS // width + 1)))
    with pytest.raises(UserError, match=r"bomb\.png.*pixels"):
        decode(path, "rgb")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused_by_name(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"^\S*cut\.img: "):
        decode(path, "rgb")


def test_zero_bytes_a_text_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "zeros.jpg").write_bytes(b"\0" * 1000)
    (tmp_path / "notes.jpg").write_text("buy milk")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("empty", "zeros", "notes", "folder", "missing"):
        with pytest.raises(UserError, match=rf"{name}\.jpg: "):
            decode(tmp_path / f"{name}.jpg", "rgb")


def test_a_postscript_file_is_not_handed_to_another_program() -> None:
    with pytest.raises(UserError, match="not an image in a known format"):
        load(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) run\n", "a.jpg")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_an_agreed_range_are_refused(mode: str) -> None:
    content = encoded(Image.new(mode, (3, 3), 10**6), "TIFF")
    with pytest.raises(UserError, match=r"a\.tif: not a readable image: .*no agreed range"):
        load(content, "a.tif")


SAMPLES = [
    encoded(Image.fromarray(RGB), kind, **options)
    for kind, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}),
        ("PPM", {}),
    ]
]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_the_bytes_the_result_is_an_image_or_a_one_line_error_with_the_name(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(content) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "repeat"]))
        if change == "set":
            content[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            content = content[: max(place, 1)]
        else:
            content[place:place] = content[place : place + 40]
    try:
        image = load(bytes(content), "name.jpg")
    except UserError as error:
        assert str(error).startswith("name.jpg: ") and "\n" not in str(error)
    else:
        assert image.mode in ("L", "RGB") and image.width * image.height <= MAX_PIXELS


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes_never_escape_as_another_exception(content: bytes) -> None:
    try:
        load(content, "name.jpg")
    except UserError as error:
        assert str(error).startswith("name.jpg: ")
