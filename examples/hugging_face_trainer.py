"""Hugging Face's Trainer before and after the cut; its datasets and arguments stay as they are.

pip install transformers
python examples/hugging_face_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from digits import loaders
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments

import seprune


class Named(nn.Module):
    """A network that takes its images by name and gives its loss, as those of transformers do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        loss = {} if labels is None else {"loss": F.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


class Items(Dataset):
    """Dicts with names, from a data set of tuples."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        image, label = self.pairs[row]
        return {"pixel_values": image, "labels": label}


def main(epochs: int = 4) -> dict[str, float]:
    torch.manual_seed(0)
    train, test = (Items(loader.dataset) for loader in loaders())
    model = Named(seprune.build("seprune/se_resnet8", classes=10))
    fit(model, train, epochs, 5e-3)
    test_loader, calibration = DataLoader(test, 256), DataLoader(train, 64)
    top1 = {"dense": seprune.evaluate(model, test_loader).top1}

    batch = {"pixel_values": train[0]["pixel_values"][None].repeat(2, 1, 1, 1)}
    structure = seprune.analyse(model, batch["pixel_values"])
    statistics = seprune.collect_statistics(model, calibration, structure=structure)
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    small = seprune.refit(model, seprune.prune(model, plan), plan, calibration).model
    top1["refitted"] = seprune.evaluate(small, test_loader).top1

    fit(small, train, max(epochs // 2, 1), 1e-3)
    top1["tuned"] = seprune.evaluate(small, test_loader).top1
    print(top1)
    return top1


def fit(model: nn.Module, data: Dataset, epochs: int, lr: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, learning_rate=lr, per_device_train_batch_size=64,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=0,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data).train()


if __name__ == "__main__":
    main()
