"""Networks to a Hub and from it, by the names that other libraries have for it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from seprune.errors import UsageError
from seprune.export.hub import push_folder, pushed_folder
from seprune.export.pruned_model import load, save
from seprune.models import NO_CODE, ModelLoader, zoos
from seprune.models.hub import PREFIX, HubAccess, HubRepo, is_hub
from seprune.pipeline.network import open_network
from seprune.recipe.sections import ModelSection
from seprune.runtime.paths import expanded


def from_pretrained(
    name: Path | str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | str | None = None,
    local_files_only: bool = False,
    loader: ModelLoader = NO_CODE,
) -> nn.Module:
    """A network with its trained weights, on the CPU, in evaluation mode.

    Args:
        name: a folder that seprune wrote; a name of timm or torchvision with published weights; or
            a repository ORG/NAME of a Hub: one that seprune pushed, or an image classifier of timm
            or transformers. A folder goes before all others.
        revision: a branch, a tag or a commit of the repository.
        token: for a private or gated one, in the place of that of `hf auth login`.
        cache_dir: where files of a Hub lie; None: where its library puts them.
        local_files_only: what is not in that cache is an error.
        loader: what may be run or read for it.

    Raises:
        UsageError: no such name, or a revision of a folder.
        InputError: no such repository, another kind of network, or a file that is damaged.
        EnvironmentFault: no connection, and not in the cache.
    """
    text = str(name)
    if isinstance(name, Path) or expanded(text).is_dir():
        if revision is not None:
            raise UsageError(
                f"{name}: a folder has no revision {revision}",
                why="a folder of this name goes before a repository",
                fix=f"hf-hub:{text} means the repository, whatever folders there are",
            )
        return load(expanded(name), loader=loader)
    cache = None if cache_dir is None else expanded(cache_dir)
    asking = replace(loader, hub=HubAccess(token, cache, local_files_only))
    zoo, _, rest = text.partition("/")
    if zoo in ("timm", "torchvision") and zoos.has(zoo, rest) and revision is None:
        return open_network(ModelSection(name=text, pretrained=True), loader=asking).model
    there = (text if is_hub(text) else f"{PREFIX}{text}") + (f"@{revision}" if revision else "")
    repo = HubRepo.of(there, access=asking.hub)  # names what is no name
    if (folder := pushed_folder(repo)) is not None:
        return load(folder, loader=asking)  # of any network, also where no input size is known
    return open_network(ModelSection(name=there), loader=asking).model


def push_to_hub(
    network: nn.Module | Path | str,
    name: str,
    *,
    private: bool = False,
    token: str | None = None,
    branch: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Put a network, or a folder that it was saved in, into the repository ORG/NAME; its URL.

    Args:
        private: a repository that is made for it is a private one.
        token: in the place of that of `hf auth login`.
        branch: of the repository, made if need be; None: its main one.
        about: of a network: what else its `config.json` should say, as `save` takes it.

    Raises:
        InputError: not such a folder or network, or the Hub does not let you.
        EnvironmentFault: no connection, or `huggingface_hub` is not installed.
    """
    there = name if branch is None else f"{name}@{branch}"
    if not isinstance(network, nn.Module):
        return push_folder(network, there, private=private, token=token)
    with tempfile.TemporaryDirectory() as place:
        save(network, Path(place) / "network", about=about)
        return push_folder(Path(place) / "network", there, private=private, token=token)
