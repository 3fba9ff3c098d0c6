"""What an error that no code of seprune has put into words means to the user."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import traceback
from types import FrameType

from seprune.cli.console import help_line
from seprune.errors import (
    EnvironmentFault,
    InputError,
    SepruneError,
    StoppedError,
    UsageError,
    first_line,
)


class Raised(BaseException):
    """Carries an error that the parser of the command line would take for its own."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def disk_fault(error: OSError) -> SepruneError:
    """An error of the operating system that has no message of its own here."""
    if error.errno == errno.ENOMEM and (known := fault_behind(error)):
        return known
    if error.errno == errno.ENAMETOOLONG:
        return InputError(
            f"{error.filename or 'a path'}: there can be no such file",
            why=os.strerror(errno.ENAMETOOLONG),
            fix="check the path",
        )
    return EnvironmentFault(
        f"{error.filename or 'the output'}: cannot be read or written",
        why=os.strerror(error.errno) if error.errno else str(error),
        fix="check the disk and the permissions, and run the same command again",
    )


def fault_behind(error: Exception) -> SepruneError | None:
    """What another library's or a user's error means to the user, or None: then it is a bug."""
    complaint = getattr(error, "format_message", None)  # the parser's of the command line
    if complaint is not None or type(error).__name__ == "Abort":
        what = str(complaint()) if complaint is not None else "stopped at a question"
        return UsageError(what, why="the command line is wrong", fix=help_line())
    try:
        from seprune.models.usercode import failed_in
        from seprune.runtime.distributed import out_of_memory
        from seprune.runtime.environment import environment
    except ImportError as missing:  # also where memory is too short to map its libraries
        return EnvironmentFault(
            "torch cannot be imported",
            why=first_line(missing),
            fix="ulimit -v unlimited where memory is limited; else pip install torch torchvision",
        )

    if out_of_memory(error):
        return EnvironmentFault(
            "there is not enough memory for this",
            why=first_line(error),
            fix="smaller images or batches (--input, --batch, data.batch_size), or a "
            "machine with more memory",
        )
    pair = environment()["pair"]
    if not pair["fits"]:
        return EnvironmentFault(
            f"torch {pair['torch']} and torchvision {pair['torchvision']} do not fit each other",
            why=pair["reason"],
            fix=f"{pair['install']}; seprune env shows more",
        )
    if place := failed_in(error):
        return InputError(
            f"{place}: the code failed",
            why=f"{type(error).__name__}: {first_line(error)}",
            fix=f"mend {place}",
        )
    return None


def bug(error: Exception) -> SepruneError:
    """What to say after the traceback of an error that nobody foresaw."""
    return SepruneError(
        f"a bug in seprune: {type(error).__name__}",
        why=first_line(error),
        fix="please report it with the traceback above; finished stages are kept",
    )


def meant_by(end: BaseException) -> BaseException:
    """What to raise for an error that is no Exception: code that was called ends the process.

    Its own status would say that another thing went wrong, or nothing; and other processes of
    `torchrun` would wait for this one.
    """
    if isinstance(end, Raised):
        end = end.error
    if isinstance(end, EOFError):
        return end
    frame, line = _last_place(end)
    place = f"{frame.f_code.co_filename}:{line}"
    if isinstance(end, KeyboardInterrupt):
        return StoppedError(
            "stopped by KeyboardInterrupt; every finished stage is saved",
            signum=signal.SIGINT,
            why=f"{place}: code raised it, or took over what Ctrl-C does",
            fix=f"go on with: {shlex.join(['seprune', *sys.argv[1:]])}",
        )
    if isinstance(end, SystemExit):
        if isinstance(end.__context__, BrokenPipeError):  # the parser's way out of a broken pipe
            return end.__context__
        if str(frame.f_globals.get("__name__")).partition(".")[0] in ("typer", "click"):
            return end
        call = f"sys.exit({'' if end.code is None else first_line(end)})"
        fix = 'put what a program does, and what ends it, under if __name__ == "__main__":'
    else:
        call = f"raise {type(end).__name__}({end})"
        fix = "let it raise an Exception where something is wrong, and nothing else"
    return InputError("code that was called ended the process", why=f"{place}: {call}", fix=fix)


def _last_place(error: BaseException) -> tuple[FrameType, int]:
    *_, place = traceback.walk_tb(error.__traceback__)
    return place
