"""Is this layer the bijection it says it is? Log-dets, round trips, rows that stand alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from nflib.arguments import Count, Positive, checked
from nflib.checks.calls import Pair, call, check_result, differentiable
from nflib.checks.errors import (
    BatchError,
    CheckError,
    InverseError,
    LayerError,
    LogDetError,
    PrecisionError,
    Report,
)
from nflib.checks.subject import (
    Rows,
    Subject,
    check_methods,
    check_registered,
    require_context,
    require_layer,
    require_rows,
    try_out,
)
from nflib.checks.tools import apart, below, first_line, jacobian, randomize_parameters, rows, worst
from nflib.checks.training import (
    check_autocast,
    check_compile,
    check_gradients,
    check_state,
)
from nflib.core import Layer


@checked
def check_bijection(
    layer: Subject,
    x: Rows,
    context: Rows | None = None,
    *,
    randomize: bool = True,
    compile: bool = False,
    seed: Count = 0,
) -> Report:
    """Everything a bijection promises, on a copy of the layer with random parameters.

    Log-dets against autograd in float64 in both directions, shape and dtype of log_det, round
    trips in float64 and float32, independence of the rows, gradients of every parameter, state_dict
    round trip, autocast, and with ``compile`` that ``torch.compile(fullgraph=True)`` equals eager.

    It is a test at the few points x and at what they are mapped to. A fault elsewhere, or a z that
    no x is mapped to, goes unseen; `check_onto` looks for the latter.

    Args:
        layer: any bijective `Layer`; it is copied and left as it is.
        x: a batch of at least two data points, ``(batch, *event)``. Small events (up to a few
            dozen numbers) keep the Jacobian affordable: one backward pass for each.
        context: rows of context, if the layer uses it.
        randomize: shake the parameters first. Only a trained layer should be checked as it is.
        compile: also compile; takes seconds.
        seed: of the random parameters.

    Returns: a `Report`, whose repr is a short table.
    Raises:
        CheckError: of the first check that fails, in a sentence that names the mistake.
        ValueError: if x or context cannot be an input of the layer.
    """
    layer, x64, c64 = prepare("check_bijection", layer, x, context, randomize, seed)
    double, single = copy.deepcopy(layer).double(), copy.deepcopy(layer).float()
    x32, c32 = x64.float(), None if c64 is None else c64.float()
    double.check_input(x64, c64)
    report = Report(f"{type(layer).__name__}, event {tuple(x.shape[1:])}: a bijection")
    with torch.no_grad():
        there = try_out(double, "forward", x64, c64)
        back = try_out(double, "inverse", there[0], c64)
    _check_rows(double, (("forward", x64, there), ("inverse", there[0], back)), c64, report)
    check_log_det(double, x64, c64, report)
    check_inverse(double, x64, c64, report)
    check_inverse(single, x32, c32, report)
    check_gradients(double, x64, c64, report)
    check_state(double, x64, c64, report)
    check_autocast(single, x32, c32, report)
    if compile:
        check_compile(double, x64, c64, report)
    return report


def prepare(
    caller: str, layer: Layer, x: Tensor, context: Tensor | None, randomize: bool, seed: int
) -> tuple[Layer, Tensor, Tensor | None]:
    """A copy of the layer to be tried, its parameters shaken, and its input in float64."""
    require_layer(caller, layer)
    require_rows(caller, x, context)
    check_methods(layer)
    check_registered(layer, x, context)
    try:
        layer = copy.deepcopy(layer).eval()
    except Exception as error:
        raise LayerError(
            f"{type(layer).__name__} cannot be copied: {first_line(error)}."
        ) from error
    if randomize:
        randomize_parameters(layer, seed)
    return layer, x.detach().double(), None if context is None else context.detach().double()


@checked
def check_log_det(
    layer: Subject,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: Positive = 1e-8,
) -> Report:
    """``log_det`` of forward at x, and of inverse at z = f(x), against autograd's ``slogdet(J)``.

    The two directions are compared one by one: that they cancel would not show an error which
    they share. Run it in float64; the tolerance is relative to 1 + |log_det|.
    """
    require_layer("check_log_det", layer)
    require_context("check_log_det", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    with torch.no_grad():
        z, there = call(layer, "forward", x, context)
    for direction, at in (("forward", x), ("inverse", z)):
        out, log_det = call(layer, direction, at, context)
        check_result(layer, direction, at, (out, log_det))
        matrix = jacobian(lambda a, d=direction: differentiable(layer, d, a, context), at)  # type: ignore[misc]
        truth = torch.linalg.slogdet(matrix)[1]
        if not bool(torch.isfinite(truth).all()):
            raise LogDetError(
                f"{name}.{direction} has a singular Jacobian by autograd: it is no bijection here"
                f"{_unused(matrix)}."
            )
        error = worst(log_det - truth, 1 + truth.abs())
        if not error <= tolerance:
            row = int(((log_det - truth).abs() / (1 + truth.abs())).nan_to_num(torch.inf).argmax())
            mine, other = apart(log_det[row].item(), truth[row].item())
            cause = _cause(log_det, truth, x[0].numel(), there if direction == "inverse" else None)
            raise LogDetError(
                f"{name}.{direction}: log_det is {mine} where autograd finds {other} "
                f"(row {row}){cause}."
            )
        report.add(f"log_det of {direction} = autograd's log|det J|", below(tolerance, x.dtype))
    return report


def _unused(matrix: Tensor) -> str:
    """Names an input or output without any influence, if there is one."""
    size = matrix.abs().amax(0)
    for axis, words in ((0, "no output depends on input {}"), (1, "output {} depends on no input")):
        dead = (size.amax(axis) == 0).nonzero()
        if len(dead):
            return f" ({words.format(int(dead[0]))})"
    return ""


def _cause(log_det: Tensor, truth: Tensor, dim: int, there: Tensor | None) -> str:
    """What a wrong log_det is instead, if it is one of the usual things."""
    candidates = [
        (-truth, "the sign is wrong"),
        (truth / dim, f"it is the mean over the event's {dim} numbers, not their sum"),
        (truth.exp(), "it is |det J| and not its logarithm"),
        (truth * dim, f"it is {dim} times too large"),
    ]
    if there is not None:
        words = "it is the log_det of forward, that of inverse has the other sign"
        candidates.insert(0, (there, words))
    if float(truth.abs().max()) > 1e-6:
        for candidate, words in candidates:
            if worst(log_det - candidate, 1 + candidate.abs()) <= 1e-6:
                return f": {words}"
    if worst(log_det - truth, 1 + truth.abs()) < 1e-5:
        return ": so small a difference comes of float32 in between, a global tensor perhaps"
    return ""


@checked
def check_inverse(
    layer: Subject,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
    tolerance: Positive | None = None,
) -> Report:
    """``inverse(forward(x)) = x`` with log-dets that cancel.

    The tolerance, relative to 1 + |x|, is 1e-8 in float64 and 1e-3 in float32 unless given.
    """
    require_layer("check_inverse", layer, bijective=False)
    require_context("check_inverse", x, context)
    report = report or Report(type(layer).__name__)
    name = type(layer).__name__
    limit = tolerance or (1e-8 if x.dtype == torch.float64 else 1e-3)
    with torch.no_grad():
        z, forward_log_det = call(layer, "forward", x, context)
        back, inverse_log_det = call(layer, "inverse", z, context)
    if back.shape != x.shape:
        raise InverseError(
            f"{name}: inverse(forward(x)) has shape {tuple(back.shape)}, x {tuple(x.shape)}."
        )
    if back.dtype != x.dtype or z.dtype != x.dtype:
        raise PrecisionError(f"{name} turns {x.dtype} into {z.dtype} and back into {back.dtype}.")
    error = worst(back - x, 1 + x.abs())
    if not error <= limit:
        raise InverseError(
            f"{name}: inverse(forward(x)) differs from x by {error:.3g}, allowed is {limit:g}."
        )
    gap = worst(forward_log_det + inverse_log_det, 1 + forward_log_det.abs())
    if not gap <= limit:
        raise InverseError(
            f"{name}: the log_dets of forward and inverse add up to {gap:.3g}, expected 0."
        )
    report.add("inverse(forward(x)) = x, log_dets cancel", below(limit, x.dtype))
    return report


@checked
def check_batch_independence(
    layer: Subject,
    x: Tensor,
    context: Tensor | None = None,
    report: Report | None = None,
) -> Report:
    """Each row alone gives what it gives in the batch, in both directions; batch 0 works."""
    require_layer("check_batch_independence", layer, bijective=False)
    require_context("check_batch_independence", x, context)
    report = report or Report(type(layer).__name__)
    with torch.no_grad():
        there = call(layer, "forward", x, context)
        back = call(layer, "inverse", there[0], context)
    check_result(layer, "forward", x, there)
    check_result(layer, "inverse", there[0], back)
    _check_rows(layer, (("forward", x, there), ("inverse", there[0], back)), context, report)
    return report


def _check_rows(
    layer: Layer,
    runs: tuple[tuple[str, Tensor, Pair], ...],
    context: Tensor | None,
    report: Report,
) -> None:
    """Rows alone and no row at all, beside what each direction made of the whole batch."""
    with torch.no_grad():
        for direction, x, whole in runs:
            _compare_rows(layer, direction, x, context, whole)
            empty = _part(layer, direction, x[:0], rows(context, slice(0)), "an empty batch")
            if empty[0].shape != whole[0][:0].shape or empty[1].shape != (0,):
                name = f"{type(layer).__name__}.{direction}"
                raise BatchError(f"{name} does not return an empty batch for one.")
    report.add("each row alone = in the batch, batch of 0 works", below(1e-8, runs[0][1].dtype))


def _part(layer: Layer, direction: str, x: Tensor, context: Tensor | None, what: str) -> Pair:
    """The layer at a part of the batch, at the whole of which it has already run."""
    try:
        return call(layer, direction, x, context)
    except CheckError as error:
        name = f"{type(layer).__name__}.{direction}"
        words = str(error).removeprefix(f"{name} ").rstrip(".")
        raise BatchError(f"{name} runs on a batch but not on {what}: {words}.") from (
            error.__cause__ or error
        )


def _compare_rows(
    layer: Layer, direction: str, x: Tensor, context: Tensor | None, whole: Pair
) -> None:
    name = f"{type(layer).__name__}.{direction}"
    slices = [slice(i, i + 1) for i in range(len(x))]
    single = [_part(layer, direction, x[s], rows(context, s), "one row") for s in slices]
    for k, what in enumerate(("output", "log_det")):
        alone = torch.cat([row[k] for row in single])
        if alone.shape != whole[k].shape:
            raise BatchError(
                f"{name}: the {what} of single rows has shape "
                f"{tuple(alone.shape)}, in a batch {tuple(whole[k].shape)}."
            )
        error = worst(alone - whole[k], 1 + whole[k].abs())
        if error <= 1e-8:
            continue
        cause = ""
        for total, words in ((alone.sum(0), "summed"), (alone.mean(0), "averaged")):
            if worst(whole[k] - total, 1 + total.abs()) <= 1e-8:
                cause = f": it is {words} over the batch"
        raise BatchError(
            f"{name}: the {what} of a row changes by {error:.3g} with the rest of the batch{cause}."
        )
