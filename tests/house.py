"""What the tests of the house share: where it stands, and its tools as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"


def tool(name: str) -> ModuleType:
    """A script of tools/ as a module (by its path, for some share names with other packages)."""
    folder = ROOT / "tools"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    if name in sys.modules and getattr(sys.modules[name], "__file__", "") == str(
        folder / f"{name}.py"
    ):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(f"tools_{name}", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"tools_{name}"] = module
    spec.loader.exec_module(module)
    return module


def chapters() -> list[Path]:
    return sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))
