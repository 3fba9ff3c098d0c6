"""The public API on the user's own module and loader, as the README shows it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from nets import Inner, Residual, images
from torch.utils.data import DataLoader, TensorDataset

import seprune


def _loader(count: int = 24) -> DataLoader[tuple[torch.Tensor, ...]]:
    labels = torch.arange(count) % 3
    return DataLoader(TensorDataset(images(count), labels), batch_size=8)


@pytest.mark.parametrize("net", [Residual, Inner])
def test_the_ten_lines_of_the_readme_work_and_leave_the_model_alone(net, tmp_path):
    torch.manual_seed(0)
    model, loader = net(), _loader()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    gates = seprune.find_gates(model, images())
    structure = seprune.analyse(model, images())
    statistics = seprune.collect_statistics(model, loader, structure=structure)
    importance = seprune.score(structure, statistics)
    plan = seprune.make_plan(
        structure, importance, macs=0.6, allocation=seprune.Allocation(min_channels=2)
    )
    small = seprune.prune(model, plan)
    settings = seprune.FineTuneSettings(epochs=1, recalibrate=0, device="cpu")
    tuned = seprune.finetune(small, loader, settings).model
    score = seprune.evaluate(tuned, loader, device="cpu")

    assert [g.name for g in gates] == [g.name for g in structure.gates] != []
    assert score.count == 24
    assert sum(p.numel() for p in small.parameters()) == plan.facts["params"][1]
    assert plan.facts["macs"][1] <= 0.6 * plan.facts["macs"][0]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training


def test_a_pruned_network_is_saved_and_loaded_without_pickle(tmp_path):
    model = seprune.build("seprune/se_resnet8").eval()
    structure = seprune.analyse(model, torch.rand(2, 1, 8, 8))
    importance = seprune.score(structure, model=model, scoring=seprune.Scoring("l2"))
    small = seprune.prune(model, seprune.make_plan(structure, importance, macs=0.5)).eval()
    seprune.save(small, tmp_path / "small")
    back = seprune.load(tmp_path / "small")
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(back(x), small(x))


STUB = Path(seprune.__file__).with_suffix(".pyi")
TYPING = Path(__file__).parent / "typing"


def test_the_stub_the_names_and_the_modules_agree():
    tree = ast.parse(STUB.read_text())
    homes = {
        alias.name: f"seprune.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (listed,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    assert sorted(listed) == sorted([*homes, "__version__"]) == sorted(seprune.__all__)
    assert set(seprune.__all__) <= set(dir(seprune))
    for name, home in homes.items():
        value = getattr(seprune, name)
        assert value is getattr(importlib.import_module(home), name)
        if callable(value):
            assert value.__module__ == home, f"{name} is defined in {value.__module__}"


def test_every_error_class_is_public():
    from seprune import errors

    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and not n.startswith("_")}
    assert kinds <= set(seprune.__all__)


INNER = {"Tap", "StageCache"}  # what nobody makes or reads by hand


def _ours(hint: object) -> set[type]:
    """The classes of seprune in a type hint."""
    own = {hint} if isinstance(hint, type) and hint.__module__.startswith("seprune.") else set()
    return own.union(*(_ours(part) for part in typing.get_args(hint)))


def test_classes_in_public_signatures_and_results_are_public():
    public = {name: getattr(seprune, name) for name in seprune.__all__}
    missing = set()
    for value in (v for v in public.values() if callable(v) and v is not seprune.count):
        for kind in set().union(*map(_ours, typing.get_type_hints(value).values())):
            # sections of a recipe are reached through the recipe
            if kind.__module__ != "seprune.recipe.sections" and kind.__name__ not in INNER:
                missing |= {kind.__name__} - set(public)
    assert not missing


@pytest.mark.slow
def test_the_type_checker_accepts_the_right_calls_and_refuses_the_wrong_ones():
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(TYPING)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=STUB.parents[1])
    found = {tuple(line.split(":")[:2]) for line in done.stdout.splitlines() if ": error:" in line}
    lines = (TYPING / "wrong_calls.py").read_text().splitlines()
    wrong = {str(n) for n, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert {Path(file).name for file, _ in found} == {"wrong_calls.py"}, done.stdout
    assert {line for _, line in found} == wrong, done.stdout


def test_one_call_compresses_and_measures():
    torch.manual_seed(0)
    model, loader = Inner(), _loader()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    done = seprune.compress(model, loader, test_loader=loader, device="cpu", macs=0.6)
    structure = seprune.analyse(model, images())
    kept = {g.name: len(g.keep) for g in done.plan.groups}
    assert done.before.macs == structure.costs()["macs"]
    assert done.after.macs == structure.macs_at(kept) <= 0.6 * done.before.macs
    assert done.after.params == sum(p.numel() for p in done.model.parameters())
    assert done.scores["baseline"] == seprune.evaluate(model, loader, device="cpu")
    assert done.scores["pruned"] == seprune.evaluate(done.model, loader, device="cpu")
    assert all(after <= before for before, after in done.refitted.errors.values())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert repr(done).splitlines()[2].split() == [
        "MACs", f"{done.before.macs:,}", f"{done.after.macs:,}",
    ]  # fmt: skip


def test_compress_names_a_loader_that_cannot_be_used_twice_or_has_no_images():
    with pytest.raises(seprune.InputError, match="iterated only once"):
        seprune.compress(Inner(), iter(_loader()), macs=0.6)
    with pytest.raises(seprune.InputError, match="a batch of the loader is tuple, not images"):
        seprune.compress(Inner(), [("a.png", 3)], macs=0.6)
    with pytest.raises(seprune.UsageError, match="recover='magic' is unknown"):
        seprune.compress(Inner(), _loader(), recover="magic", macs=0.6)
    with pytest.raises(seprune.UsageError, match="no budget is given"):
        seprune.compress(Inner(), _loader())


def test_importing_seprune_imports_no_torch():
    code = "import seprune, sys; print('torch' in sys.modules, len(dir(seprune)) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="frobnicate"):
        seprune.frobnicate  # noqa: B018
