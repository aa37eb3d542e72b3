"""Where the batches of a run come from: tensors, a data set, a stream, or nowhere.

The order of the rows is a function of seed and epoch alone, so that a resumed run finds its place.
All processes see the same batches, and each takes its share of them. Of rows in memory a step is
given the numbers and gathers the rows itself, on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from nflib.core import check_finite
from nflib.train.surroundings import seeded

BATCH_SIZE = 128
# Rows behind data-dependent starts such as ActNorm's: a batch may be too small for statistics.
FIRST_ROWS = 512
VALIDATED_AT_ONCE = 1024


@dataclass(frozen=True)
class Target:
    """Where batches go: the model's device and dtype, and one process of several."""

    device: torch.device
    dtype: torch.dtype
    process: int = 0
    processes: int = 1

    def move(self, tensors: list[Tensor]) -> list[Tensor]:
        """Floating-point numbers in the model's dtype, all else as it is, on the device."""
        return [
            t.to(self.device, self.dtype if t.is_floating_point() else t.dtype, non_blocking=True)
            for t in tensors
        ]

    def check(self, rows: int) -> None:
        if rows % self.processes:
            raise ValueError(
                f"fit expects a batch_size that {self.processes} processes can share evenly, "
                f"got {rows} rows in a batch."
            )

    def share(self, rows: Tensor) -> Tensor:
        return rows[self.process :: self.processes] if self.processes > 1 else rows


class Drawn(NamedTuple):
    """What a step is called with, and the numbers of its rows in the data if they have any."""

    inputs: list[Tensor]
    numbers: Tensor | None = None


class NoRows:
    """No data: every batch is empty, and ``loss(model)`` draws for itself."""

    rows: int | None = None
    per_epoch: int | None = None
    batch_size: int | None = None
    name = "no data"

    def batches(self, step: int) -> Iterator[Drawn]:
        """This process's share of all batches from that step on, without an end."""
        return itertools.repeat(Drawn([]))

    def batch(self, *inputs: Tensor) -> list[Tensor]:
        """The tensors of a batch, from what `batches` gives as inputs."""
        return list(inputs)

    def first(self) -> list[Tensor]:
        """FIRST_ROWS rows, or a batch if that is more, or all; the same ones in all processes."""
        return []

    def check(self, model: nn.Module) -> None:
        """Refuse rows that the model cannot take: of all those in memory, else of the first."""
        self._check(model, self.first())

    def _check(self, model: nn.Module, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            check_finite(tensor, self.name)
        check_data = getattr(model, "check_data", None)
        if tensors and check_data is not None:
            check_data(tensors[0])

    def once(self) -> Iterator[list[Tensor]]:
        """All rows once, in batches; each process gets others."""
        return iter([])

    def place(self, drawn: Drawn, row: int) -> str:
        """Where a row of a batch is from, in words."""
        if drawn.numbers is None:
            return f"row {row} of the batch"
        return f"row {int(drawn.numbers[row])} of {self.name}"


class TensorRows(NoRows):
    """Tensors, which move to the device as a whole. An epoch visits each row at most once."""

    rows: int
    per_epoch: int
    batch_size: int

    def __init__(
        self, tensors: list[Tensor], name: str, batch_size: int, seed: int, target: Target
    ) -> None:
        self.name, self.seed, self.target = name, seed, target
        self.rows = self.hold(tensors)
        self.batch_size = min(batch_size, self.rows)
        self.per_epoch = self.rows // self.batch_size

    def hold(self, tensors: list[Tensor]) -> int:
        """Keep the data; returns the number of rows."""
        self.tensors, self.device = self.target.move(tensors), self.target.device
        return len(tensors[0])

    def take(self, index: Tensor) -> list[Tensor]:
        """Rows by their numbers, on the device."""
        return [tensor.index_select(0, index) for tensor in self.tensors]

    def draw(self, index: Tensor) -> Drawn:
        """What a step is called with for these rows."""
        return Drawn([index], index)

    def batch(self, *inputs: Tensor) -> list[Tensor]:
        return self.take(*inputs)

    def order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of_epoch(self.seed, epoch))
        return torch.randperm(self.rows, generator=generator).to(self.device)

    def batches(self, step: int) -> Iterator[Drawn]:
        self.target.check(self.batch_size)
        first_epoch, position = divmod(step, self.per_epoch)
        for epoch in itertools.count(first_epoch):
            order = self.order(epoch)
            for k in range(position, self.per_epoch):
                rows = order[k * self.batch_size : (k + 1) * self.batch_size]
                yield self.draw(self.target.share(rows))
            position = 0

    def first(self) -> list[Tensor]:
        return self.take(self.order(0)[: max(FIRST_ROWS, self.batch_size)])

    def check(self, model: nn.Module) -> None:
        self._check(model, self.tensors)

    def once(self) -> Iterator[list[Tensor]]:
        parts = torch.arange(self.rows, device=self.device).split(
            max(self.batch_size, VALIDATED_AT_ONCE)
        )
        return map(self.take, parts[self.target.process :: self.target.processes])


class ItemRows(TensorRows):
    """A map-style `torch.utils.data.Dataset`, whose items become batches one step at a time."""

    def hold(self, items: Any) -> int:
        self.items, self.device = items, torch.device("cpu")
        if len(items) == 0:
            raise ValueError(f"fit expects {self.name} of at least one row, got none.")
        return len(items)

    def check(self, model: nn.Module) -> None:
        self._check(model, self.first())

    def take(self, index: Tensor) -> list[Tensor]:
        batch = default_collate([self.items[i] for i in index.tolist()])
        return self.target.move(as_tensors(batch, self.name))

    def draw(self, index: Tensor) -> Drawn:
        return Drawn(self.take(index), index)

    def batch(self, *inputs: Tensor) -> list[Tensor]:
        return list(inputs)


class Stream(NoRows):
    """Anything that can be iterated over again and again, and gives batches: a `DataLoader`.

    Each pass over it is one epoch, with random numbers of its own.
    """

    def __init__(self, source: Iterable[Any], name: str, seed: int, target: Target) -> None:
        self.source, self.name, self.seed, self.target = source, name, seed, target
        try:
            self.per_epoch = len(source)  # type: ignore[arg-type]
        except TypeError:
            self.per_epoch = None

    def start(self, epoch: int, skip: int = 0) -> tuple[Iterator[Any], Any, int]:
        """A pass behind its first batches, the batch that stands there, how many were skipped."""
        with seeded(seed_of_epoch(self.seed, epoch)):
            iterator, skipped = iter(self.source), 0
            batch = next(iterator, None)
            while batch is not None and skipped < skip:
                batch, skipped = next(iterator, None), skipped + 1
        if batch is None and skipped == 0:
            raise ValueError(f"fit expects {self.name} that gives batches, got none from it.")
        return iterator, batch, skipped

    def batches(self, step: int) -> Iterator[Drawn]:
        first_epoch, skip = divmod(step, self.per_epoch) if self.per_epoch else (0, step)
        for epoch in itertools.count(first_epoch):
            iterator, batch, skipped = self.start(epoch, skip)
            skip -= skipped
            while batch is not None:
                tensors = as_tensors(batch, self.name)
                self.target.check(len(tensors[0]))
                yield Drawn(self.target.move([self.target.share(t) for t in tensors]))
                batch = next(iterator, None)

    def first(self) -> list[Tensor]:
        iterator, batch, _ = self.start(0)
        found: list[list[Tensor]] = []
        for part in itertools.chain([batch], iterator):
            found.append(as_tensors(part, self.name))
            if sum(len(tensors[0]) for tensors in found) >= FIRST_ROWS:
                break
        return self.target.move([torch.cat(tensors) for tensors in zip(*found, strict=True)])

    def once(self) -> Iterator[list[Tensor]]:
        mine = itertools.islice(self.source, self.target.process, None, self.target.processes)
        return (self.target.move(as_tensors(batch, self.name)) for batch in mine)


def source_of(data: Any, name: str, batch_size: int | None, seed: int, target: Target) -> NoRows:
    """Data of any kind that `nflib.train.fit` takes, or a ValueError that says what it takes."""
    inner = getattr(data, "x", None)
    data = inner if isinstance(inner, Tensor) and not isinstance(data, Dataset) else data
    if isinstance(data, IterableDataset):
        return Stream(DataLoader(data, batch_size or BATCH_SIZE), name, seed, target)
    if isinstance(data, Dataset):
        return ItemRows(data, name, batch_size or BATCH_SIZE, seed, target)  # type: ignore[arg-type]
    if isinstance(data, Tensor | numpy.ndarray | tuple | list):
        tensors = as_tensors(data, name)
        return TensorRows(tensors, name, batch_size or BATCH_SIZE, seed, target)
    if batch_size is not None:
        whose = "the loss draws its own" if data is None else f"{type(data).__name__} has its own"
        raise ValueError(f"fit expects no batch_size here ({whose}), got {batch_size}.")
    if data is None and target.processes > 1:
        # What makes the gradients of several processes one is a call of the model on their rows.
        raise ValueError(
            f"fit expects one process for a loss without data, got {target.processes}."
        )
    if data is None:
        return NoRows()
    # What has rows by number or key (a DataFrame, a dict) means something else when iterated over.
    can_restart = isinstance(data, Iterable) and not isinstance(data, Iterator)
    if not can_restart or hasattr(data, "__getitem__"):
        raise ValueError(
            f"fit expects {name} as tensors, NumPy arrays, a tuple of them, a data set, a "
            f"DataLoader or another iterable of batches that can start anew, "
            f"got {type(data).__name__}."
        )
    return Stream(data, name, seed, target)


def as_tensors(data: Any, name: str) -> list[Tensor]:
    """Rows, or a tuple of them, as tensors of equal length; else one sentence on what is wrong."""
    tensors = []
    for rows in data if isinstance(data, tuple | list) else [data]:
        if isinstance(rows, numpy.ndarray) and rows.dtype.kind in "biuf":
            rows = torch.from_numpy(numpy.array(rows))  # a copy: torch shares no read-only memory
        if not isinstance(rows, Tensor) or rows.ndim == 0:
            got = getattr(rows, "dtype", None) or type(rows).__name__
            raise ValueError(f"fit expects {name} as tensors or NumPy arrays of rows, got {got}.")
        tensors.append(rows)
    lengths = [len(rows) for rows in tensors]
    if not lengths or min(lengths) < 1 or len(set(lengths)) > 1:
        raise ValueError(
            f"fit expects {name} with the same number of rows, at least one, got {lengths}."
        )
    return tensors


def seed_of_epoch(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch
