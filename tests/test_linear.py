"""Linear flows: the matrix that each layer is, what a state restores, and wrong arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nflib.checks import randomize_parameters
from nflib.linear import (
    LU,
    BlockDiagonal,
    Dense,
    Diagonal,
    Householder,
    Linear,
    Permutation,
    Triangular,
    reflect,
)

KINDS: dict[str, Callable[[], Linear]] = {
    "dense": lambda: Dense(4),
    "diagonal": lambda: Diagonal(4),
    "triangular": lambda: Triangular(4),
    "upper": lambda: Triangular(4, upper=True),
    "blocks": lambda: BlockDiagonal(4, 2),
    "lu": lambda: LU(4),
    "householder": lambda: Householder(4, 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_linear_layer_is_a_product_with_its_weight(name: str) -> None:
    layer, x = KINDS[name](), torch.randn(5, 4)
    randomize_parameters(layer)
    weight, bias = layer.weight(), layer.bias
    assert bias is not None
    z, log_det = layer(x)
    torch.testing.assert_close(z, x @ weight.T + bias)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(weight)[1].expand(5))
    torch.testing.assert_close(layer.solve(x), torch.linalg.solve(weight, x.T).T)


def test_the_number_of_reflections_is_the_one_that_was_asked_for() -> None:
    assert Householder(4, 2).vectors.shape == (2, 4)
    assert Householder(4).vectors.shape == (4, 4)
    x, v = torch.randn(3, 4), torch.randn(1, 4)
    torch.testing.assert_close(reflect(x, v), x - 2 * (x @ v.T) * v / v.square().sum())


@pytest.mark.parametrize("make", [lambda: Permutation(9), lambda: LU(9)])
def test_a_loaded_permutation_is_undone_as_well(make: Callable[[], torch.nn.Module]) -> None:
    one, other, x = make(), make(), torch.randn(4, 9)
    other.load_state_dict(one.state_dict())
    z = other(x)[0]
    assert torch.equal(z, one(x)[0])
    torch.testing.assert_close(other.inverse(z)[0], x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockDiagonal(5, 2), "divide.* 5, got 2"),
        (lambda: BlockDiagonal(2, 4), "divide.* 2, got 4"),
        (lambda: Permutation([0, 1, 1]), r"each of 0..D-1 once, .* got \[0, 1, 1\]"),
        (lambda: Permutation([0, 1, 3]), r"each of 0..D-1 once, .* got \[0, 1, 3\]"),
        (lambda: Permutation([0.0, 1.0]), "each of 0..D-1 once"),
        (lambda: Permutation([]), "each of 0..D-1 once"),
        (lambda: Permutation(0), "as a number D of dimensions, got 0"),
        (lambda: Permutation("10"), "as a number D of dimensions, got '10'"),
        (lambda: Dense(3, weight=torch.ones(3, 3)), "an invertible matrix"),
        (lambda: LU(3, weight=torch.ones(2, 2)), r"shape \(3, 3\)"),
    ],
)
def test_bad_arguments_are_one_sentence(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^\w+ expects .*{words}.*\.$"):
        make()
