"""Where Python sees a tensor of the pass: what a module took or gave, or a function's result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from seprune.graph.trace import Trace


@dataclass(frozen=True)
class Tap:
    """One place in every forward where a tensor can be read.

    Attributes:
        index: of the tensor among the module's inputs or outputs; of a function the how manieth
            call of that function in this call of the module.
        batch_dim: the dimension that counts samples.
    """

    module: str
    call: int
    kind: str  # "output" | "input" | "function"
    index: int
    function: str = ""
    batch_dim: int = 0


class Taps:
    """The taps of a recorded pass: module outputs first, functions last, they cost most."""

    def __init__(self, trace: Trace) -> None:
        outputs: dict[int, Tap] = {}
        inputs: dict[int, Tap] = {}
        functions: dict[int, Tap] = {}
        written: dict[int, Tap] = {}  # results of in-place functions
        for call in trace.calls:
            for index, value in enumerate(call.outputs):
                outputs.setdefault(value, Tap(call.module, call.call, "output", index))
            for index, value in enumerate(call.inputs if call.module else ()):
                inputs.setdefault(value, Tap(call.module, call.call, "input", index))
        for made in trace.functions:
            kind = functions if made.fresh else written
            tap = Tap(made.module, made.call, "function", made.index, made.function)
            kind.setdefault(made.output, tap)
        self.kinds = (outputs, inputs, functions, written)

    def first(self, values: Iterable[int]) -> tuple[int, Tap] | None:
        """The best tap on any of `values`, and the value that it shows."""
        values = list(values)
        return next(((v, kind[v]) for kind in self.kinds for v in values if v in kind), None)
