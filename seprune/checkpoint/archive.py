"""The zip that torch.save writes, checked before torch sees it: sizes, checksums, completeness."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from seprune.checkpoint.pickles import PICKLE_LIMIT
from seprune.checkpoint.sniff import damaged, incomplete, refuse

CHUNK = 1 << 20
FOLDER = 0x10  # the MS-DOS attribute: torch returns uninitialised memory for such a record
_SAVE = "in the script that made it: torch.save(model.state_dict(), 'weights.pth')"


@dataclass(frozen=True)
class Archive:
    """A zip checkpoint that is safe to hand to torch as far as sizes go.

    Attributes:
        pickle: the record that describes the objects.
        sizes: bytes of each record, named as in the pickle (`data/17`).
        broken: records whose bytes do not match their checksum.
        checked: False when the writer left the checksums out (torch's set_crc32_options).
    """

    pickle: bytes
    sizes: dict[str, int]
    broken: tuple[str, ...]
    checked: bool


def preflight(path: Path) -> Archive:
    """Check a zip checkpoint without inflating or allocating more than its own size.

    Raises:
        InputError: incomplete, damaged, compressed, or a zip file that torch.save did not write.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _check(path, archive)
    except zipfile.BadZipFile as error:
        if str(error) == "File is not a zip file":
            incomplete(path, "the table of contents at its end is missing")
        damaged(path, f"its table of contents contradicts the file ({error})")
    # encrypted, an unknown compression, an offset outside of the file, a name that is no text
    except (RuntimeError, NotImplementedError, ValueError, EOFError, struct.error) as error:
        damaged(path, f"its table of contents contradicts the file ({error})")


def _check(path: Path, archive: zipfile.ZipFile) -> Archive:
    records = archive.infolist()
    names = archive.namelist()
    if len(set(names)) != len(names):
        damaged(path, "its table of contents names a record twice")
    folders = [record.filename for record in records if record.external_attr & FOLDER]
    if folders:
        damaged(path, f"its table of contents calls the record {folders[0]} a folder")
    main = _main_record(path, names)
    _refuse_bomb(path, records)
    checked = any(record.CRC for record in records)
    broken = tuple(_broken(archive)) if checked else ()
    if main in broken:
        damaged(path, f"the record {main}, which describes the tensors, fails its checksum")
    info = archive.getinfo(main)
    if info.file_size > PICKLE_LIMIT:
        damaged(path, f"{info.file_size:,} bytes of Python objects beside the tensors")
    top = len(main) - len("data.pkl")
    sizes = {record.filename[top:]: record.file_size for record in records}
    return Archive(_stored(path, info), sizes, tuple(name[top:] for name in broken), checked)


def _refuse_bomb(path: Path, records: list[zipfile.ZipInfo]) -> None:
    size = path.stat().st_size
    total = sum(record.file_size for record in records)
    packed = [record for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed or total > size:
        largest = max(packed or records, key=lambda record: record.file_size)
        refuse(
            path,
            f"its {size:,} bytes would become {total:,}",
            why=f"the record {largest.filename} is compressed or overlaps another, "
            "and torch.save writes neither",
            fix="get the original file; if you packed it yourself, unpack it and use `zip -0 -r`",
            code="checkpoint-bomb",
        )


def _main_record(path: Path, names: list[str]) -> str:
    found = [name for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
    inner = {name.partition("/")[2] for name in names}
    unsupported = ""
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        unsupported = "a TorchScript archive"
    elif "archive_format" in inner:
        unsupported = "a torch.export program (.pt2)"
    elif "model.weights.h5" in names:
        unsupported = "a Keras file"
    elif names and all(name.endswith(".npy") for name in names):
        unsupported = "a NumPy .npz archive"
    elif len(found) != 1 or len({name.partition("/")[0] for name in names}) != 1:
        first = ", ".join(repr(name) for name in names[:3]) or "nothing"
        what = f"it is a zip archive that torch.save did not write (it holds {first})"
        fix = "unpack it and name the file inside"
        refuse(path, what, fix=fix, code="checkpoint-unsupported")
    if unsupported:
        why = "that format is not supported: seprune reads the weights of eager PyTorch models"
        refuse(path, f"it is {unsupported}", why=why, fix=_SAVE, code="checkpoint-unsupported")
    return found[0]


def _broken(archive: zipfile.ZipFile) -> Iterator[str]:
    for record in archive.infolist():
        try:
            with archive.open(record) as stream:
                while stream.read(CHUNK):
                    pass
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise
            yield record.filename


def _stored(path: Path, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a stored record; unlike ZipFile.read also where the checksum was left out."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
        stream.seek(name + extra, 1)
        return stream.read(info.file_size)
