"""Networks by name: torchvision/NAME, timm/NAME, seprune/NAME, FILE.py:FUNCTION."""

from seprune.models.origin import Origin, origin_of
from seprune.models.registry import NETWORKS, build, input_size, names

__all__ = ["NETWORKS", "Origin", "build", "input_size", "names", "origin_of"]
