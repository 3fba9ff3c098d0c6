"""Many rounds of the faults in tests/reliability; what came out goes to benchmarks/results.

    python benchmarks/faults.py kills [--rounds 300] [--minutes 8]
    python benchmarks/faults.py commands [--rounds 1100] [--minutes 60]
    python benchmarks/faults.py signals | operations | crowds | bytes

Each is resumable: what was done before is in its JSON, and the same command adds what is left. A
promise that is broken is written there as well, and ends the script with status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reliability")]

import harness  # noqa: E402
import torch  # noqa: E402
from child import Child  # noqa: E402
from commands import Killed, commands  # noqa: E402
from damage import Damaged, random_steps  # noqa: E402
from warm import Warm  # noqa: E402

from seprune.pipeline.run_folder import RunFolder  # noqa: E402
from seprune.runtime.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
QUICKSTART = ("quickstart", "report.latency=false", "device=cpu")
ROUNDS = {"kills": 300, "signals": 60, "crowds": 200, "operations": 10**6, "bytes": 5000}
ROUNDS["commands"] = 1100
FILES = {"crowds": "concurrency", "commands": "kills-commands"}
IMPORTS = """
import gc, importlib
from seprune.export import onnx
from seprune.models import build

for name in ("onnx", "onnxruntime", "onnxruntime.quantization"):
    importlib.import_module(name)
model = build("seprune/se_resnet8", classes=3, input=(3, 12, 12)).eval()
program = onnx.exported_program(model, (3, 12, 12))
onnx.pt2_content(program, {}), onnx._onnx(program, None, {})
gc.freeze()
"""  # half of an export; no session, whose threads would not survive a fork
CHAIN = 4  # kills until one goes on to its end
STAGE = "run: "  # rows of the stages of a run
Kept = dict[str, Any]


def kills(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """SIGKILL at random instants of the quickstart, over and over, until the run is through."""
    yield from _stops(kept, home, warm, [signal.SIGKILL])


def signals(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """SIGTERM and SIGINT likewise."""
    yield from _stops(kept, home, warm, [signal.SIGTERM, signal.SIGINT])


def _stops(kept: Kept, home: Path, warm: Warm, signums: list[int]) -> Iterator[None]:
    subject = _unbroken(kept, warm, home)
    out, span, before = home / "run", 3.0, 0
    while True:
        seed = kept["done"]
        instants = random.Random(seed)
        after = instants.uniform(0.1, span)
        through = harness.kill(subject, out, after, signums[seed % len(signums)])
        span, before = harness.patient(span, before, out)
        if through:
            kept["runs_compared"] = kept.get("runs_compared", 0) + 1
            shutil.rmtree(out)
            span, before = 3.0, 0
            continue
        stages = RunFolder(out).records() if out.exists() else []
        last = stages[-1].stage.partition("/")[0] if stages else "nothing"
        hit = kept.setdefault("last_committed", {})
        hit[last] = hit.get(last, 0) + 1
        kept["done"] += 1
        if kept["done"] >= kept["rounds"]:
            subject.finished(out)
            kept["runs_compared"] = kept.get("runs_compared", 0) + 1
        yield


def crowds(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """Eight processes at once in one run folder; the one that works is stopped, and so on."""
    subject = _unbroken(kept, warm, home)
    out = home / "run"
    while True:
        named, through = harness.crowd(subject, out)
        if through:
            subject.finished(out)
            kept["runs_compared"] = kept.get("runs_compared", 0) + 1
            shutil.rmtree(out)
            continue
        kept["refused_by_name"] = kept.get("refused_by_name", 0) + named
        kept["done"] += 1
        yield


def operations(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """Every file operation of a whole run fails once, in four ways."""
    argv = harness.tiny(harness.tiny_images(home / "images"))
    subject = harness.Subject.unbroken(warm, home, argv)
    count = harness.operations(subject)
    todo = [(how, n) for how in ("exit", *harness.DISK) for n in range(1, count + 1)]
    kept["operations_of_a_run"], kept["rounds"] = count, min(kept["rounds"], len(todo))
    random.Random(0).shuffle(todo)  # what is done before all of it is done is a fair sample
    for how, number in todo[kept["done"] :]:
        noticed = harness.fail_operation(subject, number, how)
        row = kept.setdefault("ways", {}).setdefault(how, {"tried": 0, "noticed": 0})
        row["tried"] += 1
        row["noticed"] += noticed
        kept["done"] += 1
        yield


def each_command(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """SIGKILL at instants spread evenly over each command and each stage of a run.

    Each that was killed goes on and is killed again, a few times, and then to its end.
    """
    argv = harness.tiny(harness.tiny_images(home / "images"))
    subject = harness.Subject.unbroken(warm, home, argv, home / "images")
    warm.prepare(IMPORTS)
    given, works = commands(subject, home / "given"), dict[str, Killed]()
    run = works["run"] = Killed.of(warm, home / "commands" / "run", given.pop("run"))
    rows = kept.setdefault("commands", {})
    rows.pop("run", None)  # of before its stages were counted one by one
    for name in (*given, *(f"{STAGE}{stage}" for stage in run.stages)):
        rows.setdefault(name, {"kills": 0, "late": 0})
    while kept["done"] < kept["rounds"]:
        name = min(rows, key=lambda n: rows[n]["kills"])
        work, stage = works.get(name, run), name.removeprefix(STAGE)
        if stage == name and name not in works:
            folder = home / "commands" / name.replace(" ", "-")
            work = works[name] = Killed.of(warm, folder, given[name])
        hits: list[bool] = []
        while len(hits) < CHAIN and all(hits):
            # the fractional parts of multiples of the golden ratio: even, however many there are
            share = (sum(rows[name].values()) + len(hits)) * 0.6180339887498949 % 1
            how = work.kill_after if stage == name else partial(work.kill_in, stage)
            hits.append(how(share, again=bool(hits)))
        work.finished(work.out)
        rows[name]["kills"] += sum(hits)
        rows[name]["late"] += len(hits) - sum(hits)
        kept["done"] = sum(row["kills"] for row in rows.values())
        yield


def bytes_of_runs(kept: Kept, home: Path, warm: Warm) -> Iterator[None]:
    """Flips, cuts, insertions, zeroed, deleted and copied ranges in any file of a finished run."""
    subject = harness.Subject.unbroken(
        warm, home, harness.tiny(harness.tiny_images(home / "images"))
    )
    with closing(Child("checker.py")) as checker:
        damaged = Damaged(subject.home / "whole", checker)
        names = sorted(damaged.good)
        kept["files"] = len(names)
        while True:
            source = random.Random(kept["done"])
            name = source.choice(names)
            changed = damaged.check(name, random_steps(source, empty=0.01))
            kept["changed"] = kept.get("changed", 0) + changed
            kept["done"] += 1
            yield


WORK: dict[str, Callable[[Kept, Path, Warm], Iterator[None]]] = {
    "kills": kills,
    "signals": signals,
    "crowds": crowds,
    "operations": operations,
    "commands": each_command,
    "bytes": bytes_of_runs,
}


def _unbroken(kept: Kept, warm: Warm, home: Path) -> harness.Subject:
    subject = harness.Subject.unbroken(warm, home, QUICKSTART)
    kept["run"] = " ".join(QUICKSTART)
    return subject


def _kept(path: Path, name: str, rounds: int) -> Kept:
    kept: Kept = json.loads(path.read_text()) if path.exists() else {"done": 0, "broken": []}
    kept["command"] = f"python benchmarks/faults.py {name}"
    kept["rounds"] = max(rounds, kept["done"])
    kept["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores"
    kept["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    kept["date"] = datetime.now(UTC).date().isoformat()
    return kept


def main() -> None:
    """Do rounds until they are done or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=WORK)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, default=1e6)
    given = parser.parse_args()
    path = RESULTS / f"{FILES.get(given.what, given.what)}.json"
    kept = _kept(path, given.what, given.rounds or ROUNDS[given.what])
    start = time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="seprune-faults-"))
    try:
        with closing(Warm()) as warm:
            for _ in WORK[given.what](kept, home, warm):
                print(f"{given.what}: {kept['done']} of {kept['rounds']}", file=sys.stderr)
                write_json(path, kept)
                if kept["done"] >= kept["rounds"] or _late(start, given.minutes):
                    break
    except AssertionError as error:
        kept["broken"].append(f"round {kept['done']}: {str(error)[:600]}")
        raise SystemExit(f"a promise is broken: {error}") from error
    finally:
        write_json(path, kept)
        shutil.rmtree(home, ignore_errors=True)


def _late(start: float, minutes: float) -> bool:
    return time.monotonic() - start > 60 * minutes


if __name__ == "__main__":
    main()
