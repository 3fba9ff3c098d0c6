"""Files of a Hub, by `huggingface_hub` and into its own cache; what goes wrong is named."""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seprune.errors import EnvironmentFault, InputError, SepruneError, UsageError, first_line
from seprune.models.cache import cache_fault
from seprune.runtime.checksums import sha256
from seprune.runtime.extras import require
from seprune.runtime.reading import read_json
from seprune.runtime.text import shell_word

PREFIX = "hf-hub:"
SAFE = "model.safetensors"
PICKLED = "pytorch_model.bin"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".tar", ".h5", ".msgpack", ".onnx")

ANSWER_SECONDS = 4.0  # that a Hub has for its first word, twice
SILENCE_SECONDS = 30.0  # that one without a word is not asked again: a network has several files
_SILENT_UNTIL: dict[str | None, float] = {}
# of httpx and of requests, by name: which of them is there depends on the library's version
_NO_ANSWER = {"ConnectionError", "NetworkError", "OfflineModeIsEnabled", "TimeoutException",
              "Timeout"}  # fmt: skip


@dataclass(frozen=True)
class HubAccess:
    """How files of a Hub are asked for; by itself as that library's variables say.

    Attributes:
        token: in the place of the one that `hf auth login` keeps.
        cache: folder of the files.
        cached_only: nothing is asked for that is not in the cache.
        fetched: repositories that are in the cache as they are now, so that none asks again.
    """

    token: str | None = field(default=None, repr=False)
    cache: Path | None = None
    cached_only: bool = False
    fetched: frozenset[str] = frozenset()


USUAL = HubAccess()


@dataclass(frozen=True)
class HubRepo:
    """A repository of a Hub, at a revision; or a copy of it in a folder here."""

    name: str
    revision: str | None = None
    folder: Path | None = None
    access: HubAccess = USUAL

    @classmethod
    def of(cls, text: str, folder: Path | None = None, access: HubAccess = USUAL) -> HubRepo:
        """`hf-hub:ORG/NAME`, with `@REVISION` or without.

        Args:
            folder: where its files are, so that none is asked for.

        Raises:
            UsageError: no such name.
        """
        name, _, revision = text.removeprefix(PREFIX).partition("@")
        if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            raise UsageError(
                f"{text}: not the name of a repository",
                why="a repository is ORG/NAME, with @REVISION behind it or without",
                fix="write hf-hub:ORG/NAME",
            )
        return cls(name, revision or None, folder, access)

    def __str__(self) -> str:
        if self.folder is not None:
            return str(self.folder)
        return PREFIX + self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def download(self) -> str:
        """The command that fetches it, to which a folder or names of files are added."""
        at = f" --revision {shell_word(self.revision)}" if self.revision else ""
        return f"hf download {self.name}{at}"


def is_hub(name: str) -> bool:
    """Whether a name of a network means a repository of a Hub."""
    return name.startswith(PREFIX)


def fetch(repo: HubRepo, name: str) -> Path:
    """A file of a repository, in the cache; downloaded unless it is there.

    Raises:
        InputError: no such repository or file, no permission, or another content than promised.
        EnvironmentFault: no connection, and not in the cache; no space.
    """
    if repo.folder is not None:
        return _in_folder(repo, repo.folder / name)
    asked, wanted = repo.access, {"revision": repo.revision, "cache_dir": repo.access.cache}
    alone = asked.cached_only or str(repo) in asked.fetched
    alone = alone or not answers(repo.name, name, revision=repo.revision)
    try:
        api = hub_api(asked.token)
        path = Path(api.hf_hub_download(repo.name, name, local_files_only=alone, **wanted))
    except Exception as error:  # of the library, of its HTTP client, or of the disk
        raise _fault(repo, name, error, _silent(asked) if alone else first_line(error)) from error
    _check_content(repo, name, path)
    return path


def _silent(access: HubAccess) -> str:
    """Why nothing was asked for."""
    if access.cached_only:
        return "nothing is asked for that is not in the cache, as local_files_only says"
    where = os.environ.get("HF_ENDPOINT") or "the Hub"
    return f"{where} does not answer, or HF_HUB_OFFLINE is set"


class _NoSuchFile(InputError):
    """A repository without a file."""


def _in_folder(repo: HubRepo, path: Path) -> Path:
    if path.is_file():
        return path
    raise _NoSuchFile(
        f"{repo}: there is no {path.name} in it",
        why=f"it was given in the place of hf-hub:{repo.name}",
        fix="name a folder with all files of the repository",
        code="hub",
    )


def answers(repo: str, name: str, *, revision: str | None = None, kind: str = "model") -> bool:
    """Whether there is a Hub; the library alone would try for half a minute to find out.

    Args:
        kind: of the repository, `model` or `dataset`.
    """
    api, endpoint = hub_api(), os.environ.get("HF_ENDPOINT")
    if time.monotonic() < _SILENT_UNTIL.get(endpoint, 0.0):
        return False
    url = hub_library().hf_hub_url(repo, name, repo_type=kind, revision=revision, endpoint=endpoint)
    for pause in (1.0, None):
        try:
            api.get_hf_file_metadata(url=url, timeout=ANSWER_SECONDS)
        except Exception as error:  # of the library or of its HTTP client
            if not _NO_ANSWER & {kind.__name__ for kind in type(error).__mro__}:
                return True  # what is wrong shows when the file is asked for
            if pause is not None:
                time.sleep(pause)
        else:
            return True
    _SILENT_UNTIL[endpoint] = time.monotonic() + SILENCE_SECONDS
    return False


def optional(repo: HubRepo, name: str) -> Path | None:
    """A file of a repository; None where the repository has no such file."""
    try:
        return fetch(repo, name)
    except _NoSuchFile:
        return None


def if_there(repo: HubRepo, name: str) -> Path | None:
    """A file that a repository may have beside its network; None where it cannot be had, too.

    So a network in the cache can be used without a connection.
    """
    try:
        return fetch(repo, name)
    except SepruneError:
        return None


def fetch_weights(repo: HubRepo, *, names: Sequence[str] = (SAFE,), pickles: bool = False) -> Path:
    """The weights of a repository: safetensors, or a pickle where that is permitted.

    Raises:
        InputError: there are only pickles, or none at all.
    """
    for name in (*names, PICKLED) if pickles else names:
        if (found := optional(repo, name)) is not None:
            return found
    there = _weight_files(repo)
    if PICKLED in there:
        raise InputError(
            f"{repo}: its weights are a pickle, {PICKLED}",
            why=f"it has no {names[0]}, and a pickle from elsewhere is not read without permission",
            fix="add --allow-pickle, in Python loader=seprune.ModelLoader(pickles=True): tensors "
            "are read, and nothing in the file is run",
            code="hub-pickle",
        )
    missing = f"it has neither {' nor '.join(names)} nor {PICKLED}"
    if not there:
        raise InputError(
            f"{repo}: no weights", why=missing, fix="name a repository that has weights", code="hub"
        )
    if parts := [name for name in there if re.search(r"-\d+-of-\d+\.", name)]:
        raise InputError(
            f"{repo}: its weights are in {len(parts)} files",
            why="seprune reads weights that are one file",
            fix="save them as one where they were made, such as by transformers: "
            "model.save_pretrained(FOLDER, max_shard_size='99GB'); then --checkpoint FOLDER",
            code="hub",
        )
    raise InputError(
        f"{repo}: its weights have another name: {', '.join(there[:5])}",
        why=missing,
        fix=f"take one that is whole: {repo.download} {shell_word(there[0])} "
        f"--local-dir FOLDER; then --checkpoint {shell_word(f'FOLDER/{there[0]}')}",
        code="hub",
    )


def _weight_files(repo: HubRepo) -> list[str]:
    """What may be weights in a repository, by the endings of its files."""
    if repo.folder is not None:
        names = [path.name for path in repo.folder.iterdir()]
    else:
        names = hub_api(repo.access.token).list_repo_files(repo.name, revision=repo.revision)
    return sorted(name for name in names if name.endswith(WEIGHTS))


def fetch_config(repo: HubRepo) -> dict[str, Any]:
    """The `config.json` of a repository.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = fetch(repo, "config.json")
    try:
        config = read_json(path)
    except InputError as error:
        raise unusable(repo, path.parent, error) from error
    if not isinstance(config, dict):
        raise InputError(
            f"{repo}: its config.json holds no object",
            why=f"it is a {type(config).__name__}",
            fix="name another repository",
            code="hub",
        )
    return config


def unusable(repo: HubRepo | str, folder: Path, error: InputError) -> InputError:
    """What is wrong with a file that a Hub has like this, so that no other download mends it."""
    what = error.what.removeprefix(f"{folder}/")
    path = folder / what.partition(": ")[0]
    return InputError(
        f"{repo}: {what}",
        why=error.why,
        fix=f"name another repository; if it is right on the Hub: rm {shell_word(path)}",
        code="hub",
    )


def _check_content(repo: HubRepo, name: str, path: Path) -> None:
    """Compare a large file with the hash that the Hub knows it by: the name of its blob.

    Raises:
        InputError: it has another content; the blob is removed, so that the next try fetches it.
    """
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
        blob.unlink()
        path.unlink(missing_ok=True)
        raise InputError(
            f"{repo}: {name} is not what the Hub promised",
            why=f"its SHA-256 is not {blob.name[:12]}...; the file was removed from the cache",
            fix="run the same command again, which downloads it again",
            code="hub-damaged",
        )


def _fault(repo: HubRepo, name: str, error: Exception, message: str) -> SepruneError:
    """What the library says, in our words."""
    errors = _errors()
    for kind, what, fix in (
        (errors.GatedRepoError, "its owner has to let you in",
         "accept the terms on the page of the repository, then: hf auth login"),
        (errors.RepositoryNotFoundError, "no such repository, or a private one",
         "check the name; for a private one: hf auth login"),
        (errors.RevisionNotFoundError, "no such revision",
         "name a branch, a tag or a commit of it behind the @"),
        (errors.RemoteEntryNotFoundError, f"there is no {name} in it",
         "name one of a network of timm or transformers, or one that seprune pushed"),
    ):  # fmt: skip
        if isinstance(error, kind):
            made = _NoSuchFile if kind is errors.RemoteEntryNotFoundError else InputError
            return made(f"{repo}: {what}", why=message, fix=fix, code="hub")
    if (refused := cache_fault(f"{repo}: {name}", "HF_HOME", error)) is not None:
        return refused
    if type(error).__name__ in ("RemoteProtocolError", "ReadError") or "Consistency" in message:
        return InputError(
            f"{repo}: the transfer of {name} broke off",
            why=message,
            fix="run the same command again",
            code="hub-damaged",
        )
    folder = shell_word(repo.name.partition("/")[2])
    return unreachable(
        str(repo), message, elsewhere=f"{repo.download} --local-dir {folder}", here=folder
    )


def unreachable(what: str, why: str, *, elsewhere: str, here: str) -> EnvironmentFault:
    """No connection: the two commands that fetch a file elsewhere and use it here."""
    return EnvironmentFault(
        f"{what}: cannot be downloaded, and is not in the cache",
        why=why,
        fix=f"where there is a connection: {elsewhere}; then here, with what it wrote: "
        f"--checkpoint {here}",
        code="offline",
    )


def _errors() -> Any:
    return importlib.import_module("huggingface_hub.errors")


def hub_api(token: str | None = None) -> Any:
    """The library's client, of the Hub that `HF_ENDPOINT` names.

    Args:
        token: in the place of the one that the library finds.

    Raises:
        EnvironmentFault: it is not installed.
    """
    return hub_library().HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)


def hub_library() -> Any:
    """The package `huggingface_hub`."""
    what = "the Hub needs a package that is not installed"
    return require("huggingface_hub", extra="hub", what=what)
