"""Where a sampler stands in the images it draws, and how it reads and writes there.

Layers keep what they were given in buffers ``(batch, channels, H, W)``, padding included. At the
cursor they write into a window of a buffer and cut one out. There are two ways:

    by numbers of Python      slices, which are views          `Cursor`
    by numbers on the device  index_select and index_copy_     `DeviceCursor`

The first is the faster one where starting an operation costs little. With the second, the same
operations on the same memory serve every pixel, so that a GPU can replay them, see `nflib.graphs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nflib import graphs

Features = list[Tensor | None]
Sides = tuple[int, int]


class Cursor:
    """Stands at a pixel of some images, or with ``col=None`` at a whole row.

    A buffer of an image that was halved ``scale`` times has a row for every 2^scale of them. One
    that has fewer holds the last ones, row r at r modulo its height.

    Args:
        images: ``(batch, C, H, W)``, for their sides and device.
        known: which pixels are kept, a boolean ``(H, W)`` on the CPU, or None.
    """

    def __init__(self, images: Tensor, known: Tensor | None) -> None:
        self.height, self.width = images.shape[2:]
        self.row = 0
        self.col: int | None = None
        self.known: Any = None if known is None else known.tolist()

    def move(self, row: int, col: int | None = None) -> None:
        """On to a pixel or a row; pixels come one after the other."""
        self.row, self.col = row, col

    def passes(self, scale: int) -> bool:
        """Whether an image halved so often has nothing at this row or pixel."""
        return bool(self.row % 2**scale or (self.col or 0) % 2**scale)

    def cut(self, buffer: Tensor, scale: int = 0, size: Sides = (1, 1)) -> Tensor:
        """The window of this size whose first pixel is the cursor's; all columns of a row."""
        row = (self.row >> scale) % buffer.shape[2]
        if self.col is None:
            return buffer[:, :, row : row + size[0]]
        col = self.col >> scale
        return buffer[:, :, row : row + size[0], col : col + size[1]]

    def put(self, buffer: Tensor, x: Tensor, scale: int = 0, top: int = 0, left: int = 0) -> None:
        """Write x into a buffer with so many rows and columns of padding before the first pixel."""
        row = ((self.row >> scale) + top) % buffer.shape[2]
        col = left if self.col is None else left + (self.col >> scale)
        buffer[:, :, row : row + x.shape[2], col : col + x.shape[3]].copy_(x)

    def unless_known(self, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """What is drawn, or where the pixel is kept what x has there."""
        if self.known is not None and self.known[self.row][self.col]:
            return self.cut(x)
        return draw()

    def arrive(self) -> None:
        """A pixel begins: called by what is recorded, as `move` is not."""

    def leave(self) -> None:
        """It ends."""


class DeviceCursor(Cursor):
    """Finds its pixel by a number on the device, which counts them itself, row after row.

    Rows are cut by numbers of Python; so is decided what passes over a pixel. Buffers are
    contiguous.
    """

    def __init__(self, images: Tensor, known: Tensor | None) -> None:
        super().__init__(images, None)
        self.known = None if known is None else known.to(images.device)[None, None]
        self.position = torch.zeros(1, dtype=torch.long, device=images.device)
        # Of each kind of window the places in its buffer: for all positions, and for this one.
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._here: dict[tuple[int, ...], Tensor] = {}
        self._joined: Tensor | None = None
        self._widths: list[int] = []

    def cut(self, buffer: Tensor, scale: int = 0, size: Sides = (1, 1)) -> Tensor:
        if self.col is None:
            return super().cut(buffer, scale, size)
        places = self._places(buffer, scale, 0, 0, *size)
        return buffer.flatten(2).index_select(2, places).unflatten(2, size)

    def put(self, buffer: Tensor, x: Tensor, scale: int = 0, top: int = 0, left: int = 0) -> None:
        if self.col is None:
            return super().put(buffer, x, scale, top, left)
        places = self._places(buffer, scale, top, left, *x.shape[2:])
        flat = buffer.view(*buffer.shape[:2], buffer.shape[2] * buffer.shape[3])
        flat.index_copy_(2, places, x.flatten(2).to(buffer.dtype))

    def unless_known(self, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        drawn = draw()
        if self.known is None:
            return drawn
        return torch.where(self.cut(self.known), self.cut(x), drawn)

    def arrive(self) -> None:
        if self._tables and self._joined is None:
            # The first pixel reached every layer: from now on all windows are found at once.
            self._widths = [table.shape[1] for table in self._tables.values()]
            self._joined = torch.cat(list(self._tables.values()), 1)
        self._here = {}
        if self._joined is not None:
            places = self._joined.index_select(0, self.position)[0].split(self._widths)
            self._here.update(zip(self._tables, places, strict=False))

    def leave(self) -> None:
        self.position += 1

    def _places(self, buffer: Tensor, *window: int) -> Tensor:
        """Where a window lies in a buffer whose pixels are counted row after row."""
        key = (*buffer.shape[2:], *window)
        if key not in self._here:
            if key not in self._tables:
                self._tables[key] = self._table(*key)
            self._here[key] = self._tables[key].index_select(0, self.position)[0]
        return self._here[key]

    def _table(
        self, height: int, width: int, scale: int, top: int, left: int, tall: int, wide: int
    ) -> Tensor:
        """``(positions, tall * wide)``."""
        device = self.position.device
        position = torch.arange(self.height * self.width, device=device)
        row = (position // self.width >> scale)[:, None] + top + torch.arange(tall, device=device)
        col = (position % self.width >> scale)[:, None] + left + torch.arange(wide, device=device)
        return (row % height * width)[:, :, None].add(col[:, None]).flatten(1)


def cursor_for(images: Tensor, known: Tensor | None) -> Cursor:
    """The cursor that the images' device wants."""
    kind = Cursor if graphs.recorder_for(images.device) is None else DeviceCursor
    return kind(images, known)


class Line:
    """Features of the cursor's row in memory that stays; those of one width are cut as one."""

    def __init__(self) -> None:
        self.count = 0
        # By scale: the places in the list, the channels of each, and all of them as one tensor.
        self.held: dict[int, tuple[list[int], list[int], Tensor]] = {}

    def keep(self, cursor: Cursor, features: Features) -> None:
        """Take the features of a row; those that are None, for it passes over them, stay."""
        self.count = len(features)
        groups: dict[int, dict[int, Tensor]] = {}
        for k, part in enumerate(features):
            if part is not None:
                scale = int(math.log2(cursor.width // part.shape[3]))
                groups.setdefault(scale, {})[k] = part
        for scale, group in groups.items():
            parts = list(group.values())
            if scale in self.held:
                torch.cat(parts, 1, out=self.held[scale][2])
            else:
                channels = [part.shape[1] for part in parts]
                self.held[scale] = (list(group), channels, torch.cat(parts, 1))

    def at(self, cursor: Cursor) -> Features:
        """The features at the cursor's column, None where it passes over them."""
        features: Features = [None] * self.count
        for scale, (places, channels, joined) in self.held.items():
            if not cursor.passes(scale):
                columns = cursor.cut(joined, scale).split(channels, 1)
                for k, column in zip(places, columns, strict=True):
                    features[k] = column
        return features
