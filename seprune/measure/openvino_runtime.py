"""ONNX models in OpenVINO on the CPU (the extra `openvino`)."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from typing import Any

from seprune.runtime.extras import require

ARRAYS = Mapping[str, Any]


def require_openvino() -> None:
    """Refuse the runtime `openvino` where a package that it needs is missing.

    Raises:
        EnvironmentFault: names the extra and its pip line.
    """
    require(
        *("onnx", "onnxscript", "onnxruntime", "openvino"),
        extra="openvino",
        what="the runtime 'openvino' is not installed",
        otherwise="choose --runtime eager",
    )


def openvino_call(content: bytes, threads: int) -> tuple[Any, Callable[[ARRAYS], list[Any]]]:
    """The inputs of an ONNX model, and its call: arrays by the inputs' names -> its outputs.

    float32 throughout, one stream: where threads is 1 the calling thread does all the work.
    """
    require_openvino()
    openvino = importlib.import_module("openvino")
    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)
    request = compiled.create_infer_request()

    def call(feed: ARRAYS) -> list[Any]:
        found = request.infer(dict(feed))
        return [found[output].copy() for output in compiled.outputs]

    return compiled.inputs, call
