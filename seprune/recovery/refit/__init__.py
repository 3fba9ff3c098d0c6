"""Recovery in closed form: layers that lost inputs are fitted to the dense parent, label-free."""

from seprune.recovery.refit.network import RefitOptions, Refitted, refit

__all__ = ["RefitOptions", "Refitted", "refit"]
