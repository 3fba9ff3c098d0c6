"""Recovery in closed form: layers that lost inputs are fitted to the dense parent, label-free."""

from seprune.recovery.refit.network import refit
from seprune.recovery.refit.options import RefitOptions, Refitted

__all__ = ["RefitOptions", "Refitted", "refit"]
