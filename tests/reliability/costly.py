"""Pickles of at most a megabyte that would take hours or terabytes, each in another way."""

from __future__ import annotations

import struct


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _called(name: str, argument: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return f"c{module}\n{function}\n".encode() + argument + b"\x85R"


def _doubled(first: bytes, both: bytes) -> bytes:
    """`both` of two of the one before, 40 times; all but the last are taken off the stack."""
    again = (
        both.replace(b"%", b"h" + bytes([n, 104, n])) + b"q" + bytes([n + 1]) for n in range(40)
    )
    return first + b"q\x00" + b"".join(b"0" + made for made in again)


def _wide_tuple() -> bytes:
    """(t, t) of (t, t) and so on: hashing it takes 2**40 steps."""
    return _doubled(b"N\x85", b"%\x86")


def _deep_names() -> bytes:
    """10,000 dicts in each other under one key of a megabyte: names in a message grow with them."""
    return b"}" + _text("k" * (1 << 20)) + b"q\x00" + b"}h\x00" * 10_000 + b"N" + b"s" * 10_001


def _alike() -> bytes:
    """A dict of 60,000 keys whose hashes are all 0."""
    keys = (n * (2**61 - 1) for n in range(60_000))
    spelled = (b"\x8a" + bytes([len(k := n.to_bytes(10, "little"))]) + k for n in keys)
    return b"}(" + b"".join(key + b"N" for key in spelled) + b"u"


def _hexadecimal() -> bytes:
    """Each call doubles what it is given; the result is thrown away."""
    made = b"c_codecs\nencode\n" * 36 + _text("x" * 1000) + _text("latin1") + b"\x86R"
    return made + (_text("hex") + b"\x86R") * 35 + b"0" + _called("_codecs.encode", _text("x"))


def _list_of_lists() -> bytes:
    """The text of this list has 2**40 brackets."""
    return _doubled(b"]", b"](%e")


def _digits(count: int = 6000) -> bytes:
    """An integer of more digits than Python spells out."""
    return b"\x8b" + struct.pack("<I", count) + b"\x11" * count


def _storage(numel: bytes) -> bytes:
    """A storage of so many elements."""
    parts = _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + numel
    return b"(" + parts + b"tQ"


def _made() -> dict[str, bytes]:
    entry = b"}" + _text("w")
    pairs = b"](" + _wide_tuple() + b"N\x86e"
    parts = _text("p" * (1 << 19)) + b"q\x00" + b"h\x00" * 200_000
    return {
        "a tuple as a key": b"}" + _wide_tuple() + b"Ns",
        "a tuple in a set": _called("__builtin__.set", b"](" + _wide_tuple() + b"e"),
        "a tuple in pairs": _called("collections.OrderedDict", pairs),
        "names in names": _deep_names(),
        "hashes that are alike": _alike(),
        "hexadecimal": entry + _hexadecimal() + b"s",
        "a list as a type": entry + _called("numpy.dtype", _list_of_lists()) + b"s",
        "a path of parts": entry + b"cpathlib\nPosixPath\n(" + parts + b"tRs",
        "a key of digits": b"}" + _digits() + b"Ns",
        "a key of digits above a dict": b"}" + _digits() + entry + b"Nss",
        "a storage of digits": entry + _storage(_digits()) + b"s",
        "a storage of less than nothing": entry + _storage(b"J\xff\xff\xff\xff") + b"s",
    }


PICKLES = {name: b"\x80\x02" + content + b"." for name, content in _made().items()}
