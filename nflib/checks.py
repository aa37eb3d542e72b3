"""Proofs by computation: is this layer the bijection it says it is?

Each check compares what a layer claims with what autograd, an inverse or a grid finds, in float64
and on random parameters: at its identity initialisation a wrong log-det may well be zero. A
failed check raises a `CheckError` with the offending number; a passed one says what was compared.

    check_bijection(MyLayer(4), torch.randn(8, 4))  # in a notebook: shows a table
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nflib.core import Bijection, log_det_dtype, zeros_log_det

Map = Callable[[Tensor], Tensor]


class CheckError(AssertionError):
    """A check failed; the message holds the number found and the one allowed."""


class InverseError(CheckError):
    """``inverse(forward(x))`` is not x, or ``forward(inverse(z))`` is not z."""


class LogDetError(CheckError):
    """A log-det differs from autograd's, or has the wrong shape or dtype."""


class BatchError(CheckError):
    """A row's result depends on the other rows of the batch."""


class GradientError(CheckError):
    """A parameter gets no gradient, or one that is not finite."""


class StateError(CheckError):
    """A layer restored from its state_dict computes something else."""


class PrecisionError(CheckError):
    """A result changed its dtype, or moved under autocast."""


class CompileError(CheckError):
    """``torch.compile(fullgraph=True)`` fails or computes something else."""


class AutoregressiveError(CheckError):
    """An output depends on an input that comes later in the order."""


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


def check_bijection(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    *,
    randomize: bool = True,
    compile: bool = False,
    seed: int = 0,
) -> Report:
    """Everything a bijection promises, on a copy of the layer with random parameters.

    Log-dets against autograd in float64 in both directions, shape and dtype of log_det, round
    trips in float64 and float32, independence of the rows, gradients of every parameter, state_dict
    round trip, autocast, and with ``compile`` that ``torch.compile(fullgraph=True)`` equals eager.

    Args:
        layer: any `Bijection`; it is copied and left as it is.
        x: a batch of at least two data points, ``(batch, *event)``. Small events (up to a few
            dozen numbers) keep the Jacobian affordable: one backward pass for each.
        context: rows of context, if the layer uses it.
        randomize: shake the parameters first. Only a trained layer should be checked as it is.
        compile: also compile; takes seconds.
        seed: of the random parameters.

    Returns: a `Report`, whose repr is a short table.
    Raises: the `CheckError` of the first check that fails.
    """
    if x.ndim < 2 or x.shape[0] < 2:
        raise ValueError(
            f"check_bijection expects at least two rows in x, got shape {tuple(x.shape)}."
        )
    layer = copy.deepcopy(layer).eval()
    if randomize:
        randomize_parameters(layer, seed)
    x64 = x.detach().double()
    c64 = None if context is None else context.detach().double()
    double, single = copy.deepcopy(layer).double(), copy.deepcopy(layer).float()
    report = Report(f"{type(layer).__name__}, event {tuple(x.shape[1:])}: a bijection")
    check_batch_independence(double, x64, c64, report)
    check_log_det(double, x64, c64, report)
    check_inverse(double, x64, c64, report)
    check_inverse(single, x64.float(), None if c64 is None else c64.float(), report)
    check_gradients(double, x64, c64, report)
    check_state(double, x64, c64, report)
    check_autocast(single, x64.float(), None if c64 is None else c64.float(), report)
    if compile:
        check_compile(double, x64, c64, report)
    return report


def check_log_det(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: float = 1e-8,
) -> Report:
    """``log_det`` of forward at x, and of inverse at z = f(x), against autograd's ``slogdet(J)``.

    The two directions are compared one by one: that they cancel would not show an error which
    they share. Run it in float64; the tolerance is relative to 1 + |log_det|.
    """
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    with torch.no_grad():
        z, _ = layer(x, context)
    for direction, function, at in (("forward", layer, x), ("inverse", layer.inverse, z)):
        out, log_det = function(at, context)
        _check_shapes(f"{name}.{direction}", x, out, log_det)
        matrix = jacobian(_output_of(function, context), at)
        truth = torch.linalg.slogdet(matrix)[1]
        if not bool(torch.isfinite(truth).all()):
            raise LogDetError(
                f"{name}.{direction} has a singular Jacobian by autograd: it is no bijection here."
            )
        error = _worst(log_det - truth, 1 + truth.abs())
        if not error <= tolerance:
            row = int(((log_det - truth).abs() / (1 + truth.abs())).nan_to_num(torch.inf).argmax())
            raise LogDetError(
                f"{name}.{direction}: log_det is {log_det[row].item():.6g} where autograd finds "
                f"{truth[row].item():.6g} (row {row})."
            )
        report.add(f"log_det of {direction} = autograd's log|det J|", _below(tolerance, x.dtype))
    return report


def check_inverse(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: float | None = None,
) -> Report:
    """``inverse(forward(x)) = x`` with log-dets that cancel.

    The tolerance, relative to 1 + |x|, is 1e-8 in float64 and 1e-3 in float32 unless given.
    """
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    limit = tolerance or (1e-8 if x.dtype == torch.float64 else 1e-3)
    with torch.no_grad():
        z, forward_log_det = layer(x, context)
        back, inverse_log_det = layer.inverse(z, context)
    if back.shape != x.shape:
        raise InverseError(
            f"{name}: inverse(forward(x)) has shape {tuple(back.shape)}, x {tuple(x.shape)}."
        )
    if back.dtype != x.dtype or z.dtype != x.dtype:
        raise PrecisionError(f"{name} turns {x.dtype} into {z.dtype} and back into {back.dtype}.")
    error = _worst(back - x, 1 + x.abs())
    if not error <= limit:
        raise InverseError(
            f"{name}: inverse(forward(x)) differs from x by {error:.3g}, allowed is {limit:g}."
        )
    gap = _worst(forward_log_det + inverse_log_det, 1 + forward_log_det.abs())
    if not gap <= limit:
        raise InverseError(
            f"{name}: the log_dets of forward and inverse add up to {gap:.3g}, expected 0."
        )
    report.add("inverse(forward(x)) = x, log_dets cancel", _below(limit, x.dtype))
    return report


def check_batch_independence(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
) -> Report:
    """Each row alone gives what it gives in the batch, in both directions; batch 0 works."""
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    with torch.no_grad():
        z, _ = layer(x, context)
        for direction, function, at in (("forward", layer, x), ("inverse", layer.inverse, z)):
            whole = function(at, context)
            _check_shapes(f"{name}.{direction}", x, *whole)
            rows = [function(at[i : i + 1], _rows(context, i)) for i in range(len(at))]
            for k, what in enumerate(("output", "log_det")):
                alone = torch.cat([row[k] for row in rows])
                if alone.shape != whole[k].shape:
                    raise BatchError(
                        f"{name}.{direction}: the {what} of single rows has shape "
                        f"{tuple(alone.shape)}, in a batch {tuple(whole[k].shape)}."
                    )
                error = _worst(alone - whole[k], 1 + whole[k].abs())
                if not error <= 1e-8:
                    raise BatchError(
                        f"{name}.{direction}: the {what} of a row changes by {error:.3g} "
                        "with the rest of the batch."
                    )
            empty = function(at[:0], None if context is None else context[:0])
            if empty[0].shape != whole[0][:0].shape or empty[1].shape != (0,):
                raise BatchError(f"{name}.{direction} does not return an empty batch for one.")
    report.add("each row alone = in the batch, batch of 0 works", _below(1e-8, x.dtype))
    return report


def check_gradients(
    model: nn.Module,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
) -> Report:
    """Every parameter gets a finite gradient that is not zero.

    For a bijection the loss is a random projection of output and log_det, in each direction; for
    any other model the mean of ``log_prob``.
    """
    report = report or Report(type(model).__name__)
    losses: list[Callable[[], Tensor]]
    if isinstance(model, Bijection):
        with torch.no_grad():
            z, _ = model(x, context)
        losses = [
            lambda: _projection(*model(x, context)),
            lambda: _projection(*model.inverse(z, context)),
        ]
    else:
        losses = [lambda: model(x, context).mean() if context is not None else model(x).mean()]
    parameters = {name: p for name, p in model.named_parameters() if p.numel()}
    for loss in losses:
        if not parameters:
            break
        found = torch.autograd.grad(loss(), list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is None or not bool(gradient.any()):
                raise GradientError(f"{type(model).__name__}.{name} gets no gradient.")
            if not bool(torch.isfinite(gradient).all()):
                raise GradientError(
                    f"{type(model).__name__}.{name} gets a gradient that is not finite."
                )
    count = sum(p.numel() for p in parameters.values())
    report.add("a gradient reaches every parameter", f"numbers: {count}")
    return report


def check_state(
    layer: Bijection, x: Tensor, context: Tensor | None = None, report: Report | None = None
) -> Report:
    """A second layer that loads this one's state_dict computes exactly the same."""
    report = report or Report(type(layer).__name__)
    other = copy.deepcopy(layer)
    for tensor in (*other.parameters(), *other.buffers()):
        # Anything but the right values: what the state_dict leaves out shows in the result.
        tensor.data = torch.zeros_like(tensor)
    derived = {name for name, _ in other.named_buffers()} - set(layer.state_dict())
    for name in derived:
        # Buffers that are not saved are constants of the construction.
        other.get_buffer(name).data = layer.get_buffer(name).data.clone()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        z, _ = layer(x, context)
        for direction, at in (("forward", x), ("inverse", z)):
            mine, theirs = (getattr(one, direction)(at, context) for one in (layer, other))
            if not (torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])):
                error = _worst(mine[0] - theirs[0])
                raise StateError(
                    f"{type(layer).__name__}.{direction} changes by {error:.3g} when its "
                    "state_dict is loaded into a second layer."
                )
    report.add("state_dict holds all of it", "exact")
    return report


def check_autocast(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: float = 0.05,
) -> Report:
    """Under bfloat16 autocast outputs and log_dets stay float32, and log_det hardly moves.

    Only conditioners may run in bfloat16. The tolerance is in nats per dimension.
    """
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    with torch.no_grad():
        _, expected = layer(x, context)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            z, log_det = layer(x, context)
    if z.dtype != x.dtype or log_det.dtype != expected.dtype:
        raise PrecisionError(
            f"{name} under autocast returns {z.dtype} and a log_det in {log_det.dtype}, "
            f"expected {x.dtype} and {expected.dtype}."
        )
    moved = _worst(log_det - expected) / x[0].numel()
    if not moved <= tolerance:
        raise PrecisionError(
            f"{name}: log_det moves by {moved:.3g} nats per dimension under bfloat16 autocast, "
            f"allowed is {tolerance:g}."
        )
    report.add("bfloat16 autocast leaves log_det in float32", f"within {tolerance:g} nats/dim")
    return report


def check_compile(
    layer: Bijection,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    backend: str = "aot_eager",
) -> Report:
    """``torch.compile(fullgraph=True)``: one graph without a break, equal to eager to 1e-8.

    The default backend traces forward and backward without generating code; ``"inductor"``
    generates and needs a C++ compiler on CPU.
    """
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    if backend == "inductor" and x.device.type == "cpu" and not shutil.which("c++"):
        raise ValueError("The inductor backend expects a C++ compiler named c++, found none.")
    torch.compiler.reset()
    for direction in ("forward", "inverse"):
        function = getattr(layer, direction)
        with torch.no_grad():
            at = x if direction == "forward" else layer(x, context)[0]
            eager = function(at, context)
            try:
                compiled = torch.compile(function, fullgraph=True, backend=backend)(at, context)
            except Exception as error:
                raise CompileError(f"{name}.{direction} does not compile whole: {error}") from error
        gap = max(_worst(a - b, 1 + b.abs()) for a, b in zip(compiled, eager, strict=True))
        if not gap <= 1e-8:
            raise CompileError(f"{name}.{direction} compiled differs from eager by {gap:.3g}.")
    report.add("torch.compile(fullgraph=True) = eager", _below(1e-8, x.dtype))
    return report


def check_autoregressive(
    function: Map, x: Tensor, order: Sequence[int] | None = None, *, strict: bool = True
) -> Report:
    """Output i depends on the inputs before i only: autograd's Jacobian is triangular.

    Args:
        function: maps ``(batch, D)`` to ``(batch, D)`` or ``(batch, D, parameters)``.
        x: where to look, ``(batch, D)``.
        order: position of each dimension in the ordering, by default 0..D-1.
        strict: output i may not depend on input i either, as in a conditioner; in a flow it may.
    """
    dim = x.shape[1]
    rank = torch.arange(dim) if order is None else torch.as_tensor(order)
    with torch.no_grad():
        parameters = function(x).numel() // x.numel()
    matrix = jacobian(lambda a: function(a).reshape(len(a), -1), x)
    influence = matrix.unflatten(1, (dim, parameters)).abs().amax(dim=(0, 2))
    later = rank[:, None] <= rank[None, :] if strict else rank[:, None] < rank[None, :]
    leak = torch.where(later, influence.cpu(), 0.0)
    if bool(leak.any()):
        i, j = divmod(int(leak.argmax()), dim)
        raise AutoregressiveError(
            f"Output {i} depends on input {j}, which is not before it: "
            f"the derivative is {leak[i, j]:.3g}."
        )
    allowed = int((~later & (influence.cpu() > 0)).sum())
    report = Report(f"autoregressive in {dim} dimensions")
    report.add("no output sees a later input", f"{allowed} of {int((~later).sum())} links in use")
    return report


def check_normalized(
    model: Any,
    context: Tensor | None = None,
    *,
    limits: tuple[float, float] = (-10.0, 10.0),
    points: int = 600,
    dim: int = 2,
    tolerance: float = 0.01,
) -> Report:
    """The density integrates to one, by the midpoint rule on a grid (1-D or 2-D).

    Args:
        model: anything with ``log_prob(x, context)``, or a callable that returns log-densities.
        context: one row that serves every grid point.
        limits: of the square; it must hold nearly all of the mass.
        points: grid points a side.
        dim: 1 or 2.
    """
    if dim not in (1, 2):
        raise ValueError(f"check_normalized expects dim 1 or 2, got {dim}.")
    low, high = limits
    step = (high - low) / points
    like = torch.zeros(())
    if isinstance(model, nn.Module):
        like = next(model.parameters(), like)
    axis = low + step * (torch.arange(points, dtype=like.dtype, device=like.device) + 0.5)
    grid = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    log_prob = getattr(model, "log_prob", model)
    total = 0.0
    with torch.no_grad():
        for part in grid.split(65536):
            rows = () if context is None else (context.expand(len(part), *context.shape[1:]),)
            values = log_prob(part, *rows)
            total += values.double().exp().sum().item() * step**dim
    if not abs(total - 1) <= tolerance:
        raise NormalizationError(
            f"The density integrates to {total:.4f} over {limits} in {dim} dimensions, "
            f"expected 1 within {tolerance:g}."
        )
    report = Report(f"{type(model).__name__}: a density")
    report.add("integral over the grid", f"1 within {tolerance:g}")
    return report


def randomize_parameters(module: nn.Module, seed: int = 0, scale: float = 0.5) -> None:
    """Shake every parameter away from its initialisation, in place.

    Gaussian noise of standard deviation ``scale``, divided for matrices and kernels by the square
    root of their fan-in, so that a layer of any width is moved about as far.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * scale / fan_in**0.5).to(parameter))


def jacobian(function: Map, x: Tensor) -> Tensor:
    """Jacobians of a batch by autograd: ``(batch, D_out, D_in)``, events flattened.

    One backward pass for each output; it relies on rows that do not see one another.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = function(x).flatten(1)
        rows = [
            torch.autograd.grad(column.sum(), x, retain_graph=True, materialize_grads=True)[0]
            for column in out.unbind(1)
        ]
    return torch.stack([row.flatten(1) for row in rows], 1).detach()


def _worst(error: Tensor, scale: Tensor | float = 1.0) -> float:
    """The largest |error| / scale; NaN counts as infinite, nothing at all as zero."""
    if error.numel() == 0:
        return 0.0
    return (error.detach().abs() / scale).nan_to_num(nan=torch.inf).max().item()


def _below(tolerance: float, dtype: torch.dtype) -> str:
    """How closely two things agreed, in a form that is the same on every machine."""
    return f"{str(dtype).removeprefix('torch.')}, error < {tolerance:g}"


def _output_of(function: Callable[..., tuple[Tensor, Tensor]], context: Tensor | None) -> Map:
    return lambda x: function(x, context)[0]


def _check_shapes(call: str, x: Tensor, out: Tensor, log_det: Tensor) -> None:
    if out.shape[:1] != x.shape[:1] or out.numel() != x.numel():
        raise LogDetError(
            f"{call} returns shape {tuple(out.shape)}, expected as many numbers a row as in "
            f"{tuple(x.shape)}."
        )
    if log_det.shape != x.shape[:1]:
        raise LogDetError(
            f"{call} returns a log_det of shape {tuple(log_det.shape)}, "
            f"expected {tuple(x.shape[:1])}: one number a row."
        )
    if log_det.dtype != log_det_dtype(x.dtype):
        raise LogDetError(
            f"{call} returns a log_det in {log_det.dtype}, expected {log_det_dtype(x.dtype)}."
        )
    for what, tensor in (("an output", out), ("a log_det", log_det)):
        if not bool(torch.isfinite(tensor).all()):
            raise LogDetError(f"{call} returns {what} that is not finite for finite input.")


def _rows(context: Tensor | None, i: int) -> Tensor | None:
    return None if context is None else context[i : i + 1]


def _projection(out: Tensor, log_det: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return (weights * out).sum() + (log_det * zeros_log_det(out).add(1.3)).sum()
