"""Dependency groups of small networks worked out by hand, and costs that are exact to the unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cutting import counted, kept, random_plan
from hypothesis import given
from hypothesis import strategies as st
from nets import DEPENDENT, SE, Chain, Gated, Residual, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.channel_ids import joined
from seprune.graph.groups import ChannelGroup, find_structure
from seprune.graph.op_rules.conv_groups import partners
from seprune.measure.flops import count
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune

Sides = dict[tuple[str, str], list[list[int]]]


def groups_of(kind: str) -> dict[str, ChannelGroup]:
    return {g.name: g for g in find_structure(dependent(kind), images()).groups}


def sides(group: ChannelGroup) -> Sides:
    return {(m.layer, m.side): m.index.tolist() for m in group.members}


def each(count: int, start: int = 0) -> list[list[int]]:
    """Unit u stands at position start + u."""
    return [[start + u] for u in range(count)]


def same(keys: list[tuple[str, str]], index: list[list[int]]) -> Sides:
    return dict.fromkeys(keys, index)


# -- by hand --------------------------------------------------------------------------------------


def test_a_residual_stream_is_one_group_and_what_is_inside_a_block_another():
    groups = groups_of("residual")
    stream = [
        ("stem", "out"), ("blocks.0.conv1", "in"), ("blocks.0.conv2", "out"),
        ("blocks.0.bn2", "out"), ("blocks.0.se.fc.0", "in"), ("blocks.0.se.fc.2", "out"),
        ("blocks.1.conv1", "in"), ("blocks.1.conv2", "out"), ("blocks.1.bn2", "out"),
        ("blocks.1.se.fc.0", "in"), ("blocks.1.se.fc.2", "out"), ("fc", "in"),
    ]  # fmt: skip
    assert sides(groups["stem"]) == same(stream, each(8))
    inside = [("blocks.0.conv1", "out"), ("blocks.0.bn1", "out"), ("blocks.0.conv2", "in")]
    assert sides(groups["blocks.0.conv1"]) == same(inside, each(8))
    assert list(groups) == [
        "stem", "blocks.0.conv1", "blocks.0.se.fc.0", "blocks.1.conv1", "blocks.1.se.fc.0", "fc",
    ]  # fmt: skip
    assert groups["stem"].layers[:2] == ("stem", "blocks.0.conv2")


def test_gates_sources_and_roles_of_a_residual_stream():
    groups = groups_of("residual")
    assert [link.gate for link in groups["stem"].gates] == ["blocks.0.se", "blocks.1.se"]
    assert all(link.index.tolist() == each(8) for link in groups["stem"].gates)
    # made in three places: a unit gate where no gate is, the gates of the blocks
    assert [(s.kind, s.name) for s in groups["stem"].sources] == [
        ("unit", "stem"), ("gate", "blocks.0.se"), ("gate", "blocks.1.se"),
    ]  # fmt: skip
    inner = groups["blocks.0.conv1"]
    assert inner.gates == ()
    assert [(s.kind, s.name) for s in inner.sources] == [("unit", "blocks.0.bn1")]
    roles = {name: group.role for name, group in groups.items()}
    assert [n for n, r in roles.items() if r == "bottleneck"] == [
        "blocks.0.se.fc.0", "blocks.1.se.fc.0",
    ]  # fmt: skip


def test_an_inner_gate_stands_for_a_group_of_its_own():
    group = groups_of("inner")["expand"]
    names = [("expand", "out"), ("depthwise", "out"), ("se.fc.0", "in"), ("se.fc.2", "out"),
             ("project", "in")]  # fmt: skip
    assert sides(group) == same(names, each(12))
    assert [link.gate for link in group.gates] == ["se"]
    assert [(s.kind, s.name, s.total) for s in group.sources] == [("gate", "se", 12)]
    assert [(s.kind, s.name) for s in groups_of("inner")["stem"].sources] == [
        ("unit", "stem"), ("unit", "project"),
    ]  # fmt: skip


def test_a_gate_on_a_concatenation_stands_for_both_of_its_parts():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
            self.se, self.c = SE(10), nn.Conv2d(10, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.se(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3))

    groups = {g.name: g for g in find_structure(Net(), images()).groups}
    assert [(link.gate, link.index.tolist()) for link in groups["a"].gates] == [("se", each(6))]
    assert [(link.gate, link.index.tolist()) for link in groups["b"].gates] == [("se", each(4, 6))]


EXPECTED: dict[str, dict[str, tuple[int, Sides]]] = {
    "concat": {
        "a": (6, {("a", "out"): each(6), ("norm", "out"): each(6), ("c", "in"): each(6)}),
        "b": (4, {("b", "out"): each(4), ("norm", "out"): each(4, 6), ("c", "in"): each(4, 6)}),
    },
    "halves": {
        "a": (8, {("a", "out"): [[u, u + 4] for u in range(4)], ("b", "in"): each(4)}),
    },
    "split sizes": {
        "a": (3, {("a", "out"): each(3), ("middle", "split#1/1[0]"): each(3),
                  ("middle.one", "in"): each(3)}),
        "a#2": (5, {("a", "out"): each(5, 3), ("middle", "split#1/1[1]"): each(5),
                    ("middle.two", "in"): each(5)}),
    },
    "slice held": {
        "a": (3, {("a", "out"): each(3), ("middle", "__getitem__#1/2[3]"): each(3),
                  ("middle", "__getitem__#2/2[2]"): each(3), ("middle.conv", "in"): each(3)}),
        "a#2": (5, {("a", "out"): each(5, 3), ("b", "in"): each(5, 3)}),
        "middle.conv": (3, {("middle.conv", "out"): each(3), ("b", "in"): each(3)}),
    },
    "shuffle": {  # channel 4g + u goes to 2u + g; both groups lose the same u
        "a": (8, {("a", "out"): [[u, u + 4] for u in range(4)],
                  ("b", "in"): [[2 * u, 2 * u + 1] for u in range(4)]}),
    },
    "whole conv groups": {  # 4 conv groups of 2: a unit is a conv group
        "a": (8, same(
            [("a", "out"), ("middle", "in"), ("middle", "out"), ("b", "in")],
            [[2 * u, 2 * u + 1] for u in range(4)])),
    },
    "within conv groups": {  # 2 conv groups of 4: the same channel of each
        "a": (8, same([("a", "out"), ("middle", "in")], [[u, u + 4] for u in range(4)])),
        "middle": (12, same([("middle", "out"), ("b", "in")],
                                     [[u, u + 6] for u in range(6)])),
    },
    "shuffled conv groups": {  # channel 5g + u goes to 2u + g, of which 0..4 are one conv group
        "middle.one": (8, {("middle.one", "out"): [[0, 3, 5, 8], [1, 4, 6, 9]],
                           ("middle.two", "in"): [[0, 1, 6, 7], [2, 3, 8, 9]]}),
    },
    "depthwise": {
        "a": (8, same([("a", "out"), ("middle", "out"), ("b", "in")], each(8))),
    },
    "multiplier": {
        "a": (8, {("a", "out"): each(8), ("middle", "out"): [[2 * u, 2 * u + 1] for u in range(8)],
                  ("b", "in"): [[2 * u, 2 * u + 1] for u in range(8)]}),
    },
    "twice": {
        "a": (8, same([("a", "out"), ("middle.conv", "in"), ("middle.conv", "out"),
                                ("b", "in")], each(8))),
    },
    "tied": {
        "a": (8, same([("a", "out"), ("middle.one", "in"), ("middle.one", "out"),
                                ("middle.two", "in"), ("middle.two", "out"), ("b", "in")],
                               each(8))),
    },
    "layer scale": {
        "a": (8, same([("a", "out"), ("middle.conv", "in"), ("middle.conv", "out"),
                                ("middle.gamma", "dim0"), ("b", "in")], each(8))),
    },
    "zero padded": {  # zeros stand at 0..3 and 12..15; their number is in the code
        "a": (8, {("a", "out"): each(8), ("middle.conv", "in"): each(8),
                  ("middle.conv", "out"): each(8, 4), ("b", "in"): each(8, 4)}),
    },
    "flatten": {
        "conv": (6, {("conv", "out"): each(6),
                     ("fc", "in"): [list(range(16 * u, 16 * u + 16)) for u in range(6)]}),
        "fc": (8, same([("fc", "out"), ("head", "in")], each(8))),
    },
    "bare": {
        "a": (8, same([("a", "out"), ("middle.kernel", "dim1")], each(8))),
        "middle.kernel": (6, same([("middle.kernel", "dim0"), ("middle.matrix", "dim1")],
                                           each(6))),
        "middle.matrix": (8, same([("middle.matrix", "dim0"), ("b", "in")], each(8))),
    },
    "prelu": {
        "a": (8, same([("a", "out"), ("middle.weight", "dim0"), ("b", "in")], each(8))),
    },
    "group norm": {  # 2 norm groups of 4
        "a": (8, same([("a", "out"), ("middle", "out"), ("b", "in")],
                               [[u, u + 4] for u in range(4)])),
    },
    "transposed conv groups": {  # 4 conv groups of 2
        "a": (8, same([("a", "out"), ("middle", "in"), ("middle", "out"), ("b", "in")],
                      [[2 * u, 2 * u + 1] for u in range(4)])),
    },
    "instance norm": {
        "a": (8, same([("a", "out"), ("middle", "out"), ("b", "in")], each(8))),
    },
    "transposed": {
        "a": (8, same([("a", "out"), ("middle.up", "in")], each(8))),
        "middle.up": (6, same([("middle.up", "out"), ("b", "in")], each(6))),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED)
def test_groups_worked_out_by_hand(kind):
    groups = groups_of(kind)
    for name, (channels, expected) in EXPECTED[kind].items():
        group = groups[name]
        assert sides(group) == expected, name
        assert (group.channels, group.units) == (channels, len(next(iter(expected.values()))))
        assert (group.prunable, group.reason) == (True, None), name


@pytest.mark.parametrize(
    ("kind", "group", "reason"),
    [
        ("slice fixed", "a", "it is sliced at fixed positions by slice in middle"),
        ("zero padded", "middle.conv", "it meets a tensor of fixed size in add in middle"),
        ("sorted", "a", "sort in middle: channels change their order"),
        ("unbound", "a", "channels are taken apart one by one by unbind in middle"),
        ("shuffled conv groups", "middle.one#2", "its channels go together or not at all"),
    ],
)  # fmt: skip
def test_what_cannot_be_cut_is_not_pruned_with_its_reason(kind, group, reason):
    found = groups_of(kind)[group]
    assert (found.prunable, found.reason) == (False, reason)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_outputs_of_the_model_are_not_pruned(kind):
    last = find_structure(dependent(kind), images()).groups[-1]
    assert (last.prunable, last.reason) == (False, "it is an output of the model")


def test_a_single_channel_is_nothing_to_prune():
    net = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    groups = find_structure(net, images()).groups
    assert [(g.prunable, g.reason) for g in groups] == [
        (False, "it is a single channel"), (True, None), (False, "it is an output of the model"),
    ]  # fmt: skip


# the classes of the channels of two or three conv groups, and which of them go together
PARTNERS: dict[str, tuple[list[list[int]], list[set[int]]]] = {
    "one by one": ([[1, 2], [3, 4]], [{1, 3}, {2, 4}]),
    "even already": ([[1, 2], [2, 1]], [{1}, {2}]),
    "pairs with pairs": ([[1, 1, 2], [3, 4, 4]], [{1, 4}, {2, 3}]),
    "what straddles": (  # 2 and 4 stand in two of them each
        [[1, 1, 1, 2, 2], [2, 3, 3, 3, 4], [4, 4, 5, 5, 5]], [{1, 3, 5}, {2, 4}],
    ),
    "all that is left": ([[1, 1, 2], [2, 2, 3], [3, 4, 4]], [{1, 2, 3, 4}]),
    "fixed positions": ([[1, 2, -1], [3, 4, 5]], [{1, 3}, {2, 4}, {-1, 5}]),
    "fixed in each": ([[1, -1], [-1, 2]], [{1, 2}, {-1}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PARTNERS)
def test_which_channels_of_conv_groups_go_together(kind):
    rows, expected = PARTNERS[kind]
    pairs = torch.from_numpy(partners(np.array(rows)))
    classes = joined(8, pairs + 1).numpy()
    found: dict[int, set[int]] = {}
    for name in {c for row in rows for c in row}:
        found.setdefault(classes[name + 1], set()).add(name)
    assert sorted(found.values(), key=min) == sorted(expected, key=min)


@given(st.data())
def test_conv_groups_keep_as_many_channels_whatever_is_tied(data):
    shape = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 8))
    names = st.integers(-1, 12).filter(bool)
    rows = np.array(
        [data.draw(st.lists(names, min_size=shape[1], max_size=shape[1])) for _ in range(shape[0])]
    )
    pairs = torch.from_numpy(partners(rows)) + 1
    classes = joined(14, pairs).numpy()[rows + 1]
    for name in np.unique(classes):
        assert len(set((classes == name).sum(1).tolist())) == 1


def test_a_rule_that_gives_up_takes_back_what_it_had_done(monkeypatch):
    from seprune.graph import op_rules

    def clumsy(walker, node):
        op_rules.layers.convolution(walker, node)
        raise IndexError("list index out of range\nand more")

    monkeypatch.setitem(op_rules.registry.RULES, "convolution", clumsy)
    structure = find_structure(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), images())
    assert {g.reason for g in structure.groups} == {
        "convolution in 0 is used in an unknown way (IndexError: list index out of range)",
        "convolution in 1 is used in an unknown way (IndexError: list index out of range)",
    }
    assert structure.macs_at(structure.full_widths()) == 16 * 16 * (3 * 4 + 4 * 2)


def test_a_network_of_one_input_channel_has_a_stem_to_prune():
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    first = find_structure(net, torch.rand(2, 1, 8, 8)).groups[0]
    assert sides(first) == same([("0", "out"), ("2", "in")], each(6))
    assert first.prunable


def test_norms_of_vectors_are_squeezes_too():
    class L2Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linalg.vector_norm(x, 2, (2, 3), keepdim=True).sigmoid()

    first = find_structure(Gated(L2Gate()), images()).groups[0]
    assert sides(first) == same([("conv", "out"), ("head", "in")], each(8))
    assert first.prunable


def test_layers_that_fail_are_named():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such thing")

    with pytest.raises(InputError) as caught:
        find_structure(Chain(Broken()), images())
    assert caught.value.what == "the model's forward fails in layer 'middle'"
    assert caught.value.why == "RuntimeError: no such thing"


# -- costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEPENDENT)
def test_costs_equal_those_of_the_cut_network_to_the_unit(kind):
    model, x = dependent(kind), images()
    structure = analyse(model, x)
    whole = structure.full_widths()
    assert (structure.macs_at(whole), structure.params_at(whole)) == counted(model, x)
    for seed, share in enumerate((0.3, 2 / 3, 0.9)):
        plan = random_plan(structure, seed, share)
        at = kept(plan)
        found = counted(prune(model, plan), x)
        assert (structure.macs_at(at), structure.params_at(at)) == found


def test_costs_do_not_depend_on_the_batch():
    structures = [find_structure(Residual(), images(n)) for n in (1, 2, 5)]
    costs = [(s.macs_at(s.full_widths()), s.params_at(s.full_widths())) for s in structures]
    assert costs[0] == costs[1] == costs[2]


class Selected(nn.Module):
    """Keeps the rows that are over a threshold, as detectors keep boxes; here none is."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.head, self.rows = nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        maps = self.head(self.mid(self.stem(x).relu()).relu())
        rows = maps.flatten(2).transpose(1, 2).reshape(-1, 6)
        found = rows[rows[:, 0] > 1e9].reshape(-1, 2, 3)
        return maps, found.view(-1, 3), self.rows(found.flatten(1))


def test_a_forward_whose_selection_is_empty_is_analysed():
    structure = find_structure(Selected().eval(), torch.randn(2, 3, 8, 8))
    prunable = {g.name: g.units for g in structure.groups if g.prunable}
    assert prunable == {"stem": 8, "mid": 12}


class Stateful(nn.Module):
    """Positions of a map as steps of a recurrent layer, or as what queries look at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.fc = kind, nn.Conv2d(3, 8, 3), nn.Linear(6, 4)
        self.lstm, self.gru = nn.LSTM(8, 6, batch_first=True, bidirectional=True), nn.GRUCell(8, 6)
        self.first = nn.Parameter(torch.rand(1, 6))
        self.queries, self.ahead = nn.Parameter(torch.rand(3, 6)), nn.Linear(6, 6)
        self.to_keys = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.conv(x).relu().flatten(2).transpose(1, 2)[:, :5]
        if self.kind == "LSTM":
            return self.fc(self.lstm(steps)[0][..., :6].mean(1))
        if self.kind == "GRU from a learned state":
            state = self.first.expand(len(x), -1)
            for step in steps.unbind(1):
                state = self.gru(step, state)
            return self.fc(state)
        if self.kind == "weights alone":  # once for a batch of any size
            return self.fc(self.to_keys(steps).mean(1) + self.ahead(self.queries).mean(0))
        queries = self.ahead(self.queries.unsqueeze(1).repeat(1, len(x), 1))  # layers first
        found = queries.transpose(0, 1) @ self.to_keys(steps).transpose(1, 2)
        return self.fc(found.softmax(-1) @ self.to_keys(steps)).mean(1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU from a learned state", "queries", "weights alone"])
def test_states_that_do_not_come_from_the_input_cost_what_a_sample_costs(kind):
    model = Stateful(kind).double().eval()  # floats go to one operator, which nobody counts
    macs = count(model, images().double()).macs
    convolved, last = 14 * 14 * 8 * 27, 6 * 4
    assert (
        macs
        == convolved
        + last
        + {
            "LSTM": 2 * 5 * 24 * (8 + 6),
            "GRU from a learned state": 5 * 18 * (8 + 6),
            "queries": 3 * 36 + 2 * 5 * 48 + 2 * 3 * 5 * 6 + 2 * last,
            "weights alone": 5 * 48 + 3 * 36,
        }[kind]
    )
    for batch in (1, 2, 4):
        structure = find_structure(model, images(batch).double())
        assert structure.macs_at(structure.full_widths()) == macs
