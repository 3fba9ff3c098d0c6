"""Calls of torch functions in Python code, numbered so that `hooks` and `sizes` meet them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class FunctionCall:
    """The `index`-th call of the torch function `function` inside one call of a module.

    `output` is -1 where it is not a tensor (a split). `fresh` tells a result that is a new tensor
    from one that was handed in (in-place functions). The operators of the call are the nodes
    [first_node, end_node); `inputs` are its tensors, `arguments` what it was given by position,
    with `Ref` for tensors, and `dims` the dimensions of the first.
    """

    module: str
    call: int
    function: str
    index: int
    output: int
    fresh: bool
    inputs: tuple[int, ...] = ()
    first_node: int = 0
    end_node: int = 0
    arguments: tuple[Any, ...] = ()
    dims: int = 0


def function_name(func: Any) -> str:
    """What a torch function mode calls `func`."""
    return str(getattr(func, "__name__", func))


class FunctionRecorder(TorchFunctionMode):
    """Numbers the torch functions that Python code calls, as `watch` will see them again."""

    def __init__(self, recorder: Any) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, inputs = len(self.recorder.trace.nodes), self.recorder.ids((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if not self.recorder.stack:
            return result
        name, nodes = function_name(func), self.recorder.trace.nodes
        for frame in self.recorder.stack:
            frame.functions[name] += 1
        single = isinstance(result, Tensor)
        if single or len(nodes) > first:
            last = self.recorder.stack[-1]
            given = tree_leaves((args, kwargs))
            self.recorder.trace.functions.append(
                FunctionCall(
                    last.module,
                    last.call,
                    name,
                    last.functions[name],
                    self.recorder.id(result) if single else -1,
                    fresh=not any(result is a for a in given),
                    inputs=inputs,
                    first_node=first,
                    end_node=len(nodes),
                    arguments=tuple(self.plain(a) for a in args),
                    dims=args[0].dim() if args and isinstance(args[0], Tensor) else 0,
                )
            )
        return result

    def plain(self, argument: Any) -> Any:
        """An argument with `Ref` for tensors, also in a list."""
        listed = isinstance(argument, (list, tuple))
        return tuple(map(self.recorder.ref, argument)) if listed else self.recorder.ref(argument)
