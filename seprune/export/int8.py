"""ONNX files with 8-bit weights and activations, by ONNX Runtime's static quantisation."""

from __future__ import annotations

import importlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from seprune.errors import InputError, first_line
from seprune.export.onnx import onnx_runtime
from seprune.runtime.files import write_with

IMAGES = 512  # of the calibration set, whose smallest and largest activations give the scales


def int8_path(path: Path) -> Path:
    """`small.int8.onnx` for `small.onnx`, `small.int8.pt2` for `small.pt2`."""
    return path.with_name(f"{path.stem}.int8{path.suffix or '.onnx'}")


def quantize(source: Path, target: Path, batches: Iterable[Tensor]) -> int:
    """Write `source`, an ONNX file, as int8 to `target`; its bytes.

    Quantise and dequantise operators (QDQ) stand around every operator that has an 8-bit kernel;
    weights have a scale for each output channel, activations one for each tensor, from the smallest
    and the largest value over the calibration images. Metadata are those of `source`.

    Args:
        batches: calibration images (B, C, H, W), preprocessed.

    Raises:
        InputError: an operator that cannot be quantised.
        EnvironmentFault: the extra is missing, or `target` cannot be written.
    """
    onnx_runtime()
    quantization = importlib.import_module("onnxruntime.quantization")
    onnx = importlib.import_module("onnx")
    known = onnx.load(str(source), load_external_data=False)
    name = known.graph.input[0].name
    about = {p.key: p.value for p in known.metadata_props}

    class Batches(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]
        """The batches, as ONNX Runtime asks for them."""

        def __init__(self) -> None:
            self.rest: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {name: batch.cpu().numpy()}

    def fill(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as place:
            folded = Path(place) / "folded.onnx"
            quantization.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(folded),
                str(temporary),
                Batches(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        made = onnx.load(str(temporary))
        onnx.helper.set_model_props(made, {**about, "quantization": "int8 QDQ, per channel"})
        temporary.write_bytes(made.SerializeToString())

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises to do what has just been done
    try:
        write_with(target, fill)
    except OSError:
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{source}: cannot be quantised",
            why=f"{type(error).__name__}: {first_line(error)}",
            fix="leave out --int8, or export with another --opset",
            code="export",
        ) from error
    finally:
        logger.setLevel(level)
    return target.stat().st_size
