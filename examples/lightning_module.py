"""fit, prune, fit: a LightningModule whose network becomes smaller in between.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from digits import loaders
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

import seprune


class Classifier(lightning.LightningModule):
    def __init__(self, lr: float = 5e-3) -> None:
        super().__init__()
        self.network = seprune.build("seprune/se_resnet8", classes=10)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.network.parameters(), self.lr)

    def prune(self, loader: DataLoader, macs: float) -> None:
        """Put a smaller network in the place of the own one; the next fit trains it."""
        self.network = seprune.compress(self.network, loader, macs=macs, device="cpu").model
        self.lr /= 5


def main(epochs: int = 4) -> dict[str, float]:
    lightning.seed_everything(0)
    train_loader, test_loader = loaders()
    module = Classifier()
    fit(module, train_loader, epochs)
    top1 = {"dense": seprune.evaluate(module.network, test_loader).top1}
    module.prune(train_loader, macs=0.5)
    top1["refitted"] = seprune.evaluate(module.network, test_loader).top1
    fit(module, train_loader, max(epochs // 2, 1))
    top1["tuned"] = seprune.evaluate(module.network, test_loader).top1
    print(top1)
    return top1


def fit(module: Classifier, loader: DataLoader, epochs: int) -> None:
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
