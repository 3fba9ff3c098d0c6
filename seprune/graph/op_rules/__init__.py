"""How every operator carries channel identity: one small function per kind of operator."""

from seprune.graph.op_rules.registry import assign_channel_ids

__all__ = ["assign_channel_ids"]
