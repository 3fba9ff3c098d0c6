"""Recipes: what is read, what is refused, and in which words."""
# ruff: noqa: E501 (tables of whole messages)

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seprune.errors import UsageError
from seprune.recipe import Recipe, dump_recipe, load_recipe, recipe_folder, recipe_schema
from seprune.recipe.budget import Budget
from seprune.recipe.load import known_keys, recipe_of

ROOT = Path(__file__).parents[2]
MINIMAL = "name: a\nmodel:\n  name: seprune/se_resnet20\ndata:\n  source: digits\n"
SHIPPED = sorted(p.stem for p in recipe_folder().glob("*.yaml"))


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "r.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_names_that_are_no_text_are_named_by_their_key():
    values = {"name": "a", "model": {"name": "b\udcff"}, "data": {"source": "\udcfe.d"}}
    with pytest.raises(UsageError) as caught:
        recipe_of(values)
    assert caught.value.what.splitlines() == [
        'command line data.source: is not UTF-8 text: rename the file, or give a UTF-8 locale: LC_ALL=C.UTF-8 (got "\udcfe.d")',
        'command line model.name: is not UTF-8 text: rename the file, or give a UTF-8 locale: LC_ALL=C.UTF-8 (got "b\udcff")',
    ]


def refusal(path: Path | str, *overrides: str) -> list[str]:
    """The problems that a recipe is refused with, each without the folder in front."""
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_status == 2
    assert caught.value.code == "recipe"
    assert caught.value.why == "a recipe is checked whole before any work starts"
    assert caught.value.fix == (
        "mend what is listed; docs/recipes.md and `seprune recipes schema` have every key"
    )
    folder = f"{Path(path).parent}/"
    return [line.replace(folder, "") for line in caught.value.what.split("\n")]


# What is read


def test_a_minimal_recipe_gets_every_default(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert (recipe.name, recipe.seed, recipe.device) == ("a", 0, "auto")
    assert recipe.train is None
    assert recipe.importance.criterion == "gate_logit"
    assert recipe.plan.budgets() == (Budget.parse(macs=0.5),)
    assert recipe.finetune.distill is not None
    assert recipe.finetune.recalibrate == 2048


def test_numbers_and_words_are_read_by_yaml_1_2(tmp_path):
    text = MINIMAL + "finetune: {lr: 1e-3, epochs: 0o10}\n"
    recipe = load_recipe(write(tmp_path, text), ["name=no", "model.args={a: 2020-01-01, b: 010}"])
    assert recipe.finetune.lr == 0.001
    assert recipe.finetune.epochs == 8
    assert recipe.name == "no"
    assert recipe.model.args == {"a": "2020-01-01", "b": 10}


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    plain = load_recipe(write(tmp_path, MINIMAL))
    marked = b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()
    assert load_recipe(write(tmp_path, marked)) == plain


def test_overrides_set_replace_create_and_remove(tmp_path):
    path = write(tmp_path, MINIMAL + "train:\n  epochs: 3\n  lr: 0.3\n")
    recipe = load_recipe(path, ["train.epochs=5", "plan.macs=[0.7, 20M]", "name=b=c"])
    assert (recipe.train.epochs, recipe.train.lr) == (5, 0.3)
    assert recipe.plan.macs == (0.7, "20M")
    assert recipe.name == "b=c"
    assert load_recipe(path, ["train="]).train is None
    assert load_recipe(path, ["train={epochs: 1}"]).train.lr == 0.1
    assert load_recipe(path, ["finetune.distill=null", "seed=1", "seed=2"]).seed == 2


def test_budgets_are_taken_side_by_side(tmp_path):
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["plan.macs=[0.7, 0.5]", "plan.params=1.5M"])
    assert recipe.plan.budgets() == (
        Budget.parse(macs=0.7, params="1.5M"),
        Budget.parse(macs=0.5, params="1.5M"),
    )
    assert load_recipe(path, ["plan.params=0.4"]).plan.budgets() == (Budget.parse(params=0.4),)
    assert refusal(path, "plan.macs=[0.7, 0.5]", "plan.params=[0.7, 0.5, 0.3]") == [
        "command line plan: lists of budgets must be equally long: they are taken side by side "
        '(got {"macs": [0.7, 0.5], "params": [0.7, 0.5, 0.3]})'
    ]


def test_the_home_folder_is_meant_by_a_tilde_and_variables_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    path = write(tmp_path, MINIMAL)
    recipe = load_recipe(path, ["model.checkpoint=~/w.pth", "data.source=torchvision/CIFAR10:~/d"])
    assert recipe.model.checkpoint == "/home/me/w.pth"
    assert recipe.data.source == "torchvision/CIFAR10:/home/me/d"
    assert load_recipe(path, ["data.source=$HOME/d"]).data.source == "$HOME/d"
    assert load_recipe(path, ["data.source=a/b"]).data.source == "a/b"


def test_recipes_do_not_change_afterwards(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


# Writing and the schema


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid_named_described_and_survives_a_round_trip(name, tmp_path):
    text = (recipe_folder() / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n#\n# ")
    assert f"seprune run recipes/{name}.yaml --out " in text
    recipe = load_recipe(name)
    assert recipe == load_recipe(recipe_folder() / f"{name}.yaml")
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_the_dump_has_one_key_per_line(tmp_path):
    recipe = load_recipe(write(tmp_path, MINIMAL), ["plan.protect=[stem, 'a, *']", "name='a: b'"])
    lines = dump_recipe(recipe).splitlines()
    assert "  protect: [stem, 'a, *']" in lines
    assert "name: 'a: b'" in lines
    assert "train: null" in lines
    assert all(line.strip().partition(":")[1] for line in lines)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


SCALARS = st.one_of(
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=20).filter(
        lambda text: not text.rpartition(".py:")[1]
    ),
    st.booleans(),
)


@settings(max_examples=20, deadline=None)
@given(
    args=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), SCALARS, max_size=4),
    macs=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
)
def test_whatever_a_recipe_holds_comes_back_from_its_dump(tmp_path_factory, args, macs):
    recipe = Recipe(
        name="x",
        model={"name": "timm/seresnet18", "args": args},
        data={"source": "digits"},
        plan={"macs": macs},
    )
    path = write(tmp_path_factory.mktemp("dump"), dump_recipe(recipe))
    assert load_recipe(path) == recipe


def test_the_schema_beside_the_recipes_is_the_one_that_is_checked():
    shipped = json.loads((ROOT / "recipes" / "schema.json").read_text())
    assert shipped == recipe_schema(), "make it anew: seprune recipes schema > recipes/schema.json"


def test_every_key_is_in_the_documentation():
    text = (ROOT / "docs" / "recipes.md").read_text()
    names = {key.rpartition(".")[2] for key in known_keys()}
    assert sorted(name for name in names if f"`{name}`" not in text) == []


# What is refused (rows 18, 20 and 21 of the fault matrix)


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file(tmp_path):
    text = """\
name: x
seed: "1"
macs: 0.5
model:
  name: seprune/se_resnet20
  nmae: 3
data:
  source: 3
  batch_size: -1
  batch_size: 2
plan:
  macs: [0.5, 2]
  protect: x
  allocation: globall
  latency: 5M
finetune:
  lr: .inf
  bogus: 1
"""
    assert refusal(write(tmp_path, text), "plan.mcas=3", "train.epochs=no") == [
        'r.yaml:2:1 seed: must be a whole number (got "1")',
        "r.yaml:3:1 macs: unknown key; did you mean plan.macs?",
        "r.yaml:6:3 model.nmae: unknown key; did you mean model.name?",
        "r.yaml:8:3 data.source: must be a text (got 3)",
        "r.yaml:9:3 data.batch_size: must be greater than or equal to 1 (got -1)",
        "r.yaml:10:3 data.batch_size: given twice (first at r.yaml:9:3)",
        "r.yaml:12:3 plan.macs: must be a fraction kept, between 0 and 1, "
        "or an amount like 20M or 1.5G (got [0.5, 2])",
        'r.yaml:13:3 plan.protect: must be a list (got "x")',
        "r.yaml:14:3 plan.allocation: must be 'auto', 'global', 'uniform', 'isomorphic', 'cost_aware' "
        "or 'sensitivity' (got \"globall\")",
        "r.yaml:15:3 plan.latency: must be a fraction kept, between 0 and 1, or a time like 4ms "
        '(got "5M")',
        "r.yaml:17:3 finetune.lr: must be a finite number (got Infinity)",
        "r.yaml:18:3 finetune.bogus: unknown key; known here: epochs, batch_size, optimizer, lr, "
        "momentum, nesterov, weight_decay, schedule, norms, warmup_epochs, label_smoothing, mixup, "
        "cutmix, randaugment, ema, clip, accumulate, precision, channels_last, compile, "
        "trackers, recalibrate, distill",
        "command line plan.mcas: unknown key; did you mean plan.macs?",
        'command line train.epochs: must be a whole number (got "no")',
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "r.yaml:1:1 is empty"),
        ("# only a comment\n", "r.yaml:1:1 is empty"),
        ("- a\n- b\n", "r.yaml:1:1 must be a mapping of keys, such as `name: my run`"),
        ("hello", "r.yaml:1:1 must be a mapping of keys, such as `name: my run`"),
        ("name: a\nmodel:\n\tname: b\n", "r.yaml:3:1 a tab where YAML wants spaces: indent with spaces"),
        ("name: a\n---\nname: b\n", "r.yaml:2:1 a second document starts here (---): a recipe is one document"),
        ("name: [a\n", "r.yaml:2:1 expected ',' or ']', but got '<stream end>'"),
        ("a: &x 1\nb: *x\n", "r.yaml:1:4 anchors and aliases (& and *) are not allowed"),
        ("a: !!python/object/apply:os.system [ls]\n", "r.yaml:1:4 tags are not allowed (got tag:yaml.org,2002:python/object/apply:os.system)"),
        ("a: !x 1\n", "r.yaml:1:4 tags are not allowed (got !x)"),
        ("%YAML 1.1\n---\na: no\n", "r.yaml:2:1 directives (%) are not allowed"),
        (b"a: \xff\n", "r.yaml:1:1 is not UTF-8 text (byte 3 is 0xff)"),
        ("name: a".encode("utf-16"), "r.yaml:1:1 is not UTF-8 text (byte 0 is 0xff)"),
        (b"a: \x00\n", "r.yaml:1:1 unacceptable character #x0000: special characters are not allowed"),
    ],
)  # fmt: skip
def test_what_is_no_yaml_mapping_is_refused_with_its_place(tmp_path, text, problem):
    assert refusal(write(tmp_path, text)) == [problem]


def test_what_is_missing_is_required(tmp_path):
    assert refusal(write(tmp_path, "name: a\nmodel: {}\n")) == [
        "r.yaml:1:1 data: is required",
        "r.yaml:2:1 model.name: is required",
    ]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("plan.macs", "command line plan.macs: must be key=value, such as plan.macs=0.5"),
        ("=3", "command line must be key=value, such as plan.macs=0.5"),
        ("plan..macs=3", "command line plan..macs: must be key=value, such as plan.macs=0.5"),
        ("name.x=3", 'command line name.x: name has no keys of its own (got "a")'),
        ("name=[", "command line name: not a YAML value: expected the node content, but found '<stream end>' (got \"[\")"),
        ("name={a: 1, a: 2}", 'command line name: not a YAML value: given twice (first at :1:2) (got "{a: 1, a: 2}")'),
        ("name=!!python/name:os.system x", 'command line name: not a YAML value: tags are not allowed (got tag:yaml.org,2002:python/name:os.system) (got "!!python/name:os.system x")'),
        ("collect.image=3", "command line collect.image: unknown key; did you mean collect.images?"),
        ("colect.images=3", "command line colect: unknown key; did you mean collect?"),
        ("plan.macs=1.5", "command line plan.macs: must be a fraction kept, between 0 and 1, or an amount like 20M or 1.5G (got 1.5)"),
        ("plan.macs=0.7,0.5", 'command line plan.macs: must be a fraction kept, between 0 and 1, or an amount like 20M or 1.5G (got "0.7,0.5")'),
        ("plan.latency=5M", 'command line plan.latency: must be a fraction kept, between 0 and 1, or a time like 4ms (got "5M")'),
        ("finetune.nesterov=yes", 'command line finetune.nesterov: must be true or false (got "yes")'),
        ("seed=-1", "command line seed: must be greater than or equal to 0 (got -1)"),
        ("device=tpu", "command line device: must match pattern '^(auto|cpu|mps|cuda(:\\d+)?)$' (got \"tpu\")"),
        ("model.args.x=[1]", "command line model.args.x: must be a number, a text, true or false (got [1])"),
        ("model.input=[3, 32]", "command line model.input.2: is required"),
        ("data.std=[0.5]", 'r.yaml:4:1 data: mean and std must be given together, one number per channel each (got {"source": "digits", "std": [0.5]})'),
        ("model.args.checkpoint_path=x", 'r.yaml:2:1 model: args must not hold checkpoint_path: weights come from model.checkpoint or model.pretrained (got {"name": "seprune/se_resnet20", "args": {"checkpoint_path...)'),
        ("report.batch_sizes=[]", "command line report.batch_sizes: must have at least 1 item after validation, not 0 (got [])"),
    ],
)  # fmt: skip
def test_overrides_are_refused_with_the_close_keys(tmp_path, override, problem):
    assert refusal(write(tmp_path, MINIMAL), override) == [problem]


def test_code_is_never_named_by_a_recipe_and_by_the_command_line_only_with_the_flag(tmp_path):
    text = MINIMAL.replace("seprune/se_resnet20", "net.py:build") + "train: {}\n"
    words = (
        "names code to run; say model.name=FILE.py:FUNCTION and --allow-code on the command line"
    )
    assert refusal(write(tmp_path, text)) == [
        f'r.yaml:3:3 model.name: {words} (got "net.py:build")'
    ]
    with pytest.raises(UsageError, match="names code to run"):
        load_recipe(write(tmp_path, text), allow_code=True)
    path = write(tmp_path, MINIMAL)
    with pytest.raises(UsageError, match="names code to run"):
        load_recipe(path, ["data.source=net.py:build"], allow_code=True)
    assert refusal(path, "model.name=net.py:build", "model.args={f: a/b.py:c}") == [
        f'command line model.args.f: {words} (got "a/b.py:c")',
        f'command line model.name: {words} (got "net.py:build")',
    ]
    recipe = load_recipe(path, ["model.name=net.py:build"], allow_code=True)
    assert recipe.model.name == "net.py:build"
    (unknown,) = refusal(path, "model._target_=os.system")
    assert unknown.startswith("command line model._target_: unknown key; known here: name, classes")


def test_a_missing_recipe_is_answered_with_the_nearest_one(tmp_path):
    with pytest.raises(UsageError) as caught:
        load_recipe("quikstart")
    assert str(caught.value) == (
        "quikstart: no such file\n"
        f"why: a recipe is a YAML file, or one of those shipped: {', '.join(SHIPPED)}\n"
        "next: did you mean quickstart?"
    )
    with pytest.raises(UsageError, match=r": not a file\nwhy: .*\nnext: check the path"):
        load_recipe(tmp_path)
    with pytest.raises(UsageError, match="/dev/zero: not a file"):
        load_recipe("/dev/zero")


# Hostile hands (row 19) and speed: real processes


BOMBS = {
    "aliases": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 64)),
    "itself": "a: &a [*a]\n",
    "brackets": "a: " + "[" * 16_000,
    "braces": "a: " + "{" * 16_000,
    "dashes": "a:\n" + "- " * 8_000,
    "questions": "? " * 8_000,
    "indents": "".join(" " * i + "a:\n" for i in range(170)),
    "large": "# " + "x" * 50_000_000,
    "wide": "a: [" + "1," * 8_000 + "]\n",
    "digits": "a: " + "9" * 16_000,
    "quotes": 'a: "' + "\\\\" * 8_000 + '"\n',
}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "bytes_"),
    [
        ("2GB", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("512MB", 512 << 20),
        ("4096", 4096),
        ("auto", "auto"),
    ],
)
def test_memory_is_written_with_a_unit_or_in_bytes(written, bytes_):
    assert load_recipe("quickstart", [f"memory={written}"]).memory == bytes_


@pytest.mark.parametrize(
    "written", ["lots", "0", "-1", "2.5", "true", "2gb", "GB", "1e400", "null"]
)
def test_memory_that_is_no_number_of_bytes_is_refused(written):
    with pytest.raises(UsageError, match="memory: must be auto, or bytes"):
        load_recipe("quickstart", [f"memory={written}"])


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_in_no_time_and_without_torch(tmp_path, bomb):
    """In a child with ten seconds of processor time: a hang is killed, not waited for."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (10, 10))\n"
        "from seprune.recipe import load_recipe\n"
        "try: load_recipe(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, 'torch' in sys.modules, str(error)[:300])\n"
    )
    path = write(tmp_path, BOMBS[bomb])
    command = [sys.executable, "-c", script, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
    assert output.returncode == 0, output.stderr
    assert output.stdout.startswith("UsageError False "), output.stdout
    assert f"{path}:1:" in output.stdout or f"{path}:2:" in output.stdout or ":13:" in output.stdout


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_recipes_are_read_or_refused_and_nothing_else(tmp_path_factory, data):
    whole = bytearray((recipe_folder() / "cifar10-seresnet20.yaml").read_bytes())
    position = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.integers(0, 20))
    whole[position : position + length] = data.draw(st.binary(max_size=20))
    path = write(tmp_path_factory.mktemp("fuzz"), bytes(whole))
    with contextlib.suppress(UsageError):
        load_recipe(path)


def test_a_recipe_names_the_tasks_that_there_are():
    from typing import get_args

    from seprune.recipe.sections import Tasks
    from seprune.tasks import TASKS

    assert get_args(Tasks) == tuple(TASKS)
