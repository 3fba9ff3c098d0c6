"""A single operator as an ONNX model that holds it several times."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from seprune.measure.work_items import Operator

SINK = 16  # channels of the layer that reads one position of a convolution's output
NODES = {"sigmoid": "Sigmoid", "hardsigmoid": "HardSigmoid", "hardswish": "HardSwish",
         "tanh": "Tanh", "gelu": "Tanh", "relu": "Relu", "hardtanh": "Clip",
         "pool": "GlobalAveragePool", "cat": "Concat"}  # fmt: skip


def operator_model(operator: Operator, batch: int, copies: int) -> bytes:
    """The model, serialized: copies stand side by side, or one behind the other where they would
    otherwise be merged."""
    builder = _GraphBuilder(batch)
    for copy in range(copies):
        if operator.kind == "conv":
            builder.convolution(operator, copy)
        elif operator.kind == "linear":
            x = builder.source("x", [batch, operator.inputs])
            weight = builder.weight(f"w{copy}", [operator.outputs, operator.inputs])
            builder.outputs.append(builder.node("Gemm", [x, weight], f"y{copy}", transB=1))
        elif operator.kind in ("pool", "cat"):
            x = builder.source(f"x{copy}", [batch, operator.inputs, *operator.size])
            more = {"axis": 0} if operator.kind == "cat" else {}
            builder.outputs.append(builder.node(NODES[operator.kind], [x], f"y{copy}", **more))
        else:
            builder.pointwise(operator, copy, last=copy == copies - 1)
    return builder.model()


class _GraphBuilder:
    def __init__(self, batch: int) -> None:
        self.batch = batch
        onnx = importlib.import_module("onnx")
        self.helper, self.float = onnx.helper, onnx.TensorProto.FLOAT
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: dict[str, list[int]] = {}
        self.outputs: list[str] = []

    def source(self, name: str, shape: list[int]) -> str:
        self.inputs[name] = shape
        return name

    def weight(self, name: str, shape: list[int]) -> str:
        values = torch.randn(shape).numpy().tobytes()
        self.weights.append(self.helper.make_tensor(name, self.float, shape, values, raw=True))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(self.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def convolution(self, operator: Operator, copy: int) -> None:
        """A convolution and a reader of one position, which keeps the output's layout."""
        x = self.source("x", [self.batch, operator.inputs, *operator.size])
        shape = [operator.outputs, operator.inputs // operator.groups, *operator.kernel]
        made = self.node(
            "Conv",
            [x, self.weight(f"w{copy}", shape)],
            f"c{copy}",
            kernel_shape=operator.kernel,
            strides=operator.stride,
            pads=operator.padding * 2,
            group=operator.groups,
        )
        if max(operator.size) > 1:
            weight = self.weight(f"s{copy}", [SINK, operator.outputs, 1, 1])
            made = self.node("Conv", [made, weight], f"y{copy}", kernel_shape=[1, 1],
                             strides=list(operator.size))  # fmt: skip
        self.outputs.append(made)

    def pointwise(self, operator: Operator, copy: int, *, last: bool) -> None:
        """One behind the other."""
        shape = [self.batch, operator.inputs, *operator.size]
        before = self.source("x", shape) if copy == 0 else f"y{copy - 1}"
        if operator.kind == "binary":
            self.node("Add", [before, "x"], f"y{copy}")
        elif operator.kind == "silu":
            gate = self.node("Sigmoid", [before], f"g{copy}")
            self.node("Mul", [before, gate], f"y{copy}")
        else:
            self.node(NODES[operator.kind], [before], f"y{copy}")
        if last:
            self.outputs.append(f"y{copy}")

    def model(self) -> bytes:
        info = self.helper.make_tensor_value_info
        inputs = [info(name, self.float, shape) for name, shape in self.inputs.items()]
        outputs = [info(name, self.float, None) for name in self.outputs]
        graph = self.helper.make_graph(self.nodes, "operator", inputs, outputs, self.weights)
        opset = self.helper.make_opsetid("", 18)
        made = self.helper.make_model(graph, opset_imports=[opset], ir_version=9)
        content: bytes = made.SerializeToString()
        return content
