"""Cut networks as ONNX, made of the file of the dense one: exporting each would take seconds.

The exporter folds BatchNorm into convolutions. So the weights of the file go into a copy of the
network, plans are carried out on that copy, and what it then holds goes back into the file.
"""

from __future__ import annotations

import ast
import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seprune.export.onnx import TOLERANCE, Run, difference, export_model, open_onnx
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.runtime.text import within

_LAYERS = ("Conv", "Gemm")
_SCOPES = "pkg.torch.onnx.name_scopes"


class ExportedParent:
    """The ONNX file of a network, and the files of its plans."""

    def __init__(
        self, model: nn.Module, content: bytes, open_model: Callable[[bytes], Run] = open_onnx
    ) -> None:
        self.open_model = open_model
        self.onnx = importlib.import_module("onnx")
        self.proto = self.onnx.load_from_string(content)
        self.model = copy.deepcopy(model)
        arrays = {i.name: self.onnx.numpy_helper.to_array(i) for i in self.proto.graph.initializer}
        for module, _, names in self.layers(self.model):
            tensors = [torch.from_numpy(arrays[name].copy()) for name in names]
            module.weight = nn.Parameter(tensors[0])
            module.bias = nn.Parameter(tensors[1]) if len(tensors) > 1 else None

    @classmethod
    def of(
        cls, model: nn.Module, shape: Sequence[int], open_model: Callable[[bytes], Run] = open_onnx
    ) -> ExportedParent:
        """The network, exported now; `open_model` is the runtime that its files are for."""
        with tempfile.TemporaryDirectory(prefix="seprune-") as folder:
            path = export_model(model, shape, Path(folder) / "network.onnx").path
            return cls(model, path.read_bytes(), open_model)

    def dense(self) -> Run:
        """The network itself in the runtime."""
        return self.open_model(self.proto.SerializeToString())

    def cut(self, plan: PruningPlan, small: nn.Module, images: Tensor) -> Run | None:
        """The plan's network in the runtime, if it answers as `small`, the same in eager PyTorch.

        It does not where a width of the parent stands elsewhere in the graph.
        """
        with torch.no_grad():
            expected = tree_leaves(small(images))
        with suppress(Exception):  # whatever a runtime raises where shapes do not fit
            run = self.open_model(self.content(plan))
            if difference(run(images), expected) <= TOLERANCE:
                return run
        return None

    def layers(self, model: nn.Module) -> Iterator[tuple[Any, Any, list[str]]]:
        """Layers of `model` that stand in the file under their names: module, node, tensors."""
        modules = dict(model.named_modules())
        known = {i.name for i in self.proto.graph.initializer}
        for node in self.proto.graph.node:
            names = [name for name in node.input[1:] if name in known]
            module = modules.get(names[0].removesuffix(".weight")) if names else None
            if node.op_type in _LAYERS and isinstance(module, nn.Conv2d | nn.Linear):
                yield module, node, names

    def content(self, plan: PruningPlan) -> bytes:
        """The file of the plan's network."""
        small = prune(self.model, plan)
        proto = copy.deepcopy(self.proto)
        for module in plan.removed.modules:
            self.take_out(proto, module)
        held = {i.name: i for i in proto.graph.initializer}
        groups = {names[0]: getattr(module, "groups", 1) for module, _, names in self.layers(small)}
        for module, _, names in self.layers(small):
            for name, tensor in zip(names, (module.weight, module.bias)):
                held[name].CopyFrom(self.tensor(name, tensor))
        for node in proto.graph.node:
            for attribute in node.attribute if node.op_type == "Conv" else ():
                if attribute.name == "group":
                    attribute.i = groups.get(node.input[1], attribute.i)
            if node.op_type == "Reshape" and self.without_width(held.get(node.input[1])):
                del node.attribute[:]  # allowzero
        del proto.graph.value_info[:]
        content: bytes = proto.SerializeToString()
        return content

    def take_out(self, proto: Any, module: str) -> None:
        """Let what reads the output of a module read its input."""
        nodes = proto.graph.node
        inside = [node for node in nodes if any(within(s, module) for s in _scopes(node))]
        made = {name for node in inside for name in node.output}
        known = {i.name for i in proto.graph.initializer}
        read = {name for node in inside for name in node.input} - made - known
        after = [node for node in nodes if node not in inside]
        used = made & {name for node in after for name in node.input}
        (given,), (output,) = read, used  # another number of them: not a module of this kind
        for node in after:
            node.input[:] = [given if name == output else name for name in node.input]
        for node in inside:
            nodes.remove(node)

    def tensor(self, name: str, values: Tensor) -> Any:
        """A tensor as the file holds it."""
        return self.onnx.numpy_helper.from_array(values.detach().contiguous().numpy(), name)

    def without_width(self, shape: Any) -> bool:
        """Turn (-1, channels, ...), as `flatten(1)` and `view(b, c, 1, 1)` are exported, into
        (0, -1, ...): the batch as it is, and no width. False where there is none."""
        sizes = [] if shape is None else self.onnx.numpy_helper.to_array(shape).reshape(-1).tolist()
        if sizes[:1] in ([-1], [0]) and len(sizes) > 1:
            shape.CopyFrom(self.tensor(shape.name, torch.tensor([0, -1, *sizes[2:]])))
            return True
        return False


def _scopes(node: Any) -> list[str]:
    """The modules in which the exporter found a node, from the outermost on."""
    texts = [p.value for p in node.metadata_props if p.key == _SCOPES]
    found: list[str] = ast.literal_eval(texts[0])[:-1] if texts else []
    return found
