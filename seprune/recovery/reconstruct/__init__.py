"""Label-free recovery by gradients: the pruned network learns to give what its parent gives."""

from seprune.recovery.reconstruct.options import Reconstructed, ReconstructOptions
from seprune.recovery.reconstruct.run import reconstruct

__all__ = ["ReconstructOptions", "Reconstructed", "reconstruct"]
