"""A pretended GPU: values stay on the CPU, devices are as if they were on `cuda:0`.

Tensors remember where they would be (their storage does), every torch function is checked as a GPU
would check it: all tensors on one device, but for CPU scalars and CPU indices; random numbers of a
GPU by a generator of the GPU; no numpy. Unlike torch's FakeTensorMode the values are there, so
that stages which turn numbers into decisions run to their ends. What C++ makes inside a function
(gradients, the steps of an operator) has no place of its own: it counts as being where the last
function was, and mixes with everything.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
_MOVES = {
    "to", "cuda", "cpu", "copy_", "__set__", "type_as", "set_", "_has_compatible_shallow_copy_type",
}  # fmt: skip
_INDEXED = {"__getitem__", "__setitem__", "index_put_", "index_put"}
_VALUES = {"numpy", "__array__"}


class MixedDevices(RuntimeError):
    """What a GPU would have refused."""


class PretendCuda(TorchFunctionMode):
    """Torch functions while a GPU is pretended; `moves` counts what was put on it."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, tuple[StorageWeakRef, torch.device]] = {}
        self.moves, self.latest = 0, CPU

    def known(self, tensor: Tensor) -> torch.device | None:
        """Where a tensor pretends to be, if it was seen before."""
        found = self.places.get(tensor.untyped_storage()._cdata)
        return found[1] if found else None

    def of(self, tensor: Tensor) -> torch.device:
        """Where a tensor pretends to be, or where the last function was."""
        return self.known(tensor) or self.latest

    def at_home(self, *models: nn.Module) -> None:
        """Networks made before the pretence are on the CPU."""
        for model in models:
            for tensor in (*model.parameters(), *model.buffers()):
                self.put(tensor.detach(), CPU)

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        self.moves += device.type == "cuda"
        self.places[storage._cdata] = (StorageWeakRef(storage), device)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is Tensor.device:  # type: ignore[comparison-overlap]
            return self.of(args[0])
        if name == "__get__" and owner is Tensor.is_cuda:  # type: ignore[comparison-overlap]
            return self.of(args[0]).type == "cuda"
        if name in ("_parse_to", "device"):  # a device is read, nothing is moved
            return func(*args, **kwargs)
        if name == "backward":
            return self.backward(*args, **kwargs)
        if name in _VALUES and self.of(args[0]).type == "cuda":
            raise MixedDevices("can't convert cuda:0 device type tensor to numpy")
        asked = self.asked(name, args, kwargs)
        copies = name in ("as_tensor", "asarray") and isinstance(args[0], Tensor) and asked
        if name in ("to", "cuda", "cpu") or copies:
            return self.moved(func, args, kwargs, asked)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        place = self.place(name, args, given) if name not in _MOVES else CPU
        made = func(*_on_cpu(args), **_on_cpu(kwargs))
        self.keep(name, args, made, asked or place)
        return made

    def asked(self, name: str, args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that a call names, as an argument or, moving, as a position."""
        named = kwargs.get("device")
        if name in ("cuda", "cpu"):
            return GPU if name == "cuda" else CPU
        if name == "to" and named is None:
            other = [a for a in args[1:] if isinstance(a, (torch.device, str, Tensor))]
            named = other[0] if other else None
        if isinstance(named, Tensor):
            return self.of(named)
        if named is None:
            return None
        device = torch.device(named)
        device = GPU if device.type == "cuda" else device
        random = kwargs.get("generator")
        if random is not None and random.device.type != device.type:
            raise MixedDevices(f"{name}: a generator on {random.device} for a tensor on {device}")
        return device

    def moved(
        self, func: Any, args: Any, kwargs: dict[str, Any], asked: torch.device | None
    ) -> Tensor:
        """The tensor elsewhere: another storage, as if it had been copied."""
        source = args[0]
        target = asked or self.of(source)
        made: Tensor = func(*_on_cpu(args), **_on_cpu(kwargs))
        if target != self.of(source) and made.data_ptr() == source.data_ptr():
            made = made.clone()
        if made is not source:
            self.put(made, target)
        return made

    def place(self, name: str, args: Any, given: list[Tensor]) -> torch.device | None:
        """The device of a call's tensors; None where none of them was seen before.

        Raises:
            MixedDevices: they are on several.
        """
        if name in _INDEXED and args and isinstance(args[0], Tensor):
            own = self.of(args[0])
            others = [t for t in given if self.of(t) != own and t.dim()]
            if own.type == "cuda" and all(not t.is_floating_point() for t in others):
                return own
        known = [(t, place) for t in given if (place := self.known(t)) is not None]
        large = {place for t, place in known if t.dim() or place.type == "cuda"}
        if len(large) > 1:
            shown = ", ".join(f"{tuple(t.shape)} on {place}" for t, place in known)
            raise MixedDevices(f"{name}: expected all tensors on one device, got {shown}")
        if large:
            self.latest = next(iter(large))
        return (self.latest if large else CPU) if known or not given else None

    def keep(self, name: str, args: Any, made: Any, place: torch.device | None) -> None:
        """Remember where the results are; views and results in place are where they were."""
        if name == "__get__" and args and isinstance(args[0], Tensor):
            place = self.known(args[0])  # .grad, .data, .T
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and place is not None and self.known(leaf) is None:
                self.put(leaf, place)

    def backward(self, tensors: Any, gradients: Any = None, *rest: Any, **options: Any) -> None:
        """With the pretence in hooks too."""
        assert not rest
        assert not options.keys() - {"retain_graph", "create_graph", "inputs", "gradient"}
        gradients = options.get("gradient", gradients)
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = (gradients,) if isinstance(gradients, Tensor) else gradients
        with self:
            torch.autograd.graph._engine_run_backward(  # `torch.autograd.backward` would come here
                roots,
                given or tuple(torch.ones_like(root) for root in roots),
                bool(options.get("retain_graph") or options.get("create_graph")),
                bool(options.get("create_graph")),
                tuple(options.get("inputs") or ()),
                allow_unreachable=True,
                accumulate_grad=True,
            )


def _on_cpu(value: Any) -> Any:
    def real(leaf: Any) -> Any:
        if isinstance(leaf, torch.device) and leaf.type == "cuda":
            return CPU
        return "cpu" if isinstance(leaf, str) and leaf.startswith("cuda") else leaf

    return tree_map(real, value)


@contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """A machine that says it has one GPU."""
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "memory_reserved": 0,
        "memory_allocated": 0, "mem_get_info": (1 << 33, 1 << 33), "empty_cache": None,
        "synchronize": None, "set_device": None, "is_current_stream_capturing": False,
        "is_bf16_supported": True, "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
        "manual_seed_all": None,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    health = "_accelerator_graph_capture_health_check"  # it asks the driver
    monkeypatch.setattr(torch.optim.Optimizer, health, lambda _: None, raising=False)
    mode, alone = PretendCuda(), threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with mode:  # modes are those of one thread
            alone(thread)

    monkeypatch.setattr(threading.Thread, "run", run)
    with mode:
        yield mode
