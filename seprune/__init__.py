"""seprune: prune Squeeze-and-Excitation networks by what their own gates say."""
