"""The Nth file operation fails, for every N: nothing is lost, nothing half-written is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from failing import DIED
from folders import contents, leftovers
from harness import DISK, Subject, fail_operation, operations
from warm import Warm

from seprune.runtime.transaction import settle

WRITTEN = ("text", "new/json", "folder/a", "folder/model.safetensors", "folder/SHA256SUMS", "lines")
TOGETHER = [name for name in WRITTEN if name.startswith("folder/")]
WAYS = ("exit", *DISK)
WRITE = "import failing, sys; sys.exit(failing.write_everything(*sys.argv[1:]))"


def write(warm: Warm, folder: Path, content: str, **fail: object) -> tuple[int, str]:
    """`failing.write_everything` in a process of its own; its status and what it said."""
    log, fail = folder.with_suffix(".log"), {"root": str(folder), **fail}
    done = warm.run(log, folder, content, fail=fail, before=WRITE)
    return done.status, done.output


SOME = [("exit", 5), ("ENOSPC", 4), ("EIO", 5), ("EACCES", 7)]
ALL = [pytest.param(how, 1, marks=pytest.mark.slow) for how in WAYS]


@pytest.mark.fault(27)
@pytest.mark.parametrize(("how", "every"), SOME + ALL)
def test_every_operation_of_every_writer(warm, tmp_path, how, every):
    """Each file is the previous one or the new one, whole; the same call then writes all."""
    folder, log = tmp_path / "out", tmp_path / "operations"
    assert write(warm, folder, "old", log=str(log)) == (0, "")
    old = contents(folder)
    assert set(old) == set(WRITTEN)
    assert write(warm, tmp_path / "new", "newer")[0] == 0
    new = contents(tmp_path / "new")
    new["lines"] = old["lines"] + new["lines"]
    for number in range(1, len(log.read_text().splitlines()) + 1, every):
        for name, content in old.items():
            (folder / name).write_bytes(content)
        status, output = write(warm, folder, "newer", at=number, how=how)
        settle(folder / "folder")  # as whoever reads it does
        found = {n: c for n, c in contents(folder).items() if ".part/" not in n}
        assert set(found) == set(WRITTEN), number
        if how == "exit":
            assert status in (0, DIED)
            found["lines"] = found["lines"].partition(b"\n")[0] + b"\n"  # the last may be torn
        else:
            assert status in (0, 4), output
            assert status == 0 or ("cannot be written\nwhy: " in output and "\nnext: " in output)
            assert "Traceback" not in output
            # EACCES forbids to remove them as well
            assert leftovers(folder) == [] or how == "EACCES", (number, output)
        for name, content in found.items():
            assert content in (old[name], new[name]), (number, name)
        assert {n: found[n] for n in TOGETHER} in [{n: c[n] for n in TOGETHER} for c in (old, new)]
        for path in folder.rglob("*.part"):
            shutil.rmtree(path)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("how", "every"),
    [
        ("exit", 1040),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("ENOSPC", 260), ("EIO", 330))),
    ],
)
def test_some_operations_of_a_whole_run(tiny_run, how, every):
    count = operations(tiny_run)
    assert count > 400
    noticed = [fail_operation(tiny_run, n, how) for n in range(every // 2, count, every)]
    assert any(noticed)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.fault(27)
@pytest.mark.parametrize("how", WAYS)
def test_every_operation_of_a_whole_run(tiny_run, how):
    count = operations(tiny_run)
    noticed = sum(fail_operation(tiny_run, n, how) for n in range(1, count + 1))
    assert noticed > count / 2


def test_the_harness_notices_a_run_that_ends_differently(tiny_run: Subject):
    """A check that cannot fail would prove nothing: another seed gives other weights."""
    other = Subject(tiny_run.warm, tiny_run.home, (*tiny_run.argv, "seed=1"), None, tiny_run.result)
    with pytest.raises(AssertionError, match=r"trained/model\.safetensors"):
        other.finished(tiny_run.home / "other")
