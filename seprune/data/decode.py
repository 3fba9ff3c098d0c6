"""One image file -> pixels. PIL only: torchvision.io crashes the interpreter on damaged files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from seprune.data.deep_pixels import (
    DEEP,
    Range,
    deep_values,
    eight_bits,
    extremes_of,
    full_range,
)
from seprune.errors import InputError
from seprune.runtime.reading import open_regular
from seprune.runtime.timeout import at_most

T = TypeVar("T")

DECODE_SECONDS = 30  # of one image; a progressive JPEG may hold thousands of passes
MAX_PIXELS = 89_478_485  # Pillow's own mark for a decompression bomb: 256 MB of RGB
# Pillow only warns at this mark; `read_image` refuses, so the warning would say it twice.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)

_DISGUISES = {
    b"version https://git-lfs": ("a git-LFS pointer", "fetch the real files with: git lfs pull"),
    b"<!doctype html": ("an HTML page", "download the image again"),
    b"<html": ("an HTML page", "download the image again"),
}
_DAMAGED = "restore the file, delete it, or set data.on_bad_image=skip"


_SAMPLED = 256  # deep images that are looked at to find the range of a data set


def read_image(path: Path, mode: str = "RGB", scale: Range | None = None) -> Image.Image:
    """The upright image in `path` as 8-bit `mode` (`RGB` or `L`).

    Args:
        scale: of images with more than 8 bits: the range of their data set, None for the own one.

    Raises:
        InputError: unreadable, no image, damaged, or more than `MAX_PIXELS` pixels; names the path.
    """

    return _decode(path, lambda image: _upright(image, mode, scale))


def read_encoded(
    content: bytes, name: str, mode: str = "RGB", scale: Range | None = None
) -> Image.Image:
    """The same of an image that lies in memory; `name` says where it came from.

    Raises:
        InputError: as of `read_image`; names the image.
    """

    if disguise := _disguise(name, content[:32]):
        raise disguise
    stream = nullcontext(io.BytesIO(content))
    return _opened(name, stream, lambda image: _upright(image, mode, scale))


def read_indices(path: Path) -> np.ndarray[Any, Any]:
    """The numbers (H, W) in a grey or palette image, as they are stored: classes of pixels.

    Raises:
        InputError: as of `read_image`, or an image of colours.
    """

    return _decode(path, lambda image: _numbers(path, image))


def read_encoded_indices(content: bytes, name: str) -> np.ndarray[Any, Any]:
    """The same of an image that lies in memory."""
    if disguise := _disguise(name, content[:32]):
        raise disguise
    stream = nullcontext(io.BytesIO(content))
    return _opened(name, stream, lambda image: _numbers(name, image))


def _numbers(path: Path | str, image: Image.Image) -> np.ndarray[Any, Any]:
    if image.mode not in ("P", "L", "1", "I", "I;16", "I;16B"):
        raise InputError(
            f"{path}: a mask of colours ({image.mode})",
            why="the class of a pixel is its number in a grey or palette image",
            fix="save it as a PNG with one channel of class numbers, or with a palette",
            code="mask",
        )
    return np.array(image).astype(np.int64)


def _decode(path: Path, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of an image while its file is open."""
    return _opened(path, open_regular(path), use)


def _opened(
    path: Path | str, content: AbstractContextManager[IO[bytes]], use: Callable[[Image.Image], T]
) -> T:
    def too_slow() -> Exception:
        return ValueError(f"decoding it does not end within {DECODE_SECONDS} s")

    try:
        with (
            at_most(DECODE_SECONDS, too_slow),
            content as stream,
            Image.open(stream, formats=_formats()) as image,
        ):
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return use(image)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: the image is too large to decode safely",
            why=f"{error}; the limit is {MAX_PIXELS:,} pixels",
            fix="scale the image down or delete the file",
        ) from error
    except InputError:
        raise
    # On damaged bytes Pillow's plugins raise nearly anything: struct.error, KeyError ...
    except Exception as error:
        raise _unreadable(path, error) from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an upright image, from its header.

    Raises:
        InputError: as of `read_image`.
    """
    return _decode(path, _upright_size)


def encoded_size(content: bytes, name: str) -> tuple[int, int]:
    """The same of an image that lies in memory."""
    return _opened(name, nullcontext(io.BytesIO(content)), _upright_size)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(0x0112, 1) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


# Named because Pillow would try all that it knows: PostScript it hands to a program that runs it.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb"),
    "PCX": (".pcx",),
}


@cache
def _formats() -> list[str]:
    """The formats of images that this Pillow can open."""
    Image.init()
    return [f for f in FORMATS if f in Image.OPEN]


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """`image` converted to 8-bit `mode`; one with more bits is scaled, not clipped."""
    if image.mode.startswith(DEEP):
        image = eight_bits(np.asarray(image).astype(np.float64), None)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _upright(image: Image.Image, mode: str, scale: Range | None) -> Image.Image:
    """An image of a file in 8-bit `mode`."""
    values = deep_values(image)
    if values is None:
        return as_mode(ImageOps.exif_transpose(image), mode)
    return eight_bits(values, scale).convert(mode)


def range_of_files(paths: Sequence[Path]) -> Range | None:
    """The scale of the deep images among some files; None where none has more than 8 bits.

    Looks at no more than `_SAMPLED` files, evenly spread; a damaged one is named when it is used.
    """
    some = paths[:: max(-(-len(paths) // _SAMPLED), 1)]
    return range_of((path, open_regular(path)) for path in some)


def range_of(
    images: Iterable[tuple[Path | str, AbstractContextManager[IO[bytes]]]],
) -> Range | None:
    """The scale of the deep images among these, given by name and content; None without any."""
    found = []
    for name, content in images:
        with suppress(InputError):  # whoever uses the image says so
            found.append(_opened(name, content, _deep_extremes))
    deep = [extremes for extremes in found if extremes is not None]
    return full_range(deep) if deep else None


def _deep_extremes(image: Image.Image) -> Range | None:
    values = deep_values(image)
    return None if values is None else extremes_of(values)


def mode_of(content: bytes) -> str | None:
    """The mode of an image that lies in memory; None where it is none."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return image.mode
    except Exception:  # whoever uses the image names it
        return None


def sniff(path: Path) -> InputError | None:
    """What a glance at the first bytes says against `path`: unreadable, empty, or no image."""
    try:
        with open_regular(path) as stream:
            start = stream.read(32)
    except InputError as error:
        return error
    except OSError as error:
        return _unreadable(path, error)
    return _disguise(path, start)


def _unreadable(path: Path | str, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno is not None:
        return InputError(
            f"{path}: the image cannot be read",
            why=error.strerror or str(error),
            fix="check that the file exists and that you may read it",
        )
    disguised = sniff(path) if isinstance(path, Path) else None
    why, fix = str(error).replace(str(path), "file") or type(error).__name__, _DAMAGED
    if isinstance(error, UnidentifiedImageError):
        why = "its header is damaged, or its pixels are of a kind that Pillow lacks (float64, ...)"
        fix = f"save it again as a PNG or TIFF of 8 or 16 bits, {_DAMAGED}"
    return disguised or InputError(f"{path}: the image cannot be decoded", why=why, fix=fix)


def _disguise(path: Path | str, start: bytes) -> InputError | None:
    if not start:
        why = "a copy or a download of it never began"
        return InputError(f"{path}: the image file is empty (0 bytes)", why=why, fix=_DAMAGED)
    for mark, (kind, fix) in _DISGUISES.items():
        if start.lstrip().lower().startswith(mark):
            why = "its first bytes say so, whatever its name says"
            return InputError(f"{path}: not an image but {kind}", why=why, fix=fix)
    return None
