"""The state of one training: weights, optimizer, weight average; steps and snapshots of it."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seprune.errors import EnvironmentFault, InputError, UsageError, first_line
from seprune.measure.metrics import logits_of
from seprune.recovery.finetune.checkpoints import optimizer_state, start_again
from seprune.recovery.finetune.features import Features, Teacher, shared_features
from seprune.recovery.finetune.loss import decay_groups, loss_of, mix
from seprune.recovery.finetune.progress import StepFacts
from seprune.recovery.finetune.sync_batchnorm import share_norms
from seprune.runtime.distributed import out_of_memory
from seprune.runtime.inference import autocast
from seprune.runtime.random_state import seed_torch
from seprune.runtime.typed import require_like
from seprune.tasks import Classification, Task
from seprune.tasks.batches import channels_last, map_tensors

if TYPE_CHECKING:
    from seprune.recovery.finetune import FineTuneSettings


class TrainState:
    """A private copy of `model` with its optimizer, on `device`."""

    def __init__(
        self,
        model: nn.Module,
        settings: FineTuneSettings,
        *,
        teacher: Teacher | None,
        device: torch.device,
    ):
        self.settings, self.device = settings, device
        self.task = settings.task or Classification()
        self.accelerator = _accelerator(settings.precision, device)
        self.parts = settings.accumulate
        self.alpha = float(settings.distill_alpha) if teacher else 0.0
        self.raw = copy.deepcopy(model).to(device)
        self._training_mode()
        self.teacher = copy.deepcopy(teacher.model).to(device).eval() if teacher else None
        self.features = None
        if teacher is not None and self.teacher is not None and settings.distill_features:
            shared = shared_features(self.raw, teacher.plans)
            self.features = Features(self.raw, self.teacher, shared)
        self.average = copy.deepcopy(self.raw).eval() if settings.ema is not None else None
        self.updates = 0
        if settings.channels_last:
            for network in (self.raw, self.teacher):
                if network is not None:
                    network.to(memory_format=torch.channels_last)
        if self.average is not None:
            both = self.average.state_dict().values(), self.raw.state_dict().values()
            self._pairs = list(zip(*both, strict=True))
        if self.accelerator.num_processes > 1:
            share_norms(self.raw)
            # DDP copies such gradients; on 1x1 convolutions nothing better can be done
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        if settings.compile:
            self.raw.compile()
        self.optimizer = _optimizer(self.raw, settings)
        self.model, self.prepared = self.accelerator.prepare(self.raw, self.optimizer)

    def step(self, batch: Any, *, lr: float, seed: int, weight: float) -> Tensor:
        """One optimizer step over the whole batch, in `parts` micro-batches; the mean loss.

        `seed` fixes every random number of the step; `weight` is this process's share of the batch
        times their number. Out of memory: the micro-batches are halved, for good, and the step is
        done again.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.settings.channels_last:
            batch = map_tensors(batch, channels_last)
        size = self.task.size(batch)
        while True:
            seed_torch(seed, self.device)
            try:
                loss = self._gradients(batch, size, weight)
                break
            except RuntimeError as error:
                self._halve(error, size)
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.raw.parameters(), self.settings.clip)
        self.prepared.step()
        self.prepared.zero_grad()
        self._update_average()
        return loss

    def _gradients(self, batch: Any, size: int, weight: float) -> Tensor:
        each = -(-size // min(self.parts, size))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, size, each):
            stop = min(start + each, size)
            some = batch if stop - start == size else self.task.part(batch, slice(start, stop))
            with nullcontext() if stop == size else self.accelerator.no_sync(self.model):
                loss = self._loss(some) * (weight * (stop - start) / size)
                if not loss.requires_grad:
                    raise InputError(
                        "the network cannot be trained: its answers have no derivatives",
                        why="its forward runs without them, or none of its weights is to change",
                        fix="take torch.no_grad(), detach() and requires_grad_(False) out of it",
                    )
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _loss(self, batch: Any) -> Tensor:
        settings = self.settings
        if not isinstance(self.task, Classification):
            return self._loss_of(self.task, batch)
        taught, labels = None, self.task.split(batch).target
        if settings.mixup or settings.cutmix:
            batch = _, labels = self._mixed(batch)
        logits = logits_of(self.task.forward(self.model, batch, training=True))
        labels = self.task.labels(labels, logits)
        if self.teacher is not None:
            asked = settings.distill_precision
            precision = settings.precision if asked == "as training" else asked
            with torch.no_grad(), autocast(self.device, precision):
                taught = logits_of(self.task.forward(self.teacher, batch))
            if taught.shape != logits.shape:
                raise InputError(
                    f"the teacher has {taught.shape[1]} outputs, the model {logits.shape[1]}",
                    why="distillation compares them class by class",
                    fix="use a teacher for the same classes",
                )
        loss = loss_of(
            logits,
            labels,
            smoothing=settings.label_smoothing or self.task.smoothing,
            teacher=taught,
            alpha=self.alpha,
            temperature=settings.distill_temperature,
        )
        if self.features is not None:
            loss = loss + settings.distill_features * self.features.distance()
        return loss

    def _loss_of(self, task: Task, batch: Any) -> Tensor:
        """The loss of a task that has no class numbers, beside that of distillation."""
        settings = self.settings
        if settings.mixup or settings.cutmix:
            raise UsageError(
                f"images of the task {task.name} cannot be mixed",
                why="mixup and cutmix mix class numbers",
                fix="set finetune.mixup=0 and finetune.cutmix=0",
            )
        outputs = task.forward(self.model, batch, training=True)
        loss = task.loss(outputs, task.split(batch).target)
        if self.teacher is not None:
            with torch.no_grad():
                taught = task.forward(self.teacher, batch)
            temperature, alpha = settings.distill_temperature, self.alpha
            soft = task.distillation(outputs, taught, temperature=temperature)
            loss = (1 - alpha) * loss + alpha * soft
        if self.features is not None:
            loss = loss + settings.distill_features * self.features.distance()
        return loss

    def _mixed(self, batch: Any) -> tuple[Tensor, Tensor]:
        sample, settings = self.task.split(batch), self.settings
        given = [*sample.args, *sample.kwargs.values()]
        if len(given) != 1:
            raise UsageError(
                f"batches of {len(given)} inputs cannot be mixed",
                why="mixup and cutmix mix images",
                fix="set finetune.mixup=0 and finetune.cutmix=0",
            )
        return mix(
            given[0], sample.target, classes=self._classes(batch),
            mixup=settings.mixup, cutmix=settings.cutmix,
        )  # fmt: skip

    def _classes(self, batch: Any) -> int:
        if not hasattr(self, "_outputs"):
            self.raw.eval()
            with torch.no_grad():
                one = self.task.part(batch, slice(0, 1))
                self._outputs = logits_of(self.task.forward(self.raw, one)).shape[1]
            self._training_mode()
        return self._outputs

    def _training_mode(self) -> None:
        self.raw.train()
        if self.settings.norms == "eval":
            for module in self.raw.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _halve(self, error: RuntimeError, batch: int) -> None:
        if not out_of_memory(error):
            raise error
        self.prepared.zero_grad()
        if self.accelerator.num_processes > 1 or self.parts >= batch:
            raise EnvironmentFault(
                f"out of memory with micro-batches of {max(batch // self.parts, 1)} images",
                why=first_line(error),
                fix="choose a smaller batch size, a smaller input, or finetune.precision=bf16"
                if self.parts >= batch
                else f"set finetune.accumulate={self.parts * 2} and run the same command again",
            ) from error
        self.parts *= 2

    def _update_average(self) -> None:
        # swa_utils.AveragedModel reads its step counter back from the GPU in every step.
        if self.average is None or self.settings.ema is None:
            return
        self.updates += 1
        decay = min(self.settings.ema, (1 + self.updates) / (10 + self.updates))
        for mean, value in self._pairs:
            if not mean.is_floating_point():
                mean.copy_(value)
        means, values = zip(*(p for p in self._pairs if p[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(means, values, 1 - decay)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over these weights, before the first step."""
        self.raw.load_state_dict(weights)
        if self.average is not None:
            self.average.load_state_dict(weights)

    @property
    def judged(self) -> nn.Module:
        """The network that validation looks at: the average where there is one."""
        return self.raw if self.average is None else self.average

    def snapshot(self) -> dict[str, Tensor]:
        """Copies on the CPU of every tensor that the next step depends on."""
        tensors = {f"model.{name}": t for name, t in self.raw.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            kept = {n: t for n, t in state.items() if isinstance(t, Tensor)}
            tensors |= {f"optimizer.{number}.{name}": t for name, t in kept.items()}
        return {name: detach(tensor) for name, tensor in tensors.items()}

    def facts(self) -> StepFacts:
        """The plain numbers that belong to `snapshot`."""
        scaler = self.accelerator.scaler
        known = scaler.state_dict() if scaler is not None else None
        return StepFacts(self.parts, self.updates, known)

    def restore(
        self, tensors: dict[str, Tensor], facts: StepFacts, *, source: str = "a trial"
    ) -> None:
        """Go back to a `snapshot` and its `facts`; `source` is named in errors."""
        fix = start_again(source)
        networks = {"model.": self.raw}
        if self.average is not None:
            networks["average."] = self.average
        for prefix, network in networks.items():
            own = part(tensors, prefix)
            require_like(own, network.state_dict(), source=source, fix=fix)
            network.load_state_dict(own)
        remembered = part(tensors, "optimizer.")
        state = optimizer_state(remembered, self.optimizer, source=source, fix=fix)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.prepared.zero_grad()
        self.parts = max(facts.parts, self.settings.accumulate)
        self.updates = facts.updates
        if self.accelerator.scaler is not None and facts.scaler:
            self.accelerator.scaler.load_state_dict(facts.scaler)


def detach(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU, contiguous, as safetensors wants it."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _optimizer(model: nn.Module, settings: FineTuneSettings) -> torch.optim.Optimizer:
    groups = decay_groups(model, settings.weight_decay)
    # One kernel for all parameters; with the fp16 scaler and clipping only the plain way is safe.
    fused = settings.precision != "fp16"
    first_rate = 0.0 if settings.lr == "auto" else settings.lr  # every step sets its own
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=first_rate, fused=fused)
    return torch.optim.SGD(
        groups,
        lr=first_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        fused=fused,
    )


def _accelerator(precision: str, device: torch.device) -> Accelerator:
    if precision == "fp16" and device.type == "cpu":
        raise UsageError(
            "precision fp16 on a CPU",
            why="its gradients need a GPU's scaler",
            fix="use precision bf16 or no",
        )
    # Accelerate keeps one state for the whole process and refuses a second precision or device.
    state = AcceleratorState._shared_state
    if state and (state["_mixed_precision"] != precision or state["device"].type != device.type):
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
