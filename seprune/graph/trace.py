"""One forward pass recorded at operator level: what every tensor was made of, and where.

Gates, dependency groups and costs are all read off this record, so that nothing in seprune
depends on how a user spells a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from seprune.errors import InputError, first_line
from seprune.graph.function_calls import FunctionCall, FunctionRecorder
from seprune.runtime.inference import evaluating
from seprune.runtime.timeout import Deadline, at_most


@dataclass(frozen=True)
class Ref:
    """A tensor among an operator's arguments: the number of its `Value`."""

    value: int


@dataclass(frozen=True)
class Value:
    """One tensor of the pass. `name` is set for parameters and buffers, `node` for results."""

    id: int
    shape: tuple[int, ...]
    kind: str  # "input" | "parameter" | "buffer" | "constant" | "result"
    name: str = ""
    node: int = -1
    mask: bool = False  # of booleans: an index of several dimensions


@dataclass(frozen=True)
class Node:
    """One operator call inside the module `module` (its `call`-th call in this pass)."""

    id: int
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    module: str
    call: int
    macs: int = 0  # of the whole batch, as torch.utils.flop_counter counts them

    def inputs(self) -> list[int]:
        """Numbers of the values that the operator reads."""
        return list(self._inputs)

    @cached_property
    def _inputs(self) -> list[int]:
        return [a.value for a in tree_leaves((self.args, self.kwargs)) if isinstance(a, Ref)]


@dataclass(frozen=True)
class Call:
    """One call of a module: the values that went in and came out."""

    module: str
    call: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first_node: int
    end_node: int
    functions: Counter[str] = field(default_factory=Counter)  # torch's, called within


@dataclass
class Trace:
    """Everything recorded in one pass, in the order of execution."""

    batch: int = 1
    functions: list[FunctionCall] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: tuple[int, ...] = ()

    def consumers(self) -> dict[int, list[int]]:
        """For each value the nodes that read it."""
        readers: dict[int, list[int]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs()):
                readers.setdefault(value, []).append(node.id)
        return readers

    def shape(self, value: int) -> tuple[int, ...]:
        """The shape of a value."""
        return self.values[value].shape


def record(model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0) -> Trace:
    """Run `model` once in eval mode without gradients and record every operator.

    Args:
        inputs: one tensor, or a tuple of positional arguments.
        limit_seconds: of processor time; a pass that takes longer ends with an error that names
            the layer.

    Raises:
        InputError: the forward raises or does not end; names the layer.
    """
    _require_shapes(model)
    recorder = _Recorder(model, limit_seconds)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    with evaluating(model), recorder.hooked(), torch.no_grad():
        tensors = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
        for tensor in tensors:
            recorder.value(tensor, kind="input")
        recorder.trace.batch = _batch(arguments)
        try:
            with at_most(limit_seconds, recorder.late), recorder.functions, recorder:
                outputs = model(*arguments)
        except InputError:
            raise
        except Exception as error:  # whatever it is belongs in the message, not in a traceback
            where = recorder.where()
            raise InputError(
                f"the model's forward fails in layer '{where or type(model).__name__}'",
                why=f"{type(error).__name__}: {first_line(error)}",
                fix=_remedy(model),
                code="forward",
            ) from error
        recorder.trace.outputs = recorder.ids(_plain(outputs))
    return recorder.trace


def _require_shapes(model: nn.Module) -> None:
    lazy = next((name for name, p in model.named_parameters() if is_lazy(p)), None)
    if lazy is not None:
        raise InputError(
            f"the model's parameter '{lazy}' has no shape yet",
            why="a lazy module makes its parameters in its first forward",
            fix="run the model once on a batch where it is made",
            code="forward",
        )


def _remedy(model: nn.Module) -> str:
    """What to do about a forward that fails."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if kinds:
        found = ", ".join(sorted(map(str, kinds)))
        return f"make its weights float32 (some are {found}), as model.float() does"
    return "check the input shape (--input 3x224x224) and that the model takes one image"


@dataclass
class _Frame:
    module: str
    call: int
    inputs: tuple[int, ...]
    first_node: int
    functions: Counter[str] = field(default_factory=Counter)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, limit_seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.model = model
        self.known: MutableMapping[Tensor, int] = WeakIdKeyDictionary()
        self.names = {id(t): (n, "parameter") for n, t in model.named_parameters()}
        self.names |= {id(t): (n, "buffer") for n, t in model.named_buffers()}
        self.stack: list[_Frame] = []
        self.functions = FunctionRecorder(self)
        self.counts: dict[str, int] = {}
        self.limit_seconds = limit_seconds
        self.deadline = Deadline(limit_seconds)

    def value(self, tensor: Tensor, *, kind: str = "constant", node: int = -1) -> int:
        name = ""
        if kind == "constant" and id(tensor) in self.names:
            name, kind = self.names[id(tensor)]
        number = len(self.trace.values)
        mask = tensor.dtype in (torch.bool, torch.uint8)
        self.trace.values.append(Value(number, tuple(tensor.shape), kind, name, node, mask))
        self.known[tensor] = number
        return number

    def id(self, tensor: Tensor) -> int:
        found = self.known.get(tensor)
        return self.value(tensor) if found is None else found

    def ids(self, tree: Any) -> tuple[int, ...]:
        return tuple(self.id(t) for t in tree_leaves(tree) if isinstance(t, Tensor))

    def ref(self, argument: Any) -> Any:
        return Ref(self.id(argument)) if isinstance(argument, Tensor) else argument

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.check_time()
        with torch._C.DisableTorchFunction():
            return self.note(func, args, kwargs or {})

    def note(self, func: Any, args: Any, kwargs: Any) -> Any:
        refs, op = tree_map(self.ref, (args, kwargs)), str(func)
        if op.startswith("aten.as_strided") and _same_elements(*args):
            refs, op = ((refs[0][0],), {}), "aten.alias.default"
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        outputs = self.node(op, refs, made, _macs(func, args, kwargs, result))
        self.write_through(args, outputs)
        return result

    def node(self, op: str, inputs: Any, made: list[Tensor], macs: int = 0) -> tuple[int, ...]:
        number, (module, call) = len(self.trace.nodes), self.frame()
        outputs = tuple(self.value(t, kind="result", node=number) for t in made)
        args, kwargs = inputs
        self.trace.nodes.append(Node(number, op, tuple(args), kwargs, outputs, module, call, macs))
        return outputs

    def write_through(self, args: Any, outputs: tuple[int, ...]) -> None:
        """An in-place write into a view changes the tensor it looks into as well."""
        if not outputs or not args or not isinstance(args[0], Tensor) or not args[0]._is_view():
            return
        base = args[0]._base
        if self.known.get(args[0]) == outputs[0] and base is not None:
            self.node(
                "seprune.write_into_view", ((Ref(self.id(base)), Ref(outputs[0])), {}), [base]
            )

    def frame(self) -> tuple[str, int]:
        return (self.stack[-1].module, self.stack[-1].call) if self.stack else ("", 0)

    def where(self) -> str:
        return self.frame()[0]

    def check_time(self) -> None:
        if self.deadline.left() <= 0:
            raise self.late()

    def late(self) -> InputError:
        where = self.where()
        return InputError(
            f"the forward pass did not end within {self.limit_seconds:g} s",
            why=f"it was in layer '{where or type(self.model).__name__}'",
            fix="use a smaller input (--input) or leave the model as it is",
            code="trace-timeout",
        )

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                    enter, leave = self._enter(name), self._leave(name)
                    handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                    handles.append(module.register_forward_hook(leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            call = self.counts.get(name, 0)
            self.counts[name] = call + 1
            with torch._C.DisableTorchFunction():
                inputs = self.ids((args, kwargs))
            self.stack.append(_Frame(name, call, inputs, len(self.trace.nodes)))

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # a forward that raised leaves its frame: it names the layer, unless its caller went on
            while (frame := self.stack.pop()).module != name:
                pass
            end = len(self.trace.nodes)
            with torch._C.DisableTorchFunction():
                outputs = self.ids(output)
            places = frame.first_node, end
            self.trace.calls.append(
                Call(frame.module, frame.call, frame.inputs, outputs, *places, frame.functions)
            )

        return hook


def _batch(arguments: tuple[Any, ...]) -> int:
    """Samples in the first argument that has any: a batch, or a list of single images."""
    for given in arguments:
        if isinstance(given, (list, tuple)):
            return len(given)
        if isinstance(given, Tensor) and given.dim() > 1:
            return given.shape[0]
    return 1


def _same_elements(
    tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> bool:
    """Whether other strides leave every element where it was, as pools of channels-last maps do."""
    known = zip(size, stride, tensor.stride(), strict=True) if len(size) == tensor.dim() else ()
    return (
        tuple(size) == tuple(tensor.shape)
        and offset in (None, tensor.storage_offset())
        and all(new == old for length, new, old in known if length > 1)
    )


def _macs(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) // 2 if formula else 0


def _plain(tree: Any) -> Any:
    """Output classes of model zoos (dataclasses, mappings) as containers that pytree walks."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, dict):
        return list(tree.values())
    if hasattr(tree, "__dataclass_fields__"):
        return [getattr(tree, name) for name in tree.__dataclass_fields__]
    if isinstance(tree, (list, tuple)):
        return [_plain(item) for item in tree]
    return tree
