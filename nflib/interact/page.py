"""What every figure that needs no kernel is: a piece of HTML that a notebook shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Page:
    """A figure as HTML. A subclass has ``html``, and says in ``str`` what it shows."""

    @property
    def html(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not define html.")

    def __repr__(self) -> str:
        return str(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/html": self.html, "text/plain": str(self)}

    def save(self, file: str | Path) -> None:
        """Write the figure as a page of its own."""
        Path(file).write_text(f"<!doctype html><meta charset='utf-8'>{self.html}", "utf-8")
