"""Time of one operator on one runtime: eager PyTorch on any device, or ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from seprune.measure.latency import undisturbed_clock
from seprune.measure.operator_model import operator_model
from seprune.measure.work_items import Operator
from seprune.runtime.extras import require

Call = Callable[[], Any]
ENOUGH_SECONDS = 0.004  # of repeated calls; slow operators run `FEWEST` times
FEWEST, MOST = 3, 50
COPIES = 3  # of an operator in an ONNX Runtime session; more take longer and tell no more


class EagerTimer:
    """Milliseconds of an operator in eager PyTorch; on CUDA by events around many calls."""

    def __init__(self, batch: int, device: str = "cpu") -> None:
        self.batch, self.device = batch, torch.device(device)

    def __call__(self, operator: Operator) -> float:
        """The shortest of the repeated calls (CPU), or their mean (CUDA)."""
        with torch.no_grad():
            call = self.prepared(operator)
            if self.device.type == "cuda":
                return _on_cuda(call)
            return shortest(call, undisturbed_clock("cpu"))

    def prepared(self, operator: Operator) -> Call:
        """The operator with random operands."""
        x = torch.randn(self.batch, operator.inputs, *operator.size, device=self.device)
        kind, outputs = operator.kind, operator.outputs
        if kind == "conv":
            shape = (outputs, operator.inputs // operator.groups, *operator.kernel)
            weight = torch.randn(shape, device=self.device)
            rest = (None, operator.stride, operator.padding, 1, operator.groups)
            return lambda: functional.conv2d(x, weight, *rest)
        if kind == "linear":
            weight = torch.randn(outputs, operator.inputs, device=self.device)
            flat = x.flatten(1)
            return lambda: functional.linear(flat, weight)
        if kind == "norm":
            ones = torch.ones(operator.inputs, device=self.device)
            return lambda: functional.batch_norm(x, ones, ones, ones, ones)
        if kind == "binary":
            return lambda: x + x
        if kind == "pool":
            return lambda: x.mean((2, 3))
        if kind == "cat":
            half = x[:, : max(1, operator.inputs // 2)]
            return lambda: torch.cat([half, half], 1)
        function: Callable[..., Any] = getattr(torch, kind, None) or getattr(functional, kind)
        return lambda: function(x)


class OnnxTimer:
    """Milliseconds of an operator inside an ONNX Runtime session on the CPU.

    An operator alone in a session would count what a network pays once: the call itself, and the
    change of the memory layout at the borders. So the time is the difference between a session
    with several copies and one with a single copy.

    BatchNorm and activations behind a convolution are fused into it there: they count nothing,
    but `hardswish`, `silu` and `gelu`, which ONNX Runtime does not fuse.
    """

    FUSED = ("norm", "relu", "hardtanh")

    def __init__(self, batch: int, threads: int) -> None:
        self.batch, self.threads = batch, threads
        require_onnx()
        self.runtime = importlib.import_module("onnxruntime")

    def __call__(self, operator: Operator) -> float:
        """The difference of the shortest calls, for one copy; 0 for what is fused."""
        if operator.kind in self.FUSED:
            return 0.0
        one, several = (self.call(operator, copies) for copies in (1, COPIES))
        return max(0.0, difference(one, several, undisturbed_clock("cpu"))) / (COPIES - 1)

    def call(self, operator: Operator, copies: int) -> Call:
        """A session of so many copies on random operands."""
        options = self.runtime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 3
        session = self.runtime.InferenceSession(
            operator_model(operator, self.batch, copies),
            options,
            providers=["CPUExecutionProvider"],
        )
        feed = {
            i.name: torch.randn([int(n) for n in i.shape]).numpy() for i in session.get_inputs()
        }
        return lambda: session.run(None, feed)


def require_onnx() -> None:
    """Refuse the runtime `onnx` where a package that it needs is missing.

    Raises:
        EnvironmentFault: names the extra and its pip line.
    """
    require(
        *("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        what="the runtime 'onnx' is not installed",
        otherwise="choose --runtime eager",
    )


def shortest(call: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of the shortest call after one to warm up: other processes only add time."""
    call()
    best, spent, calls = float("inf"), 0.0, 0
    while calls < FEWEST or (spent < ENOUGH_SECONDS and calls < MOST):
        began = clock()
        call()
        taken = clock() - began
        best, spent, calls = min(best, taken), spent + taken, calls + 1
    return best * 1e3


def difference(one: Call, several: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds by which the shortest call of `several` is longer; both take turns."""
    best = [float("inf")] * 2
    one(), several()
    spent, rounds = 0.0, 0
    while rounds < FEWEST or (spent < ENOUGH_SECONDS and rounds < MOST):
        for place, call in enumerate((one, several)):
            began = clock()
            call()
            taken = clock() - began
            best[place], spent = min(best[place], taken), spent + taken
        rounds += 1
    return (best[1] - best[0]) * 1e3


def _on_cuda(call: Call) -> float:
    for _ in range(FEWEST):
        call()
    event: Any = torch.cuda.Event  # which has no types
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    for _ in range(MOST):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / MOST
