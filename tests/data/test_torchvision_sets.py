"""Data sets of torchvision whose images are files, which are read as any image is."""

from __future__ import annotations

import bz2
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from seprune.data import DataSettings, open_data, sources
from seprune.errors import InputError

Save = Callable[[Path], None]
KINDS = ("cat", "dog")
EACH = 4


def dtd(root: Path, save: Save) -> None:
    for part in ("train", "test"):
        names = [f"{k}/{part}{n}.jpg" for k in KINDS for n in range(EACH)]
        for name in names:
            save(root / "dtd/dtd/images" / name)
        lists = root / "dtd/dtd/labels"
        lists.mkdir(exist_ok=True)
        (lists / f"{part}1.txt").write_text("\n".join(names))


def pets(root: Path, save: Save) -> None:
    for part in ("trainval", "test"):
        rows = [f"{k}_{part}{n} {i + 1} 1 1" for i, k in enumerate(KINDS) for n in range(EACH)]
        for row in rows:
            save(root / "oxford-iiit-pet/images" / f"{row.split()[0]}.jpg")
        lists = root / "oxford-iiit-pet/annotations"
        lists.mkdir(exist_ok=True)
        (lists / f"{part}.txt").write_text("\n".join(rows))


def signs(root: Path, save: Save) -> None:
    rows = ["Filename;ClassId"]
    for number in range(EACH * len(KINDS)):
        save(root / f"gtsrb/GTSRB/Training/{number % 2:05}/{number}.ppm")
        save(root / f"gtsrb/GTSRB/Final_Test/Images/{number}.ppm")
        rows.append(f"{number}.ppm;{number % 2}")
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(rows))


def countries(root: Path, save: Save) -> None:
    for part in ("train", "test"):
        for kind in KINDS:
            for number in range(EACH):
                save(root / "country211" / part / kind / f"{number}.jpg")


def food(root: Path, save: Save) -> None:
    (root / "food-101/meta").mkdir(parents=True)
    for part in ("train", "test"):
        names = {k: [f"{k}/{part}{n}" for n in range(EACH)] for k in KINDS}
        for name in (name for own in names.values() for name in own):
            save(root / "food-101/images" / f"{name}.jpg")
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(names))


def aircraft(root: Path, save: Save) -> None:
    data = root / "fgvc-aircraft-2013b/data"
    for part in ("trainval", "test"):
        rows = [f"{k}{part}{n} {k}" for k in KINDS for n in range(EACH)]
        for row in rows:
            save(data / "images" / f"{row.split()[0]}.jpg")
        (data / f"images_variant_{part}.txt").write_text("\n".join(rows))
    (data / "variants.txt").write_text("\n".join(KINDS))


def imagenette(root: Path, save: Save) -> None:
    for part in ("train", "val"):
        for kind in ("n01440764", "n02102040"):
            for number in range(EACH):
                save(root / "imagenette2" / part / kind / f"{number}.JPEG")


SETS = {"DTD": dtd, "OxfordIIITPet": pets, "GTSRB": signs, "Country211": countries,
        "Food101": food, "FGVCAircraft": aircraft, "Imagenette": imagenette}  # fmt: skip


def coloured(path: Path) -> None:
    """Bright for the second class, dark for the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    level = 200 if any(k in str(path) for k in ("dog", "00001", "n02102040")) else 40
    Image.new("RGB", (6, 5), (level,) * 3).save(path)


@pytest.fixture(params=SETS)
def there(request, tmp_path) -> str:
    SETS[request.param](tmp_path, coloured)
    return f"torchvision/{request.param}:{tmp_path}"


def opened(source: str):
    settings = DataSettings(mean=(0,) * 3, std=(1,) * 3, input=(3, 5, 6), crop=None, workers=0)
    return open_data(source, settings)


def test_images_and_labels_belong_together(there):
    data = opened(there)
    images, labels = next(iter(data.calibration(99)))
    assert len(labels) == data.info.training
    bright = images.mean((1, 2, 3)) > 0.5
    assert bright.tolist() == (labels == 1).tolist()
    assert 0 < int(labels.sum()) < len(labels)


def test_no_file_reaches_an_interpreter_or_is_waited_for(there, tmp_path, monkeypatch):
    """PostScript under the name of a JPEG, which Pillow alone hands to Ghostscript; a pipe."""
    canary, tools = tmp_path / "canary", tmp_path / "tools"
    tools.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\ntouch '{canary}'\n")
    (tools / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".ppm"))
    for path in files:
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\nshowpage\n%%EOF\n")
    with pytest.raises(InputError, match="cannot be decoded"):
        opened(there).decode()
    assert not canary.exists()
    files[0].unlink()
    os.mkfifo(files[0])
    with pytest.raises(InputError, match="not a regular file"):
        opened(there)


def test_numbers_that_are_no_classes_are_refused(tmp_path):
    signs(tmp_path, coloured)
    table = tmp_path / "gtsrb/GT-final_test.csv"
    for number in (10**12, -1, 10**30):
        table.write_text(f"Filename;ClassId\n0.ppm;{number}\n")
        with pytest.raises(InputError, match="torchvision cannot open it"):
            opened(f"torchvision/GTSRB:{tmp_path}")


def test_tables_that_are_damaged_are_refused(tmp_path):
    food(tmp_path, coloured)
    for text in ("[" * 100_000, "[]", "3", '{"cat": 3}', '{"cat": [], "dog": []}', ""):
        (tmp_path / "food-101/meta/train.json").write_text(text)
        with pytest.raises(InputError, match="torchvision cannot open it"):
            opened(f"torchvision/Food101:{tmp_path}")


def test_what_unpacks_to_far_more_than_its_files_is_refused(tmp_path, monkeypatch):
    """Some hundred bytes of digits that become ten million lines."""
    monkeypatch.setattr(sources, "OPEN_MEMORY", 64 << 20)
    (tmp_path / "usps.bz2").write_bytes(bz2.compress(b"\n" * 10**7))
    with pytest.raises(InputError, match="torchvision cannot open it") as caught:
        opened(f"torchvision/USPS:{tmp_path}")
    assert caught.value.why == "MemoryError"
    monkeypatch.setattr(sources, "OPEN_MEMORY", 4 << 30)
    monkeypatch.setattr(sources, "OPEN_SECONDS", 0.01)
    with pytest.raises(InputError, match="torchvision cannot open it") as caught:
        opened(f"torchvision/USPS:{tmp_path}")
    assert "no end within" in caught.value.why
