"""ActNorm and BatchNorm: initialisation, statistics, and both directions in both modes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nflib.checks import check_bijection, check_inverse, randomize_parameters
from nflib.core import Bijection, Inverse, ShapeError
from nflib.normalization import ActNorm, BatchNorm

SHAPES = {"vector": (3,), "image": (3, 2, 4)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def skewed(rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Data whose dimensions have means 5, -1, 300 and spreads 2, 0.1, 40."""
    view = (3, *[1] * (len(shape) - 1))
    mean, spread = torch.tensor([5.0, -1.0, 300.0]), torch.tensor([2.0, 0.1, 40.0])
    x = torch.randn(rows, *shape, dtype=torch.float64)
    return (mean.view(view) + spread.view(view) * x).to(dtype)


def per_dimension(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


@shapes
def test_actnorm_initialises_to_mean_0_and_deviation_1(shape: tuple[int, ...]) -> None:
    layer, x = ActNorm(3), skewed(200, shape)
    layer.initialize(x)
    z, log_det = layer(x)
    rows = per_dimension(z)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    spread = per_dimension(x).std(1, correction=0)
    expected = -spread.log().sum() * x[0, 0].numel()
    torch.testing.assert_close(log_det, expected.expand(200), atol=1e-3, rtol=1e-4)


def test_actnorm_sets_nothing_by_itself_and_is_initialised_once() -> None:
    layer, x = ActNorm(3), skewed(50, (3,))
    assert torch.equal(layer(x)[0], x)
    layer.initialize(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    other = ActNorm(3)
    other.load_state_dict(before)
    for one in (layer, other):
        one.train()
        one(100 * skewed(50, (3,)))
        one(x[:1])
        one.inverse(x)
        one.initialize(100 * skewed(50, (3,)))  # neither a second time nor after a load
        for name, value in one.state_dict().items():
            assert torch.equal(value, before[name])


@shapes
def test_actnorm_of_one_row_or_of_constants_is_finite(shape: tuple[int, ...]) -> None:
    for x in (skewed(1, shape), torch.full((5, *shape), 7.0)):
        layer = ActNorm(3)
        layer.initialize(x)
        z, log_det = layer(x)
        assert torch.isfinite(z).all()
        assert torch.isfinite(log_det).all()
        torch.testing.assert_close(layer.inverse(z)[0], x, atol=1e-3, rtol=1e-4)
    one = ActNorm(3)
    one.initialize(skewed(1, (3,)))
    assert not one.log_scale.any()


def test_an_empty_batch_leaves_actnorm_finite() -> None:
    layer = ActNorm(3)
    layer.initialize(torch.zeros(0, 3))
    assert torch.isfinite(layer.bias).all()


def trained_batchnorm(shape: tuple[int, ...], batches: int = 3) -> BatchNorm:
    layer = BatchNorm(3)
    for _ in range(batches):
        layer(skewed(20, shape))
    randomize_parameters(layer)
    return layer


@shapes
def test_batchnorm_is_a_bijection_in_evaluation(shape: tuple[int, ...]) -> None:
    check_bijection(trained_batchnorm(shape), skewed(4, shape))


@shapes
def test_batchnorm_normalises_the_batch_it_trains_on(shape: tuple[int, ...]) -> None:
    rows = per_dimension(BatchNorm(3)(skewed(100, shape))[0])
    torch.testing.assert_close(rows.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std(1, correction=0), torch.ones(3), atol=1e-3, rtol=0)


@shapes
@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_undoes_itself_in_both_modes(shape: tuple[int, ...], training: bool) -> None:
    layer = trained_batchnorm(shape).double().train(training)
    x = skewed(20, shape, torch.float64)
    check_inverse(layer, x)
    # The last forward is what counts: a batch with other statistics in between does not.
    layer(x * 3)
    check_inverse(layer, x)


@shapes
def test_batchnorms_log_det_in_training_holds_the_statistics_fixed(shape: tuple[int, ...]) -> None:
    layer = trained_batchnorm(shape).double()
    x = skewed(20, shape, torch.float64)
    z, log_det = layer(x)
    rows = per_dimension(x)
    mean, variance = rows.mean(1), rows.var(1, correction=0)

    def fixed(row: Tensor) -> Tensor:
        view = [-1, *[1] * (row.ndim - 1)]
        scale = layer.log_gain.exp() / (variance + layer.eps).sqrt()
        return (row - mean.view(view)) * scale.view(view) + layer.bias.view(view)

    torch.testing.assert_close(fixed(x[0]), z[0])
    matrix = torch.autograd.functional.jacobian(fixed, x[0]).view(x[0].numel(), -1)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(matrix)[1].expand(20))
    torch.testing.assert_close(layer.inverse(z)[1], -log_det)


@shapes
def test_running_statistics_equal_a_computation_by_hand(shape: tuple[int, ...]) -> None:
    layer = BatchNorm(3, momentum=0.3)
    batches = [skewed(n, shape) for n in (10, 4, 30)]
    weights = torch.tensor([0.3 * 0.7**2, 0.3 * 0.7, 0.3], dtype=torch.float64)
    weights = weights / weights.sum()  # what they lack of 1 is not zeros, but nothing
    for batch in batches:
        layer(batch)
    means = torch.stack([per_dimension(b.double()).mean(1) for b in batches])
    variances = torch.stack([per_dimension(b.double()).var(1, correction=1) for b in batches])
    mean, variance = layer.statistics()
    torch.testing.assert_close(mean.double(), weights @ means, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), weights @ variances, rtol=1e-5, atol=1e-5)
    # Evaluation uses them, and changes nothing.
    layer.eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = skewed(5, shape)
    view = [-1, *[1] * (x.ndim - 2)]
    expected = (x - mean.view(view)) / (variance.view(view) + layer.eps).sqrt()
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_one_batch_is_enough_for_honest_statistics() -> None:
    layer, x = BatchNorm(3), skewed(50, (3,))
    layer(x)
    mean, variance = layer.statistics()
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0))


def test_batchnorm_before_any_training_is_nearly_the_identity() -> None:
    x = torch.randn(5, 3)
    for layer in (BatchNorm(3).eval(), BatchNorm(3)):
        z, log_det = layer(x[:1])
        torch.testing.assert_close(z, x[:1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_det, torch.zeros(1), atol=1e-4, rtol=0)


@shapes
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_batches_of_one_and_none_are_finite(
    shape: tuple[int, ...], training: bool, trained: bool
) -> None:
    layer = (trained_batchnorm(shape) if trained else BatchNorm(3)).train(training)
    for rows in (1, 0):
        x = skewed(rows, shape)
        z, log_det = layer(x)
        back, _ = layer.inverse(z)
        assert log_det.shape == (rows,)
        assert torch.isfinite(torch.cat([z.flatten(), log_det])).all()
        torch.testing.assert_close(back, x, atol=1e-2, rtol=1e-4)
    for value in layer.state_dict().values():
        assert torch.isfinite(value).all()


def test_batchnorms_state_dict_holds_its_statistics() -> None:
    layer = trained_batchnorm((3,)).eval()
    other = BatchNorm(3).eval()
    other.load_state_dict(layer.state_dict())
    x = skewed(6, (3,))
    assert torch.equal(layer(x)[0], other(x)[0])
    assert not torch.equal(layer(x)[0], BatchNorm(3).eval()(x)[0])


def test_gradients_flow_through_the_statistics_of_a_batch() -> None:
    layer = BatchNorm(3).double()
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: layer(a), (x,))
    # A constant added to a dimension of the whole batch changes nothing.
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum() + layer(x)[0][0].sum(), x)
    torch.testing.assert_close(gradient.sum(0), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("kind", [ActNorm, BatchNorm])
def test_wrong_sizes_are_one_sentence(kind: type[Bijection]) -> None:
    for dim in (0, -1, 2.0):
        with pytest.raises(ValueError, match=r"^\w+ expects dim to be .*, got .*\.$"):
            kind(dim)  # type: ignore[call-arg]
    layer = kind(3)  # type: ignore[call-arg]
    for x in (torch.randn(5), torch.randn(5, 2), torch.randn(5, 2, 3)):
        for function in (layer, layer.inverse):
            with pytest.raises(ShapeError, match=r"^[\w.]+ expects shape .*, got .*\.$"):
                function(x)
    with pytest.raises(ShapeError, match=r"^ActNorm expects shape .*, got .*\.$"):
        ActNorm(3).initialize(torch.randn(5, 2))
    for wrong in ({"momentum": 0.0}, {"momentum": 1.5}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=r"^BatchNorm expects .*, got .*\.$"):
            BatchNorm(3, **wrong)


def test_actnorm_read_backwards_makes_its_inverse_normal() -> None:
    norm, x = ActNorm(3), 5 + 3 * torch.randn(200, 3)
    Inverse(norm).initialize(x)
    made = norm.inverse(x)[0]
    torch.testing.assert_close(made.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_what_a_state_says_about_actnorm_decides_whether_it_starts_anew() -> None:
    x = 5 + 3 * torch.randn(50, 2)
    without = ActNorm(2)
    without.load_state_dict({}, strict=False)
    without.initialize(x)
    torch.testing.assert_close(without.bias, -x.mean(0))
    old = ActNorm(2)  # of a file from before the flag was stored
    old.load_state_dict({"bias": torch.ones(2), "log_scale": torch.ones(2)}, strict=False)
    old.initialize(x)
    assert torch.equal(old.bias, torch.ones(2))
