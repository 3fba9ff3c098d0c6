"""Random networks, and checks of them that share no code with what they check.

`network(seed)` draws a network; `problems(seed)` is a list of what is wrong with what seprune makes
of it, empty if nothing is.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # `load` runs this file from anywhere

import torch
from network_blocks import CONVS, KINDS, SIDE, Block, Gate, mean, wide
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from seprune import Architecture, ModelLoader, analyse, collect_statistics, load, prune, save
from seprune.graph.groups import Member, NetworkStructure
from seprune.pruning.plan import PruningPlan, plan_of

HEADS = ("pooled", "flat", "map", "embedding", "two", "dictionary")
EXACT = 1e-9  # relative, in float64
_CALLS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
          "linear"}  # fmt: skip


class Network(nn.Module):
    """A stem, drawn blocks and a drawn head; `second` adds another input."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.nd = draw.choice([1, 2, 2, 2, 2, 2, 2, 3])
        width = draw.choice([6, 7, 8, 10])
        self.stem = nn.Sequential(CONVS[self.nd](3, width, 3, padding=1), nn.ReLU())
        self.second = draw.random() < 0.15
        self.side = nn.Linear(5, width) if self.second else None
        fitting = sorted(k for k, kind in KINDS.items() if self.nd in kind.dims)
        # the first block goes through all kinds in turn, whatever is drawn beside it
        names = [fitting[seed % len(fitting)], *draw.choices(fitting, k=draw.choice([1, 1, 2]))]
        draw.shuffle(names)
        self.kinds = names
        self.blocks = nn.ModuleList()
        for name in names:
            block = KINDS[name](width, self.nd, draw)
            self.blocks.append(block)
            width = block.out
        self.head = draw.choice(HEADS)
        positions = SIDE**self.nd if self.head == "flat" else 1
        self.last = CONVS[self.nd](width, 4, 1) if self.head == "map" else None
        self.fc = nn.Linear(width * positions, 4) if self.head not in ("map", "embedding") else None
        self.aux = nn.Linear(width, 3) if self.head in ("two", "dictionary") else None

    def forward(self, x: Tensor, vector: Tensor | None = None) -> Any:
        x = self.stem(x)
        if vector is not None:
            x = x + wide(self.side(vector), x)
        for block in self.blocks:
            x = block(x)
        if self.head == "map":
            return self.last(x)
        if self.head == "embedding":
            return mean(x)
        made = self.fc(x.flatten(1) if self.head == "flat" else mean(x))
        if self.head == "two":
            return made, self.aux(mean(x))
        return {"out": made, "aux": self.aux(mean(x))} if self.head == "dictionary" else made

    @property
    def fixed(self) -> bool:
        """Whether it runs at one image size only."""
        return self.head == "flat" or any(b.fixed for b in self.blocks)

    @property
    def mixing(self) -> list[str]:
        """What it computes across channels."""
        return [b.mixing for b in self.blocks if isinstance(b, Block) and b.mixing]


def network(seed: int) -> Network:
    """The network of a seed, with norms that are not fresh."""
    torch.manual_seed(seed)
    model = Network(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.8, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


def inputs_of(model: Network, batch: int, side: int, dtype: torch.dtype = torch.float32) -> Any:
    """A batch, or a tuple of it and a vector."""
    generator = torch.Generator().manual_seed(batch * 100 + side)
    x = torch.rand(batch, 3, *[side] * model.nd, generator=generator, dtype=torch.float64)
    vector = torch.rand(batch, 5, generator=generator, dtype=torch.float64)
    return (x.to(dtype), vector.to(dtype)) if model.second else x.to(dtype)


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    made = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return [t for t in tree_leaves(made) if isinstance(t, Tensor)]


def drawn_plan(structure: NetworkStructure, seed: int) -> PruningPlan:
    """A random part of every group that may be cut."""
    draw = random.Random(seed)
    keep = {
        g.name: draw.sample(range(g.units), draw.randint(max(1, g.units // 3), g.units))
        for g in structure.groups
        if g.prunable
    }
    return plan_of(structure.groups, keep, {})


def kept_of(plan: PruningPlan) -> dict[str, Any]:
    """Kept units by group."""
    return {g.name: g.keep for g in plan.groups}


# -- the parent with masks -------------------------------------------------------------------------


class Read(TorchFunctionMode):
    """Multiply what layers read through one parameter by factors along its channels."""

    def __init__(self, weight: Tensor, factors: Tensor) -> None:
        super().__init__()
        self.weight, self.factors = weight, factors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _CALLS and any(t is self.weight for t in (args[1], args[1]._base)):
            shape = [1] * args[0].dim()
            shape[-1 if name == "linear" else 1] = -1
            args = (args[0] * self.factors.view(shape), *args[1:])
        return func(*args, **(kwargs or {}))


def reads(model: nn.Module, member: Member) -> Tensor | None:
    """The parameter through which a member reads its channels; None if it does not read."""
    if member.side == "in":
        weight: Tensor = model.get_submodule(member.layer).weight  # type: ignore[assignment]
        return weight
    parameters = dict(model.named_parameters())
    bare = parameters.get(member.layer)
    return bare if bare is not None and member.side == "dim1" and bare.dim() >= 2 else None


def silenced(model: nn.Module, member: Member, gone: list[int]) -> Any:
    """A hook that zeroes channels where a convolution makes them."""
    index = torch.from_numpy(member.index[gone].reshape(-1))
    return model.get_submodule(member.layer).register_forward_hook(
        lambda _module, _inputs, out: out.index_fill(1, index, 0)
    )


def masked_outputs(
    model: nn.Module, structure: Any, plan: PruningPlan, inputs: Any
) -> list[Tensor]:
    """The outputs of the parent whose layers do not hear the removed channels."""
    gone = {g.name: sorted(set(range(g.units)) - set(g.keep)) for g in plan.groups}
    with ExitStack() as stack:
        for group in structure.groups:
            if gone.get(group.name) and all(m.side == "out" for m in group.members):
                for member in group.members:  # queries and keys meet in a product of two maps
                    stack.callback(silenced(model, member, gone[group.name]).remove)
            for member in group.members:
                weight = reads(model, member)
                if weight is None or not gone.get(group.name):
                    continue
                factors = torch.ones(member.total, dtype=torch.float64)
                factors[torch.from_numpy(member.index[gone[group.name]].reshape(-1))] = 0
                stack.enter_context(Read(weight, factors))
        return outputs(model, inputs)


# -- checks ----------------------------------------------------------------------------------------


def problems(seed: int) -> list[str]:
    """What is wrong with what seprune makes of the network of `seed`."""
    model = network(seed)
    before = copy.deepcopy(model.state_dict())
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules()}
    inputs = inputs_of(model, 2, SIDE)
    structure = analyse(model, inputs)
    plan = drawn_plan(structure, seed)
    small = prune(model, plan).eval()
    found = [
        *_runs(model, small),
        *_costs(structure, plan, small, model),
        *_equals_masked(model, structure, plan),
        *_reloads(seed, small, plan, inputs),
        *_gates(model, structure, inputs),
        *_effects(model, structure),
    ]
    after = model.state_dict()
    if before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in before):
        found.append("the caller's parameters changed")
    if attributes != {n: sorted(vars(m)) for n, m in model.named_modules()}:
        found.append("the caller's attributes changed")
    return found


def _runs(model: Network, small: nn.Module) -> Iterator[str]:
    for batch, side in ((1, SIDE), (3, SIDE if model.fixed else SIDE + 4)):
        inputs = inputs_of(model, batch, side)
        try:
            made = outputs(small, inputs)
        except Exception as error:
            yield f"forward at batch {batch}, side {side}: {error}"
            continue
        if [t.shape for t in made] != [t.shape for t in outputs(model, inputs)]:
            yield f"other shapes at batch {batch}, side {side}"


def _costs(structure: Any, plan: PruningPlan, small: nn.Module, model: Network) -> Iterator[str]:
    kept = {g.name: len(g.keep) for g in plan.groups}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs(small, inputs_of(model, 1, SIDE))
    macs, params = counter.get_total_flops() // 2, sum(p.numel() for p in small.parameters())
    if macs != structure.macs_at(kept):
        yield f"{structure.macs_at(kept)} MACs predicted, {macs} counted"
    if params != structure.params_at(kept):
        yield f"{structure.params_at(kept)} parameters predicted, {params} counted"


def _equals_masked(model: Network, structure: Any, plan: PruningPlan) -> Iterator[str]:
    parent = copy.deepcopy(model).double()
    inputs = inputs_of(model, 2, SIDE, torch.float64)
    with torch.no_grad():
        made = outputs(prune(parent, plan).eval(), inputs)
        want = masked_outputs(parent, structure, plan, inputs)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(made, want, strict=True))
    noted = any(g.caveat for g in structure.groups if len(kept_of(plan)[g.name]) < g.units)
    if not error <= EXACT and not noted:
        yield f"differs from the masked parent by {error:.2e}"


def _reloads(seed: int, small: nn.Module, plan: PruningPlan, inputs: Any) -> Iterator[str]:
    name = f"{Path(__file__).resolve()}:network"
    with tempfile.TemporaryDirectory() as folder:
        save(small, Path(folder) / "m", Architecture(name, args={"seed": seed}).cut(plan))
        again = load(Path(folder) / "m", loader=ModelLoader.allowing(name))
    pairs = zip(outputs(small, inputs), outputs(again, inputs), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        yield "another network after save and load"


def _gates(model: Network, structure: Any, inputs: Any) -> Iterator[str]:
    """Every channel gate is found, and its mean is what a hook sees."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_m: Any, _i: Any, out: Tensor) -> None:
            seen[name] = out.flatten(2)[:, :, 0].double() if out.dim() > 2 else out.double()

        return hook

    modules = {n: m for n, m in model.named_modules() if isinstance(m, Gate)}
    handles = [m.register_forward_hook(keep(n)) for n, m in modules.items()]
    with torch.no_grad():
        outputs(model, inputs)
    for handle in handles:
        handle.remove()
    found = {g.name for g in structure.gates}
    yield from (f"gate {n} not found among {sorted(found)}" for n in seen if n not in found)
    if model.second or not found:
        return
    got = collect_statistics(model, [inputs])
    for name, values in seen.items():
        if name in got.values and values.shape[0] == len(inputs):
            # statistics are in the order of the channels that the gate scales
            pair = (got.values[name]["mean"].sort()[0], values.mean(0).sort()[0])
            error = float((pair[0] - pair[1]).abs().max())
            if error > 1e-6:
                yield f"mean of {name} is off by {error:.1e}"


def _effects(model: Network, structure: Any) -> Iterator[str]:
    """Sensitivities against the derivative by masks, image by image."""
    if model.second or model.head not in ("pooled", "flat"):
        return
    parent = copy.deepcopy(model).double()
    x, y = inputs_of(model, 3, SIDE, torch.float64), torch.arange(3)
    got = collect_statistics(parent, [(x, y)], structure=structure, gradients="labels").groups
    for name, u in mask_gradients(parent, structure, x, y).items():
        own = got.get(name)
        if own is None:
            yield f"no effect of {name}"
            continue
        want = u.square().mean(0)
        error = float((own["effect_square"] - want).abs().max() / want.max().clamp_min(1e-30))
        if error > 1e-6 and float(want.max()) > 1e-18:
            yield f"effect of {name} is off by {error:.1e}"


def mask_gradients(parent: nn.Module, structure: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(images, units) of every group: the derivative by a mask on all that layers read of it."""
    inside = {layer for gate in structure.gates for layer in gate.excitation}
    groups = {
        g.name: (g, pairs)
        for g in structure.groups
        if g.role == "features" and g.prunable
        and (pairs := [(m, w) for m in g.members if m.layer not in inside
                       and (w := reads(parent, m)) is not None])
    }  # fmt: skip
    rows: dict[str, list[Tensor]] = {name: [] for name in groups}
    for i in range(len(x)):
        masks = {
            n: torch.ones(g.units, dtype=x.dtype).requires_grad_() for n, (g, _) in groups.items()
        }
        with ExitStack() as stack:
            for name, (_, pairs) in groups.items():
                for member, weight in pairs:
                    index = torch.from_numpy(member.index)
                    each = masks[name][:, None].expand(index.shape).reshape(-1)
                    factors = torch.ones(member.total, dtype=x.dtype).index_put(
                        (index.reshape(-1),), each
                    )
                    stack.enter_context(Read(weight, factors))
            loss = nn.functional.cross_entropy(parent(x[i : i + 1]), y[i : i + 1])
        if not masks:
            return {}
        found = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
        for name, gradient in zip(masks, found, strict=True):
            rows[name].append(torch.zeros_like(masks[name]) if gradient is None else gradient)
    return {name: torch.stack(own) for name, own in rows.items()}
