"""What a check raises, and what it returns when it finds nothing wrong."""

from __future__ import annotations

from dataclasses import dataclass, field


class CheckError(AssertionError):
    """A check failed; the message holds the number found and the one allowed."""


class LayerError(CheckError, ValueError):
    """What was given is no bijection that can be tried, or its forward or inverse raises."""


class InverseError(CheckError):
    """``inverse(forward(x))`` is not x."""


class LogDetError(CheckError):
    """A log-det is missing, differs from autograd's, or has the wrong shape or dtype."""


class BatchError(CheckError):
    """A row's result depends on the other rows of the batch, or on how it lies in memory."""


class GradientError(CheckError):
    """A parameter gets no gradient, a wrong one, or one that is not finite."""


class StateError(CheckError):
    """A layer's numbers are not all in its state_dict, or do not move and load with it."""


class PrecisionError(CheckError):
    """A result changed its dtype, or moved under autocast."""


class CompileError(CheckError):
    """``torch.compile(fullgraph=True)`` fails or computes something else."""


class VmapError(CheckError):
    """``torch.func.vmap`` over the rows fails or computes something else."""


class OntoError(CheckError):
    """There is a z that no x is mapped to, or that ``inverse`` does not reach."""


class AutoregressiveError(CheckError):
    """An output depends on an input that comes later in the order, or on none at all."""


class NormalizationError(CheckError):
    """A density does not integrate to one."""


@dataclass
class Report:
    """What was compared, and how closely it agreed. Printing it gives one line a check."""

    subject: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: str, result: str) -> None:
        self.lines.append((what, result))

    def __repr__(self) -> str:
        width = max((len(what) for what, _ in self.lines), default=0)
        return "\n".join([self.subject, *(f"  ok  {w:<{width}}  {r}" for w, r in self.lines)])
