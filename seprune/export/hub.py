"""Saved folders on a Hub: pushed there, and loaded from there."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

from seprune.errors import EnvironmentFault, InputError, first_line
from seprune.models.hub import PREFIX, HubAccess, HubRepo, fetch, fetch_config, hub_api
from seprune.report.card import HERE, folder_card
from seprune.runtime.checksums import CARD, PICTURE, SUMS, SUMS_LIMIT, check_sums
from seprune.runtime.paths import fault_in, inside
from seprune.runtime.reading import open_regular, read_text
from seprune.runtime.text import shell_word
from seprune.runtime.transaction import undisturbed

MOST_FILES = 200  # of a repository
MESSAGE = "Add a network that seprune pruned"


def push_folder(
    folder: Path | str, name: str, *, private: bool = False, token: str | None = None
) -> str:
    """Put a saved folder into the repository ORG/NAME, which is made if need be; its URL.

    `ORG/NAME@BRANCH` puts it on a branch of it, which is made if need be.

    All files go in one commit: those of `SHA256SUMS`, itself, and the card with its picture. A card
    is written from `config.json` where the folder has none; reports stay here, with their paths.

    Raises:
        InputError: not such a folder, a damaged one, or the Hub does not let you.
        EnvironmentFault: no connection, or `huggingface_hub` is not installed.
    """
    folder, repo, api = Path(folder), HubRepo.of(PREFIX + name), hub_api(token)
    contents = undisturbed(folder, SUMS, partial(_contents, folder, repo))
    add = importlib.import_module("huggingface_hub").CommitOperationAdd
    operations = [add(path_in_repo=n, path_or_fileobj=c) for n, c in contents.items()]
    try:
        api.create_repo(repo.name, private=private, exist_ok=True)
        if repo.revision is not None:
            api.create_branch(repo.name, branch=repo.revision, exist_ok=True)
        made = api.create_commit(
            repo.name, operations, commit_message=MESSAGE, revision=repo.revision
        )
    except Exception as error:  # of the library or of its HTTP client
        raise _not_pushed(repo, error) from error
    return str(made.commit_url)


def _contents(folder: Path, repo: HubRepo) -> dict[str, bytes]:
    """Names and content of what is pushed: in memory, for a file may be replaced while it is sent.

    Raises:
        InputError: not such a folder, or a damaged one.
    """
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: not a folder that seprune wrote",
            why="it has no config.json" if folder.is_dir() else "there is no such folder",
            fix="give a folder that `seprune prune --out` wrote, or a run folder",
            code="not-ours",
        )
    if wrong := check_sums(folder, need=["config.json"]):
        raise InputError(
            f"{folder}: not pushed, {', '.join(wrong)} changed or missing since seprune wrote it",
            why="the hashes in SHA256SUMS do not match",
            fix=f"seprune verify {shell_word(folder)}",
            code="damaged",
        )
    card, picture = (inside(folder, name) for name in (CARD, PICTURE))  # a link leads elsewhere
    contents = {name: _content(folder / name) for name in (*_listed(folder / SUMS), SUMS)}
    config, title = folder / "config.json", repo.name.partition("/")[2]
    text = read_text(card) if card.is_file() else folder_card(config, title)
    contents[CARD] = text.replace(HERE, str(repo)).encode()
    if picture.is_file():
        contents[PICTURE] = _content(picture)
    return contents


def _content(path: Path) -> bytes:
    with open_regular(path) as stream:
        return stream.read()


def _not_pushed(repo: HubRepo, error: Exception) -> InputError | EnvironmentFault:
    status = getattr(getattr(error, "response", None), "status_code", None)
    missing = type(error).__name__ == "LocalTokenNotFoundError"
    if missing or status in (401, 403):
        return InputError(
            f"{repo}: the Hub does not let you push",
            why=first_line(error),
            fix="hf auth login, with a token that may write there",
            code="hub",
        )
    return EnvironmentFault(
        f"{repo}: not pushed",
        why=first_line(error),
        fix="check the connection and run the same command again: a push is one commit",
        code="offline",
    )


def _listed(sums: Path) -> list[str]:
    """The names in a `SHA256SUMS`."""
    text = read_text(sums, limit=SUMS_LIMIT)
    return [line.partition("  ")[2] for line in text.splitlines()]


def pushed(name: str, access: HubAccess) -> Path:
    """The folder of `hf-hub:ORG/NAME`, which seprune pushed, in the cache, complete.

    Raises:
        InputError: it did not.
    """
    folder = pushed_folder(HubRepo.of(name, access=access))
    if folder is None:
        raise InputError(
            f"{name}: not pushed by seprune",
            why="its config.json has no 'seprune' entry",
            fix=f"seprune.from_pretrained({name.removeprefix(PREFIX)!r}) takes networks of timm "
            "and transformers, too",
            code="hub",
        )
    return folder


def pushed_folder(repo: HubRepo) -> Path | None:
    """The folder of a repository in the cache, complete; None where seprune did not push it.

    A copy of the repository is taken as it is.

    Raises:
        InputError: no such repository, or one that lacks files.
        EnvironmentFault: no connection, and not in the cache.
    """
    if not isinstance(fetch_config(repo).get("seprune"), dict):
        return None
    if repo.folder is not None:
        return repo.folder
    sums = fetch(repo, SUMS)
    names = _listed(sums)
    if len(names) > MOST_FILES:
        raise InputError(
            f"{repo}: {len(names):,} files, more than the {MOST_FILES} that a network may have",
            why="a network and its plans are a few",
            fix=f"look at its {SUMS}, and do not use it unless you know why",
            code="hub",
        )
    for name in sorted(set(names) - {"config.json"}):  # which is there
        if fault_in(sums.parent, name) is None:  # else refused where the folder is read
            fetch(repo, name)
    return sums.parent
