"""Repositories of a Hub in folders: a `config.json` and the weights of the network it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from seprune.runtime.files import write_json


def of_timm(_: object, folder: Path) -> Path:
    """Of timm."""
    import timm

    how = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "crop_pct": 0.9}
    args = {"output_stride": 32}
    network = timm.create_model("test_byobnet", num_classes=3, **args)
    return _repository(folder, network, {
        "architecture": "test_byobnet", "num_classes": 3, "model_args": args, "pretrained_cfg": how,
    })  # fmt: skip


def of_transformers(_: object, folder: Path) -> Path:
    """Of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "num_labels": 3}
    network = ResNetForImageClassification(ResNetConfig(**small))
    names = {"architectures": [type(network).__name__]}
    return _repository(folder, network, json.loads(network.config.to_json_string()) | names)


def _repository(folder: Path, network: torch.nn.Module, config: dict[str, Any]) -> Path:
    save_file(network.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder / "config.json"
