"""The contract of a layer: what it takes and returns, its shapes, and data that it cannot take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflib.arguments import ArgumentError
from nflib.core import (
    Bijection,
    Compose,
    DataError,
    Flow,
    Inverse,
    OutputError,
    ShapeError,
    StandardNormal,
    check_values,
    describe,
    fits,
    is_known,
    log_det_dtype,
    sum_log_det,
)
from nflib.core.shapes import NoCommonShape, meet
from nflib.dequantization import UniformDequantization
from nflib.linear import LU, Diagonal
from nflib.multiscale import Squeeze
from nflib.planar import Planar


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.tensor(1.0), "a batch of events, got a single number"),
        ([[1.0, 2.0]], "a tensor, got a list; torch.as_tensor makes one"),
        (torch.zeros(3, 2, dtype=torch.int64), "floating-point numbers, got torch.int64"),
        (torch.zeros(3, 2).double(), "its parameters' dtype torch.float32, got torch.float64"),
        (torch.zeros(3, 1), r"shape \(batch, 2\), got \(3, 1\)"),
    ],
)
def test_what_is_no_input_is_one_sentence(x: Tensor, words: str) -> None:
    for function, name in ((LU(2), "LU"), (LU(2).inverse, r"LU\.inverse")):
        with pytest.raises(ShapeError, match=f"^{name} expects {words}"):
            function(x)


def test_a_context_that_does_not_fit_is_one_sentence() -> None:
    layer, x = Planar(2, context_dim=3), torch.randn(4, 2)
    for wrong, words in (
        (None, "a context of shape .*, got none"),
        ([[1.0] * 3] * 4, "the context as a tensor, got a list"),
        (torch.zeros(4, 3).double(), "a context of its parameters' dtype torch.float32"),
        (torch.zeros(3, 3), r"a context of shape \(4, 3\), got \(3, 3\)"),
        (torch.zeros(4, 2), r"a context of shape \(4, 3\), got \(4, 2\)"),
    ):
        with pytest.raises(ShapeError, match=f"^Planar expects {words}"):
            layer(x, wrong)


def test_what_fitted_one_direction_is_not_taken_for_the_other() -> None:
    layer = Squeeze()
    layer.inverse(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ShapeError, match="^Squeeze expects images whose height"):
        layer(torch.zeros(1, 4, 3, 3))


def test_what_fitted_once_is_asked_again_when_input_or_layer_change_their_dtype() -> None:
    layer, x = LU(2), torch.randn(3, 2)
    for _ in range(2):
        layer(x)
        with pytest.raises(ShapeError, match="dtype torch.float32, got torch.float64"):
            layer(x.double())
    layer.double()
    with pytest.raises(ShapeError, match="dtype torch.float64, got torch.float32"):
        layer(x)
    assert layer(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda x: x, r"a tuple \(output, log_det\) of two tensors, got a Tensor"),
        (lambda x: (x, x.sum(1), x), "of two tensors, got 3 things"),
        (lambda x: (x, 0.0), "of two tensors, got a tuple"),
        (lambda x: (x, x.sum()), r"a log_det of shape \(5,\), one number a row, got \(\)"),
        (lambda x: (x, x), r"a log_det of shape \(5,\), one number a row, got \(5, 2\)"),
    ],
)
def test_a_layer_of_ones_own_that_returns_something_else_is_told(made, words: str) -> None:
    class Own(Bijection):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return made(x)

    with pytest.raises(OutputError, match=rf"^Own\.forward expects to return .*{words}"):
        Own()(torch.randn(5, 2))


def test_a_stochastic_layer_has_no_inverse_map() -> None:
    noisy = Compose(UniformDequantization(4), Diagonal(2))
    assert not noisy.bijective
    assert not noisy.exact_inverse
    for layer in (UniformDequantization(4), noisy):
        with pytest.raises(ArgumentError, match="^Inverse expects a bijection, got .* stochastic"):
            Inverse(layer)
    with pytest.raises(ArgumentError, match="rsample expects a flow of bijections"):
        Flow(noisy, StandardNormal(2)).rsample(3)


def test_shapes_that_are_open() -> None:
    for one, other, both in (
        (None, (2, ...), (2, ...)),
        ((3, ...), (None, 8, 8), (3, 8, 8)),
        ((..., None, 4), (2, 3, None), (2, 3, 4)),
        ((None,), (5,), (5,)),
        ((2, ...), (2, None, ...), (2, None, ...)),
    ):
        assert meet(one, other) == meet(other, one) == both
    for one, other in (
        ((3, ...), (4, 8)),
        ((2,), (2, 2)),
        ((2, ...), (3, ...)),
        ((1, 2, ...), (1,)),
    ):
        with pytest.raises(NoCommonShape):
            meet(one, other)
    assert fits((3, 4), (None, 4))
    assert not fits((3, 5), (None, 4))
    assert [is_known(s) for s in (None, (2, None), (2, ...), (2, 3))] == [False, False, False, True]
    assert describe(("batch", None, ...)) == "(batch, any, ...)"
    assert describe((3,)) == "(3,)"


def test_log_dets_are_never_narrower_than_float32() -> None:
    terms = torch.full((2, 300), 0.1, dtype=torch.bfloat16)
    found = sum_log_det(terms)
    assert found.dtype == log_det_dtype(terms.dtype) == torch.float32
    torch.testing.assert_close(found, terms.float().sum(1))


@pytest.mark.parametrize(
    ("x", "levels", "words"),
    [
        ([1.0], None, "must be a torch.Tensor, got list"),
        (torch.zeros(3), None, r"must have the examples in dimension 0 .* got shape \(3,\)"),
        (torch.zeros(0, 3), None, r"is empty: it has shape \(0, 3\)"),
        (torch.zeros(2, 3).bool(), None, "floating point or integer numbers, got torch.bool"),
        (torch.tensor([[0.0], [torch.inf], [torch.nan]]), None, "2 of its 3 .* first in row 1"),
        (torch.tensor([[0.0], [4.0]]), 4, "whole numbers in 0..3, got values from 0 to 4"),
        (torch.tensor([[-1], [3]]), 4, "whole numbers in 0..3, got values from -1 to 3"),
        (torch.tensor([[0.0], [1.5]]), 4, "from 0 to 1.5 with fractions"),
    ],
)
def test_data_that_no_model_can_take_are_one_sentence(x, levels: int | None, words: str) -> None:
    with pytest.raises(DataError, match=f"^x {words}|^x must (be|hold) .*{words}"):
        check_values(x, "x", levels)


def test_data_that_are_right_are_returned() -> None:
    for x, levels in ((torch.randn(2, 3), None), (torch.tensor([[0.0], [3.0]]), 4)):
        assert check_values(x, "x", levels) is x
