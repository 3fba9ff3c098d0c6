"""The command line: parses, calls, prints. What a command decides is decided in the library.

`app` lists the commands, each in a file of its own; `console` owns the terminal, `options` has the
options that commands share, `open_inputs` opens what they name.
"""

from __future__ import annotations

import signal
import sys
from contextlib import AbstractContextManager, nullcontext

from seprune.cli import console, faults
from seprune.cli.app import app as app
from seprune.errors import SepruneError, StoppedError
from seprune.runtime.launch import world_size
from seprune.runtime.paths import working_here

PIPE_STATUS = 141  # as of a program that SIGPIPE ended


def _united() -> AbstractContextManager[None]:
    """Under `torchrun`: the processes end together."""
    if world_size() == 1:
        return nullcontext()
    from seprune.runtime.distributed import united

    return united()


def main() -> None:
    """Run the command line; the one border where errors become exit statuses."""
    console.open_streams()
    try:
        status = _run()
        console.open_streams()
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
        with working_here(), interrupts(), _united():
            status = _called()
        return status if isinstance(status, int) else 0
    except (SepruneError, StoppedError) as error:
        if error.process is not None:  # torchrun stops whom it finds still leaving
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        fault: SepruneError | StoppedError = error
    except BrokenPipeError:
        raise
    except OSError as error:  # a disk that fails where nobody writes: reading, or stdout
        fault = faults.disk_fault(error)
    except Exception as error:
        known = faults.fault_behind(error)
        if known is None:
            console.write_traceback()
        fault = known or faults.bug(error)
    console.fail(fault)
    return fault.exit_status


def _called() -> object:
    """What the command returns.

    Raises:
        InputError: code of the user or of a package ends the process.
        StoppedError: it was ended by KeyboardInterrupt.
    """
    try:
        return app(standalone_mode=False)
    except (Exception, StoppedError):
        raise
    except BaseException as end:
        if (meant := faults.meant_by(end)) is end:
            raise
        raise meant from end
