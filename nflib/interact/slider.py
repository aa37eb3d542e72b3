"""A slider over pictures drawn beforehand."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nflib.interact.page import Page
from nflib.interact.render import Draw, Place, encode, picture

# Handlers find their figure from the element they belong to: no ids, so any number of figures
# lives on a page, and no script tag, which a notebook's viewer may drop.
_SHOW = (
    "const f=this.closest('figure'),g=[...f.querySelectorAll('img')],i=+this.value;"
    "g.forEach((m,j)=>{m.hidden=j!=i;m.style.display=j==i?'block':'none'});"
    "f.querySelector('output').textContent=g[i].title;"
    "this.setAttribute('aria-valuetext',g[i].title)"
)
_PLAY = (
    "const b=this,r=b.closest('figure').querySelector('input'),"
    "stop=()=>{clearInterval(+b.value);b.value='';b.textContent='\\u25B6';"
    "b.setAttribute('aria-label','Play')};"
    "if(b.value){stop();return}"
    "if(+r.value>=+r.max){r.value=0;r.oninput()}"
    "b.textContent='\\u275A\\u275A';b.setAttribute('aria-label','Pause');"
    "b.value=setInterval(()=>{if(!b.isConnected||+r.value>=+r.max){stop();return}"
    "r.value=+r.value+1;r.oninput()},PAUSE)"
)


class Frames(Page):
    """Pictures with a slider, shown where it is a notebook cell's last expression.

    Attributes:
        values, names, alts: of each picture: its value, the value as text, its description.
        files: the PNG files.
        html: the figure as HTML without ids, script tags or anything outside itself.
    """

    def __init__(
        self,
        values: Sequence[Any],
        names: list[str],
        alts: list[str],
        files: list[bytes],
        *,
        label: str,
        start: int,
        width: int,
        pause: float,
    ) -> None:
        self.values, self.names, self.alts, self.files = list(values), names, alts, files
        self.label, self.start, self.width, self.pause = label, start, width, pause

    def __len__(self) -> int:
        return len(self.files)

    def __str__(self) -> str:
        return (
            f"Figure with a slider: {self.label} from {self.names[0]} to {self.names[-1]} in "
            f"{len(self)} pictures. At {self.label} = {self.names[self.start]}: "
            f"{self.alts[self.start]}"
        )

    @property
    def html(self) -> str:
        label, now = escape(self.label), escape(self.names[self.start])
        play = _PLAY.replace("PAUSE", str(round(1000 * self.pause)))
        return (
            f'<figure class="nflib-frames" data-lm-suppress-shortcuts="true" role="group" '
            f'aria-label="Figure with a slider for {label}" '
            f'style="margin:0.6em 0;max-width:{self.width}px;color:inherit">'
            f"{''.join(self._image(index) for index in range(len(self)))}"
            '<figcaption style="display:flex;gap:0.6em;align-items:center;margin:0.3em 0 0;'
            'color:inherit;font:inherit">'
            f'<button type="button" aria-label="Play" value="" onclick="{escape(play)}" '
            'style="min-width:2.4em;min-height:2.2em;padding:0;cursor:pointer;color:inherit;'
            'background:transparent;border:1px solid currentColor;border-radius:4px">&#9654;'
            "</button>"
            f'<input type="range" min="0" max="{len(self) - 1}" step="1" value="{self.start}" '
            f'autocomplete="off" aria-label="{label}" aria-valuetext="{now}" '
            f'oninput="{escape(_SHOW)}" onkeydown="event.stopPropagation()" '
            'style="flex:1;min-width:6em;height:2.2em;margin:0;accent-color:#0072B2">'
            f'<span style="white-space:nowrap;font-variant-numeric:tabular-nums">{label} = '
            f"<output>{now}</output></span></figcaption></figure>"
        )

    def _image(self, index: int) -> str:
        shown = index == self.start
        data = base64.b64encode(self.files[index]).decode()
        # dark-light tells the site's theme that the picture brings its own white paper.
        return (
            f'<img class="dark-light" alt="{escape(self.alts[index])}" '
            f'title="{escape(self.names[index])}" width="{self.width}" '
            f"{'' if shown else 'hidden '}"
            f'style="display:{"block" if shown else "none"};max-width:100%;height:auto;'
            f'background:white" src="data:image/png;base64,{data}">'
        )


def plain(values: Iterable[Any]) -> list[Any]:
    """A list whose numbers are Python's, so that they leave the dtype of a tensor alone."""
    return [
        value.item() if isinstance(value, np.generic | Tensor) and value.ndim == 0 else value
        for value in values
    ]


def frames(
    draw: Draw,
    values: Sequence[Any],
    *,
    alt: str | Callable[[Any], str],
    label: str = "t",
    start: int = 0,
    format: str | Callable[[Any], str] = "{:.2f}",
    panels: int = 1,
    size: tuple[float, float] = (4.4, 3.6),
    dpi: int = 100,
    colours: int = 64,
    pause: float = 0.3,
) -> Frames:
    """Draw a picture for each value and put them under one slider.

    Args:
        draw: called as ``draw(value, ax)``; as ``draw(value, axes)`` with an array of ``panels``
            axes if there are several; as ``draw(value, figure)`` with an empty figure for
            ``panels=0``. Give the axes fixed limits, or the pictures will jump.
        values: what the slider runs through, 16 to 24 of them.
        alt: what one sees, for who cannot: a function of the value, or one text, to which the
            value is then added.
        label: the name of the value, beside the slider.
        start: index of the picture shown first (a negative one counts from the end).
        format: how a value is written: a format string or a function.
        panels: number of axes side by side.
        size: width and height in inches, of ``dpi`` dots each.
        colours: number of colours in all pictures together; more of them make larger files.
        pause: seconds a picture stays while they play by themselves.

    Returns `Frames`, which the notebook shows. Cost: one drawing for each value, about 0.1 s.
    """
    values = plain(values)
    if not values:
        raise ValueError("frames expects at least one value, got none.")
    if not -len(values) <= start < len(values):
        raise ValueError(f"frames expects start among {len(values)} values, got {start}.")
    if panels < 0 or not 2 <= colours <= 256:
        raise ValueError(
            f"frames expects panels >= 0 and 2 to 256 colours, got {panels} and {colours}."
        )
    names = [format.format(value) if isinstance(format, str) else format(value) for value in values]
    alts = [
        alt(value) if callable(alt) else f"{alt.rstrip('.')}, {label} = {name}."
        for value, name in zip(values, names, strict=True)
    ]
    pictures: list[NDArray[np.uint8]] = []
    places: list[Place] | None = None
    for value in values:
        drawn, found = picture(partial(draw, value), panels, size, dpi, places)
        places = found if places is None else places
        pictures.append(drawn)
    return Frames(
        values,
        names,
        alts,
        encode(pictures, colours),
        label=label,
        start=start % len(values),
        width=pictures[0].shape[1],
        pause=pause,
    )
