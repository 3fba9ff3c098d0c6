"""Batches of any structure: tuples, lists, dicts and their kin, dataclasses, or a bare tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError

TARGETS = ("labels", "label", "targets", "target", "masks", "mask", "y")  # keys of a dict batch
OUTPUTS = ("logits", "out", "output", "embeddings", "pooler_output")  # keys of a dict of outputs


def as_mapping(node: Any) -> Any:
    """A dataclass as a dict of its fields; anything else as it is."""
    if is_dataclass(node) and not isinstance(node, (type, Mapping)):
        return {part.name: getattr(node, part.name) for part in fields(node)}
    return node


def leaves(node: Any) -> Iterator[Tensor]:
    """All tensors, in order."""
    node = as_mapping(node)
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from leaves(value)
    elif isinstance(node, (tuple, list)):
        for value in node:
            yield from leaves(value)


def map_tensors(node: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same structure with every tensor changed; mappings become dicts."""
    if isinstance(node, Tensor):
        return change(node)
    if isinstance(node, Mapping):
        return {key: map_tensors(value, change) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return _like(node, [map_tensors(value, change) for value in node])
    if (parts := as_mapping(node)) is not node:
        return replace(node, **map_tensors(parts, change))
    return node


def to_device(node: Any, device: torch.device) -> Any:
    """Every tensor on `device`."""
    return map_tensors(node, lambda tensor: tensor.to(device, non_blocking=True))


def channels_last(tensor: Tensor) -> Tensor:
    """Images in that memory format; anything else as it is."""
    if tensor.dim() != 4:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def slice_batch(node: Any, index: slice, size: int) -> Any:
    """The samples at `index` of a batch of `size`; what is not per sample stays as it is."""
    if isinstance(node, Tensor):
        return node[index] if node.dim() and len(node) == size else node
    if isinstance(node, Mapping):
        return {key: slice_batch(value, index, size) for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        if len(node) == size and not any(isinstance(x, (Tensor, tuple, list)) for x in node):
            return node[index]  # names, dicts: one a sample
        return _like(node, [slice_batch(value, index, size) for value in node])
    if (parts := as_mapping(node)) is not node:
        return replace(node, **slice_batch(parts, index, size))
    return node


def call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The model's outputs.

    A single entry of a dict whose key is no parameter of the forward is given by position.
    """
    args, kwargs = _by_position(model, args, kwargs)
    return model(*args, **kwargs)


def positional(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The same arguments by position, for those who record a forward pass.

    Returns: a tuple; a bare tensor where it is the only argument.
    """
    args, kwargs = _by_position(model, args, kwargs)
    if kwargs:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
        last = max(list(bound.signature.parameters).index(name) for name in bound.arguments)
        bound.apply_defaults()
        args = bound.args[: last + 1]
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def primary(outputs: Any) -> Tensor:
    """The tensor that answers: the only or first one, or that called logits or out.

    Raises:
        InputError: there is no tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs := as_mapping(outputs), Mapping):
        named: list[Tensor] = [
            outputs[key] for key in OUTPUTS if isinstance(outputs.get(key), Tensor)
        ]
        if named:
            return named[0]
    elif isinstance(outputs, (tuple, list)) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    first = next((t for t in leaves(outputs) if t.is_floating_point()), None)
    if first is None:
        raise InputError(
            f"the model's output is a {type(outputs).__name__} without a tensor of numbers",
            why="a task needs a tensor to judge",
            fix="wrap the model so that it returns a tensor, or give FromCallables",
        )
    return first


def flatten_outputs(outputs: Any, size: int) -> Tensor:
    """All floating-point tensors of the outputs of `size` samples, side by side: (B, K).

    Raises:
        InputError: there are none, or one that does not divide into samples.
    """
    found = [t for t in leaves(outputs) if t.is_floating_point() and t.numel()]
    odd = [t for t in found if not t.dim() or len(t) % size]
    if not found or odd:
        shape = f"a tensor {tuple(odd[0].shape)}" if odd else f"{type(outputs).__name__} alone"
        raise InputError(
            f"the outputs of {size} samples hold {shape}",
            why="label-free derivatives project the outputs of each sample by itself",
            fix="give a task whose flat_outputs returns a tensor (B, K)",
        )
    flat = [t.reshape(size, -1) for t in found]
    return flat[0] if len(flat) == 1 else torch.cat(flat, 1)


def _by_position(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if len(kwargs) == 1 and not args:
        inner = getattr(model, "module", model)
        names = inspect.signature(inner.forward).parameters
        if next(iter(kwargs)) not in names:
            return tuple(kwargs.values()), {}
    return args, kwargs


def _like(node: Any, values: list[Any]) -> Any:
    if isinstance(node, list):
        return values
    return type(node)(*values) if hasattr(node, "_fields") else tuple(values)
