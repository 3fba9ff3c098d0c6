"""The documentation site: built without a warning, opened in a browser, and it asks nobody else."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

import seprune

ROOT = Path(__file__).parents[2]
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def test_every_command_and_every_public_name_has_an_entry(site: Path) -> None:
    from seprune.cli.app import COMMANDS

    commands, names = ((site / page / "index.html").read_text() for page in ("cli", "python"))
    for command in COMMANDS:
        assert f">seprune {command}" in commands
    for name in set(seprune.__all__) - {"__version__"}:
        assert re.search(rf'id="seprune\.[\w.]+\.{name}"', names), name


def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        place = "http://site/" + page.relative_to(site).as_posix()
        for attribute, target in re.findall(r'(?<![\w-])(href|src)="([^"]*)"', text):
            url = urlsplit(urljoin(place, target))
            if url.netloc != "site":
                assert attribute == "href", f"{page}: loads {target}"
                continue
            found = site / url.path.lstrip("/")
            found = found / "index.html" if found.is_dir() else found
            assert found.is_file(), f"{page}: {target}"
            if url.fragment and found.suffix == ".html":
                known = re.findall(r'\bid="([^"]+)"', found.read_text())
                assert url.fragment in known or url.fragment.startswith("__"), f"{page}: {target}"


@pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("page", ["", "results/", "examples/", "python/", "cli/"])
def test_pages_open_without_an_error(address: str, tmp_path: Path, page: str) -> None:
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--virtual-time-budget=5000", f"--user-data-dir={tmp_path}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--dump-dom",
            address + page,
        ],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "<h1" in done.stdout
