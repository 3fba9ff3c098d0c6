"""Networks by name: torchvision/NAME, timm/NAME, seprune/NAME, FILE.py:FUNCTION."""

from seprune.models.loader import NO_CODE, ModelLoader, build
from seprune.models.origin import Origin, origin_of
from seprune.models.registry import NETWORKS, input_size, names

__all__ = [
    "NETWORKS",
    "NO_CODE",
    "ModelLoader",
    "Origin",
    "build",
    "input_size",
    "names",
    "origin_of",
]
