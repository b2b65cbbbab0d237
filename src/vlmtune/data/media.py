"""The one place where an image is opened.

Everything that looks at a picture (prepare, training, evaluation, server, UI) calls
``read_header`` or ``open_image`` with the same policy, so that all see the same pixels. In words:

- The picture is upright: EXIF (or XMP) orientation is applied; unreadable EXIF counts as upright.
- Transparency is composed on ``background``: black ink on transparency comes out as black on white.
- 1-bit and palette pictures become RGB before anything can resize them.
- Deep pictures are scaled to 8 bits, never clipped; see ``_scaled_to_8_bits``.
- CMYK, YCbCr and HSV are converted by Pillow's formulas, LAB through littleCMS; embedded colour
  profiles are not applied, as no processor of the models we know applies them.
- Of an animation or a multi-page file the first frame counts; ``Header.frames`` tells of more.
- A damaged picture is an ``ImageError``, never a guess: no ``LOAD_TRUNCATED_IMAGES``.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.TiffImagePlugin import TiffImageFile
from pydantic import Field, field_validator, model_validator

from vlmtune.config import Config
from vlmtune.data.quiet import quiet
from vlmtune.errors import ImageError

# Formats with a real signature and a decoder inside this process. EPS would start Ghostscript, and
# formats without a signature (TGA, PCX) recognise random bytes as pictures.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "PSD")

SIGNATURES = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}

# All that Pillow was seen to raise on damaged files (its fuzzers' corpora, 6,047 mutated pictures).
PILLOW_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
    MemoryError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RuntimeError,
    SystemError,
)

SIDEWAYS = (5, 6, 7, 8)
UPRIGHTED_BY = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow itself refuses anything above twice its MAX_IMAGE_PIXELS, whatever we allow.
PILLOW_CAP = 178_956_970


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class ImagePolicy(Config):
    """What happens to every image; the recipe's ``image`` section and part of the contract.

    Attributes:
        max_pixels: Upper bound of width x height after the family's resize; None: the model's own.
        min_pixels: Lower bound of the same.
        size: Fixed (height, width) instead of bounds.
        longest_edge: Longer side in pixels, for families that resize by it.
        split: Whether an image is also shown in tiles, for families that can; None: as the model is
            configured.
        max_tiles: Most tiles of an image, for families that cut by their number.
        background: What transparency is composed on, ``#rrggbb``.
        max_source_pixels: Larger source images are refused from their header, before decoding.
        max_aspect_ratio: Longer side / shorter side of the source may not exceed this.
    """

    max_pixels: int | None = Field(default=None, gt=0)
    min_pixels: int | None = Field(default=None, gt=0)
    size: tuple[int, int] | None = None
    longest_edge: int | None = Field(default=None, gt=0)
    split: bool | None = None
    max_tiles: int | None = Field(default=None, gt=0)
    background: str = "#ffffff"
    max_source_pixels: int = Field(default=100_000_000, gt=0, le=PILLOW_CAP)
    max_aspect_ratio: float = Field(default=200.0, ge=1.0)

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", value):
            raise ValueError(f"{value!r} is no colour; expected #rrggbb, e.g. #ffffff for white")
        return value.lower()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.size is not None:
            if min(self.size) < 1:
                raise ValueError(f"size {self.size} must be (height, width), both at least 1")
            if self.max_pixels is not None or self.min_pixels is not None:
                raise ValueError(
                    "size fixes height and width, max_pixels and min_pixels keep the aspect: "
                    "give one or the other"
                )
        if self.max_pixels and self.min_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels {self.min_pixels} is larger than max_pixels {self.max_pixels}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Header:
    """What an image's header says, without decoding it.

    Attributes:
        size: Upright, i.e. after ``orientation`` is applied.
        format: Pillow's name of the file format.
        mode: Pillow's mode as stored.
        frames: More than 1 for an animation or a multi-page file.
        orientation: EXIF orientation, 1 (upright) to 8.
        transparent: Whether the background will be used (the alpha may still be opaque everywhere).
    """

    size: Size
    format: str
    mode: str
    frames: int
    orientation: int
    transparent: bool


def read_header(data: bytes, policy: ImagePolicy) -> Header:
    """Read an encoded image's header. Decodes nothing (but a PNG whose EXIF follows its pixels).

    Raises:
        ImageError: With one of the ``image_*`` codes.
    """
    with _faults_of_pillow(data):
        image = _open(data, policy)
        mode, transparent = image.mode, image.has_transparency_data
        width, height = image.size
        orientation = _orientation(image, data)
        # Pillow swaps a TIFF's size itself where the TIFF's own tag says so.
        swapped = (
            isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTag.Orientation) in SIDEWAYS
        )
        if orientation in SIDEWAYS and not swapped:
            width, height = height, width
        return Header(
            size=Size(width, height),
            format=image.format or "",
            mode=mode,
            frames=_frames(image),
            orientation=orientation,
            transparent=transparent,
        )


def open_image(data: bytes, policy: ImagePolicy) -> Image.Image:
    """Decode an encoded image fully: upright, RGB, 8 bits.

    Raises:
        ImageError: With one of the ``image_*`` codes.
    """
    with _faults_of_pillow(data):
        image = _open(data, policy)
        image.load()
        # Pillow turns a TIFF while loading it.
        orientation = 1 if image.format == "TIFF" else _orientation(image, data)
        rgb = _to_rgb(image, data, policy.background)
        turn = UPRIGHTED_BY.get(orientation)
        return rgb if turn is None else rgb.transpose(turn)


def _open(data: bytes, policy: ImagePolicy) -> ImageFile.ImageFile:
    """The image, undecoded, after the checks that its size alone allows."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > policy.max_source_pixels:
        raise ImageError(
            "image_too_large",
            f"the image has {width} x {height} = {width * height:,} pixels, more than "
            f"image.max_source_pixels = {policy.max_source_pixels:,}; make it smaller or raise the "
            f"limit (at most {PILLOW_CAP:,})",
        )
    if max(width, height) > policy.max_aspect_ratio * min(width, height):
        raise ImageError(
            "image_too_stretched",
            f"the image is {width} x {height} pixels: one side is more than "
            f"{policy.max_aspect_ratio:g} times the other (image.max_aspect_ratio); crop it",
        )
    return image


def _frames(image: ImageFile.ImageFile) -> int:
    try:
        return int(image.n_frames)  # type: ignore[attr-defined]
    except AttributeError:  # plugins of formats with one picture have no such attribute
        return 1


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """EXIF orientation 1 to 8; whatever is unreadable or undefined counts as upright."""
    try:
        if image.format == "PNG" and not _metadata_follows_pixels(data):
            # PngImageFile.getexif would decode the picture to look for EXIF behind it.
            exif = Image.Image.getexif(image)
        else:
            exif = image.getexif()
        orientation = exif.get(ExifTag.Orientation, 1)
    except PILLOW_FAULTS:
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _metadata_follows_pixels(png: bytes) -> bool:
    """Whether a PNG has EXIF or XMP behind its pixels, where Pillow sees it only once decoded."""
    position, seen_pixels = 8, False
    while position + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        if kind == b"IDAT":
            seen_pixels = True
        elif seen_pixels and kind == b"eXIf":
            return True
        elif seen_pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = png[position + 8 : position + 8 + min(length, 80)]
            if keyword.startswith((b"Raw profile type", b"XML:com.adobe.xmp")):
                return True
        position += length + 12
    return False


def _to_rgb(image: Image.Image, data: bytes, background: str) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return _scaled_to_8_bits(image, background)
    if image.has_transparency_data:
        if image.format == "PNG" and image.mode in ("L", "RGB") and len(data) > 24:
            _scale_transparent_colour(image, bits=data[24])
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, background)
        canvas.alpha_composite(rgba)
        return canvas.convert("RGB")
    if image.mode == "LAB":
        return _from_lab(image)
    return image.convert("RGB")


def _scale_transparent_colour(image: Image.Image, bits: int) -> None:
    """Bring a PNG's transparent colour to 8 bits; Pillow does so with the pixels only."""
    colour = image.info.get("transparency")
    if bits == 16 and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif bits in (2, 4) and isinstance(colour, int):
        image.info["transparency"] = colour * 255 // (2**bits - 1)


def _scaled_to_8_bits(image: Image.Image, background: str) -> Image.Image:
    """Scale a grey picture of 16 or 32 bits, or of floats, to 8 bits without clipping it.

    The range is the type's, not the picture's, so that a dark picture stays dark: 16 bits divide by
    257; a TIFF that declares fewer bits (12-bit scans) divides by those; 32-bit integers count as
    16 bits while all values fit, and as 32 bits otherwise; with negative values the signed range is
    meant. Floats count as 0 to 1 where they fit, else as 0 to 255, else as 16 bits; what is below 0
    or not a number is black.
    """
    import numpy as np

    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
        highest = values.max()
        low, high = 0.0, 1.0 if highest <= 1 else 255.0 if highest <= 255 else 65535.0
    else:
        values = np.asarray(image.convert("I"), dtype=np.float64)
        low, high = _integer_range(image, values.min(), values.max())
    scaled = np.clip((values - low) * (255.0 / (high - low)), 0, 255)
    grey = np.rint(scaled).astype(np.uint8)
    rgb = Image.fromarray(grey).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        rgb.paste(background, mask=Image.fromarray(values == transparent))
    return rgb


def _integer_range(image: Image.Image, lowest: float, highest: float) -> tuple[float, float]:
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(258, (16,))[0]  # BitsPerSample
        if 8 < bits < 16 and lowest >= 0 and highest < 2**bits:
            return 0.0, 2.0**bits - 1
    if lowest >= 0:
        return 0.0, 65535.0 if highest <= 65535 else 2.0**31 - 1
    if lowest >= -32768 and highest <= 32767:
        return -32768.0, 32767.0
    return -(2.0**31), 2.0**31 - 1


def _from_lab(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only comes back from an in-place transform
    return converted


@contextlib.contextmanager
def _faults_of_pillow(data: bytes) -> Iterator[None]:
    """Turn everything Pillow raises into an ``ImageError`` with a stable code."""
    if not data:
        raise ImageError("image_empty", "the image has 0 bytes; copy or download it again")
    try:
        with quiet:
            yield
    except ImageError:
        raise
    except Image.DecompressionBombError as fault:
        raise ImageError("image_too_large", f"{fault}; make the image smaller") from None
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except PILLOW_FAULTS as fault:
        if _is_cut(data, fault):
            code, message = "image_truncated", "the image's data ends too early"
        else:
            code, message = "image_broken", "the image's data is damaged"
        reason = str(fault) or type(fault).__name__
        raise ImageError(
            code, f"{message} ({reason}, {len(data):,} bytes); copy or download it again"
        ) from None


def _unidentified(data: bytes) -> ImageError:
    if _ends_early(data):
        return ImageError(
            "image_truncated",
            f"the image's data ends too early ({len(data):,} bytes); copy or download it again",
        )
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            return ImageError(
                "image_broken",
                f"the file ({len(data):,} bytes) starts like a {name} image but its header is "
                "damaged; copy or download it again",
            )
    return ImageError(
        "image_not_an_image",
        f"the file ({len(data):,} bytes, starting with {data[:12]!r}) is no image of a known "
        f"format ({', '.join(FORMATS)})",
    )


def _is_cut(data: bytes, fault: BaseException) -> bool:
    """Whether a fault means that the file ends too early, as far as can be told."""
    if isinstance(fault, (EOFError, struct.error)) or _ends_early(data):
        return True
    return any(sign in str(fault).lower() for sign in ("truncated", "unexpected end", "not enough"))


def _ends_early(data: bytes) -> bool:
    """Whether a file of a format that marks its end, or tells its length, lacks it."""
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data
    if data.startswith(b"\xff\xd8\xff"):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return False
