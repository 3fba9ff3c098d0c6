"""The support table: every network with channel gates cut to three budgets, checked and reloaded.

Each row runs in a process of its own with a time limit; `benchmarks/results/support.json` is
written after every row and rows that it holds are not run again. docs/support.md is made from it.

    python benchmarks/support.py                       # rows that are missing
    python benchmarks/support.py --again timm/sk*      # these rows anew
    python benchmarks/support.py --failed --most 5     # five of those that did not pass
    python benchmarks/support.py --render              # only the table
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from support_row import CLOSE, LIMIT_SECONDS

from seprune.measure.latency import device_name
from seprune.models import NETWORKS
from seprune.runtime.environment import environment
from seprune.runtime.files import write_json, write_text
from seprune.runtime.reading import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
TABLE = ROOT / "docs" / "support.md"
EXACT = 1e-9  # relative, in float64

FAMILIES = {
    "torchvision": """
        mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_y_400mf
        maxvit_t lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large
        ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn""",
    "timm": """
        seresnet18 seresnet50 seresnext26t_32x4d seresnext50_32x4d seresnet33ts seresnext26ts
        legacy_seresnet18 legacy_seresnext26_32x4d resnetrs50
        mobilenetv3_small_100 mobilenetv3_large_100 fbnetv3_b hardcorenas_a lcnet_050
        mnasnet_small semnasnet_100 tinynet_e efficientnet_b0 tf_efficientnetv2_b0
        gc_efficientnetv2_rw_t rexnet_100 mixnet_s ghostnet_100 ghostnetv2_100 repghostnet_100
        regnety_004 regnetv_040 regnetz_b16 haloregnetz_b
        skresnet18 skresnext50_32x4d resnest14d resnest26d resnest50d_1s4x24d
        ecaresnet26t eca_resnet33ts eca_nfnet_l0 eca_vovnet39b ese_vovnet19b_dw
        nf_seresnet50 nf_ecaresnet26 nf_regnet_b0 dm_nfnet_f0
        gcresnet33ts gcresnext26ts gcresnet50t cspresnet50 cs3sedarknet_l cs3se_edgenet_x dpn48b
        tresnet_m hgnet_tiny repvit_m0_9 fastvit_t8 efficientvit_m0 sebotnet33ts_256
        coatnet_nano_rw_224 maxvit_nano_rw_256 repvgg_d2se mobileone_s4
        seresnextaa101d_32x8d legacy_senet154""",
    "seprune": " ".join(NETWORKS),
}
ROWS = [f"{zoo}/{name}" for zoo, names in FAMILIES.items() for name in names.split()]

# -- all rows -----------------------------------------------------------------------------------


def attempt(name: str) -> dict[str, Any]:
    """One row from a child process; what stopped it, if it did not come to its end."""
    command = [sys.executable, str(Path(__file__).with_name("support_row.py")), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"not finished after {LIMIT_SECONDS} s of CPU time"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last[:300]}


def passed(row: Mapping[str, Any]) -> bool:
    """Whether everything that can be checked of a row came out right."""
    if "error" in row:
        return False
    cuts = row["budgets"].values()
    exact = row["masked"] is not None and (row["masked"] <= EXACT or is_mixed(row))
    loads = row["reload"] and row.get("process") and elsewhere(row) != "no"
    return bool(loads and exact and all(c["exact"] and c["forward"] for c in cuts))


def elsewhere(row: Mapping[str, Any]) -> str:
    """Of the network loaded on another device: its name if all is right there."""
    device = row["device"]
    if device is None:
        return "none here"
    return device["name"] if device["tensors"] and device["error"] <= CLOSE else "no"


def is_mixed(row: Mapping[str, Any]) -> bool:
    """Whether the cut differs from the masked parent because layers mix all channels."""
    return bool(row.get("mixing")) and (row["masked"] is None or row["masked"] > EXACT)


def run(arguments: argparse.Namespace) -> None:
    rows = read_json(RESULTS)["rows"] if RESULTS.is_file() else {}
    left = arguments.most
    for name in ROWS:
        again = any(fnmatchcase(name, pattern) for pattern in arguments.again)
        if name in rows and not again and not (arguments.failed and not passed(rows[name])):
            continue
        if not left:
            break
        left -= 1
        rows[name] = attempt(name)
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
        found = environment(devices=False)
        versions = found["packages"] | found["extras"]["timm"]["packages"]
        document = {
            "command": "python benchmarks/support.py",
            "hardware": f"{device_name('cpu')}, {os.cpu_count()} cores, 1 thread",
            "date": date.today().isoformat(),
            "versions": {n: versions[n] for n in ("torch", "torchvision", "timm")},
            "rows": {n: rows[n] for n in ROWS if n in rows},
        }
        write_json(RESULTS, document)


# -- the table ----------------------------------------------------------------------------------

HEAD = """# Networks that seprune cuts

Made by `{command}` on {date} ({hardware}; {versions}); not written by hand.

Every network has random weights and is cut by `l2` scores with the default floors (10 % and 8
channels stay, SE bottlenecks keep their width). `macs` are what is reached of 0.75, 0.5 and 0.25;
`min` marks the least that the floors allow; `one unit` is a single channel, or channels that go
together or not at all. Checks, of every cut network: `forward` - it runs at two input sizes or
batch sizes, and `FlopCounterMode` counts exactly the MACs that the plan says; of the one cut to
0.5: `masked` - largest relative difference, in float64, to its parent with the removed channels
masked; `reload` - saved, loaded, and its outputs bit-equal; `process` - the same in a fresh
process that has nothing but the folder; `device` - loaded on another device, its tensors bit-equal
and its outputs within {close:g} of the largest. `s` is the processor time to trace, score, plan
and cut, on one thread. {passed} of {rows} rows pass.

{mixed} of them have no `masked` proof: layers that look at all channels together make the mask
another function than the cut, and the difference is only reported, with the layers' names.
{why}
{columns}
"""
COLUMNS = {
    "network": "---", "input": "--:", "gates": "--:", "groups": "--:", "left whole": "---",
    "macs": "---", "forward": "---", "masked": "---", "reload": "---", "process": "---",
    "device": "---", "s": "--:",
}  # fmt: skip


def render(results: Mapping[str, Any]) -> str:
    """docs/support.md, from the results and nothing else."""
    rows = results["rows"]
    head = HEAD.format(
        command=results["command"],
        date=results["date"],
        hardware=results["hardware"],
        versions=", ".join(f"{n} {v}" for n, v in results["versions"].items()),
        passed=sum(passed(row) for row in rows.values()),
        rows=len(rows),
        mixed=sum(is_mixed(row) for row in rows.values()),
        close=CLOSE,
        why=reasons_of_mixing(rows),
        columns="\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, COLUMNS.values())),
    )
    return head + "".join(line(name, row) for name, row in rows.items())


MIXING = {
    "Eca": "its gate convolves over neighbouring channels: after a cut others are neighbours",
    "LayerNorm": "its mean and variance are over the channels, masked ones included",
    "GroupNorm": "its mean and variance are over the channels, masked ones included",
    "Std": "its filters are standardised over their inputs, masked ones included",
}


def reasons_of_mixing(rows: Mapping[str, Any]) -> str:
    """One line for each kind of layer: why a mask proves nothing, and the networks it is cut in."""
    networks: dict[str, list[str]] = {}
    for name, row in rows.items():
        for kind in row["mixing"] if "error" not in row and is_mixed(row) else ():
            networks.setdefault(kind, []).append(name)
    return "".join(
        f"- `{kind}`: {next(why for part, why in MIXING.items() if part in kind)}. In "
        f"{', '.join(names)}.\n"
        for kind, names in sorted(networks.items())
    )


def short(reason: str) -> str:
    """A reason without the place that it names: `no rule for roi_align`."""
    known = {
        "it is an output of the model": "output",
        "SE hidden width: kept": "SE hidden",
        "it is a single channel": "one unit",
        "its channels go together or not at all": "one unit",
    }
    if reason in known:
        return known[reason]
    reason = re.sub(r"^(a trial cut fails) in layer .*$", r"\1", reason)
    reason = re.sub(r"^\w+ in (the model|[\w.#]+): | in (the model|[\w.#]+)$", "", reason)
    return re.sub(r"^it is |^it ", "", reason)


def line(name: str, row: Mapping[str, Any]) -> str:
    if "error" in row:
        error = f"**{row['error'].replace('|', '/')}**"
        return f"| {name} | | | | {error} {'| ' * (len(COLUMNS) - 5)}|\n"
    cuts = row["budgets"].values()
    reasons = Counter[str]()
    for reason, number in row["whole"].items():
        reasons[short(reason)] += number
    whole = ", ".join(f"{n} {why}" for why, n in reasons.items()) or "none"
    macs = " / ".join(f"{c['macs']:.3f}" + (" min" if "minimum" in c else "") for c in cuts)
    runs_all = all(c["forward"] for c in cuts)
    forward = "yes" if runs_all and all(c["exact"] for c in cuts) else "runs" if runs_all else "no"
    masked = "differs in shape" if row["masked"] is None else f"{row['masked']:.0e}"
    if is_mixed(row):
        masked += f" ({', '.join(row['mixing'])})"
    cells = [name, row["input"], row["gates"], row["groups"], whole, macs, forward, masked,
             "yes" if row["reload"] else "no", "yes" if row["process"] else "no",
             elsewhere(row), f"{row['seconds']:.1f}"]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--again", nargs="*", default=[], help="globs of rows to run anew")
    parser.add_argument("--failed", action="store_true", help="run anew what did not pass")
    parser.add_argument("--most", type=int, default=len(ROWS), help="rows to run this time")
    parser.add_argument("--render", action="store_true", help="only write docs/support.md")
    arguments = parser.parse_args()
    if not arguments.render:
        run(arguments)
    write_text(TABLE, render(read_json(RESULTS)))


if __name__ == "__main__":
    main()
