from __future__ import annotations

import io
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vlmtune.data.media import ImagePolicy, Size, open_image, read_header
from vlmtune.errors import ImageError

POLICY = ImagePolicy()
BAD_IMAGES = Path(__file__).parents[3] / "shared" / "data" / "bad_images"


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes, policy: ImagePolicy = POLICY) -> np.ndarray:
    image = open_image(data, policy)
    assert image.mode == "RGB"
    assert read_header(data, policy).size == image.size
    return np.asarray(image)


def code_of(data: bytes, policy: ImagePolicy = POLICY) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(data, policy)
    return caught.value.code


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png_of(width: int, height: int, bits: int, colour: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def ink_on_nothing(mode: str) -> Image.Image:
    """A black dot on a transparent, and otherwise black, ground: what peers train as all black."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 2), (0, 0, 0, 255))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_black_ink_on_transparency_is_black_on_white(mode: str, form: str) -> None:
    data = encode(ink_on_nothing(mode), form, **({"lossless": True} if form == "WEBP" else {}))
    expected = np.full((4, 4, 3), 255)
    expected[2, 1] = 0
    assert (pixels(data) == expected).all()
    assert read_header(data, POLICY).transparent
    # Control: without composition everything would be black.
    assert (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == 0).all()


def test_half_transparent_ink_is_grey_and_the_background_is_the_policys() -> None:
    data = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert (pixels(data) == 127).all()
    red = pixels(encode(ink_on_nothing("RGBA")), ImagePolicy(background="#FF0000"))
    assert red[0, 0].tolist() == [255, 0, 0]


def test_transparent_palette_grey_and_rgb() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0, 9, 9, 9])
    palette.putpixel((1, 1), 1)
    one, many = encode(palette, transparency=0), encode(palette, transparency=b"\x00\xff\x80")
    for data in (one, many, encode(palette, "GIF", transparency=0)):
        seen = pixels(data)
        assert seen[0, 0].tolist() == [255] * 3
        assert seen[1, 1].tolist() == [0] * 3
    assert (pixels(encode(palette)) == 0).all()  # control: the same, opaque
    grey = encode(Image.new("L", (2, 2), 7), transparency=7)
    assert (pixels(grey) == 255).all()
    rgb = encode(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert (pixels(rgb) == 255).all()
    assert (pixels(encode(Image.new("RGB", (2, 2), (1, 2, 3)))) == [1, 2, 3]).all()


def test_transparent_colour_of_other_depths() -> None:
    # 4-bit grey: samples 3 (transparent) and 15.
    grey = png_of(
        2, 1, 4, 0, chunk(b"tRNS", struct.pack(">H", 3)), chunk(b"IDAT", zlib.compress(b"\0\x3f"))
    )
    assert pixels(grey)[0, :, 0].tolist() == [255, 255]
    dark = png_of(
        2, 1, 4, 0, chunk(b"tRNS", struct.pack(">H", 3)), chunk(b"IDAT", zlib.compress(b"\0\x30"))
    )
    assert pixels(dark)[0, :, 0].tolist() == [255, 0]
    # 16-bit RGB, where Pillow keeps the high byte of the pixels.
    line = b"\0" + struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0, 0, 0)
    deep = png_of(
        2,
        1,
        16,
        2,
        chunk(b"tRNS", struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)),
        chunk(b"IDAT", zlib.compress(line)),
    )
    assert pixels(deep)[0].tolist() == [[255] * 3, [0] * 3]
    # 16-bit grey.
    values = np.array([[500, 65535, 0]], dtype=np.uint16)
    data = encode(Image.fromarray(values))
    with_colour = data[:33] + chunk(b"tRNS", struct.pack(">H", 0)) + data[33:]
    assert pixels(with_colour)[0, :, 0].tolist() == [2, 255, 255]
    assert pixels(data)[0, :, 0].tolist() == [2, 255, 0]


def test_16_bits_are_scaled_not_clipped() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for data in (
        encode(Image.fromarray(values)),
        encode(Image.fromarray(values), "TIFF"),
        encode(Image.fromarray(values.astype(np.int32)), "TIFF"),
        encode(Image.fromarray(values.astype(np.int32)), "PPM"),
    ):
        assert (pixels(data)[..., 0] == np.arange(256).reshape(16, 16)).all()
        # Control: Pillow's own conversion saturates.
        assert np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean() > 250
    dark = np.full((2, 2), 2570, dtype=np.uint16)
    assert (pixels(encode(Image.fromarray(dark))) == 10).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 255.0], [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
        ([-5.0, float("nan"), 1.0], [0, 0, 255]),
    ],
)
def test_floats_are_scaled(values: list[float], expected: list[int]) -> None:
    data = encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert pixels(data)[0, :, 0].tolist() == expected


TRUTH = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.swapaxes(np.rot90(a, 2), 0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(form: str, orientation: int) -> None:
    stored = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encode(Image.fromarray(stored), form, exif=exif.tobytes(), **options)
    seen = pixels(data)  # also: the header's size is the upright one
    assert (seen == TRUTH[orientation](stored)).all()
    assert read_header(data, POLICY).orientation == orientation
    if orientation > 1:
        assert seen.shape != stored.shape or (seen != stored).any()


def test_orientation_behind_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (5, 2)))
    late = data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
    assert read_header(late, POLICY).size == Size(2, 5)
    assert pixels(late).shape == (5, 2, 3)


def test_unreadable_exif_counts_as_upright() -> None:
    image = Image.new("RGB", (6, 3))
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = encode(image, "JPEG", exif=exif)
        assert read_header(data, POLICY).size == Size(6, 3)
        assert pixels(data).shape == (3, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 9
    assert read_header(encode(image, "JPEG", exif=exif.tobytes()), POLICY).orientation == 1


def test_other_colour_models() -> None:
    cmyk = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(pixels(cmyk).astype(int) - [255, 0, 0]).max() < 6
    bilevel = Image.new("1", (4, 4), 1)
    bilevel.putpixel((0, 0), 0)
    assert pixels(encode(bilevel))[0, :2, 0].tolist() == [0, 255]
    lab = Image.new("LAB", (2, 2), (255, 128, 128))  # white: a and b are centred on 128
    assert pixels(encode(lab, "TIFF")).min() > 250


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_header(data, POLICY).frames == 3
    assert (pixels(data) == [255, 0, 0]).all()


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = png_of(20_000, 20_000, 8, 2, chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
    started = time.perf_counter()
    assert code_of(bomb) == "image_too_large"
    assert time.perf_counter() - started < 0.5
    small = encode(Image.new("RGB", (100, 100)))
    assert code_of(small, ImagePolicy(max_source_pixels=9_999)) == "image_too_large"
    assert pixels(small, ImagePolicy(max_source_pixels=10_000)).shape == (100, 100, 3)
    with pytest.raises(ImageError) as caught:
        read_header(small, ImagePolicy(max_source_pixels=9_999))
    assert caught.value.code == "image_too_large"


def test_stretched() -> None:
    assert code_of(encode(Image.new("L", (201, 1)))) == "image_too_stretched"
    assert pixels(encode(Image.new("L", (200, 1)))).shape == (1, 200, 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_files_are_errors(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form)
    assert pixels(data).shape == (64, 64, 3)
    code = code_of(data[: len(data) // 2])
    assert code in ("image_truncated", "image_broken")
    if form != "TIFF":
        assert code == "image_truncated"


def test_no_image_at_all() -> None:
    assert code_of(b"") == "image_empty"
    assert code_of(b"<html>not found</html>") == "image_not_an_image"
    assert code_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "image_not_an_image"
    assert code_of(b"\x89PNG\r\n\x1a\n" + b"\0" * 40) in ("image_broken", "image_truncated")


@pytest.mark.skipif(not BAD_IMAGES.is_dir(), reason=f"no damaged images at {BAD_IMAGES}")
def test_every_damaged_image_opens_or_is_an_image_error() -> None:
    opened, refused, codes = [], [], set()
    for path in sorted(BAD_IMAGES.iterdir()):
        data = path.read_bytes()
        started = time.perf_counter()
        try:
            assert pixels(data).ndim == 3
            opened.append(path.name)
        except ImageError as error:
            refused.append(path.name)
            codes.add(error.code)
        assert time.perf_counter() - started < 1, path.name
    assert all(code.startswith("image_") for code in codes)
    assert {"hopper.png", "hopper_bad_exif.jpg", "chi.gif"} <= set(opened)
    assert {"truncated_image.png", "broken_data_stream.png", "SOURCE.txt"} <= set(refused)


def test_mutations_raise_nothing_but_image_errors() -> None:
    random = np.random.default_rng(1)
    noise = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "PPM", "BMP"):
        whole = np.frombuffer(encode(Image.fromarray(noise), form), dtype=np.uint8)
        for _ in range(60):
            data = whole.copy()
            places = random.integers(0, min(len(data), 300), 4)
            data[places] = random.integers(0, 256, 4)
            for look in (open_image, read_header):
                try:
                    look(data.tobytes(), POLICY)
                except ImageError:
                    continue


def test_warnings_are_silenced_and_filters_restored_across_threads() -> None:
    before = list(warnings.filters)
    data = encode(Image.new("P", (64, 64)), transparency=b"\0\1")
    threads = [
        threading.Thread(target=lambda: [open_image(data, POLICY) for _ in range(30)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    "options",
    [
        {"background": "white"},
        {"max_pixels": 10, "size": (1, 1)},
        {"size": (0, 5)},
        {"min_pixels": 20, "max_pixels": 10},
        {"max_source_pixels": 10**9},
        {"max_pixel": 3},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ImagePolicy(**options)
    assert ImagePolicy(size=(100, 500)).size == (100, 500)
