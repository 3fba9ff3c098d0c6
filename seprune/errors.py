"""Every fault a user can meet: what is wrong and where, why, what to type next."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of the error's message; the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class _ThreePartError(BaseException):
    """What is wrong and where, why, and what to type next. `code` names it in docs/errors.md."""

    code = "bug"
    exit_status = 1  # of the operating system's process
    process: int | None = None
    """Of several processes the one that failed first; None: alone, or all of them alike."""

    def __init__(self, what: str, *, why: str = "", fix: str = "", code: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix
        self.code = code or type(self).code

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why: {self.why}")
        if self.fix:
            lines.append(f"next: {self.fix}")
        return "\n".join(lines)


class SepruneError(_ThreePartError, Exception):
    """A foreseeable fault."""


class UsageError(SepruneError):
    """A command line or a recipe that cannot be carried out."""

    code = "usage"
    exit_status = 2


class InputError(SepruneError):
    """A checkpoint, model, data set, plan or run folder that cannot be used."""

    code = "input"
    exit_status = 3


class EnvironmentFault(SepruneError):
    """A missing extra, no device, a full disk, out of memory at batch 1."""

    code = "environment"
    exit_status = 4


class LockedError(SepruneError):
    """Another process works in the same run folder."""

    code = "locked"
    exit_status = 6


class StoppedError(_ThreePartError):
    """A signal ended the run; its state is saved.

    Like KeyboardInterrupt it is no Exception: no `except Exception` around a user's forward
    may take it for a fault of that forward, and go on.
    """

    code = "stopped"

    def __init__(self, what: str, *, signum: int, why: str = "", fix: str = "") -> None:
        super().__init__(what, why=why, fix=fix)
        self.exit_status = 128 + signum


class PeerError(SepruneError):
    """What ended another process of the same run, and so this one too."""

    def __init__(self, what: str, *, why: str, fix: str, code: str, exit_status: int) -> None:
        super().__init__(what, why=why, fix=fix, code=code)
        self.exit_status = exit_status
