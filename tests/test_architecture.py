"""The layers of docs/architecture.md, and who may write files (libraries: ruff's TID251)."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "seprune"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ENTRANCES = {"__init__", "__main__"}  # the public API and `python -m`: above all layers

# libraries that write, read or lock files in ways of their own
SHUT = ("fcntl", "msvcrt", "portalocker", "shelve", "dill", "cloudpickle", "joblib", "marshal",
        "sqlite3", "dbm", "h5py", "mmap")  # fmt: skip
OURS = ("files", "html")  # modules whose functions write by `files`
# methods and functions that write, whatever they belong to; and those whose full name says so
WRITERS = {
    *("write_text", "write_bytes", "to_csv", "savez", "savez_compressed", "save_file", "tofile"),
    *("write_html", "mkstemp", "mkdtemp", "NamedTemporaryFile", "serialize_file", "memmap"),
    *("rename", "renames", "touch", "symlink_to", "hardlink_to", "truncate", "rmtree", "move"),
    *("copyfile", "copyfileobj", "copy2", "copytree", "extractall"),
}
WRITING = {
    *("torch.save", "torch.jit.save", "np.save", "json.dump", "pickle.dump", "onnx.save"),
    *("shutil.copy", "os.open", "os.replace", "os.write", "Image.save"),
}
TORCH_FREE = (
    "seprune",
    "seprune.errors",
    "seprune.runtime.files",
    "seprune.recipe",
    "seprune.pipeline.run_folder",
)
LONGEST = 350


def layers() -> dict[str, tuple[int, int]]:
    """Package: layer and place on it, from the table in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Layers")[2].split("```")[1]
    rows = [line.split() for line in table.strip().splitlines()]
    return {
        package: (int(n), place) for n, *packages in rows for place, package in enumerate(packages)
    }


def package_of(path: Path) -> str:
    """The file or the package directly under seprune/ that a source belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, lazily or not, for types or not."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from seprune import files` names a package, `from x import name` perhaps a module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@functools.cache
def calls(path: Path) -> tuple[tuple[int, str, ast.Call], ...]:
    """Line, dotted name and node of every call."""
    called = (node for node in nodes(path) if isinstance(node, ast.Call))
    return tuple((node.lineno, ast.unparse(node.func), node) for node in called)


def shown(path: Path, line: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{line} {what}"


def test_every_package_has_a_layer_and_every_layer_its_packages():
    packages = {package_of(path) for path in SOURCES} - ENTRANCES
    assert sorted(packages - set(layers())) == [], "not in the table of docs/architecture.md"
    assert sorted(set(layers()) - packages) == [], "in the table, but not in seprune/"


def test_imports_go_down_or_to_the_left_only():
    layer = layers()
    wrong = []
    for path in SOURCES:
        here = package_of(path)
        for line, name in imports(path):
            there = name.split(".")[1] if name.startswith("seprune.") else here
            if there != here and {here, there} <= set(layer) and layer[there] >= layer[here]:
                wrong.append(shown(path, line, f"{here} imports {there}"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_importing_it_does_not_import_torch(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_files_are_written_by_files_py_only():
    # the names of our own, when called as plain functions
    owned = {"write_text", "write_bytes", "write_html"}
    wrong = []
    for path in SOURCES:
        if path.name in ("files.py", "transaction.py"):
            continue
        for line, name, call in calls(path):
            method = name.rpartition(".")[2]
            plain = name in owned or name in {
                f"{package}.{own}" for package in OURS for own in owned
            }
            if name in WRITING and not _reads(call):
                wrong.append((path, line, name))
            if method in WRITERS and not plain:
                wrong.append((path, line, name))
            if method == "open" and name != "Image.open" and _writes(call, name):
                wrong.append((path, line, name))
    assert [shown(*w) for w in wrong if not _inside_write_with(w[0], w[1])] == []


def _writes(call: ast.Call, name: str) -> bool:
    """Whether an `open` has a mode other than reading: second argument, or first of a method."""
    position = 1 if name in ("open", "io.open", "gzip.open") else 0
    modes = [k.value for k in call.keywords if k.arg == "mode"] + call.args[position:][:1]
    return any(isinstance(m, ast.Constant) and re.search("[wax+]", str(m.value)) for m in modes)


def _reads(call: ast.Call) -> bool:
    """Whether an `os.open` only reads, or opens what swallows everything."""
    words = ast.unparse(call)
    return "O_RDONLY" in words or "os.devnull" in words


def _inside_write_with(path: Path, line: int) -> bool:
    """Whether a line fills the temporary file of `write_with`: in what is handed to it."""
    tree = parsed(path)
    handed: list[ast.AST] = [
        argument
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("write_with")
        for argument in node.args[1:]
    ]
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    found: list[ast.AST] = []
    while handed:  # what is handed over, and what that calls in turn
        found.append(handed.pop())
        names = {n.id for n in ast.walk(found[-1]) if isinstance(n, ast.Name)}
        handed += [f for n, f in functions.items() if n in names and f not in found + handed]
    return any(n.lineno <= line <= (n.end_lineno or 0) for n in found)


@pytest.mark.parametrize(
    "line",
    [
        "open('a', 'w')",
        "path.open(mode='ab')",
        "torch.save(x, path)",
        "save_file(x, path)",
        "json.dump(x, stream)",
        "path.write_text('x')",
        "np.save(path, x)",
        "os.replace(a, b)",
        "frame.to_csv(path)",
    ],
)
def test_the_search_for_writers_finds_them(line, tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text(f"def work(path, x):\n    {line}\n")
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [tmp_path / "module.py"])
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"module\.py:2"):
        test_files_are_written_by_files_py_only()


def test_nothing_writes_reads_or_locks_in_a_way_of_its_own():
    wrong = [
        shown(path, line, f"imports {name}")
        for path in SOURCES
        for line, name in imports(path)
        if name.partition(".")[0] in SHUT and (path.name, name) != ("transaction.py", "fcntl")
    ]
    assert not wrong, "\n".join(wrong)


def test_one_journal_and_one_lock():
    """Lines are added by `pipeline/journal` alone, which alone knows the file's name;
    `runtime/lock` locks run folders, `runtime/transaction` what is being written."""
    adding, naming, locking = set(), set(), set()
    for path in SOURCES:
        inside = path.relative_to(PACKAGE).with_suffix("").as_posix()
        names = {name.rpartition(".")[2] for _, name, _ in calls(path)}
        adding |= {inside} if "append_line" in names else set()
        locking |= {inside} if names & {"FileLock", "flock", "lockf"} else set()
        words = [n.value for n in nodes(path) if _is_text(n)]
        naming |= {inside} if "journal.jsonl" in words else set()
    assert (adding, naming, locking) == (
        {"pipeline/journal"},
        {"pipeline/journal"},
        {"runtime/lock", "runtime/transaction"},
    )


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_only_checkpoint_unpickles_and_says_weights_only_every_time():
    loaders = {"torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load",
               "torch.hub.load", "torch.hub.load_state_dict_from_url"}  # fmt: skip
    wrong = []
    for path in SOURCES:
        for line, name, call in calls(path):
            given = {k.arg: ast.unparse(k.value) for k in call.keywords}
            safe = given.get("weights_only") == "True" and package_of(path) == "checkpoint"
            if name in loaders and not safe:
                wrong.append((package_of(path), _function_around(path, line)))
    # what `seprune convert --allow-pickle FILE` calls, in a process of its own
    assert set(wrong) <= {("checkpoint", "read_pickled")}


def test_arrays_are_read_without_pickle():
    for path in SOURCES:
        for line, name, call in calls(path):
            if name in ("np.load", "numpy.load"):
                given = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert given.get("allow_pickle") == "False", shown(path, line, name)


def _function_around(path: Path, line: int) -> str:
    tree = parsed(path)
    around = [
        n.name
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef) and n.lineno <= line <= (n.end_lineno or 0)
    ]
    return around[-1] if around else ""


def test_nothing_evaluates_text():
    wrong = [
        shown(path, line, name)
        for path in SOURCES
        for line, name, _ in calls(path)
        if name in ("eval", "exec", "os.system", "marshal.loads")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_are_short_and_say_what_they_are_for(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST
    assert not text.strip() or ast.get_docstring(ast.parse(text))


DISTRIBUTIONS = {"PIL": "pillow", "ruamel": "ruamel.yaml"}  # where names of modules differ


def test_dependencies_are_what_modules_import_and_extras_are_imported_when_needed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    hard = {_distribution(line) for line in project["dependencies"]}
    extras = {_distribution(x) for e in project["optional-dependencies"].values() for x in e}
    at_once, later = set[str](), set[str]()
    for path in SOURCES:
        tree = parsed(path)
        everywhere = _third_party(ast.walk(tree))
        at_once |= (first := _third_party(iter(tree.body)))
        later |= everywhere - first
    assert at_once <= hard
    assert later <= hard | extras
    assert hard <= at_once | later


def _distribution(requirement: str) -> str:
    return re.split(r"[\[<>=~!; ]", requirement)[0].lower().replace("_", "-")


def _third_party(nodes: Iterator[ast.AST]) -> set[str]:
    """Distributions of what is imported by statements, or by `import_module`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    roots = {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names)
    return {DISTRIBUTIONS.get(n, n.lower().replace("_", "-")) for n in roots - {"seprune", ""}}


def test_no_two_test_files_have_one_name():
    """Without packages, pytest imports two files of one name as one module."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(shown(path, node.lineno, node.name))
    wrong = ["\n".join(found) for found in places.values() if len(found) > 1]
    assert not wrong, "\n".join(wrong)


def test_what_other_packages_use_is_documented():
    """Functions, classes and their methods; inside a package, a good name may be enough."""
    used = {(n, package_of(p)) for p in SOURCES for _, n in imports(p) if n.startswith("seprune.")}
    crossing = {name.rpartition(".")[2] for name, package in used if name.split(".")[1] != package}
    missing = []
    for path in SOURCES:
        for node in parsed(path).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name not in crossing:
                continue
            members = node.body if isinstance(node, ast.ClassDef) else []
            methods = [m for m in members if isinstance(m, ast.FunctionDef)]
            public = [m for m in methods if not m.name.startswith("_") and m.name != "forward"]
            missing += [
                shown(path, n.lineno, n.name) for n in (node, *public) if not ast.get_docstring(n)
            ]
    assert not missing, "\n".join(missing)


def test_no_function_takes_more_than_six_parameters():
    wrong = []
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
                names = [n for n in names if n not in ("self", "cls")]
                if len(names) > 6 and package_of(path) != "cli":  # there, a parameter is an option
                    wrong.append(shown(path, node.lineno, f"{node.name} takes {len(names)}"))
    assert not wrong, "\n".join(wrong)


def test_nothing_names_a_place_outside_the_repository():
    wrong = []
    # spelt in pieces, so that this line does not find itself
    roots, hosts = ("work", "root"), (r"pi\.org", "thonhosted")
    patterns = "|".join([*(f"/{r}/" for r in roots), *(f"py{h}" for h in hosts)])
    patterns += r"|/home/(?!me\b)\w|/tmp/\w"
    folders = ("seprune", "recipes", "docs", "benchmarks")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".md", ".yaml", ".json", ".j2"):
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                if re.search(patterns, line):
                    wrong.append(shown(path, number, line.strip()[:80]))
    assert not wrong, "\n".join(wrong)
