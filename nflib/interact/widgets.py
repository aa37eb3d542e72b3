"""Sliders that call Python, where a reader's kernel is there to answer."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import numpy as np

from nflib.interact.render import Draw, encode, picture


def is_live() -> bool:
    """Whether someone is there to move a slider: JupyterLab, Jupyter Notebook, VS Code or Colab.

    A notebook that is only being executed (to store its outputs, or by the tests) says no.
    ``NFLIB_STATIC=1`` in the environment always says no, ``NFLIB_STATIC=0`` always yes.
    """
    static = os.environ.get("NFLIB_STATIC")
    if static is not None:
        return static == "0"
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return False
    # JPY_SESSION_NAME is set by the Jupyter server that opened the notebook, not by nbclient.
    return (
        "JPY_SESSION_NAME" in os.environ
        or "google.colab" in sys.modules
        or "__vsc_ipynb_file__" in shell.user_ns
    )


def live(
    draw: Draw,
    *,
    panels: int = 1,
    size: tuple[float, float] = (4.4, 3.6),
    dpi: int = 100,
    **ranges: Any,
) -> None:
    """Sliders for any values between, beside the figure that also works without a kernel.

    Shows nothing unless `is_live`, so that no widget is ever stored in a notebook.

    Args:
        draw: called as ``draw(value, ax)`` for one range, the same function that `frames` takes;
            for several ranges value is a dict from their names to their values.
        panels, size, dpi: as in `frames`.
        ranges: for each value by name ``(low, high)`` (whole numbers give a slider of whole
            numbers), ``(low, high, step)``, or a list to choose from.
    """
    if not ranges:
        raise ValueError("live expects at least one range such as t=(0.0, 1.0), got none.")
    for name, given in ranges.items():
        _check_range(name, given)
    if not is_live():
        return
    try:
        import ipywidgets
        from IPython.display import display
    except ImportError as error:
        raise ImportError(
            "live expects ipywidgets and IPython, which are not installed: pip install ipywidgets."
        ) from error
    sliders = {name: _slider(ipywidgets, name, given) for name, given in ranges.items()}
    image = ipywidgets.Image(format="png")

    def update(change: Any = None) -> None:
        values = {name: slider.value for name, slider in sliders.items()}
        value = values if len(values) > 1 else next(iter(values.values()))
        drawn, _ = picture(partial(draw, value), panels, size, dpi)
        image.value = encode([drawn], 256)[0]

    for slider in sliders.values():
        slider.observe(update, names="value")
    update()
    display(ipywidgets.VBox([*sliders.values(), image]))


def _check_range(name: str, given: Any) -> None:
    listed = isinstance(given, list) and len(given) > 0
    paired = (
        isinstance(given, tuple)
        and len(given) in {2, 3}
        and all(isinstance(end, int | float | np.number) for end in given)
        and given[0] < given[1]
    )
    if not (listed or paired):
        raise ValueError(
            f"live expects {name} as (low, high), (low, high, step) or a list of values, "
            f"got {given!r}."
        )


def _slider(ipywidgets: Any, name: str, given: Any) -> Any:
    if isinstance(given, list):
        return ipywidgets.SelectionSlider(options=given, description=name)
    low, high = given[:2]
    whole = all(isinstance(end, int | np.integer) for end in given)
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    step = given[2] if len(given) == 3 else 1 if whole else (high - low) / 100
    return kind(value=low, min=low, max=high, step=step, description=name)
