"""Figures with a slider that need no kernel.

``frames`` draws one picture for each value and keeps them all in the cell's output, with a native
slider that shows one at a time: it works on the site, in JupyterLab and in Colab, by mouse, touch
and keyboard, offline. ``quiz`` asks which of several pictures is the one. The ready-made figures
are compositions of ``frames``. ``live`` adds ipywidgets where a reader's kernel is there to answer
them, and leaves nothing behind elsewhere.
"""

from nflib.interact.figures import layer_by_layer, push_point, warped_grid
from nflib.interact.quiz import Quiz, quiz
from nflib.interact.slider import Frames, frames
from nflib.interact.widgets import is_live, live

__all__ = [
    "Frames",
    "Quiz",
    "frames",
    "is_live",
    "layer_by_layer",
    "live",
    "push_point",
    "quiz",
    "warped_grid",
]
