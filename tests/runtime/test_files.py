"""Atomic writes against interruptions, full disks and damage."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from seprune.errors import EnvironmentFault, UsageError
from seprune.runtime import files
from seprune.runtime.checksums import check_sums, sha256
from seprune.runtime.reading import read_json


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.endswith(".part")]


def test_bytes_text_and_json_are_written_as_they_are(tmp_path):
    files.write_bytes(tmp_path / "new" / "folder" / "a", b"\x00\xff")
    files.write_text(tmp_path / "b", "größe\n")
    files.write_json(tmp_path / "c", {"name": "größe", "value": 0.1})
    assert (tmp_path / "new" / "folder" / "a").read_bytes() == b"\x00\xff"
    assert (tmp_path / "b").read_bytes() == "größe\n".encode()
    assert "größe" in (tmp_path / "c").read_text()
    assert read_json(tmp_path / "c") == {"name": "größe", "value": 0.1}
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_fresh_file_replaces_none_that_comes_in_between(tmp_path, monkeypatch, links):
    def refuse(*names):
        raise PermissionError(1, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "a"

    def fill(temporary):
        temporary.write_text("mine")
        path.write_text("theirs")  # another process, once nothing was found there

    with pytest.raises(UsageError, match="a: exists already"):
        files.write_with(path, fill, fresh=True)
    assert (path.read_text(), leftovers(tmp_path)) == ("theirs", [])
    path.unlink()
    files.write_text(path, "mine", fresh=True)
    assert (path.read_text(), path.stat().st_nlink, leftovers(tmp_path)) == ("mine", 1, [])


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_files_get_the_permissions_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_previous_file_and_nothing_else(tmp_path, error):
    files.write_text(tmp_path / "a", "good")

    def fill(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        files.write_with(tmp_path / "a", fill)
    assert (tmp_path / "a").read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    files.write_text(tmp_path / "a", "old")
    seen = []

    def fill(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append((tmp_path / "a").read_text())

    files.write_with(tmp_path / "a", fill)
    assert seen == ["old"]
    assert (tmp_path / "a").read_text() == "new"


def test_kill_9_while_writing_never_leaves_half_a_file(tmp_path):
    """The file is always one of those written whole, whenever the writer dies."""
    script = (
        "import sys; from pathlib import Path; from seprune.runtime.files import write_text\n"
        "for i in range(10**6):\n"
        "    write_text(Path(sys.argv[1]), str(i % 10) * 100_000); print(i, flush=True)\n"
    )
    path = tmp_path / "a"
    for rounds in (1, 2, 5, 11):
        command = [sys.executable, "-c", script, str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(rounds):
            process.stdout.readline()
        process.kill()
        process.stdout.close()
        process.wait()
        content = path.read_text()
        assert len(content) == 100_000
        assert len(set(content)) == 1


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    files.write_text(tmp_path / "a", "good")
    with pytest.raises(EnvironmentFault) as caught:
        files.write_with(tmp_path / "a", lambda path: None, need=1 << 62)
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: cannot be written\n"
        "why: No space left on device\n"
        "next: free some space and run the same command again"
    )
    assert caught.value.exit_status == 4
    assert (tmp_path / "a").read_text() == "good"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_while_writing_is_reported_likewise(tmp_path):
    def fill(temporary: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(EnvironmentFault, match=r"a: cannot be written\nwhy: No space left"):
        files.write_with(tmp_path / "a", fill)
    with pytest.raises(EnvironmentFault, match=r"full: cannot be written\nwhy: No space left"):
        files.append_line(Path("/dev/full"), "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EnvironmentFault, match=r"why: Permission denied\nnext: .*--out"):
        files.write_text(tmp_path / "a", "x")
    tmp_path.chmod(0o700)


def test_a_path_below_a_file_is_named_and_not_raised_raw(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(EnvironmentFault, match=r"a/b: cannot be written\nwhy: "):
        files.write_text(tmp_path / "a" / "b", "x")


def test_lines_are_added_at_the_end(tmp_path):
    files.append_line(tmp_path / "new" / "log", "eins")
    files.append_line(tmp_path / "new" / "log", "größe")
    assert (tmp_path / "new" / "log").read_text() == "eins\ngröße\n"


def test_sha256_is_the_well_known_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert sha256(tmp_path / "a").startswith("ba7816bf")


def test_sums_are_those_of_sha256sum(tmp_path):
    files.write_text(tmp_path / "config.json", json.dumps({}))
    files.write_text(tmp_path / "größe 1.txt", "x")
    files.write_sums(tmp_path)
    assert check_sums(tmp_path) == []
    done = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path)
    assert done.returncode == 0


def test_sums_find_every_flipped_bit_and_what_is_missing(tmp_path):
    files.write_bytes(tmp_path / "model.safetensors", bytes(range(64)))
    files.write_text(tmp_path / "plan.json", "{}")
    files.write_sums(tmp_path)
    for bit in range(0, 64 * 8, 7):
        damaged = bytearray(range(64))
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert check_sums(tmp_path) == ["model.safetensors"]
    (tmp_path / "plan.json").unlink()
    assert check_sums(tmp_path) == ["model.safetensors", "plan.json"]
    (tmp_path / "SHA256SUMS").unlink()
    assert check_sums(tmp_path) == ["SHA256SUMS"]


@pytest.mark.parametrize("damage", [b"\x0c", b" ", b"\n", b"\r\n"])
def test_sums_that_are_not_as_seprune_spells_them_are_damaged(tmp_path, damage):
    files.write_text(tmp_path / "a", "x")
    files.write_sums(tmp_path)
    content = (tmp_path / "SHA256SUMS").read_bytes()
    for changed in (content + damage, damage + content, content[:-1]):
        (tmp_path / "SHA256SUMS").write_bytes(changed)
        assert check_sums(tmp_path) != []


def test_sums_never_look_outside_their_folder(tmp_path):
    (tmp_path / "secret").write_text("x")
    inside = tmp_path / "inside"
    digest = sha256(tmp_path / "secret")
    files.write_text(inside / "SHA256SUMS", f"{digest}  ../secret\n")
    assert check_sums(inside) == ["../secret"]


def test_of_files_that_belong_together_none_is_replaced_if_one_fails(tmp_path):
    for name in ("a", "b"):
        files.write_text(tmp_path / name, "good")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    parts = {"a": files.bytes_of(b"new"), "b": full}
    with pytest.raises(EnvironmentFault, match=r"b: cannot be written\nwhy: No space left"):
        files.write_together(tmp_path, parts)
    assert [(p.name, p.read_text()) for p in sorted(tmp_path.iterdir())] == [
        ("a", "good"),
        ("b", "good"),
    ]


def test_a_folder_is_written_with_the_hashes_of_all_that_it_holds(tmp_path):
    files.write_text(tmp_path / "other.json", "{}")
    files.write_text(tmp_path / "README.md", "people edit this")
    files.write_folder(tmp_path, {"a": files.bytes_of(b"x"), "b": files.bytes_of(b"y")})
    listed = [line[66:] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()]
    assert listed == ["a", "b", "other.json"]
    assert check_sums(tmp_path) == []
    assert check_sums(tmp_path, need=["c"]) == ["SHA256SUMS"]
    (tmp_path / "SHA256SUMS").write_bytes(b"")
    assert check_sums(tmp_path) == ["SHA256SUMS"]


def test_what_killed_writers_left_is_removed(tmp_path):
    files.write_text(tmp_path / "deep" / "a", "x")
    (tmp_path / "deep" / ".a.01234567.seprune.part").write_text("half")
    (tmp_path / "deep" / ".film.part").write_text("somebody else's")
    files.tidy(tmp_path)
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [".film.part", "a"]


def test_equal_tensors_make_equal_files(tmp_path):
    """Rust orders the metadata by chance, anew in every process; ours are sorted."""
    import torch
    from safetensors import safe_open

    metadata = dict.fromkeys("qwertyuiopasdfgh", "größe")
    files.write_with(tmp_path / "a", files.tensors_of({"w": torch.arange(3.0)}, metadata))
    content = (tmp_path / "a").read_bytes()
    places = [content.index(f'"{letter}":'.encode()) for letter in sorted(metadata)]
    assert places == sorted(places)
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == metadata
        assert file.get_tensor("w").tolist() == [0, 1, 2]


@pytest.mark.slow
def test_tensors_that_the_kernel_refuses_are_reported_like_any_file(tmp_path):
    """The library that writes them has errors of its own; a file-size limit brings them out."""
    script = (
        "import resource, sys, torch; from pathlib import Path; from seprune.runtime import files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "fill = files.tensors_of({'a': torch.zeros(5000)}, {})\n"
        "try: files.write_with(Path(sys.argv[1]), fill)\n"
        "except files.EnvironmentFault as error: print(error.why)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe: not a place for a file\nwhy: a device, a pipe or"):
        files.write_text(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert leftovers(tmp_path) == []


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EnvironmentFault, match="pipe: cannot be written"):
        files.append_line(tmp_path / "pipe", "x")
    with (
        pytest.raises(EnvironmentFault, match="pipe: cannot be written"),
        files.log(tmp_path / "pipe"),
    ):
        pass


@pytest.mark.skipif(not Path("/dev").is_mount(), reason="no folder of devices here")
@pytest.mark.parametrize("name", ["full", "stdout", "seprune-of-a-test"])
def test_nothing_is_put_among_the_devices(name):
    """As root, a rename would take /dev/full from everybody, and /dev/stdout, which is a link."""
    before = os.lstat(f"/dev/{name}") if os.path.lexists(f"/dev/{name}") else None
    with pytest.raises(UsageError, match="not a place for a file"):
        files.write_text(Path("/dev") / name, "x")
    after = os.lstat(f"/dev/{name}") if os.path.lexists(f"/dev/{name}") else None
    assert (before and before.st_ino) == (after and after.st_ino)


@pytest.mark.parametrize("write", ["append_line", "log"])
def test_what_is_added_to_a_copy_of_hard_links_stays_in_the_copy(tmp_path, write):
    """As `cp -al RUN COPY` makes one, to go on in it."""
    given, copied = tmp_path / "run", tmp_path / "copy"
    given.write_text("one\n")
    os.link(given, copied)
    if write == "log":
        with files.log(copied) as stream:
            stream.write(b"two\n")
    else:
        files.append_line(copied, "two")
    assert given.read_text() == "one\n"
    assert copied.read_text() == "one\ntwo\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "run"]
