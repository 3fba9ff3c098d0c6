"""The table of operators: docs/operators.md says of each how its channels go on, or why they stay.

python benchmarks/operators.py      # write the table
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  # registers its operators

from seprune.graph.op_rules.registry import RULES
from seprune.graph.op_rules.whole import WHOLE
from seprune.runtime.files import write_text

TABLE = Path(__file__).parents[1] / "docs" / "operators.md"
_HEAD = """# Operators

A recorded pass consists of operators of `torch.ops.aten` and `torch.ops.torchvision`; functions of
`torch.nn.functional`, methods of tensors and modules are made of them. Each one has a rule that
says how channels go through it, or a reason why channels that meet it stay whole. A test compares
both lists with the installed torch and torchvision, and fails where an operator is in neither.

This page is written by `python benchmarks/operators.py`.
"""


def recorded() -> list[str]:
    """The operators that a recorded pass can show: no composites, which are made of others."""
    found = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        tensors = [*schema.arguments, *schema.returns]
        with_tensors = any("Tensor" in str(t.type) for t in tensors)
        into_out = any(a.is_out for a in schema.arguments)
        if (
            space in ("aten", "torchvision")
            and with_tensors
            and not into_out
            and _own_kernels(schema)
        ):
            found.add(name)
    return sorted(found)


def _own_kernels(schema: Any) -> bool:
    """Whether an operator has kernels of its own."""
    full = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    has = torch._C._dispatch_has_kernel(full)
    return bool(has) and not torch._C._dispatch_has_kernel_for_dispatch_key(
        full, "CompositeImplicitAutograd"
    )


def rule_of(name: str) -> Callable[..., None] | None:
    """What carries channels through an operator, as the walker finds it."""
    return RULES.get(name) or RULES.get(name.rstrip("_"))


def rendered() -> str:
    """The page."""
    by_rule: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        if name != "write_into_view":
            by_rule.setdefault(_says(rule), []).append(f"`{name}`")
    lines = [_HEAD, "## With a rule", "", "| what happens to channels | operators |", "|---|---|"]
    lines += [f"| {says} | {' '.join(sorted(names))} |" for says, names in sorted(by_rule.items())]
    lines += ["", "## Whole", "", "Names stand for in-place variants too; `*` for any letters.", ""]
    lines += ["| why | operators |", "|---|---|"]
    for reason, patterns in WHOLE.items():
        names = " ".join(f"`{p}`" for p in sorted(patterns.split()))
        lines.append(f"| {reason} | {names} |")
    return "\n".join([*lines, ""])


def _says(rule: Callable[..., None]) -> str:
    assert rule.__doc__, f"{rule.__name__} has no docstring"
    return rule.__doc__.splitlines()[0].removesuffix(".")


def idle_patterns() -> list[str]:
    """Patterns of reasons that fit no operator of the installed torch."""
    names = [n.rstrip("_") for n in recorded()]
    every = [p for patterns in WHOLE.values() for p in patterns.split()]
    return [p for p in every if not any(fnmatchcase(n, p) for n in names)]


if __name__ == "__main__":
    write_text(TABLE, rendered())
    print(f"{TABLE.name}: {len(RULES)} operators with a rule; idle: {idle_patterns()}")
