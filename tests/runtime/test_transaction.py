"""Files that are put in place together survive a kill at every rename and fsync, all or none."""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile

import pytest

from seprune.errors import EnvironmentFault, InputError
from seprune.runtime import files
from seprune.runtime.checksums import check_sums
from seprune.runtime.transaction import RECORD, Staging, clear, settle

NAMES = ("a", "b", "c")
DIES = """
import os, sys
from pathlib import Path
from seprune.runtime import files
count, at = 0, int(sys.argv[2])
def dying(function):
    def call(*given):
        global count
        count += 1
        if count == at: os._exit(9)
        result = function(*given)
        if count == -at: os._exit(9)
        return result
    return call
os.replace, os.fsync = dying(os.replace), dying(os.fsync)
files.write_folder(Path(sys.argv[1]), {n: files.bytes_of(b"new " + n.encode()) for n in "abc"})
print(count)
"""


def write(folder, word):
    parts = {n: files.bytes_of(f"{word} {n}".encode()) for n in NAMES}
    files.write_folder(folder, parts)


def state(folder):
    return {n: (folder / n).read_text() for n in NAMES if (folder / n).exists()}


def dying(folder, at):
    command = [sys.executable, "-c", DIES, str(folder), str(at)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_kill_at_every_rename_and_fsync_leaves_the_old_or_the_new(tmp_path):
    count = int(dying(tmp_path / "count", 0).stdout)
    # files and their folder; the record: sync, rename, sync; renames; twice the folder
    assert count == 5 + 3 + 4 + 2
    seen = []
    for at in (n * sign for n in range(1, count + 1) for sign in (1, -1)):
        folder = tmp_path / f"at{at}"
        write(folder, "old")
        assert dying(folder, at).returncode == 9
        assert check_sums(folder) == []  # completes what was committed
        words = {text.split()[0] for text in state(folder).values()}
        assert len(state(folder)) == 3
        assert words in ({"old"}, {"new"}), at
        seen.append((at, words.pop()))
        files.write_text(folder / "later", "x")
        assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == [], at
    assert {word for _, word in seen} == {"old", "new"}
    order = [word for at, word in seen if at > 0]
    assert order == sorted(order, reverse=True)  # old up to the commit, new from there on


def test_a_kill_while_a_new_folder_is_written_leaves_none_or_all(tmp_path):
    for at in (1, 5, 6, 7, 9, 12):
        folder = tmp_path / f"at{at}"
        assert dying(folder, at).returncode == 9
        settle(folder)
        assert len(state(folder)) in (0, 3), at


def test_left_overs_go_with_the_next_write_and_those_of_living_writers_stay(tmp_path):
    (tmp_path / ".a.0123.seprune.part").write_text("of one that was killed")
    (tmp_path / ".0123.seprune.part").mkdir()
    (tmp_path / ".0123.seprune.part" / "a").write_text("likewise")
    (tmp_path / ".film.part").write_text("somebody else's")
    living = Staging(tmp_path)
    (living.path / "b").write_text("half")
    files.write_text(tmp_path / "c", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [".film.part", living.path.name, "c"]
    )
    living.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".film.part", "c"]


@pytest.mark.parametrize(
    "record",
    [
        {"../outside": ".x.seprune.part/../outside"},
        {"a": "secret"},
        {"a": "../.x.seprune.part/a"},
        {"a": ".x.seprune.part/b"},
        {"a": 3},
        ["a"],
        "a",
    ],
)
def test_a_record_that_names_other_places_is_refused(tmp_path, record):
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / ".x.seprune.part").mkdir()
        for name in ("a", "b", "outside"):
            (place / ".x.seprune.part" / name).write_text("evidence")
    (folder / "secret").write_text("kept")
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"seprune w|expected"):
        settle(folder)
    assert not (tmp_path / "outside").exists()
    assert (folder / "secret").read_text() == "kept"


def test_a_temporary_file_that_is_a_link_is_not_put_in_place(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".x.seprune.part").mkdir()
    (folder / ".x.seprune.part" / "a").symlink_to(tmp_path / "secret")
    (folder / RECORD).write_text(json.dumps({"a": ".x.seprune.part/a"}))
    with pytest.raises(InputError, match=r"refused to use the name .*\nwhy: .* is a link"):
        settle(folder)
    assert not (folder / "a").exists()


def test_an_interrupted_save_that_cannot_be_completed_is_an_environment_fault(
    tmp_path, monkeypatch
):
    (tmp_path / ".x.seprune.part").mkdir()
    (tmp_path / ".x.seprune.part" / "a").write_text("new")
    (tmp_path / RECORD).write_text(json.dumps({"a": ".x.seprune.part/a"}))

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(EnvironmentFault, match="interrupted save cannot be completed\nwhy: Perm"):
        settle(tmp_path)
    monkeypatch.undo()
    settle(tmp_path)
    assert (tmp_path / "a").read_text() == "new"


def test_clearing_a_folder_without_left_overs_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("x")
    clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_fillers_that_replace_their_file_and_write_in_turn(tmp_path):
    """safetensors renames a file of its own to the path; statistics save by `files` themselves."""

    def replaces(temporary):
        other = temporary.with_name("other")
        other.write_text("one")
        other.replace(temporary)

    def writes(temporary):
        files.write_text(temporary, "two")
        files.write_text(tmp_path / "beside", "three")

    files.write_together(tmp_path, {"a": replaces, "b": writes})
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {"a": "one", "b": "two", "beside": "three"}


def test_a_filler_that_writes_nothing_is_an_error_and_the_old_files_stay(tmp_path):
    write(tmp_path, "old")
    parts = {"a": files.bytes_of(b"new"), "b": lambda temporary: None}
    with pytest.raises(EnvironmentFault, match=r"b: cannot be written\nwhy: No such file"):
        files.write_together(tmp_path, parts)
    assert state(tmp_path)["a"] == "old a"


def test_a_folder_that_another_writer_takes_for_a_left_over_is_made_anew(tmp_path, monkeypatch):
    """Between the making of it and its lock."""
    made, real = [], tempfile.mkdtemp

    def taken(*given):
        made.append(real(*given))
        if len(made) < 3:
            clear(tmp_path)
            assert not os.path.exists(made[-1])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    write(tmp_path, "new")
    assert len(made) == 3
    assert state(tmp_path) == {n: f"new {n}" for n in NAMES}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path, "new")
    assert state(tmp_path) == {n: f"new {n}" for n in NAMES}
