"""The command line: parses, calls, prints. What a command decides is decided in the library.

`console` owns the terminal, `options` the words that commands share, `stages` the work on files,
`about` what looks and tells.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext

import typer

from seprune.cli import about, console, masking, stages, sweeping
from seprune.errors import SepruneError, StoppedError

app = typer.Typer(
    name="seprune",
    help="Prune Squeeze-and-Excitation networks by what their own gates say about each channel.\n\n"
    "\b\nExample:\n  seprune run quickstart --out runs/quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stages.register(app)
masking.register(app)
sweeping.register(app)
about.register(app)


def _united() -> AbstractContextManager[None]:
    """Under `torchrun`: the processes end together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return nullcontext()
    from seprune.runtime.distributed import united

    return united()


def main() -> None:
    """Run the command line; the one border where errors become exit statuses."""
    from seprune.runtime.interrupts import interrupts

    try:
        with interrupts(), _united():
            status = app(standalone_mode=False)
        sys.stdout.flush()
    except (SepruneError, StoppedError) as error:
        if error.process is not None:  # torchrun stops whom it finds still leaving
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        console.fail(error)
        sys.exit(error.exit_status)
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # a disk that fails where nobody writes: reading, or stdout
        try:
            console.fail(console.disk_fault(error))
            sys.stdout.flush()
        except OSError:  # it is stdout that fails, and Python would say so once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(4)
    except Exception as error:
        fault = console.fault_behind(error)
        if fault is None:
            traceback.print_exc()
            fault = console.bug(error)
        console.fail(fault)
        sys.exit(fault.exit_status)
    sys.exit(status if isinstance(status, int) else 0)
