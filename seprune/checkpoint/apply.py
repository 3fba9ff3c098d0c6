"""Put weights into a model: all of them or none."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from seprune.checkpoint.weights import Weights, is_pruned_folder
from seprune.errors import InputError
from seprune.runtime.text import shell_word

SHOWN = 2
COUNTER = "num_batches_tracked"  # torch < 0.4.1 did not save it; BatchNorm loads without it


def apply_weights(model: nn.Module, weights: Weights, *, path: Path) -> tuple[str, ...]:
    """Load `weights` strictly into `model`, in place; nothing changes when they do not fit.

    Args:
        path: where they came from, for messages.

    Returns:
        What the user should be told: the notes of reading, and of casting.

    Raises:
        InputError: another architecture or number of classes, or NaN, infinite or all-zero values.
    """
    expected = model.state_dict()
    tensors = _with_model_prefix(weights, expected)
    tensors, head = _without_head(model, tensors)
    _check_fit(expected, tensors, weights=weights, path=path)
    check_values(model, tensors, path=path)
    model.load_state_dict(tensors, strict=True)
    cast = {str(tensors[n].dtype) for n in tensors if tensors[n].dtype != expected[n].dtype}
    left = (f"left out, the model has no such layer: {', '.join(head)}",) if head else ()
    return (
        *weights.notes,
        *left,
        *(f"stored as {d.removeprefix('torch.')}, cast" for d in sorted(cast)),
    )


def _with_model_prefix(weights: Weights, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names as the model has them: a stripped `model.` may have been its own."""
    for depth in range(len(weights.stripped) + 1):
        prefix = "".join(weights.stripped[len(weights.stripped) - depth :])
        named = {prefix + name: tensor for name, tensor in weights.tensors.items()}
        if named.keys() == expected.keys():
            return named
    return _with_tied(weights.tensors, expected)


def _without_head(
    model: nn.Module, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """A linear layer of the file is left out where the model has an `Identity`: no head."""
    bare = [n for n, m in model.named_modules() if n and isinstance(m, nn.Identity)]
    heads = [n for n in bare if f"{n}.weight" in tensors and tensors[f"{n}.weight"].ndim == 2]
    head = [f"{n}.{leaf}" for n in heads[-1:] for leaf in ("weight", "bias")]
    return {name: t for name, t in tensors.items() if name not in head}, head


def _with_tied(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Files keep a tied tensor under one of its names: give it the others."""
    names = {expected[n].data_ptr(): n for n in tensors if n in expected and expected[n].data_ptr()}
    tied = {n: names.get(t.data_ptr()) for n, t in expected.items() if n not in tensors}
    found = {n: m for n, m in tied.items() if m and expected[n].shape == expected[m].shape}
    return {**tensors, **{n: tensors[m] for n, m in found.items()}}


def _check_fit(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], *, weights: Weights, path: Path
) -> None:
    missing = [n for n in expected if n not in tensors and not n.endswith(COUNTER)]
    unexpected = [n for n in tensors if n not in expected]
    differing = [n for n in expected if n in tensors and tensors[n].shape != expected[n].shape]
    if not missing and not unexpected and not differing:
        return
    classes = _classes(expected, tensors, differing=differing)
    if classes and not missing and not unexpected:
        head = next((n for n in differing if tensors[n].ndim > 1), differing[0])
        raise InputError(
            f"{path}: weights for {classes[0]} classes, the model has {classes[1]}",
            why=f"the head {_shapes(head, tensors[head], expected[head])}",
            fix=f"--classes {classes[0]}",
            code="checkpoint-classes",
        )
    if not unexpected and not differing and _is_head(expected, missing):
        raise InputError(
            f"{path}: weights without a head, the model has one: {', '.join(missing)}",
            why="all other layers fit: the features were saved alone",
            fix="a model without a head takes them (of timm: num_classes 0 in model.args), "
            "or give weights that have one",
            code="checkpoint-mismatch",
        )
    channels = _channels(expected, tensors, differing=differing)
    if channels and not missing and not unexpected:
        raise InputError(
            f"{path}: weights for images of {channels[0]} channels, the model takes {channels[1]}",
            why=_shapes(differing[0], tensors[differing[0]], expected[differing[0]]),
            fix=f"--input {channels[0]}xHxW with their height and width; images are converted",
            code="checkpoint-mismatch",
        )
    lines = [
        _listed("missing from the file", missing),
        _listed("unknown to the model", unexpected),
        _listed("of another shape", [_shapes(n, tensors[n], expected[n]) for n in differing]),
    ]
    raise InputError(
        f"{path}: weights of another architecture, {_head(tensors)}",
        why="; ".join(line for line in lines if line),
        fix=_find_model(path, weights),
        code="checkpoint-mismatch",
    )


def _is_head(expected: dict[str, Tensor], names: list[str]) -> bool:
    """Whether some tensors are those of the model's last layer."""
    last = [name for name, tensor in expected.items() if tensor.ndim > 1][-1:]
    layers = {name.rpartition(".")[0] for name in names}
    return layers == {name.rpartition(".")[0] for name in last} and last[0] in names


def _classes(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], *, differing: list[str]
) -> tuple[int, int] | None:
    """(in the file, in the model) when all differing tensors differ by one same first dimension."""
    pairs = set()
    for name in differing:
        file, model = tensors[name].shape, expected[name].shape
        if not file or len(file) != len(model) or file[1:] != model[1:]:
            return None
        pairs.add((file[0], model[0]))
    return pairs.pop() if len(pairs) == 1 else None


def _channels(
    expected: dict[str, Tensor], tensors: dict[str, Tensor], *, differing: list[str]
) -> tuple[int, int] | None:
    """(in the file, in the model) when only the inputs of one convolution differ."""
    if len(differing) != 1:
        return None
    file, model = (named[differing[0]].shape for named in (tensors, expected))
    alike = len(file) == len(model) > 2 and file[:1] == model[:1] and file[2:] == model[2:]
    return (file[1], model[1]) if alike else None


def _head(tensors: dict[str, Tensor]) -> str:
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(COUNTER))
    size = f"{len(tensors)} tensors, {count:,} numbers"
    heads = [name for name, tensor in tensors.items() if _is_linear(tensor)]
    if not heads:
        return size
    shape = tensors[heads[-1]].shape
    return f"{size}, head {heads[-1]} {_shape(shape)} ({shape[0]} classes)"


def _is_linear(tensor: Tensor) -> bool:
    return tensor.ndim == 2 or (tensor.ndim == 4 and tensor.shape[2:] == (1, 1))


def _find_model(path: Path, weights: Weights) -> str:
    if is_pruned_folder(path.parent):
        return f"these weights belong to a pruned model: give its folder, {path.parent}"
    arch = weights.metadata.get("arch") or weights.metadata.get("architecture")
    if arch:
        return (
            f"the file says that it is {arch!r}: seprune models {shell_word(f'*{arch}*')} finds it"
        )
    return "give the MODEL that these weights were trained as; `seprune models` lists them"


def _listed(what: str, names: list[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:SHOWN])}{more}" if names else ""


def _shapes(name: str, file: Tensor, model: Tensor) -> str:
    return f"{name} is {_shape(file.shape)} in the file, {_shape(model.shape)} in the model"


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"


def check_values(model: nn.Module, tensors: dict[str, Tensor], *, path: Path) -> None:
    """Refuse weights for `model` with which it would answer nonsense; `path` is named in errors.

    Raises:
        InputError: NaN or infinite parameters or BatchNorm statistics, or only zeros.
    """
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in tensors}
    # other buffers may be infinite by design (attention masks)
    used = [n for n in tensors if n in parameters or n.endswith(("running_mean", "running_var"))]
    wrong = []
    for name in used:
        values = tensors[name].to(parameters[name].dtype) if name in parameters else tensors[name]
        count = int((~values.isfinite()).sum())
        wrong += [f"{name} ({count} of {values.numel()})"] if count else []
    if wrong:
        raise _refuse_values(path, "NaN or infinite weights", listed=_listed("tensors", wrong))
    # biases and residual gammas may rightly be zero; not all the matrices of a trained network
    matrices = [n for n in parameters if tensors[n].ndim >= 2] or list(parameters)
    if matrices and not any(tensors[n].any() for n in matrices):
        raise _refuse_values(path, "all weights are zero", listed=_listed("tensors", matrices))


def _refuse_values(path: Path, what: str, *, listed: str) -> InputError:
    return InputError(
        f"{path}: {what}",
        why=f"such a model still answers, with the first class: {listed}",
        fix="take an earlier checkpoint of that training",
        code="checkpoint-values",
    )
