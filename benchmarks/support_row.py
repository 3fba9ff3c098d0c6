"""One row of the support table: a network cut to three budgets, checked, saved and loaded.

python benchmarks/support_row.py NAME              # measure it, print one line of JSON
python benchmarks/support_row.py --answer FOLDER   # what the network saved there says
"""

from __future__ import annotations

import copy
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seprune.errors import InputError, SepruneError
from seprune.export.architecture import Architecture
from seprune.export.pruned_model import load, save
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance, Scoring, score
from seprune.measure.flops import count, quietly
from seprune.models import build, input_size
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan

SIDE = 128  # of the images, where the network takes them
BUDGETS = (0.75, 0.5, 0.25)
CLOSE = 1e-3  # relative to the largest output: another device sums in another order
LIMIT_SECONDS = 600  # of CPU time, so that a busy machine makes no row fail


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
    began = time.process_time()
    structure = analyse(subject.model, subject.inputs)
    analysed = time.process_time()
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
    began = time.process_time()
    plan = make_plan(structure, importance, macs=reachable(row["budgets"]["0.5"]))
    small = prune(subject.model, plan).eval()
    row["seconds"] = round(row["analyse_seconds"] + time.process_time() - began, 2)
    row["whole"] = dict(Counter(g.reason for g in plan.groups if g.reason is not None))
    row |= reloaded(subject, plan, small)
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


def cut_to(
    subject: Subject, structure: NetworkStructure, importance: Importance, budget: float
) -> Any:
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


def any_fits(structure: NetworkStructure, plan: PruningPlan) -> bool:
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


# -- saved and loaded ---------------------------------------------------------------------------


def reloaded(subject: Subject, plan: PruningPlan, small: nn.Module) -> dict[str, Any]:
    """What the saved network says here, in a fresh process and on another device.

    `reload` and `process` - bit for bit what the one that was saved says; `device` - its name,
    whether the tensors are bit-equal there, and the largest relative difference of the outputs;
    None where this machine has no other device.
    """
    answers = outputs(small, subject.inputs)
    with tempfile.TemporaryDirectory() as folder:
        save(small, Path(folder) / "m", Architecture(subject.name).cut(plan))
        found: dict[str, Any] = {
            "reload": equal(answers, outputs(load(Path(folder) / "m"), subject.inputs)),
            "process": equal(answers, ask(Path(folder), subject.inputs, "cpu")),
            "device": None,
        }
        if torch.cuda.is_available():
            there = ask(Path(folder), subject.inputs, "cuda")
            tensors = equal(state_of(small), listed(Path(folder) / "state_of"))
            error = max(
                (difference(b, a) for a, b in zip(answers, there, strict=True)), default=0.0
            )
            found["device"] = {"name": "cuda", "tensors": tensors, "error": error}
    return found


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300))


def state_of(model: nn.Module) -> list[Tensor]:
    """All tensors of a network, on the CPU."""
    named = {**dict(model.named_buffers()), **model.state_dict()}
    return [named[name].detach().cpu() for name in sorted(named)]


def ask(folder: Path, inputs: Any, device: str) -> list[Tensor]:
    """The outputs of the network saved in `folder`/m, loaded by another process on `device`."""
    batch = inputs[0] if isinstance(inputs, tuple) else [inputs]
    save_file(numbered(batch), folder / "inputs", metadata={"list": str(isinstance(inputs, tuple))})
    command = [sys.executable, __file__, "--answer", str(folder), device]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return listed(folder / "outputs")


def listed(path: Path) -> list[Tensor]:
    """What `numbered` had numbered."""
    return [tensor for _, tensor in sorted(load_file(path).items())]


def numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: named, and none in the memory of another."""
    return {f"{n:06d}": t.detach().cpu().contiguous().clone() for n, t in enumerate(tensors)}


def answer(folder: Path, device: str) -> None:
    """What `--answer FOLDER DEVICE` does: `outputs` and `state_of` of the network, for `ask`."""
    torch.backends.cudnn.allow_tf32 = False
    with safe_open(folder / "inputs", "pt", device=device) as file:
        batch = [file.get_tensor(name) for name in sorted(file.keys())]
        inputs: Any = (batch,) if file.metadata()["list"] == "True" else batch[0]
    model = load(folder / "m", device=device)
    save_file(numbered(outputs(model, inputs)), folder / "outputs")
    save_file(numbered(state_of(model)), folder / "state_of")


# -- compared to the masked parent --------------------------------------------------------------


def masked_error(subject: Subject, plan: PruningPlan) -> dict[str, Any]:
    """Largest difference to the parent whose layers do not hear the removed channels (float64)."""
    inputs = ([*subject.inputs[0]],) if isinstance(subject.inputs, tuple) else subject.inputs
    parent = copy.deepcopy(subject.model).double()
    inputs = ([t.double() for t in inputs[0]],) if isinstance(inputs, tuple) else inputs.double()
    small = prune(parent, plan).eval()
    answers = outputs(small, inputs)
    del small
    mask(parent, plan)
    error = 0.0
    for a, b in zip(answers, outputs(parent, inputs), strict=True):
        if a.shape != b.shape:
            return {"masked": None, "mixing": mixing(parent, plan)}
        if a.is_floating_point():
            error = max(error, difference(a, b))
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


def main() -> None:
    """Measure a network and say it in one line, or answer for one that was saved."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS + 10))
    if sys.argv[1] == "--answer":
        answer(Path(sys.argv[2]), sys.argv[3])
        return
    try:
        row = measure(sys.argv[1])
    except SepruneError as error:
        row = {"error": f"{error.what} ({error.why})"}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
