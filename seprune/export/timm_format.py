"""timm's own format of a pruned network: `NAME_pruned.txt` and plain weights, which timm reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from seprune.errors import InputError, UsageError, first_line
from seprune.export.architecture import Architecture, rebuilt
from seprune.export.onnx import difference
from seprune.models.zoos import adapted_by_timm, timm_arguments
from seprune.runtime.files import bytes_of, tensors_of, write_together

CLOSE = 1e-5  # of the largest output: the same layers in the same order
_EXAMPLE = """\
import timm
from safetensors.torch import load_file
from timm.models._prune import adapt_model_from_string

model = timm.create_model({name!r}{arguments})
model = adapt_model_from_string(model, open({text!r}).read())
model.load_state_dict(load_file({weights!r}))
"""


def export_timm(model: nn.Module, architecture: Architecture, folder: Path) -> tuple[Path, ...]:
    """Write `NAME_pruned.txt`, `NAME_pruned.safetensors` and `NAME_pruned.py`, which loads them.

    timm builds the dense network and gives each convolution, norm and linear layer the width that
    the text says. So that is tried first: what timm makes has to answer as `model` does.

    Raises:
        UsageError: not a network of timm's.
        InputError: timm cannot make this network: grouped convolutions that are not depthwise, a
            gate that is held, a block that is left out.
    """
    zoo, _, name = architecture.name.partition("/")
    if zoo != "timm":
        raise UsageError(
            f"{architecture.name} is no network of timm's",
            why="the format says widths of a network that timm builds",
            fix="--onnx FILE or --pt2 FILE",
        )
    text = "***".join(
        f"{n}:{list(t.shape)}" for n, t in model.state_dict().items() if n.endswith(".weight")
    )
    _refuse_other_answers(model, architecture, text)
    bare = name.partition(".")[0]
    names = [f"{bare}_pruned.{ending}" for ending in ("txt", "safetensors", "py")]
    arguments = timm_arguments(
        name, architecture.classes, architecture.input, architecture.args or {}
    )
    given = "".join(f", {k}={v!r}" for k, v in arguments.items())
    code = _EXAMPLE.format(name=bare, arguments=given, text=names[0], weights=names[1])
    weights = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
    parts = (
        bytes_of(text.encode()),
        tensors_of(weights, {"format": "pt"}),
        bytes_of(code.encode()),
    )
    write_together(folder, dict(zip(names, parts, strict=True)))
    return tuple(folder / name for name in names)


def _refuse_other_answers(model: nn.Module, architecture: Architecture, text: str) -> None:
    dense = rebuilt(replace(architecture, plans=()), device="cpu")
    shape = architecture.input or (3, 224, 224)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    try:
        made = adapted_by_timm(dense, text)
        made.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected, answer = model.eval()(images), made.eval()(images)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _impossible(architecture, first_line(error)) from error
    if not (apart := difference([answer], [expected])) <= CLOSE:
        raise _impossible(architecture, f"its answers differ by {apart:.1e}")


def _impossible(architecture: Architecture, why: str) -> InputError:
    return InputError(
        f"{architecture.name}: timm's format cannot say this network",
        why=why,
        fix="--onnx FILE or --pt2 FILE, or load the folder by seprune.load",
        code="export",
    )
