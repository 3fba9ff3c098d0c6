"""Damaged bytes: what is damaged and how, who reads it, and which outcomes are allowed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evil
import numpy as np
import torch
from child import Child
from PIL import Image

from seprune.export.architecture import Architecture
from seprune.export.pruned_model import save
from seprune.models import build
from seprune.recipe import recipe_folder
from seprune.runtime.files import write_sums

Step = tuple[str, float, int, bytes]  # kind, where (0 to 1), bit, bytes
HOW = ("flip", "cut", "extend", "zero", "delete", "copy")
KINDS = (*HOW, "empty")


def damage(content: bytes, steps: list[Step]) -> bytes:
    """Apply flips, cuts, insertions, zeroed, deleted, copied ranges, and emptying."""
    changed = bytearray(content)
    for kind, where, bit, extra in steps:
        if not changed:
            break
        at = min(int(where * len(changed)), len(changed) - 1)
        end = at + len(extra)
        if kind == "flip":
            changed[at] ^= 1 << bit
        elif kind == "cut":
            del changed[at:]
        elif kind == "extend":
            changed[at:at] = extra
        elif kind == "zero":
            changed[at:end] = bytes(len(changed[at:end]))
        elif kind == "delete":
            del changed[at:end]
        elif kind == "copy":
            changed[at:at] = changed[at // 2 : at // 2 + len(extra)]
        else:
            changed.clear()
    return bytes(changed)


def random_steps(source: random.Random, *, empty: float = 0) -> list[Step]:
    """One to three damages; with probability `empty`, one is the loss of all content."""
    return [
        (
            "empty" if empty and source.random() <= empty else source.choice(HOW),
            source.random(),
            source.randrange(8),
            source.randbytes(source.randint(1, 40)),
        )
        for _ in range(source.randint(1, 3))
    ]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        reader: a key of `reader.READERS`.
        file: the name of the file that is damaged.
        make: writes a good one.
        checked: damage is refused or changes nothing, since all that matters has a checksum.
        signed: the checksums beside it are made to fit again, as a hostile hand would.
    """

    reader: str
    file: str
    make: Callable[[Path], object]
    statuses: tuple[int, ...] = (3,)
    checked: bool = False
    signed: bool = False

    def path(self, folder: Path) -> Path:
        """What the reader is given."""
        return folder if self.reader == "folder" else folder / self.file


def _image(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def _saved(path: Path) -> None:
    torch.manual_seed(0)
    save(build("seprune/se_resnet8"), path.parent, Architecture("seprune/se_resnet8"))


def _recipe(path: Path) -> None:
    shutil.copy(recipe_folder() / "cifar10-seresnet20.yaml", path)


TARGETS: dict[str, Target] = {
    ".pth": Target("weights", "w.pth", evil.good, checked=True),
    ".safetensors": Target("weights", "w.safetensors", evil.good),
    ".pth of torch < 1.6": Target("weights", "w.old", evil.good),
    "JPEG": Target("image", "x.jpg", _image),
    "PNG": Target("image", "x.png", _image),
    "recipe": Target("recipe", "r.yaml", _recipe, statuses=(2,)),
    "saved folder": Target("folder", "config.json", _saved, checked=True),
    "saved folder, signed": Target("folder", "config.json", _saved, statuses=(2, 3), signed=True),
}


class Range:
    """A good input of one kind, damaged over and over."""

    def __init__(self, target: Target, folder: Path, reader: Child) -> None:
        self.target, self.folder, self.reader = target, folder, reader
        folder.mkdir(exist_ok=True)
        target.make(folder / target.file)
        self.content = (folder / target.file).read_bytes()
        # importing torch and building a network are not the damage's fault
        self.undamaged = reader([target.reader, target.path(folder)], limit=120)

    def shoot(self, steps: list[Step]) -> str | dict[str, object]:
        """Damage it and read it; the digest of what was read, or the error.

        Raises:
            Crash: the reader died or hung.
            AssertionError: an outcome that is not allowed.
        """
        file, broken = self.folder / self.target.file, damage(self.content, steps)
        file.write_bytes(broken)
        if self.target.signed:
            write_sums(self.folder)
        found = self.reader([self.target.reader, self.target.path(self.folder)])
        assert file.read_bytes() == broken, "the input was changed"
        if isinstance(found, dict):
            assert found["status"] in self.target.statuses
            assert found["parts"]
        elif self.target.checked:
            assert found == self.undamaged, "wrong values without an error"
        return found


class Damaged:
    """A finished run of which one file at a time is damaged, looked at, and put back."""

    def __init__(self, run: Path, checker: Child):
        self.run, self.checker = run, checker
        self.good = {
            p.relative_to(run).as_posix(): p.read_bytes()
            for p in sorted(run.rglob("*"))
            if p.is_file() and p.stat().st_size
        }
        self.right = checker([run, ""], limit=120)
        assert self.right.pop("verify") == []

    def check(self, name: str, steps: list[Step]) -> bool:
        """Damage one file: what is read is right or refused, and `verify` finds the damage.

        Returns whether the damage changed the file at all.
        """
        broken = damage(self.good[name], steps)
        path = self.run / name
        path.write_bytes(broken)
        try:
            found = self.checker([self.run, name])
            assert path.read_bytes() == broken, f"{name} was changed"
        finally:
            path.write_bytes(self.good[name])
        if broken == self.good[name]:
            assert found.pop("verify") == []
            return False
        # a journal may end in the middle of a line: that is what a power loss leaves
        problems = found.pop("verify")
        assert problems or name == "journal.jsonl", f"{name}: the damage is not found"
        for reader, answer in found.items():
            right = self.right[reader]
            refused = isinstance(answer, dict) and answer["status"] == 3 and answer["parts"]
            assert answer == right or refused, f"{reader} of {name}: {answer}"
        return True
