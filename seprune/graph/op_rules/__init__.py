"""How every operator carries channel identity: one small function per kind of operator."""

from seprune.graph.op_rules.registry import label

__all__ = ["label"]
