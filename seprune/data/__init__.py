"""Images and labels: what they are, how they are split, and the loaders that the stages iterate."""

from seprune.data.augment import Augment
from seprune.data.dataset import Data, DataInfo, DataSettings, in_turn, open_data
from seprune.data.loaders import Loader

__all__ = ["Augment", "Data", "DataInfo", "DataSettings", "Loader", "in_turn", "open_data"]
