"""Plain JSON becomes the types that code works with, or an error that names the place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from seprune.errors import InputError
from seprune.runtime.reading import TEXT_LIMIT, read_bytes, read_json

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Natural = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
ProcessId = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
Unread = msgspec.Raw
"""A part of a document that is checked to be JSON, and not built; its text by `bytes`."""
OBJECTS_LIMIT = 16_000_000  # of a document that is skimmed; each takes some hundred bytes
_PLACE = " - at `$"


def within(least: int, most: int) -> Any:
    """For `Annotated`: an integer from `least` to `most`."""
    return msgspec.Meta(ge=least, le=most)


def few(most: int) -> Any:
    """For `Annotated`: a list of `most` items at most."""
    return msgspec.Meta(max_length=most)


def typed(kind: type[T], value: Any, *, source: str, fix: str, code: str = "input") -> T:
    """`value`, as JSON has it, as `kind`: a dataclass, a TypedDict, lists and dicts of them.

    Nothing is converted but integers to floats and lists to tuples. Keys that `kind` does not know
    are passed over: a later minor version may say more. What `__post_init__` raises as a ValueError
    is reported like a wrong type.

    Args:
        source: the file, named in the error.
        fix, code: of the error.

    Raises:
        InputError: names the place in the document, what belongs there and what was found.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise _misfit(source, error, fix=fix, code=code) from error


def fits(kind: type[Any], value: Any) -> bool:
    """Whether `typed` takes it."""
    try:
        msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError):
        return False
    return True


def read_typed(kind: type[T], path: Path, *, fix: str, code: str = "input") -> T:
    """The JSON document in `path` as `kind`.

    Raises:
        InputError: as of `read_json` and `typed`.
    """
    return typed(kind, read_json(path), source=str(path), fix=fix, code=code)


def skim(kind: type[T], path: Path, *, limit: int = TEXT_LIMIT, fix: str, code: str) -> T:
    """`read_typed` of a large document of which `kind` knows little; the rest is never built.

    Raises:
        OSError: as of `open`.
        InputError: too large, not JSON, or as of `typed`.
    """
    try:
        return _decoded(kind, path, limit, fix)
    except msgspec.ValidationError as error:
        raise _misfit(str(path), error, fix=fix, code=code) from error


def fits_file(kind: type[Any], path: Path, *, limit: int = TEXT_LIMIT) -> bool:
    """Whether `skim` takes it.

    Raises:
        OSError: as of `open`.
        InputError: too large, or not JSON.
    """
    try:
        _decoded(kind, path, limit, fix="")
    except msgspec.ValidationError:
        return False
    return True


def _decoded(kind: type[T], path: Path, limit: int, fix: str) -> T:
    try:
        content = read_bytes(path, limit=limit)
        if (objects := content.count(b"{")) > OBJECTS_LIMIT:
            raise msgspec.DecodeError(f"{objects:,} objects, the limit is {OBJECTS_LIMIT:,}")
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON", why=str(error), fix=fix or "restore the file"
        ) from error


def require_like(
    found: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str, fix: str
) -> None:
    """Refuse tensors from a file that are not named, shaped and typed as `own`.

    Raises:
        InputError: names the first.
    """
    missing, unknown = sorted(set(own) - set(found)), sorted(set(found) - set(own))
    other = [n for n in own if n in found and _kind(found[n]) != _kind(own[n])]
    if missing:
        why = f"{missing[0]} is missing"
    elif unknown:
        why = f"{unknown[0]!r} does not belong there"
    elif other:
        why = f"{other[0]} is {_kind(found[other[0]])}, not {_kind(own[other[0]])}"
    else:
        return
    raise InputError(f"{source}: not what seprune wrote", why=why, fix=fix, code="damaged")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _misfit(source: str, error: Exception, *, fix: str, code: str) -> InputError:
    """`Expected `int`, got `str` - at `$.a[0]``, as a sentence about a file."""
    message, _, place = str(error).partition(_PLACE)
    message = message.replace("`", "")
    place = place.rstrip("`").lstrip(".") or "the document"
    return InputError(
        f"{source}: {place}: {message[:1].lower()}{message[1:]}",
        why="it is not what seprune writes there: the file was damaged or edited",
        fix=fix,
        code=code,
    )
