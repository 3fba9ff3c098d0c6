"""What a recipe may say: the sections, their keys, defaults and limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from seprune.recipe.budget import BUDGETS, Budget
from seprune.recipe.fields import (
    Amount,
    Budgets,
    ChannelOrders,
    Count,
    Fraction,
    Gradients,
    Interpolations,
    Location,
    Memory,
    Natural,
    Rate,
    Runtimes,
    Scalar,
    SmallCount,
    Tasks,
    Times,
    TrackerNames,
    Weight,
)


class Section(BaseModel):
    """What all sections share: nothing unknown, nothing infinite, nothing changed afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_OTHER_WEIGHTS = {"checkpoint_path", "pretrained", "pretrained_cfg", "weights", "encoder_weights"}
_OTHER_KEYS = {"name", "classes", "input", "allow_code"}


class ModelSection(Section):
    """Which network, and the trained weights if there are any."""

    name: Location = Field(
        description="{torchvision,timm,smp,seprune}/NAME, hf-hub:ORG/NAME or a folder"
    )
    classes: Count | None = Field(
        default=None, description="classes; null: as the weights or data say"
    )
    input: tuple[Count, Count, Count] | None = Field(
        default=None, description="channels, height, width"
    )
    args: dict[str, Scalar] = Field(
        default={}, description="keyword arguments of the network's function"
    )
    checkpoint: Location | None = Field(
        default=None, description="trained weights; null: train, or none"
    )
    pretrained: bool = Field(
        default=False,
        description="published weights: the default, or torchvision/NAME.ENTRY, timm/NAME.TAG",
    )
    weights: Literal["auto", "raw", "ema"] = Field(
        default="auto", description="which of a checkpoint's"
    )

    @model_validator(mode="after")
    def _check_args(self) -> ModelSection:
        for name in sorted(_OTHER_WEIGHTS & set(self.args)):
            raise ValueError(
                f"args must not hold {name}: weights come from model.checkpoint or model.pretrained"
            )
        for name in sorted(_OTHER_KEYS & set(self.args)):
            raise ValueError(f"args must not hold {name}: they are the network's own arguments")
        if self.pretrained and self.checkpoint:
            raise ValueError("pretrained and checkpoint exclude each other: both say which weights")
        return self


class DataSection(Section):
    """Images to calibrate, tune and report on."""

    source: Location = Field(description="digits, shapes, a folder, torchvision/X:DIR, hf:X, wds:X")
    batch_size: Count = 128
    workers: int | None = Field(
        default=None, ge=0, le=1024, description="loader processes; null: per usable core"
    )
    validation: Fraction = Field(
        default=0.1, description="of the training images, to choose the epoch by"
    )
    cache: Literal["none", "memory", "device", "auto"] = Field(
        default="auto", description="decoded images"
    )
    mean: tuple[float, ...] | None = Field(
        default=None, description="a channel each, of [0, 1]; null: as the weights say, or guessed"
    )
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None, description="likewise"
    )
    augment: Literal["auto", "none", "shift", "crop", "resized_crop"] = "auto"
    cutout: Natural = Field(default=0, description="side in pixels; 0: off")
    crop: float | None = Field(default=None, gt=0, le=1, description="of the scaled image")
    interpolation: Interpolations | None = Field(default=None, description="of scaled images")
    channel_order: ChannelOrders | None = Field(default=None, description="of the network")
    on_bad_image: Literal["error", "skip"] = Field(
        default="error", description="skip: at most 0.1 %"
    )

    @model_validator(mode="after")
    def _check_pair(self) -> DataSection:
        if len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std must be given together, one number per channel each")
        return self


class DistillSection(Section):
    """Learning from the dense parent."""

    weight: Weight = Field(
        default="auto", description="of the parent's targets in the loss; auto: what fits the steps"
    )
    temperature: float = Field(default=4.0, gt=0, description="softens both sides")
    features: Amount = Field(
        default=0.0, description="weight of the distance of group outputs; 0: off"
    )
    precision: Literal["as training", "no", "bf16"] = Field(
        default="as training", description="of the parent's forward"
    )


_RECALIBRATE = "images for new BatchNorm statistics, kept where they help; 0: off"
_LR = "highest learning rate, for the whole batch; auto: found by short trials"


class TrainSection(Section):
    """One stretch of training."""

    epochs: Natural = Field(default=30, description="0: recalibrate BatchNorm only")
    batch_size: Count = 128
    optimizer: Literal["auto", "sgd", "adamw"] = "sgd"
    lr: Rate = Field(default=0.1, description=_LR)
    momentum: Fraction = Field(default=0.9, description="SGD's; AdamW has its own betas")
    nesterov: bool = Field(default=True, description="SGD only")
    weight_decay: Amount = Field(default=5e-4, description="not on norms and biases")
    schedule: Literal["auto", "cosine", "step", "onecycle", "constant"] = "cosine"
    norms: Literal["auto", "train", "eval"] = Field(
        default="train", description="BatchNorm by the batch, or by its running statistics"
    )
    warmup_epochs: Amount = Field(
        default=1.0, description="linear, from nothing to lr; at most a fifth of the steps"
    )
    label_smoothing: Fraction = 0.0
    mixup: Amount = Field(default=0.0, description="alpha of the Beta distribution; 0: off")
    cutmix: Amount = Field(default=0.0, description="alpha of the Beta distribution; 0: off")
    randaugment: bool = False
    ema: Fraction | None = Field(default=None, description="decay of the average; null: off")
    clip: Amount | None = Field(default=None, description="largest gradient norm; null: off")
    accumulate: Count = Field(default=1, description="micro-batches per step")
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto", True, False] = "auto"
    compile: bool = False
    trackers: TrackerNames = Field(default=(), description="wandb, mlflow, ...: see finetuning.md")
    recalibrate: Natural = Field(default=0, description=_RECALIBRATE)
    distill: DistillSection | None = Field(default=None, description="null: labels only")


class FinetuneSection(TrainSection):
    """Training after the cut."""

    epochs: Natural = Field(default=10, description="0: recalibrate BatchNorm only")
    optimizer: Literal["auto", "sgd", "adamw"] = Field(
        default="auto", description="auto: what fits the number of steps"
    )
    lr: Rate = Field(default="auto", description=_LR)
    schedule: Literal["auto", "cosine", "step", "onecycle", "constant"] = "auto"
    norms: Literal["auto", "train", "eval"] = Field(
        default="auto", description="BatchNorm by the batch, or by its running statistics"
    )
    recalibrate: Natural = Field(default=2048, description=_RECALIBRATE)
    distill: DistillSection | None = Field(default=DistillSection(), description="null: labels")


class CollectSection(Section):
    """The pass over the calibration set, taken from the training images."""

    images: Count = Field(default=2048, description="of the training split")
    batch_size: Count = 128
    gradients: Gradients = Field(default="auto", description="auto: what the criterion needs")


class ProbeSection(Section):
    """SE gates for channels without one: trained alone, read, thrown away (PCAS, 1806.05382)."""

    epochs: Count = 1
    images: Count | None = Field(default=None, description="training images an epoch; null: all")
    lr: float = Field(default=0.01, gt=0, description="highest, of Adam")
    reduction: Count = Field(default=16, description="of the channels by the hidden layer")


class ImportanceSection(Section):
    """How channels are scored."""

    criterion: str = Field(
        default="gate_logit", pattern=r"^[a-z0-9_]+$", description="see importance.md"
    )
    combine: Literal["mean", "max", "sum", "coupled", "joint"] = Field(
        default="joint", description="gates of one dependency group"
    )
    ungated: Literal["unit", "propagate", "none"] = Field(
        default="unit", description="channels without a gate; none: they are not pruned"
    )
    normalize: Literal["auto", "none", "mean", "max", "sum", "standard", "rank"] = Field(
        default="auto", description="scores within a group; auto: what suits the criterion"
    )
    probe: ProbeSection | None = Field(default=None, description="gates for channels without one")


class PlanSection(Section):
    """How much is cut, and where. Lists of budgets give one pruned network each."""

    macs: Budgets | None = Field(
        default=None, description="kept: 0.5, 20M or a list; 0.5 if no budget is given"
    )
    params: Budgets | None = Field(default=None, description="kept: 0.4, 1.5M or a list")
    latency: Times | None = Field(
        default=None, description="kept, or a time: 0.6, 4ms or a list; measured on this machine"
    )
    runtime: Literal["eager", "compiled", "onnx", "openvino"] = Field(
        default="eager", description="that latency is measured on"
    )
    batch: Count = Field(default=1, description="images at once that latency is measured with")
    allocation: Literal["auto", "global", "uniform", "isomorphic", "cost_aware", "sensitivity"] = (
        Field(default="auto", description="auto: cost_aware where scores add up, else global")
    )
    floor: float = Field(default=0.1, ge=0, le=1, description="fraction of every group that stays")
    min_channels: Count | None = Field(
        default=None,
        description="channels of every group that stay; null: 2 where cost-aware, else 8",
    )
    round_to: Count | None = Field(
        default=None,
        description="widths are multiples of this; null: what is fast and near the budget, 8 or "
        "16 where a group has as many; 1: as they come",
    )
    protect: tuple[str, ...] = Field(default=(), description="globs of layers that are not pruned")
    bottleneck: Literal["keep", "scale", "rank"] = Field(
        default="keep", description="SE's own width"
    )
    gates: bool = Field(default=True, description="latency budgets may hold them at their mean")
    blocks: bool = Field(default=True, description="latency budgets may leave residual ones out")
    candidates: bool = Field(
        default=True,
        description="try plans of several rules, recovered, and keep the one whose outputs are "
        "nearest the parent's; label-free",
    )
    steps: SmallCount = Field(default=1, description="cuts on the way, each with new statistics")

    @model_validator(mode="after")
    def _check_budgets(self) -> PlanSection:
        if not any(getattr(self, k) for k in BUDGETS):
            object.__setattr__(self, "macs", (0.5,))  # frozen for everyone else
        if self.steps > 1 and any(isinstance(budget, str) for budget in self.latency or ()):
            raise ValueError("latency must be a fraction where there are several steps")
        lengths = {len(getattr(self, k)) for k in BUDGETS if getattr(self, k)} - {1}
        if len(lengths) > 1:
            raise ValueError("lists of budgets must be equally long: they are taken side by side")
        return self

    def budgets(self) -> tuple[Budget, ...]:
        """One per pruned network."""
        given = {k: getattr(self, k) for k in BUDGETS if getattr(self, k)}
        length = max(map(len, given.values()))
        return tuple(
            Budget.parse(**{k: v[i % len(v)] for k, v in given.items()}) for i in range(length)
        )


class SensitivitySection(Section):
    """Top-1 and loss without a part of one dependency group, on the validation split."""

    images: int = Field(
        default=0, ge=0, description="0: off; 512 where plan.allocation is sensitivity"
    )
    shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(0.1, 0.3, 0.5), min_length=1, description="of a group that are taken away"
    )


class PruneSection(Section):
    """What happens to the weights right after the cut."""

    recover: Literal["none", "bn", "refit", "reconstruct", "scratch"] = Field(
        default="refit",
        description="reconstruct: label-free training after the refit; scratch: random weights, "
        "to see what the trained ones are worth",
    )
    epochs: Count = Field(default=10, description="of recover=reconstruct")


class ReportSection(Section):
    """What the report measures."""

    latency: Runtimes = Field(
        default=True,
        description="eager, compiled, onnx, openvino; true: eager, and onnx if installed",
    )
    batch_sizes: tuple[Count, ...] = Field(
        default=(1, 8, 64), min_length=1, description="of the latencies; those that fit"
    )
    html: bool = True
    classes: tuple[str, ...] = Field(default=(), description="of the curves; none: up to ten")
    examples: int = Field(default=3, ge=0, le=10, description="images of the extreme classes")
    last_epoch: bool = Field(default=False, description="measure the last epoch's weights too")


class CommandRecipe(Section):
    """What the options of one command amount to: a recipe that may be without data."""

    name: str = Field(min_length=1, description="title of the report")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything random")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="or cuda:1, cpu, mps"
    )
    threads: Literal["auto"] | SmallCount = Field(
        default="auto",
        description="of the CPU; auto: `OMP_NUM_THREADS`, or what a short trial finds fastest",
    )
    memory: Memory = Field(default="auto", description="of collect and refit, such as 2GB")
    task: Tasks | None = Field(
        default=None, description="what the network is for; null: as the data say"
    )
    model: ModelSection
    data: DataSection | None = None
    train: TrainSection | None = Field(
        default=None, description="only used without model.checkpoint"
    )
    collect: CollectSection = CollectSection()
    importance: ImportanceSection = ImportanceSection()
    sensitivity: SensitivitySection = SensitivitySection()
    plan: PlanSection = PlanSection()
    prune: PruneSection = PruneSection()
    finetune: FinetuneSection = FinetuneSection()
    report: ReportSection = ReportSection()


class Recipe(CommandRecipe):
    """Everything a run does."""

    data: DataSection
