"""What people install: built, put into an environment of its own, and used there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import seprune

ROOT = Path(__file__).parents[1]
SLOW = pytest.mark.slow


def test_one_version_everywhere() -> None:
    released = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released
    assert cited
    assert released[1] == cited[1] == seprune.__version__


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel made from it."""
    for name in ("build", "hatchling"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    found = _run(command, out)
    assert found[0] == 0, found
    return out


@pytest.fixture(scope="module")
def clean(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and what it depends on by a path to where that is."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    options = ("install", "--no-deps", "--no-index", "--disable-pip-version-check")
    found = _run([sys.executable, "-m", "pip", "--python", python, *options, wheel], home)
    assert found[0] == 0, found
    (packages,) = (home / "lib").glob("python*/site-packages")
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others) + "\n")
    return home


def _run(command: Sequence[str | Path], cwd: Path) -> tuple[int, str, str]:
    mine = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=mine, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def _files(folder: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@SLOW
def test_the_wheel_holds_the_package_and_the_recipes_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    assert held == _files("seprune") | {f"seprune/{name}" for name in _files("recipes")}
    assert {
        "seprune/py.typed", "seprune/__init__.pyi", "seprune/digits/digits.npz",
        "seprune/digits/ATTRIBUTION", "seprune/report/page.css", "seprune/report/page.js",
        "seprune/report/page.html.j2", "seprune/recipes/quickstart.yaml",
    } <= held  # fmt: skip
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@SLOW
def test_the_sdist_holds_what_tests_and_documents_need(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("seprune", "recipes", "tests", "docs", "examples", "benchmarks", ".github"):
        assert _files(folder) <= held, folder
    roots = {p.name for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".git")}
    assert roots <= held


@SLOW
def test_twine_has_nothing_to_say(dist: Path) -> None:
    pytest.importorskip("twine", reason="twine is not installed")
    command = [sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir()]
    code, out, error = _run(command, dist)
    assert code == 0, out + error
    assert out.count("PASSED") == 2


@SLOW
def test_it_works_where_it_is_installed(clean: Path, tmp_path: Path) -> None:
    script = clean / "bin" / "seprune"
    assert _run([script, "--version"], tmp_path)[1] == f"seprune {seprune.__version__}\n"
    where = _run([clean / "bin/python", "-c", "import seprune; print(seprune.__file__)"], tmp_path)
    assert clean in Path(where[1].strip()).parents
    listed = _run([script, "recipes", "ls"], tmp_path)
    assert listed[0] == 0, listed
    shipped = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name for name in shipped if name in "".join(listed[1:])} == shipped
    found = _run([script, "models", "seprune/*"], tmp_path)
    assert found[0] == 0, found
    assert "seprune/se_resnet20" in "".join(found[1:])


@SLOW
def test_a_run_there_ends_in_a_report(clean: Path, tmp_path: Path) -> None:
    given = ("train.epochs=1", "train.warmup_epochs=0", "finetune.epochs=1", "device=cpu")
    command = [clean / "bin" / "seprune", "run", "quickstart", *given, "report.latency=false"]
    found = _run([*command, "--out", "run"], tmp_path)
    assert found[0] == 0, found
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
