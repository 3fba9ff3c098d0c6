"""The support table: every network with channel gates cut to three budgets, checked and reloaded.

Each row runs in a process of its own with a time limit; `benchmarks/results/support.json` is
written after every row and rows that it holds are not run again. docs/support.md is made from it.

    python benchmarks/support.py                       # rows that are missing
    python benchmarks/support.py --again timm/sk*      # these rows anew
    python benchmarks/support.py --failed              # those that did not pass
    python benchmarks/support.py --render              # only the table
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seprune.budget import make_plan
from seprune.cost import count, quietly
from seprune.errors import InputError, SepruneError
from seprune.files import read_json, write_json, write_text
from seprune.groups import Structure
from seprune.importance import Importance, Scoring, score
from seprune.latency import device_name
from seprune.models import NETWORKS, build, input_size
from seprune.plan import PruningPlan
from seprune.pruning import cuttable, prune
from seprune.runs import environment
from seprune.saved import Architecture, load, save

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
TABLE = ROOT / "docs" / "support.md"
SIDE = 128  # of the images, where the network takes them
BUDGETS = (0.75, 0.5, 0.25)
EXACT = 1e-9  # relative, in float64
LIMIT_SECONDS = 600  # of CPU time, so that a busy machine makes no row fail

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

# -- one row, in a process of its own -----------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network with every tensor random, an input it takes and another one."""

    name: str
    model: nn.Module
    inputs: Any
    other: Any


def measure(name: str) -> dict[str, Any]:
    """Everything that the table says of one network."""
    subject, side = subject_of(name)
    began = time.perf_counter()
    structure = cuttable(subject.model, subject.inputs)
    analysed = time.perf_counter()
    importance = score(structure, model=subject.model, scoring=Scoring("l2"))
    row: dict[str, Any] = {
        "input": side,
        "gates": len(structure.gates),
        "groups": len(structure.groups),
        "budgets": {},
        "analyse_seconds": round(analysed - began, 2),
    }
    for budget in BUDGETS:
        row["budgets"][str(budget)] = cut_to(subject, structure, importance, budget)
    began = time.perf_counter()
    plan = make_plan(structure, importance, macs=reachable(row["budgets"]["0.5"]))
    small = prune(subject.model, plan).eval()
    row["seconds"] = round(row["analyse_seconds"] + time.perf_counter() - began, 2)
    reasons = Counter(g.reason for g in plan.groups if g.reason is not None)
    reasons["one unit"] = sum(g.units == 1 and g.reason is None for g in plan.groups)
    row["whole"] = {reason: number for reason, number in reasons.items() if number}
    row["reload"] = reload_is_equal(subject, plan, small)
    del small
    row |= masked_error(subject, plan)
    return row


def subject_of(name: str) -> tuple[Subject, int]:
    """The network on images of 128 pixels, or of its published size where it insists on that."""
    torch.manual_seed(0)
    model = build(name).eval()
    shake(model)
    channels, published, _ = input_size(name, model)
    if not name.startswith("seprune/"):
        channels = 3  # of the images; the first convolution may come after a rearrangement
    for side in dict.fromkeys((min(SIDE, published), published)):
        inputs = images(model, 2, channels, side)
        if runs(model, inputs):
            larger = images(model, 1, channels, side + 32)
            other = larger if runs(model, larger) else images(model, 3, channels, side)
            return Subject(name, model, inputs, other), side
    raise SystemExit(f"{name} runs neither at {SIDE} nor at {published}")


def shake(model: nn.Module) -> None:
    """Fresh networks are too regular (gains of 0, no shifts): errors would not show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.5)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                low, high = (-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)
                parameter.uniform_(low, high)


def images(model: nn.Module, batch: int, channels: int, side: int) -> Any:
    """A batch, or for a detector a list of single images."""
    generator = torch.Generator().manual_seed(batch)
    noise = torch.rand(batch, channels, side, side, generator=generator)
    return ([*noise],) if hasattr(model, "transform") else noise


def runs(model: nn.Module, inputs: Any) -> bool:
    """Whether the parent takes these inputs; what it raises otherwise is its own business."""
    try:
        outputs(model, inputs)
    except Exception:
        return False
    return True


HEADS = ("head", "rpn.head", "roi_heads.box_predictor")


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that come out; of a detector what its heads say, before boxes are selected."""
    found: list[Tensor] = []
    heads = dict(model.named_modules()) if hasattr(model, "transform") else {}
    hooks = [
        heads[name].register_forward_hook(lambda *call: found.extend(tensors(call[-1])))
        for name in HEADS
        if name in heads
    ]
    try:
        with quietly(model):
            made = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    return found or list(tensors(made))


def tensors(tree: Any) -> Iterator[Tensor]:
    values = list(tree.values()) if isinstance(tree, Mapping) else tree
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def cut_to(subject: Subject, structure: Structure, importance: Importance, budget: float) -> Any:
    """The MACs reached, and what was checked of the network that comes out."""
    result: dict[str, Any] = {}
    try:
        plan = make_plan(structure, importance, macs=budget)
    except InputError as error:
        if error.code != "budget":
            raise
        result["minimum"] = least(error)
        plan = make_plan(structure, importance, macs=result["minimum"])
    small = prune(subject.model, plan).eval()
    before, after = plan.facts["macs"]
    result["macs"] = after / before
    result["tight"] = not any_fits(structure, plan)
    measured = count(small, subject.inputs).macs
    if isinstance(subject.inputs, tuple):  # a list of images is counted whole
        measured //= len(subject.inputs[0])
    result["exact"] = measured == after
    made, other = outputs(small, subject.inputs), outputs(small, subject.other)
    result["forward"] = all(bool(t.isfinite().all()) for t in made + other) and len(made) > 0
    return result


def any_fits(structure: Structure, plan: PruningPlan) -> bool:
    """Whether some group could have kept one more unit within the target."""
    kept = {g.name: len(g.keep) for g in plan.groups}
    return any(
        structure.macs_at({**kept, g.name: kept[g.name] + 1}) <= plan.facts["targets"]["macs"]
        for g in plan.groups
        if g.reason is None and kept[g.name] < g.units
    )


def least(error: InputError) -> float:
    """The fraction that can be reached, as the error says it, rounded up."""
    found = re.search(r"macs can go down to [\d,]+ \(([\d.]+) of all\)", error.what)
    assert found, error.what
    return float(found[1]) + 0.001


def reachable(cut: Mapping[str, Any]) -> float:
    """The budget that `cut_to` 0.5 ended with."""
    return float(cut.get("minimum", 0.5))


def reload_is_equal(subject: Subject, plan: PruningPlan, small: nn.Module) -> bool:
    """Whether the saved and loaded network answers bit for bit like the one that was saved."""
    with tempfile.TemporaryDirectory() as folder:
        save(small, Path(folder) / "m", Architecture(subject.name).cut(plan))
        back = load(Path(folder) / "m")
    pairs = zip(outputs(small, subject.inputs), outputs(back, subject.inputs), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def masked_error(subject: Subject, plan: PruningPlan) -> dict[str, Any]:
    """Largest difference to the parent whose layers do not hear the removed channels (float64)."""
    inputs = ([*subject.inputs[0]],) if isinstance(subject.inputs, tuple) else subject.inputs
    parent = copy.deepcopy(subject.model).double()
    inputs = ([t.double() for t in inputs[0]],) if isinstance(inputs, tuple) else inputs.double()
    small = prune(parent, plan).eval()
    said = outputs(small, inputs)
    del small
    mask(parent, plan)
    error = 0.0
    for a, b in zip(said, outputs(parent, inputs), strict=True):
        if a.shape != b.shape:
            return {"masked": None, "mixing": mixing(parent, plan)}
        if a.is_floating_point() and a.numel():
            error = max(error, float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)))
    return {"masked": error, "mixing": mixing(parent, plan)}


def mask(model: nn.Module, plan: PruningPlan) -> None:
    """Set to 0 the weights by which layers hear the channels that `plan` removes."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    totals = {(m.layer, m.side): m.total for g in plan.groups for m in g.members}
    for layer, sides in plan.layers().items():
        for side in {"in", "dim1"} & set(sides):
            weight = modules[layer].weight if side == "in" else parameters[layer]
            assert isinstance(weight, Tensor)
            total = totals[layer, side]
            conv_groups = int(getattr(modules.get(layer), "groups", 1))
            rows, per = weight.shape[0] // conv_groups, total // conv_groups
            with torch.no_grad():
                for gone in np.setdiff1d(np.arange(total), sides[side]).tolist():
                    weight[gone // per * rows : (gone // per + 1) * rows, gone % per] = 0


def mixing(model: nn.Module, plan: PruningPlan) -> list[str]:
    """Kinds of layers that look at all channels together: there a mask is not exact.

    Norms over channels and standardised convolutions if they are cut; ECA, which convolves over
    neighbouring channels and has none of its own.
    """
    modules, cut = dict(model.named_modules()), set(plan.layers())
    kinds = {type(module).__name__: name in cut for name, module in modules.items()}
    kinds |= {type(modules[name]).__name__: True for name in cut if name in modules}
    return sorted(
        kind
        for kind, is_cut in kinds.items()
        if "Eca" in kind or (is_cut and re.search("LayerNorm|GroupNorm|Std", kind))
    )


# -- all rows -----------------------------------------------------------------------------------


def attempt(name: str) -> dict[str, Any]:
    """One row from a child process; what stopped it, if it did not come to its end."""
    command = [sys.executable, __file__, "--row", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return {"error": f"not finished after {LIMIT_SECONDS} s of CPU time"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last[:300]}


def child(name: str) -> None:
    """What `--row NAME` does: measure, and say it in one line."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 10))
    try:
        row = measure(name)
    except SepruneError as error:
        row = {"error": f"{error.what} ({error.why})"}
    print(json.dumps(row))


def passed(row: Mapping[str, Any]) -> bool:
    """Whether everything that can be checked of a row came out right."""
    if "error" in row:
        return False
    cuts = row["budgets"].values()
    exact = row["masked"] is not None and (row["masked"] <= EXACT or is_mixed(row))
    return bool(row["reload"] and exact and all(c["exact"] and c["forward"] for c in cuts))


def is_mixed(row: Mapping[str, Any]) -> bool:
    """Whether the cut differs from the masked parent because layers mix all channels."""
    return bool(row.get("mixing")) and (row["masked"] is None or row["masked"] > EXACT)


def run(arguments: argparse.Namespace) -> None:
    held = read_json(RESULTS)["rows"] if RESULTS.is_file() else {}
    for name in ROWS:
        again = any(fnmatchcase(name, pattern) for pattern in arguments.again)
        if name in held and not again and not (arguments.failed and not passed(held[name])):
            continue
        held[name] = attempt(name)
        print(name, json.dumps(held[name]), file=sys.stderr, flush=True)
        found = environment(devices=False)
        versions = found["packages"] | found["extras"]["timm"]["packages"]
        document = {
            "command": "python benchmarks/support.py",
            "hardware": f"{device_name('cpu')}, {os.cpu_count()} cores, 1 thread",
            "date": date.today().isoformat(),
            "versions": {n: versions[n] for n in ("torch", "torchvision", "timm")},
            "rows": {n: held[n] for n in ROWS if n in held},
        }
        write_json(RESULTS, document)


# -- the table ----------------------------------------------------------------------------------

HEAD = """# Networks that seprune cuts

Made by `{command}` on {date} ({hardware}; {versions}); not written by hand.

Every network has random weights and is cut by `l2` scores with the default floors (10 % and 8
channels stay, SE bottlenecks keep their width). `macs` are what is reached of 0.75, 0.5 and 0.25;
`min` marks the least that the floors allow; `one unit` is a single channel, or channels that a
shuffle ties together, so that they stay or go as one. Checks, of every cut network: `forward` - it
runs at two input sizes or batch sizes, and `FlopCounterMode` counts exactly the MACs that the plan
says; of the one cut to 0.5: `masked` - largest relative difference, in float64, to its parent with
the removed channels masked; `reload` - saved, loaded and bit-equal. `s` is the time to trace,
score, plan and cut, on one thread. {passed} of {rows} rows pass; in {mixed} of them layers that
look at all channels together (named under `masked`) make a mask no proof, and it is only reported.

| network | input | gates | groups | left whole | macs | forward | masked | reload | s |
|---|--:|--:|--:|---|---|---|---|---|--:|
"""


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
    )
    return head + "".join(line(name, row) for name, row in rows.items())


def short(reason: str) -> str:
    """A reason without the place that it names: `no rule for roi_align`."""
    known = {"it is an output of the model": "output", "SE hidden width: kept": "SE hidden"}
    if reason in known:
        return known[reason]
    reason = re.sub(r"^(a trial cut fails) in layer .*$", r"\1", reason)
    reason = re.sub(r"^\w+ in (the model|[\w.#]+): | in (the model|[\w.#]+)$", "", reason)
    return re.sub(r"^it is |^it ", "", reason)


def line(name: str, row: Mapping[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | | | | **{row['error'].replace('|', '/')}** | | | | | |\n"
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
             "yes" if row["reload"] else "no", f"{row['seconds']:.1f}"]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", help="measure one network and print it as JSON")
    parser.add_argument("--again", nargs="*", default=[], help="globs of rows to run anew")
    parser.add_argument("--failed", action="store_true", help="run anew what did not pass")
    parser.add_argument("--render", action="store_true", help="only write docs/support.md")
    arguments = parser.parse_args()
    if arguments.row:
        child(arguments.row)
        return
    if not arguments.render:
        run(arguments)
    write_text(TABLE, render(read_json(RESULTS)))


if __name__ == "__main__":
    main()
