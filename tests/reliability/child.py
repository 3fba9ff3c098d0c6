"""Child processes that answer: one JSON line for each that they are asked."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Crash(AssertionError):
    """The child died or did not answer."""


class Child:
    """`python SCRIPT` of this folder; `child(request)` gives its answer."""

    def __init__(self, script: str) -> None:
        plain = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / script)],
            env={**os.environ, **plain, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __call__(self, request: object, limit: float = 10) -> Any:
        """Ask; the answer must come within `limit` seconds."""
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        if not select.select([self.process.stdout], [], [], limit)[0]:
            raise Crash(f"hang: no answer within {limit} s")
        line = self.process.stdout.readline()
        if not line:
            status, output = self.process.wait(), self.process.stderr.read()
            raise Crash(f"death: status {status}: {output[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End it; it has nothing to save."""
        self.process.kill()
        self.process.communicate()
