"""seprune's scores inside a pruner of torch-pruning, in two steps with the pruner's own loop.

python examples/torch_pruning_pruner.py
"""

from __future__ import annotations

import torch
import torch_pruning as tp
from digits import loaders
from plain_pytorch import train

import seprune


def main(epochs: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    train_loader, test_loader = loaders()
    model = seprune.build("seprune/se_resnet8", classes=10)
    train(model, train_loader, epochs, 5e-3)
    model.eval()
    top1 = {"dense": seprune.evaluate(model, test_loader).top1}

    images, _ = next(iter(train_loader))
    structure = seprune.analyse(model, images[:2])
    statistics = seprune.collect_statistics(model, train_loader, structure=structure)
    pruner = tp.pruner.BasePruner(
        model,
        images[:1],
        importance=seprune.GateImportance(statistics, structure=structure, model=model),
        pruning_ratio=0.3,
        iterative_steps=2,
        ignored_layers=[model.fc],
        # torch-pruning shares these default dicts between pruners: give each its own
        in_channel_groups={}, out_channel_groups={}, num_heads={}, pruning_ratio_dict={},
    )  # fmt: skip
    before = seprune.count(model, images[:1]).macs
    for _ in range(2):
        pruner.step()  # cuts the model in its place
        train(model, train_loader, max(epochs // 4, 1), 1e-3)
    top1["tuned"] = seprune.evaluate(model, test_loader).top1
    print(top1, before, seprune.count(model, images[:1]).macs)
    return top1


if __name__ == "__main__":
    main()
