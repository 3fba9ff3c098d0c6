"""One row of the support table: a network on seprune's default path, every step of it checked.

Statistics with the sensitivities of the logits, default importance, plans at three budgets; of
every cut network its costs, its forward at two input shapes and its values against the masked
parent; of the one at half the MACs a refit, a step of training, and a fresh process that loads it.
"""

from __future__ import annotations

import copy
import multiprocessing
import re
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support_mask import masked
from support_subject import Subject, double, loader_of, outputs, subject_of, tensors
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seprune.errors import InputError, SepruneError, first_line
from seprune.export import architecture
from seprune.export.pruned_model import load, read_architecture, save
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance, score
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recovery.refit.network import refit
from seprune.recovery.refit.options import RefitOptions, Refitted
from seprune.statistics.collect import collect_statistics

BUDGETS = (0.75, 0.5, 0.25)
REFITTED = 0.5  # the budget whose network is refitted, trained and saved
EXACT = 1e-9  # relative to the largest output, in float64
ROUNDING = 1e-6  # relative, of a layer's error before and after its refit
ROWS, GRAM = 4096, 16 << 20
IMAGES, BATCH = 8, 4
ANALYSE_SECONDS = 600.0  # also on a busy machine

Fresh = Callable[[Path, str], int | None]


class Row:
    """What was found, and what was wrong; `fresh` runs `answer` in a fresh process."""

    def __init__(self, fresh: Fresh | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self.problems: list[str] = []
        self.fresh = fresh or fresh_process

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Work that may fail without ending the row."""
        try:
            yield
        except SepruneError as error:
            self.problems.append(f"{name}: {error.what} ({error.why})")
        except Exception as error:  # a crash is a finding
            traceback.print_exc()
            self.problems.append(f"{name}: {type(error).__name__}: {first_line(error)}")

    def require(self, right: bool, otherwise: str) -> None:
        """Note what is wrong unless it is right."""
        if not right:
            self.problems.append(otherwise)


def measure(name: str, fresh: Fresh | None = None) -> dict[str, Any]:
    """Everything that the table says of one network."""
    row, began = Row(fresh), time.process_time()
    with row.step("build"):
        subject = subject_of(name)
        row.facts["input"] = spelled(subject.shape)
        row.facts["other"] = spelled(subject.other)
        _path(row, subject)
    seconds = round(time.process_time() - began, 1)
    return {**row.facts, "seconds": seconds, "failed": "; ".join(row.problems)}


def _path(row: Row, subject: Subject) -> None:
    structure, importance = _scored(row, subject)
    if importance is None or structure is None:
        return
    errors, across, reached = [], set[str](), []
    for budget in BUDGETS:
        with row.step(f"at {budget:g}"):
            plan, least = plan_at(structure, importance, budget)
            if least is not None:
                row.facts["least"] = f"{least:.3f}"
            small = prune(subject.model, plan).eval()
            reached.append(check_costs(row, subject, structure, (plan, small)))
            check_forward(row, subject, small, budget)
            error, operators = masked_error(subject, plan)
            row.require(error <= EXACT, f"{error:.0e} from the masked parent at {budget:g}")
            errors.append(error)
            across |= operators
            if budget == REFITTED:
                _recovered(row, subject, plan, small)
    row.facts["macs"] = " ".join(f"{r:.4f}" for r in reached)
    row.facts["masked"] = f"{max(errors, default=float('nan')):.0e}"
    row.facts["across"] = "; ".join(sorted(across))


def _scored(row: Row, subject: Subject) -> tuple[NetworkStructure | None, Importance | None]:
    """What the network is made of, and the default importance of its units."""
    structure = importance = None
    with row.step("analyse"):
        structure = analyse(subject.model, subject.inputs(2), limit_seconds=ANALYSE_SECONDS)
        row.facts["gates"] = len(structure.gates)
        row.facts["groups"] = len(structure.groups)
    with row.step("statistics"):
        if structure is not None:
            statistics = collect_statistics(subject.model, images(subject), structure=structure)
            importance = score(structure, statistics)
            wrong = [n for n, s in importance.scores.items() if not bool(s.isfinite().all())]
            row.require(not wrong, f"scores of {', '.join(wrong)} are not finite")
    return structure, importance


def images(subject: Subject) -> list[Any]:
    """Calibration batches, without labels."""
    count = IMAGES if max(subject.shape) <= 128 else IMAGES // 2
    batches = [subject.inputs(BATCH, seed=n) for n in range(1, count // BATCH + 1)]
    return [b[0] if isinstance(b, tuple) else b for b in batches]


def spelled(shape: tuple[int, ...]) -> str:
    """Such as 3x96x96."""
    return "x".join(map(str, shape))


# -- plans, and the networks that they cut ---------------------------------------------------------


def plan_at(
    structure: NetworkStructure, importance: Importance, budget: float
) -> tuple[PruningPlan, float | None]:
    """The plan of a budget; of the least that can be reached, and that, where it is too small."""
    try:
        return make_plan(structure, importance, macs=budget), None
    except InputError as error:
        found = re.search(r"macs can go down to [\d,]+ \(([\d.]+) of all\)", error.what)
        if error.code != "budget" or found is None:
            raise
        least = float(found[1]) + 0.001
        return make_plan(structure, importance, macs=least), least


def check_costs(
    row: Row, subject: Subject, structure: NetworkStructure, cut: tuple[PruningPlan, nn.Module]
) -> float:
    """The fraction of the MACs that is left; MACs and parameters are counted again."""
    plan, small = cut
    (before, after), target = plan.facts["macs"], plan.facts["targets"]["macs"]
    batch = 2 if subject.detects else 1  # a list of images is counted whole
    with FlopCounterMode(display=False) as counter:
        outputs(small, subject.inputs(batch))
    counted = counter.get_total_flops() // 2 // batch
    row.require(counted == after, f"{after} MACs predicted, {counted} counted")
    params = sum(p.numel() for p in small.parameters())
    said = plan.facts["params"][1]
    row.require(params == said, f"{said} parameters predicted, {params} counted")
    close = 0.99 * target <= after <= target
    if not close and not (after <= target and not any_fits(structure, plan)):
        row.problems.append(f"{after / before:.3f} of the MACs, the target is {target / before:g}")
    return float(after / before)


def any_fits(structure: NetworkStructure, plan: PruningPlan) -> bool:
    """Whether some group could have kept one more unit within the target."""
    kept = {g.name: len(g.keep) for g in plan.groups}
    return any(
        structure.macs_at({**kept, g.name: kept[g.name] + 1}) <= plan.facts["targets"]["macs"]
        for g in plan.groups
        if g.reason is None and kept[g.name] < g.units
    )


def check_forward(row: Row, subject: Subject, small: nn.Module, budget: float) -> None:
    """The cut network runs as its parent does, also at another batch and another size."""
    for inputs in (subject.inputs(3), subject.inputs(1, other=True)):
        made, parents = outputs(small, inputs), outputs(subject.model, inputs)
        row.require(len(made) > 0, f"no outputs at {budget:g}")
        same = subject.detects or [t.shape for t in made] == [t.shape for t in parents]
        row.require(same, f"outputs of other shapes at {budget:g}")
        finite = all(bool(t.isfinite().all()) for t in made)
        row.require(finite, f"outputs at {budget:g} are not finite")


# -- compared to the masked parent -----------------------------------------------------------------


def masked_error(subject: Subject, plan: PruningPlan) -> tuple[float, set[str]]:
    """Largest relative difference to the masked parent, and the operators that forbid the proof.

    Where the whole plan differs, what operators across channels read is left whole for the proof.
    """
    error = _masked_error(subject, plan)
    caveats = (g.caveat for g in plan.groups if g.caveat and _cut(g))
    noted = {caveat.partition(" looks ")[0].partition(" in ")[0] for caveat in caveats}
    if error <= EXACT or not noted:
        return error, set()
    keep = {g.name: range(g.units) if g.caveat else g.keep for g in plan.groups}
    groups = [replace(g, keep=tuple(keep[g.name])) for g in plan.groups]
    rest = replace(plan, groups=tuple(groups))
    if not rest.layers():
        return 0.0, noted | {"nothing else is cut"}
    return _masked_error(subject, rest), noted


def _cut(group: Any) -> bool:
    return len(group.keep) < group.units


def _masked_error(subject: Subject, plan: PruningPlan) -> float:
    inputs, parent = double(subject.inputs(2)), copy.deepcopy(subject.model).double()
    made = outputs(prune(parent, plan).eval(), inputs)
    with masked(parent, plan) as twin:
        wanted = outputs(twin, inputs)
    return max(
        (difference(a, b) for a, b in zip(made, wanted, strict=True) if a.is_floating_point()),
        default=float("inf"),
    )


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of `b`."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    return float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-300))


# -- refitted, trained, saved ----------------------------------------------------------------------


def _recovered(row: Row, subject: Subject, plan: PruningPlan, small: nn.Module) -> None:
    whole = Counter(g.reason for g in plan.groups if g.reason is not None)
    row.facts["whole"] = "; ".join(f"{n} {short}" for short, n in shortened(whole).items())
    with row.step("refit"):
        options = RefitOptions(images=IMAGES, rows=ROWS, gram=GRAM, device="cpu")
        refitted = refit(subject.model, small, plan, images(subject), options=options)
        check_refit(row, refitted)
        before, after = (gap(subject, m) for m in (small, refitted.model))
        row.facts["gap"] = f"{before:.2g} {after:.2g}"
        small = refitted.model
    with row.step("training"):
        small = trained(subject, small)
    with row.step("save and load"):
        wrong = saved(subject, plan, small, row.fresh)
        row.require(not wrong, f"saved and loaded: {wrong}")


def shortened(reasons: Counter[str]) -> Counter[str]:
    """Reasons without the places that they name: `no rule for roi_align`."""
    found = Counter[str]()
    for reason, number in reasons.items():
        reason = re.sub(r"^(a trial cut fails) in layer .*$", r"\1", reason)
        reason = re.sub(r"^\w+ in (the model|[\w.#]+): | in (the model|[\w.#]+)$", "", reason)
        reason = re.sub(r"^(a trial cut gives other values at \w+).*$", r"\1", reason)
        found[re.sub(r"^it is |^it |^its ", "", reason).replace(";", ",")] += number
    return found


def check_refit(row: Row, refitted: Refitted) -> None:
    """The error falls, or stays, in every layer that has new weights."""
    row.facts["refitted"] = len(refitted.layers)
    skipped = shortened(Counter(refitted.skipped.values()))
    row.facts["skipped"] = "; ".join(f"{n} {why}" for why, n in skipped.items())
    pairs = refitted.errors.items()
    worse = [n for n, (before, after) in pairs if not after <= before * (1 + ROUNDING)]
    row.require(not worse, f"the refit's error rises in {', '.join(worse[:3])}")


def gap(subject: Subject, model: nn.Module) -> float:
    """Mean square of the difference to the parent's outputs, relative to their variance."""
    inputs = subject.inputs(BATCH, seed=1)
    pairs = list(zip(outputs(model, inputs), outputs(subject.model, inputs)))
    found = [
        float((a - b).square().mean() / b.var().clamp_min(1e-30))
        for a, b in pairs
        if b.is_floating_point() and b.numel() > 1 and a.shape == b.shape
    ]
    return sum(found) / max(1, len(found))


def trained(subject: Subject, model: nn.Module) -> nn.Module:
    """A copy after one step of SGD in training mode; every weight that has a gradient moves.

    Raises:
        AssertionError: no weight has a gradient, or one is not finite.
    """
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    torch.manual_seed(0)
    loss(subject, model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert moved > len(before) / 2, f"{moved} of {len(before)} parameters move"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return model.eval()


def loss(subject: Subject, model: nn.Module) -> Tensor:
    """The losses of a detector, else the mean square of all outputs."""
    inputs = subject.inputs(4, seed=2)
    if subject.detects:
        boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0]])
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in inputs[0]]
        return sum(model(inputs[0], targets).values(), torch.zeros(()))
    made = [t for t in tensors(model(inputs)) if t.is_floating_point()]
    return sum(((t - 1).square().mean() for t in made), torch.zeros(()))


def saved(subject: Subject, plan: PruningPlan, model: nn.Module, fresh: Fresh) -> str:
    """What is wrong with the network that a fresh process loads; empty if nothing is."""
    answers = outputs(model, subject.inputs(2))
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "m", subject.architecture.cut(plan))
        there = ask(Path(folder), subject.inputs(2), "cpu", fresh)
    if len(answers) != len(there):
        return f"{len(there)} outputs instead of {len(answers)}"
    if not all(map(torch.equal, answers, there)):
        error = max(difference(b, a) for a, b in zip(answers, there))
        return f"outputs differ by {error:.0e}"
    return ""


def ask(folder: Path, inputs: Any, device: str, fresh: Fresh) -> list[Tensor]:
    """The outputs of the network saved in `folder`/m, loaded by another process on `device`."""
    batch = inputs[0] if isinstance(inputs, tuple) else [inputs]
    save_file(numbered(batch), folder / "inputs", metadata={"list": str(isinstance(inputs, tuple))})
    status = fresh(folder, device)
    assert status == 0, f"the process that loads it ends with {status}"
    return [tensor for _, tensor in sorted(load_file(folder / "outputs").items())]


def numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: named, and none in the memory of another."""
    return {f"{n:06d}": t.detach().cpu().contiguous().clone() for n, t in enumerate(tensors)}


def answer(folder: Path, device: str) -> None:
    """Write the outputs of the network saved in `folder`/m, for `ask`."""
    torch.set_num_threads(1)
    architecture.BUILD_SECONDS = (int(ANALYSE_SECONDS),) * 2  # imports are slow on a busy machine
    torch.backends.cudnn.allow_tf32 = False
    with safe_open(folder / "inputs", "pt", device=device) as file:
        batch = [file.get_tensor(name) for name in sorted(file.keys())]
        inputs: Any = (batch,) if file.metadata()["list"] == "True" else batch[0]
    loader = loader_of(read_architecture(folder / "m"))
    model = load(folder / "m", device=device, loader=loader)
    save_file(numbered(outputs(model, inputs)), folder / "outputs")


def fresh_process(folder: Path, device: str) -> int | None:
    """The exit status of a process that has never seen the network and calls `answer`."""
    context = multiprocessing.get_context("forkserver")  # the server imports seprune, no network
    process = context.Process(target=answer, args=(folder, device))
    process.start()
    process.join()
    return process.exitcode


def measure_within(name: str, seconds: int, parent: Connection) -> None:
    """Send the row of a network, all values as text, unless it takes too much processor time.

    The parent is asked for the fresh process: its server has imported everything.
    """

    def fresh(folder: Path, device: str) -> int | None:
        parent.send((folder, device))
        return cast(int | None, parent.recv())

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 10))
    parent.send({key: str(value) for key, value in measure(name, fresh).items()})
    parent.close()
