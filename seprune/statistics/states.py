"""States of a model in which statistics cannot be collected, each refused with what to do."""

from __future__ import annotations

import torch
from torch import nn

from seprune.errors import InputError, first_line


def require_eager(model: nn.Module) -> None:
    """Refuse compiled models: hooks do not run inside of them, and their layers cannot be cut.

    Raises:
        InputError: with how to get at the eager model.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "a scripted model cannot be pruned",
            why="its forward is compiled, so that no layer of it can be observed or cut",
            fix="pass the module that it was scripted or traced from, and script the result",
            code="uncuttable",
        )
    if hasattr(model, "_orig_mod"):
        raise InputError(
            "a model that torch.compile has wrapped cannot be pruned",
            why="its forward is compiled, so that no layer of it can be observed or cut",
            fix="pass model._orig_mod, and compile the result",
            code="uncuttable",
        )


def require_autograd(model: nn.Module) -> None:
    """Refuse inference mode, where no derivatives are recorded.

    Raises:
        InputError: it is on, or parameters were made in it.
    """
    if torch.is_inference_mode_enabled():
        raise InputError(
            "derivatives cannot be collected in torch.inference_mode()",
            why="autograd records nothing there",
            fix="call it outside of the block, or collect with gradients='none'",
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    made = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if made is not None:
        raise InputError(
            f"'{made}' is an inference tensor",
            why="the model was built or loaded inside torch.inference_mode()",
            fix="build it outside of the block and load its state_dict there",
        )


def refused(error: RuntimeError) -> InputError:
    """What a pass that runs without derivatives and not with them ends in."""
    refusal = InputError(
        f"autograd refuses this model: {first_line(error)}",
        why="the criterion needs derivatives of its outputs",
        fix="a criterion without derivatives: importance.criterion=gate_mean, or l2",
    )
    refusal.__cause__ = error
    return refusal
