"""Train, prune, train on: a plain PyTorch loop around seprune.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import torch
from digits import loaders
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import seprune


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)  # anew: the parameters are others
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def main(epochs: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    train_loader, test_loader = loaders()
    model = seprune.build("seprune/se_resnet8", classes=10)  # any module with SE blocks
    train(model, train_loader, epochs, 5e-3)
    top1 = {"dense": seprune.evaluate(model, test_loader).top1}

    images, _ = next(iter(train_loader))
    structure = seprune.analyse(model, images[:2])
    statistics = seprune.collect_statistics(model, train_loader, structure=structure)
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    small = seprune.refit(model, seprune.prune(model, plan), plan, train_loader).model
    top1["refitted"] = seprune.evaluate(small, test_loader).top1

    train(small, train_loader, max(epochs // 2, 1), 1e-3)  # the same loop as before
    top1["tuned"] = seprune.evaluate(small, test_loader).top1
    print(top1, seprune.count(model, images[:1]).macs, seprune.count(small, images[:1]).macs)
    return top1


if __name__ == "__main__":
    main()
