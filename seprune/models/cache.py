"""Caches of downloaded files, which belong to the libraries that download them."""

from __future__ import annotations

import errno
import os

from seprune.errors import EnvironmentFault

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ENAMETOOLONG,
             errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENXIO)  # fmt: skip


def cache_fault(what: str, variable: str, error: BaseException) -> EnvironmentFault | None:
    """The disk refused to keep a download; None where an error is about something else.

    Args:
        what: was to be kept.
        variable: of the environment, that names the cache's folder.
    """
    if isinstance(error, ConnectionError) or not isinstance(error, OSError):
        return None
    if error.errno not in (*NO_SPACE, *_NO_PLACE):
        return None
    space = "free some space, or " if error.errno in NO_SPACE else ""
    disk = "on another disk" if space else "that you may write to"
    return EnvironmentFault(
        f"{what} cannot be kept in the cache",
        why=os.strerror(error.errno),
        fix=f"{space}let {variable} name a folder {disk}",
    )
