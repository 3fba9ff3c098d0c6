"""Files, devices, processes, signals, locks: what the machine adds."""
