"""One round of each kind of fault on a run folder, and what must hold afterwards.

The tests do a few rounds, `benchmarks/faults.py` does many; both call the functions here, which
raise AssertionError where a promise is broken.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from failing import DIED
from folders import leftovers
from PIL import Image
from warm import Done, Warm

DISK = ("ENOSPC", "EIO", "EACCES")
TINY = (
    "model.name=seprune/se_resnet8",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "train.batch_size=8",
    "collect.images=16",
    "collect.batch_size=8",
    "plan.macs=0.5",
    "plan.min_channels=2",
    "plan.candidates=false",  # nothing more is written, and a refit for each of them is saved
    "finetune.epochs=1",
    "finetune.batch_size=8",
    "finetune.recalibrate=16",
    "data.cache=memory",
    "report.latency=false",
    "report.html=false",
    "device=cpu",
)


def tiny_images(folder: Path) -> Path:
    """Three classes of 12 + 4 images of 12x12, always the same."""
    random_bytes = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(3):
            home = folder / part / f"class{label}"
            home.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = random_bytes.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(home / f"{number}.png")
    return folder


def tiny(images: Path, *overrides: str) -> tuple[str, ...]:
    """The arguments of a whole run of less than a second."""
    return ("quickstart", *TINY, f"data.source={images}", "model.input=[3,12,12]", *overrides)


@dataclass(frozen=True)
class Subject:
    """A run: its command line, the files it reads, and what an unbroken one ends with."""

    warm: Warm
    home: Path  # run folders and logs go below it
    argv: tuple[str, ...]
    inputs: Path | None = None
    result: str = ""

    @classmethod
    def unbroken(
        cls, warm: Warm, home: Path, argv: tuple[str, ...], inputs: Path | None = None
    ) -> Subject:
        """The subject after one run that nothing disturbs."""
        home.mkdir(parents=True, exist_ok=True)
        subject = cls(warm, home, argv, inputs)
        done = subject.run(home / "whole")
        assert done.status == 0, done.output
        return cls(warm, home, argv, inputs, result(home / "whole"))

    def log(self) -> Path:
        return self.home / f"log-{random.getrandbits(60):x}"

    def run(self, out: Path, **how: object) -> Done:
        """The command in `out`, to its end."""
        log = self.log()
        done = self.warm.run(log, "run", *self.argv, "--out", out, **how)
        log.unlink()
        return done

    def start(self, out: Path, **how: object) -> int:
        """The command in `out`, in the background."""
        return self.warm.start(self.log(), "run", *self.argv, "--out", out, **how)

    def readable(self, out: Path) -> None:
        """Committed stages are readable, by the command that a user types."""
        if (out / "journal.jsonl").exists():
            log = self.log()
            done = self.warm.run(log, "verify", out)
            log.unlink()
            assert done.status == 0, done.output

    def finished(self, out: Path) -> None:
        """The same command ends, with the results of the unbroken run and nothing left over."""
        done = self.run(out)
        assert done.status == 0, done.output
        assert result(out) == self.result, differences(self.home / "whole", out)
        assert leftovers(out) == []
        self.readable(out)


def result(out: Path) -> str:
    """A hash of all that a run ends with, but for times and rates."""
    return hashlib.sha256(json.dumps(parts(out), sort_keys=True).encode()).hexdigest()


def parts(out: Path) -> dict[str, str]:
    """Weights, statistics, plans, scores and metrics: name, and hash or text."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        plain = path.name in ("plan.json", "importance.csv", "config.json")
        if plain or (path.suffix == ".safetensors" and "/state/" not in name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.name == "metrics.jsonl":
            found[name] = re.sub(r'"images_per_second": [^,}]+', "", path.read_text())
    found["measurements"] = json.dumps(
        json.loads((out / "report.json").read_text())["measurements"]
    )
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    a, b = parts(one), parts(other)
    return sorted(name for name in a | b if a.get(name) != b.get(name))


def reported(done: Done, *statuses: int) -> None:
    """It ended with a documented status and an error in three parts."""
    assert done.status in statuses, (done.status, done.output)
    assert "Traceback" not in done.output, done.output
    for word in ("error: ", " why: ", " next: "):
        assert word in done.output, done.output


def operations(subject: Subject) -> int:
    """How many file operations a whole run has."""
    out, log = subject.home / "counted", subject.home / "operations"
    log.unlink(missing_ok=True)
    subject.run(out, fail={"root": str(out), "log": str(log)})
    shutil.rmtree(out)
    return len(log.read_text().splitlines())


def fail_operation(subject: Subject, number: int, how: str) -> bool:
    """Let one file operation of a run fail; whether the run noticed."""
    out = subject.home / f"{how}-{number}"
    done = subject.run(out, fail={"root": str(out), "at": number, "how": how})
    noticed = done.status != 0
    if how == "exit":
        assert done.status in (0, DIED), done.output
    elif noticed:
        reported(done, 4, *(() if how == "ENOSPC" else (3,)))  # 3: what cannot be read
        assert leftovers(out) == [] or how == "EACCES", leftovers(out)
    subject.readable(out)
    subject.finished(out)
    shutil.rmtree(out)
    return noticed


def patient(span: float, before: int, out: Path) -> tuple[float, int]:
    """How long to let the next process live at most, and how far the run has come.

    A stage that takes longer than `span` would otherwise never be finished, only killed.
    """
    files = sum(1 for _ in out.rglob("*")) if out.exists() else 0
    return (3.0 if files > before else min(1.3 * span, 30.0)), max(files, before)


def kill(subject: Subject, out: Path, after: float, signum: int = signal.SIGKILL) -> bool:
    """Stop a run by a signal; True if it was through before."""
    done = subject.warm.kill(subject.start(out), after, signum)
    if (out / "report.json").exists() and done.status in (0, -signum):
        assert result(out) == subject.result, differences(subject.home / "whole", out)
        return True
    if signum == signal.SIGKILL:
        assert done.status == -signum, done.output
    elif (out / "journal.jsonl").exists():  # before that, Python itself may still be starting
        stopped(done, signum)
    subject.readable(out)
    return False


def stopped(done: Done, signum: int) -> None:
    """It ended as the signal demands, and said how to go on."""
    assert done.status == 128 + signum, (done.status, done.output)
    assert f"stopped by {signal.Signals(signum).name}; every finished stage is saved" in done.output
    assert "go on with: seprune " in done.output
    assert "Traceback" not in done.output, done.output


def crowd(subject: Subject, out: Path, count: int = 8) -> tuple[int, bool]:
    """Start `count` processes in one run folder at once and stop the one that works.

    Returns how many were refused by naming the one that works, and whether that one was through
    before it was stopped: then others may have come after it.
    """
    gate = subject.home / f"gate-{random.getrandbits(60):x}"
    pids = [subject.start(out, gate=str(gate)) for _ in range(count)]
    gate.touch()
    ended: dict[int, Done] = {}
    while len(ended) < count - 1:  # the one that works goes on, or is the last to end
        for pid in set(pids) - set(ended):
            if done := subject.warm.wait(pid, 0.02):
                ended[pid] = done
    for pid in set(pids) - set(ended):
        ended[pid] = subject.warm.kill(pid, 0, signal.SIGTERM)
    gate.unlink()
    workers = [pid for pid, done in ended.items() if done.status != 6]
    through = any(ended[pid].status == 0 for pid in workers)
    assert through or len(workers) == 1, {pid: (d.status, d.output) for pid, d in ended.items()}
    for pid, done in ended.items():
        if pid not in workers:
            reported(done, 6)
            assert "another run works here" in done.output
        elif done.status != 0:
            stopped(done, signal.SIGTERM)
    subject.readable(out)
    names = [f"process {pid} on {os.uname().nodename}" for pid in workers]
    refused = [done.output for pid, done in ended.items() if pid not in workers]
    return sum(any(name in text for name in names) for text in refused), through
