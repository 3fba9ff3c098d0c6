"""What a network is worth and what it costs: metrics, MACs, milliseconds."""
