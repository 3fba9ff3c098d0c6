"""How images are prepared for a network: one value, taken from its weights, kept with the module.

The steps: scale the image to cover `resize` (or to be it), take the centre of `shape`, divide by
255, subtract `mean`, divide by `std`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from seprune.errors import InputError, first_line
from seprune.runtime.reading import read_json

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Scaling = Literal["cover", "stretch"]
ChannelOrder = Literal["rgb", "bgr"]
RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by Pillow's numbers
_KEY = "_seprune_trained_for"  # in the module's own dict, so that copies of the module have it too
_CONVNEXT_WHOLE = 384  # from this side on its processor stretches images and crops nothing
_LARGEST = 10**5  # pixels of a side, and labels


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network.

    Attributes:
        shape: (C, H, W) of the input.
        mean, std: of each channel of pixels in [0, 1], in the network's order.
        resize: (H, W) that the image is scaled to before its centre of `shape` is taken.
        scaling: `cover`: the sides keep their ratio and the smaller one fits; `stretch`: both fit.
        channel_order: that the network takes; images are read as RGB.
        source: where all this was taken from, for people.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, int]
    scaling: Scaling = "cover"
    interpolation: Interpolation = "bilinear"
    channel_order: ChannelOrder = "rgb"
    source: str = ""

    @property
    def crop(self) -> float:
        """The part of the scaled image's height that the centre covers."""
        return self.shape[1] / self.resize[0]

    def at(self, shape: Sequence[int]) -> Preprocessing:
        """The same for inputs of another size; the centre covers the same part."""
        size = tuple(shape)
        if size == self.shape:
            return self
        pairs = zip(self.resize, self.shape[1:], size[1:])
        resize = tuple(max(new * scaled // old, new) for scaled, old, new in pairs)
        return replace(self, shape=size, resize=resize)  # type: ignore[arg-type]

    def plain(self) -> dict[str, Any]:
        """JSON types, as `Preprocessing.of` reads them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def of(cls, values: Any, *, where: str = "preprocessing") -> Preprocessing:
        """The value that `plain` gave.

        Raises:
            InputError: nothing that `plain` gives; `where` is named.
        """
        known = values if isinstance(values, Mapping) else {}
        wrong = [key for key, right in _CHECKS.items() if not right(known.get(key))]
        if not wrong:
            made = cls(**{k: _value(known[k]) for k in _CHECKS}, source=str(known.get("source")))
            channels, *size = made.shape
            fits = len(made.mean) == len(made.std) == channels
            wrong = [] if fits else ["mean"]
            wrong += [] if all(a >= b for a, b in zip(made.resize, size)) else ["resize"]
        if wrong:
            raise InputError(
                f"{where}: {wrong[0]} is nothing that seprune wrote",
                why=f"it is {str(known.get(wrong[0]))[:60]!r}",
                fix="copy the folder again, or run the stage that wrote it again",
                code="damaged",
            )
        return made

    def differences(self, other: Preprocessing) -> list[str]:
        """The names of what differs from another one, but for where it was taken from."""
        return [k for k in _CHECKS if getattr(self, k) != getattr(other, k)]

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        to = "x".join(map(str, self.resize))
        steps = [f"stretched to {to}" if self.scaling == "stretch" else f"scaled to cover {to}"]
        steps = [] if self.resize == self.shape[1:] and self.scaling == "cover" else steps
        mean, std = (" ".join(f"{v:.4g}" for v in values) for values in self.levels)
        order = {1: "grey", 3: self.channel_order.upper(), 4: "RGBA"}.get(self.shape[0], "")
        parts = [size, *steps, self.interpolation, f"mean {mean}, std {std}", order]
        return ", ".join(filter(None, parts)) + (f" ({self.source})" if self.source else "")

    @property
    def levels(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std."""
        return self.mean, self.std


def covering(shape: Sequence[int], crop: float) -> tuple[int, int]:
    """`resize` for a centre of `shape` (C, H, W) that covers `crop` of it, rounded as timm does."""
    height, width = (max(math.floor(side / crop), side) for side in shape[1:])
    return height, width


def _numbers(count: range, *, least: float, whole: bool = False) -> Any:
    kinds = (int,) if whole else (int, float)

    def right(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) in count
            and all(type(v) in kinds and math.isfinite(v) and least <= v <= _LARGEST for v in value)
        )

    return right


_CHECKS: dict[str, Any] = {
    "shape": _numbers(range(3, 4), least=1, whole=True),
    "mean": _numbers(range(1, _LARGEST), least=-_LARGEST),
    "std": _numbers(range(1, _LARGEST), least=1e-9),
    "resize": _numbers(range(2, 3), least=1, whole=True),
    "scaling": lambda value: value in get_args(Scaling),
    "interpolation": lambda value: value in get_args(Interpolation),
    "channel_order": lambda value: value in get_args(ChannelOrder),
}


def _value(given: Any) -> Any:
    return tuple(given) if isinstance(given, list) else given


# -- what other projects write ------------------------------------------------------------------


def of_timm(config: Mapping[str, Any], source: str) -> Preprocessing:
    """That of a `pretrained_cfg` of timm, also as its `config.json` on a Hub has it."""
    channels, height, width = config["input_size"]
    shape = (int(channels), int(height), int(width))
    mode = config.get("crop_mode") or "center"  # `border` pads what is missing, which is close
    interpolation = config.get("interpolation")
    return Preprocessing(
        shape,
        tuple(map(float, config["mean"])),
        tuple(map(float, config["std"])),
        resize=covering(shape, float(config.get("crop_pct") or 0.875)),
        scaling="stretch" if mode == "squash" else "cover",
        interpolation=interpolation if interpolation in RESAMPLING else "bilinear",
        source=source,
    )


def of_transformers(config: Mapping[str, Any], source: str) -> Preprocessing:
    """That of a `preprocessor_config.json`.

    Raises:
        InputError: it does not say how large images are.
    """
    crop = _size(config.get("crop_size")) if config.get("do_center_crop", True) else None
    given = config.get("size")
    resize = _size(given) or crop
    if resize is None or not config.get("do_resize", True):
        resize = crop or resize
    if resize is None:
        raise InputError(
            f"{source}: does not say how large images are",
            why="it has neither size nor crop_size",
            fix="--input 3x224x224, with data.mean and data.std",
            code="preprocessing",
        )
    share, squared = config.get("crop_pct"), isinstance(given, Mapping) and "height" in given
    kind = str(config.get("image_processor_type"))
    if kind.startswith("ConvNext") and not squared and min(resize) >= _CONVNEXT_WHOLE:
        share, squared = None, True
    if kind.startswith("Levit") and crop is not None:
        resize = (256 * resize[0] // 224, 256 * resize[1] // 224)
    size = crop or resize
    shape = (3, *size)
    if share:
        resize = covering((3, *resize), float(share))
    normalised = config.get("do_normalize", True) and config.get("image_mean") is not None
    mean, std = [0.0] * 3, [1.0] * 3
    if normalised:
        mean, std = config["image_mean"], config["image_std"]
        if config.get("include_top"):  # of EfficientNet: divided by the deviation once more
            std = [value * value for value in std]
    scaled = config.get("do_rescale", True)
    factor = float(config.get("rescale_factor", 1 / 255)) if scaled else 1.0
    offset = 1.0 if config.get("rescale_offset") else 0.0
    resample = config.get("resample", 2)
    return Preprocessing(
        shape,
        tuple((float(m) + offset) / (255 * factor) for m in mean),
        tuple(float(s) / (255 * factor) for s in std),
        resize=(max(resize[0], size[0]), max(resize[1], size[1])),
        scaling="stretch" if squared else "cover",
        interpolation=RESAMPLING[resample] if resample in range(6) else "bilinear",  # type: ignore[arg-type]
        channel_order="bgr" if config.get("do_flip_channel_order") else "rgb",
        source=source,
    )


def _size(given: Any) -> tuple[int, int] | None:
    """(H, W) of a `size` or `crop_size`: a number, a shortest edge, or both sides."""
    if isinstance(given, Mapping):
        side = given.get("shortest_edge")
        height, width = given.get("height", side), given.get("width", side)
    elif isinstance(given, (list, tuple)) and len(given) == 2:
        height, width = given
    else:
        height = width = given
    return (int(height), int(width)) if height and width else None


def preprocessing_in(folder: Path) -> Preprocessing | None:
    """What a folder in the form of a Hub says: timm's `config.json`, or transformers' file.

    Where both do, timm's: it is of a network of timm, which does not read the other file.

    Raises:
        InputError: a file that cannot be read, or does not say enough.
    """
    theirs, timms = folder / "preprocessor_config.json", folder / "config.json"
    found: Preprocessing | None = None
    for path, read in ((timms, _of_timm_config), (theirs, of_transformers)):
        if not path.is_file():
            continue
        config = read_json(path)
        try:
            made = read(config, str(path)) if isinstance(config, dict) else None
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"{path}: its preprocessing cannot be read",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix="mend the file, or delete it and give --input with data.mean and data.std",
                code="preprocessing",
            ) from error
        if found is None or made is None:
            found = found or made
        elif wrong := found.differences(made):
            other = f"{found.source}; {path.name} says otherwise of {', '.join(wrong)}"
            found = replace(found, source=other)
    return found


def _of_timm_config(config: Mapping[str, Any], source: str) -> Preprocessing | None:
    known = config.get("pretrained_cfg")
    return of_timm(known, source) if isinstance(known, Mapping) else None


# -- kept with the module -----------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedFor:
    """What the weights of a network were trained for; None where it is unknown.

    Attributes:
        preprocessing: of the images.
        task: as `--task` takes it.
        labels: of the classes, in the order of the outputs.
        base_model: published weights that these come from: a repository of a Hub, or
            torchvision/NAME.ENTRY.
    """

    preprocessing: Preprocessing | None = None
    task: str | None = None
    labels: tuple[str, ...] = ()
    base_model: str | None = None


def trained_for(model: nn.Module) -> TrainedFor:
    """What the weights of `model` were trained for, as far as it is known."""
    found = vars(model).get(_KEY)
    return found if isinstance(found, TrainedFor) else TrainedFor()


def remember_training(model: nn.Module, known: TrainedFor) -> nn.Module:
    """The model, which knows from now on what its weights were trained for."""
    vars(model)[_KEY] = known
    return model
