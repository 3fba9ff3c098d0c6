"""Published weights by the name of their network: of torchvision, of timm, or of a Hub."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from seprune.errors import InputError, UsageError, first_line
from seprune.models import hub, zoos
from seprune.models.cache import cache_fault
from seprune.models.loader import NO_CODE, ModelLoader
from seprune.models.preprocessing import Preprocessing, TrainedFor, of_timm, preprocessing_in
from seprune.models.published import card_metrics, of_torchvision
from seprune.models.registry import require_name
from seprune.models.usercode import is_code
from seprune.runtime.checksums import sha256
from seprune.runtime.text import shell_word

SILENCE_SECONDS = 15.0
# torchvision's names of metrics, in percent, and ours
METRICS = {"acc@1": "top1", "acc@5": "top5", "miou": "miou", "box_map": "map",
           "pixel_acc": "pixel_accuracy"}  # fmt: skip
# what torchvision sets where it loads weights itself
BUILT_WITH: dict[str, dict[str, Any]] = {
    "inception_v3": {"transform_input": True},
    "googlenet": {"transform_input": True},
}


@dataclass(frozen=True)
class PublishedWeights:
    """A file of weights, and what its publisher says of it.

    Attributes:
        name: of the network that it is for, as `build` takes it, without a tag.
        classes: outputs of that network.
        file: on this machine; None where weights of one's own are given.
        origin: where it came from, for people.
        args: of the network, beside the classes.
        metrics: that were published, as fractions, by our names.
    """

    name: str
    classes: int | None
    file: Path | None
    origin: str
    trained_for: TrainedFor
    args: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def fetch_published(
    name: str,
    *,
    loader: ModelLoader = NO_CODE,
    folder: Path | None = None,
    weights: bool = True,
) -> PublishedWeights:
    """The weights that a name stands for, in the cache of the library that knows them.

    Args:
        name: torchvision/NAME[.ENTRY], timm/NAME[.TAG] or hf-hub:ORG/NAME.
        loader: how a Hub is asked, and whether its files may be pickles.
        folder: a copy of that repository of a Hub.
        weights: else only what a repository of a Hub says of its network is fetched.

    Raises:
        UsageError: nobody publishes weights for this name, or none of this tag.
        InputError: the files are damaged, or of a kind that is not known here.
        EnvironmentFault: no connection, no space, or a library that is not installed.
    """
    zoo, _, rest = name.partition("/")
    if hub.is_hub(name):
        repo = hub.HubRepo.of(name, folder, loader.hub)
        made = _of_hub(repo, hub.fetch_config(repo))
        if not weights:
            return made
        return replace(made, file=hub.fetch_weights(repo, pickles=loader.pickles))
    if zoo == "timm" and zoos.has(zoo, rest):
        return _of_timm(name, zoos.timm_config(rest), loader)
    if zoo == "torchvision" and zoos.has(zoo, rest):
        return _of_torchvision(rest)
    if not is_code(name):
        require_name(name)
    raise UsageError(
        f"{name}: nobody publishes weights for it",
        why="torchvision, timm and a Hub do",
        fix="hf-hub:ORG/NAME for a repository of a Hub, or --checkpoint FILE with weights of "
        "your own",
    )


def _of_timm(name: str, config: Mapping[str, Any], loader: ModelLoader) -> PublishedWeights:
    if not config.get("hf_hub_id"):
        base = name.partition("/")[2].partition(".")[0]
        tags = zoos.timm_tags(base)
        raise UsageError(
            f"{name}: timm publishes no weights of this name",
            why=f"there are {', '.join(tags[:5])}" if tags else "there are none for this network",
            fix=f"write timm/{_nearest(name.partition('/')[2], tags)}"
            if tags
            else "--checkpoint FILE with weights of your own",
        )
    repo = hub.HubRepo.of(hub.PREFIX + config["hf_hub_id"], access=loader.hub)
    given = config.get("hf_hub_filename")
    names = (given,) if given and given.endswith(".safetensors") else (hub.SAFE,)
    file = hub.fetch_weights(repo, names=names, pickles=loader.pickles)
    architecture = name.partition("/")[2].partition(".")[0]
    how = of_timm(config, f"of {config['hf_hub_id']}")
    made = _timm(architecture, config.get("num_classes"), file, config["hf_hub_id"], how)
    return replace(made, metrics=card_metrics(repo, how.shape[-1]))


def _timm(
    architecture: str,
    classes: int | None,
    file: Path | None,
    origin: str,
    how: Preprocessing | None,
) -> PublishedWeights:
    known = TrainedFor(how, base_model=origin)
    return PublishedWeights(f"timm/{architecture}", classes, file, origin, known)


def _of_hub(repo: hub.HubRepo, config: Mapping[str, Any]) -> PublishedWeights:
    """What a repository says of a network of timm or of transformers; its weights come later."""
    architecture, kind = config.get("architecture"), config.get("model_type")
    if not isinstance(architecture, str) or not zoos.has("timm", architecture):
        if isinstance(kind, str):
            return _of_transformers(repo, kind, config)
        raise InputError(
            f"{repo}: not a network of timm or transformers, and not pushed by seprune",
            why=f"its config.json names the architecture {architecture[:60]!r}, which timm lacks"
            if isinstance(architecture, str)
            else "its config.json has neither an architecture of timm nor a model_type",
            fix="its author's code builds it, in a FILE.py:FUNCTION: "
            f"{repo.download} --local-dir FOLDER; then FILE.py:FUNCTION --allow-code "
            "--checkpoint FOLDER",
            code="hub",
        )
    how = _prepared(repo)
    given = config.get("num_classes")
    classes = given if isinstance(given, int) else None
    made = _timm(architecture, classes, None, repo.name, how)
    args = config.get("model_args")
    known = args if isinstance(args, Mapping) else {}
    plain = {k: v for k, v in known.items() if isinstance(v, (bool, int, float, str))}
    return replace(made, args=plain, metrics=card_metrics(repo, how.shape[-1] if how else None))


# keys of a config.json of transformers that are no arguments of the network
_NO_ARGUMENTS = {"architectures", "auto_map", "dtype", "id2label", "label2id", "model_type",
                 "_name_or_path", "num_labels", "torch_dtype", "transformers_version"}  # fmt: skip


def _prepared(repo: hub.HubRepo) -> Preprocessing | None:
    """What a repository says of images."""
    hub.if_there(repo, "preprocessor_config.json")
    folder = hub.fetch(repo, "config.json").parent
    try:
        how = preprocessing_in(folder)
    except InputError as error:
        if repo.folder is not None:
            raise
        raise hub.unusable(repo, folder, error) from error
    return how and replace(how, source=how.source.replace(str(folder), str(repo)))


def _of_transformers(repo: hub.HubRepo, kind: str, config: Mapping[str, Any]) -> PublishedWeights:
    """A classifier of transformers, whose code is in that library."""
    named = config.get("architectures")
    made_for = str(named[0]) if isinstance(named, list) and named else "nothing that it names"
    if not made_for.endswith("ForImageClassification") or not zoos.has("transformers", kind):
        raise InputError(
            f"{repo}: not a classifier of images, and not pushed by seprune",
            why=f"its config.json says model_type {kind!r}, and {made_for}",
            fix="write a FILE.py:FUNCTION that builds it and loads its weights; --allow-code",
            code="hub",
        )
    labels = _labels(config.get("id2label"))
    known = TrainedFor(_prepared(repo), "classification", labels, repo.name)
    args = {key: value for key, value in config.items() if key not in _NO_ARGUMENTS}
    name, metrics = f"transformers/{kind}", card_metrics(repo)
    classes = len(labels) or 2  # as that library has it
    return PublishedWeights(name, classes, None, repo.name, known, args, metrics)


def _labels(named: Any) -> tuple[str, ...]:
    """The classes in the order of their numbers."""
    if not isinstance(named, Mapping) or not all(str(n).isdecimal() for n in named):
        return ()
    return tuple(str(named[n]) for n in sorted(named, key=int))


def _of_torchvision(rest: str) -> PublishedWeights:
    name, _, entry = rest.partition(".")
    weights = zoos.torchvision_weights(name, entry or "DEFAULT")
    if weights is None:
        entries = zoos.torchvision_entries(name)
        raise UsageError(
            f"torchvision/{rest}: torchvision publishes no such weights",
            why=f"there are {', '.join(entries)}" if entries else "there are none for this network",
            fix=f"write torchvision/{name}.{_nearest(entry.upper(), entries)}, or "
            f"torchvision/{name} for the default"
            if entries
            else "--checkpoint FILE with weights of your own",
        )
    labels = tuple(map(str, weights.meta.get("categories", ())))
    args = dict(BUILT_WITH.get(name, {}))
    task = zoos.torchvision_task(name)
    if task == "segmentation":
        args["aux_loss"] = True
    known = TrainedFor(of_torchvision(weights), task, labels, f"torchvision/{name}.{weights.name}")
    return PublishedWeights(
        f"torchvision/{name}",
        len(labels) or None,
        _download(weights.url, str(weights)),
        known.base_model or "",
        known,
        args,
        _torchvision_metrics(weights.meta),
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    return get_close_matches(name, names, 1, cutoff=0)[0]


def _torchvision_metrics(meta: Mapping[str, Any]) -> dict[str, float]:
    """The published metrics by our names, as fractions; those of the first data set."""
    for found in meta.get("_metrics", {}).values():
        return {METRICS[k]: v / 100 for k, v in found.items() if k in METRICS}
    return {}


@contextmanager
def _patience() -> Iterator[None]:
    """Time out on a silent server; without this torch waits as long as the system does."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _download(url: str, what: str) -> Path:
    """The file at `url` in the cache of torch.hub; its name holds the start of its SHA-256."""
    import torch

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = url.rpartition("/")[2]
    path, promised = folder / name, re.search(r"-([a-f0-9]{8,})\.", name)
    prefix = promised[1] if promised else None
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _patience():
                torch.hub.download_url_to_file(url, str(path), prefix, progress=sys.stderr.isatty())
        except RuntimeError as error:  # another content than its name promises
            raise InputError(
                f"{what}: what was downloaded is not what its name promises",
                why=first_line(error),
                fix="run the same command again, which downloads it again",
                code="hub-damaged",
            ) from error
        except OSError as error:
            refused = cache_fault(f"{what}: {name}", "TORCH_HOME", error)
            raise refused or hub.unreachable(
                what, first_line(error), elsewhere=f"curl -fLO {url}", here=name
            ) from error
    if prefix and not sha256(path).startswith(prefix):
        raise InputError(
            f"{path}: not what its name promises",
            why=f"its SHA-256 does not start with {prefix}: it was cut short, or changed",
            fix=f"rm {shell_word(path)}",
            code="hub-damaged",
        )
    return path
