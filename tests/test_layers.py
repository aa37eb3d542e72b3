"""Every layer of nflib keeps the contract, on random parameters and for shapes hypothesis draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import LAYERS, SLOW_TO_COMPILE

from nflib.checks import check_bijection, randomize_parameters
from nflib.convolution import EmergingConv, Invertible1x1Conv, PeriodicConv
from nflib.core import (
    Bijection,
    Compose,
    Flow,
    Inverse,
    ShapeError,
    SingularMatrixError,
    StandardNormal,
)
from nflib.linear import LU, BlockDiagonal, Dense, Diagonal, Householder, Permutation, Triangular
from nflib.planar import Planar, Radial, Sylvester


@pytest.mark.parametrize("name", LAYERS)
def test_is_a_bijection(name: str) -> None:
    case = LAYERS[name]
    check_bijection(case.make(), *case.inputs(), compile=name not in SLOW_TO_COMPILE)


def test_layers_start_from_a_given_matrix() -> None:
    matrix = torch.randn(4, 4)
    for layer in (Dense(4, weight=matrix), LU(4, weight=matrix)):
        torch.testing.assert_close(layer.weight(), matrix)
        assert sum(p.numel() for p in layer.parameters()) == 4 * 4 + 4
    upper = matrix.triu(1) + torch.eye(4)
    triangular = Triangular(4, upper=True, weight=upper)
    torch.testing.assert_close(triangular.weight(), upper)
    assert sum(p.numel() for p in triangular.parameters()) == 4 * 5 // 2 + 4
    for wrong in (upper.T, -upper, torch.eye(3)):
        with pytest.raises(ShapeError, match="upper triangular matrix"):
            Triangular(4, upper=True, weight=wrong)
    singular = torch.ones(4, 4)
    for kind in (Dense, LU):
        with pytest.raises(SingularMatrixError, match="expects an invertible matrix, got"):
            kind(4, weight=singular)
    dense = Dense(4)
    torch.nn.init.ones_(dense.matrix)
    with pytest.raises(SingularMatrixError, match="Dense expects an invertible matrix"):
        dense.inverse(torch.randn(2, 4))


def test_a_convolution_that_wipes_out_a_frequency_is_singular() -> None:
    blur = PeriodicConv(1, 3)
    torch.nn.init.zeros_(blur.weight)
    with pytest.raises(SingularMatrixError, match="PeriodicConv expects an invertible matrix"):
        blur.inverse(torch.randn(2, 1, 4, 4))
    with pytest.raises(ShapeError, match="at least 3 pixels"):
        blur(torch.randn(2, 1, 2, 4))


def test_a_deep_stack_of_planar_maps_starts_as_the_identity() -> None:
    x = torch.randn(5, 3)
    z, log_det = Compose(*[Planar(3) for _ in range(50)])(x)
    torch.testing.assert_close(z, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_det, torch.zeros(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_event_is_one_sentence(name: str) -> None:
    case = LAYERS[name]
    layer = case.make()
    if layer.event_shape is None:
        pytest.skip("takes events of any shape")
    x, context = case.inputs()
    some_size_is_free = None in layer.event_shape
    with pytest.raises(ValueError, match=r"^[\w.]+ expects .*, got .*\.$"):
        layer(x[..., None] if some_size_is_free else torch.cat([x, x], 1), context)
    with pytest.raises(ShapeError, match=r"^[\w.]+ expects .*, got .*\.$"):
        layer.inverse(x[0], context)


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_dtype_is_one_sentence(name: str) -> None:
    case = LAYERS[name]
    layer = case.make()
    x, context = case.inputs()
    if list(layer.parameters()):
        with pytest.raises(ShapeError, match=r"float32, got torch.float64"):
            layer(x.double(), context)
    if isinstance(layer, Compose) and len(layer) == 0:
        pytest.skip("the identity takes anything")
    with pytest.raises(ShapeError, match="floating-point"):
        layer(x.long(), context)


@pytest.mark.parametrize("name", [n for n, c in LAYERS.items() if c.context])
def test_missing_or_wrong_context_is_one_sentence(name: str) -> None:
    case = LAYERS[name]
    layer, (x, context) = case.make(), case.inputs()
    assert context is not None
    for wrong in (None, context[:, :1], context[:2]):
        with pytest.raises(ShapeError, match=r"expects a context of shape .*, got .*\.$"):
            layer(x, wrong)


@pytest.mark.parametrize("name", [n for n, c in LAYERS.items() if c.context])
def test_context_changes_the_map(name: str) -> None:
    case = LAYERS[name]
    layer, (x, context) = case.make(), case.inputs()
    randomize_parameters(layer)  # networks start at zero
    assert context is not None
    assert not torch.equal(layer(x, context)[0], layer(x, context + 1)[0])


dims = st.integers(2, 7)
VECTOR_LAYERS = st.sampled_from(
    [Dense, Diagonal, Triangular, LU, Householder, Planar, Radial, Sylvester, Permutation]
)


@given(VECTOR_LAYERS, dims, st.integers(0, 10**6))
def test_vector_layers_of_any_size(kind: type[Bijection], dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_bijection(kind(dim), torch.randn(3, dim), seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Dense, Diagonal, Triangular, LU, Planar, Radial])
def test_one_dimension(kind: type[Bijection]) -> None:
    check_bijection(kind(1), torch.randn(3, 1))  # type: ignore[arg-type]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_block_diagonal_of_any_size(blocks: int, block: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_bijection(BlockDiagonal(blocks * block, block), torch.randn(3, blocks * block), seed=seed)


@given(
    st.sampled_from([Invertible1x1Conv, PeriodicConv, EmergingConv]),
    st.integers(2, 3),
    st.tuples(st.integers(3, 5), st.integers(3, 5)),
    st.integers(0, 10**6),
)
def test_convolutions_of_any_size(
    kind: type[Bijection], channels: int, size: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    check_bijection(kind(channels), torch.randn(2, channels, *size), seed=seed)  # type: ignore[call-arg]


@given(st.lists(st.sampled_from([LU, Planar, Radial, Permutation]), max_size=5), dims)
def test_compositions_of_any_depth(kinds: list[type[Bijection]], dim: int) -> None:
    layers = [kind(dim) for kind in kinds]  # type: ignore[arg-type]
    composed = Compose(*layers, *(Inverse(kind(dim)) for kind in kinds))  # type: ignore[arg-type]
    check_bijection(composed, torch.randn(3, dim))


def test_a_whole_flow_compiles_with_generated_code() -> None:
    import shutil

    if not shutil.which("c++"):
        pytest.skip("inductor needs a C++ compiler")
    flow = Flow(Compose(LU(4), Planar(4)), StandardNormal(4))
    x = torch.randn(8, 4)
    compiled = torch.compile(flow, fullgraph=True)(x)
    torch.testing.assert_close(compiled, flow(x))
    compiled.sum().backward()
    assert all(p.grad is not None for p in flow.parameters())
