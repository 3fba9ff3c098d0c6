"""Sources, splits, loaders and damaged images: real files, real decoders."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seprune.data import DataSettings, open_data
from seprune.data.augment import Draws, crop_and_flip, cutout
from seprune.data.decode import read_image
from seprune.data.folders import find_images
from seprune.data.loaders import Batching, Cached, Decoded
from seprune.data.preprocessing import fit, to_pixels
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.models.preprocessing import Preprocessing, covering


def write_folder(root: Path, *, size=(8, 8), train=20, val=5, classes=("cat", "dog")) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return root


def everything(loader):
    batches = list(loader)
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


# digits


def test_digits_are_the_uci_images():
    data = open_data("digits")
    info = data.info
    assert info.training + info.validation + info.reporting == 1797
    assert info.preprocessing.shape == (1, 8, 8)
    assert info.classes == tuple("0123456789")
    assert info.fingerprint == "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
    images, labels = everything(data.reporting())
    assert images.shape == (info.reporting, 1, 8, 8)
    assert labels.bincount().min() >= 34
    levels = (images * info.preprocessing.std[0] + info.preprocessing.mean[0]) * 16
    assert torch.allclose(levels, levels.round(), atol=0.04)
    assert levels.round().unique().tolist() == list(range(17))


def test_digits_carry_their_attribution():
    import seprune.data

    folder = Path(seprune.data.__file__).parents[1] / "digits"
    text = (folder / "ATTRIBUTION").read_text()
    assert "E. Alpaydin & C. Kaynak" in text
    assert "CC BY 4.0" in text
    assert (folder / "digits.npz").stat().st_size < 60_000


def test_validation_is_a_seeded_part_of_train():
    def rows(**settings):
        data = open_data("digits", DataSettings(**settings))
        return data._parts["training"][1], data._parts["validation"][1]

    training, validation = rows()
    assert not set(training.tolist()) & set(validation.tolist())
    assert len(validation) == pytest.approx(0.1 * (len(training) + len(validation)), abs=5)
    assert torch.equal(rows()[1], validation)
    assert not torch.equal(rows(split_seed=1)[1], validation)
    with pytest.raises(UsageError, match="there is no validation split") as caught:
        open_data("digits", DataSettings(validation=0)).validation()
    assert str(caught.value).endswith("next: set data.validation=0.1")


# loaders


def test_calibration_takes_the_classes_in_turn_and_never_validation():
    data = open_data("digits")
    loader = data.calibration(35, batch_size=10)
    images, labels = everything(loader)
    assert labels.tolist() == [*range(10)] * 3 + [0, 1, 2, 3, 4]
    assert torch.equal(images, everything(data.calibration(35, batch_size=7))[0])
    assert not torch.equal(images, everything(data.calibration(35, batch_size=7, seed=1))[0])
    assert not set(loader.rows.tolist()) & set(data.validation().rows.tolist())
    assert data.calibration(10**6).count == data.info.training


def test_calibration_decodes_what_it_shows_and_nothing_else(tmp_path, monkeypatch):
    write_folder(tmp_path, train=20, val=5)
    read = []
    monkeypatch.setattr(
        "seprune.data.folders.read_image",
        lambda path, *more: read.append(path) or read_image(path, *more),
    )
    data = open_data(str(tmp_path), DataSettings(cache="memory", workers=0))
    read.clear()  # some were looked at for their size
    images, labels = everything(data.calibration(6))
    assert (len(images), len(read)) == (6, 6)
    assert {p.parent.name for p in read} == {"cat", "dog"}
    everything(data.calibration(6))
    assert len(read) == 6
    shown = everything(data.training(4))[0]
    assert len(read) == len(set(read)) == 40
    assert len(shown) == data.info.training
    assert torch.equal(everything(data.calibration(6))[0], images)
    assert torch.equal(everything(data.calibration(6))[1], labels)


def test_images_of_four_channels_keep_their_fourth(tmp_path):
    for part in ("train", "val"):
        for name, alpha in (("clear", 51), ("solid", 255)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGBA", (8, 8), (10 * i, 20, 30, alpha)).save(
                    tmp_path / part / name / f"{i}.png"
                )
    data = open_data(str(tmp_path), DataSettings(input=(4, 8, 8), validation=0, augment="none"))
    images, labels = everything(data.reporting())
    assert images.shape == (4, 4, 8, 8)
    assert "4 channels" in data.info.preprocessing.source
    wanted = torch.tensor([51, 255])[labels] / 255
    assert torch.allclose(images[:, 3, 0, 0] * 0.5 + 0.5, wanted, atol=1e-6)


def test_an_epoch_repeats_and_differs_from_the_next():
    loader = open_data("digits").training(50, seed=3)
    loader.set_epoch(4)
    first = everything(loader)
    loader.set_epoch(5)
    second = everything(loader)
    loader.set_epoch(4)
    again = everything(loader)
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[1], second[1])


def test_a_resumed_epoch_goes_on_with_the_same_batches():
    loader = open_data("digits").training(100)
    loader.set_epoch(2)
    whole = list(loader)
    loader.set_epoch(2, first=5)
    rest = list(loader)
    assert len(whole) == len(loader) == 12
    for (images, labels), (same, theirs) in zip(whole[5:], rest, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(labels, theirs)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch(world):
    loader = open_data("digits").training(100)
    cpu = torch.device("cpu")
    shares = [list(loader.on(cpu, rank, world)) for rank in range(world)]
    for number, (images, _) in enumerate(loader):
        parts = [share[number][0] for share in shares]
        for rank, part in enumerate(parts):
            assert torch.equal(part, images[rank::world])


def test_evaluation_shows_every_image_once_in_order(tmp_path):
    data = open_data(str(write_folder(tmp_path, val=7)))
    images, labels = everything(data.reporting(batch_size=4))
    assert labels.tolist() == [0] * 7 + [1] * 7
    first = np.asarray(Image.open(tmp_path / "val/cat/0000.png")).astype(np.float32) / 255
    mean, std = np.float32(data.info.preprocessing.mean), np.float32(data.info.preprocessing.std)
    assert np.allclose(images[0].permute(1, 2, 0).numpy(), (first - mean) / std, atol=1e-5)


def test_training_leaves_out_the_incomplete_batch_but_never_the_only_one():
    rows = torch.arange(10)
    assert [len(b) for b in Batching(4, drop_last=True).batches(rows, 0)] == [4, 4]
    assert [len(b) for b in Batching(16, drop_last=True).batches(rows, 0)] == [10]
    assert [len(b) for b in Batching(4).batches(rows, 0)] == [4, 4, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_decoded_images_are_the_same_with_any_number_of_workers(tmp_path, workers):
    write_folder(tmp_path, size=(120, 100), train=6)
    settings = DataSettings(input=(3, 96, 96), workers=workers)
    data = open_data(str(tmp_path), settings)
    assert data.info.cache == "none"
    loader = data.training(4, randaugment=True)
    assert isinstance(loader.store, Decoded)
    loader.set_epoch(1)
    here, labels = everything(loader)
    alone = open_data(str(tmp_path), DataSettings(input=(3, 96, 96), workers=0)).training(
        4, randaugment=True
    )
    alone.set_epoch(1)
    there, theirs = everything(alone)
    assert here.shape[1:] == (3, 96, 96)
    assert torch.equal(here, there)
    assert torch.equal(labels, theirs)


def test_the_cache_shows_what_the_files_hold(tmp_path):
    write_folder(tmp_path)
    kept, read = (
        open_data(str(tmp_path), DataSettings(cache=cache, workers=0))
        for cache in ("memory", "none")
    )
    assert isinstance(kept.reporting().store, Cached)
    assert torch.equal(everything(kept.reporting())[0], everything(read.reporting())[0])


def test_the_callers_random_state_is_left_alone(tmp_path):
    data = open_data(str(write_folder(tmp_path)), DataSettings(cache="none", workers=0))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    everything(data.training(8, randaugment=True))
    everything(open_data("digits").training(100, randaugment=True))
    assert torch.get_rng_state().equal(before)


# transforms


def test_crop_and_flip_against_a_loop():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    offsets = torch.randint(0, 5, (6, 2))
    flips = torch.tensor([True, False, True, False, True, False])
    draws = Draws(offsets, flips, offsets)
    out = crop_and_flip(images, draws, pad=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i, (top, left) in enumerate(offsets.tolist()):
        expected = padded[i, :, top : top + 5, left : left + 7]
        assert torch.equal(out[i], expected.flip(-1) if flips[i] else expected)


def test_cutout_blanks_a_square():
    images = torch.ones(2, 1, 6, 6)
    out = cutout(images, torch.tensor([[3, 2], [0, 5]]), side=2)
    expected = torch.ones(2, 1, 6, 6)
    expected[0, 0, 2:4, 1:3] = 0
    expected[1, 0, 0:1, 4:6] = 0
    assert torch.equal(out, expected)


def test_cutout_reaches_the_loader():
    plain = open_data("digits", DataSettings(augment="none"))
    cut = open_data("digits", DataSettings(augment="none", cutout=4))
    before, after = everything(plain.training(64))[0], everything(cut.training(64))[0]
    blank = (after == 0).flatten(1).sum(1)
    assert blank.min() >= 4
    assert torch.equal(after[after != 0], before[after != 0])


def test_fit_scales_the_shorter_side_and_takes_the_centre():
    image = Image.new("L", (40, 20))
    image.paste(255, (10, 0, 30, 20))

    def how(*shape: int, crop: float = 1.0) -> Preprocessing:
        return Preprocessing((1, *shape), (0.0,), (1.0,), covering((1, *shape), crop))

    assert to_pixels(fit(image, how(10, 10)))[..., 1:-1].min() == 255
    assert fit(image, how(20, 40)) is image
    assert fit(image, how(16, 16, crop=0.8)).size == (16, 16)


def test_large_images_are_224_and_small_ones_keep_their_size(tmp_path):
    small = open_data(str(write_folder(tmp_path / "a", size=(32, 32), train=2, val=1)))
    large = open_data(str(write_folder(tmp_path / "b", size=(100, 120), train=2, val=1)))
    assert small.info.preprocessing.shape == (3, 32, 32)
    assert (small.info.cache, large.info.cache) == ("memory", "none")
    assert large.info.preprocessing.shape == (3, 224, 224)
    assert large.info.preprocessing.mean == (0.485, 0.456, 0.406)


# what images people have


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 129 * 257, np.uint16)).save(path)
    else:
        Image.new("L", (4, 4), 129).convert(mode).save(path)
    pixels = to_pixels(read_image(path))
    assert pixels.shape == (3, 4, 4)
    assert pixels.dtype == torch.uint8
    if mode in ("L", "I;16", "RGBA", "LA"):
        assert pixels.unique().tolist() == [129]


def folder_of(root: Path, train: dict[str, object], val: str = "a") -> Path:
    """train/ and val/ with one class; images as arrays, or as bytes under any name."""
    for part in ("train", "val"):
        (root / part / "c").mkdir(parents=True)
        for name, content in train.items():
            path = root / part / "c" / name
            if isinstance(content, np.ndarray):
                Image.fromarray(content).save(path)
            else:
                path.write_bytes(content)
    return root


@pytest.mark.parametrize(
    ("dtype", "top"), [(np.uint16, 4095), (np.uint16, 65535), (np.int32, 255), (np.float32, 1)]
)
def test_deep_images_are_scaled_by_what_the_data_set_holds(tmp_path, dtype, top):
    shares = np.array([[0.0, 0.25], [0.5, 1.0]])
    bright, dark = (shares * top).astype(dtype), (shares * top / 4).astype(dtype)
    found = find_images(folder_of(tmp_path, {"bright.tif": bright, "dark.tif": dark}), "L")
    for row, values in enumerate((bright, dark)):  # the dark one stays dark
        expected = np.floor(values.astype(np.float64) / top * 255 + 0.5)
        assert np.array_equal(np.asarray(found.train(row)), expected.astype(np.uint8))
        assert np.array_equal(np.asarray(found.val(row)), expected.astype(np.uint8))
    assert found.notes == (
        f"images with more than 8 bits are scaled from 0 (black) to {top:g} (white), by the values "
        "in the training images",
    )


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit values (H, W, C): 3 colours, or 4 with an alpha channel."""
    height, width, channels = values.shape
    kind = {3: 2, 4: 6}[channels]
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in values)  # no filter
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return png(header, rows)


def tiff_of_rgb(values: np.ndarray) -> bytes:
    """A TIFF of 16-bit colours (H, W, 3) in one strip of little-endian values."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    end = 8 + len(data)
    tags = {256: width, 257: height, 258: 0, 259: 1, 262: 2, 273: 8, 277: 3, 278: height,
            279: len(data)}  # fmt: skip
    tags[258] = end + 2 + 12 * len(tags) + 4  # three values: they follow the tags
    body = b"".join(struct.pack("<HHII", t, 3 if t == 258 else 4, 1 + 2 * (t == 258), v)
                    for t, v in tags.items())  # fmt: skip
    head = b"II*\x00" + struct.pack("<I", end) + data + struct.pack("<H", len(tags))
    return head + body + struct.pack("<I3H", 0, 16, 16, 16)


@pytest.mark.parametrize("top", [1023, 4095, 65535])
@pytest.mark.parametrize("form", ["png", "png with alpha", "tif"])
def test_colours_of_16_bits_keep_their_lower_bytes(tmp_path, form, top):
    """Pillow alone decodes the upper ones: 12 bits would have 16 levels, nearly black."""
    values = (np.linspace(0, 1, 5 * 7 * 3).reshape(5, 7, 3) ** 2 * top).astype(np.uint16)
    stored = np.dstack([values, np.full((5, 7), 65535)]) if "alpha" in form else values
    content = tiff_of_rgb(stored) if form == "tif" else png16(stored)
    found = find_images(folder_of(tmp_path, {f"a.{form[:3]}": content}), "RGB")
    expected = np.floor(values / np.float64(top) * 255 + 0.5)
    assert np.array_equal(np.asarray(found.train(0)), expected.astype(np.uint8))
    assert found.notes[0].startswith(
        f"images with more than 8 bits are scaled from 0 (black) to {top}"
    )


def test_numbers_beyond_31_bits_are_not_negative(tmp_path):
    words = np.array([0, 2**31, 2**32 - 1], "<u4").tobytes()
    tags = {256: 3, 257: 1, 258: 32, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 12, 339: 1}
    body = b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags.items())
    end = struct.pack("<IH", 0, 0)
    content = b"II*\x00" + struct.pack("<I", 20) + words + struct.pack("<H", len(tags)) + body + end
    (tmp_path / "a.tif").write_bytes(content)
    assert np.asarray(read_image(tmp_path / "a.tif", "L")).tolist() == [[0, 128, 255]]


def test_floats_below_zero_are_scaled_from_what_is_there(tmp_path):
    values = np.array([[-1.0, 0.0], [0.5, 1.0]], np.float32)
    found = find_images(folder_of(tmp_path, {"a.tif": values}), "L")
    assert np.asarray(found.train(0)).tolist() == [[0, 128], [191, 255]]
    values = np.array([[-100.0, 0.0], [50.0, 300.0]], np.float32)
    found = find_images(folder_of(tmp_path / "hounsfield", {"a.tif": values}), "L")
    assert np.asarray(found.train(0)).tolist() == [[0, 64], [96, 255]]


def test_every_ending_that_pillow_reads_is_taken_and_the_rest_is_counted(tmp_path):
    grey = Image.fromarray(np.full((8, 8), 90, np.uint8))
    taken = {}
    kinds = {"a.jfif": "JPEG", "b.jpe": "JPEG", "c.JPG": "JPEG", "d.tga": "TGA", "e.avif": "AVIF",
             "f.jp2": "JPEG2000"}  # fmt: skip
    Image.init()
    for name, kind in kinds.items():
        if kind in Image.SAVE:
            stream = io.BytesIO()
            grey.save(stream, kind)
            taken[name] = stream.getvalue()
    others = {"x.txt": b"", "y.txt": b"", "z.svg": b"<svg/>", "no_ending": b"", ".hidden": b""}
    found = find_images(folder_of(tmp_path, taken | others), "L")
    assert sorted(p.name for p in found.train.paths) == sorted(taken)
    assert len(taken) >= 4
    for row in range(len(taken)):
        assert abs(int(np.asarray(found.train(row))[4, 4]) - 90) <= 2
    assert found.notes == (
        "8 files in the class folders are left out by their endings: "
        "4 .txt, 2 without an ending, 2 .svg",
    )


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 8)


def png(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc

    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bomb(width: int, height: int) -> bytes:
    return png(struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "the image file is empty (0 bytes)"),
        (b"<!DOCTYPE html><html>", "not an image but an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an image but a git-LFS pointer"),
        (b"\x00" * 100, "the image cannot be decoded"),
        (bomb(20_000, 20_000), "the image is too large to decode safely"),
        (bomb(10_000, 10_000), "the image is too large to decode safely"),
    ],
    ids=["empty", "html", "lfs", "zeros", "bomb 400 Mpixel", "bomb 100 Mpixel"],
)
def test_bad_images_are_named(tmp_path, content, what):
    path = tmp_path / "bad é.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_image(path)
    assert caught.value.what == f"{path}: {what}"
    assert caught.value.fix
    assert "large" not in what or "limit is 89,478,485 pixels" in caught.value.why


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_damaged_images_give_pixels_or_the_path(tmp_path, suffix):
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    good = tmp_path / f"good.{suffix}"
    Image.fromarray(pixels).save(good)
    content = good.read_bytes()
    path = tmp_path / f"bad.{suffix}"
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 2:
            del damaged[int(random.integers(1, len(damaged))) :]
        else:
            damaged[int(random.integers(len(damaged)))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            found = read_image(path).mode
        except InputError as error:
            found = error.what
        assert found == "RGB" or found.startswith(f"{path}: ")


def test_a_truncated_image_names_its_path_in_every_cache(tmp_path):
    write_folder(tmp_path)
    bad = tmp_path / "train/dog/0007.png"
    bad.write_bytes(bad.read_bytes()[:-60])
    for cache, workers in (("memory", 0), ("none", 0), ("none", 2)):
        data = open_data(str(tmp_path), DataSettings(cache=cache, workers=workers))
        with pytest.raises(InputError) as caught:
            everything(data.training(4))
        assert f"{bad}: the image cannot be decoded" in str(caught.value)


def test_an_empty_file_is_found_when_the_data_are_opened(tmp_path):
    write_folder(tmp_path)
    bad = tmp_path / "val/cat/0003.png"
    bad.write_bytes(b"")
    with pytest.raises(InputError, match=r"0003\.png: the image file is empty"):
        open_data(str(tmp_path), DataSettings(cache="none"))


def test_skip_leaves_out_one_in_a_thousand_and_lists_it(tmp_path):
    write_folder(tmp_path, size=(4, 4), train=500, val=2)
    bad = tmp_path / "train/cat/0001.png"
    bad.write_bytes(b"<html>")
    data = open_data(str(tmp_path), DataSettings(on_bad_image="skip"))
    assert data.info.skipped == (f"{bad}: not an image but an HTML page",)
    assert data.info.training + data.info.validation == 999
    assert len(everything(data.calibration(999))[1]) == data.info.training
    (tmp_path / "train/dog/0002.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        open_data(str(tmp_path), DataSettings(on_bad_image="skip"))
    assert caught.value.what == (
        "2 of 1000 training images are damaged, more than the 0.1% that may be skipped"
    )
    assert str(bad) in caught.value.why


def test_evaluation_never_skips(tmp_path):
    write_folder(tmp_path, size=(4, 4))
    bad = tmp_path / "val/dog/0000.png"
    bad.write_bytes(b"\x89PNG")
    data = open_data(str(tmp_path), DataSettings(on_bad_image="skip"))
    with pytest.raises(InputError, match=r"val/dog/0000\.png"):
        everything(data.reporting())


# layouts


def test_a_missing_folder_names_the_nearest(tmp_path):
    write_folder(tmp_path / "cifar10", train=1, val=1)
    with pytest.raises(InputError) as caught:
        open_data(str(tmp_path / "cifar1"))
    assert caught.value.what == f"{tmp_path}/cifar1: no such data folder"
    assert caught.value.fix == f"did you mean {tmp_path}/cifar10?"
    with pytest.raises(InputError) as caught:
        open_data("digit")
    assert caught.value.fix == "did you mean digits?"


def test_a_folder_without_val(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "vla").mkdir()
    with pytest.raises(InputError) as caught:
        open_data(str(tmp_path))
    assert caught.value.what == f"{tmp_path}: not a data folder: it has no val/"
    assert caught.value.why == "found: train, vla"
    assert caught.value.fix == f"mv {tmp_path}/vla {tmp_path}/val"


@pytest.mark.parametrize("name", ["valid", "validation", "test"])
def test_other_names_of_the_reporting_part(tmp_path, name):
    write_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    info = open_data(str(tmp_path)).info
    assert (info.training + info.validation, info.reporting) == (40, 10)
    assert info.notes == (f"{tmp_path / name} reports, since there is no val/",)
    (tmp_path / name).rename(tmp_path / "val")
    write_folder(tmp_path / "other", val=2)
    (tmp_path / "other/val").rename(tmp_path / "test")
    assert open_data(str(tmp_path)).info.reporting == 10  # val/ goes before test/


@pytest.mark.parametrize("place", [".", "train"])
def test_a_single_folder_is_split_by_a_seed(tmp_path, place):
    write_folder(tmp_path / "both", train=20, val=5)
    (tmp_path / "one").mkdir()
    (tmp_path / "both/train").rename(tmp_path / "one" / (place if place == "train" else "x"))
    root = tmp_path / "one" if place == "train" else tmp_path / "one" / "x"
    first, again = (find_images(root, "RGB") for _ in range(2))
    assert first.classes == ("cat", "dog")
    assert [p.name for p in first.val.paths] == [p.name for p in again.val.paths]
    assert first.val.labels.bincount().tolist() == [4, 4]
    assert first.train.labels.bincount().tolist() == [16, 16]
    assert not set(first.train.paths) & set(first.val.paths)
    assert "8 of 40, 20% of every class by a seed, are set aside" in first.notes[0]


def test_an_empty_class_folder(tmp_path):
    write_folder(tmp_path)
    for part in ("train", "val"):
        (tmp_path / part / "mouse").mkdir()
        (tmp_path / part / "mouse/notes.txt").write_text("none yet")
    with pytest.raises(InputError) as caught:
        open_data(str(tmp_path))
    assert caught.value.what == f"{tmp_path}/train/mouse: the class folder holds no images"


def test_class_folders_that_differ(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val/dog").rename(tmp_path / "val/hound")
    with pytest.raises(InputError) as caught:
        open_data(str(tmp_path))
    assert caught.value.what == f"{tmp_path}: train/ and val/ hold different class folders"
    assert caught.value.why == "only in train: dog; only in val: hound"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    write_folder(tmp_path)
    bad = tmp_path / "train/cat/0000.png"
    bad.chmod(0)
    with pytest.raises(InputError, match=r"0000\.png: the image cannot be read"):
        everything(open_data(str(tmp_path)).training(4))


def test_a_link_to_nowhere_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train/cat/zz.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"zz\.png: the image cannot be read"):
        everything(open_data(str(tmp_path)).training(4))


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    write_folder(tmp_path)
    before = open_data(str(tmp_path)).info.fingerprint
    assert open_data(str(tmp_path)).info.fingerprint == before
    (tmp_path / "val/cat/0000.png").rename(tmp_path / "val/cat/9999.png")
    assert open_data(str(tmp_path)).info.fingerprint != before


# settings


def test_settings_that_contradict_each_other():
    with pytest.raises(UsageError, match="images have 1, 3 or 4 channels"):
        open_data("digits", DataSettings(input=(2, 8, 8)))
    with pytest.raises(UsageError, match=r"mean \(0.5, 0.5\) and std"):
        open_data("digits", DataSettings(mean=(0.5, 0.5)))
    with pytest.raises(UsageError, match="exclude each other"):
        open_data("digits", DataSettings(cache="memory", augment="resized_crop"))


def test_digits_in_three_channels_at_another_size():
    data = open_data("digits", DataSettings(input=(3, 16, 16)))
    images, _ = next(iter(data.training(4)))
    assert images.shape == (4, 3, 16, 16)


# torchvision


def test_torchvision_sources(tmp_path):
    import torchvision

    random = np.random.default_rng(0)
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 2049, count)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    data = open_data(f"torchvision/FashionMNIST:{tmp_path}")
    assert data.info.preprocessing.shape == (1, 28, 28)
    assert (data.info.training, data.info.validation, data.info.reporting) == (30, 10, 10)
    assert data.info.classes == tuple(torchvision.datasets.FashionMNIST.classes)
    images, labels = everything(data.reporting())
    assert labels.tolist() == list(range(10))


def test_torchvision_faults(tmp_path):
    with pytest.raises(InputError) as caught:
        open_data(f"torchvision/CIFAR10:{tmp_path}")
    assert caught.value.what == f"torchvision/CIFAR10:{tmp_path}: torchvision cannot open it"
    assert caught.value.fix.startswith("download it once: torchvision.datasets.CIFAR10(")
    with pytest.raises(InputError) as caught:
        open_data("torchvision/CIFAR11:there")
    assert caught.value.fix == "write torchvision/CIFAR10:there"
    assert "known: CIFAR10, CIFAR100, MNIST" in caught.value.why
    with pytest.raises(InputError, match="cannot be used as a data set"):
        open_data("torchvision/CIFAR10")


@pytest.mark.fault(24)
def test_a_killed_worker_is_explained(tmp_path):
    write_folder(tmp_path)
    data = open_data(str(tmp_path), DataSettings(cache="none", workers=1))
    loader = data.training(2)
    loader.store._images = Deadly(loader.store._images)
    with pytest.raises(EnvironmentFault) as caught:
        everything(loader)
    assert caught.value.what == "a data loading worker process died"
    assert "ran out of memory or of shared memory (/dev/shm)" in caught.value.why
    assert "data.workers=0" in caught.value.fix


class Deadly:
    def __init__(self, images):
        self.labels = images.labels

    def __call__(self, row):
        os.kill(os.getpid(), 9)
