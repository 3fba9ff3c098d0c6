"""Image folders from the real world, given to the real command line."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpus import NET
from folders import stages, untouched
from PIL import Image

BYTES = np.random.default_rng(0)
MODEL = (NET, "--classes", "2", "--input", "3x16x16")


def folder(root: Path, *, train: int = 4, val: int = 2, size: int = 16) -> Path:
    """train/ and val/ of two classes, as JPEG files."""
    for part, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                write(root / part / name / f"{i:04d}.jpg", size)
    return root


def write(path: Path, size: int = 16) -> None:
    pixels = BYTES.integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def bomb(path: Path) -> None:
    """A PNG of 20,000 x 20,000 pixels in 70 bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-80])


def postscript(path: Path) -> None:
    """Pillow would hand it to Ghostscript, whatever its name."""
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    )


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "the image cannot be decoded"),
    "empty": (lambda p: p.write_bytes(b""), "the image file is empty (0 bytes)"),
    "HTML": (lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), "not an image but an HTML page"),
    "LFS": (
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "not an image but a git-LFS pointer",
    ),
    "noise": (lambda p: p.write_bytes(BYTES.bytes(999)), "the image cannot be decoded"),
    "400 Mpixel": (bomb, "the image is too large to decode safely"),
    "PostScript": (postscript, "the image cannot be decoded"),
    "a folder": (lambda p: (p.unlink(), p.symlink_to(p.parent / "gone")), "cannot be read"),
}


UNSEEN = ("truncated", "noise", "400 Mpixel", "PostScript")  # by a look at the first bytes


def commands(data: Path, out: Path) -> dict[str, list[object]]:
    """Commands that look at training images, at reporting images, at both."""
    recipe = out / "r.yaml"
    recipe.write_text(
        f"name: x\nmodel: {{name: {NET}, input: [3, 16, 16]}}\ndata: {{source: '{data}'}}\n"
        "train: {epochs: 1}\nimportance: {criterion: l2}\nprune: {recover: none}\n"
        "finetune: {epochs: 0, recalibrate: 0}\nreport: {latency: false, html: false}\n"
        "plan: {macs: 0.8, min_channels: 2}\n"
    )
    budget = ("--macs", "0.8", "--importance", "l2", "--set", "plan.min_channels=2")
    return {
        "train": ["prune", *MODEL, "--data", data, *budget, "--recover", "bn", "--out", out / "p"],
        "val": ["evaluate", *MODEL, "--data", data],
        "run": ["run", recipe, "--out", out / "run"],
    }


@pytest.fixture
def ghostscript(tmp_path, canary) -> dict[str, str]:
    """A PATH on which Ghostscript leaves a trace."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch '{canary}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    return {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


@pytest.mark.fault(22)
@pytest.mark.parametrize("cache", ["memory", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_at_every_door(terminal, canary, ghostscript, tmp_path, name, cache):
    damage, says = BAD[name]
    sets = ["data.workers=0", f"data.cache={cache}"]
    for door, part in (("train", "train"), ("val", "val"), ("run", "val")):
        if (cache, door) == ("none", "run") and name in UNSEEN:
            continue  # that takes decoding: too much for a large data set before anything else
        data, out = tmp_path / f"Bilder ü {door}", tmp_path / door
        out.mkdir()
        bad = folder(data) / part / "dog" / "0001.jpg"
        damage(bad)
        more = sets if door == "run" else [w for x in sets for w in ("--set", x)]
        with untouched(data):
            command = commands(data, out)[door]
            ended = terminal(*command, *more, "--json", env=ghostscript, memory=256)
        assert ended.refused(3, "input", says=says)["what"].startswith(f"{bad}: ")
        nothing_done(out / "run")  # not after the hours of training


def nothing_done(run: Path) -> None:
    """No stage is in the journal, and no training has begun."""
    assert not (run / "trained").exists()
    assert stages(run) == []


def show(path: Path, mode: str) -> None:
    """A grey image in any mode that files have."""
    if mode == "I;16":
        Image.fromarray(np.full((16, 16), 0x8100, np.uint16)).save(path, format="PNG")
    elif mode == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (16, 16), (129, 129, 129)).save(path, format="JPEG", exif=exif)
    else:
        kind = "TIFF" if mode == "CMYK" else "PNG"
        Image.new("L", (16, 16), 129).convert(mode).save(path, format=kind)


@pytest.mark.fault(22)
def test_every_mode_is_an_image_like_the_others(terminal, tmp_path):
    data = folder(tmp_path / "d")
    modes = ["P", "CMYK", "I;16", "L", "RGBA", "LA", "1", "rotated"]
    for number, mode in enumerate(modes):
        show(data / "val" / "cat" / f"mode{number}.jpg", mode)
    ended = terminal("evaluate", *MODEL, "--data", data, "--json")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["count"] == 2 * 2 + len(modes)
    assert json.loads(ended.out)["nonfinite"] == 0


@pytest.mark.fault(22)
def test_one_in_a_thousand_may_be_skipped_and_is_listed(terminal, tmp_path):
    data = folder(tmp_path / "d", train=0)
    for name in ("cat", "dog"):
        write(data / "train" / name / "0000.jpg")
        for number in range(1, 500):
            os.link(data / "train" / name / "0000.jpg", data / "train" / name / f"{number:04d}.jpg")
    for name in ("cat", "dog"):
        (data / "train" / name / "0001.jpg").unlink()
    bad = data / "train" / "cat" / "0001.jpg"
    bad.write_bytes(b"<html>")
    write(data / "train" / "dog" / "0001.jpg")
    command = commands(data, tmp_path)["run"]
    words = [*command, "data.on_bad_image=skip", "train=null", "--json"]
    ended = terminal(*words, seconds=60)
    assert ended.status == 0, ended.err
    listed = json.loads(ended.out)["data"]["skipped"]
    assert listed == [f"{bad}: not an image but an HTML page"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["skipped"] == listed
    (data / "train" / "dog" / "0001.jpg").write_bytes(b"")
    ended = terminal(*words)
    says = "2 of 1000 training images are damaged, more than the 0.1% that may be skipped"
    assert str(bad) in ended.refused(3, "input", says=says)["why"]


@pytest.mark.fault(22)
def test_evaluation_never_skips(terminal, tmp_path):
    data = folder(tmp_path / "d")
    truncated(data / "val" / "cat" / "0001.jpg")
    words = ("evaluate", *MODEL, "--data", data, "--set", "data.on_bad_image=skip", "--json")
    terminal(*words).refused(3, "input", says="val/cat/0001.jpg: the image cannot be decoded")


def _empty(data: Path) -> None:
    for part in ("train", "val"):
        (data / part / "mouse").mkdir()


def _differ(data: Path) -> None:
    (data / "val" / "dog").rename(data / "val" / "hound")


def _closed(data: Path) -> None:
    (data / "train" / "cat" / "0002.jpg").chmod(0)


def _closed_folder(data: Path) -> None:
    (data / "val" / "dog").chmod(0)


LAYOUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty class": (_empty, "train/mouse: the class folder holds no images"),
    "classes that differ": (_differ, "only in train: dog; only in val: hound"),
    "unreadable file": (_closed, "train/cat/0002.jpg: the image cannot be read\nPermission denied"),
    "unreadable folder": (_closed_folder, "val/dog: cannot be read\nPermission denied"),
    "no val": (lambda d: (d / "val").rename(d / "vla"), "it has no val/"),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("door", ["val", "train", "run"])
def test_layouts_are_checked_before_any_work(terminal, tmp_path, name, door):
    damage, says = LAYOUTS[name]
    data = folder(tmp_path / "d")
    command = commands(data, tmp_path)[door]
    damage(data)
    ended = terminal(*command, "--json", ordinary=True)
    ended.refused(3, "input", says=says)
    nothing_done(tmp_path / "run")
    if name == "unreadable folder":
        (data / "val" / "dog").chmod(0o755)  # for whoever clears up
