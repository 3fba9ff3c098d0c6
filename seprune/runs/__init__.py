"""The run folder: lock, journal, resume; signals; what the machine is. Torch-free at import."""

from seprune.runs.environment import environment
from seprune.runs.folder import Record, RunFolder, open_run, stage_key, verify
from seprune.runs.interrupts import interrupts, safe_point, unbroken

__all__ = [
    "Record",
    "RunFolder",
    "environment",
    "interrupts",
    "open_run",
    "safe_point",
    "stage_key",
    "unbroken",
    "verify",
]
