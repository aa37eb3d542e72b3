"""nflib: normalizing flows and autoregressive models, one idea a file.

``forward`` goes from data to noise, ``inverse`` back; both return their output and
``log_det = log|det|`` of the map just applied, one number for each row of the batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

# Modules load when first used, so that `import nflib` costs next to nothing beyond torch.
_MODULES = tuple(module.name for module in pkgutil.iter_modules(__path__))

__version__ = "0.1.0"
__all__ = list(_MODULES)


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return importlib.import_module(f"nflib.{name}")
    raise AttributeError(f"nflib has no module {name!r}; it has {', '.join(_MODULES)}.")


def __dir__() -> list[str]:
    return [*_MODULES, "__version__"]
