"""Domains: torch's transforms as layers, and the way from a set of numbers to all of R^D."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import constraints, transforms
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, check_normalized
from nflib.core import Compose, DataError, Flow, Inverse, ShapeError, StandardNormal
from nflib.domains import TorchTransform, from_domain
from nflib.elementwise import Affine, Pointwise
from nflib.linear import LU


def positive(*shape: int) -> Tensor:
    return 0.1 + torch.rand(*shape) * 3


def share(*shape: int) -> Tensor:
    return 0.05 + 0.9 * torch.rand(*shape)


def simplex(*shape: int) -> Tensor:
    return torch.softmax(torch.randn(*shape), -1)


def correlated(*shape: int) -> Tensor:
    """Cholesky factors of correlation matrices."""
    matrix = torch.randn(*shape).double().tril()
    return torch.nn.functional.normalize(matrix, dim=-1) * matrix.diagonal(
        dim1=-2, dim2=-1
    ).sign().unsqueeze(-1)


Draw = Callable[..., Tensor]
# Each transform of torch that is one to one and keeps the number of numbers, with data for it.
TRANSFORMS: dict[str, tuple[Transform, Draw]] = {
    "affine": (transforms.AffineTransform(1.0, -2.0), torch.randn),
    "exp": (transforms.ExpTransform(), torch.randn),
    "log": (transforms.ExpTransform().inv, positive),
    "power": (transforms.PowerTransform(torch.tensor(2.0)), positive),
    "root": (transforms.PowerTransform(torch.tensor(2.0)).inv, positive),
    "sigmoid": (transforms.SigmoidTransform(), torch.randn),
    "logit": (transforms.SigmoidTransform().inv, share),
    "tanh": (transforms.TanhTransform(), torch.randn),
    "softplus": (transforms.SoftplusTransform(), torch.randn),
    "composed": (
        transforms.ComposeTransform(
            [transforms.ExpTransform(), transforms.AffineTransform(0.0, 3.0)]
        ),
        torch.randn,
    ),
    "for each entry": (
        transforms.AffineTransform(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 2.0, -1.0])),
        torch.randn,
    ),
    "independent": (transforms.IndependentTransform(transforms.ExpTransform(), 1), torch.randn),
    "reversed view": (
        transforms.ComposeTransform(
            [transforms.ReshapeTransform((3,), (3, 1)), transforms.ReshapeTransform((3, 1), (3,))]
        ),
        torch.randn,
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_of_torch_is_a_bijection(name: str) -> None:
    transform, draw = TRANSFORMS[name]
    layer = TorchTransform(transform)
    x = draw(4, 3)
    check_bijection(layer, x)
    check_bijection(Inverse(layer), layer(x)[0])
    z, log_det = layer(x)
    torch.testing.assert_close(z, transform(x))
    terms = transform.log_abs_det_jacobian(x, z)
    torch.testing.assert_close(log_det, terms if terms.ndim == 1 else terms.sum(1))


DOMAINS: dict[str, tuple[Constraint, Draw]] = {
    "real": (constraints.real, torch.randn),
    "positive": (constraints.positive, positive),
    "greater than 2": (constraints.greater_than(2.0), lambda *shape: 2 + positive(*shape)),
    "at least -1": (constraints.greater_than_eq(-1.0), positive),
    "less than 5": (constraints.less_than(5.0), lambda *shape: 5 - positive(*shape)),
    "unit interval": (constraints.unit_interval, share),
    "interval": (constraints.interval(-1.0, 4.0), lambda *shape: -1 + 5 * share(*shape)),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_from_domain_leads_to_the_reals_and_back(name: str) -> None:
    constraint, draw = DOMAINS[name]
    layer, x = from_domain(constraint), draw(4, 3)
    check_bijection(layer, x)
    layer.check_data(x)
    samples = Flow(layer, StandardNormal(3)).sample(1000)
    assert bool(constraint.check(samples).all())


@pytest.mark.parametrize(
    ("constraint", "draw", "event", "latent"),
    [
        (constraints.simplex, simplex, (4,), (3,)),
        (constraints.corr_cholesky, correlated, (3, 3), (3,)),
    ],
)
def test_domains_of_vectors_and_matrices_lead_there_and_back(
    constraint: Constraint, draw: Draw, event: tuple[int, ...], latent: tuple[int, ...]
) -> None:
    layer, x = from_domain(constraint), draw(6, *event).double()
    z, log_det = layer(x)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(minus, -log_det)
    assert log_det.shape == (6,)
    assert layer.output_shape(event) == latent == tuple(z.shape[1:])
    assert layer.input_shape(latent) == event
    layer.check_data(x)
    samples = Flow(layer, StandardNormal(latent).double()).sample(50)
    assert bool(constraint.check(samples).all())


def test_a_flow_of_positive_numbers_is_a_density() -> None:
    flow = Flow(
        Compose(from_domain(constraints.positive), Pointwise(Affine(), 1)), StandardNormal(1)
    )
    check_normalized(flow, dim=1, limits=(1e-6, 400.0), points=400_000)
    normal = torch.distributions.LogNormal(0.0, 1.0)
    x = positive(50, 1)
    torch.testing.assert_close(flow.log_prob(x), normal.log_prob(x)[:, 0])


def test_tensors_that_want_gradients_are_parameters_and_the_others_buffers() -> None:
    scale = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    shift = torch.tensor([0.5, 0.0, -0.5])
    layer = TorchTransform(transforms.AffineTransform(shift, scale))
    (parameter,), (buffer,) = layer.parameters(), layer.buffers()
    assert torch.equal(parameter, scale)
    assert torch.equal(buffer, shift)
    x = torch.randn(5, 3)
    z, log_det = layer(x)
    (z.square().sum() - log_det.sum()).backward()
    assert parameter.grad is not None
    assert bool(parameter.grad.all())
    with torch.no_grad():
        parameter.mul_(2)
    torch.testing.assert_close(layer(x)[0], shift + x * parameter)


def test_a_transform_moves_is_saved_and_copied_with_its_model() -> None:
    def layer(scale: float) -> TorchTransform:
        inner = transforms.AffineTransform(0.0, torch.full((3,), scale).requires_grad_())
        return TorchTransform(transforms.ComposeTransform([inner, transforms.TanhTransform()]))

    one, x = layer(2.0), torch.randn(4, 3) / 4
    assert one.double()(x.double())[0].dtype == torch.float64
    one.float()
    other = layer(1.0)
    assert not torch.equal(other(x)[0], one(x)[0])
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(x)[0], one(x)[0])
    twin = copy.deepcopy(one)
    with torch.no_grad():
        next(twin.parameters()).mul_(0)
    assert torch.equal(other(x)[0], one(x)[0])


def test_learning_a_scale_of_a_transform_fits_it() -> None:
    scale = torch.ones(1, requires_grad=True)
    layer = TorchTransform(transforms.AffineTransform(0.0, scale))
    flow, x = Flow(layer, StandardNormal(1)), 4 * torch.randn(2000, 1)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-flow(x).mean()).backward()
        optimizer.step()
    assert abs(1 / scale.item() - x.std().item()) < 0.2


@pytest.mark.parametrize("name", [n for n in DOMAINS if n != "real"])
def test_data_outside_of_the_domain_are_one_sentence(name: str) -> None:
    constraint, draw = DOMAINS[name]
    flow = Flow(Compose(from_domain(constraint), LU(3)), StandardNormal(3))
    x = draw(4, 3)
    flow.check_data(x)
    for value in (-7.0, 7.0):
        x[2, 1] = value
        if not bool(constraint.check(x).all()):
            with pytest.raises(DataError, match=r"^The data of TorchTransform must lie in its"):
                flow.check_data(x)
    x[2, 1] = torch.inf
    with pytest.raises(DataError, match=r"must be finite"):
        flow.check_data(x)


def test_rows_that_are_no_simplex_are_refused() -> None:
    layer = from_domain(constraints.simplex)
    with pytest.raises(DataError, match="must lie in its domain"):
        layer.check_data(2 * simplex(4, 3))


def test_shapes_are_known_before_any_data() -> None:
    layer = from_domain(constraints.positive)
    assert layer.output_shape((3, 4)) == (3, 4)
    assert Compose(layer, LU(3)).event_shape == (3,)
    assert from_domain(constraints.simplex).output_shape((None,)) is None
    square = TorchTransform(transforms.ReshapeTransform((6,), (2, 3)))
    assert square.output_shape((6,)) == (2, 3)
    assert square.input_shape((2, 3)) == (6,)
    assert square(torch.randn(5, 6))[0].shape == (5, 2, 3)
    with pytest.raises(ShapeError, match=r"^TorchTransform expects .*, got \(5,\).*\.$"):
        square.output_shape((5,))
    with pytest.raises(ShapeError, match=r"^TorchTransform expects shape \(batch, ..., any, any\)"):
        from_domain(constraints.corr_cholesky)(torch.randn(4, 3))


def test_what_is_no_bijection_is_one_sentence() -> None:
    for transform in (transforms.AbsTransform(), transforms.SoftmaxTransform()):
        with pytest.raises(ArgumentError, match=r"^TorchTransform expects a .* one to one, got"):
            TorchTransform(transform)
    with pytest.raises(ArgumentError, match=r"^TorchTransform expects transform to be a Transform"):
        TorchTransform(torch.exp)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^from_domain expects a constraint with a map"):
        from_domain(constraints.boolean)
    with pytest.raises(ArgumentError, match=r"^from_domain expects constraint to be a Constraint"):
        from_domain("positive")  # type: ignore[arg-type]
