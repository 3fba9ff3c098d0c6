"""Read what a pickle would do, without doing any of it.

Every class and function that the pickle names becomes a fresh inert class: calling it builds a
record of the call, nothing else. The pure Python unpickler is used because the C one allocates as
much memory as a hostile index tells it to.
"""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from seprune.checkpoint.sniff import damaged, incomplete
from seprune.errors import InputError
from seprune.runtime.text import shell_word
from seprune.runtime.timeout import at_most

CUT = "it ends in the middle"
PICKLE_LIMIT = 1 << 25  # 32 MB; the index of a network with 10,000 tensors takes about 2
SECONDS, RATE = 5, 5e5  # for it, at so many bytes a second; keys of equal hashes would take days
LONGEST = 300  # characters of a name in a message; names of nested dicts grow without end
MOST_NUMBERS = 1 << 60  # of a storage
MOST_PARTS = 1 << 20  # of a tuple, with those of its tuples; hashing it takes that many steps

ENCODE = "_codecs.encode"
_REBUILD = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble"
_DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool "
    "float8_e4m3fn float8_e5m2"
)
PATHS = ("pathlib.PosixPath", "pathlib._local.PosixPath", "pathlib.WindowsPath")
ALLOWED = frozenset(
    {f"torch._utils.{name}" for name in _REBUILD}
    | {f"torch.{name}Storage" for name in _STORAGES.split()}
    | {f"torch.{name}" for name in _DTYPES.split()}
    | {"torch.storage.UntypedStorage", "torch.Size", "torch.device"}
    | {"collections.OrderedDict", "collections.Counter", ENCODE}
    | {"builtins.set", "builtins.complex", "argparse.Namespace"}
    | {"numpy.dtype", "numpy.ndarray", *PATHS}
    | {
        f"numpy.{core}.multiarray.{f}"
        for core in ("core", "_core")
        for f in ("scalar", "_reconstruct")
    }
)
# Only for the wording of the refusal, and for `convert` to refuse as well: no model needs these.
# no model needs these, so `convert` refuses them as well; the list above is what protects
_SYSTEM = "os posix nt sys subprocess pty shutil socket runpy importlib ctypes webbrowser"
_BUILTINS = "eval exec compile open __import__ breakpoint input"


@dataclass(frozen=True)
class Storage:
    """A tensor's bytes, by reference: record name in the archive, type and number of elements."""

    key: str
    type_name: str
    numel: int


@dataclass(frozen=True)
class Outline:
    """What a pickle would build.

    Attributes:
        root: dicts, lists, numbers and texts; anything else is inert.
        names: every global it refers to, in order.
        end: where it ends in the bytes.
        refusal: why it cannot be read at all (a damaged pickle), or empty.
    """

    root: object
    names: tuple[str, ...]
    end: int = 0
    refusal: str = ""

    def storages(self) -> Iterator[tuple[str, Storage]]:
        """(dotted name, storage) of every tensor."""
        return ((name, item) for name, item in _walk(self.root) if isinstance(item, Storage))

    def model_class(self) -> str:
        """The class of the first pickled module, or empty."""
        for _, item in _walk(self.root):
            if isinstance(item, Inert) and any(_is_module_state(part) for part in item.parts):
                return item.path
        return ""


class Inert(dict[Any, Any]):
    """What a pickled object becomes: its class's name and what it was given."""

    path = ""
    calls: ClassVar[list[Inert]] = []
    parts: list[object]

    def __new__(cls, *args: object, **_: object) -> Inert:
        made = super().__new__(cls)
        made.parts = list(args)
        if cls.path == ENCODE:
            cls.calls.append(made)
        return made

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.parts.append(state)

    def append(self, item: object) -> None:
        self.parts.append(item)

    def extend(self, items: list[object]) -> None:
        self.parts.extend(items)

    add = append


class _Impossible(pickle.UnpicklingError):
    """No checkpoint needs this, and following it would take memory or time without end."""


class _InertUnpickler(pickle._Unpickler):
    """
    Attributes:
        encoded: every call of `_codecs.encode`, also those whose result is thrown away.
        weighed: every tuple by its `id`, with the number of its parts.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.names: dict[str, None] = {}
        self.encoded: list[Inert] = []
        self.weighed: dict[int, tuple[int, tuple[object, ...]]] = {}

    def weigh(self) -> None:
        """Refuse the tuple on the stack where tuples in tuples make it large without end."""
        made = self.stack[-1]
        parts = len(made) + sum(
            self.weighed[id(part)][0] for part in made if isinstance(part, tuple) and part
        )
        if parts > MOST_PARTS:
            raise _Impossible(f"a tuple of {parts:,} parts")
        self.weighed[id(made)] = parts, made  # which keeps its `id` from being used again

    def find_class(self, module: str, name: str) -> type[Inert]:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        path = f"{module}.{name}"
        self.names[path] = None
        return type(name, (Inert,), {"path": path, "calls": self.encoded})

    def persistent_load(self, pid: Any) -> object:
        kind, storage_type, key, _, numel, *_ = pid
        if kind not in ("storage", b"storage"):
            return None
        if type(numel) is not int or not 0 <= numel < MOST_NUMBERS:
            raise _Impossible("a storage without a number of elements")
        return Storage(str(key), storage_type.path.rpartition(".")[2], numel)


def _weighing(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def both(reader: _InertUnpickler) -> None:
        load(reader)
        reader.weigh()

    return both


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _InertUnpickler.dispatch[_code[0]] = _weighing(pickle._Unpickler.dispatch[_code[0]])


def outline(content: bytes, *, pickles: int = 1) -> list[Outline]:
    """Outlines of the first `pickles` pickles in `content`; stops at the first damaged one."""
    stream, seconds = io.BytesIO(content), SECONDS + len(content) / RATE
    found: list[Outline] = []
    for _ in range(pickles):
        reader = _InertUnpickler(stream)
        try:
            with at_most(seconds, lambda: _Impossible("reading it does not end")):
                root = reader.load()
            _require_plain(reader.encoded)
        except Exception as error:  # hostile bytes can raise anything; the reason is kept
            reason = (
                CUT
                if stream.tell() == len(content) and not isinstance(error, _Impossible)
                else f"{type(error).__name__}: {error}"[:120]
            )
            return [*found, Outline(None, tuple(reader.names), refusal=reason)]
        found.append(Outline(root, tuple(reader.names), stream.tell()))
    return found


def _require_plain(encoded: list[Inert]) -> None:
    """Old pickles spell bytes as a text in Latin-1; other codecs make more of what they are given.

    Raises:
        _Impossible: another codec.
    """
    for call in encoded:
        text, *codec = call.parts
        if not isinstance(text, str) or codec not in (["latin1"], ["latin-1"]):
            raise _Impossible(f"{ENCODE} of something else than a text in Latin-1")


def check(path: Path, outlines: list[Outline]) -> None:
    """Let only pickles pass that hold tensors, containers and plain values.

    Raises:
        InputError: it names a function or class that is not on the list, or it is damaged.
    """
    refuse_commands(path, outlines)
    unlisted = [n for o in outlines for n in o.names if n not in ALLOWED]
    model = next((o.model_class() for o in outlines if o.model_class()), "")
    if unlisted:
        what = f"a whole pickled model (class {model})" if model else "a pickle of other objects"
        more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
        raise refused(path, f"{what}, not plain weights", called=f"{unlisted[0]}{more}")
    for item in outlines:
        if item.refusal == CUT:
            incomplete(path, f"its pickle cannot be read: {CUT}")
        if item.refusal:
            damaged(path, f"its pickle cannot be read ({item.refusal})")


def refuse_commands(path: Path, outlines: list[Outline]) -> None:
    """Refuse pickles that reach for the system, whatever the user allows."""
    for name in (n for o in outlines for n in o.names):
        module, _, function = name.rpartition(".")
        builtin = module == "builtins" and function in _BUILTINS.split()
        if builtin or module.partition(".")[0] in _SYSTEM.split():
            raise InputError(
                f"{path}: refused, its pickle calls {name}",
                why="weights never need that: the file would run commands on this computer; "
                "nothing of it was run",
                fix="delete it and get the weights as .safetensors from a source that you trust",
                code="checkpoint-unsafe",
            )


def refused(path: Path, what: str, *, called: str) -> InputError:
    """The InputError for a file that only Python's own unpickler could read."""
    return InputError(
        f"{path}: {what}",
        why=f"reading it could run code{f': it calls {called}' if called else ''}",
        fix=f"if you trust its author: seprune convert --allow-pickle {shell_word(path)}",
        code="checkpoint-pickled",
    )


def _is_module_state(part: object) -> bool:
    return isinstance(part, dict) and "_modules" in part and "_parameters" in part


def _below(name: str, key: object) -> str:
    """The dotted path of an entry; keys that are no texts (or far too long) are only hinted at."""
    own = key[:LONGEST] if isinstance(key, str) else f"({type(key).__name__})"
    own = str(key) if type(key) is int and abs(key) < MOST_NUMBERS else own
    return (f"{name}.{own}" if name else own)[:LONGEST]


def _walk(root: object) -> Iterator[tuple[str, object]]:
    """Every object below `root`, outer first and in order, with its dotted path."""
    todo: list[tuple[str, object]] = [("", root)]
    seen: set[int] = set()
    while todo:
        name, item = todo.pop()
        yield name, item
        if id(item) in seen:
            continue
        seen.add(id(item))
        inner: list[tuple[str, object]] = []
        if isinstance(item, dict):
            inner += [(_below(name, key), value) for key, value in item.items()]
        if isinstance(item, Inert):
            inner += [(name, part) for part in item.parts]
        elif isinstance(item, list | tuple | set | frozenset):
            inner += [(name, part) for part in item]
        todo += reversed(inner)
