"""Networks to a Hub and from it, by the names that other libraries have for it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from seprune.export.hub import push_folder
from seprune.export.pruned_model import load, save
from seprune.models import NO_CODE, ModelLoader
from seprune.models.hub import PREFIX, is_hub


def from_pretrained(
    name: Path | str, *, device: str = "cpu", loader: ModelLoader = NO_CODE
) -> nn.Module:
    """The network of a repository ORG/NAME of a Hub, or of a folder, that seprune wrote.

    `load` with a name as other libraries take it: a folder of this name goes before a repository.

    Raises:
        InputError: neither, or a file that is damaged.
        EnvironmentFault: no connection, and not in the cache.
    """
    known = is_hub(str(name)) or Path(name).is_dir() or isinstance(name, Path)
    return load(name if known else f"{PREFIX}{name}", device=device, loader=loader)


def push_to_hub(
    network: nn.Module | Path | str,
    name: str,
    *,
    private: bool = False,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Put a network, or a folder that it was saved in, into the repository ORG/NAME; its URL.

    Args:
        about: of a network: what else its `config.json` should say, as `save` takes it.

    Raises:
        InputError: not such a folder or network, or the Hub does not let you.
        EnvironmentFault: no connection, or `huggingface_hub` is not installed.
    """
    if not isinstance(network, nn.Module):
        return push_folder(network, name, private=private)
    with tempfile.TemporaryDirectory() as place:
        save(network, Path(place) / "network", about=about)
        return push_folder(Path(place) / "network", name, private=private)
