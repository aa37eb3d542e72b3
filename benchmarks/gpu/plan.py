"""The parts, in the order of their worth, and how they share the time. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One module of this package, and one file of results.

    Attributes:
        name: of the module and of its JSON file.
        share: of the whole time.
        workers: how many of its rows are measured at once on a GPU; 1 where a clock is read, or
            where one row keeps the device busy.
    """

    name: str
    share: float
    workers: int = 1


PARTS = (
    Part("correctness", 0.07),
    Part("mixer", 0.25),
    Part("speed", 0.18),
    Part("samplers", 0.04),
    Part("memory", 0.05),
    Part("weights", 0.23, workers=4),
    Part("search", 0.07, workers=4),
    Part("claims", 0.11, workers=4),
)

# Weights that are kept, the most worthy first: the last ones go if all together are too large.
WORTH = (
    "mnist_mixerflow",
    "mnist_glow",
    "mnist_realnvp",
    "mnist_flowpp",
    "mnist_classes_gated",
    "mnist_classes_plusplus",
    "binarized_pixelcnn",
    "wavenet_digits",
    "colour_mixerflow",
    "colour_glow",
    "mnist_classes_pixelcnn",
)


def chosen(names: Sequence[str]) -> list[Part]:
    """The parts of these names, in the order of their worth; all for no name."""
    known = [part.name for part in PARTS]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(
            f"benchmarks.gpu expects parts among {', '.join(known)}, got {', '.join(unknown)}."
        )
    return [part for part in PARTS if not names or part.name in names]


def allotment(parts: Sequence[Part], left: float) -> float:
    """Seconds for the first of the parts that are still to come.

    The time that is left is divided by their shares, so that what one part does not need goes to
    those after it, and the last one may use all.
    """
    return left * parts[0].share / sum(part.share for part in parts)
