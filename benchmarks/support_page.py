"""docs/support.md, from the rows of benchmarks/results/support.csv and nothing else."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

Row = Mapping[str, str]
Rows = Mapping[str, Row]

HEAD = """# Networks that seprune cuts

Made by `python benchmarks/support.py` from `benchmarks/results/support.csv`, a line a network; not
written by hand. {passed} of {run} networks pass on the default path ({own} that seprune knows by
name, {foreign} of other libraries).{left}
{setting}

Every network has random weights in which no tensor is constant, norms with the statistics of
random images, and outputs that depend on the image. Its row is: `analyse`; statistics with the
sensitivities of the logits; the default importance; plans at 0.75, 0.5 and 0.25 of the MACs. Each
of the three cut networks has exactly the MACs (`FlopCounterMode`) and parameters of its plan,
runs at another batch size and, where its parent does, at another image size, and equals in
float64 the parent whose layers do not see the removed channels, which the benchmark masks by
hooks of its own. The one at 0.5 is refitted on {images} images, and the error falls, or stays, in
every layer; takes one step of training; is saved, and a fresh process that loads it gives the
same outputs, bit for bit.

| family | rows | pass | dependency groups | left whole | output error, cut -> refitted | s |
|---|--:|--:|--:|--:|--:|--:|
"""
DRAWN = """
`python benchmarks/random_networks.py` draws networks of {kinds} kinds of blocks, in 1 to {dims}
dimensions (`tests/random_networks.py`), cuts each by a random plan, and checks it: forward at other
batch and image sizes, the masked parent, costs, save and load, statistics, sensitivities against
autograd image by image, and that the caller's network is as it was. {wrong} of {all} have a problem
(`benchmarks/results/random_networks.csv`).
"""
COLUMNS = """
## What the columns mean

- `dependency groups`, `left whole`: in all networks of the family; reasons above.
- `output error`: mean squared difference of the outputs to the parent's on calibration images,
  relative to their variance, at half the MACs; median over the family. Weights are random and the
  images few: it says that the refit works, not how accurate a trained network would be.
- `s`: median processor time of a row on one thread, all checks included.

In support.csv: `failed`, what was wrong, empty if nothing; `input` and `other`, the samples that it
ran on; `macs`, what is reached of the three budgets, and `least` where one is out of reach;
`masked`, the largest relative difference to the masked parent; `across`, operators that look at
all channels together; `refitted`, how many layers have new weights, and `skipped`, which keep their
own, and why; `gap`, the output error before and after the refit.
"""


def render(rows: Rows, names: Sequence[str], drawn: Sequence[Row] = (), images: int = 8) -> str:
    """The page: `rows` by network, of the `names` that belong to the table; `drawn` at random."""
    run = {name: rows[name] for name in names if name in rows}
    left = [name for name in names if name not in run]
    own = ("seprune", "timm", "torchvision")
    known = sum(family(name) in own for name in run if not run[name]["failed"])
    passed = sum(not row["failed"] for row in run.values())
    head = HEAD.format(
        passed=passed, run=len(run), own=known, foreign=passed - known, setting=_setting(run),
        left=f" {len(left)} of the {len(names)} listed have not been run yet." if left else "",
        images=images,
    )  # fmt: skip
    sections = (
        _section("Not passed", _failed(run)),
        _section("Not run yet", _by_family(left)) if left else "",
        _section("No proof by a mask", _across(run)),
        _section("Budgets out of reach", _least(run)),
        _section("Left whole, by reason", _reasons(run)),
        _section("Layers that keep their weights in the refit", _skipped(run)),
    )
    return head + _families(run, names) + "".join(sections) + _drawn(drawn) + COLUMNS


def family(name: str) -> str:
    """The library of a network."""
    return name.partition("/")[0]


def _setting(run: Rows) -> str:
    kinds = dict.fromkeys((row["hardware"], row["torch"]) for row in run.values())
    dates = [row["date"] for row in run.values()]
    if not dates:
        return ""
    found = "; ".join(f"{hardware}, torch {torch}" for hardware, torch in kinds)
    days = " to ".join(dict.fromkeys((min(dates), max(dates))))
    return f"{found}, one thread, {days}."


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return f"\n## {title}\n\n{body or 'None.'}\n"


def _families(run: Rows, names: Sequence[str]) -> str:
    return "".join(
        _family_line(name, [row for key, row in run.items() if family(key) == name])
        for name in dict.fromkeys(map(family, names))
    )


def _family_line(name: str, rows: Sequence[Row]) -> str:
    pairs = [list(map(float, row["gap"].split())) for row in rows if row["gap"]]
    gaps = " -> ".join(f"{statistics.median(side):.2g}" for side in zip(*pairs))
    times = [float(row["seconds"]) for row in rows if row["seconds"]]
    cells = (
        name, len(rows), sum(not row["failed"] for row in rows),
        sum(int(row["groups"] or 0) for row in rows),
        sum(_counted(row["whole"]).total() for row in rows), gaps or "-",
        f"{statistics.median(times):.0f}" if times else "-",
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def _failed(run: Rows) -> list[str]:
    return [f"- `{name}`: {row['failed']}" for name, row in run.items() if row["failed"]]


def _by_family(names: Sequence[str]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(family(name), []).append(name.partition("/")[2])
    return [f"- {key}: {', '.join(names)}" for key, names in found.items()]


def _grouped(run: Rows, reasons: Callable[[Row], Iterable[str]]) -> dict[str, list[str]]:
    """The networks of each reason."""
    found: dict[str, list[str]] = {}
    for name, row in run.items():
        for reason in reasons(row):
            found.setdefault(reason, []).append(name)
    return found


def _across(run: Rows) -> list[str]:
    found = _grouped(run, lambda row: filter(None, row["across"].split("; ")))
    if not found:
        return []
    return [
        "These operators look at all channels together, so that a cut network is not its masked "
        "parent; plans and reports carry the caveat. The rest of each network is proven.",
        "",
        *(f"- `{operator}`: {', '.join(names)}" for operator, names in found.items()),
    ]


def _least(run: Rows) -> list[str]:
    return [
        f"- `{n}`: down to {row['least']} of the MACs" for n, row in run.items() if row["least"]
    ]


def _counted(whole: str) -> Counter[str]:
    """`2 an output of the model; 1 ...` as numbers by reason."""
    parts = (part.partition(" ") for part in filter(None, whole.split("; ")))
    return Counter({reason: int(number) for number, _, reason in parts})


def _reasons(run: Rows) -> list[str]:
    total = sum((_counted(row["whole"]) for row in run.values()), Counter[str]())
    networks = Counter(reason for row in run.values() for reason in _counted(row["whole"]))
    return [
        f"- {reason}: {number} groups of {networks[reason]} networks"
        for reason, number in sorted(total.items(), key=lambda item: (-item[1], item[0]))
    ]


def _drawn(rows: Sequence[Row]) -> str:
    wrong = [f"- {row['seed']}: {row['problems']}" for row in rows if row["problems"]]
    kinds = len({kind for row in rows for kind in row["kinds"].split()})
    dims = max((int(row["dims"]) for row in rows), default=0)
    text = DRAWN.strip().format(kinds=kinds, dims=dims, wrong=len(wrong), all=f"{len(rows):,}")
    return _section("Networks drawn at random", [text, *([""] if wrong else []), *wrong])


def _skipped(run: Rows) -> list[str]:
    return [
        f"- `{name}`, beside {row['refitted']} refitted: {row['skipped']}"
        for name, row in run.items()
        if row["skipped"]
    ]
