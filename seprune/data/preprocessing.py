"""Preprocessing applied: which one a data set gets, and images prepared by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seprune.data.source import Source, Targets
from seprune.errors import UsageError
from seprune.models.preprocessing import Preprocessing, Scaling, covering

if TYPE_CHECKING:
    from seprune.data.dataset import DataSettings

SMALL = 96  # below this side, images train with a padded crop and are cached
LARGE = 640  # below this side, images with masks or boxes keep their size
SIZES = {"segmentation": (256, 256), "detection": (320, 320)}
CROP = 0.875  # of the scaled image, where nobody says and images are large
Levels = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Levels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR: Levels = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
GREY: Levels = ((0.1307,), (0.3081,))  # MNIST's
DIGITS: Levels = ((0.3053,), (0.3761,))


def fit(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The evaluation transform: scale the image, then take its centre, both as torchvision does."""
    height, width = preprocessing.resize
    if preprocessing.scaling == "cover":
        if height * image.width >= width * image.height:  # the height decides
            width = max(height * image.width // image.height, width)
        else:
            height = max(width * image.height // image.width, height)
    if image.size != (width, height):
        way = Image.Resampling[preprocessing.interpolation.upper()]
        image = image.resize((width, height), way)
    if image.size == preprocessing.shape[:0:-1]:
        return image
    left, top = (round((a - b) / 2) for a, b in zip(image.size, preprocessing.shape[:0:-1]))
    return image.crop((left, top, left + preprocessing.shape[2], top + preprocessing.shape[1]))


def to_pixels(image: Image.Image) -> Tensor:
    """`image` as a uint8 tensor (C, H, W)."""
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[:, :, None]).permute(2, 0, 1)


def normalise(pixels_BCHW: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 pixels -> float32, (x / 255 - mean) / std, in the network's order of channels."""
    mean, std = _levels(preprocessing.levels, pixels_BCHW.device)
    if preprocessing.channel_order == "bgr":
        pixels_BCHW = pixels_BCHW.flip(1)
    return pixels_BCHW.contiguous().float().sub_(mean).div_(std)


@cache
def _levels(levels: Levels, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std in grey levels, kept on the device: a copy per batch would stall it."""
    first, second = (torch.tensor(v, device=device).view(1, -1, 1, 1) * 255 for v in levels)
    return first, second


def choose_preprocessing(
    found: Source, settings: DataSettings
) -> tuple[Preprocessing, tuple[str, ...]]:
    """What the settings say, else the weights, else the usual for such images; and notes on it.

    Raises:
        UsageError: a mean or a std that does not fit the channels.
    """
    known = settings.preprocessing
    base = known or _usual(found, settings.input)
    if known and settings.input and settings.input[0] != known.shape[0]:
        size = "x".join(map(str, (known.shape[0], *settings.input[1:])))
        raise UsageError(
            f"input {settings.input}: the weights are for images of {known.shape[0]} channels",
            why=f"{known.source} says so",
            fix=f"--input {size}; images are converted",
        )
    base = base.at(settings.input or base.shape)
    given = {k: v for k in ("mean", "std", "interpolation", "channel_order")
            if (v := getattr(settings, k)) is not None}  # fmt: skip
    if settings.crop is not None and (max(base.shape[1:]) >= SMALL or known):
        given["resize"] = covering(base.shape, settings.crop)
    channels = base.shape[0]
    mean, std = given.get("mean", base.mean), given.get("std", base.std)
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UsageError(
            f"mean {mean} and std {std} do not fit {channels} channels",
            why="each channel needs one mean and one positive std",
            fix=f"give {channels} numbers each for data.mean and data.std",
        )
    chosen = replace(base, **given)
    changed = [k for k in chosen.differences(base) if k in given]
    if not changed:
        return chosen, ()
    chosen = replace(chosen, source=f"{', '.join(changed)} as given, the rest {base.source}")
    if known is None:
        return chosen, ()
    return chosen, tuple(
        f"{k} {_shown(getattr(chosen, k))} was asked for, {known.source} says "
        f"{_shown(getattr(base, k))}: what was asked for is used"
        for k in changed
    )


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"[{', '.join(f'{v:.4g}' for v in value)}]"


def _usual(found: Source, given: tuple[int, int, int] | None) -> Preprocessing:
    """The guess by rule: from the kind and the size of the images."""
    joint = isinstance(found.train, Targets)
    small = found.native and max(found.native) < (LARGE if joint else SMALL)
    native = found.native if found.native and small else SIZES.get(found.task, (224, 224))
    shape = given or ({"L": 1, "RGBA": 4}.get(found.mode, 3), *native)
    levels, source = _usual_levels(found, shape)
    whole = max(shape[1:]) < SMALL or joint or found.native == tuple(shape[1:])
    resize = (shape[1], shape[2]) if whole else covering(shape, CROP)
    scaling: Scaling = "stretch" if joint else "cover"
    return Preprocessing(
        shape,
        *levels,
        resize=resize,
        scaling=scaling,
        source=f"guessed: {source}",
    )


def _usual_levels(found: Source, shape: Sequence[int]) -> tuple[Levels, str]:
    channels = shape[0]
    if found.task == "detection":
        return ((0.0,) * channels, (1.0,) * channels), "detectors normalise by themselves"
    if channels == 1:
        if found.name == "digits":
            return DIGITS, "of the digits"
        return GREY, "as for MNIST, since images are grey"
    if channels == 4:
        return ((0.5,) * 4, (0.5,) * 4), "-1 to 1, since images have 4 channels"
    if max(shape[1:]) >= SMALL:
        return IMAGENET, "as for ImageNet, since images are large"
    return CIFAR, "as for CIFAR-10, since images are small"


# -- without seprune ----------------------------------------------------------------------------

_SQUARE = "size = [max({tall} * side // min(image.size), {tall}) for side in image.size]\n"
_OBLONG = """\
size = [max({tall} * image.width // image.height, {wide}), {tall}]
if {tall} * image.width < {wide} * image.height:
    size = [{wide}, max({wide} * image.height // image.width, {tall})]
"""
# imports, decoding and ten steps: what a model card shows
_CODE = """\
import numpy as np
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("{mode}")
{size}image = image.resize(size, Image.Resampling.{interpolation})
left, top = round((size[0] - {w}) / 2), round((size[1] - {h}) / 2)
pixels = np.asarray(image.crop((left, top, left + {w}, top + {h})), np.float32) / 255
x = (pixels.reshape({h}, {w}, {c}){order} - np.float32({mean})) / np.float32({std})
x = x.transpose(2, 0, 1)[None]  # (1, {c}, {h}, {w}), float32
"""


def as_code(preprocessing: Preprocessing) -> str:
    """Python that prepares one image with Pillow and numpy alone."""
    channels, height, width = preprocessing.shape
    tall, wide = preprocessing.resize
    size = _SQUARE if tall == wide else _OBLONG
    if preprocessing.scaling == "stretch":
        size = "size = [{wide}, {tall}]\n"
    return _CODE.format(
        mode={1: "L", 4: "RGBA"}.get(channels, "RGB"),
        size=size.format(tall=tall, wide=wide),
        interpolation=preprocessing.interpolation.upper(),
        c=channels,
        h=height,
        w=width,
        order="[..., ::-1]" if preprocessing.channel_order == "bgr" else "",
        mean=list(preprocessing.mean),
        std=list(preprocessing.std),
    )
