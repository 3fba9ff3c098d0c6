"""Networks by name: torchvision/NAME, timm/NAME, smp/NAME, seprune/NAME, FILE.py:FUNCTION.

A `seprune/` network is one row of a `NETWORKS` table in the file of its family.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from seprune.errors import SepruneError, UsageError, first_line
from seprune.models import dense, inception, plain, residual, zoos
from seprune.models.origin import Origin

NETWORKS = residual.NETWORKS | inception.NETWORKS | plain.NETWORKS
"""Classifiers."""
_OWN = NETWORKS | dense.NETWORKS
Size = tuple[int, int, int]
_NOT_HERE = {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "checkpoint_path"}
_NOT_HERE |= {"pretrained_cfg_overlay", "cache_dir", "encoder_weights", "auto_map"}
_IN_TORCH = (None, "eager", "sdpa")  # for others transformers may fetch kernels from a Hub
_ELSEWHERE = re.compile(r"[/\\:]")  # in a path, a URL, ORG/NAME of a Hub, a kernel of transformers


def build(origin: Origin) -> nn.Module:
    """The network of a zoo, with random weights; see `ModelLoader.build`."""
    name, classes, input, args = origin.name, origin.classes, origin.input, dict(origin.args)
    _check_numbers(classes, input)
    zoo, _, rest = name.partition("/")
    _refuse_weights(name, args)
    require_name(name)
    try:
        if zoo == "seprune":
            network = _OWN[rest]
            channels = input[0] if input else network.input[0]
            return network.make(channels, classes or network.classes, network.settings(name, args))
        makes = {
            "torchvision": zoos.torchvision_model,
            "smp": zoos.smp_model,
            "transformers": zoos.transformers_model,
        }
        return makes.get(zoo, zoos.timm_model)(rest, classes, input, args)
    except (SepruneError, NotImplementedError):  # the latter: not on the meta device
        raise
    except Exception as error:  # arguments that a network's own code stumbles over, anyhow
        raise UsageError(
            f"{name}: cannot be built with {_spell(classes, input, args)}",
            why=first_line(error),
            fix=f"check these against the documentation of {name}",
        ) from error


def names(pattern: str = "*") -> list[str]:
    """Names of all networks that can be built here, those with channel gates first.

    A pattern without wildcards is looked for anywhere in the name.
    """
    if not set("*?[") & set(pattern):
        pattern = f"*{pattern}*"
    found = [f"seprune/{name}" for name in _OWN]
    found += sorted(zoos.names(), key=lambda name: not zoos.gated(name))
    return [name for name in found if fnmatchcase(name, pattern)]


def input_size(name: str, model: nn.Module) -> Size:
    """(C, H, W) that `name` was published with; C as `model` has it.

    Raises:
        UsageError: it cannot be inferred (a network of the user's own file).
    """
    zoo, _, rest = name.partition("/")
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    if channels > 4:  # a stem that first folds positions into channels (TResNet)
        channels = 3
    if zoo == "seprune" and rest in _OWN:
        return channels, *_OWN[rest].input[1:]
    if zoo == "torchvision":
        return channels, *zoos.torchvision_size(rest, model)
    if zoo == "timm":
        return channels, *zoos.timm_size(model)
    if zoo == "transformers":
        return channels, *zoos.transformers_size(model)
    raise UsageError(
        f"{name}: its input size is not known",
        why="only networks of torchvision/, timm/, transformers/ and seprune/ do",
        fix="--input 3x224x224",
    )


def _check_numbers(classes: int | None, input: Size | None) -> None:
    if classes is not None and classes < 1:
        raise UsageError(
            f"classes={classes}: a classifier needs at least one class",
            why="the number of classes is the width of the last layer",
            fix="--classes 10",
        )
    if input is not None and (len(input) != 3 or min(input) < 1):
        raise UsageError(
            f"input={'x'.join(map(str, input))}: not the size of an image",
            why="it is channels x height x width, each at least 1",
            fix="--input 3x224x224",
        )


def _refuse_weights(name: str, args: Mapping[str, Any]) -> None:
    """Zoos hand arguments on to each other, so those in mappings and lists count as well."""
    for key, value in _flat(args):
        text = value if isinstance(value, str) else ""
        fetched = "_implementation" in key and value not in _IN_TORCH
        if key in _NOT_HERE or _ELSEWHERE.search(text) or fetched:
            raise UsageError(
                f"{name}: {key} is not an argument here" + (f": {text[:80]!r}" if text else ""),
                why="a network is built with random weights; nothing is downloaded or read on the "
                "way",
                fix="--pretrained in a command, seprune.from_pretrained(NAME) in Python; weights "
                "of your own with --checkpoint FILE",
            )


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key and what it stands for, at any depth."""
    yield key, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner, key)


def require_name(name: str) -> None:
    """Refuse a name that no zoo has, with those that are close to it.

    Raises:
        UsageError: there is no such network.
    """
    zoo, _, rest = name.partition("/")
    known = rest in _OWN if zoo == "seprune" else zoos.has(zoo, rest)
    if known:
        return
    tails: dict[str, list[str]] = {}
    for full in names():
        tails.setdefault(full.partition("/")[2], []).append(full)
    sought = (rest or zoo).lower().partition("_weights")[0]  # as enums of torchvision are called
    close = [full for tail in get_close_matches(sought, tails, 5) for full in tails[tail]]
    close.sort(key=lambda full: not full.startswith(f"{zoo}/"))
    known_zoo = any(full.startswith(f"{zoo}/") for full in names())
    if rest and not known_zoo and zoo != "transformers":
        repo = "/".join(name.rpartition(":")[2].split("/")[-2:])
        raise UsageError(
            f"{name}: no such model",
            why=f"{zoo} is neither a folder here nor torchvision, timm, smp or seprune",
            fix=f"hf-hub:{repo} for a repository of a Hub; seprune models PATTERN for a list",
        )
    raise UsageError(
        f"{name}: no such model",
        why=f"close names: {', '.join(close[:5])}" if close else "nothing here is called like it",
        fix=f"{close[0]}, or seprune models PATTERN for a list" if close else "seprune models",
    )


def _spell(classes: int | None, input: Size | None, args: dict[str, Any]) -> str:
    given = {"classes": classes, "input": input} | args
    return ", ".join(f"{k}={v}" for k, v in given.items() if v is not None) or "its defaults"
