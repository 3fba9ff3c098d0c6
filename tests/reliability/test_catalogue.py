"""Every code of docs/errors.md met at the command line: its text, its exit status, three parts."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import evil
import pytest
import torch
from child import ROOT
from corpus import NET
from hub_server import Hub, serving
from PIL import Image
from terminal import Ended, Terminal
from test_strange_networks import NETS, SOON

from seprune.runtime.files import write_sums

TIMM = b'{"architecture": "test_byobnet", "num_classes": 10}'
QUICK = (
    f"model.name={NET}", "importance.criterion=l2", "train=null", "prune.recover=none",
    "finetune.epochs=0", "finetune.recalibrate=0", "plan.min_channels=2",
    "report.latency=false", "report.html=false", "device=cpu",
)  # fmt: skip
CUT = (
    "--data", "digits", "--set", "plan.min_channels=2", "--importance", "l2", "--recover", "none",
)  # fmt: skip
STOP = """
import os, signal, threading, time

def stop():
    while getattr(signal.getsignal(signal.{0}), "__name__", "") != "_on_signal":
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.{0})

threading.Thread(target=stop, daemon=True).start()
"""


@dataclass(frozen=True)
class Surroundings:
    """What a row may use."""

    terminal: Terminal
    folder: Path
    pruned: Path
    finished: Path

    def __call__(self, *words: object, **limits: object) -> Ended:
        return self.terminal(*words, "--json", cwd=self.folder, **limits)

    def file(self, name: str) -> Path:
        """A file of the corpus."""
        return corpus.FAULTS[name].make(self.folder, self.folder / "canary")

    def checkpoint(self, path: Path, *more: object) -> Ended:
        given = ("--classes", "10", "--input", "1x8x8", "--checkpoint", path)
        return self("inspect", NET, *given, *more)

    def strange(self, name: str, *more: object, **limits: object) -> Ended:
        given = ("--allow-code", "--input", "1x8x8")
        return self("inspect", f"{NETS}:{name}", *given, *more, **limits)


def _spoiled(fault: str) -> Callable[[Surroundings], Ended]:
    """A data folder with one thing wrong."""

    def meet(at: Surroundings) -> Ended:
        root = at.folder / "spoiled"
        for name in ("images", "masks"):
            (root / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8)).save(root / "images" / f"{number}.png")
            Image.new("L", (8, 8)).save(root / "masks" / f"{number}.png")
        if fault == "pair":
            (root / "masks" / "1.png").unlink()
        if fault == "mask":
            Image.new("L", (5, 4)).save(root / "masks" / "0.png")
        if fault == "annotation":
            shutil.rmtree(root / "masks")
            (root / "ages.csv").write_text("file,age\n0.png,old\n")
        return at("evaluate", NET, "--data", root)

    return meet


def _plan(at: Surroundings) -> Ended:
    folder = corpus.edited(at.pruned, at.folder / "m")
    (folder / "plan.json").write_text('{"format": 1, "groups": [{"name": "stem"}]}')
    write_sums(folder)
    return at("inspect", folder)


def _uncuttable(at: Surroundings) -> Ended:
    """Somebody adds a layer to a plan that no rule knows how to cut."""
    folder = _saved(at, "unknown")
    text = (folder / "plan.json").read_text()
    known, other = '"layer": "two", "side": "in"', '"layer": "after", "side": "out"'
    assert known in text
    (folder / "plan.json").write_text(text.replace(known, other))
    write_sums(folder)
    return at("inspect", folder, "--allow-code")


def _linked(at: Surroundings) -> Ended:
    """A run folder in which a link leads to somebody's networks."""
    (at.folder / "run").mkdir()
    (at.folder / "run" / "pruned").symlink_to(at.pruned)
    return at("run", "quickstart", "--out", at.folder / "run")


def _relabelled(at: Surroundings) -> Ended:
    folder = corpus.edited(at.pruned, at.folder / "m")
    config = json.loads((folder / "config.json").read_text())
    config["labels"] = list("1023456789")
    (folder / "config.json").write_text(json.dumps(config))
    write_sums(folder)
    return at("evaluate", folder, "--data", "digits")


def _preprocessing(at: Surroundings) -> Ended:
    (at.folder / "preprocessor_config.json").write_text('{"size": "large"}')
    return at("evaluate", NET, "--checkpoint", at.folder, "--data", "digits")


def _on_hub(at: Surroundings, files: dict[str, bytes], **faults: Any) -> Ended:
    """A command that asks a Hub on loopback for us/net, with a cache of its own."""
    with serving(Hub({"us/net": files}, **faults)) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(at.folder / "cache")}
        return at("inspect", "hf-hub:us/net", before=f"import os; os.environ |= {settings}")


def _piped(at: Surroundings) -> Ended:
    os.mkfifo(at.folder / "report.json")
    return at("report", at.folder / "report.json")


def _unreadable(at: Surroundings) -> Ended:
    os.mkfifo(at.folder / "w.pth")
    return at.checkpoint(at.folder / "w.pth")


def _no_weights(at: Surroundings) -> Ended:
    torch.save({"epoch": 3}, at.folder / "w.pth")
    return at.checkpoint(at.folder / "w.pth")


def _convert(at: Surroundings) -> Ended:
    """A model whose class is somebody's, pickled where its file is."""
    (at.folder / "theirs.py").write_text("import torch\nclass Net(torch.nn.Linear): pass\n")
    sys.path.insert(0, str(at.folder))
    torch.save(importlib.import_module("theirs").Net(2, 2), at.folder / "w.pth")
    sys.path.remove(str(at.folder))
    del sys.modules["theirs"]
    (at.folder / "theirs.py").unlink()
    return at("convert", "--allow-pickle", "w.pth", memory=4096, seconds=60)


def _cells(at: Surroundings) -> Ended:
    words = ("sweep", "quickstart", "model.checkpoint=absent.pth", "seed=0,1", "--out", "s")
    return at(*words, memory=4096, seconds=60)


def _damaged(at: Surroundings) -> Ended:
    shutil.copytree(at.pruned, at.folder / "m")
    evil.flip_bit(at.folder / "m" / "model.safetensors", 2000)
    return at("verify", at.folder / "m")


def _saved(at: Surroundings, name: str) -> Path:
    """A pruned folder of a strange network."""
    given = (f"{NETS}:{name}", "--allow-code", *CUT, "--macs", "0.8", "--out", "m")
    ended = at("prune", *given)
    assert ended.status == 0, ended.err
    return at.folder / "m"


def _exported(at: Surroundings, name: str) -> Ended:
    given = (_saved(at, name), "--allow-code", "--pt2", "m.pt2")
    return at("export", *given, memory=4096, seconds=60)


def _nonfinite(at: Surroundings) -> Ended:
    """Weights that are finite, and whose squares are not."""
    state = corpus.weights()
    for layer in ("conv1", "bn1", "conv2"):
        state[f"layer3.0.{layer}.weight"] *= 1e38
    torch.save(state, at.folder / "w.pth")
    return at("prune", NET, "--checkpoint", "w.pth", *CUT, "--out", "m")


def _statistics(at: Surroundings) -> Ended:
    words = (NET, "--data", "digits", "--images", "16", "--gradients", "none", "--out", "s")
    assert at("collect", *words).status == 0
    given = ("--classes", "10", "--input", "1x8x8", "--importance", "gate_logit")
    return at("rank", NET, *given, "--statistics", "s")


def _unfinished(at: Surroundings) -> Ended:
    shutil.copytree(at.finished, at.folder / "run")
    (at.folder / "run" / "report.json").unlink()
    return at("report", "run")


def _locked(at: Surroundings) -> Ended:
    from seprune.pipeline.run_folder import open_run
    from seprune.recipe import dump_recipe, load_recipe

    with open_run(at.folder / "run", dump_recipe(load_recipe("quickstart", QUICK))):
        return at("run", "quickstart", *QUICK, "--out", "run")


def _stopped(at: Surroundings, name: str) -> Ended:
    words = ("quickstart", "train.epochs=500", "report.latency=false", "--out", "run")
    return at("run", *words, before=STOP.format(name))


def _alone(at: Surroundings) -> Ended:
    """The first of two processes, and the second never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    who = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "SEPRUNE_TIMEOUT": "0.5"}
    return at("evaluate", NET, "--data", "digits", env=where | who)


def _bug(at: Surroundings) -> Ended:
    ended = at("models", before="import seprune.models as m; m.names = lambda p: 1 / 0")
    assert ended.err.startswith("Traceback")  # the one error that shows one
    return Ended(ended.status, ended.out, ended.err[ended.err.index("error: ") :])


@dataclass(frozen=True)
class Row:
    """One code of the catalogue: how it is met, and a part of the message."""

    meet: Callable[[Surroundings], Ended]
    says: str
    status: int = 3


def _file(name: str) -> Row:
    return Row(lambda s: s.checkpoint(s.file(name)), corpus.FAULTS[name].says)


CATALOGUE: dict[str, Row] = {
    "bug": Row(_bug, "a bug in seprune: ZeroDivisionError\ndivision by zero", 1),
    "usage": Row(lambda s: s("inspect", NET, "--input", "3x32"), "--input 3x32: not channels", 2),
    "recipe": Row(lambda s: s("run", "quickstrat"), "did you mean quickstart?", 2),
    "criterion": Row(
        lambda s: s("prune", NET, "--data", "digits", "--importance", "l3", "--out", "m"),
        "unknown criterion 'l3'", 2,
    ),
    "run-recipe": Row(
        lambda s: s("run", "quickstart", *QUICK, "seed=7", "--out", s.finished),
        "it differs in seed (was 0, now 7)", 2,
    ),
    "input": Row(lambda s: s("evaluate", NET, "--data", "nowhere"), "no such data folder"),
    "newer": Row(
        lambda s: s("inspect", corpus.edited(s.pruned, s.folder / "m", format=7)),
        "folder format 7, this seprune reads 1",
    ),
    "plan": Row(_plan, "group 'stem' of the plan is impossible"),
    "forward": Row(lambda s: s.strange("jagged"), "the model's forward fails in layer 'middle'"),
    "trace-timeout": Row(lambda s: s.strange("turns", before=SOON), "did not end within 0.3 s"),
    "uncuttable": Row(_uncuttable, "cannot be cut"),
    "checkpoint-missing": _file("missing"),
    "checkpoint-unreadable": Row(_unreadable, "not a regular file"),
    "checkpoint-folder": _file("a folder without weights"),
    "checkpoint-empty": _file("empty"),
    "checkpoint-incomplete": _file("half a .pth"),
    "checkpoint-damaged": _file("a flipped bit"),
    "checkpoint-not-weights": _file("HTML"),
    "checkpoint-unknown": Row(
        lambda s: (
            (s.folder / "w.pth").write_bytes(b"\xde\xad\xbe\xef" * 20),
            s.checkpoint(s.folder / "w.pth"),
        )[1],
        "it starts with the bytes de ad be ef",
    ),
    "checkpoint-unsupported": _file("ONNX"),
    "checkpoint-no-weights": Row(_no_weights, "it is a dict with 'epoch'"),
    "checkpoint-no-choice": Row(
        lambda s: s.checkpoint(corpus.dense(s.folder / "w.pth"), "--weights", "ema"),
        "it holds a plain state dict",
    ),
    "checkpoint-pickled": _file("a whole model"),
    "checkpoint-unsafe": _file("os.system"),
    "checkpoint-bomb": _file("deflated"),
    "checkpoint-convert": Row(_convert, "No module named 'theirs'"),
    "checkpoint-mismatch": _file("another architecture"),
    "checkpoint-classes": _file("other classes"),
    "checkpoint-values": _file("NaN"),
    "budget": Row(
        lambda s: s("prune", NET, *CUT, "--macs", "0.001", "--out", "m"), "cannot be met"
    ),
    "cells": Row(_cells, "2 of 2 cells failed"),
    "classes": Row(
        lambda s: s("evaluate", NET, "--data", "digits", "--classes", "7"), "has 7 outputs"
    ),
    "class-order": Row(_relabelled, "its classes are in another order than the network's"),
    "preprocessing": Row(_preprocessing, "json: its preprocessing cannot be read"),
    "hub": Row(lambda s: _on_hub(s, {"x": b""}), "there is no config.json in it"),
    "hub-pickle": Row(
        lambda s: _on_hub(s, {"config.json": TIMM, "pytorch_model.bin": b"x"}),
        "its weights are a pickle",
    ),
    "hub-damaged": Row(
        lambda s: _on_hub(s, {"config.json": TIMM, "model.safetensors": b"right"}, forged=b"wrong"),
        "model.safetensors is not what the Hub promised",
    ),
    "offline": Row(
        lambda s: s(
            "inspect", "hf-hub:us/net",
            before="import os, huggingface_hub.constants as hub; hub.HF_HUB_OFFLINE = True; "
            f"os.environ['HF_HUB_CACHE'] = {str(s.folder)!r}",
        ),
        "hf download us/net --local-dir net", 4,
    ),
    "damaged": Row(_damaged, "model.safetensors"),
    "export": Row(lambda s: _exported(s, "deciding"), "decides by the values of tensors"),
    "export-mismatch": Row(lambda s: _exported(s, "counting"), "of the largest output"),
    "extra": Row(
        lambda s: s(
            "export", s.pruned, "--onnx", "m.onnx",
            before="import sys; sys.modules['onnxscript'] = sys.modules['onnx'] = None",
        ),
        "pip install 'seprune[onnx]'", 4,
    ),
    "path": Row(_linked, "pruned is a link"),
    "unreadable": Row(_piped, "it is a pipe (FIFO)"),
    "mismatch": Row(
        lambda s: s(
            "inspect", corpus.edited(s.pruned, s.folder / "m", model="seprune/se_resnet20")
        ),
        "the weights do not fit the network that its plan makes",
    ),
    "no-gates": Row(
        lambda s: s(
            "prune", f"{NETS}:plain", "--allow-code", "--data", "digits", "--out", "m",
            "--importance", "gate_mean",
        ),
        "no channel gates",
    ),
    "pair": Row(_spoiled("pair"), "1.png: there is no mask of this name"),
    "mask": Row(_spoiled("mask"), "0.png: 4x5 pixels"),
    "annotation": Row(_spoiled("annotation"), "line 2: age is 'old'"),
    "task": Row(
        lambda s: s("evaluate", NET, "--data", "shapes", "--task", "regression"),
        "shapes have no targets for regression",
    ),
    "no-model": Row(lambda s: s("models", "no*such"), "no network is called like 'no*such'"),
    "nonfinite": Row(_nonfinite, "gives a score that is not finite in group"),
    "not-ours": Row(lambda s: s("inspect", "./nowhere"), "not a folder that seprune wrote"),
    "statistics": Row(_statistics, "it needs 'logits'"),
    "unfinished": Row(_unfinished, "go on with: seprune run run/recipe.yaml --out run"),
    "environment": Row(
        lambda s: s("evaluate", NET, "--data", "digits", "--device", "cuda:7"),
        "device 'cuda:7' was asked for", 4,
    ),
    "process": Row(_alone, "another of the 2 processes ended without a word, or hangs", 4),
    "locked": Row(_locked, f"it is held by process {os.getpid()} on", 6),
    "stopped": Row(lambda s: _stopped(s, "SIGTERM"), "go on with: seprune run quickstart", 143),
}  # fmt: skip
LONG = {"cells", "export", "export-mismatch", "checkpoint-convert"}


@pytest.fixture(scope="session")
def finished(terminal, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "done"
    ended = terminal("run", "quickstart", *QUICK, "--out", out)
    assert ended.status == 0, ended.err
    return out


@pytest.fixture
def at(terminal, tmp_path, pruned, finished) -> Surroundings:
    return Surroundings(terminal, tmp_path, pruned, finished)


def marked(code: str) -> object:
    return pytest.param(code, marks=[pytest.mark.slow] if code in LONG else [], id=code)


@pytest.mark.parametrize("code", map(marked, CATALOGUE))
def test_the_code_is_met_with_its_text_and_status(at, code):
    row = CATALOGUE[code]
    row.meet(at).refused(row.status, code, says=row.says)


def test_sigint_has_a_status_of_its_own(at):
    _stopped(at, "SIGINT").refused(130, "stopped", says="stopped by SIGINT")


def test_every_code_of_the_catalogue_is_met_here_with_its_status():
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([\d, ]+) \|", text, re.MULTILINE))
    assert sorted(CATALOGUE) == sorted(rows)
    for code, row in CATALOGUE.items():
        assert str(row.status) in rows[code].split(", "), code


@pytest.mark.parametrize("columns", ["80", "40"])
def test_an_error_is_complete_at_any_width_and_has_no_colour_when_asked(at, columns):
    words = ("inspect", NET, "--checkpoint", "nowhere/" + "very-" * 30 + "long.pth")
    plain = at(*words, env={"COLUMNS": columns})
    assert "very-" * 30 + "long.pth: no such file" in plain.err
    assert "\x1b" not in plain.err
    forced = at(*words, before="import os; del os.environ['NO_COLOR']", env={"FORCE_COLOR": "1"})
    assert "\x1b" in forced.err
    assert json.loads(forced.out)["error"]["code"] == "checkpoint-missing"
