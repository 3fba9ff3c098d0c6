"""Where Python sees a tensor of the pass: what a module or function took or gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from seprune.graph.trace import Trace


@dataclass(frozen=True)
class Tap:
    """One place in every forward where a tensor can be read, and another put in its place.

    Attributes:
        kind: `output` or `input` of a module, result of a `function`, or `argument` of one.
        index: of the tensor among the module's inputs or outputs; of a function the how manieth
            call of that function in this call of the module.
        argument: which of the function's tensors.
        batch_dim: the dimension that counts samples.
    """

    module: str
    call: int
    kind: str  # "output" | "input" | "function" | "argument"
    index: int
    function: str = ""
    batch_dim: int = 0
    argument: int = 0


@dataclass(frozen=True)
class _Seen:
    """A tap, and the nodes [first, end) that read what it shows."""

    tap: Tap
    first: int
    end: int

    def serves(self, readers: Iterable[int]) -> bool:
        """Whether a tensor put in at the tap reaches all of these nodes."""
        return all(self.first <= reader < self.end for reader in readers)


_Table = dict[int, list[_Seen]]


class Taps:
    """The taps of a recorded pass: module outputs first, functions last, they cost most."""

    def __init__(self, trace: Trace) -> None:
        self.outputs: _Table = {}
        self.inputs: _Table = {}
        self.functions: _Table = {}
        self.written: _Table = {}  # results of in-place functions
        self.arguments: _Table = {}
        self.counts: dict[str, int] = {}  # calls of each module
        last = len(trace.nodes)
        for call in trace.calls:
            self.counts[call.module] = self.counts.get(call.module, 0) + 1
            for index, value in enumerate(call.outputs):
                tap = Tap(call.module, call.call, "output", index)
                self.outputs.setdefault(value, []).append(_Seen(tap, call.end_node, last))
            for index, value in enumerate(call.inputs if call.module else ()):
                tap = Tap(call.module, call.call, "input", index)
                seen = _Seen(tap, call.first_node, call.end_node)
                self.inputs.setdefault(value, []).append(seen)
        for made in trace.functions:
            table = self.functions if made.fresh else self.written
            tap = Tap(made.module, made.call, "function", made.index, made.function)
            if made.output >= 0:
                table.setdefault(made.output, []).append(_Seen(tap, made.end_node, last))
            for argument, value in enumerate(made.inputs):
                tap = Tap(made.module, made.call, "argument", made.index, made.function,
                          argument=argument)  # fmt: skip
                seen = _Seen(tap, made.first_node, made.end_node)
                self.arguments.setdefault(value, []).append(seen)

    def first(self, values: Iterable[int]) -> tuple[int, Tap] | None:
        """The best tap on any of `values`, and the value that it shows."""
        values = list(values)
        tables = (self.outputs, self.inputs, self.functions, self.written)
        return next(((v, t[v][0].tap) for t in tables for v in values if v in t), None)

    def before(self, uses: Sequence[tuple[int, int]]) -> tuple[int, Tap] | None:
        """The best tap on any of some values that its own reader comes after.

        Args:
            uses: (value, the node that has to see what is put in at the tap).
        """
        tables = (self.outputs, self.inputs, self.functions, self.written)
        for table in tables:
            for value, reader in uses:
                for seen in table.get(value, []):
                    if seen.serves([reader]):
                        return value, seen.tap
        return None

    def plain(self, value: int, readers: Sequence[int]) -> Tap | None:
        """The output of a module that runs once, all readers of which come after the module."""
        for seen in self.outputs.get(value, []):
            tap = seen.tap
            once = self.counts[tap.module] == 1 and tap.module != ""
            if once and tap.index == 0 and seen.serves(readers):
                return tap
        return None

    def ahead(self, value: int, readers: Sequence[int]) -> Tap | None:
        """A tap that shows a value to all of its readers."""
        tap = self.plain(value, readers)
        for table in () if tap else (self.outputs, self.inputs, self.functions):
            for seen in table.get(value, []):
                if seen.serves(readers) and (seen.tap.module or seen.tap.kind == "function"):
                    return seen.tap
        return tap

    def reading(self, value: int, node: int) -> list[tuple[Tap, int, int]]:
        """Taps that show a value on its way into one node, narrow ones first.

        Each comes with the range of nodes that see what is put in.
        """
        found = []
        for table in (self.inputs, self.arguments):
            seen = [s for s in table.get(value, []) if s.serves([node])]
            found += sorted(seen, key=lambda s: s.end - s.first)
        return [(s.tap, s.first, s.end) for s in found]
