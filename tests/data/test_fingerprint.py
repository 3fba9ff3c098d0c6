"""The fingerprint of a data folder sees what the names and sizes do not."""

import os

import numpy as np
import pytest
from PIL import Image

from seprune.data import fingerprint
from seprune.data.folders import find_images
from seprune.data.sources import open_source
from seprune.errors import InputError
from seprune.statistics.result import require_same


@pytest.fixture
def images(tmp_path):
    source = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = source.integers(0, 255, (5, 5, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{number}.bmp")
    return tmp_path


def replace_pixels(path, *, keep_time):
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("keep_time", [True, False])
def test_pixels_that_change_under_the_same_name_and_size_are_seen(images, keep_time):
    before = open_source(str(images)).fingerprint
    assert open_source(str(images)).fingerprint == before
    replace_pixels(images / "val" / "b" / "2.bmp", keep_time=keep_time)
    after = open_source(str(images)).fingerprint
    assert after.partition("-")[0] == before.partition("-")[0]
    assert after != before
    with pytest.raises(InputError, match="the same names and sizes, but files changed since"):
        require_same({"data": before}, {"data": after}, what="these statistics")


def test_other_files_are_told_apart_from_other_content(images):
    before = open_source(str(images)).fingerprint
    (images / "val" / "b" / "2.bmp").rename(images / "val" / "b" / "9.bmp")
    now = open_source(str(images)).fingerprint
    assert fingerprint.difference(before, now) == "other files, or files of other sizes"


def test_at_most_so_many_files_are_read_and_each_in_part(images, monkeypatch):
    read = []
    start = fingerprint._start
    monkeypatch.setattr(fingerprint, "_start", lambda path: read.append(path) or start(path))
    monkeypatch.setattr(fingerprint, "SAMPLED", 4)
    open_source(str(images))
    assert len(read) == 4
    assert fingerprint.SAMPLED_BYTES * 512 == 32 << 20


def test_links_in_circles_count_every_image_once(images):
    for name in ("loop", "again"):
        (images / "val" / "a" / name).symlink_to(".")
    (images / "val" / "a" / "far").symlink_to("../b")
    val = find_images(images, "RGB").val
    assert len(val.paths) == 4 + 4 + 4  # what `far` leads to is of class a too
    assert len({path.name for path in val.paths[:8]}) == 4


def test_a_pipe_with_the_name_of_an_image_is_refused(images):
    os.mkfifo(images / "train" / "a" / "x.png")
    with pytest.raises(
        InputError, match=r"x\.png: not a regular file\nwhy: it is a pipe"
    ) as caught:
        open_source(str(images))
    assert caught.value.code == "unreadable"


def test_names_that_are_no_utf8_are_names_like_others(images):
    path = images / "val" / "a" / b"\xff.bmp".decode("utf-8", "surrogateescape")
    (images / "val" / "a" / "0.bmp").rename(path)
    found = find_images(images, "RGB")
    val, digest = found.val, found.digest
    assert path in val.paths
    assert digest == find_images(images, "RGB").digest
