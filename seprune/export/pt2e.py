"""torch.export files with 8-bit weights and activations: PyTorch's own quantisation (PT2E).

What `torchao` writes are operators that torch itself has, so the file needs torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError, first_line
from seprune.export.onnx import exported_program, metadata_of, pt2_content
from seprune.runtime.extras import require
from seprune.runtime.files import bytes_of, write_with

_ATEN = torch.ops.aten
_QUANTISED = (_ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default,
              _ATEN.conv2d.padding, _ATEN.linear.default)  # fmt: skip


def quantize_pt2(
    model: nn.Module, shape: Sequence[int], target: Path, batches: Iterable[Tensor]
) -> int:
    """Write `model` as an int8 torch.export file to `target`; its bytes.

    As in ONNX: convolutions and linear layers take 8-bit inputs, with one scale for each tensor
    from its smallest and largest value over the calibration images, and 8-bit weights, with a
    symmetric scale for each output channel. BatchNorm is folded into the convolution before it.

    Args:
        batches: calibration images (B, C, H, W), preprocessed.

    Raises:
        InputError: a network that cannot be exported or quantised.
        EnvironmentFault: the extra is missing, or `target` cannot be written.
    """
    what = "int8 files of torch.export need a package that is not installed"
    ao = require("torchao.quantization.pt2e.quantize_pt2e", extra="pt2e", what=what)
    model = copy.deepcopy(model).cpu().eval()
    program = exported_program(model, shape)
    try:
        prepared = ao.prepare_pt2e(program.module(), _quantizer(what))
        with torch.no_grad():
            for batch in batches:
                prepared(batch.cpu())
        made = ao.convert_pt2e(prepared)
        _drop_unused(made)
        content = pt2_content(
            exported_program(made, shape), {**metadata_of(model), "quantization": "int8 PT2E"}
        )
    except InputError:
        raise
    except Exception as error:  # the library has no common error
        raise InputError(
            f"{type(model).__name__}: cannot be quantised by torchao",
            why=f"{type(error).__name__}: {first_line(error)}",
            fix="--onnx FILE --int8, or leave out --int8",
            code="export",
        ) from error
    write_with(target, bytes_of(content), need=len(content))
    return len(content)


def _quantizer(what: str) -> Any:
    """Which tensors become 8-bit, and by what."""
    observers = require("torchao.quantization.pt2e", extra="pt2e", what=what)
    kinds = require("torchao.quantization.pt2e.quantizer", extra="pt2e", what=what)
    inputs = kinds.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=observers.MinMaxObserver,
    )
    weights = kinds.QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=observers.PerChannelMinMaxObserver,
    )

    class Layers(kinds.Quantizer):  # type: ignore[misc, name-defined]
        """Inputs and weights of convolutions and linear layers."""

        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                if node.op == "call_function" and node.target in _QUANTISED:
                    node.meta["quantization_annotation"] = kinds.QuantizationAnnotation(
                        input_qspec_map={node.args[0]: inputs, node.args[1]: weights},
                        _annotated=True,
                    )
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return Layers()


def _drop_unused(made: torch.fx.GraphModule) -> None:
    """Forget the float weights that 8-bit ones stand for, else both would be written."""
    used = {node.target for node in made.graph.nodes if node.op == "get_attr"}
    named = [name for name, _ in (*made.named_parameters(), *made.named_buffers())]
    for name in set(named) - used:
        owner, _, leaf = name.rpartition(".")
        delattr(made.get_submodule(owner), leaf)
