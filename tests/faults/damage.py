"""Damaged bytes: what is damaged and how, who reads it, and which outcomes are allowed."""

from __future__ import annotations

import json
import select
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evil
import numpy as np
import torch
from PIL import Image

from seprune.files import write_sums
from seprune.models import build
from seprune.recipe import recipe_folder
from seprune.saved import Architecture, save

LIMIT_SECONDS = 10
Step = tuple[str, float, int, bytes]  # kind, where (0 to 1), bit, bytes
HOW = ("flip", "cut", "extend", "zero", "delete", "copy")


class Crash(AssertionError):
    """The reader died or did not answer."""


class Reader:
    """The long-lived child that reads the damaged files; started anew after a crash."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("reader.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def __call__(self, kind: str, path: Path, limit: float = LIMIT_SECONDS) -> dict[str, object]:
        self.process.stdin.write(f"{kind}\t{path}\n")
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        if not ready:
            raise Crash(f"hang: no answer within {limit} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            said = self.process.stderr.read()[-3000:]
            raise Crash(f"death: status {self.process.returncode}: {said}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def damage(content: bytes, steps: list[Step]) -> bytes:
    """Apply flips, cuts, insertions, zeroed, deleted and copied ranges."""
    changed = bytearray(content)
    for kind, where, bit, extra in steps:
        at = min(int(where * len(changed)), len(changed) - 1)
        end = at + len(extra)
        if not changed:
            break
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
        else:
            changed[at:at] = changed[at // 2 : at // 2 + len(extra)]
    return bytes(changed)


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

    def __init__(self, target: Target, folder: Path, reader: Reader) -> None:
        self.target, self.folder, self.reader = target, folder, reader
        folder.mkdir(exist_ok=True)
        target.make(folder / target.file)
        self.content = (folder / target.file).read_bytes()
        # importing torch and building a network are not the damage's fault
        self.whole = reader(target.reader, target.path(folder), limit=120)

    def shoot(self, steps: list[Step]) -> dict[str, object]:
        """Damage it and read it.

        Raises:
            Crash: the reader died or hung.
            AssertionError: an outcome that is not allowed.
        """
        file, broken = self.folder / self.target.file, damage(self.content, steps)
        file.write_bytes(broken)
        if self.target.signed:
            write_sums(self.folder)
        found = self.reader(self.target.reader, self.target.path(self.folder))
        assert file.read_bytes() == broken, "the input was changed"
        if "code" in found:
            assert found["status"] in self.target.statuses
            assert found["parts"]
        elif self.target.checked:
            assert found == self.whole, "wrong values, and nothing was said"
        return found
