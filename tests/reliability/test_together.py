"""Two commands at once on one folder: each result is whole, and nobody reads half of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folders import contents, leftovers
from harness import Subject, reported, stopped
from warm import Done, Warm

import seprune
from seprune.runtime.checksums import check_sums

CUT = ("--importance", "l2", "--recover", "none", "--no-measure", "--set", "plan.min_channels=2")


def at_once(warm: Warm, home: Path, *commands: tuple[object, ...]) -> list[Done]:
    """Commands that begin together, each to its end."""
    gate = home / "gate"
    pids = [warm.start(home / f"log{n}", *c, gate=str(gate)) for n, c in enumerate(commands)]
    gate.touch()
    ended = [warm.wait(pid) for pid in pids]
    gate.unlink()
    assert all(ended), "a hang"
    return [done for done in ended if done is not None]


def network(folder: Path) -> dict[str, bytes]:
    """What a saved network is made of; the report beside it is of a time and a machine."""
    kept = contents(folder)
    return {n: kept[n] for n in ("config.json", "model.safetensors", "plan.json", "SHA256SUMS")}


@pytest.mark.timeout(1800)
@pytest.mark.fault(30)
@pytest.mark.parametrize("rounds", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_two_prunes_into_one_folder(warm, tiny_run, tmp_path, rounds):
    model = tiny_run.home / "whole" / "trained"
    whole = []
    for macs in ("0.4", "0.7"):
        out = tmp_path / macs
        words = ("prune", model, *CUT, "--macs", macs, "--out", out)
        assert warm.run(tmp_path / "log", *words).status == 0
        whole.append(network(out))
    out = tmp_path / "both"
    for _ in range(rounds):
        commands = [("prune", model, *CUT, "--macs", macs, "--out", out) for macs in ("0.4", "0.7")]
        for done in at_once(warm, tmp_path, *commands):
            if done.status:
                reported(done, 6)
        assert network(out) in whole
        assert check_sums(out) == []
        assert leftovers(out) == []


WRITE = """
import sys, seprune
given, out, rounds = sys.argv[1:]
made = [seprune.load(f"{given}/{n}") for n in (0, 1)]
for number in range(int(rounds)):
    which = number % 2
    seprune.save(made[which], out, about={"metrics": {"which": which}})
sys.exit(0)
"""
READ = """
import sys, seprune, torch
from pathlib import Path
from seprune.pipeline.network import open_network
from seprune.recipe.sections import ModelSection
given, out, rounds = sys.argv[1:]
wanted = [seprune.load(f"{given}/{n}").state_dict() for n in (0, 1)]
for number in range(int(rounds)):
    found = open_network(ModelSection(name=out))
    which = int(found.published["which"])
    state = found.model.state_dict()
    assert state.keys() == wanted[which].keys()
    assert all(torch.equal(value, wanted[which][name]) for name, value in state.items()), number
    assert seprune.load(out) is not None
sys.exit(0)
"""


@pytest.mark.timeout(1800)
@pytest.mark.fault(28)
@pytest.mark.parametrize("rounds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_network_that_is_saved_over_while_others_read_it(warm, tiny_run, tmp_path, rounds):
    """The same widths and other weights, so that only values show which one was read."""
    model = seprune.load(tiny_run.home / "whole" / "pruned")
    for number in (0, 1):
        for parameter in model.parameters():
            parameter.data += number * 0.5
        seprune.save(model, tmp_path / "given" / str(number), about={"metrics": {"which": number}})
    seprune.save(model, tmp_path / "out", about={"metrics": {"which": 1}})
    words = (tmp_path / "given", tmp_path / "out", rounds)
    pids = [warm.start(tmp_path / f"log{n}", *words, before=code) for n, code in
            enumerate((WRITE, READ, READ, WRITE))]  # fmt: skip
    for pid in pids:
        done = warm.wait(pid)
        assert done is not None
        assert done.status == 0, done.output
    assert check_sums(tmp_path / "out") == []
    assert leftovers(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(30)
def test_reports_of_what_is_being_tuned(warm, tiny_run: Subject, tmp_path):
    """A fine-tuning goes on while others look at its folder and export what is in it."""
    whole, out, log = tiny_run.home / "whole", tmp_path / "tuned", tmp_path / "log"
    cut = ("--importance", "l2", "--recover", "none", "--set", "plan.min_channels=2")
    words = (
        "prune",
        whole / "trained",
        "--data",
        tiny_run.inputs,
        *cut,
        "--macs",
        0.5,
        "--out",
        out,
    )
    assert warm.run(log, *words).status == 0
    tuning = (
        "finetune",
        whole / "pruned",
        "--data",
        tiny_run.inputs,
        "--epochs",
        500,
        "--out",
        out,
    )
    pid = warm.start(tmp_path / "tuning", *tuning)
    while not (out / "state").exists():
        assert warm.wait(pid, 0.01) is None
    for words in (
        ("report", out), ("report", out, "--json"), ("verify", out),
        ("compare", out, whole),
        ("evaluate", out, "--data", tiny_run.inputs), ("inspect", out),
        ("export", out, "--onnx", out / "small.onnx"),
    ):  # fmt: skip
        done = warm.run(log, *words)
        assert done.status == 0, (words, done.output)
    reported(warm.run(log, *tuning), 6)
    stopped(warm.kill(pid, 0, 15), 15)
    assert json.loads((out / "config.json").read_text())["seprune"]["plans"] == 1
    assert check_sums(out) == []
    assert warm.run(log, "verify", out).status == 0
