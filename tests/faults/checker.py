"""A child process that looks at damaged run folders: `python checker.py`, requests on stdin.

A request is a run folder and the part of it to read (its first folder or file, or everything). The
answer is one JSON line: what `verify` says, and for each reader of that part a digest of what it
gave or the error's code. Anything that is no SepruneError ends the process with a traceback.
"""

from __future__ import annotations

import hashlib
import json
import random
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIMIT_SECONDS = 10
KINDS = ("flip", "cut", "extend", "zero", "delete", "copy", "empty")
Step = tuple[str, float, int, bytes]


class Checker:
    """The long-lived child; `checker(folder)` gives its answer."""

    def __init__(self) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, str(HERE / "checker.py")]
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def __call__(
        self, folder: Path, part: str = "", limit: float = LIMIT_SECONDS
    ) -> dict[str, Any]:
        self.process.stdin.write(json.dumps([str(folder), part]) + "\n")
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        assert ready, f"a hang: no answer within {limit} s"
        line = self.process.stdout.readline()
        assert line, f"status {self.process.wait()}: {self.process.stderr.read()[-3000:]}"
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class Damaged:
    """A finished run of which one file at a time is damaged, looked at, and put back."""

    def __init__(self, run: Path, checker: Checker):
        self.run, self.checker = run, checker
        self.good = {
            p.relative_to(run).as_posix(): p.read_bytes()
            for p in sorted(run.rglob("*"))
            if p.is_file() and p.stat().st_size
        }
        self.right = checker(run, limit=120)
        assert self.right.pop("verify") == []

    def check(self, name: str, steps: list[Step]) -> bool:
        """Damage one file: what is read is right or refused, and `verify` finds the damage.

        Returns whether the damage changed the file at all.
        """
        broken = damage(self.good[name], steps)
        path = self.run / name
        path.write_bytes(broken)
        try:
            found = self.checker(self.run, name)
            assert path.read_bytes() == broken, f"{name} was changed"
        finally:
            path.write_bytes(self.good[name])
        if broken == self.good[name]:
            assert found.pop("verify") == []
            return False
        # a journal may end in the middle of a line: that is what a power loss leaves
        problems = found.pop("verify")
        assert problems or name == "journal.jsonl", f"{name}: the damage is not found"
        for reader, answer in found.items():
            right = self.right[reader]
            refused = isinstance(answer, dict) and answer["status"] == 3 and answer["parts"]
            assert answer == right or refused, f"{reader} of {name}: {answer}"
        return True


def damage(content: bytes, steps: list[Step]) -> bytes:
    """Apply flips, cuts, insertions, zeroed, deleted, copied ranges, and emptying."""
    changed = bytearray(content)
    for kind, where, bit, extra in steps:
        if not changed:
            break
        at = min(int(where * len(changed)), len(changed) - 1)
        end = at + len(extra)
        if kind == "flip":
            changed[at] ^= 1 << bit
        elif kind == "cut":
            del changed[at:]
        elif kind == "extend":
            changed[at:at] = extra
        elif kind == "zero":
            changed[at:end] = bytes(len(changed[at:end]))
        elif kind == "delete":
            del changed[at:end]
        elif kind == "copy":
            changed[at:at] = changed[at // 2 : at // 2 + len(extra)]
        else:
            changed.clear()
    return bytes(changed)


def random_steps(source: random.Random) -> list[Step]:
    """One to three damages."""
    return [
        (
            source.choice(KINDS[:-1]) if source.random() > 0.01 else "empty",
            source.random(),
            source.randrange(8),
            source.randbytes(source.randint(1, 40)),
        )
        for _ in range(source.randint(1, 3))
    ]


# -- the child -------------------------------------------------------------------------------------


def look(run: Path, part: str = "") -> dict[str, Any]:
    """What each reader makes of its part of the run folder."""
    from seprune import saved
    from seprune.finetuning.generations import load_generation
    from seprune.plan import PruningPlan
    from seprune.report import measurement
    from seprune.runs import RunFolder, verify
    from seprune.statistics import GateStatistics

    readers: dict[str, Callable[[], str]] = {
        "statistics.safetensors": lambda: tensors(
            _flat(GateStatistics.load(run / "statistics.safetensors"))
        ),
        "pruned": lambda: tensors(saved.load(run / "pruned").state_dict()),
        "finetuned": lambda: tensors(saved.load(run / "finetuned").state_dict()),
        "finetuned/state": lambda: "read" if load_generation(run / "finetuned/state") else "none",
    }
    # these have no hash of their own, so that people can edit them: they may say something else
    unchecked: dict[str, Callable[[], object]] = {
        "plan.json": lambda: PruningPlan.load(run / "plan.json").layers(),
        "report.json": lambda: measurement.read(run),
        "journal.jsonl": RunFolder(run).records,
    }
    for name, read in unchecked.items():
        if part.startswith(name):
            _told(read)
    found = _told(lambda: verify(run))
    problems = [str(found)] if isinstance(found, dict) else found
    concerned = {n: read for n, read in readers.items() if not part or part.startswith(n)}
    return {"verify": problems, **{name: _told(read) for name, read in concerned.items()}}


def _told(read: Callable[[], Any]) -> Any:
    from seprune.errors import SepruneError

    try:
        return read()
    except SepruneError as error:
        parts = bool(error.what and error.why and error.fix)
        return {"code": error.code, "status": error.exit_status, "parts": parts}


def _flat(statistics: Any) -> dict[str, Any]:
    rooms = (statistics.values, statistics.units, statistics.groups)
    return {
        f"{number}/{owner}/{name}": tensor
        for number, room in enumerate(rooms)
        for owner, own in room.items()
        for name, tensor in own.items()
    }


def tensors(held: dict[str, Any]) -> str:
    """A hash of names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    for line in sys.stdin:
        folder, part = json.loads(line)
        print(json.dumps(look(Path(folder), part)), flush=True)
