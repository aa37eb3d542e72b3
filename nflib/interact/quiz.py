"""A question about pictures: which of these is it? The answer comes when one is chosen."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nflib.arguments import Count, Rule, Size, checked
from nflib.interact.page import Page
from nflib.plot.arrays import array

# A handler finds its figure from the button it belongs to: no ids, no script tag, see `Frames`.
_CHOOSE = (
    "const f=this.closest('figure'),g=[...f.querySelectorAll('button')],i=g.indexOf(this),"
    "r=i==+f.dataset.key;"
    "g.forEach((b,j)=>{b.setAttribute('aria-pressed',j==i);"
    "b.style.outline=j==i?'4px solid '+(r?'#0072B2':'#D55E00'):'none'});"
    "const o=f.querySelector('output');"
    "o.textContent=this.textContent.trim()+(r?': yes. '+o.dataset.answer:': no, try another one.')"
)


def _pictures(value: Any) -> list[NDArray[np.uint8]]:
    found = [np.asarray(array(each)) for each in value]
    if len(found) < 2 or any(p.dtype != np.uint8 or p.ndim != 3 or len(p) != 3 for p in found):
        raise ValueError
    return found


Pictures = Annotated[
    Sequence[Any], Rule("at least two pictures, uint8 of shape (3, height, width)", _pictures)
]


class Quiz(Page):
    """Pictures that are buttons, shown where it is a notebook cell's last expression.

    Attributes:
        question, answer: the texts above the pictures and, once one has been found, below them.
        right: index of the picture that answers the question.
        files: the JPEG files, in order.
        html: the figure as HTML without ids, script tags or anything outside itself.
    """

    def __init__(
        self, question: str, files: list[bytes], right: int, answer: str, width: int
    ) -> None:
        self.question, self.files, self.right = question, files, right
        self.answer, self.width = answer, width

    def __str__(self) -> str:
        return f"Question with {len(self.files)} pictures to choose from: {self.question}"

    @property
    def html(self) -> str:
        question = escape(self.question)
        return (
            f'<figure class="nflib-quiz" data-lm-suppress-shortcuts="true" role="group" '
            f'aria-label="{question}" data-key="{self.right}" '
            f'style="margin:0.6em 0;max-width:{2 * self.width + 30}px;color:inherit">'
            f'<p style="margin:0 0 0.5em">{question}</p>'
            '<div style="display:grid;grid-template-columns:1fr 1fr;gap:10px">'
            f"{''.join(self._button(index) for index in range(len(self.files)))}</div>"
            f'<output aria-live="polite" data-answer="{escape(self.answer)}" '
            'style="display:block;min-height:1.6em;margin:0.5em 0 0">'
            "Choose a picture.</output></figure>"
        )

    def _button(self, index: int) -> str:
        letter = chr(ord("A") + index)
        data = base64.b64encode(self.files[index]).decode()
        return (
            f'<button type="button" aria-pressed="false" onclick="{escape(_CHOOSE)}" '
            'onkeydown="event.stopPropagation()" style="padding:4px;cursor:pointer;color:inherit;'
            'background:transparent;border:1px solid currentColor;border-radius:4px;font:inherit">'
            f'<img class="dark-light" alt="Picture {letter}" width="{self.width}" '
            'style="display:block;width:100%;height:auto" '
            f'src="data:image/jpeg;base64,{data}">'
            f'<span aria-hidden="true">Picture {letter}</span></button>'
        )


@checked
def quiz(
    question: str,
    pictures: Pictures,
    right: Count,
    *,
    answer: str = "",
    width: Size = 360,
    quality: Size = 80,
) -> Quiz:
    """Ask which of several pictures is the one: a click, a touch, or Tab and Enter choose.

    The pictures are all called by their letters, so that their descriptions do not tell which is
    right, and all are stored alike, so that the compression does not.

    Args:
        question: the text above them.
        pictures: two to twenty-six, uint8 of shape (3, height, width).
        right: index of the one that answers the question.
        answer: the text that follows when it has been chosen.
        width: pixels of each picture; larger ones are made smaller.
        quality: of the JPEG files, 1 to 95.

    Raises: ArgumentError for other pictures, or if none of them has the index.
    """
    if right >= len(pictures):
        raise ValueError(f"quiz expects right to be below {len(pictures)}, got {right}.")
    files = []
    for picture in pictures:
        image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
        image.thumbnail((width, 4 * width))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=min(quality, 95), optimize=True)
        files.append(file.getvalue())
    return Quiz(question, files, right, answer, width)
