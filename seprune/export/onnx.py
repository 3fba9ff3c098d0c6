"""Networks as ONNX and torch.export files: checked against the eager model before they exist."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seprune.errors import InputError, UsageError
from seprune.measure.openvino_runtime import openvino_call
from seprune.models import origin_of
from seprune.models.preprocessing import trained_for
from seprune.runtime.extras import require
from seprune.runtime.files import write_with

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-3  # of the largest output: float32 kernels that sum in another order stay far below
LARGEST_ONNX = 2 * 10**9  # bytes of one protocol buffer
Run = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """A file that was checked: it needs neither seprune nor torch-pruning.

    Attributes:
        bytes: its size.
        max_error: largest difference to the eager model, relative to its largest output.
        batches: batch sizes that were compared.
        opset: of ONNX, else None.
    """

    path: Path
    format: str
    bytes: int
    max_error: float
    batches: tuple[int, ...]
    opset: int | None = None


def export_model(
    model: nn.Module,
    shape: Sequence[int],
    path: Path | str,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    opset: int | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Write `model` to `path` with a free batch size, once it answers as the eager model does.

    Args:
        shape: (C, H, W) of one image.
        opset: of ONNX; None takes torch's own.
        images: (N, C, H, W) to compare on, preprocessed; noise if None.

    Raises:
        UsageError: an unknown format.
        EnvironmentFault: the extra is missing, or `path` cannot be written.
        InputError: the model cannot be exported, or the file answers differently; a file that was
            at `path` before stays.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown export format '{format}'", why=f"known: {', '.join(FORMATS)}",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    if format == "onnx":
        onnx_runtime()
    path = Path(path)
    model = copy.deepcopy(model).cpu().eval()
    images = _noise(shape) if images is None else images.cpu()
    program = exported_program(model, shape)
    about = metadata_of(model)
    if format == "onnx":
        content, named = _onnx(program, opset, about)
    else:
        content, named = pt2_content(program, about), None
    found: list[tuple[int, float]] = []

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)
        found.extend(_compare(model, open_exported(temporary, format), images))
        _refuse_mismatch(path, found)

    write_with(path, fill, need=len(content))
    errors = tuple(error for _, error in found)
    return Exported(path, format, len(content), max(errors), tuple(b for b, _ in found), named)


# -- making -------------------------------------------------------------------------------------


def exported_program(model: nn.Module, shape: Sequence[int]) -> torch.export.ExportedProgram:
    """The model as a graph with a free batch size, without the paths of this machine."""
    batch = torch.export.Dim("batch", min=1)
    try:
        # torch prints the graph that it could not finish
        with torch.no_grad(), redirect_stderr(io.StringIO()):
            program = torch.export.export(model, (_noise(shape)[:2],), dynamic_shapes=({0: batch},))
    except Exception as error:  # a user's forward decides what it raises
        raise _impossible(model, error) from error
    for graph_module in program.graph_module.modules():
        for node in graph_module.graph.nodes if hasattr(graph_module, "graph") else ():
            node.meta.pop("stack_trace", None)
    return program


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What a file says of the network in it: as JSON, how images are prepared, task and labels."""
    known, origin = trained_for(model), origin_of(model)
    found: dict[str, Any] = {
        "preprocessing": known.preprocessing and known.preprocessing.plain(),
        "task": known.task,
        "labels": list(known.labels) or None,
        "architecture": origin and origin.name,
    }
    found = {key: value for key, value in found.items() if value is not None}
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in found.items()}


def pt2_content(program: torch.export.ExportedProgram, about: Mapping[str, str]) -> bytes:
    """The file of a program, with texts about it beside."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={f"{k}.txt": v for k, v in about.items()})
    return buffer.getvalue()


def _onnx(
    program: torch.export.ExportedProgram, opset: int | None, about: Mapping[str, str]
) -> tuple[bytes, int]:
    """One file's content, weights included, and its opset."""
    onnx = importlib.import_module("onnx")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    if size > LARGEST_ONNX:
        raise InputError(
            f"the network is too large for one ONNX file: {size:,} bytes of weights",
            why=f"a protocol buffer holds {LARGEST_ONNX:,}",
            fix="--pt2 FILE",
            code="export",
        )
    try:
        with _quiet("torch.onnx", "onnxscript"):
            made = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=["images"], verbose=False
            )
        assert made is not None  # None is for a file name only
        proto = made.model_proto
        _name_batch(proto.graph)
        onnx.helper.set_model_props(proto, dict(about))
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the exporter and the checker have no common error
        raise _impossible(program, error) from error
    named = next(int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    if opset is not None and named != opset:
        raise InputError(
            f"ONNX opset {opset} was asked for, the exporter made {named}",
            why="some operator cannot be written in that opset",
            fix=f"--opset {named}",
            code="export",
        )
    return proto.SerializeToString(), named


def _name_batch(graph: Any) -> None:
    """Call the free size `batch`, in the place of the number that torch gives a symbol."""
    symbol = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", size.dim_param)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Their loggers print tracebacks of conversions that they then do another way."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _impossible(model: object, error: Exception) -> InputError:
    text = str(error).strip() or type(error).__name__
    if "data-dependent" in text:
        return InputError(
            f"{type(model).__name__} cannot be exported",
            why="its forward decides by the values of tensors (a detector: which boxes stay), "
            "which no graph can hold",
            fix="export the part before that: seprune.export_model("
            "seprune.load(DIR).backbone, (3, 320, 320), 'backbone.onnx')",
            code="export",
        )
    return InputError(
        f"{type(model).__name__} cannot be exported",
        why=shorten(text.splitlines()[0], 200),
        fix="check that its forward takes one batch of images of any size, and returns tensors",
        code="export",
    )


# -- checking -----------------------------------------------------------------------------------


def open_exported(path: Path, format: str) -> Run:
    """A file of one of `FORMATS`, as it will be run."""
    return open_onnx(path) if format == "onnx" else _open_pt2(path)


def open_onnx(file: Path | bytes) -> Run:
    """A file, or its content, in ONNX Runtime, with as many threads as torch has."""
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    given = file if isinstance(file, bytes) else str(file)
    session = runtime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(a) for a in session.run(None, {name: images.numpy()})]


def open_openvino(file: Path | bytes) -> Run:
    """An ONNX file, or its content, in OpenVINO, with as many threads as torch has."""
    content = file if isinstance(file, bytes) else file.read_bytes()
    inputs, call = openvino_call(content, torch.get_num_threads())
    name = inputs[0].any_name
    return lambda images: [torch.from_numpy(a) for a in call({name: images.numpy()})]


def _open_pt2(path: Path) -> Run:
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # operators of int8 files
    try:
        with _quiet("torch.export", "torch._export"), redirect_stderr(io.StringIO()):
            program = torch.export.load(io.BytesIO(path.read_bytes())).module()
    except Exception as error:  # names of layers that torch writes, and does not read again
        raise InputError(
            "the network cannot be exported: torch does not read again what it wrote",
            why=shorten(str(error) or type(error).__name__, 200),
            fix="give its layers names of letters, digits and _",
            code="export",
        ) from error
    return lambda images: tree_leaves(program(images))


def _compare(model: nn.Module, run: Run, images: Tensor) -> Iterator[tuple[int, float]]:
    """(batch size, largest relative difference); an output that is not there counts as infinite."""
    with torch.no_grad():
        for batch in sorted({1, min(2, len(images)), len(images)}):
            try:
                expected = tree_leaves(model(images[:batch]))
            except Exception as error:  # a graph may cast what its layers refuse
                raise _impossible(model, error) from error
            yield batch, difference(run(images[:batch]), expected)


def difference(answers: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest one, of the largest output expected; infinite where shapes differ."""
    same = [a.shape for a in answers] == [b.shape for b in expected]
    return max(map(_difference, answers, expected)) if same else float("inf")


def _difference(a: Tensor, b: Tensor) -> float:
    if not bool(b.isfinite().all()):
        return float("nan")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _refuse_mismatch(path: Path, found: Sequence[tuple[int, float]]) -> None:
    for batch, error in found:
        if not error <= TOLERANCE:
            raise InputError(
                f"{path}: not written, the exported network answers differently",
                why=f"at batch {batch} it is off by {error:.1e} of the largest output, "
                f"{TOLERANCE:g} is allowed",
                fix="check that the forward depends on nothing but its input, and that its "
                "outputs are finite",
                code="export-mismatch",
            )


def _noise(shape: Sequence[int]) -> Tensor:
    """Five images from a generator of their own."""
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))


def onnx_runtime() -> Any:
    """onnxruntime, if all that ONNX needs is installed."""
    return require(
        *("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        what="ONNX export needs packages that are not installed",
    )
