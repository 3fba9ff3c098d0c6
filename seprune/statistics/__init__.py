"""What the gates of a model do on the calibration set.

`columns` says which number belongs to which channel, `accumulate` keeps the sums, `gate_gradients`
takes derivatives, `collect` runs the model, `stored` writes and reads files.
"""

from seprune.statistics.collect import collect_statistics
from seprune.statistics.options import CollectOptions
from seprune.statistics.result import GateStatistics, fingerprint

__all__ = ["CollectOptions", "GateStatistics", "collect_statistics", "fingerprint"]
