"""Building networks by name, and which of the user's files may be run for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from seprune.errors import UsageError
from seprune.models import registry, usercode
from seprune.models.hub import USUAL, HubAccess
from seprune.models.origin import Origin, remember
from seprune.models.registry import Size


@dataclass(frozen=True)
class ModelLoader:
    """Builds networks by name. It runs no Python file but those that it is made with.

    Attributes:
        files: the files that may be run, as resolved paths; see `allowing`.
        any_file: every file may be run.
        pickles: weights from a Hub may be pickles; nothing in them is run even so.
        hub: how files of a Hub are asked for.
    """

    files: frozenset[Path] = frozenset()
    any_file: bool = False
    pickles: bool = False
    hub: HubAccess = USUAL

    @classmethod
    def allowing(cls, *names: str | Path, pickles: bool = False) -> ModelLoader:
        """A loader that may run these files, each FILE.py or FILE.py:FUNCTION."""
        return cls(frozenset(usercode.file_of(str(name)) for name in names), pickles=pickles)

    def permits(self, name: str) -> bool:
        """Whether the network called `name` may be built."""
        return not usercode.is_code(name) or self.any_file or usercode.file_of(name) in self.files

    def build(
        self, name: str, *, classes: int | None = None, input: Size | None = None, **args: Any
    ) -> nn.Module:
        """The network called `name`, with random weights.

        Args:
            name: ZOO/NAME, of torchvision, timm, smp (DECODER:ENCODER) or seprune, or
                FILE.py:FUNCTION.
            classes: outputs of the classifier; None takes the network's own number.
            input: (C, H, W) of one image; C is the number of input channels, 3 by default.
            args: passed on; for seprune/ networks the fields of `blocks.SE`.

        Raises:
            UsageError: no such network or argument, or a file that is not permitted.
            InputError: FILE.py fails or gives something else than a module.
            EnvironmentFault: timm or segmentation_models_pytorch is not installed.
        """
        origin = Origin(name, classes, input, dict(args))
        if not self.permits(name):
            raise UsageError(
                f"{name}: refused to run code",
                why="a model given as FILE.py:FUNCTION runs that file, also when a recipe names it",
                fix="read the file, then add --allow-code to the command",
            )
        make = usercode.build if usercode.is_code(name) else registry.build
        return remember(make(origin), origin)


NO_CODE = ModelLoader()
"""Runs no file."""


def build(
    name: str, *, classes: int | None = None, input: Size | None = None, **args: Any
) -> nn.Module:
    """`ModelLoader().build`: a network by name, which runs none of the user's files."""
    return NO_CODE.build(name, classes=classes, input=input, **args)
