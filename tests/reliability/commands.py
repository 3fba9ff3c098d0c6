"""Single commands that are killed, and what their folders must hold afterwards.

`kill_at` ends a command at its n-th rename or fsync, `kill_after` after a share of its time,
`kill_in` after a share of one stage's. In each case what was there before is whole, or what the
command makes is, and the same command then makes what an undisturbed one does.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from failing import DIED
from folders import contents, leftovers
from harness import Subject, reported
from warm import Done, Warm

from seprune.measure.latency_table import LatencyTable, TableKey
from seprune.pipeline.run_folder import verify
from seprune.runtime.checksums import check_sums
from seprune.runtime.transaction import is_staged, settle

PUT = ("replace", "rename", "fsync")  # what puts files in place
PRINTED = ("sensitivity", "evaluate")  # commands whose result is on stdout
MEASURED = ("report.json", "README.md", "accuracy.png")  # with times; beside a saved network
LOCKED = 6
BUSY = ("lock", "lock.json", "log.txt")
TIMES = re.compile(
    r'"(images_per_second|seconds|created|since|time|disk_free)": ("[^"]*"|[^,}\]]+)'
)


@dataclass(frozen=True)
class Command:
    """`seprune WORDS` with `{out}` in them, the folder that it writes in.

    Attributes:
        exact: what it writes is the same byte for byte each time; else names, sizes of weights and
            what is not a time are compared.
        goes_on: it leaves a state, from which the same command goes on.
        again: its exit status where its work is done already.
        cache: the user's cache folder.
    """

    words: tuple[str, ...]
    exact: bool = True
    goes_on: bool = False
    again: int = 0
    cache: str = "{out}"


def commands(run: Subject, home: Path) -> dict[str, Command]:
    """Each command that works on its own, on what a whole run has left.

    Args:
        run: a finished tiny run.
        home: where further inputs go.
    """
    whole, images = run.home / "whole", str(run.inputs)
    trained, pruned = str(whole / "trained"), str(whole / "pruned")
    pickled = home / "model.pkl"
    if not pickled.exists():
        home.mkdir(parents=True, exist_ok=True)
        torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2)), pickled)
    key = replace(TableKey.here("eager", batch=1), threads=1)
    table = home / "seprune" / "latency" / key.file_name()
    LatencyTable(key, {"conv": 1.0}).save(table)
    few = ("--data", images, "--set", "collect.images=16", "--set", "data.validation=0.25")
    cut = (*("prune", trained, "--importance", "l2", "--macs", "0.5"), *few)
    cut += ("--set", "plan.min_channels=2", "--no-measure", "--out", "{out}", "--recover")
    tuning = ("--epochs", "2", "--lr", "0.01", "--set", "finetune.recalibrate=16")
    kept = [word for word in run.argv if not word.startswith(("finetune.", "plan.macs"))]
    planned = ("plan.allocation=sensitivity", "sensitivity.images=4", "prune.recover=refit")
    swept = ("finetune.epochs=0", "finetune.recalibrate=0", "plan.macs=0.6,0.5")
    times = {"exact": False, "goes_on": True}
    return {
        "save": Command((*cut, "none")),
        "refit": Command((*cut, "refit")),
        "reconstruct": Command((*cut, "reconstruct", "--set", "prune.epochs=2")),
        "finetune": Command(("finetune", pruned, *few, *tuning, "--out", "{out}"), **times),
        "collect": Command(("collect", trained, *few, "--out", "{out}/s.safetensors")),
        "rank": Command(("rank", trained, "--importance", "l2", "--out", "{out}/scores.csv")),
        "sensitivity": Command(("sensitivity", trained, *few, "--importance", "l2")),
        "rows": Command(
            ("collect", trained, *few, "--per-sample", "{out}/g.npy", "--out", "{out}/s/t")
        ),
        "dry run": Command((*cut[:-1], "--dry-run")),
        "evaluate": Command(("evaluate", pruned, "--data", images)),
        "export": Command(("export", pruned, "--onnx", "{out}/small.onnx")),
        "int8": Command(
            ("export", pruned, "--onnx", "{out}/s.onnx", "--int8", "--data", images), goes_on=True
        ),
        "torch.export": Command(("export", pruned, "--pt2", "{out}/small.pt2")),
        "convert": Command(("convert", str(pickled), "--allow-pickle", "--out", "{out}/w.pt")),
        "report": Command(("report", str(whole), "--csv", "{out}/r.csv")),
        "page": Command(("report", str(whole), "--html", "{out}/r.html")),
        "compare": Command(("compare", str(whole), str(whole), "--csv", "{out}/c.csv")),
        "run": Command(("run", *run.argv, *planned, "--out", "{out}"), **times),
        "sweep": Command(("sweep", *kept, *swept, "--out", "{out}"), **times),
        "recipe": Command(("recipes", "cp", "quickstart", "{out}/mine.yaml"), again=2),
        "latency tables": Command(("latency-table", "build", trained), **times),
        "given table": Command(("latency-table", "build", trained, "--table", str(table)), **times),
        "table": Command(("latency-table", "export", "{out}/t.json"), cache=str(home)),
    }


MARKED = """
import time
from seprune.pipeline.runner import Runner

carry_out = Runner._carry_out

def mark(*words):
    with open({log!r}, "a") as log:
        print(*words, time.monotonic(), file=log)

def marked(self, stage, key):
    name = stage.name.partition("/")[0]
    mark("begin", name)
    record = carry_out(self, stage, key)
    mark("end", name)
    return record

Runner._carry_out = marked
"""


@dataclass
class Killed:
    """One command on its way through kills.

    Attributes:
        made: what an undisturbed one makes.
        seconds: that it took; later the mean of this and of those that ended before their kill.
        stages: its stages, and the seconds of each.
    """

    warm: Warm
    home: Path
    command: Command
    made: dict[str, str]
    operations: int
    seconds: float
    stages: dict[str, float]

    @classmethod
    def of(cls, warm: Warm, home: Path, command: Command) -> Killed:
        """After one that nothing disturbs."""
        home.mkdir(parents=True)
        log, out = home / "operations", home / "whole"
        out.mkdir()
        fail = {"root": str(out), "log": str(log), "only": PUT}
        start = time.monotonic()
        done = _run(warm, home, command, out, fail=fail, before=MARKED.format(log=_marks(home)))
        seconds = time.monotonic() - start
        assert done.status == 0, done.output
        count = len(log.read_text().splitlines()) if log.exists() else 0
        begun, ended = (_times(home, word) for word in ("begin", "end"))
        stages = {name: ended[name] - begun[name] for name in begun}
        return cls(warm, home, command, _made(command, out), count, seconds, stages)

    def kill_at(self, number: int, *, over: bool = True) -> None:
        """Kill it at its n-th rename or fsync, over what is there or in an empty folder."""
        out = self.home / "at"
        old = self._fresh(out, over=over)
        fail = {"root": str(out), "at": number, "how": "exit", "only": PUT}
        done = _run(self.warm, self.home, self.command, out, fail=fail)
        assert done.status == DIED, done.output
        self._old_or_new(out, old)
        self.finished(out)

    def fail_at(self, number: int, how: str) -> bool:
        """Let its n-th file operation of any kind fail; whether it noticed, with status 4."""
        out = self.home / "fail"
        old = self._fresh(out, over=True)
        fail = {"root": str(out), "at": number, "how": how}
        done = _run(self.warm, self.home, self.command, out, fail=fail)
        if done.status:
            reported(done, 4, *((3,) if how == "EIO" else ()))  # 3: what cannot be read
            assert leftovers(out) == [] or how == "EROFS", leftovers(out)  # nothing can be removed
        self._old_or_new(out, old)
        self.finished(out)
        return done.status != 0

    def file_operations(self) -> int:
        """How many file operations it has over what is there."""
        out, log = self.home / "counted", self.home / "counts"
        log.unlink(missing_ok=True)
        self._fresh(out, over=True)
        _run(self.warm, self.home, self.command, out, fail={"root": str(out), "log": str(log)})
        return len(log.read_text().splitlines()) if log.exists() else 0

    def kill_after(self, share: float, *, again: bool = False) -> bool:
        """Kill it after this share of its time; whether it was still at work.

        Args:
            again: it goes on with what the last one that was killed has left.
        """
        start, pid = time.monotonic(), self._started(again)
        done = self.warm.kill(pid, share * self.seconds, signal.SIGKILL)
        known = (LOCKED, self.command.again) if again else ()  # it is through, or others still are
        assert done.status in (0, -signal.SIGKILL, *known), done.output
        if done.status == 0 and not again:
            self.seconds = (self.seconds + time.monotonic() - start) / 2
        self._whole()
        return done.status == -signal.SIGKILL

    def kill_in(self, stage: str, share: float, *, again: bool = False) -> bool:
        """Kill it after this share of a stage; whether that stage was at work."""
        pid = self._started(again, before=MARKED.format(log=_marks(self.home)))
        while stage not in _times(self.home, "begin"):
            if done := self.warm.wait(pid, 0):  # a killed one had finished the stage
                assert (done.status, again) == (0, True), done.output
                return False
        done = self.warm.kill(pid, share * self.stages[stage], signal.SIGKILL)
        assert done.status in (0, -signal.SIGKILL), done.output
        self._whole()
        return stage not in _times(self.home, "end")

    def _started(self, again: bool, **how: Any) -> int:
        if not again:
            self._fresh(self.out, over=False)
        Path(_marks(self.home)).unlink(missing_ok=True)
        return _start(self.warm, self.home, self.command, self.out, **how)

    def _whole(self) -> None:
        """What a killed one has left can be read: committed stages, and saved networks."""
        if self.command.words[0] == "sweep":  # whose children are still on their way out
            return
        if (self.out / "journal.jsonl").exists():
            assert verify(self.out) == []
        for sums in self.out.rglob("SHA256SUMS"):
            assert is_staged(sums.relative_to(self.out)) or check_sums(sums.parent) == []

    def kill_before(self, code: str) -> None:
        """Kill it at a place in the code: `code` runs first and arranges that."""
        out = self.home / "before"
        self._fresh(out, over=False)
        done = _run(self.warm, self.home, self.command, out, before=code)
        assert done.status == -signal.SIGKILL, done.output
        self.finished(out)

    @property
    def out(self) -> Path:
        """The folder of those that are killed by the clock."""
        return self.home / "after"

    def finished(self, out: Path) -> None:
        """The same command makes what an undisturbed one does, and leaves nothing else."""
        done = _run(self.warm, self.home, self.command, out)
        for _ in range(100):  # children of a sweep that was killed are still on their way out
            if done.status != 6:
                break
            done = _run(self.warm, self.home, self.command, out)
        assert done.status in (0, self.command.again), done.output
        made = _made(self.command, out)
        different = sorted(n for n in made.keys() | self.made if made.get(n) != self.made.get(n))
        assert not different, different
        assert leftovers(out) == []

    def _fresh(self, out: Path, *, over: bool) -> dict[str, bytes]:
        """A folder that is empty, or where an older result lies: the same with other weights."""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if not over or self.command.goes_on or self.command.again:
            return {}
        for name, content in contents(self.home / "whole").items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"old " + content)
        return contents(out)

    def _old_or_new(self, out: Path, old: dict[str, bytes]) -> None:
        """Every file is what it was or what it shall be, and those of one folder are alike."""
        for folder in {p.parent for p in out.rglob("*")} | {out}:
            settle(folder)  # as whoever reads it does
        found = {n: c for n, c in contents(out).items() if ".part/" not in n}
        assert set(old) <= set(found), "a file is lost"
        if self.command.exact and old:
            new = contents(self.home / "whole")
            for place in {Path(name).parent for name in old}:
                kept = [n for n in old if Path(n).parent == place and n not in BUSY + MEASURED]
                fresh = {n for n in kept if found[n] == new[n]}
                stale = {n for n in kept if found[n] == old[n]}
                assert fresh | stale == set(kept), set(kept) - fresh - stale
                assert not fresh or not stale, (fresh, stale)


def _marks(home: Path) -> str:
    return str(home / "marks")


def _times(home: Path, word: str) -> dict[str, float]:
    """When each stage has begun, or ended, of those that the last marked process came to."""
    path = Path(_marks(home))
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return {name: float(at) for what, name, at in map(str.split, lines) if what == word}


def _environment(command: Command, out: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": command.cache.replace("{out}", str(out))}


def _words(command: Command, out: Path) -> list[str]:
    words = [word.replace("{out}", str(out)) for word in command.words]
    return [*words, "--json"] if words[0] in PRINTED else words


def _start(warm: Warm, home: Path, command: Command, out: Path, **how: Any) -> int:
    log = home / f"log-{random.getrandbits(60):x}"
    return warm.start(log, *_words(command, out), env=_environment(command, out), **how)


def _run(warm: Warm, home: Path, command: Command, out: Path, **how: Any) -> Done:
    pid = _start(warm, home, command, out, **how)
    done = warm.wait(pid)
    assert done is not None, f"a hang: {command.words}"
    if command.words[0] in PRINTED and done.status == 0:
        (out / "printed.json").write_text(done.output[done.output.index("{") :])
    return done


def _made(command: Command, out: Path) -> dict[str, str]:
    """Names and digests of what a command has made, times and states left out."""
    found = {}
    for name, content in contents(out).items():
        path = Path(name)
        if path.name in (*BUSY, ".lock") or path.parent.name == "state" or path.suffix == ".sha256":
            continue
        if path.name == "report.json":
            found[name] = json.dumps(json.loads(content)["measurements"])
        elif path.name in MEASURED:
            found[name] = "there"
        elif (
            command.exact
            or path.suffix == ".safetensors"
            or path.name in ("plan.json", "importance.csv")
        ):
            found[name] = hashlib.sha256(content).hexdigest()
        elif path.name == "metrics.jsonl":
            found[name] = TIMES.sub("", content.decode())
        elif "latency" in path.parts:
            found[name] = json.dumps(sorted(json.loads(content)["times"]))
        else:
            found[name] = "there"
    return found
