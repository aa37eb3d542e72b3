"""Kernel machines as conditioners: kernels, gradients, norms, the start at data, ferumal."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from nflib import checkpoints, models
from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, check_compile, check_vmap, randomize_parameters
from nflib.core import Compose, Flow, Inverse, ShapeError, StandardNormal
from nflib.coupling import Coupling, halves
from nflib.data import load
from nflib.elementwise import Affine, RationalQuadraticSpline
from nflib.kernels import (
    Kernel,
    KernelConditioner,
    Matern32,
    Matern52,
    SquaredExponential,
    with_rkhs_penalty,
)
from nflib.metrics import evaluate
from nflib.mixer import AlongChannels
from nflib.models import ferumal
from nflib.normalization import ActNorm
from nflib.train import fit


class RationalQuadratic(Kernel):
    """A kernel of the reader's own."""

    def profile(self, r2: Tensor) -> Tensor:
        return 1 / (1 + 0.5 * r2)


PROFILES: dict[type[Kernel], Callable[[Tensor], Tensor]] = {
    SquaredExponential: lambda r: torch.exp(-(r**2) / 2),
    Matern32: lambda r: (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r),
    Matern52: lambda r: (1 + 5**0.5 * r + 5 / 3 * r**2) * torch.exp(-(5**0.5) * r),
    RationalQuadratic: lambda r: 1 / (1 + r**2 / 2),
}
every_kernel = pytest.mark.parametrize("kernel", PROFILES)
BACKBONES = ("realnvp", "glow")


def machine(
    inputs: int = 3, outputs: int = 4, points: int = 5, **options: Any
) -> KernelConditioner:
    """A conditioner with random parameters in float64."""
    net = KernelConditioner(inputs, outputs, points, **options).double()
    randomize_parameters(net, 1)
    return net


def rows(n: int, dim: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


# Kernels.


@every_kernel
def test_a_kernel_is_its_profile_of_scaled_distances(kernel: type[Kernel]) -> None:
    k, x, w = kernel(3).double(), rows(4), rows(5, seed=1)
    assert torch.allclose(k.log_length.exp(), torch.full((3,), 3**0.5).double())
    randomize_parameters(k)
    r = (((x[:, None] - w) / k.log_length.exp()) ** 2).sum(2).sqrt()
    torch.testing.assert_close(k(x, w), PROFILES[kernel](r))


@every_kernel
def test_a_kernel_is_1_at_home_symmetric_and_positive_definite(kernel: type[Kernel]) -> None:
    k, x = kernel(2).double(), rows(30, 2)
    gram = k(x, x)
    torch.testing.assert_close(gram.diagonal(), torch.ones(30).double())
    torch.testing.assert_close(gram, gram.T)
    assert torch.linalg.eigvalsh(gram).min() > -1e-12
    far = k(x[:1], x[:1] + torch.arange(8)[:, None])
    assert (far.diff() < 0).all()


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [1, 3])  # of one number the distance is zero without any rounding
def test_gradients_are_finite_where_an_input_lies_on_a_point(
    kernel: type[Kernel], dtype: torch.dtype, dim: int
) -> None:
    k, x = kernel(dim).to(dtype), rows(6, dim).to(dtype)
    for shift in (0.0, 1e-30, 1e-12, 1e-7):
        at, w = x.clone().requires_grad_(), (x + shift).requires_grad_()
        values, leaves = k(at, w), [at, w, *k.parameters()]
        for gradient in torch.autograd.grad(values.sum(), leaves, retain_graph=True):
            assert torch.isfinite(gradient).all()
        # Alone with its own point an input is at the top of the kernel, where the slope is zero.
        alone = torch.autograd.grad(values.diagonal().sum(), at)[0]
        assert alone.abs().max() < 1e-2


@every_kernel
def test_gradients_are_finite_far_from_all_points(kernel: type[Kernel]) -> None:
    k, w = kernel(2), torch.randn(3, 2)
    for size in (1e3, 1e10, 1e25):
        x = torch.full((1, 2), size, requires_grad=True)
        value = k(x, w)
        assert (value < 1e-5).all()
        gradients = torch.autograd.grad(value.sum(), [x, *k.parameters()])
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@every_kernel
def test_float32_is_precise_far_from_the_origin(kernel: type[Kernel]) -> None:
    # Numbers that float32 holds exactly, so that only the kernel rounds.
    x, w = (rows(20, seed=s).mul(64).round() / 64 + 1000 for s in (0, 1))
    exact = kernel(3).double()(x, w)
    assert (kernel(3)(x.float(), w.float()) - exact).abs().max() < 1e-5


def test_a_kernel_without_a_profile_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"^Kernel does not define profile\(r2\)\.$"):
        Kernel(2)(torch.randn(2, 2), torch.randn(2, 2))


# The conditioner.


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_the_output_is_the_weighted_sum_of_kernels(groups: int, context_dim: int | None) -> None:
    net = machine(groups=groups, context_dim=context_dim)
    x, context = rows(6), None if context_dim is None else rows(6, 2, seed=3)
    seen = x if context is None else torch.cat([x, context], 1)
    out = torch.zeros(6, 4).double()
    for m in range(4):
        kernel = net.kernels[m * groups // 4]
        for i, point in enumerate(net.points):
            r = ((seen - point) / kernel.log_length.exp()).square().sum(1).sqrt()
            out[:, m] += net.weights[i, m] * PROFILES[SquaredExponential](r)
    given = [x] if context is None else [x, context]
    torch.testing.assert_close(net(*given), out)


@pytest.mark.parametrize("kernel", [SquaredExponential, Matern32, Matern52])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_no_gradient_is_cut(kernel: type[Kernel], context_dim: int | None) -> None:
    """Of output and penalty by input, context, points, weights and length scales: its slope."""
    net = machine(kernel=kernel, groups=2, context_dim=context_dim)
    names = [name for name, _ in net.named_parameters()]
    assert names == ["points", "weights", "kernels.0.log_length", "kernels.1.log_length"]
    inputs = [rows(4), *([] if context_dim is None else [rows(4, 2, seed=2)])]
    leaves = [t.detach().requires_grad_() for t in (*inputs, *net.parameters())]

    def output(*tensors: Tensor) -> Tensor:
        count = len(inputs)
        return functional_call(net, dict(zip(names, tensors[count:], strict=True)), tensors[:count])

    assert torch.autograd.gradcheck(output, leaves)
    gradients = torch.autograd.grad(output(*leaves).square().sum(), leaves)
    assert all(gradient.all() for gradient in gradients)


def test_the_penalty_is_the_dense_formula_and_its_gradient_the_slope() -> None:
    net = machine(groups=2, kernel=Matern52)
    dense = torch.zeros(()).double()
    for kernel, v in zip(net.kernels, (net.weights[:, :2], net.weights[:, 2:]), strict=True):
        dense += torch.trace(v.T @ kernel(net.points, net.points) @ v)
    torch.testing.assert_close(net.penalty(), dense)
    assert net.penalty().shape == ()
    parameters = list(net.parameters())
    for parameter, gradient in zip(
        parameters, torch.autograd.grad(net.penalty(), parameters), strict=True
    ):
        step = 1e-6 * torch.ones_like(parameter)
        with torch.no_grad():
            parameter.add_(step)
            above = net.penalty()
            parameter.sub_(2 * step)
            slope = (above - net.penalty()) / 2
            parameter.add_(step)
        assert gradient.all()
        torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-4, atol=1e-12)


def test_least_squares_with_the_penalty_is_kernel_ridge_regression() -> None:
    x = torch.linspace(-2, 2, 15).double()[:, None]
    y, weight = torch.sin(3 * x), 0.1
    net = KernelConditioner(1, 1, points=15).double()
    with torch.no_grad():
        net.points.copy_(x)
        net.kernels[0].log_length.fill_(-0.5)
    gram = net.kernels[0](x, x).detach()
    ridge = torch.linalg.solve(gram + weight * torch.eye(15).double(), y)
    optimizer = torch.optim.LBFGS(
        [net.weights],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (net(x) - y).square().sum() + weight * net.penalty()
        loss.backward()
        return loss

    optimizer.step(closure)
    new = torch.linspace(-3, 3, 50).double()[:, None]
    expected = net.kernels[0](new, x) @ ridge
    torch.testing.assert_close(net(new), expected, atol=1e-5, rtol=0)
    assert (net(x) - y).abs().max() < 0.3


def test_groups_have_length_scales_of_their_own_and_share_the_points() -> None:
    net, x = machine(groups=2), rows(6)
    before = net(x)
    with torch.no_grad():
        net.kernels[1].log_length.add_(1)
    assert torch.equal(net(x)[:, :2], before[:, :2])
    assert (net(x)[:, 2:] != before[:, 2:]).all()
    with torch.no_grad():
        net.points.add_(1)
    assert (net(x)[:, :2] != before[:, :2]).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("context", [0, 2])
def test_the_number_of_parameters_is_the_formula(groups: int, context: int) -> None:
    net = KernelConditioner(3, 4, 7, groups=groups, context_dim=context or None)
    d, m, n = 3 + context, 4, 7
    assert sum(p.numel() for p in net.parameters()) == n * (d + m) + groups * d


def test_a_new_machine_says_zero_and_a_new_coupling_does_nothing() -> None:
    net, x = KernelConditioner(3, 4, 5), torch.randn(6, 3)
    assert not net(x).any()
    assert net(x[:0]).shape == (0, 4)
    coupling = Coupling(halves(6), Affine(), KernelConditioner)
    x = torch.randn(6, 6)
    z, log_det = coupling(x)
    torch.testing.assert_close(z, x)
    assert log_det.abs().max() < 1e-6


@every_kernel
def test_far_from_all_points_a_coupling_is_the_identity(kernel: type[Kernel]) -> None:
    coupling = Coupling(halves(4), Affine(), partial(KernelConditioner, points=6, kernel=kernel))
    randomize_parameters(coupling)
    near, far = torch.randn(5, 4), torch.randn(5, 4) + 1e4
    assert not torch.allclose(coupling(near)[0], near, atol=1e-2)
    z, log_det = coupling(far)
    torch.testing.assert_close(z, far)
    assert log_det.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KernelConditioner(3, 5, groups=2), "outputs to be a multiple of groups"),
        (lambda: KernelConditioner(3, 4, context_dim=(1, 2, 2)), "context_dim to be the size of a"),
        (lambda: KernelConditioner(3, 4, kernel=Matern52(3)), "kernel to be a class of"),
        (lambda: KernelConditioner(3, 4, kernel=torch.nn.Identity), "kernel to be a class of"),
        (lambda: KernelConditioner(3, 4)(torch.randn(2, 2)), "an input of shape (batch, 3), got"),
        (lambda: KernelConditioner(3, 4)(torch.randn(2, 3, 2)), "an input of shape (batch, 3)"),
        (
            lambda: KernelConditioner(3, 4, context_dim=2)(torch.randn(2, 3)),
            "a context of shape (batch, 2), got none",
        ),
        (
            lambda: KernelConditioner(3, 4, context_dim=2)(torch.randn(2, 3), torch.randn(3, 2)),
            "a context of shape (batch, 2), got (3, 2)",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((ArgumentError, ShapeError), match=r"^KernelConditioner expects .*\.$") as e:
        make()
    assert said in str(e.value)


# The start at data.


def are_rows_of(points: Tensor, x: Tensor) -> Tensor:
    """For each point, whether it is a row of x."""
    return (points[:, None] == x).all(2).any(1)


def test_points_start_at_different_rows_of_the_data() -> None:
    torch.manual_seed(0)
    net, x = KernelConditioner(3, 4, 20), 3 * torch.randn(100, 3) + 5
    assert not are_rows_of(net.points, x).any()
    net.initialize(x)
    assert are_rows_of(net.points, x).all()
    assert len(net.points.unique(dim=0)) == 20
    # From anywhere in the data, which may lie sorted.
    place = (net.points[:, None] == x).all(2).nonzero()[:, 1]
    assert place.max() > 50
    assert place.min() < 50
    spread = x.std(0, correction=0) * 3**0.5
    torch.testing.assert_close(net.kernels[0].log_length.exp(), spread)
    assert not net.weights.any()


def test_it_happens_once_and_the_state_says_whether() -> None:
    net, x = KernelConditioner(3, 4, 5), torch.randn(50, 3)
    net.initialize(x[:0])
    assert not net.initialized
    net.initialize(x)
    assert net.initialized
    before = copy.deepcopy(net.state_dict())
    other = KernelConditioner(3, 4, 5)
    other.load_state_dict(before)
    for one in (net, other):
        one.initialize(x + 10)
        assert all(torch.equal(before[key], value) for key, value in one.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 8])
def test_of_few_or_equal_rows_no_two_points_lie_together(count: int) -> None:
    torch.manual_seed(0)
    net = KernelConditioner(2, 2, 200)
    x = (torch.randn(count, 2) * 0.1 + 7).repeat(50, 1)
    net.initialize(x)
    assert are_rows_of(net.points, x).sum() == count
    assert len(net.points.unique(dim=0)) == 200
    assert torch.isfinite(net.kernels[0].log_length).all()
    if count > 1:
        # The others have the data's mean and spread.
        assert (net.points - x.mean(0)).abs().max() < 6 * x.std(0).max()
        torch.testing.assert_close(net.points.std(0), x.std(0), rtol=0.3, atol=0)


def test_a_context_is_part_of_the_points() -> None:
    net, x, context = KernelConditioner(2, 2, 8, context_dim=3), torch.randn(9, 2), torch.rand(9, 3)
    net.initialize(x, context)
    assert are_rows_of(net.points, torch.cat([x, context], 1)).all()


small = partial(KernelConditioner, points=6)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_a_coupling_hands_on_what_its_conditioner_sees(flip: bool, context_dim: int | None) -> None:
    x, context = torch.randn(50, 5), None if context_dim is None else torch.randn(50, 2)
    for backwards in (False, True):
        net = partial(small, context_dim=context_dim)
        coupling = Coupling(halves(5, flip), Affine(), net, limit=0.5)
        layer = Inverse(coupling) if backwards else coupling
        layer.initialize(x, context)
        kept = (x[:, 2:] if flip else x[:, :3]).clamp(-0.5, 0.5)
        seen = kept if context is None else torch.cat([kept, context], 1)
        assert are_rows_of(coupling.conditioner.points, seen).all()


def test_a_coupling_names_itself_when_the_first_batch_does_not_fit() -> None:
    coupling = Coupling(halves(5), Affine(), partial(small, context_dim=2))
    with pytest.raises(ShapeError, match=r"^Coupling expects shape .*\.$"):
        coupling.initialize(torch.randn(9, 4), torch.randn(9, 2))
    with pytest.raises(ShapeError, match=r"^Coupling expects a context .*\.$"):
        coupling.initialize(torch.randn(9, 5))
    with pytest.raises(ShapeError, match=r"^Coupling.inverse expects a context .*\.$"):
        coupling.initialize_inverse(torch.randn(9, 5))


def test_a_conditioner_without_a_start_is_left_alone() -> None:
    flow = models.realnvp(4, 2, (8,))
    before = [c.conditioner.state_dict() for c in flow.modules() if isinstance(c, Coupling)]
    flow.initialize(torch.randn(20, 4))
    after = [c.conditioner.state_dict() for c in flow.modules() if isinstance(c, Coupling)]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_in_a_flow_every_coupling_starts_at_what_reaches_it() -> None:
    x = 4 * torch.randn(50, 4) + 3
    first = Coupling(halves(4), Affine(), small)
    second = Coupling(halves(4, flip=True), Affine(), small)
    flow = Flow(Compose(ActNorm(4), first, ActNorm(4), second), StandardNormal(4))
    flow.initialize(x)
    reaching = flow.bijection[:3](x)[0]
    for coupling, seen in ((first, reaching[:, :2]), (second, reaching[:, 2:])):
        gap = (coupling.conditioner.points[:, None] - seen).abs().amax(2).amin(1)
        assert gap.max() < 1e-5
        torch.testing.assert_close(
            coupling.conditioner.points.mean(), torch.zeros(()), atol=1, rtol=0
        )


def test_along_the_channels_of_a_matrix_all_patches_are_data() -> None:
    coupling = Coupling(halves(4), Affine(), small)
    x = torch.randn(3, 5, 4)
    AlongChannels(coupling).initialize(x)
    assert are_rows_of(coupling.conditioner.points, x.reshape(-1, 4)[:, :2]).all()


# In flows.


@pytest.mark.parametrize("kernel", [SquaredExponential, Matern32, Matern52])
@pytest.mark.parametrize("context_dim", [None, 2])
def test_a_kernelised_coupling_is_a_bijection(
    kernel: type[Kernel], context_dim: int | None
) -> None:
    net = partial(KernelConditioner, points=6, kernel=kernel, context_dim=context_dim)
    context = None if context_dim is None else torch.randn(4, context_dim)
    for tau in (Affine(), RationalQuadraticSpline(4)):
        check_bijection(Coupling(halves(5), tau, net), torch.randn(4, 5), context)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("context_dim", [None, 2])
def test_ferumal_is_a_bijection(backbone: Any, context_dim: int | None) -> None:
    flow = ferumal(5, 6, 3, backbone=backbone, context_dim=context_dim)
    assert flow.likelihood == "exact"
    context = None if context_dim is None else torch.randn(4, context_dim)
    check_bijection(flow.bijection, torch.randn(4, 5), context)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_ferumal_has_as_many_parameters_as_it_says(backbone: Any) -> None:
    d, points, layers, k = 5, 6, 3, 2
    flow = ferumal(d, points, layers, backbone=backbone, context_dim=k)
    found = sum(p.numel() for p in flow.parameters())
    couplings = layers * ((points + 2) * (3 + k) + 2 * points * 2)
    around = layers * (2 * d + (d * d if backbone == "glow" else 0))
    assert found == couplings + around


def test_ferumal_is_made_of_the_parts_that_it_says() -> None:
    def parts(flow: Flow) -> list[str]:
        return [type(layer).__name__ for layer in flow.bijection]

    step = ["ActNorm", "Coupling"]
    assert parts(ferumal(3, 2, 3)) == [*step, *step, "Permutation", *step]
    assert parts(ferumal(2, 2, 3)) == step * 3
    assert parts(ferumal(3, 2, 2, backbone="glow")) == ["ActNorm", "LU", "Coupling"] * 2
    flow = ferumal(4, 2, 2, kernel=Matern32)
    machines = [m for m in flow.modules() if isinstance(m, KernelConditioner)]
    assert [len(m.kernels) for m in machines] == [2, 2]
    assert all(isinstance(k, Matern32) for m in machines for k in m.kernels)
    first, second = (c.mask.kept(4) for c in flow.modules() if isinstance(c, Coupling))
    assert torch.equal(first, ~second)


@pytest.mark.parametrize("wrong", [lambda: ferumal(1), lambda: ferumal((1, 4, 4))])
def test_ferumal_says_in_a_sentence_what_it_takes(wrong: Callable[[], Flow]) -> None:
    with pytest.raises(ArgumentError, match=r"^ferumal expects .*, got .*\.$"):
        wrong()


def test_kernel_machines_fit_a_mixerflow_as_it_is() -> None:
    net = partial(KernelConditioner, points=4, groups=2)
    flow = models.mixerflow((1, 4, 4), 2, 1, network=net)
    machines = [m for m in flow.modules() if isinstance(m, KernelConditioner)]
    assert len(machines) == 2
    flow.initialize(torch.randn(10, 1, 4, 4))
    assert all(m.initialized for m in machines)
    check_bijection(flow.bijection, torch.randn(2, 1, 4, 4))
    with_flow = models.mixerflow(
        (1, 4, 4), 2, 1, flow=lambda dim, k: ferumal(dim, 4, 2, backbone="glow").bijection
    )
    assert sum(isinstance(m, KernelConditioner) for m in with_flow.modules()) == 4
    check_bijection(with_flow.bijection, torch.randn(2, 1, 4, 4))


def test_kernelised_layers_compile_whole_and_map_over_rows() -> None:
    for kernel in (SquaredExponential, Matern52):
        flow = ferumal(3, 4, 2, kernel=kernel, context_dim=2).double()
        randomize_parameters(flow)
        for check in (check_compile, check_vmap):
            check(flow.bijection, rows(4), rows(4, 2, seed=1))


def test_under_autocast_distances_stay_exact() -> None:
    k = SquaredExponential(4)
    x, w = (rows(5, 4, seed=s).float() for s in (0, 1))
    exact = k(x, w)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(k(x, w), exact)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_ferumal_flow_is_saved_loaded_copied_and_pickled(backbone: Any, tmp_path: Path) -> None:
    flow, x = ferumal(4, 5, 2, backbone=backbone), torch.randn(30, 4)
    flow.initialize(x)
    randomize_parameters(flow, scale=0.2)
    expected = flow.log_prob(x)
    checkpoints.save(flow, tmp_path / "flow.safetensors")
    other = ferumal(4, 5, 2, backbone=backbone)
    checkpoints.load(other, tmp_path / "flow.safetensors")
    for one in (other, copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(one.log_prob(x), expected, rtol=0, atol=0)
        assert all(m.initialized for m in one.modules() if isinstance(m, KernelConditioner))


def test_the_loss_adds_the_penalties_in_training_only() -> None:
    flow, x, context = ferumal(3, 4, 2, context_dim=1), torch.randn(5, 3), torch.randn(5, 1)
    randomize_parameters(flow, scale=0.2)
    loss = with_rkhs_penalty(0.5)
    nats = -flow.log_prob(x, context).mean()
    norms = sum(m.penalty() for m in flow.modules() if isinstance(m, KernelConditioner))
    assert norms > 0
    torch.testing.assert_close(loss(flow, x, context), nats + 0.5 * norms)
    torch.testing.assert_close(loss(flow.eval(), x, context), nats)
    plain = ferumal(3, 4, 2)
    assert loss(plain, x).shape == ()
    with pytest.raises(ArgumentError, match="^with_rkhs_penalty expects weight to be a number of"):
        with_rkhs_penalty(-1.0)


def test_a_heavier_penalty_makes_smoother_conditioners() -> None:
    x = load("moons", "train", n=300).x
    norms, nats = [], []
    for weight in (0.0, 0.1):
        torch.manual_seed(0)
        flow = ferumal(2, 20, 4)
        loss = with_rkhs_penalty(weight)
        fit(flow, x, steps=60, lr=2e-2, schedule="constant", loss=loss, progress=False)
        machines = [m for m in flow.modules() if isinstance(m, KernelConditioner)]
        assert all(m.initialized for m in machines)
        norms.append(sum(m.penalty().item() for m in machines))
        nats.append(evaluate(flow, x).nats)
    assert norms[1] < 0.3 * norms[0]
    normal = -0.5 * torch.logdet(torch.cov(x.T)).item() - 1 - math.log(2 * math.pi)
    assert nats[0] > nats[1] > normal + 0.2


def test_integers_are_dequantized() -> None:
    flow = ferumal(4, 5, 2, grey_levels=3)
    x = torch.randint(0, 3, (20, 4))
    flow.initialize(x)
    assert torch.isfinite(flow.log_prob(x)).all()
    assert flow.likelihood == "lower bound"
    assert ((flow.sample(9) >= 0) & (flow.sample(9) <= 2)).all()
