"""Data sets of other projects: `hf:` and `wds:`, every image once, and what is odd is named."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Hub, serving
from PIL import Image

from seprune.data import DataSettings, fingerprint, open_data
from seprune.data.fingerprint import difference
from seprune.errors import EnvironmentFault, InputError, SepruneError, UsageError

COUNT = 25


def image(number: int, mode: str = "RGB") -> Image.Image:
    """An image of one colour that says which it is."""
    return Image.new("L", (6, 5), 10 * number).convert(mode)


def png(number: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    image(number, mode).save(buffer, "PNG")
    return buffer.getvalue()


def seen(loader) -> list[tuple[int, int]]:
    """(number of the image, label) of everything that a loader of raw pixels gives."""
    found = []
    for images, labels in loader:
        levels = (images[:, 0, 0, 0] * 255).round().int() // 10
        found += list(zip(levels.tolist(), labels.tolist()))
    return found


def raw(source: str, **given: object):
    return open_data(source, DataSettings(mean=(0,) * 3, std=(1,) * 3, input=(3, 5, 6), crop=None,
                                          validation=0, workers=0, **given))  # fmt: skip


# -- hf: -----------------------------------------------------------------------------------------


@pytest.fixture
def sets():
    return pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture
def save(sets, tmp_path):
    """Write a data set as `save_to_disk` does: the source's name."""

    def write(parts: dict[str, dict[str, list[object]]], kind: object = None) -> str:
        made = {}
        for part, columns in parts.items():
            table = sets.Dataset.from_dict(columns)
            if "image" in columns:
                table = table.cast_column("image", sets.Image())
            if kind is not None:
                table = table.cast_column("label", kind)
            made[part] = table
        sets.DatasetDict(made).save_to_disk(str(tmp_path / "set"))
        return f"hf:{tmp_path / 'set'}"

    return write


def columns(numbers, label=lambda n: n % 3, mode="RGB") -> dict[str, list[object]]:
    return {"image": [{"bytes": png(n, mode), "path": None} for n in numbers],
            "label": [label(n) for n in numbers]}  # fmt: skip


def test_both_splits_are_seen_once_with_the_names_of_their_classes(sets, save):
    kind = sets.ClassLabel(names=["cat", "ant", "bee"])
    source = save({"train": columns(range(15)), "test": columns(range(15, COUNT))}, kind)
    data = raw(source)
    assert data.info.classes == ("cat", "ant", "bee")  # their order is that of the numbers
    assert sorted(seen(data.calibration(99))) == [(n, n % 3) for n in range(15)]
    assert seen(data.reporting(4)) == [(n, n % 3) for n in range(15, COUNT)]
    assert "train trains, test reports" in data.info.notes


def test_names_as_labels_are_sorted_and_one_split_is_divided_with_a_note(save):
    data = raw(save({"train": columns(range(COUNT), lambda n: "zyx"[n % 3])}))
    assert data.info.classes == ("x", "y", "z")
    both = seen(data.calibration(99)) + seen(data.reporting())
    assert sorted(both) == [(n, 2 - n % 3) for n in range(COUNT)]
    assert data.info.reporting == 6  # of 9, 8 and 8 images a fifth each: 2, 2 and 2
    assert any("are set aside" in note for note in data.info.notes)


def test_a_split_can_be_named_and_cut(save):
    parts = {"train": columns(range(10)), "validation": columns(range(10, 15)),
             "test": columns(range(15, COUNT))}  # fmt: skip
    source = save(parts)
    assert raw(source).info.reporting == 5  # validation before test
    assert [n for n, _ in seen(raw(f"{source}:test").reporting())] == list(range(15, COUNT))
    cut = raw(f"{source}:train[:6],test[50%:]")
    assert sorted(n for n, _ in seen(cut.calibration(99))) == list(range(6))
    assert [n for n, _ in seen(cut.reporting())] == list(range(20, COUNT))


def test_grey_images_stay_grey_and_four_channels_are_asked_for(save):
    source = save({"train": columns(range(COUNT), mode="L")})
    assert open_data(source).info.preprocessing.shape == (1, 5, 6)
    assert raw(source).info.preprocessing.shape == (3, 5, 6)
    source = save({"train": columns(range(COUNT), mode="RGBA")})
    assert open_data(source).info.preprocessing.shape == (3, 5, 6)
    four = open_data(source, DataSettings(input=(4, 5, 6)))
    assert four.info.preprocessing.shape == (4, 5, 6)


def test_fingerprints_follow_pixels_and_labels(save):
    source = save({"train": columns(range(COUNT))})
    first = raw(source).info.fingerprint
    assert raw(source).info.fingerprint == first
    pixels = raw(save({"train": columns(range(1, COUNT + 1), lambda n: (n - 1) % 3)}))
    assert "the same names" in difference(first, pixels.info.fingerprint)
    labels = raw(save({"train": columns(range(COUNT), lambda n: (n + 1) % 3)})).info.fingerprint
    assert "other files" in difference(first, labels)


def test_one_image_that_changes_in_its_place_is_seen_wherever_it_stands(save, shards, monkeypatch):
    """Not only among those whose content is looked at."""
    monkeypatch.setattr(fingerprint, "SAMPLED", 1)
    table = save({"train": columns(range(COUNT))})
    files = {f"wds:{shards}": shards / "train-004.tar"}
    files[table] = next(Path(table.removeprefix("hf:")).rglob("*.arrow"))
    was, now = png(24), png(23)
    assert len(was) == len(now)
    for source, path in files.items():
        first = raw(source).info.fingerprint
        content = path.read_bytes()
        assert content.count(was) == 1
        path.write_bytes(content.replace(was, now))
        assert "the same names" in difference(first, raw(source).info.fingerprint)


ODD = {
    "no labels": ({"train": {"image": columns(range(9))["image"]}}, "", "no column of labels"),
    "no images": ({"train": {"label": [0, 1]}}, "", "no column of images"),
    "secret labels": ({"train": columns(range(9)), "test": columns(range(9), lambda n: -1)}, "",
                      "row 0: label is -1, which is no class"),
    "no rows": ({"train": columns(range(9)), "test": columns(range(9))}, ":test[9:]",
                "holds no rows"),
    "no split": ({"train": columns(range(9))}, ":tset", "there is no split tset"),
    "odd part": ({"train": columns(range(9))}, ":train[a:b]", "is no part of a split"),
    "three": ({p: columns(range(9)) for p in ("train", "val", "test")}, ":train,val,test",
              "more than two splits"),
    "new class": ({"train": columns(range(9), lambda n: "ab"[n % 2]),
                   "test": columns(range(9), lambda n: "abc"[n % 3])}, "", "class 'c' is only in"),
    "a huge one": ({"train": columns(range(9), lambda n: 10**9 if n else 0)}, "",
                   "row 1: label is 1000000000"),
    "one unknown": ({"train": columns(range(9), lambda n: n or None)}, "", "row 0: label is None"),
    "fractions": ({"train": columns(range(9), lambda n: n / 2)}, "", "which is no class"),
    "damaged": ({"train": {"image": [{"bytes": png(n)[:40], "path": None} for n in range(9)],
                           "label": [0] * 9}}, "", "row 0: the image cannot be decoded"),
    "no content": ({"train": {"image": [None, *columns(range(8))["image"]], "label": [0] * 9}}, "",
                   "row 0: has no image"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_data_set_is_named_in_one_sentence(save, odd):
    parts, split, said = ODD[odd]
    with pytest.raises(SepruneError) as caught:
        raw(save(parts) + split).decode()
    assert said in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.fix
    assert caught.value.exit_status == 3


def test_a_disk_that_is_full_when_a_table_is_written_is_named(sets, tmp_path, monkeypatch):
    """The file that was fetched had room; what the library makes of it has none."""
    monkeypatch.setattr(sets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    table = sets.Dataset.from_dict(columns(range(COUNT))).cast_column("image", sets.Image())
    table.to_parquet(tmp_path / "set" / "train.parquet")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(EnvironmentFault, match="cannot be kept in the cache") as caught:
            raw(f"hf:{tmp_path / 'set'}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "let HF_HOME name a folder on another disk" in caught.value.fix
    assert len(seen(raw(f"hf:{tmp_path / 'set'}").training(5))) > 0  # nothing half-made stays


def test_a_damaged_table_is_named_by_what_is_wrong_with_it(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(sets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"image": 1, "label": 0}\n{"image": \n')
    with pytest.raises(InputError, match="`datasets` cannot read it") as caught:
        raw(f"hf:{tmp_path / 'set'}")
    assert "JSON" in caught.value.why
    assert "DatasetGenerationError" not in caught.value.why


def test_a_folder_that_is_none_of_theirs_is_named(sets, tmp_path, monkeypatch):
    """Also a reader of the library, which would look for files of its kind where one stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "train.pkl").write_bytes(b"cos\nsystem\n(S'touch run'\ntR.")
    (tmp_path / "text").mkdir()
    for name in (tmp_path, tmp_path / "missing", "pandas", "text", "parquet"):
        with pytest.raises(SepruneError) as caught:
            raw(f"hf:{name}")
        assert caught.value.fix
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_data_set_comes_from_a_hub_by_real_requests_and_refusals_are_named(sets, tmp_path):
    """Processes of their own, since the library reads HF_ENDPOINT when it is imported."""
    made = sets.Dataset.from_dict(columns(range(COUNT))).cast_column("image", sets.Image())
    made.to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    files = {"README.md": b"---\n---\n", "data/train-00000-of-00001.parquet": content}
    script = (
        "import sys, time\n"
        "from seprune.data import open_data\n"
        "from seprune.errors import SepruneError\n"
        "for source in sys.argv[1:]:\n"
        "    start = time.monotonic()\n"
        "    try:\n"
        "        found = open_data(source).info\n"
        "        said = f'{found.training + found.validation} {found.reporting}'\n"
        "    except SepruneError as error:\n"
        "        said = f'{error.exit_status} {error.what} | {error.fix}'\n"
        "    print(said, '|', time.monotonic() - start, flush=True)\n"
    )

    def opened(url: str, *sources: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", script, *sources],
            env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    with serving(Hub({"us/set": files, "us/gated": dict(files)}, gated={"us/gated"})) as hub:
        said = opened(hub.url, "hf:us/set", "hf:us/gated", "hf:us/none", "hf:us/set:tset")
        assert said[0].startswith("19 6"), said
        assert said[1].startswith("3 hf:us/gated: its owner has to let you in | accept"), said
        assert said[2].startswith("3 hf:us/none: no such data set, or a private one"), said
        assert said[3].startswith("3 hf:us/set:tset: there is no split tset"), said
        assert any("resolve" in request for request in hub.requests)
    [gone] = opened("http://127.0.0.1:9", "hf:us/other")
    assert gone.startswith("4 hf:us/other: cannot be downloaded, and is not in the cache"), gone
    assert "--repo-type dataset" in gone


# -- masks ---------------------------------------------------------------------------------------


def mask(number: int) -> bytes:
    """Class numbers that say which one it is; a pixel counts nowhere."""
    values = np.full((5, 6), number % 4, np.uint8)
    values[0, 0] = 255
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    image(number).save(buffer, "JPEG")
    return buffer.getvalue()


def masked(data) -> list[tuple[int, int]]:
    """(number of the image, class of its mask) of everything that is there."""
    found = []
    for loader in (data.calibration(99), data.reporting()):
        for images, masks in loader:
            assert (masks[:, 0, 0] == 255).all()
            levels = (images[:, 0, 0, 0] * 25.5).round().int()
            found += list(zip(levels.tolist(), masks[:, 1, 1].tolist()))
    return sorted(found)


PAIRS = [(n, n % 4) for n in range(COUNT)]


@pytest.mark.parametrize(
    ("names", "task"),
    [(("image", "mask"), None), (("pixel_values", "label"), None),
     (("image", "truth"), "segmentation"), (("image", "annotation"), "segmentation")],
)  # fmt: skip
def test_masks_of_a_table_are_seen_once_beside_their_images(sets, tmp_path, names, task):
    columns = {names[0]: [{"bytes": png(n), "path": None} for n in range(COUNT)],
               names[1]: [{"bytes": mask(n), "path": None} for n in range(COUNT)]}  # fmt: skip
    if names[1] == "annotation":
        columns["scene"] = [0] * COUNT
    table = sets.Dataset.from_dict(columns)
    for name in names:
        table = table.cast_column(name, sets.Image())
    if "scene" in columns:
        table = table.cast_column("scene", sets.ClassLabel(names=["s"]))
    parts = {"train": table.select(range(20)), "test": table.select(range(20, COUNT))}
    sets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    source = f"hf:{tmp_path / 'set'}"
    data = raw(source, task=task)
    assert data.info.task == "segmentation"
    assert data.info.classes == ("0", "1", "2", "3")
    assert masked(data) == PAIRS
    assert data.info.reporting == 5
    if "scene" in columns:
        plain = raw(source).info
        assert plain.task == "classification"
        assert "annotation may hold masks, which --task segmentation takes" in plain.notes
        with pytest.raises(InputError, match="detection is not read from there") as caught:
            raw(source, task="detection")
        assert "instances_train.json" in caught.value.fix


def test_odd_masks_of_a_table_are_named(sets, tmp_path):
    def saved(**columns: list[bytes]) -> str:
        rows = {name: [{"bytes": b, "path": None} for b in own] for name, own in columns.items()}
        table = sets.Dataset.from_dict(rows)
        for name in columns:
            table = table.cast_column(name, sets.Image())
        table.save_to_disk(str(tmp_path / "odd"))
        return f"hf:{tmp_path / 'odd'}"

    images = [png(n) for n in range(9)]
    large = io.BytesIO()
    Image.new("L", (7, 5)).save(large, "PNG")
    colours = {
        "row 3, mask: a mask of colours": [*map(mask, range(3)), *images[3:]],
        "row 8, mask: 5x7 pixels": [*map(mask, range(8)), large.getvalue()],
        "row 0, mask: the image cannot be decoded": [mask(0)[:40]] * 9,
    }
    for said, masks in colours.items():
        with pytest.raises(InputError) as caught:
            raw(saved(image=images, mask=masks))
        assert said in caught.value.what
    with pytest.raises(InputError, match="it has no column of masks") as caught:
        raw(saved(image=images), task="segmentation")
    assert "images/ and masks/" in caught.value.fix
    first = raw(saved(image=images, mask=[*map(mask, range(9))])).info.fingerprint
    other = raw(saved(image=images, mask=[*map(mask, range(1, 10))])).info.fingerprint
    assert "the same names" in difference(first, other)


@pytest.mark.parametrize("ending", ["mask.png", "seg.png", "png"])
def test_masks_in_shards_are_seen_once_beside_their_images(tmp_path, ending):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    for part, numbers in (("train", range(20)), ("val", range(20, COUNT))):
        both = {}
        for n in numbers:
            both |= {f"{n:03}.jpg": jpeg(n), f"{n:03}.{ending}": mask(n)}
        shard(tmp_path / f"{part}-000.tar", both)
    data = raw(f"wds:{tmp_path}")
    assert (data.info.task, data.info.reporting) == ("segmentation", 5)
    assert masked(data) == PAIRS
    (tmp_path / "classes.txt").write_text("road\nsky\n")
    with pytest.raises(InputError, match=r"sample 00\d, mask: pixels of class [23]"):
        raw(f"wds:{tmp_path}")
    (tmp_path / "classes.txt").unlink()
    shard(tmp_path / "train-001.tar", {"a.jpg": jpeg(1), "a.cls": b"0"})
    with pytest.raises(InputError, match="sample a: no mask") as caught:
        raw(f"wds:{tmp_path}")
    assert "jpg, cls" in caught.value.why
    with pytest.raises(InputError, match="regression is not read from there") as caught:
        raw(f"wds:{tmp_path}", task="regression")
    assert "train.csv" in caught.value.fix


# -- wds: ----------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return path


def samples(numbers, ending="cls", label=lambda n: str(n % 3)) -> dict[str, bytes]:
    found = {}
    for n in numbers:
        found[f"{n:03}.png"] = png(n)
        found[f"{n:03}.{ending}"] = label(n).encode()
    return found


@pytest.fixture
def shards(tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    for number in range(5):
        shard(tmp_path / f"train-{number:03}.tar", samples(range(5 * number, 5 * number + 5)))
    return tmp_path


@pytest.mark.parametrize(
    "spec",
    ["{0}", "{0}/train-{{000..004}}.tar", "{0}/train-{{000..001}}.tar::{0}/train-{{002..004}}.tar"],
)
def test_every_sample_is_seen_once(shards, spec):
    data = raw("wds:" + spec.format(shards))
    both = seen(data.calibration(99)) + seen(data.reporting(4))
    assert sorted(both) == [(n, n % 3) for n in range(COUNT)]
    assert data.info.classes == ("0", "1", "2")
    assert "25 images (shards: 5)" in data.info.notes
    assert any("are set aside" in note for note in data.info.notes)


def test_processes_share_the_samples_without_one_twice(shards):
    loader = raw(f"wds:{shards}").calibration(99, batch_size=7)
    parts = [seen(loader.on(torch.device("cpu"), rank, 3)) for rank in range(3)]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(seen(loader))
    assert len(seen(loader)) == 19  # of 25 a fifth of each class reports: 2, 2 and 2


def test_webdataset_reads_the_same_pairs(shards):
    """The library itself, in its own way, over the same files."""
    library = pytest.importorskip("webdataset")
    urls = str(shards / "train-{000..004}.tar")
    found = [
        (np.asarray(x)[0, 0, 0] // 10, y)
        for x, y in library.WebDataset(urls, shardshuffle=False)
        .decode("pil")
        .to_tuple("png", "cls")
    ]
    data = raw(f"wds:{shards}")
    assert sorted(found) == sorted(seen(data.calibration(99)) + seen(data.reporting()))


def test_names_say_what_reports_and_classes_have_names(shards, tmp_path_factory):
    shard(
        shards / "val-000.tar",
        samples(range(20, 25), "json", lambda n: json.dumps({"label": n % 3})),
    )
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    data = raw(f"wds:{shards}")
    assert data.info.classes == ("ant", "bee", "cat")
    assert [n for n, _ in seen(data.reporting())] == list(range(20, 25))
    assert data.info.training == 25
    assert not any("set aside" in note for note in data.info.notes)
    alone = tmp_path_factory.mktemp("alone")
    shard(alone / "a.tar", samples(range(9), "txt", lambda n: "ba"[n % 2]))
    assert raw(f"wds:{alone}").info.classes == ("a", "b")


def test_a_damaged_sample_can_be_left_out(tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    small = [png(n) for n in range(25)]
    both = [(n, small[n % 25]) for n in range(1400)]
    many = {f"{n:04}.{e}": v for n, own in both for e, v in (("png", own), ("cls", b"0"))}
    many["0700.png"] = b"\x89PNG no more"
    source = f"wds:{shard(tmp_path / 'a.tar', many)}"
    data = open_data(source, DataSettings(on_bad_image="skip"))
    assert [s for s in data.info.skipped if "sample 0700: the image cannot be decoded" in s]
    with pytest.raises(InputError, match="sample 0700"):
        open_data(source).decode()


def resized(content: bytes, size: int) -> bytes:
    """A tar whose first header says another size, in base 256, with a right checksum."""
    header = bytearray(content[:512])
    header[124:136] = (size % 256**12).to_bytes(12, "big")
    header[124] |= 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content[512:]


def sparse(path: Path) -> bytes:
    """A tar whose first member claims an exbibyte, which holes stand for."""
    entry, content = tarfile.TarInfo("000.png"), b"1\n0\n4\n".ljust(512, b"\0") + png(0)
    entry.size = len(content)
    facts = {"major": 1, "minor": 0, "name": "000.png", "realsize": 1 << 60}
    entry.pax_headers = {f"GNU.sparse.{name}": str(value) for name, value in facts.items()}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        file.addfile(entry, io.BytesIO(content))
    made = path.read_bytes()
    path.unlink()
    return made


def broken(shards: Path) -> dict[str, tuple[str, str]]:
    whole = (shards / "train-000.tar").read_bytes()
    made = {
        "cut within a member": (whole[:2000], "a broken shard"),
        "cut between members": (whole[: 512 * 4], "a broken shard"),
        "nothing": (b"", "a shard without samples"),
        "an empty tar": (bytes(10240), "a shard without samples"),
        "compressed": (b"\x1f\x8b" + whole, "a broken shard"),
        "a page": (b"<html>not found</html>" * 60, "a broken shard"),
        "a size below 0": (resized(whole, -512), "a broken shard"),
        "a size of an exbibyte": (resized(whole, 1 << 60), "a broken shard"),
        "holes": (sparse(shards / "made"), "a broken shard"),
    }
    files = {
        "no label": ({"a.png": png(0), "a.xyz": b"1"}, "sample a: no label"),
        "no image": ({"a.cls": b"1"}, "sample a: no image"),
        "two images": ({"a.png": png(0), "a.jpg": png(1), "a.cls": b"0"}, "sample a: two images"),
        "below 0": ({"a.png": png(0), "a.cls": b"-1", "b.png": png(0), "b.cls": b"0"},
                    "sample a: class -1"),
        "huge": ({"a.png": png(0), "a.cls": b"999999999"}, "sample a: class 999999999"),
        "two numbers": ({"a.png": png(0), "a.cls": b"1 2"}, "sample a: no label"),
        "half a json": ({"a.png": png(0), "a.json": b"{"}, "sample a: no label"),
        "no number": ({"a.png": png(0), "a.json": b'{"width": 3}'}, "sample a: no label"),
    }  # fmt: skip
    for name, (members, said) in files.items():
        made[name] = shard(shards / "made", members).read_bytes(), said
        (shards / "made").unlink()
    return made


def test_an_odd_shard_is_named_in_one_sentence(shards):
    for name, (content, said) in broken(shards).items():
        (shards / "train-003.tar").write_bytes(content)
        with pytest.raises(InputError) as caught:
            raw(f"wds:{shards}").decode()
        assert said in caught.value.what, name
        assert "train-003.tar" in caught.value.what, name
        assert "\n" not in caught.value.what, name
        assert caught.value.fix, name


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("pipe:cat x.tar", UsageError, "pipe: is not read"),
        ("s3://bucket/x.tar", UsageError, "s3: is not read"),
        ("gone-{000..002}.tar", InputError, "gone-000.tar: no such shard"),
        ("", UsageError, "names no shards"),
        ("{0..99999999999}.tar", UsageError, "names 100,000,000,000 shards"),
        ("{0..999}-{0..999}.tar", UsageError, "names 1,000,000 shards"),
        ("{0..-99999999999..7}.tar", UsageError, "names 100,000,000,000 shards"),
        ("{a..z}" * 9 + ".tar", UsageError, "names .* shards"),
        ("{a,b}" * 60 + ".tar", UsageError, "names .* shards"),
        ("{a{b,c},d}.tar", UsageError, r"{\.\.\.{ is not read"),
        ("http://example.org/${HF_TOKEN}.tar", UsageError, r"\$ is not read"),
    ],
)
def test_what_is_not_read_is_named(shards, spec, kind, said):
    with pytest.raises(kind, match=said) as caught:
        raw(f"wds:{spec}")
    assert caught.value.fix


class _Server(SimpleHTTPRequestHandler):
    short = False

    def log_message(self, *words: object) -> None:
        pass

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        outputfile.write(content[:3000] if _Server.short else content)


def test_shards_behind_urls_are_fetched_whole_and_once(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    source = f"wds:{url}/train-{{000..004}}.tar"
    _Server.short = True
    try:
        with pytest.raises(InputError, match="the transfer broke off") as caught:
            raw(source)
        assert "nothing was kept" in caught.value.why
        assert not list((tmp_path / "cache").glob("*.tar"))
        _Server.short = False
        first = raw(source).info
        assert first.training + first.reporting == COUNT
        with pytest.raises(InputError, match="no such shard, or a private one") as caught:
            raw(f"wds:{url}/val-000.tar")
        assert "404" in caught.value.why
    finally:
        server.shutdown()
        server.server_close()
    assert raw(source).info.fingerprint == first.fingerprint  # from the cache
    with pytest.raises(EnvironmentFault, match="cannot be downloaded") as caught:
        raw(f"wds:{url}/other.tar")
    assert caught.value.code == "offline"
