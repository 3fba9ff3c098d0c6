"""The bounded reader: regular files only, and every limit is checked before anything is built."""

import json
import os
import threading

import pytest

from seprune.checkpoint import load_weights
from seprune.errors import InputError
from seprune.runtime import reading
from seprune.runtime.checksums import sha256
from seprune.runtime.reading import parse_json, read_bytes, read_json, require_regular


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a: no such file\nwhy: nothing is there\nnext: check the path"),
        (b"", r"a: not valid JSON\nwhy: Expecting value: line 1 column 1 .*\nnext: restore"),
        (b'{"a": 1,\n}', r"a: not valid JSON\nwhy: .* line 2 column 1 .*\nnext: restore"),
        (b"\xff\xfe\xfa", r"a: not valid JSON\nwhy: .*decode.*\nnext: restore"),
    ],
)
def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_json(tmp_path / "a")


def test_a_folder_in_place_of_json_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize("make", ["pipe", "link to a device", "link to a pipe"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, make):
    path = tmp_path / "a"
    if make == "link to a device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if "link" in make else (tmp_path / "pipe").rename(path)
    kind = "a device" if "device" in make else r"a pipe \(FIFO\)"
    for read in (read_bytes, read_json, require_regular):
        with pytest.raises(InputError, match=rf"a: not a regular file\nwhy: it is {kind}\nnext: "):
            read(path)


def test_a_file_beyond_the_limit_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a").open("wb") as stream:
        stream.truncate(100 << 20)  # sparse: it takes no room
    with pytest.raises(InputError, match=r"a: too large to be read\nwhy: more than 67,108,"):
        read_json(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", limit=5) == b"12345"
    with pytest.raises(InputError, match="more than 4 bytes"):
        read_bytes(tmp_path / "a", limit=4)


def test_depth_counts_brackets_and_not_what_stands_in_strings():
    deep = "[" * 64 + "]" * 64
    assert json.dumps(parse_json(deep)) == deep
    with pytest.raises(ValueError, match="more than 64 deep"):
        parse_json("[" + deep + "]")
    text = json.dumps(["[" * 500, '\\"[' * 500, "{" * 500])
    assert parse_json(text) == json.loads(text)
    assert parse_json(json.dumps([[{}]] * 500)) == [[{}]] * 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" + "1" * 20 + "]", "an integer of 20 digits"),
        ("[-" + "9" * 5000 + "]", "an integer of 5000 digits"),
        ("[1e999]", "the number 1e999 is beyond what a float holds"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
    ],
)
def test_numbers_beyond_64_bits_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_numbers_within_the_limits_are_what_json_says():
    text = f'[{2**63 - 1}, {-(2**63)}, 1e300, 2.5E-3, "{"7" * 64}"]'
    assert parse_json(text) == [2**63 - 1, -(2**63), 1e300, 0.0025, "7" * 64]


def test_too_many_values_are_refused_without_building_them(monkeypatch):
    monkeypatch.setattr(reading, "VALUES_LIMIT", 10)
    assert parse_json("[1,2,3,4,5,6,7,8,9]") == list(range(1, 10))
    with pytest.raises(ValueError, match="11 values, the limit is 10"):
        parse_json("[1,2,3,4,5,6,7,8,9,10,11]")


def test_a_pipe_that_somebody_writes_to_is_not_read_either(tmp_path):
    os.mkfifo(tmp_path / "a")
    writer = threading.Thread(target=lambda: (tmp_path / "a").open("wb").close(), daemon=True)
    writer.start()
    with pytest.raises(InputError, match="not a regular file"):
        read_bytes(tmp_path / "a")
    writer.join(5)


def test_a_long_file_of_holes_is_refused_before_it_is_read(tmp_path):
    """A kilobyte on the disk, and in an archive, that claims a terabyte."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}})
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.truncate(8 + len(header) + 2**40)
    if path.stat().st_blocks > 100:
        pytest.skip("a file system without holes")
    for read in (require_regular, load_weights, sha256):
        with pytest.raises(InputError, match="a sparse file"):
            read(path)
    os.truncate(path, 1000)
    require_regular(path)


def test_a_long_file_that_was_written_is_read_whatever_holes_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "HOLES_LIMIT", 1 << 20)
    path = tmp_path / "rows.npy"
    with path.open("wb") as stream:
        stream.seek(8 << 20)
        stream.write(bytes([1]) * (1 << 18))
    with reading.open_regular(path) as stream:
        assert stream.tell() == 0
        assert len(stream.read()) == (8 << 20) + (1 << 18)
