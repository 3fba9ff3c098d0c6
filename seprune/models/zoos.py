"""torchvision, timm, segmentation_models_pytorch and transformers, imported only when asked for.

Networks of segmentation_models_pytorch are called `smp/DECODER:ENCODER`; `tu-NAME` is an encoder of
timm. Classifiers of transformers are called `transformers/KIND`, with what their configuration says
as arguments; they are not listed, since a kind is no network before it has them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
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
SMP = "segmentation_models_pytorch"
EXTRAS = {"timm": "timm", SMP: "smp", "transformers": "transformers"}
UNGATED = ("*efficientnet_e[lms]*", "*efficientnet_lite?", "*_minimal_*")


def names() -> list[str]:
    """Every image network, as ZOO/NAME, of the zoos that are installed; `smp/DECODER` alone."""
    found = [f"torchvision/{name}" for name in _torchvision_names()]
    lists = {"timm": lambda: sorted(_import("timm").list_models()), "smp": _decoders}
    for zoo, listed in lists.items():
        with suppress(EnvironmentFault):
            found += [f"{zoo}/{name}" for name in listed()]
    return found


def has(zoo: str, name: str) -> bool:
    """Whether `zoo` is known here and has `name` (for timm: with or without a weights tag)."""
    if zoo == "timm":
        return bool(_import("timm").is_model(name))
    if zoo == "smp":
        return name.partition(":")[0] in _decoders()
    if zoo == "transformers":
        return name in _transformers_kinds()
    return zoo == "torchvision" and name.partition(".")[0] in _torchvision_names()


def gated(name: str) -> bool:
    """Whether ZOO/NAME is of a family with channel gates."""
    zoo, _, rest = name.partition("/")
    return any(fnmatchcase(rest, pattern) for pattern in GATED.get(zoo, "").split()) and not any(
        fnmatchcase(rest, pattern) for pattern in UNGATED
    )


def torchvision_model(
    name: str, classes: int | None, input: Size | None, args: dict[str, Any]
) -> nn.Module:
    """`torchvision/NAME` with random weights; its networks have three input channels."""
    models, name = _import("torchvision.models"), name.partition(".")[0]
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
    options = timm_arguments(name, classes, input, args)
    return _import("timm").create_model(name, pretrained=False, **options)  # type: ignore[no-any-return]


def timm_arguments(
    name: str, classes: int | None, input: Size | None, args: Mapping[str, Any]
) -> dict[str, Any]:
    """What `timm.create_model` is given beside the name."""
    options = dict(args)
    if classes is not None:
        _put(options, "num_classes", classes)
    if input is not None:
        _put(options, "in_chans", input[0])
        if _import("timm").models.get_pretrained_cfg(name).fixed_input_size:
            options.setdefault("img_size", input[1:])
    return options


def adapted_by_timm(dense: nn.Module, text: str) -> nn.Module:
    """A network of timm's with the widths that a text in timm's format says."""
    adapt = _import("timm.models._prune").adapt_model_from_string
    return adapt(dense, text)  # type: ignore[no-any-return]


def smp_model(
    name: str, classes: int | None, input: Size | None, args: dict[str, Any]
) -> nn.Module:
    """`smp/DECODER:ENCODER` with random weights.

    Raises:
        UsageError: there is no such encoder; names close ones.
    """
    decoder, _, encoder = name.partition(":")
    options = dict(args, encoder_weights=None)
    if encoder:
        _put(options, "encoder_name", encoder)
    if "encoder_name" in options:
        _require_encoder(name, str(options["encoder_name"]))
    if classes is not None:
        _put(options, "classes", classes)
    if input is not None:
        _put(options, "in_channels", input[0])
    return _import(SMP).create_model(decoder, **options)  # type: ignore[no-any-return]


def transformers_model(
    name: str, classes: int | None, input: Size | None, args: dict[str, Any]
) -> nn.Module:
    """`transformers/KIND` with random weights; `args` are the entries of its configuration."""
    transformers = _import("transformers")
    config = transformers.AutoConfig.for_model(name, **args)
    _import(type(config).__module__.replace(".configuration_", ".modeling_"))
    if classes is not None:
        config.num_labels = classes
    if input is not None:
        config.num_channels = input[0]
        if isinstance(getattr(config, "image_size", None), int):
            config.image_size = input[1]
    return transformers.AutoModelForImageClassification.from_config(  # type: ignore[no-any-return]
        config
    )


def transformers_size(model: Any) -> tuple[int, int]:
    """The image size in the configuration of `model`; 224, as that library has it, without one."""
    size = getattr(model.config, "image_size", None) or 224
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def _transformers_kinds() -> list[str]:
    auto = _import("transformers.models.auto.modeling_auto")
    return list(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


def _require_encoder(name: str, encoder: str) -> None:
    own = encoder.startswith("tu-") and _import("timm").is_model(encoder.removeprefix("tu-"))
    known = list(_import(SMP).encoders.get_encoder_names())
    if own or encoder in known:
        return
    close = get_close_matches(encoder, known, 3, cutoff=0.5) or ["efficientnet-b0"]
    raise UsageError(
        f"smp/{name}: there is no encoder {encoder}",
        why=f"close names: {', '.join(close)}; tu-NAME is a network of timm",
        fix=f"smp/{name.partition(':')[0]}:{close[0]}",
    )


def _decoders() -> list[str]:
    return list(_import(SMP).MODEL_ARCHITECTURES_MAPPING)


def _put(options: dict[str, Any], key: str, value: int | str) -> None:
    """Set an argument, unless it was given and says something else."""
    if options.setdefault(key, value) != value:
        raise UsageError(
            f"{key} is {options[key]} in the arguments, {value} is asked for beside them",
            why="--classes, --input and the data say it too",
            fix=f"leave out {key} among the arguments",
        )


def torchvision_size(name: str, model: Any) -> tuple[int, int]:
    """The image size that torchvision evaluates `name` at; detectors resize for themselves."""
    name = name.partition(".")[0]
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
    """The `pretrained_cfg` of a network of timm; with a tag that of these weights, if it is one."""
    try:
        found = _import("timm.models").get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        return {}
    return dict(found.to_dict()) if found is not None else {}


def timm_tags(name: str) -> list[str]:
    """Every NAME.TAG that timm publishes weights under."""
    return list(_import("timm").list_pretrained(f"{name}.*"))


def torchvision_entries(name: str) -> list[str]:
    """The names in the weights enum of a network of torchvision."""
    return [entry.name for entry in _import("torchvision.models").get_model_weights(name)]


def torchvision_task(name: str) -> str:
    """What a network of torchvision is for, as `--task` takes it."""
    models = _import("torchvision.models")
    for task in ("detection", "segmentation"):
        if name in models.list_models(module=getattr(models, task)):
            return task
    return "classification"


def torchvision_weights(name: str, entry: str = "DEFAULT") -> Any:
    """An entry of the weights enum of a network of torchvision; None if it has no such weights."""
    enum = _import("torchvision.models").get_model_weights(name.partition(".")[0])
    return getattr(enum, entry, None)


def _torchvision_names() -> list[str]:
    models = _import("torchvision.models")
    modules = (models, models.detection, models.segmentation)
    return [name for module in modules for name in models.list_models(module=module)]


def _import(module: str) -> ModuleType:
    package = module.partition(".")[0]
    extra = f"'seprune[{EXTRAS[package]}]'" if package in EXTRAS else package
    import torch

    try:
        with torch.device("cpu"):  # tensors of modules outlive a build on the meta device
            return importlib.import_module(module)
    except Exception as error:  # under -OO, or of a version that fits no other
        raise EnvironmentFault(
            f"{package}: cannot be imported",
            why=str(error) if isinstance(error, ImportError) else f"its own code: {error}",
            fix=f"pip install {extra}",
        ) from error
