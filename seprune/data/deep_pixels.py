"""Images of more than 8 bits: their numbers, and the scale on which a data set holds them.

Of colours of 16 bits Pillow decodes the upper byte alone, so that 12 bits in them would come out
nearly black: the lower bytes are decoded in a second pass.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

Numbers = np.ndarray[Any, Any]
Range = tuple[float, float]  # the values that become black and white
_DEPTHS = (1, 255, 1023, 4095, 16383, 65535)  # full scale of floats, and of 8 to 16 bits
DEEP = ("I", "F")  # how the names of Pillow's modes of more than 8 bits begin
_UNSIGNED = {"I;32N", "I;32"}
# where the lower byte of a 16-bit colour lies, by the place of the upper one
_OTHER_BYTE = {"16B": "16L", "16L": "16B",
               "16N": "16B" if sys.byteorder == "little" else "16L"}  # fmt: skip


def deep_values(image: Image.Image) -> Numbers | None:
    """The numbers (H, W) or (H, W, 3) of an upright image of more than 8 bits; None of others.

    Args:
        image: of a file, not decoded yet.
    """
    raw = _raw_modes(image)
    if image.mode.startswith(DEEP):
        values = np.asarray(ImageOps.exif_transpose(image))
        values = values.view(np.uint32) if raw & _UNSIGNED else values
        return values.astype(np.float64)
    if not any(_lower(mode) for mode in raw):
        return None
    lower = np.asarray(_lower_bytes(image))[..., :3]  # first: decoding closes the file
    upper = np.asarray(ImageOps.exif_transpose(image))[..., :3].astype(np.float32)
    return np.asarray(256 * upper + lower)


def _raw_modes(image: Image.Image) -> set[str]:
    """How the pixels of an image that is not yet decoded lie in its file."""
    return {_raw_mode(tile) for tile in getattr(image, "tile", [])}


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _lower(raw: str) -> str | None:
    """The raw mode that takes the lower bytes of colours of 16 bits; None of other modes."""
    bands, _, depth = raw.partition(";")
    other = _OTHER_BYTE.get(depth)
    return f"{bands};{other}" if other and bands in ("RGB", "RGBA", "RGBX") else None


def _lower_bytes(image: Any) -> Image.Image:
    """The upright image of the lower bytes in the same file."""
    stream = image.fp
    place = stream.tell()
    stream.seek(0)
    content = io.BytesIO(stream.read())
    stream.seek(place)
    with Image.open(content, formats=[image.format]) as again:
        again.tile = [_with_lower(tile) for tile in again.tile]
        return ImageOps.exif_transpose(again)


def _with_lower(tile: Any) -> Any:
    raw = _lower(_raw_mode(tile))
    return tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)


def extremes_of(values: Numbers) -> Range:
    """The smallest and the largest finite value of an image."""
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def full_range(extremes: Sequence[Range]) -> Range:
    """The scale that values seem to be on: 0 to the next full scale; as found if below 0 or above.

    Args:
        extremes: the smallest and the largest value of each image.
    """
    low, high = min(e[0] for e in extremes), max(e[1] for e in extremes)
    top = next((float(d) for d in _DEPTHS if high <= d), high)
    if low >= 0:
        return 0.0, top
    return (-1.0, 1.0) if low >= -1 and high <= 1 else (low, max(high, low + 1))


def eight_bits(values: Numbers, scale: Range | None) -> Image.Image:
    """Numbers as grey values or colours of 8 bits, on a scale or on their own."""
    low, high = scale or full_range([extremes_of(values)])
    share = np.nan_to_num((values - low) / (high - low)).clip(0, 1)
    return Image.fromarray(np.floor(share * 255 + 0.5).astype(np.uint8))


def scale_notes(scale: Range | None) -> tuple[str, ...]:
    """What a data set says of the scale of its deep images."""
    if scale is None:
        return ()
    low, high = scale
    return (
        f"images with more than 8 bits are scaled from {low:g} (black) to {high:g} (white), by the "
        "values in the training images",
    )
