"""seprune: prune Squeeze-and-Excitation networks by what their own gates say.

The public API is listed in `__init__.pyi`. Importing this module does not import torch; a name is
looked up when it is used.
"""

import lazy_loader as _lazy

__version__ = "0.2.0"

__getattr__, _, __all__ = _lazy.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __dir__() -> list[str]:
    return sorted(__all__)
