"""What foreign code may change of the process, and what it has to be again afterwards."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Streams, working folder, signal handlers and torch's defaults are as before afterwards.

    A file that sets them at its top does it for a program of its own. Relative paths would name
    other files, results go elsewhere, Ctrl-C lose work, and training have nothing to derive.
    """
    streams, folder = (sys.stdout, sys.stderr), None
    with suppress(OSError):  # it is gone
        folder = os.getcwd()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    derives = torch.is_grad_enabled()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        with suppress(OSError):
            os.chdir(folder or ".")
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)
        torch.set_grad_enabled(derives)
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # None: set by code that is no Python
                    signal.signal(number, handler)
