"""Read anybody's weights safely.

`sniff` says what a file is by its bytes; `archive` and `pickles` check a checkpoint before torch
sees it; `read` calls torch; `weights` takes one state dict out of it; `apply` puts that into a
model; `convert` is for pickled models whose author the user trusts.
"""

from seprune.checkpoint.apply import apply_weights, check_values
from seprune.checkpoint.convert import convert
from seprune.checkpoint.read import read_safetensors
from seprune.checkpoint.weights import Weights, is_pruned_folder, load_weights

__all__ = [
    "Weights",
    "apply_weights",
    "check_values",
    "convert",
    "is_pruned_folder",
    "load_weights",
    "read_safetensors",
]
