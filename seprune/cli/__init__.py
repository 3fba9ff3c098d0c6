"""The command line: parses, calls, prints. What a command decides is decided in the library.

`app` lists the commands, each in a file of its own; `console` owns the terminal, `options` has the
options that commands share, `open_inputs` opens what they name.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext

from seprune.cli import console
from seprune.cli.app import app as app
from seprune.errors import EnvironmentFault, SepruneError, StoppedError
from seprune.runtime.launch import world_size

PIPE_STATUS = 141  # as of a program that SIGPIPE ended


def _united() -> AbstractContextManager[None]:
    """Under `torchrun`: the processes end together."""
    if world_size() == 1:
        return nullcontext()
    from seprune.runtime.distributed import united

    return united()


def _require_folder() -> None:
    """Paths are relative to the working folder, and torch's libraries end without one."""
    try:
        os.getcwd()
    except OSError as error:
        raise EnvironmentFault(
            "the working folder is gone",
            why=error.strerror or str(error),
            fix="cd to a folder that is there, and run the same command again",
        ) from error


def main() -> None:
    """Run the command line; the one border where errors become exit statuses."""
    console.open_streams()
    try:
        status = _run()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # the reader of stdout or stderr has gone; nothing saved is lost
        console.close_pipes()
        status = PIPE_STATUS
    except OSError:  # stdout fails, and Python would report it once more at the end
        console.close_pipes()
        status = 4
    sys.exit(status)


def _run() -> int:
    """The exit status of the command that was typed, its error printed.

    Raises:
        OSError: stdout or stderr fails.
    """
    from seprune.runtime.interrupts import interrupts

    try:
        _require_folder()
        with interrupts(), _united():
            status = _called()
        return status if isinstance(status, int) else 0
    except (SepruneError, StoppedError) as error:
        if error.process is not None:  # torchrun stops whom it finds still leaving
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        fault: SepruneError | StoppedError = error
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk that fails where nobody writes: reading, or stdout
        fault = console.disk_fault(error)
    except Exception as error:
        known = console.fault_behind(error)
        if known is None:
            console.write_traceback()
        fault = known or console.bug(error)
    console.fail(fault)
    return fault.exit_status


def _called() -> object:
    """What the command returns.

    Raises:
        InputError: code of the user or of a package ends the process, whose own status would say
            that another thing went wrong, or nothing.
    """
    try:
        return app(standalone_mode=False)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # the parser's way out of a broken pipe
            raise end.__context__ from None
        if not console.is_foreign(end):
            raise
        raise console.ended_by_code(end) from end
