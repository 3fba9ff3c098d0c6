"""Machines that are not like the developer's: the same result, or a documented status."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Subject, reported, tiny_images

import seprune
from seprune.pipeline.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
YEAR = 365 * 86_400
NOBODY = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(8, 1, 0, 0, 0) == 0  # PR_SET_KEEPCAPS
os.setgroups([]); os.setgid(65534); os.setuid(65534); os.umask(0o022)
read = 1 << 2  # CAP_DAC_READ_SEARCH, and nothing else: this Python may lie in root's own folder
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert libc.capset(header, (ctypes.c_uint32 * 6)(read, read, 0, 0, 0, 0)) == 0
"""
FEW = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))"
BACK = f"import time; real = time.time; time.time = lambda: real() - {YEAR}"
OTHER_VERSIONS = """
import importlib.metadata, seprune, seprune.runtime.environment as known
seprune.__version__ = known.__version__ = "9.9.9"
real = importlib.metadata.version
importlib.metadata.version = lambda name: "9.9.9" if name in ("torch", "seprune") else real(name)
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home folder in which nothing can be made."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


def same_run(subject: Subject, out: Path, **how: object) -> None:
    """A whole run under these circumstances, compared with the unbroken one."""
    done = subject.run(out, **how)
    assert done.status == 0, done.output
    subject.finished(out)


def no_home(path: str = "/nonexistent") -> dict[str, str]:
    return {"HOME": path, "XDG_CACHE_HOME": "", "XDG_CONFIG_HOME": "", "TORCH_HOME": ""}


@pytest.mark.parametrize(
    "where", ["read-only", pytest.param("nonexistent", marks=pytest.mark.slow)]
)
def test_a_home_that_cannot_be_written_is_not_missed(tiny_run, tmp_path, home, where):
    env = no_home(str(home) if where == "read-only" else "/nonexistent/home")
    same_run(tiny_run, tmp_path / "run", env=env, ordinary=True)
    assert list(home.iterdir()) == []


def test_what_needs_a_cache_says_that_home_is_read_only(terminal, tiny_run, home):
    """Latency tables are kept there."""
    words = ("latency-table", "build", tiny_run.home / "whole" / "pruned", "--json")
    ended = terminal(*words, env=no_home(str(home)), ordinary=True)
    ended.refused(4, "environment", says=str(home))


def test_another_user_runs_it(tiny_run, tmp_path):
    """Root becomes nobody, who owns the run folder and may read the images."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    place = Path("/tmp") / f"seprune-nobody-{os.getpid()}"
    place.mkdir()
    try:
        os.chown(place, 65534, 65534)
        images = tiny_images(place / "images")
        words = [word.replace(str(tiny_run.inputs), str(images)) for word in tiny_run.argv]
        subject = Subject(tiny_run.warm, tiny_run.home, tuple(words))
        nobody = {"before": NOBODY, "env": {"HOME": str(place), "USER": "nobody"}}
        done = subject.run(place / "run", **nobody)
        assert done.status == 0, done.output
        elsewhere = subject.run(tmp_path / "run", **nobody)
        reported(elsewhere, 4)
        assert "Permission denied" in elsewhere.output
        assert (place / "run" / "report.json").stat().st_uid == 65534
    finally:
        shutil.rmtree(place)


@pytest.mark.slow
def test_64_descriptors_are_enough(tiny_run, tmp_path):
    same_run(tiny_run, tmp_path / "run", before=FEW)


@pytest.mark.slow
def test_a_clock_that_goes_backwards_undoes_nothing(tiny_run, tmp_path):
    """Stopped in the middle; every file is then of next year, and the clock of last year."""
    out = tmp_path / "run"
    tiny_run.run(out, fail={"root": str(out), "at": 200, "how": "exit"})
    finished = RunFolder(out).records()
    assert finished
    for path in out.rglob("*"):
        os.utime(path, (time.time() + YEAR,) * 2)
    same_run(tiny_run, out, before=BACK)
    records = RunFolder(out).records()
    assert [r.stage for r in records[: len(finished)]] == [r.stage for r in finished]
    assert [r.time for r in records[: len(finished)]] == [r.time for r in finished]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_run_goes_on_on_another_device(tiny_run, tmp_path):
    """One that is not there is refused with the folder as it was; what auto takes goes on."""
    out = tmp_path / "run"
    tiny_run.run(out, fail={"root": str(out), "at": 200, "how": "exit"})
    finished = RunFolder(out).records()
    assert finished

    def on(device: str) -> Subject:
        argv = tuple(w for w in tiny_run.argv if not w.startswith("device="))
        return replace(tiny_run, argv=(*argv, f"device={device}"))

    reported(on("cuda").run(out), 4)
    assert RunFolder(out).records() == finished
    on("auto").finished(out)
    assert RunFolder(out).records()[: len(finished)] == finished


def test_a_run_goes_on_under_other_versions(tiny_run, tmp_path):
    """The folder says which versions it was made with, and the result is the same."""
    out = tmp_path / "run"
    tiny_run.run(out, fail={"root": str(out), "at": 200, "how": "exit"})
    same_run(tiny_run, out, before=OTHER_VERSIONS)
    assert [r.stage for r in RunFolder(out).records()].count("start") >= 2


def many(root: Path, classes: int, each: int) -> Path:
    """Class folders full of links to one image: as many names, no space on the disk."""
    one = next(tiny_images(root / "one").rglob("*.png"))
    for part, count in (("train", each), ("val", 1)):
        for label in range(classes):
            folder = root / "many" / part / f"c{label:05}"
            folder.mkdir(parents=True)
            for number in range(count):
                os.link(one, folder / f"{number}.png")
    return root / "many"


def opened(root: Path) -> seprune.Data:
    return seprune.open_data(str(root), seprune.DataSettings(input=(3, 12, 12), workers=0))


def test_one_image_a_class(terminal, tiny_run, tmp_path):
    """Enough to evaluate; too few for a split that has every class, which is said."""
    root = many(tmp_path, 3, 1)
    small = tiny_run.home / "whole" / "pruned"
    assert terminal("evaluate", small, "--data", root, "--json").status == 0
    words = [w.replace(str(tiny_run.inputs), str(root)) for w in tiny_run.argv]
    done = tiny_run.warm.run(tmp_path / "log", "run", *words, "--out", tmp_path / "run")
    assert done.status in (0, 2, 3), done.output
    if done.status:
        reported(done, 2, 3)


@pytest.mark.slow
def test_5000_classes_are_read_and_scored(terminal, tmp_path):
    root = many(tmp_path, 5000, 1)
    assert len(opened(root).info.classes) == 5000
    words = ("seprune/se_resnet8", "--input", "3x12x12", "--classes", 5000, "--data", root)
    ended = terminal("evaluate", *words, "--json", seconds=300)
    assert ended.status == 0, ended.err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_50000_files_are_opened_in_proportion(tmp_path):
    """Ten times the files take at most twenty times as long to open, and five seconds more."""

    def seconds(root: Path) -> float:
        took = []
        for _ in range(3):
            start = time.process_time()
            opened(root)
            took.append(time.process_time() - start)
        return min(took)

    few, lots = many(tmp_path / "few", 10, 500), many(tmp_path / "lots", 10, 5000)
    short, long = seconds(few), seconds(lots)
    assert long < 20 * short
    assert long < short + 5


REPEATED = """
import gc, os, threading
import torch, seprune
torch.set_num_threads(1)
model = seprune.build("seprune/se_resnet8", classes=3, input=(3, 12, 12)).eval()
images, labels = torch.rand(8, 3, 12, 12), torch.arange(8) % 3
loader = [(images, labels)] * 2
for number in range(100):
    structure = seprune.analyse(model, images[:2])
    found = seprune.collect_statistics(
        model, loader, structure=structure, gradients="logits",
        options=seprune.CollectOptions(device="cpu"),
    )
    plan = seprune.make_plan(structure, seprune.score(structure, found, model=model), macs=0.6)
    small = seprune.prune(model, plan, images[:2])
    seprune.refit(model, small, plan, loader, options=seprune.RefitOptions(device="cpu"))
    if number in (19, 99):
        gc.collect()
        pages = int(open("/proc/self/statm").read().split()[1])
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        print(pages * os.sysconf("SC_PAGESIZE") >> 20, len(os.listdir("/proc/self/fd")),
              threading.active_count(), hooks)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_repetitions_leave_nothing_behind(tmp_path):
    """MiB, descriptors, threads and hooks after 20 repetitions and after 100."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REPEATED], env=env, capture_output=True, text=True, check=True
    )
    early, late = ([int(n) for n in line.split()] for line in done.stdout.splitlines())
    assert late[1:] == early[1:], (early, late)
    assert late[0] - early[0] < 24, (early, late)


def command_line(words: str, before: str = "", *python: str) -> subprocess.CompletedProcess[str]:
    """`seprune WORDS` in a new Python, after some code."""
    code = f"{before}; import sys; sys.argv = {['seprune', *words.split()]!r}; "
    code += "from seprune.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *python, "-c", code]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


ODD = {"RANK": "abc", "WORLD_SIZE": "two", "LOCAL_RANK": "-1", "SEPRUNE_TIMEOUT": "soon"}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["RANK", *(pytest.param(n, marks=SLOW) for n in list(ODD)[1:])])
def test_numbers_of_a_launcher_that_are_none_are_named(terminal, tiny_run, name):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", name: ODD[name]}
    words = ("evaluate", tiny_run.home / "whole" / "pruned", "--data", tiny_run.inputs)
    error = terminal(*words, "--json", env=env).refused(2, "usage", says=f"{name}='{ODD[name]}'")
    assert error["next"] == f"unset {name}"


def test_a_number_that_a_cluster_gives_a_single_process_does_not_silence_it(terminal):
    for env in ({"RANK": "3"}, {"RANK": "3", "WORLD_SIZE": ""}, {"RANK": "", "WORLD_SIZE": "1"}):
        ended = terminal("models", "seprune/se_resnet8", "--json", env=env)
        assert ended.status == 0, ended.err
        assert "seprune/se_resnet8" in ended.out


def test_a_working_folder_that_is_gone_is_named(terminal, tiny_run, tmp_path):
    place = tmp_path / "gone"
    place.mkdir()
    gone = f"import os; os.rmdir({str(place)!r})"
    for words in (("env",), ("inspect", tiny_run.home / "whole" / "pruned")):
        ended = terminal(*words, "--json", cwd=str(place), before=gone)
        ended.refused(4, "environment", says="the working folder is gone")
        place.mkdir()


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "{net}", "--data", "~nosuch/images"),
        pytest.param(("evaluate", "{net}", "--data", "hf:~nosuch/images"), marks=SLOW),
        pytest.param(("evaluate", "{net}", "--data", "wds:~nosuch/{0..1}.tar"), marks=SLOW),
        pytest.param(("inspect", "~nosuch/net"), marks=SLOW),
    ],
)
def test_a_home_of_nobody_is_no_folder(terminal, tiny_run, words):
    net = tiny_run.home / "whole" / "pruned"
    ended = terminal(*(net if w == "{net}" else w for w in words), "--json")
    assert ended.refused(3, "input" if words[0] == "evaluate" else ended.error["code"])


def test_a_user_without_a_home_learns_where_a_cache_may_be(terminal, tiny_run):
    """As in a container that is started under a number that no user has."""
    nobody = "import pwd; pwd.getpwuid = lambda number: {}[number]"
    words = ("latency-table", "build", tiny_run.home / "whole" / "pruned", "--json")
    env = {"XDG_CACHE_HOME": ""}
    nobody += "; import os; os.environ.pop('HOME', None)"
    ended = terminal(*words, env=env, before=nobody)
    error = ended.refused(4, "environment", says="XDG_CACHE_HOME is not set")
    assert error["next"] == "export XDG_CACHE_HOME=FOLDER"


def test_memory_that_is_too_short_for_the_libraries_of_torch():
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (900 << 20, -1))"
    done = command_line("inspect seprune/se_resnet8", limit)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: torch cannot be imported" in done.stderr


@pytest.mark.slow
def test_files_that_are_larger_than_the_memory_are_named(terminal, tmp_path):
    """What maps them into memory says so as a RuntimeError."""
    path, header = (
        tmp_path / "w.safetensors",
        b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}',
    )
    size = 1100 << 20
    with path.open("wb") as stream:
        text = header % (size, size)
        stream.write(len(text).to_bytes(8, "little") + text + bytes(size // 64))
        stream.truncate(8 + len(text) + size)
    words = ("inspect", "seprune/se_resnet8", "--classes", 3, "--input", "3x12x12")
    ended = terminal(*words, "--checkpoint", path, "--json")
    ended.refused(4, "environment", says="not enough memory")


@pytest.mark.slow
def test_a_python_without_docstrings_runs_it_whatever_libraries_need_them():
    done = command_line("models seprune/*", "pass", "-OO")
    assert done.returncode == 0, done.stderr
    assert "seprune/se_resnet8" in done.stdout
