"""The pages in a real browser: drawn, without a console message, without a network request."""

import dataclasses
import shutil
import socket
import subprocess
import threading

import pytest
from reports import CIFAR, make_report, unfinished_report

from seprune.report.compare import compare
from seprune.report.html import write_comparison, write_html

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium or Chrome is installed")

QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
    "--dump-dom",
]


class Listener:
    """A proxy that never answers: whatever the browser asks of the network arrives here."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:  # closed at the end of the test
                return
            with connection:
                connection.settimeout(5)
                self.asked.append(connection.recv(200).decode(errors="replace"))


@pytest.fixture
def listener():
    found = Listener()
    yield found
    found.server.close()


def open_page(page, profile, listener, *, width: int = 1280, dark: bool = False):
    """The page's DOM after its scripts ran, and what it wrote to the console."""
    flags = [
        f"--user-data-dir={profile}",
        f"--proxy-server={listener.address}",
        f"--window-size={width},9000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    ]
    done = subprocess.run(
        [BROWSER, *QUIET, *flags, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def of_page(listener: Listener) -> list[str]:
    """First lines of the requests that are not the browser's own (to its vendor)."""
    own = ("google", "gstatic", "gvt1")
    lines = [asked.partition("\r")[0] for asked in listener.asked]
    return [line for line in lines if not any(name in line for name in own)]


def test_a_request_would_be_noticed(tmp_path, listener) -> None:
    (tmp_path / "page.html").write_text("<img src='http://example.org/pixel.png'>")
    open_page(tmp_path / "page.html", tmp_path / "profile", listener)
    assert "GET http://example.org/pixel.png HTTP/1.1" in of_page(listener)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_a_report_opens(tmp_path, listener, width: int, dark: bool) -> None:
    write_html(make_report(), tmp_path / "report ü.html")
    dom, console = open_page(
        tmp_path / "report ü.html", tmp_path / "profile", listener, width=width, dark=dark
    )
    assert console == []
    assert of_page(listener) == []
    assert f'data-theme="{"dark" if dark else "light"}"' in dom
    drawn = dom.count('class="figure js-plotly-plot"')
    assert drawn == dom.count("data-figure=") == 9 + 3
    for name in ("fine-tuned", "kept", "all classes", CIFAR[0]):
        assert f">{name}</text>" in dom


def test_hostile_names_run_nothing(tmp_path, listener) -> None:
    evil = "<img src=x onerror=\"document.title='pwned'\"></script><script>document.title='pwned'"
    report = make_report()
    gates = [dataclasses.replace(report.gates[0], name=evil), *report.gates[1:]]
    report = dataclasses.replace(report, name=evil, gates=gates)
    report.data["classes"] = [evil] * 10
    write_html(report, tmp_path / "report.html")
    dom, console = open_page(tmp_path / "report.html", tmp_path / "profile", listener)
    assert "<title>pwned" not in dom
    assert console == []
    assert of_page(listener) == []


def test_an_unfinished_report_and_a_comparison_open(tmp_path, listener) -> None:
    write_html(unfinished_report(), tmp_path / "unfinished.html")
    reports = [make_report(criterion=c, seed=s) for c in ("gate_logit", "l2") for s in (0, 1)]
    write_comparison(compare(reports), tmp_path / "compare.html")
    for name in ("unfinished.html", "compare.html"):
        dom, console = open_page(tmp_path / name, tmp_path / "profile", listener)
        assert console == []
    assert ">Pareto front</text>" in dom
    assert of_page(listener) == []
