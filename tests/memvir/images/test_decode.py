"""Every image file is read correctly or refused by name."""

import io
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from memvir.errors import UserError
from memvir.images import decode as decoding
from memvir.images.decode import MAX_PIXELS, decode, load, standard

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


def png(width: int, height: int, depth: int, colour: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG by hand, with bit depths and chunks that Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *((kind.encode(), data) for kind, data in chunks.items())]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


GREYS, COLOURS, PALETTE = 0, 2, 3


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (16, struct.pack(">4H", 0, 1000, 1001, 65535), 1000, [0, 255, 4, 255]),
        (16, struct.pack(">4H", 0, 1000, 1001, 65535), 0, [255, 4, 4, 255]),
        (8, bytes([0, 100, 101, 255]), 100, [0, 255, 101, 255]),
        (4, bytes([0x03, 0x7F]), 7, [0, 51, 255, 255]),
        (4, bytes([0x03, 0x7F]), 3, [0, 255, 119, 255]),
        (2, bytes([0b00011011]), 1, [0, 255, 170, 255]),
        (1, bytes([0b01010000]), 0, [255, 255, 255, 255]),
        (1, bytes([0b01010000]), 1, [0, 255, 0, 255]),
    ],
)
def test_a_transparent_grey_is_white_at_every_depth(
    depth: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    image = load(png(4, 1, depth, GREYS, b"\0" + row, tRNS=struct.pack(">H", transparent)), "a.png")
    np.testing.assert_array_equal(np.asarray(image.convert("L")), [expected])


def test_a_transparent_colour_is_white_or_refused_where_pillow_would_confuse_it_with_others() -> None:
    colour = struct.pack(">3H", 10, 20, 30)
    image = load(png(2, 1, 8, COLOURS, bytes([0, 10, 20, 30, 10, 20, 31]), tRNS=colour), "a.png")
    np.testing.assert_array_equal(np.asarray(image), [[[255, 255, 255], [10, 20, 31]]])
    with pytest.raises(UserError, match=r"a\.png: .*a transparent colour of 16 bits"):
        load(png(1, 1, 16, COLOURS, b"\0" + colour, tRNS=colour), "a.png")
    image = load(png(1, 1, 16, COLOURS, b"\0" + struct.pack(">3H", 257, 514, 65535)), "a.png")
    np.testing.assert_array_equal(np.asarray(image), [[[1, 2, 255]]])


def test_what_is_not_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: not a file"):
        decode(tmp_path / "a.png", "rgb")


def test_an_open_image_stays_as_it_is_and_is_refused_once_it_does_not_tell_what_its_file_did() -> None:
    content = png(2, 1, 4, GREYS, bytes([0, 0x5A]), tRNS=struct.pack(">H", 5))
    image = Image.open(io.BytesIO(content))
    assert np.asarray(standard(image, "it")).tolist() == np.asarray(load(content, "it")).tolist()
    assert image.info["transparency"] == 5
    with pytest.raises(UserError, match=r"it: .*lost once it is loaded; give its file"):
        standard(image.copy(), "it")


@pytest.mark.parametrize("transparent", [0, 7])
def test_a_loaded_image_of_eight_bits_tells_its_transparent_grey(transparent: int) -> None:
    content = png(3, 1, 8, GREYS, bytes([0, 0, 7, 8]), tRNS=struct.pack(">H", transparent))
    expected = [255 if value == transparent else value for value in (0, 7, 8)]
    assert np.asarray(standard(Image.open(io.BytesIO(content)).copy(), "it").convert("L")).tolist() == [expected]


def test_a_palette_of_several_opacities_lies_over_white() -> None:
    colours = [[0, 0, 0], [0, 100, 200], [10, 20, 30]]
    content = png(4, 1, 2, PALETTE, bytes([0, 0b00011010]), PLTE=np.uint8(colours).tobytes(), tRNS=bytes([0, 51]))
    over_white = 255 + (np.array(colours[1]) - 255) * 0.2
    expected = [[[255, 255, 255], over_white, colours[2], colours[2]]]
    np.testing.assert_allclose(np.asarray(load(content, "a.png")), expected, atol=1)


def tiff(pixels: np.ndarray | bytes, *, bits: int, order: str = "<", width: int = 4, **tags: int) -> bytes:
    """A TIFF of one row by hand: `bits` a sample, and what `tags` say."""
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    samples = tags.get("samples", 1)
    entries = [(256, [width]), (257, [1]), (258, [bits] * samples), (259, [1]), (262, [tags.get("photometric", 1)])]
    entries += [(273, [0]), (277, [samples]), (278, [1]), (279, [len(data)])]
    entries += [(338, [tags["extra"]])] if "extra" in tags else []
    entries += [(339, [tags.get("format", 1)] * samples)]
    place = 8 + 2 + 12 * len(entries) + 4
    head = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    for tag, values in entries:
        packed = struct.pack(f"{order}{len(values)}H", *([place] if tag == 273 else values))
        assert len(packed) <= 4
        head += struct.pack(order + "HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    return head + bytes(4) + data


WIDE = np.array([0, 1000, 32768, 65535])


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bits_of_either_byte_order_are_scaled(order: str) -> None:
    image = load(tiff(WIDE.astype(order + "u2"), bits=16, order=order), "a.tif")
    np.testing.assert_array_equal(np.asarray(image), [np.rint(WIDE / 257)])


def test_sixteen_bits_with_white_at_zero_are_turned_round() -> None:
    image = load(tiff(WIDE.astype("<u2"), bits=16, photometric=0), "a.tif")
    np.testing.assert_array_equal(np.asarray(image), [255 - np.rint(WIDE / 257)])


def test_twelve_bits_are_scaled_by_their_own_range() -> None:
    content = tiff(bytes([0xFF, 0xF8, 0x00, 0x00, 0x07, 0x00]), bits=12)  # 4095, 2048, 0, 1792
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    for image in (load(content, "a.tif"), standard(loaded, "a.tif")):
        np.testing.assert_array_equal(np.asarray(image), [np.rint(np.array([4095, 2048, 0, 1792]) / 4095 * 255)])


@pytest.mark.parametrize("extra", [1, 2])
def test_grey_with_opacity_lies_over_white_whether_multiplied_or_not(extra: int) -> None:
    grey, alpha = np.array([0, 100, 60, 0]), np.array([51, 255, 204, 0])
    stored = np.rint(grey * alpha / 255) if extra == 1 else grey
    content = tiff(np.stack([stored, alpha], 1).astype(np.uint8), bits=8, samples=2, extra=extra)
    expected = [grey * alpha / 255 + 255 - alpha]
    np.testing.assert_allclose(np.asarray(load(content, "a.tif").convert("L")), expected, atol=1.5)


@pytest.mark.parametrize(("bits", "kind"), [(8, "i1"), (16, "i2"), (32, "u4"), (32, "i4"), (32, "f4")])
@pytest.mark.parametrize("order", "<>")
def test_samples_without_an_agreed_range_are_refused_however_small_their_values(
    bits: int, kind: str, order: str
) -> None:
    content = tiff(np.array([0, 1, 50, 100], order + kind), bits=bits, order=order, format=" uif".index(kind[0]))
    with pytest.raises(UserError, match=r"a\.tif: .*(no agreed range|not an image in a known format)"):
        load(content, "a.tif")


@pytest.mark.parametrize("most", [100, 255, 1023, 65535])
def test_a_pgm_is_scaled_by_its_own_maximum(most: int) -> None:
    values = np.array([0, most // 3, most])
    content = f"P5 3 1 {most}\n".encode() + values.astype(">u2" if most > 255 else "u1").tobytes()
    np.testing.assert_allclose(np.asarray(load(content, "a.pgm")), [values / most * 255], atol=0.51)


def test_threads_decode_no_more_than_so_many_pixels_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_room", decoding._Room(2 * GREY.size))
    busy, most = 0, []
    lock, together = threading.Lock(), threading.Barrier(2)
    original = decoding._eight_bit

    def counting(image: Image.Image, layout: str) -> Image.Image:
        nonlocal busy
        with lock:
            busy += 1
            most.append(busy)
        together.wait(60)  # two are always let in
        with lock:
            busy -= 1
        return original(image, layout)

    monkeypatch.setattr(decoding, "_eight_bit", counting)
    content = encoded(Image.fromarray(GREY), "PNG")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: load(content, "a.png"), range(12)))
    assert max(most) == 2


def test_an_image_that_fails_gives_back_its_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "_room", decoding._Room(GREY.size))
    content = encoded(Image.fromarray(GREY), "PNG")
    for _ in range(3):
        with pytest.raises(UserError, match="not a readable image"):
            load(content[: len(content) // 2], "a.png")
    load(content, "a.png")


def png_bomb(width: int, height: int) -> bytes:
    return png(width, height, 8, GREYS, bytes(10_000))


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
