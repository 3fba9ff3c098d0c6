"""Networks by name: torchvision/NAME, timm/NAME, seprune/NAME, FILE.py:FUNCTION."""

from seprune.models.registry import NETWORKS, build, input_size, names

__all__ = ["NETWORKS", "build", "input_size", "names"]
