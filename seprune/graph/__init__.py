"""One recorded forward pass of a network, and what follows from it."""
