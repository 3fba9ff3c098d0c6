"""Where one number per sample can stand for the channels of a dependency group.

The derivative that scores a group is that of a mask on every read of its channels by a layer
outside the excitations. It is taken at gates, or at unit gates (factors of 1) far enough up that
few are needed, where everything between there and the reads scales with its input; else by a unit
gate at each single read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from seprune.graph.channel_ids import ChannelIds, along, compact, varying
from seprune.graph.dataflow import ACTIVATIONS, COPIES, MIXING, VIEWS, Flow, base
from seprune.graph.gate_products import sampled
from seprune.graph.gate_uses import GateUses
from seprune.graph.gates import Gate
from seprune.graph.homogeneous import homogeneous
from seprune.graph.sample_axis import sample_rows
from seprune.graph.tap_points import Tap, Taps
from seprune.graph.trace import Node, Ref, Trace

_REGIONS = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}


@dataclass(frozen=True)
class Site:
    """A gate (`kind` is `gate`), the output of a module (`unit`), or another tap (`read`).

    Attributes:
        ids: of its channels.
        channel_dim: of the tensor at `tap`; gates are flattened to (B, C).
    """

    kind: str
    name: str
    ids: Tensor
    tap: Tap | None = None
    channel_dim: int = 1


class ScoreSites:
    """The sites of every dependency group in a recorded pass.

    Args:
        group_of: for every class of channels the number of its group, -1 for none.
    """

    def __init__(
        self,
        trace: Trace,
        channel_ids: ChannelIds,
        gates: Sequence[Gate],
        *,
        classes: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
        group_of: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    ) -> None:
        self.trace, self.channel_ids = trace, channel_ids
        self.flow, self.taps = Flow(trace, channel_ids), Taps(trace)
        self.classes, self.group_of = classes, group_of
        self.readers = trace.consumers()
        self.by_node: dict[int, list[Gate]] = {}
        for gate in gates:
            if gate.node >= 0 and gate.ids is not None:
                self.by_node.setdefault(gate.node, []).append(gate)
        self.gates = [gate for own in self.by_node.values() for gate in own]
        self.uses = GateUses(trace, self.gates, self.readers, classes)
        self.gate_names = {"", *(gate.name for gate in gates)}
        self.excitation = {n for gate in self.gates for n in gate.excitation_nodes}
        self.attached = self._attached()
        self.regions = self._regions()
        self.rows = sample_rows(trace)
        self.carried: dict[int, set[int]] = {}  # group -> values that hold its channels
        for value, ids in channel_ids.values.items():
            for group in self.groups_in(ids):
                self.carried.setdefault(group, set()).add(value)

    def groups_in(self, ids: Tensor) -> set[int]:
        """Numbers of the groups whose channels are among `ids`."""
        found = self.group_of[self.classes[compact(ids).clamp_min(0).reshape(-1).numpy()]]
        return set(np.unique(found).tolist()) - {-1}

    def of(self, group: int) -> list[Site]:
        """The sites of one group; none where nothing in the pass shows its channels."""
        return _Region(self, group).sites()

    def _regions(self) -> set[int]:
        """What comes from boxes cut out of maps: its rows are boxes, as many as an image has."""
        found: set[int] = set()
        for node in self.trace.nodes:
            if base(node) in _REGIONS or not found.isdisjoint(node.inputs()):
                found.update(node.outputs)
        return found

    def _attached(self) -> set[int]:
        """The nodes of all excitations, and those that do nothing but prepare their squeeze."""
        nodes = set(self.excitation)
        outputs = set(self.trace.outputs)
        for node in reversed(self.trace.nodes):
            readers = [r for v in node.outputs for r in self.readers.get(v, [])]
            alone = bool(readers) and nodes.issuperset(readers) and not outputs & set(node.outputs)
            if alone and base(node) not in MIXING and self.flow.live(node):
                nodes.add(node.id)
        return nodes


class _Region:
    """The part of a pass through which the channels of one group go."""

    def __init__(self, context: ScoreSites, group: int) -> None:
        self.context, self.group = context, group
        self.trace, self.flow, self.taps = context.trace, context.flow, context.taps
        self.values = context.carried.get(group, set()) & self.flow.depends
        makers = [n for v in self.values if (n := self.flow.producer(v)) and self.makes(n)]
        inside = bool(makers) and all(n.id in context.excitation for n in makers)
        self.inside = inside
        self.apart: set[int] = set() if inside else context.attached
        self.layers = set() if inside else context.excitation
        self.reads = self._reads()
        self.known: dict[int, list[Site] | None] = {}
        self.origins: dict[tuple[str, str], int] = {}  # site -> the value that it scales

    def makes(self, node: Node) -> bool:
        """Whether a node mixes channels into new ones."""
        if base(node) not in MIXING or self.depthwise(node) or (data := self.data(node)) < 0:
            return False
        ids = self.context.channel_ids.values.get(data)
        if ids is None:
            return True
        dim = 1 if base(node) == "convolution" else ids.dim() - 1
        return dim in (varying(ids) or [dim])

    def depthwise(self, node: Node) -> bool:
        """Whether a convolution keeps channels apart."""
        if base(node) != "convolution":
            return False
        groups = int(node.args[8])
        return groups > 1 and groups == self.trace.shape(node.args[0].value)[1]

    def data(self, node: Node) -> int:
        """The operand of a layer that its weight meets, -1 where two activations meet."""
        reads = [a.value for a in node.args if isinstance(a, Ref)]
        at = 1 if base(node) in ("addmm", "baddbmm") else 0
        weight = reads[at + 1] if len(reads) > at + 1 else -1
        return reads[at] if weight >= 0 and weight not in self.flow.depends else -1

    def _reads(self) -> list[tuple[int, Node]]:
        """Every read by a layer outside the excitations: the value, and the layer's node."""
        found = []
        for value in sorted(self.values):
            for number in self.context.readers.get(value, []):
                node = self.trace.nodes[number]
                if number not in self.layers and self.makes(node) and self.data(node) == value:
                    found.append((value, node))
        return found

    def sites(self) -> list[Site]:
        reads = self.reads or self._ends()
        covers = [self.cover(value) for value, _ in reads]
        found = {(s.kind, s.name): s for cover in covers for s in cover or []}
        if reads and all(cover is not None for cover in covers) and self.scales(found):
            return [found[key] for key in self.context.uses.once(found)]
        single = [self.read_site(value, node) for value, node in self.reads]
        if single and all(site is not None for site in single):
            return list({s.name: s for s in single if s}.values())
        return [s for s in found.values() if s.kind != "gate" or s.tap is not None]

    def _ends(self) -> list[tuple[int, Node]]:
        """The values that no layer reads: where the group's channels stop."""
        found = []
        for value in sorted(self.values):
            node = self.flow.producer(value)
            if node is None or node.id in self.apart or value not in self.flow.depends:
                continue
            on = [self.trace.nodes[r] for r in self.context.readers.get(value, [])]
            if not any(self.values & set(n.outputs) for n in on if n.id not in self.apart):
                found.append((value, node))
        return found

    # -- where a mask may stand ---------------------------------------------------------------

    def cover(self, value: int) -> list[Site] | None:
        """Sites that together scale `value`; None where nothing shows them."""
        if value not in self.known:
            self.known[value] = None  # a value does not cover itself
            self.known[value] = self._cover(value)
        return self.known[value]

    def _cover(self, value: int) -> list[Site] | None:
        node = self.flow.producer(value)
        if node is None:
            return None
        gates = self.gates_at(node)
        if gates:
            return [self.keep(gate, value) for gate in gates]
        operands = self.operands(node)
        if operands and not self.makes(node) and homogeneous(node, set(operands), set()):
            parts = [self.cover(v) for v in operands]
            if all(part is not None for part in parts):
                joined = {(s.kind, s.name): s for part in parts for s in part or []}
                later = self.later(value, node, list(joined.values()))
                return [later] if later else list(joined.values())
        unit = self.unit(value)
        return None if unit is None else [self.keep(unit, value)]

    def operands(self, node: Node) -> list[int]:
        """The operands that hold the group's channels and are no part of an excitation."""
        found = []
        for value in dict.fromkeys(node.inputs()):
            maker = self.flow.producer(value)
            if value in self.values and (maker is None or maker.id not in self.apart):
                found.append(value)
        return found

    def later(self, value: int, node: Node, before: list[Site]) -> Site | None:
        """A module's output behind an activation rather than in front of it: no copy is kept."""
        on_the_way = base(node) in ACTIVATIONS or base(node) in COPIES or self.depthwise(node)
        if self.inside or not on_the_way or len(before) != 1 or before[0].kind == "gate":
            return None
        site = self.unit(value, plain=True)
        return None if site is None else self.keep(site, value)

    def keep(self, site: Site, value: int) -> Site:
        self.origins[site.kind, site.name] = value
        return site

    def gates_at(self, node: Node) -> list[Site]:
        """The gates that scale the group's channels in a product and nothing else."""
        if node.id in self.apart or base(node) in ("addcmul", "lerp"):  # x + x * g
            return []
        return [
            Site("gate", g.name, g.ids, g.tap)
            for g in self.context.by_node.get(node.id, [])
            if g.tap is not None and g.ids is not None
            and self.group in self.context.groups_in(g.ids)
        ]  # fmt: skip

    def unit(self, value: int, *, plain: bool = False) -> Site | None:
        """A unit gate that all readers of `value` come after."""
        readers = self.context.readers.get(value, [])
        tap = (self.taps.plain if plain else self.taps.ahead)(value, readers)
        return None if tap is None else self.site(value, tap)

    def site(self, value: int, tap: Tap) -> Site | None:
        """The site at a tap, if samples and channels lie along one dimension each."""
        ids = self.context.channel_ids.values[value]
        dims = varying(ids)
        batch_dim = self.samples_along(value)
        if len(dims) != 1 or batch_dim < 0 or batch_dim == dims[0]:
            return None
        channels = along(ids, dims[0])
        if channels is None:
            return None
        plain = tap.kind == "output" and tap.index == 0 and self.taps.counts[tap.module] == 1
        plain = plain and tap.module not in self.context.gate_names  # one name, one column
        name = tap.module if plain and tap.module else _name(tap)
        tap = replace(tap, batch_dim=batch_dim)
        return Site("unit" if plain else "read", name, channels, tap, dims[0])

    def samples_along(self, value: int) -> int:
        """The dimension of a value that counts samples, -1 if there is none."""
        if value in self.context.regions:
            return 0
        rows = self.context.rows.get(value)
        if rows is not None:
            return rows.dim if rows.in_turn else -1
        chain = self.flow.strip(value)
        numbers = next(sampled(self.flow, chain[0]), None)
        if numbers is None:
            return -1
        moved, batch = self.flow.positions(chain, numbers.samples), self.trace.batch
        dims = varying(moved)
        if not dims and batch == 1:
            return 0
        if len(dims) > 1 and batch > 1:  # the rows are positions, and stand in several dimensions
            dims = varying(moved // ((int(moved.max()) + 1) // batch))
        return dims[0] if len(dims) == 1 else -1

    def read_site(self, value: int, node: Node) -> Site | None:
        """A unit gate on what one layer reads, and on nothing else."""
        chain = self.flow.strip(value)
        for at in range(len(chain) - 1, -1, -1):
            for tap, first, end in self.taps.reading(chain[at], node.id):
                if not self.lone(chain[at], node, first, end):
                    continue
                if site := self.site(chain[at], tap):
                    return site
        return None

    def lone(self, value: int, node: Node, first: int, end: int) -> bool:
        """Whether, among some nodes, a value is read by one node alone, up to views."""
        todo = [value]
        while todo:
            for number in self.context.readers.get(todo.pop(), []):
                reader = self.trace.nodes[number]
                if not first <= number < end or number == node.id:
                    continue
                if base(reader) not in VIEWS or not self.leads(reader, node):
                    return False
                todo.extend(reader.outputs)
        return True

    def leads(self, view: Node, node: Node) -> bool:
        chain = self.flow.strip(self.data(node))
        return any(v in chain for v in view.outputs)

    # -- is it the mask on every read? ----------------------------------------------------------

    def scales(self, sites: Mapping[tuple[str, str], Site]) -> bool:
        """Whether masks at the sites scale every read once, and nothing else."""
        begins = {self.origins[key] for key in sites}
        scaled: set[int] = set(begins)
        after = self.trace.values[min(begins)].node
        outside = set(self.trace.outputs)
        for node in self.trace.nodes[after:]:
            read = scaled & set(node.inputs())
            if not read:
                continue
            if node.id in self.apart or (self.makes(node) and node.id in self.layers):
                return False
            if self.makes(node):
                continue
            maps = self.values & set(node.outputs)
            other = set(self.operands(node)) - scaled
            if not maps or not homogeneous(node, read, other) or begins & set(node.outputs):
                return False
            scaled |= maps
        reads = {value for value, _ in self.reads}
        own = {name for kind, name in sites if kind == "gate"}
        return reads <= scaled and not outside & scaled and self.context.uses.settled(own)


def _name(tap: Tap) -> str:
    """What a unit gate at a tap is called: `conv2:input`, `head:output[1]`, `:relu#2`."""
    what = tap.function if tap.kind in ("function", "argument") else tap.kind
    number = f"#{tap.index}" if tap.kind in ("function", "argument") else f"[{tap.index}]"
    argument = f"({tap.argument})" if tap.kind == "argument" else ""
    call = f"@{tap.call + 1}" if tap.call else ""
    plain = number in ("[0]", "#1")
    return f"{tap.module}{call}:{what}{'' if plain else number}{argument}"
