"""torchvision and timm, imported here only, when one of their networks is asked for."""

from __future__ import annotations

import importlib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from seprune.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from types import ModuleType

    from torch import nn

Size = tuple[int, int, int]

# Families whose channels carry gates, for the order of a listing only: `inspect` looks for itself.
GATED = {
    "torchvision": "efficientnet_* *mobilenet_v3_* regnet_y_* maxvit_*",
    "timm": """
        *seresn* senet* legacy_senet* *sebotnet* *sehalo* *sedarknet* *se_edgenet* repvgg_d2se
        eca* nf_eca* ese_* gc* sk* resnest* hgnet_* cspnext* rdnet* tresnet* resnetrs*
        *efficientnet* mixnet* tf_mixnet* *mobilenetv3* *mnasnet_small *semnasnet* hardcorenas*
        fbnetv3* *ghostnet* *lcnet* tinynet* rexnet* mobileone_s4 regnet[vyz]* nf_regnet*
        *_nfnet* nfnet* coatnet* maxvit* haloregnetz* fastvit* efficientvi[tm]_m* repvit* shvit*
        test_byobnet test_coatnet test_maxvit""",
}
UNGATED = ("*efficientnet_e[lms]*", "*efficientnet_lite?", "*_minimal_*")


def names() -> list[str]:
    """Every image network of the two, as torchvision/NAME and timm/NAME; timm only if installed."""
    found = [f"torchvision/{name}" for name in _torchvision_names()]
    try:
        return found + [f"timm/{name}" for name in sorted(_import("timm").list_models())]
    except EnvironmentFault:
        return found


def has(zoo: str, name: str) -> bool:
    """Whether `zoo` is one of the two and has `name` (for timm: with or without a weights tag)."""
    if zoo == "timm":
        return bool(_import("timm").is_model(name))
    return zoo == "torchvision" and name in _torchvision_names()


def gated(name: str) -> bool:
    """Whether ZOO/NAME is of a family with channel gates."""
    zoo, _, rest = name.partition("/")
    return any(fnmatchcase(rest, pattern) for pattern in GATED[zoo].split()) and not any(
        fnmatchcase(rest, pattern) for pattern in UNGATED
    )


def torchvision_model(
    name: str, classes: int | None, input: Size | None, args: dict[str, Any]
) -> nn.Module:
    """`torchvision/NAME` with random weights; its networks have three input channels."""
    models = _import("torchvision.models")
    if input is not None and input[0] != 3:
        raise UsageError(
            f"torchvision/{name}: cannot take {input[0]} input channels",
            why="torchvision's networks are made for 3",
            fix="--input 3x224x224, or a network of timm/ or seprune/",
        )
    options = dict(args, weights=None)
    if name not in models.list_models(module=models):
        options["weights_backbone"] = None
    if classes is not None:
        _put(options, "num_classes", classes)
    return models.get_model(name, **options)  # type: ignore[no-any-return]


def timm_model(
    name: str, classes: int | None, input: Size | None, args: dict[str, Any]
) -> nn.Module:
    """`timm/NAME` with random weights."""
    timm = _import("timm")
    options = dict(args, pretrained=False)
    if classes is not None:
        _put(options, "num_classes", classes)
    if input is not None:
        _put(options, "in_chans", input[0])
        if timm.models.get_pretrained_cfg(name).fixed_input_size:
            options.setdefault("img_size", input[1:])
    return timm.create_model(name, **options)  # type: ignore[no-any-return]


def _put(options: dict[str, Any], key: str, value: int) -> None:
    """Set an argument, unless it was given and says something else."""
    if options.setdefault(key, value) != value:
        raise UsageError(
            f"{key} is {options[key]} in the arguments, {value} is asked for beside them",
            why="--classes, --input and the data say it too",
            fix=f"leave out {key} among the arguments",
        )


def torchvision_size(name: str, model: Any) -> tuple[int, int]:
    """The image size that torchvision evaluates `name` at; detectors resize for themselves."""
    if hasattr(model, "transform"):
        side = model.transform.min_size[0]
    else:
        weights = _import("torchvision.models").get_model_weights(name).DEFAULT
        sizes = weights.transforms.keywords
        side = sizes.get("crop_size", sizes.get("resize_size"))
    return int(side), int(side)


def timm_size(model: Any) -> tuple[int, int]:
    """The image size that timm states for `model`."""
    _, height, width = model.pretrained_cfg["input_size"]
    return height, width


def timm_config(name: str) -> dict[str, Any]:
    """The `pretrained_cfg` of a network of timm; with a tag that of these weights."""
    found = _import("timm.models").get_pretrained_cfg(name)
    return dict(found.to_dict()) if found is not None else {}


def torchvision_weights(name: str, entry: str = "DEFAULT") -> Any:
    """An entry of the weights enum of a network of torchvision; None if it has no such weights."""
    enum = _import("torchvision.models").get_model_weights(name)
    return getattr(enum, entry, None)


def _torchvision_names() -> list[str]:
    models = _import("torchvision.models")
    modules = (models, models.detection, models.segmentation)
    return [name for module in modules for name in models.list_models(module=module)]


def _import(module: str) -> ModuleType:
    package = module.partition(".")[0]
    extra = "'seprune[timm]'" if package == "timm" else package
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentFault(
            f"{package}: cannot be imported",
            why=str(error),
            fix=f"pip install {extra}",
        ) from error
