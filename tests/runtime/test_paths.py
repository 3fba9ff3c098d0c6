"""Names from files stay in their folder, and writing follows no link."""

import os

import pytest

from seprune.errors import EnvironmentFault, InputError
from seprune.runtime import files
from seprune.runtime.checksums import check_sums
from seprune.runtime.lock import hold, waiting_for
from seprune.runtime.paths import fault_in, inside


@pytest.mark.parametrize("name", ["a", "a/b/c.json", "größe", "..a", "a..", "-x", "\udcff"])
def test_names_below_the_folder_are_taken(tmp_path, name):
    assert fault_in(tmp_path, name) is None
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    "name", ["../a", "a/../../b", "/etc/passwd", "", ".", "..", "a//b", "a/", "./a", "a\0b",
             "a\\b", None, 3, ["a"], "x" * 5000]
)  # fmt: skip
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="refused to use the name") as caught:
        inside(tmp_path, name)
    assert (caught.value.code, caught.value.exit_status) == ("path", 3)


def test_a_link_below_the_folder_is_refused_and_the_folder_itself_may_be_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "here").symlink_to("real")
    (tmp_path / "real" / "away").symlink_to(tmp_path)
    assert inside(tmp_path / "here", "a") == tmp_path / "here" / "a"
    with pytest.raises(InputError, match=r"why: .*away is a link\nnext: remove the entry"):
        inside(tmp_path / "here", "away/secret")


def test_a_link_into_the_blobs_of_a_cache_stays_in_it_whatever_is_called_so(tmp_path):
    """As an archive may hold them: blobs that are a link, or a folder among the blobs."""
    secret = tmp_path / "home" / "secret"
    (secret / "deeper").mkdir(parents=True)
    (secret / "key").write_text("x")
    snapshot = tmp_path / "repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "repo" / "blobs"
    (snapshot / "README.md").symlink_to("../../blobs/key")
    (snapshot / "pruned").symlink_to("../../blobs/deeper")
    blobs.symlink_to(secret)
    for name in ("README.md", "pruned/model.safetensors"):
        assert "is a link" in str(fault_in(snapshot, name))
    blobs.unlink()
    (blobs / "deeper").mkdir(parents=True)
    (blobs / "key").write_text("of this repository")
    assert fault_in(snapshot, "README.md") is None
    assert "is a link" in str(fault_in(snapshot, "pruned/model.safetensors"))
    (blobs / "key").unlink()
    (blobs / "key").symlink_to(secret / "key")
    assert "is a link" in str(fault_in(snapshot, "README.md"))


def test_writing_replaces_a_link_and_adding_refuses_it(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("written", "added", "log"):
        (out / name).symlink_to(victim)
    files.write_text(out / "written", "new")
    assert (out / "written").read_text() == "new"
    with pytest.raises(EnvironmentFault, match=r"added: cannot be written\nwhy: .*\nnext: it is a"):
        files.append_line(out / "added", "x")
    with pytest.raises(EnvironmentFault, match="log: cannot be written"), files.log(out / "log"):
        pass
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["lock", "pruned"])
def test_a_run_folder_with_a_link_is_refused(tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "model").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(victim / "model" if name == "lock" else victim)
    with pytest.raises(InputError, match=f"why: .*{name} is a link"), hold(out):
        pass
    assert (victim / "model").read_text() == "precious"
    if name == "lock":
        with pytest.raises(InputError, match="is a link"), waiting_for(out):
            pass


def test_a_lock_with_another_name_is_refused_and_not_emptied(tmp_path):
    (tmp_path / "victim").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    os.link(tmp_path / "victim", out / "lock")
    for locked in (hold, waiting_for):
        with pytest.raises(InputError, match="hard link") as caught, locked(out):
            pass
        assert caught.value.fix == f"rm {out / 'lock'}"
    assert (tmp_path / "victim").read_text() == "precious"


def test_sums_name_files_of_their_own_folder_that_are_no_links(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    files.write_folder(folder, {"a": files.bytes_of(b"x")})
    (folder / "a").unlink()
    (folder / "a").symlink_to(tmp_path / "secret")
    assert check_sums(folder) == ["a"]
