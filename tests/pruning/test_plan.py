"""A plan is plain data: JSON there and back, edited by hand, replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cutting import random_plan
from nets import DEPENDENT, Residual, dependent, images

from seprune.errors import InputError
from seprune.graph.groups import find_structure
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan, plan_of, with_facts
from seprune.pruning.prune import prune


@pytest.fixture
def plan() -> PruningPlan:
    structure = find_structure(Residual(), images())
    keep = {"stem": [0, 2, 4, 6, 7], "blocks.0.conv1": [1, 3]}
    return plan_of(structure.groups, keep, {"criterion": "l2", "macs": [10, 5]})


def edited(plan: PruningPlan, path: Path, group: str, **changes: Any) -> Path:
    """The plan's file with entries of one group changed, still one group a line."""
    lines = plan.dumps().splitlines()
    for number, line in enumerate(lines):
        if f'"name": "{group}"' in line:
            comma = "," if line.rstrip().endswith(",") else ""
            entry = json.loads(line.strip().rstrip(","))
            entry.update(changes)
            lines[number] = "  " + json.dumps(entry) + comma
    path.write_text("\n".join(lines))
    return path


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_plan_comes_back_from_its_file_bit_for_bit(kind, tmp_path):
    before = with_facts(random_plan(analyse(dependent(kind), images())), note="Grüße", macs=[3, 2])
    before = before.annotated({"a": "weil"}, [{"ratio": 0.1, "macs": 3}])
    before.save(tmp_path / "p.json")
    after = PruningPlan.load(tmp_path / "p.json")
    assert after.dumps() == before.dumps()
    assert (after.facts, after.history) == (before.facts, before.history)
    for a, b in zip(after.groups, before.groups, strict=True):
        assert (a.name, a.channels, a.units, a.keep, a.reason) == (
            b.name, b.channels, b.units, b.keep, b.reason,
        )  # fmt: skip
        for m, n in zip(a.members, b.members, strict=True):
            assert (m.layer, m.side, m.total) == (n.layer, n.side, n.total)
            assert np.array_equal(m.index, n.index)


def test_replay_on_a_fresh_model_gives_the_same_weights(plan, tmp_path):
    torch.manual_seed(3)
    model = Residual()
    twin = Residual()
    twin.load_state_dict(model.state_dict())
    plan.save(tmp_path / "p.json")
    one, two = prune(model, plan), prune(twin, PruningPlan.load(tmp_path / "p.json"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.stem.out_channels == 5


def test_a_file_can_be_read_and_edited_line_by_line(plan, tmp_path):
    lines = plan.dumps().splitlines()
    assert lines[0] == '{"format": 1,'
    stem = json.loads(next(ln for ln in lines if '"name": "stem"' in ln).rstrip(","))
    assert {k: stem[k] for k in ("name", "channels", "units", "reason", "keep")} == {
        "name": "stem", "channels": 8, "units": 8, "reason": None, "keep": [0, 2, 4, 6, 7],
    }  # fmt: skip
    assert stem["members"][0] == {"layer": "stem", "side": "out", "total": 8, "at": 0}
    changed = PruningPlan.load(edited(plan, tmp_path / "p.json", "stem", keep=[1, 5]))
    assert changed.widths()["stem"] == [8, 2]
    assert prune(Residual(), changed, images()).stem.out_channels == 2


def test_layers_list_the_positions_that_stay():
    structure = find_structure(dependent("concat"), images())
    plan = plan_of(structure.groups, {"a": [0, 5], "b": [1, 2, 3]}, {})
    assert {k: {s: i.tolist() for s, i in v.items()} for k, v in plan.layers().items()} == {
        "a": {"out": [0, 5]},
        "b": {"out": [1, 2, 3]},
        "norm": {"out": [0, 5, 7, 8, 9]},
        "c": {"in": [0, 5, 7, 8, 9]},
    }
    assert plan.widths() == {"a": [6, 2], "b": [4, 3], "c": [5, 5], "head.fc": [3, 3]}


# -- what cannot be --------------------------------------------------------------------------------

WIDE = [{"layer": "stem", "side": "out", "total": 8, "index": [[9]] * 8}]
SAME = [{"layer": "stem", "side": "out", "total": 8, "index": [[1]] * 8}]
HUGE = [{"layer": "stem", "side": "out", "total": 10**12, "at": 0}]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"keep": [0, 8]}, "unit 8 is not one of 0..7"),
        ({"keep": [-1, 3]}, "unit -1 is not one of 0..7"),
        ({"keep": [0.5]}, "keep[0]: expected int, got float"),
        ({"keep": [True]}, "keep[0]: expected int, got bool"),
        ({"keep": ["1"]}, "keep[0]: expected int, got str"),
        ({"keep": []}, "no unit is kept"),
        ({"keep": [1, 1]}, "units are repeated or not in ascending order"),
        ({"keep": [3, 1]}, "units are repeated or not in ascending order"),
        ({"keep": None}, "keep: expected array, got null"),
        ({"units": 9}, "9 units do not fit into 8"),
        ({"members": [], "units": 2**62, "channels": 2**62}, "are no part of any layer"),
        ({"units": 0}, "0 units do not fit into 8"),
        ({"channels": 9}, "9 channels are not 8 equal units"),
        ({"members": WIDE}, "stem has positions 0..7 only"),
        ({"members": SAME}, "positions of stem are repeated"),
        ({"members": [{**HUGE[0]}], "units": 10**12}, f"{10**12} units do not fit into {10**12}"),
        ({"members": [{**WIDE[0], "index": [[10**18]] * 8}]}, "stem has positions 0..7 only"),
        ({"members": [{**SAME[0], "side": "__class__"}]}, "'__class__' is no side of a layer"),
        ({"members": [{**SAME[0], "side": ".__class__"}]}, "'.__class__' is no side of a layer"),
        ({"members": [{"layer": "stem", "side": "out"}]}, "missing required field total"),
        ({"members": [{"layer": "stem", "side": "out", "total": 8, "at": 3}]},
         "stem has positions 0..7 only"),
    ],
)  # fmt: skip
def test_an_impossible_group_is_refused_with_its_line(plan, tmp_path, changes, why):
    path = edited(plan, tmp_path / "plan.json", "stem", **changes)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if '"stem"' in text)
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        PruningPlan.load(path)
    assert caught.value.what == f"{path}:{line}: group 'stem' of the plan is impossible"
    assert why in caught.value.why
    assert caught.value.fix == "correct that line, or make the plan again"
    assert (caught.value.code, caught.value.exit_status) == ("plan", 3)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"format": 1}', '{"format": 1, "groups": 3}', "3"]
)
def test_other_json_is_no_plan(tmp_path, content):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(InputError) as caught:
        PruningPlan.load(tmp_path / "p.json")
    assert caught.value.what == f"{tmp_path / 'p.json'}: not a pruning plan"
    assert caught.value.fix == "make one with: seprune prune MODEL --dry-run --out DIR"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ('"facts": "x"', "facts: expected object, got str"),
        ('"history": {"a": 1}', "history: expected array, got object"),
        ('"facts": {"macs": 3}', "facts: macs: expected array, got int"),
    ],
)
def test_facts_and_trace_of_another_kind_are_refused(tmp_path, extra, says):
    (tmp_path / "p.json").write_text(f'{{"format": 1, "groups": [], {extra}}}')
    with pytest.raises(InputError, match=says):
        PruningPlan.load(tmp_path / "p.json")


@pytest.mark.parametrize("group", ["null", "3", "[]", '{"name": "x"}'])
def test_a_group_of_another_kind_is_refused(tmp_path, group):
    (tmp_path / "p.json").write_text(f'{{"format": 1, "groups": [{group}]}}')
    with pytest.raises(InputError, match="of the plan is impossible"):
        PruningPlan.load(tmp_path / "p.json")


def test_a_plan_of_a_newer_format_asks_for_an_upgrade(plan, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(plan.dumps().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError) as caught:
        PruningPlan.load(path)
    assert str(caught.value) == (
        f"{path}: a plan of format 2\n"
        "why: this seprune reads format 1\n"
        "next: upgrade seprune: pip install -U seprune"
    )
    assert caught.value.code == "newer"


def test_a_missing_or_damaged_file_is_named(plan, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        PruningPlan.load(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text(plan.dumps()[:200])
    with pytest.raises(InputError, match=r"cut\.json: not valid JSON"):
        PruningPlan.load(tmp_path / "cut.json")


def test_a_plan_of_more_groups_than_any_network_has_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": 1, "groups": [0] * 20_001}))
    with pytest.raises(InputError, match=r"length <= 20000") as caught:
        PruningPlan.load(path)
    assert caught.value.code == "plan"


def test_a_plan_that_claims_more_than_any_network_has_is_refused_by_arithmetic(tmp_path):
    """60 kB of JSON that would become 8 GB of positions."""
    member = {"layer": "conv1", "side": "out", "total": 10**6, "at": 0}
    group = {"name": "g", "channels": 10**6, "units": 10**6, "reason": None, "keep": [0]}
    group["members"] = [member] * 1000
    content = {"format": 1, "facts": {}, "history": [], "groups": [group]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"the plan claims 1,000,000,000 channel positions\nwhy: no"
    ):
        PruningPlan.load(tmp_path / "plan.json")
