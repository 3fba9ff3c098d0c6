"""The support table: every network on seprune's default path, each step of it checked.

Each row runs in a process of its own with a limit of processor time (support_row.py says what is
checked). `benchmarks/results/support.csv` is written after every row, and rows that it holds are
not run again; docs/support.md is made from it.

    python benchmarks/support.py                          # rows that are missing
    python benchmarks/support.py --only 'smp/*' --most 5  # five of these
    python benchmarks/support.py --again 'timm/sk*'       # these anew
    python benchmarks/support.py --failed                 # those that did not pass anew
    python benchmarks/support.py --render                 # only the page
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

import csv_rows
import torch
from foreign_networks import FOREIGN
from support_page import render
from support_row import fresh_process, measure_within

from seprune.measure.latency import device_name
from seprune.models import NETWORKS
from seprune.runtime.files import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.csv"
DRAWN = RESULTS.with_name("random_networks.csv")
PAGE = ROOT / "docs" / "support.md"
COLUMNS = ("network", "failed", "input", "other", "gates", "groups", "whole", "macs", "least",
           "masked", "across", "refitted", "skipped", "gap", "seconds", "hardware", "torch",
           "date")  # fmt: skip

OWN = {
    "seprune": " ".join(NETWORKS),
    "torchvision": """
        mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_y_400mf
        lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large
        ssdlite320_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn maxvit_t""",
    "timm": """
        seresnet18 mobilenetv3_small_100 lcnet_050 mnasnet_small tinynet_e legacy_seresnet18
        hardcorenas_a mobilenetv3_large_100 efficientnet_b0 skresnet18 semnasnet_100 regnety_004
        ghostnet_100 ghostnetv2_100 repghostnet_100 rexnet_100 mixnet_s fbnetv3_b
        tf_efficientnetv2_b0 ese_vovnet19b_dw resnest14d legacy_seresnext26_32x4d
        seresnext26t_32x4d seresnext26ts seresnet33ts ecaresnet26t eca_resnet33ts eca_nfnet_l0
        eca_vovnet39b gcresnext26ts gcresnet33ts gcresnet50t cspresnet50 nf_regnet_b0 nf_ecaresnet26
        nf_seresnet50 dm_nfnet_f0 regnetz_b16 regnetv_040 seresnet50 seresnext50_32x4d resnest26d
        resnest50d_1s4x24d skresnext50_32x4d resnetrs50 gc_efficientnetv2_rw_t hgnet_tiny
        repvit_m0_9 fastvit_t8 tresnet_m repvgg_d2se mobileone_s4 cs3sedarknet_l cs3se_edgenet_x
        dpn48b haloregnetz_b efficientvit_m0 sebotnet33ts_256 coatnet_nano_rw_224
        maxvit_nano_rw_256 seresnextaa101d_32x8d legacy_senet154""",
}
ROWS = [*FOREIGN, *(f"{zoo}/{name}" for zoo, names in OWN.items() for name in names.split())]
LIMIT_SECONDS = 600  # of processor time, so that a busy machine makes no row fail


def attempt(name: str, seconds: int = LIMIT_SECONDS) -> dict[str, str]:
    """One row from a child process; what stopped it, if it did not come to its end."""
    context = multiprocessing.get_context("forkserver")  # imports torch and seprune once
    context.set_forkserver_preload(["support_row", "torchvision", "timm"])
    here, there = context.Pipe()
    child = context.Process(target=measure_within, args=(name, seconds, there))
    child.start()
    there.close()
    found: dict[str, str] | None = None
    try:
        while found is None:
            message = here.recv()
            if isinstance(message, dict):
                found = message
            else:
                here.send(fresh_process(*message))
    except EOFError:  # it ended without an answer
        found = {}
    child.join()
    if child.exitcode == -signal.SIGXCPU:
        return {"failed": f"not finished after {seconds} s of processor time"}
    return found or {"failed": f"ended with exit status {child.exitcode}"}


def rows() -> dict[str, dict[str, str]]:
    """The rows that have been run, by network."""
    return {row["network"]: row for row in csv_rows.read(RESULTS)}


def keep(row: Mapping[str, str]) -> None:
    """Put a row into the CSV file, which is in the order of `ROWS`."""
    found = {**rows(), row["network"]: dict(row)}
    csv_rows.write(RESULTS, [found[name] for name in ROWS if name in found], COLUMNS)


def run(arguments: argparse.Namespace) -> None:
    """The rows that are asked for, one after the other."""
    left = arguments.most
    wanted = [n for pattern in arguments.only for n in ROWS if fnmatchcase(n, pattern)]
    for name in dict.fromkeys(wanted):
        known = rows()
        again = any(fnmatchcase(name, pattern) for pattern in arguments.again)
        again = again or (arguments.failed and bool(known.get(name, {}).get("failed")))
        if (name in known and not again) or not left:
            continue
        left -= 1
        found = attempt(name, arguments.seconds)
        print(name, json.dumps(found), file=sys.stderr, flush=True)
        facts = {"hardware": device_name("cpu"), "torch": torch.__version__.partition("+")[0],
                 "date": date.today().isoformat()}  # fmt: skip
        keep({"network": name, **found, **facts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="globs of rows, in order")
    parser.add_argument("--again", nargs="*", default=[], help="globs of rows to run anew")
    parser.add_argument("--failed", action="store_true", help="run anew what did not pass")
    parser.add_argument("--most", type=int, default=len(ROWS), help="rows to run this time")
    parser.add_argument("--seconds", type=int, default=LIMIT_SECONDS, help="limit of each row")
    parser.add_argument("--render", action="store_true", help="only write docs/support.md")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"  # of children
    if not arguments.render:
        run(arguments)
    write_text(PAGE, render(rows(), ROWS, csv_rows.read(DRAWN)))


if __name__ == "__main__":
    main()
