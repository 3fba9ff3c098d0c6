"""Networks whose gates do not vary, budgets out of reach, layers that cannot be cut, no end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import untouched

NETS = Path(__file__).with_name("strange_nets.py")
BUDGET = ("--set", "plan.min_channels=2", "--set", "collect.images=64")
SOON = """
from seprune.graph import trace
from seprune.pruning import analyse
for function in (analyse.analyse, trace.record):
    function.__kwdefaults__["limit_seconds"] = 0.3
"""


def pruned(terminal, name: str, out: Path, *more: object):
    return terminal(
        *("prune", f"{NETS}:{name}", "--allow-code", "--data", "digits", "--out", out),
        *(*BUDGET, *more, "--json"),
    )


def inspected(terminal, name: str) -> dict:
    ended = terminal("inspect", f"{NETS}:{name}", "--allow-code", "--input", "1x8x8", "--json")
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


# -- row 17: gates that do not vary ----------------------------------------------------------------


@pytest.mark.fault(17)
def test_a_network_without_gates_names_a_criterion_that_needs_none(terminal, tmp_path):
    ended = pruned(terminal, "plain", tmp_path / "p", "--importance", "gate_mean")
    fix = ended.refused(3, "no-gates", says="no channel gates")["next"]
    assert fix.startswith("importance.criterion=gate_logit works without gates")
    assert not (tmp_path / "p").exists()
    ended = pruned(terminal, "plain", tmp_path / "p", "--importance", "l2")
    assert ended.status == 0, ended.err


@pytest.mark.fault(17)
def test_gates_that_never_run_are_reported_and_not_counted(terminal, tmp_path):
    gates = inspected(terminal, "idle")["gates"]
    assert {g["name"]: g["runs"] for g in gates} == {"middle": True, "idle": False}
    ended = pruned(terminal, "idle", tmp_path / "p", "--importance", "gate_mean")
    assert ended.status == 0, ended.err
    assert "note: gate 'idle' never runs: it has no statistics" in ended.err


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("equal", "1 of 1 gates are the same for every image: 'middle'"),
        ("saturated", "1 of 1 gates are saturated (at least 95 % of the values"),
    ],
)
def test_gates_that_are_all_equal_are_named_and_ties_repeat(terminal, tmp_path, name, says):
    plans = []
    for number in range(2):
        out = tmp_path / str(number)
        ended = pruned(terminal, name, out, "--importance", "gate_mean", "--macs", "0.7")
        assert ended.status == 0, ended.err
        assert f"note: {says}" in ended.err
        plans.append(json.loads((out / "plan.json").read_text())["groups"])
    assert plans[0] == plans[1]
    if name == "equal":  # the first channels stay
        kept = next(g["keep"] for g in plans[0] if g["name"] == "one")
        assert kept == list(range(len(kept)))


@pytest.mark.fault(17)
def test_the_report_states_what_the_gates_lack(terminal, tmp_path):
    out = tmp_path / "run"
    ended = terminal(
        *("run", "quickstart", f"model.name={NETS}:equal", "train=null", "--allow-code"),
        *("plan.macs=0.7", "plan.min_channels=2", "importance.criterion=gate_mean"),
        *("prune.recover=none", "finetune.epochs=0", "finetune.recalibrate=0"),
        *("collect.images=64", "report.latency=false", "--out", out),
    )
    assert ended.status == 0, ended.err
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert any(w.startswith("1 of 1 gates are the same for every image") for w in warnings)
    assert "1 of 1 gates are the same for every image" in (out / "report.html").read_text()


# -- row 35: budgets -------------------------------------------------------------------------------


@pytest.mark.fault(35)
def test_a_budget_out_of_reach_names_the_least_and_what_stands_in_the_way(terminal, tmp_path):
    ended = pruned(terminal, "gated", tmp_path / "p", "--importance", "l2", "--macs", "0.001")
    error = ended.refused(3, "budget", says="cannot be met")
    assert "can go down to" in f"{error['what']} {error['why']}"
    assert "plan.floor" in error["next"] or "plan.min_channels" in error["next"]
    ended = pruned(
        terminal, "gated", tmp_path / "p", "--importance", "l2", "--set", "plan.protect=['*']"
    )
    assert "protect" in str(ended.refused(3, "budget", says="cannot be met"))
    assert not (tmp_path / "p").exists()


@pytest.mark.fault(35)
@pytest.mark.parametrize(
    ("budget", "status", "code", "says"),
    [
        ("1", 3, "budget", "budget macs=1 is met without a cut"),
        ("1.5", 3, "budget", "budget macs=1.5 is met without a cut"),
        ("-0.5", 2, "recipe", "plan.macs: must be a fraction kept, between 0 and 1"),
        ("nan", 2, "recipe", "plan.macs"),
        ("900G", 3, "budget", "budget macs=900G is met without a cut"),
    ],
)
def test_a_budget_of_the_whole_or_more(terminal, tmp_path, budget, status, code, says):
    ended = pruned(terminal, "gated", tmp_path / "p", "--importance", "l2", f"--macs={budget}")
    ended.refused(status, code, says=says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(35)
def test_a_network_in_which_nothing_can_be_cut(terminal, tmp_path):
    ended = pruned(terminal, "nothing", tmp_path / "p", "--importance", "l2")
    ended.refused(3, "budget", says="cannot be met")


# -- row 36: what cannot be cut, traced or ended ---------------------------------------------------


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("name", "group", "reason"),
    [("fixed", "two", "after"), ("unknown", "two", "after")],
)
def test_a_group_that_cannot_be_cut_is_not_pruned_with_its_reason(
    terminal, tmp_path, name, group, reason
):
    groups = {g["name"]: g for g in inspected(terminal, name)["groups"]}
    assert not groups[group]["prunable"]
    assert reason in groups[group]["reason"]
    assert groups["one"]["prunable"]
    ended = pruned(terminal, name, tmp_path / "p", "--importance", "l2", "--macs", "0.8")
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["not_pruned"][group] == groups[group]["reason"]
    assert json.loads(ended.out)["groups"][group] == [16, 16]


@pytest.mark.fault(36)
def test_a_model_that_cannot_be_traced_names_the_layer(terminal, tmp_path):
    ended = pruned(terminal, "jagged", tmp_path / "p", "--importance", "l2")
    ended.refused(3, "forward", says="the model's forward fails in layer 'middle'")


@pytest.mark.fault(36)
@pytest.mark.parametrize("name", ["works", "sleeps", "turns"])
def test_a_forward_without_end_is_ended_and_names_the_layer(terminal, tmp_path, name):
    with untouched(NETS.parent):
        words = ("inspect", f"{NETS}:{name}", "--allow-code", "--input", "1x8x8", "--json")
        ended = terminal(*words, before=SOON)
    ended.refused(3, "trace-timeout", says="it was in layer 'after'")


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", "RuntimeError: the dog ate it"),
        ("number", "returned int, not a network"),
        ("absent", "no function absent"),
    ],
)
def test_code_that_gives_no_network_names_the_place(terminal, name, says):
    ended = terminal("inspect", f"{NETS}:{name}", "--allow-code", "--json")
    ended.refused(3, "input", says=says)


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("name", "says"), [("leaves", "sys.exit(7)"), ("leaves_later", "sys.exit(done)")]
)
def test_code_that_ends_the_process_ends_it_with_a_message(terminal, name, says):
    """Its own status would say that another thing went wrong, or that nothing did."""
    ended = terminal("inspect", f"{NETS}:{name}", "--allow-code", "--input", "1x8x8", "--json")
    ended.refused(3, "input", says=says)


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("name", "status", "code", "says"),
    [
        ("interrupting", 130, "stopped", "stopped by KeyboardInterrupt; every finished stage"),
        ("ending", 3, "input", "raise Ending(enough)"),
    ],
)
def test_code_that_ends_early_is_named_with_its_line(terminal, name, status, code, says):
    """Neither silence nor a traceback, whatever it raises, and whenever."""
    ended = terminal("inspect", f"{NETS}:{name}", "--allow-code", "--input", "1x8x8", "--json")
    error = ended.refused(status, code, says=says)
    assert f"{NETS}:" in f"{error['what']} {error['why']}"


@pytest.mark.fault(36)
def test_code_that_prints_and_closes_stdout_leaves_the_results_alone(terminal):
    words = ("--allow-code", "--input", "1x8x8", "--json")
    ended = terminal("inspect", f"{NETS}:closing", *words)
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["gates"]
    assert "not for the results" in ended.err
