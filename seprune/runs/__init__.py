"""The run folder: lock, journal, resume; signals; what the machine is. Torch-free at import."""

from seprune.runs.environment import environment
from seprune.runs.folder import RunFolder, open_run, verify
from seprune.runs.interrupts import interrupts, safe_point, unbroken
from seprune.runs.journal import Record, stage_key
from seprune.runs.lock import hold, waiting_for

__all__ = [
    "Record",
    "RunFolder",
    "environment",
    "hold",
    "interrupts",
    "open_run",
    "safe_point",
    "stage_key",
    "unbroken",
    "verify",
    "waiting_for",
]
