"""Per-sample gates on disk: one row per image, written while they come."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from torch import Tensor

from seprune.runtime.files import write_with


class RowFile:
    """Appends float32 rows of equal length to a temporary file."""

    def __init__(self, stream: IO[bytes], width: int) -> None:
        self._stream, self._width, self._count = stream, width, 0

    def append(self, values_BC: Tensor) -> None:
        """Add one row per sample."""
        self._stream.write(values_BC.float().cpu().numpy().tobytes())
        self._count += len(values_BC)

    def write(self, path: Path) -> None:
        """Write a .npy file of shape (samples, columns), float32, that numpy can memory-map."""
        self._stream.flush()
        self._stream.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._width)}

        def fill(temporary: Path) -> None:
            with temporary.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, header)
                shutil.copyfileobj(self._stream, out, 1 << 20)

        write_with(path, fill, need=4 * self._count * self._width)


@contextmanager
def open_rows(path: Path | None, width: int) -> Iterator[RowFile | None]:
    """A `RowFile` whose temporary file goes away at the end, or None where no path is given."""
    if path is None:
        yield None
        return
    with tempfile.TemporaryFile() as stream:
        yield RowFile(stream, width)
