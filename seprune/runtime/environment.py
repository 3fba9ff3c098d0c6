"""What a run ran on: versions, devices, extras, free disk."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from seprune import __version__
from seprune.errors import first_line
from seprune.runtime.threads import usable_cores, used_threads

_PACKAGES = (
    *("torch", "torchvision", "torch-pruning", "accelerate", "safetensors", "numpy"),
    *("pillow", "pydantic", "ruamel.yaml", "filelock", "typer", "rich", "jinja2", "plotly"),
)
_EXTRAS = {
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "onnxruntime", "openvino"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
    "tasks": ("torchmetrics", "pycocotools"),
    "smp": ("segmentation-models-pytorch",),
}


def environment(folder: Path | None = None, *, devices: bool = True) -> dict[str, Any]:
    """Versions, devices, the torch and torchvision pair, extras, free disk in bytes.

    Args:
        folder: whose disk; default: the current one.
        devices: look at devices and the pair too, which imports torch.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {"seprune": __version__} | {name: _version(name) for name in _PACKAGES},
        "extras": {name: _extra(name) for name in _EXTRAS},
        "cpus": os.cpu_count(),
        "usable_cores": usable_cores(),
        "disk_free": shutil.disk_usage(folder or Path.cwd()).free,
    }
    if (threads := used_threads()) is not None:
        facts["threads"] = threads.plain()
    if devices:
        facts |= {"pair": _pair(), "devices": _devices()}
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(name: str) -> dict[str, Any]:
    versions = {package: _version(package) for package in _EXTRAS[name]}
    present = all(versions.values())
    install = None if present else f"pip install 'seprune[{name}]'"
    return {"present": present, "packages": versions, "install": install}


def _pair() -> dict[str, Any]:
    """Whether torch and torchvision, which are built for each other, were installed as a pair."""
    pair = {"torch": _version("torch"), "torchvision": _version("torchvision")}
    try:
        import torchvision  # noqa: F401 (its import is the test: it registers operators with torch)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        install = "pip install --upgrade --force-reinstall torch torchvision"
        reason = first_line(error)
        return {**pair, "fits": False, "reason": reason, "install": install}
    return {**pair, "fits": True, "reason": None, "install": None}


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except (ImportError, OSError):
        return []  # `pair` says why
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine()}
    ]
    found[0]["threads"] = torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory
        found.append({"device": f"cuda:{index}", "name": facts.name, "memory": memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Metal"})
    return found
