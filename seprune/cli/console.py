"""The terminal: progress, errors, tables on stderr; results, JSON first of all, on stdout."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from seprune.errors import SepruneError, StoppedError, UsageError
from seprune.runtime.interrupts import safe_point
from seprune.runtime.launch import rank
from seprune.runtime.text import null_for_nan, printable

T = TypeVar("T")
_RESULTS: list[TextIO] = []  # stdout, while prints of other code go elsewhere
QUIET_SECONDS = 10.0
LONGEST = 8000  # characters of a part of a message
_ASCII = str.maketrans("█▏▎▍▌▋▊▉▁▂▃▄▅▆▇·×–—−…━╸╺─", "#:::::::_.-:=+*.x---~----")
_ASCII |= {ord("±"): "+-", ord("→"): "->"}  # type: ignore[dict-item]


def process() -> int:
    """The number of this process among those of `torchrun`; only the first one, 0, speaks."""
    with suppress(UsageError):  # which is about to be said
        return rank()
    return 0


class PlainConsole(Console):
    """A console for which text from files is only text, wherever it stands.

    No markup, no emoji codes, and no control character but those that rich itself makes.
    """

    def __init__(self, file: TextIO | None = None, *, quiet: bool = False) -> None:
        stream = file or sys.stderr
        super().__init__(file=stream, quiet=quiet, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """The text of a cell or a title, as wide as it will be shown."""
        return super().render_str(printable(text), **how)

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # strict POSIX locales, PYTHONIOENCODING=ascii
        table = {} if self.encoding.lower().startswith("utf") else _ASCII

        def plain(segment: Segment) -> Segment:
            if segment.is_control:
                return segment
            return segment._replace(text=printable(segment.text).translate(table))

        return super()._render_buffer(map(plain, buffer))

    def on_broken_pipe(self) -> None:
        """Leave it to `main`, as for every other write."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def stderr() -> Console:
    """Where people look: tables, progress, errors."""
    open_streams()
    return PlainConsole(quiet=process() > 0)


def stdout() -> Console:
    """Where results go that somebody asked for."""
    return PlainConsole(_results(), quiet=process() > 0)


@contextmanager
def results_apart() -> Iterator[None]:
    """Let what code prints that is called in the block go to stderr: stdout is for the results."""
    _RESULTS.append(sys.stdout)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _RESULTS.pop()


def _results() -> TextIO:
    open_streams()
    return _RESULTS[-1] if _RESULTS else sys.stdout


def open_streams() -> None:
    """Give the process the streams that it is without, and let none refuse a character.

    A closed stdout or stderr would otherwise be the number of the next file that is opened.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def close_pipes() -> None:
    """Let nothing more be written to a pipe whose reader has gone, also not at the very end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def track(
    iterable: Iterable[T],
    *,
    label: str,
    total: int,
    unit: str = "images",
    live: Callable[[], str] | None = None,
) -> Iterator[T]:
    """A bar with rate and time left in a terminal, a plain line now and then elsewhere."""
    source = _live if stderr().is_terminal else _plain
    for item in source(iterable, label, total, unit, live):
        yield item
        safe_point()


def _live(
    iterable: Iterable[T], label: str, total: int, unit: str, live: Callable[[], str] | None
) -> Iterator[T]:
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[numbers]}", markup=False),
    ]
    if live is None:  # in 80 columns only one of the two fits
        columns[2:2] = [MofNCompleteColumn(), TextColumn("{task.fields[unit]}", markup=False)]
        columns.append(TimeRemainingColumn(compact=True))
    with Progress(*columns, console=stderr(), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(label, total=total, unit=unit, numbers="")
        start = time.monotonic()
        for done, item in enumerate(iterable, 1):
            yield item
            rate = done / max(time.monotonic() - start, 1e-9)
            numbers = _rate(rate) if live is None else live()
            progress.update(task, completed=done, numbers=numbers)


def _plain(
    iterable: Iterable[T], label: str, total: int, unit: str, live: Callable[[], str] | None
) -> Iterator[T]:
    start = shown = time.monotonic()
    done = 0
    for done, item in enumerate(iterable, 1):
        yield item
        now = time.monotonic()
        if now - shown > QUIET_SECONDS:
            shown = now
            rate = done / (now - start)
            left = (total - done) / rate
            numbers = live() if live else f"{_rate(rate)}, {left:,.0f} s left"
            tell(f"{label}: {done:,}/{total:,} {unit}, {numbers}")
    took = time.monotonic() - start
    if took > 2:
        tell(f"{label}: {done:,} {unit} in {took:.1f} s{f', {live()}' if live else ''}")


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


def tell(line: str) -> None:
    """One line for people."""
    if process() == 0:
        open_streams()  # code that was called may have closed them
        print(printable(line), file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Text as a result on stdout."""
    if process() == 0:
        print(printable(text), file=_results())


def write_traceback() -> None:
    """Where the error that is being handled came from, for the report of a bug."""
    print(printable(traceback.format_exc()), file=sys.stderr, flush=True)


def give(document: Any) -> None:
    """The one JSON document on stdout; NaN and infinities become null."""
    if process() == 0:
        text = json.dumps(null_for_nan(document), indent=1, allow_nan=False, ensure_ascii=False)
        stream = _results()
        print(_escaped(text, stream), file=stream)


def wants_json() -> bool:
    """Whether the command line asks for JSON."""
    return "--json" in sys.argv[1:]


def fail(error: SepruneError | StoppedError) -> None:
    """Say what is wrong, why, and what to type next; so does a later process that failed first."""
    if process() not in (0, error.process):
        return
    open_streams()
    console = PlainConsole()
    parts = {"what": error.what, "why": error.why, "next": error.fix}
    parts = {name: _shortened(text) for name, text in parts.items()}
    console.print("error: ", style="bold red", end="")
    console.print(parts["what"], soft_wrap=True)
    for word in ("why", "next"):
        if parts[word]:
            console.print(f" {word}: ", style="bold", end="")
            console.print(parts[word], soft_wrap=True)
    if wants_json():
        give({"error": {"code": error.code, **parts}})


def _shortened(text: str) -> str:
    """A part of a message, which may hold names of any length out of a file."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]} ... ({len(text):,} characters) ... {text[-LONGEST // 4 :]}"


def help_line() -> str:
    """The help of the command that was typed."""
    from seprune.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    words = [w for w in sys.argv[1:2] if w in known | {"recipes", "latency-table"}]
    return " ".join(["seprune", *words, "--help"])


def _escaped(text: str, stream: TextIO) -> str:
    """JSON in which every character that is not to be printed, or cannot be, is an escape."""
    if text.isascii() and "\x7f" not in text:
        return text
    utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"

    def safe(letter: str) -> bool:
        return (letter.isprintable() or letter == "\n") and (utf8 or letter.isascii())

    return "".join(c if safe(c) else json.dumps(c)[1:-1].replace("\x7f", "\\u007f") for c in text)
