"""Recipes and folders from hostile hands, given to the real command line; nothing in them runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus import NET, edited
from folders import untouched
from safetensors.torch import load_file, save_file

from seprune.runtime.files import write_sums

GOOD = f"name: a\ndevice: cpu\nmodel:\n  name: {NET}\ndata:\n  source: digits\n"
ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64)
)
EVERYTHING = """\
name: x
seed: "1"
model:
  name: seprune/se_resnet8
  nmae: 3
data:
  source: digits
  batch_size: -1
  batch_size: 2
plan:
  macs: 2
"""
CODE = "names code to run"

# (row, content, every message that must be there)
RECIPES: dict[str, tuple[int, str | bytes, list[str]]] = {
    "tab": (18, "name: a\nmodel:\n\tname: b\n", [":3:1 a tab where YAML wants spaces"]),
    "typo, type, range, twice": (
        18,
        EVERYTHING,
        [
            ':2:1 seed: must be a whole number (got "1")',
            ":5:3 model.nmae: unknown key; did you mean model.name?",
            ":8:3 data.batch_size: must be greater than or equal to 1 (got -1)",
            ":9:3 data.batch_size: given twice",
            ":11:3 plan.macs: must be a fraction kept, between 0 and 1",
        ],
    ),
    "two documents": (18, "name: a\n---\nname: b\n", [":2:1 a second document starts here"]),
    "empty": (18, "", [":1:1 is empty"]),
    "not a mapping": (18, "- a\n- b\n", [":1:1 must be a mapping of keys"]),
    "UTF-16": (18, "name: a".encode("utf-16"), [":1:1 is not UTF-8 text"]),
    "alias bomb": (19, ALIASES, [":1:5 anchors and aliases (& and *) are not allowed"]),
    "python tag": (
        19,
        "a: !!python/object/apply:os.system ['touch {canary}']\n",
        [":1:4 tags are not allowed (got tag:yaml.org,2002:python/object/apply:os.system)"],
    ),
    "50 MB": (19, "# " + "x" * 50_000_000, [":1:1 is larger than 16 KB"]),
    "brackets": (19, "a: " + "[" * 16_000, ["nested more than 12 levels deep"]),
    "code in model.name": (20, GOOD.replace(NET, "{evil}:make"), [f":4:3 model.name: {CODE}"]),
    "code in an argument": (
        20,
        GOOD.replace(f"name: {NET}", f"name: {NET}\n  args: {{{{make: '{{evil}}:make'}}}}"),
        [f"model.args.make: {CODE}"],
    ),
    "code by a reserved argument": (
        20,
        GOOD.replace(f"name: {NET}", f"name: {NET}\n  args: {{{{allow_code: true}}}}"),
        ["args must not hold allow_code"],
    ),
    "a pickle in an argument": (
        20,
        GOOD.replace(f"name: {NET}", "name: timm/resnet18\n  args: {{checkpoint_path: x.pth}}"),
        ["args must not hold checkpoint_path"],
    ),
}


@pytest.fixture
def evil(tmp_path, canary) -> Path:
    """A Python file that leaves a trace when it is run."""
    path = tmp_path / "evil.py"
    path.write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "def make(**_):\n    from seprune.models import build\n"
        f"    return build({NET!r}, input=(1, 8, 8), classes=10)\n"
    )
    return path


def spelled(content: str, evil: Path, canary: Path) -> str:
    return content.format(evil=evil, canary=canary) if "{" in content else content


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.fault(RECIPES[n][0]), id=n) for n in RECIPES]
)
def test_refused_with_all_that_is_wrong_within_a_second(terminal, tmp_path, evil, canary, name):
    _, content, says = RECIPES[name]
    path = tmp_path / "reçipe 1.yaml"
    raw = content if isinstance(content, bytes) else spelled(content, evil, canary).encode()
    path.write_bytes(raw)
    for words in (["run", path, "--out", tmp_path / "run"], ["recipes", "validate", path]):
        with untouched(tmp_path):  # and nothing is written
            ended = terminal(*words, "--json", seconds=1, memory=256)
        error = ended.refused(2, "recipe")
        for message in says:
            assert f"{path}{message}" in error["what"] or message in error["what"]
        assert error["what"].count("\n") == len(says) - 1
    assert not canary.exists()


@pytest.mark.fault(18)
def test_a_byte_order_mark_changes_nothing(terminal, tmp_path):
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / f"{name}.yaml").write_bytes(mark + GOOD.encode())
    plain, marked = (
        terminal("recipes", "validate", tmp_path / f"{n}.yaml", "--json")
        for n in ("plain", "marked")
    )
    assert (plain.status, marked.status) == (0, 0)
    assert plain.out == marked.out


@pytest.mark.fault(20)
def test_code_runs_by_the_flag_on_the_command_line_only(terminal, tmp_path, evil, canary):
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    words = ["run", path, f"model.name={evil}:make", "--out", tmp_path / "run", "--json"]
    terminal(*words).refused(2, "recipe", says=CODE)
    assert not canary.exists()
    path.write_text(GOOD.replace(NET, f"{evil}:make"))
    ended = terminal("run", path, "--allow-code", "--out", tmp_path / "run", "--json")
    ended.refused(2, "recipe", says="say model.name=FILE.py:FUNCTION and --allow-code")
    assert not canary.exists()
    terminal("inspect", f"{evil}:make", "--json").refused(2, "usage", says="--allow-code")
    assert not canary.exists()
    ended = terminal("inspect", f"{evil}:make", "--input", "1x8x8", "--allow-code", "--json")
    assert ended.status == 0, ended.err
    assert canary.exists()
    canary.unlink()


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("plan.mcas=0.5", "plan.mcas: unknown key; did you mean plan.macs?"),
        ("colect.images=3", "colect: unknown key; did you mean collect?"),
        ("plan.macs=1.5", "must be a fraction kept, between 0 and 1"),
        ("plan.macs", "must be key=value, such as plan.macs=0.5"),
        ("seed=[", "not a YAML value"),
        ("device=tpu", 'device: must match pattern'),
    ],
)  # fmt: skip
def test_overrides_are_answered_with_close_keys(terminal, tmp_path, override, says):
    run = terminal("run", "quickstart", override, "--out", tmp_path / "run", "--json", seconds=2)
    assert run.refused(2, "recipe", says=says)["what"].startswith("command line ")
    stage = terminal("prune", NET, "--out", tmp_path / "p", "--set", override, "--json", seconds=2)
    assert stage.refused(2, "recipe", says=says)["what"].startswith("command line ")
    assert list(tmp_path.iterdir()) == []


# -- folders that say they were written by seprune -------------------------------------------------


@pytest.mark.fault(20)
@pytest.mark.parametrize("door", ["evaluate", "inspect", "checkpoint", "export", "run"])
def test_a_folder_that_names_code_runs_nothing(terminal, tmp_path, pruned, evil, canary, door):
    folder = edited(pruned, tmp_path / "given", model=f"{evil}:make")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(GOOD.replace(f"name: {NET}", f"name: {NET}\n  checkpoint: {folder}"))
    words = {
        "evaluate": ["evaluate", folder, "--data", "digits"],
        "inspect": ["inspect", folder],
        "checkpoint": ["evaluate", NET, "--checkpoint", folder, "--data", "digits"],
        "export": ["export", folder, "--pt2", tmp_path / "x.pt2"],
        "run": ["run", recipe, "--out", tmp_path / "run"],
    }[door]
    with untouched(folder):
        ended = terminal(*words, "--json")
    if door in ("checkpoint", "run"):  # another network than the one that is asked for
        ended.refused(3, "checkpoint-mismatch", says=f"the folder holds {evil}:make")
    else:
        ended.refused(2, "usage", says="add --allow-code to the command")
    assert not canary.exists()


ENTRIES = {
    "a number as the model": ({"model": 3}, "damaged", 3),
    "no such model": ({"model": "seprune/se_resnet9"}, "usage", 2),
    "words as classes": ({"classes": "ten"}, "damaged", 3),
    "too many classes": ({"classes": 10**12}, "damaged", 3),
    "no size": ({"input": [3, 0, "x"]}, "damaged", 3),
    "a giant size": ({"input": [1, 10**9, 10**9]}, "damaged", 3),
    "plans without end": ({"plans": 10**9}, "damaged", 3),
    "less than no plan": ({"plans": -1}, "damaged", 3),
    "a plan that is not there": ({"plans": 2}, "damaged", 3),
    "a list as arguments": ({"args": [1]}, "damaged", 3),
    "the flag as an argument": ({"args": {"allow_code": True}}, "damaged", 3),
    "a pickle": ({"model": "timm/resnet18", "args": {"checkpoint_path": "x.pth"}}, "usage", 2),
    "a pickle one zoo further": (
        {
            "model": "transformers/timm_wrapper",
            "classes": None,
            "input": None,
            "args": {"architecture": "resnet10t", "model_args": {"checkpoint_path": "x.pth"}},
        },
        "usage",
        2,
    ),
    "a repository of a Hub": (
        {"model": "transformers/timm_wrapper", "args": {"architecture": "hf-hub:a/b"}},
        "usage",
        2,
    ),
    "an encoder of a Hub": (
        {"model": "smp/unet", "args": {"encoder_name": "tu-hf-hub:a/b"}},
        "usage",
        2,
    ),
    "a kernel of a Hub": (
        {"model": "transformers/vit", "args": {"_attn_implementation": "a/kernel"}},
        "usage",
        2,
    ),
    "a kernel of a Hub by a usual name": (
        {
            "model": "transformers/vit",
            "args": {"_attn_implementation": {"": "flash_attention_2"}},
        },
        "usage",
        2,
    ),
    "an unknown argument": ({"args": {"reduktion": 3}}, "usage", 2),
    "a wrong argument": ({"args": {"reduction": "x"}}, "usage", 2),
    "another network": ({"model": "seprune/se_resnet20"}, "mismatch", 3),
    "a newer format": ({"format": 7}, "newer", 3),
    "a format of another kind": ({"format": "seven"}, "newer", 3),
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", ENTRIES)
def test_a_config_from_hostile_hands(terminal, tmp_path, pruned, name):
    entries, code, status = ENTRIES[name]
    folder = edited(pruned, tmp_path / "given", **entries)
    with untouched(folder):
        ended = terminal("evaluate", folder, "--data", "digits", "--json", memory=256, seconds=5)
    ended.refused(status, code)


@pytest.mark.fault(20)
def test_plans_and_weights_from_hostile_hands(terminal, tmp_path, pruned):
    for number, content in enumerate(("[" * 100_000, "{}", '{"format": 1, "groups": [{}]}')):
        folder = edited(pruned, tmp_path / f"plan {number}")
        (folder / "plan.json").write_text(content)
        write_sums(folder)
        code = "input" if number == 0 else "plan"
        terminal("inspect", folder, "--json").refused(3, code, says="plan.json")
    folder = edited(pruned, tmp_path / "brackets")
    (folder / "config.json").write_text("[" * 100_000)
    terminal("inspect", folder, "--json").refused(3, "not-ours")


@pytest.mark.fault(16)
def test_a_folder_whose_weights_are_not_finite(terminal, tmp_path, pruned):
    folder = edited(pruned, tmp_path / "given")
    state = load_file(folder / "model.safetensors")
    state["fc.weight"][0, 0] = float("nan")
    save_file(state, folder / "model.safetensors")
    write_sums(folder)
    ended = terminal("evaluate", folder, "--data", "digits", "--json")
    ended.refused(3, "checkpoint-values", says="tensors: fc.weight (1 of ")
