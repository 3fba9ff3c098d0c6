"""The digits that ship with seprune as ordinary PyTorch loaders."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader, TensorDataset

import seprune


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """(images (B, 1, 8, 8), labels (B,)) to train and to test on."""
    settings = seprune.DataSettings(augment="none", workers=0, validation=0)
    data = seprune.open_data("digits", settings)
    sets = []
    for part in (data.calibration(10_000), data.reporting()):
        images, labels = zip(*part)
        sets.append(TensorDataset(torch.cat(images), torch.cat(labels)))
    train, test = sets
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 256)
