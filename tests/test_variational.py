"""Variational inference: bounds against models whose evidence is known, training, wrong use."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tape import Tape
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from nflib import data, models
from nflib.arguments import ArgumentError
from nflib.checks import check_bijection, randomize_parameters
from nflib.core import Compose, Flow, Model, ShapeError, StandardNormal
from nflib.dequantization import UniformDequantization
from nflib.discrete import LogisticMixture, Softmax
from nflib.linear import Dense, Diagonal, Permutation
from nflib.metrics import evaluate, log_probs
from nflib.normalization import ActNorm, BatchNorm
from nflib.train import fit
from nflib.variational import (
    VAE,
    ConvDecoder,
    ConvEncoder,
    posterior_flow,
    reverse_kl,
    vae,
)

KINDS = ("planar", "radial", "sylvester", "realnvp", "iaf")
SMALL: dict[str, Any] = {"patch": 2, "width": 4, "hidden": 8, "features": 3, "flow_hidden": (8, 8)}
DIGITS = data.load("digits", "train", n=200).x


# A model whose evidence is known


class Linear(Model):
    """``p(x | z) = N(W z + b, s^2)``, so that ``p(x) = N(b, W W^T + s^2)``."""

    def __init__(self, dim: int = 4, latents: int = 3, s: float = 0.7) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(5)
        self.event_shape, self.context_shape, self.s = (dim,), (latents,), s
        self.weight = nn.Parameter(torch.randn(dim, latents, generator=g, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(dim, generator=g, dtype=torch.float64))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        z = self.rows_of_context(context, len(x))
        return Normal(z @ self.weight.T + self.bias, self.s).log_prob(x).sum(1)

    def sample(
        self, n: int, context: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        z = self.rows_of_context(context, n)
        noise = torch.randn(n, len(self.bias), generator=generator, dtype=z.dtype)
        return z @ self.weight.T + self.bias + self.s * noise

    def evidence(self) -> MultivariateNormal:
        noise = self.s**2 * torch.eye(len(self.bias))
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + noise)

    def posterior(self) -> tuple[Tensor, Tensor]:
        """The matrix M of the mean M (x - b), and the covariance of p(z | x)."""
        precision = torch.eye(self.weight.shape[1]) + self.weight.T @ self.weight / self.s**2
        return precision.inverse() @ self.weight.T / self.s**2, precision.inverse()


def encoder_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    net = nn.Linear(weight.shape[1], weight.shape[0]).double()
    net.weight.data, net.bias.data = weight, bias
    return net


def exact_vae() -> tuple[VAE, Linear]:
    """The posterior of the linear model, as a linear map of a normal of scale one."""
    decoder = Linear()
    gain, covariance = (part.detach() for part in decoder.posterior())
    root = torch.linalg.cholesky(covariance)
    mean = root.inverse() @ gain
    encoder = encoder_of(
        torch.cat([mean, torch.zeros(3, 4)]), torch.cat([-mean @ decoder.bias, torch.zeros(3)])
    )
    flow = Dense(3, bias=False, weight=root).double()
    return VAE(encoder, decoder, flow).double(), decoder


def rough_vae() -> tuple[VAE, Linear]:
    """A diagonal posterior that is somewhat off."""
    decoder = Linear()
    gain, covariance = (part.detach() for part in decoder.posterior())
    scale = 2.5 * covariance.diagonal().sqrt()
    raw = scale.expm1().log() - math.log(math.e - 1)
    mean_bias = -gain @ decoder.bias + torch.tensor([0.2, -0.1, 0.1])
    encoder = encoder_of(torch.cat([gain, torch.zeros(3, 4)]), torch.cat([mean_bias, raw]))
    return VAE(encoder, decoder).double(), decoder


@pytest.fixture
def points() -> Tensor:
    torch.manual_seed(0)
    return Linear().evidence().sample((4,)).double()


@pytest.fixture(autouse=True)
def wide() -> Any:
    # The test's own formulas are in float64; nflib follows its arguments.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_with_the_exact_posterior_every_weight_is_the_evidence(points: Tensor) -> None:
    model, decoder = exact_vae()
    weights = model.log_weights(points, 50)
    assert weights.shape == (50, 4)
    expected = decoder.evidence().log_prob(points).expand(50, 4)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.log_prob(points), expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(model.bound(points, 3).elbo, expected[0], rtol=0, atol=1e-10)


def test_bounds_rise_with_their_draws_to_the_evidence(points: Tensor) -> None:
    model, decoder = rough_vae()
    exact, counts = decoder.evidence().log_prob(points), (1, 8, 64, 512)
    with torch.no_grad():
        torch.manual_seed(1)
        weights = model.log_weights(points, 512 * 300)
    means, errors = [], []
    for k in counts:
        bounds = weights.unflatten(0, (-1, k)).logsumexp(1) - math.log(k)
        means.append(bounds.mean(0))
        errors.append(bounds.std(0) / len(bounds) ** 0.5)
    for k in range(3):
        error = (errors[k].square() + errors[k + 1].square()).sqrt()
        assert (means[k] + 4 * error < means[k + 1]).all(), counts[k]
    assert (means[-1] <= exact + 4 * errors[-1]).all()
    assert (means[-1] > exact - 0.1).all()
    assert (means[0] < exact - 1).all()


@pytest.mark.parametrize("with_prior", [False, True])
def test_the_kl_is_that_of_two_normals(points: Tensor, with_prior: bool) -> None:
    model, decoder = rough_vae()
    centre, spread = torch.zeros(3), torch.ones(3)
    if with_prior:
        flow = Diagonal(3).double()
        randomize_parameters(flow)
        prior = Flow(flow, StandardNormal(3)).double()
        model = VAE(model.encoder, decoder, None, prior).double()
        rows = prior.bijection.inverse(torch.stack([torch.zeros(3), torch.ones(3)]))[0].detach()
        centre, spread = rows[0], (rows[1] - rows[0]).abs()
    out = model.encoder(points)
    q = Normal(out[:, :3], (out[:, 3:] + math.log(math.e - 1)).exp().log1p())
    expected = torch.distributions.kl_divergence(q, Normal(centre, spread)).sum(1)
    z, log_q = model.posterior(points, 20_000)
    torch.testing.assert_close(log_q, q.log_prob(z).sum(2))
    kl = log_q - Normal(centre, spread).log_prob(z).sum(2)
    assert ((kl.mean(0) - expected).abs() < 4 * kl.std(0) / 20_000**0.5).all()
    torch.manual_seed(2)
    found = model.bound(points, 20_000)
    assert ((found.kl - expected).abs() < 4 * kl.std(0) / 20_000**0.5).all()
    torch.testing.assert_close(found.elbo, found.reconstruction - found.kl)


def test_the_reconstruction_is_the_mean_of_the_decoders_log_prob(points: Tensor) -> None:
    model, decoder = rough_vae()
    torch.manual_seed(0)
    z, _ = model.posterior(points, 7)
    expected = torch.stack([decoder.log_prob(points, each) for each in z]).mean(0)
    torch.manual_seed(0)
    torch.testing.assert_close(model.bound(points, 7).reconstruction, expected)


def test_many_draws_are_taken_in_parts(points: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoder = rough_vae()
    rows: list[int] = []
    plain = decoder.log_prob

    def counted(x: Tensor, context: Tensor) -> Tensor:
        rows.append(len(x))
        return plain(x, context)

    monkeypatch.setattr(decoder, "log_prob", counted)
    monkeypatch.setattr("nflib.variational.model.AT_ONCE", 13)
    assert model.log_weights(points, 10).shape == (10, 4)
    assert rows == [12, 12, 12, 4]
    torch.manual_seed(0)
    found = model.bound(points, 7)
    torch.manual_seed(0)
    parts = [model.posterior(points, k)[0] for k in (3, 3, 1)]
    expected = torch.stack([plain(points, z) for z in torch.cat(parts)]).mean(0)
    torch.testing.assert_close(found.reconstruction, expected)


@pytest.mark.parametrize("samples", [1, 16])
def test_evaluate_gives_the_importance_weighted_bound(points: Tensor, samples: int) -> None:
    model, _ = rough_vae()
    torch.manual_seed(3)
    score = evaluate(model.train(), points, samples=samples)
    torch.manual_seed(3)
    with torch.no_grad():
        weights = model.log_weights(points, samples)
    expected = (weights.logsumexp(0) - math.log(samples)).mean().item()
    assert score.nats == pytest.approx(expected, abs=1e-12)
    assert (score.likelihood, score.samples) == ("lower bound", samples)
    assert model.training


# Posteriors


def a_vae(kind: str = "planar", steps: int = 2, **options: Any) -> VAE:
    """A small one of 4 x 4 binary images in float64, its flow's parameters at random."""
    torch.manual_seed(7)
    model = vae((1, 4, 4), 3, flow=kind, steps=steps, **SMALL, **options).double()
    if model.posterior_flow is not None:
        randomize_parameters(model.posterior_flow)
    return model


def images(rows: int = 5, levels: int = 2, channels: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, levels, (rows, channels, 4, 4), dtype=torch.uint8)


@pytest.mark.parametrize("context_dim", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_bijection(kind: str, context_dim: int | None) -> None:
    torch.manual_seed(0)
    flow = posterior_flow(kind, 4, 2, context_dim=context_dim, hidden=8)
    context = None if context_dim is None else torch.randn(6, 2)
    check_bijection(flow.double(), torch.randn(6, 4), context, compile=False)


@pytest.mark.parametrize("amortised", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_q_is_the_change_of_variables(kind: str, amortised: bool) -> None:
    model, x = a_vae(kind, amortised=amortised), images()
    torch.manual_seed(2)
    z, log_q = model.posterior(x, 3)
    torch.manual_seed(2)
    noise = torch.randn(3, 5, 3)
    out = model.encoder(x)
    mean, scale = out[:, :3], (out[:, 3:6] + math.log(math.e - 1)).exp().log1p()
    start = mean + scale * noise
    for draw in range(3):
        for row in range(5):
            seen = out[row : row + 1, 6:] if amortised else None

            def move(point: Tensor, seen: Tensor | None = seen) -> Tensor:
                return model.posterior_flow(point[None], seen)[0][0]

            at = start[draw, row]
            jacobian = torch.autograd.functional.jacobian(move, at)
            expected = Normal(mean[row], scale[row]).log_prob(at).sum() - jacobian.slogdet()[1]
            torch.testing.assert_close(z[draw, row], move(at))
            torch.testing.assert_close(log_q[draw, row], expected)


def test_what_the_flow_sees_of_an_image_changes_its_map() -> None:
    x = images(2)
    start = torch.zeros(2, 3)
    for amortised in (False, True):
        model = a_vae("planar", amortised=amortised)
        _, _, context = model._embed(x)
        z, _ = model.posterior_flow(start, context)
        assert torch.equal(z[0], z[1]) == (not amortised)


def test_steps_are_so_many_of_the_kind() -> None:
    def names(kind: str, **options: Any) -> list[str]:
        return [type(layer).__name__ for layer in posterior_flow(kind, 4, 3, **options)]

    assert names("planar") == ["Planar"] * 3
    assert names("radial") == ["Radial"] * 3
    assert names("sylvester") == ["Sylvester"] * 3
    assert names("iaf") == ["MaskedAutoregressive"] * 3
    pair = ["Coupling", "Coupling"]
    assert names("realnvp") == [*pair, "Permutation", *pair, "Permutation", *pair]
    assert names("planar", batch_norm=True) == ["BatchNorm", "Planar"] * 3
    assert posterior_flow("planar", 4, 0) is None
    assert a_vae(steps=0).posterior_flow is None
    sylvester = posterior_flow("sylvester", 4, 1, rank=2)
    assert sum(p.numel() for p in sylvester.parameters()) < sum(
        p.numel() for p in posterior_flow("sylvester", 4, 1).parameters()
    )


def test_a_step_of_realnvp_moves_every_latent_and_an_iafs_orders_take_turns() -> None:
    flow = posterior_flow("realnvp", 4, 1, hidden=8).double()
    randomize_parameters(flow)
    z = torch.randn(3, 4)
    assert (flow(z)[0] != z).all()
    first, second = posterior_flow("iaf", 4, 2, hidden=8).double()
    for layer, lower in ((first, True), (second, False)):
        randomize_parameters(layer)
        jacobian = torch.autograd.functional.jacobian(lambda x, f=layer: f(x[None])[0][0], z[0])
        other = jacobian.triu(1) if lower else jacobian.tril(-1)
        assert (other == 0).all()
        assert (jacobian - other != 0).sum() > 6


def test_weight_norm_is_of_the_couplings_networks() -> None:
    def norms(**options: Any) -> int:
        flow = posterior_flow("realnvp", 4, 1, hidden=8, **options)
        return sum("Normed" in type(part).__name__ for part in flow.modules())

    assert norms() == 0
    assert norms(weight_norm=True) == 4


# Gradients


def hand_written_elbo(model: VAE, x: Tensor, noise: Tensor) -> Tensor:
    """Of a VAE with planar steps and binary pixels, layer by layer, for one draw."""
    out = model.encoder.layers(2.0 * x - 1)
    mean, scale = out[:, :3], torch.log1p(torch.exp(out[:, 3:6] + math.log(math.e - 1)))
    z = mean + scale * noise
    log_q = Normal(mean, scale).log_prob(z).sum(1)
    for step in model.posterior_flow:
        z, log_det = step(z, out[:, 6:])
        log_q = log_q - log_det
    p = model.decoder.layers(z).sigmoid()
    log_x = (x * p.log() + (1 - x.double()) * (1 - p).log()).sum((1, 2, 3))
    return log_x + Normal(0.0, 1.0).log_prob(z).sum(1) - log_q


def test_gradients_are_those_of_a_hand_written_elbo() -> None:
    model, x = a_vae("planar"), images()
    parameters = list(model.parameters())
    torch.manual_seed(4)
    found = model(x)
    torch.manual_seed(4)
    expected = hand_written_elbo(model, x, torch.randn(1, 5, 3)[0])
    torch.testing.assert_close(found, expected)
    for a, b in zip(
        torch.autograd.grad(found.mean(), parameters),
        torch.autograd.grad(expected.mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
        assert (a != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_differences(kind: str) -> None:
    model, x, h = a_vae(kind, prior_steps=1), images(), 1e-5
    parameters = list(model.parameters())

    def loss() -> Tensor:
        torch.manual_seed(4)
        return model.bound(x, 2).elbo.mean()

    gradient = torch.autograd.grad(loss(), parameters)
    torch.manual_seed(8)
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, v in zip(parameters, direction, strict=True):
                p += step * v
            values.append(loss())
    expected = (values[0] - values[1]) / (2 * h)
    found = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Training


def with_seed(call: Callable[[], Any]) -> Any:
    torch.manual_seed(6)
    return call()


def test_the_weight_of_the_kl_rises_step_by_step() -> None:
    model, x = a_vae(warm_up=4), images()
    reconstruction, kl = with_seed(lambda: model.bound(x))
    for weight in (0.25, 0.5, 0.75, 1, 1, 1):
        torch.testing.assert_close(with_seed(lambda: model(x)), reconstruction - weight * kl)
    assert model.steps_seen == 6
    fresh = a_vae(warm_up=4).eval()
    torch.testing.assert_close(with_seed(lambda: fresh(x)), reconstruction - kl)
    torch.testing.assert_close(with_seed(lambda: fresh.train().log_prob(x)), reconstruction - kl)
    assert fresh.steps_seen == 0


def test_a_draw_whose_kl_is_negative_counts_in_warm_up() -> None:
    model, x = a_vae("planar", steps=0, warm_up=1), images(1)
    with torch.no_grad():
        model.encoder.layers[-1].weight.mul_(0.01)
        for seed in range(50):
            torch.manual_seed(seed)
            reconstruction, kl = model.bound(x)
            if kl < 0:
                break
        torch.manual_seed(seed)
        assert kl < 0
        torch.testing.assert_close(model(x), reconstruction - kl)


def test_free_bits_cost_nothing_and_what_is_above_costs_all_of_it() -> None:
    x = images()
    for bits, free in ((1e6, True), (1e-6, False)):
        model = a_vae(free_bits=bits)
        weights = list(model.encoder.parameters())
        reconstruction, kl = with_seed(lambda m=model: m.bound(x))
        assert kl.mean() > 1e-6
        found = with_seed(lambda m=model: m(x))
        cost = torch.tensor(bits) if free else kl.mean()
        torch.testing.assert_close(found, reconstruction - cost)
        expected = reconstruction.mean() if free else (reconstruction - kl).mean()
        for a, b in zip(
            torch.autograd.grad(found.mean(), weights),
            torch.autograd.grad(expected, weights),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(with_seed(lambda m=model: m.eval()(x)), reconstruction - kl)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 0},
    "planar": {"flow": "planar", "steps": 2},
    "realnvp, batch norm": {"flow": "realnvp", "steps": 2, "batch_norm": True},
    "iaf": {"flow": "iaf", "steps": 2},
    "sylvester and a prior": {"flow": "sylvester", "steps": 1, "rank": 2, "prior_steps": 1},
    "free bits": {"flow": "radial", "steps": 1, "free_bits": 1.0},
}


def trained(name: str, **options: Any) -> tuple[VAE, list[float]]:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(3)
    made = {"warm_up": 10, **SMALL, **OPTIONS[name]}
    model = vae((1, 8, 8), 4, grey_levels=17, **made)
    settings: dict[str, Any] = {"steps": 23, "lr": 1e-2, "warmup": 4, "ema": 0.9} | options
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a recording that fails says so by a warning
        history = fit(
            model,
            DIGITS,
            DIGITS[:50],
            batch_size=64,
            validate_every=5,
            progress=False,
            **settings,
        )
    return model, history.column("train") + history.column("valid")


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_recorded_step_is_the_plain_one(
    recorded: list[Tape], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    captured, losses = trained(name)
    assert len(recorded) == 1
    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)
    plain, expected = trained(name)
    assert losses == expected
    assert same(captured, plain)


def test_every_step_counts_in_a_recording(recorded: list[Tape]) -> None:
    torch.set_default_dtype(torch.float32)
    model = vae((1, 8, 8), 4, grey_levels=17, warm_up=100, **SMALL)
    fit(model, DIGITS, steps=23, batch_size=64, progress=False)
    assert len(recorded) == 1
    assert model.steps_seen == 23


@pytest.mark.parametrize("name", ["plain", "realnvp, batch norm"])
def test_a_run_resumes_as_if_nothing_had_stopped_it(tmp_path: Path, name: str) -> None:
    options = {"warm_up": 40, **SMALL, **OPTIONS[name]}
    torch.set_default_dtype(torch.float32)

    def run(path: Path, parts: tuple[int, ...]) -> VAE:
        for stop in parts:
            torch.manual_seed(3)
            model = vae((1, 8, 8), 4, grey_levels=17, **options)
            calls = 0

            def loss(m: nn.Module, x: Tensor, stop: int = stop) -> Tensor:
                nonlocal calls
                calls += m.training
                if calls > stop:
                    raise KeyboardInterrupt
                return -m(x).mean()

            settings: dict[str, Any] = {"steps": 30, "batch_size": 64, "ema": 0.9, "lr": 1e-2}
            settings |= {"checkpoint": path, "resume": True, "progress": False, "loss": loss}
            fit(model, DIGITS, **settings)
        return model

    whole = run(tmp_path / "whole.safetensors", (99,))
    parted = run(tmp_path / "parted.safetensors", (13, 99))
    assert whole.steps_seen == 30
    assert same(whole, parted)


def test_training_beats_the_best_model_without_latents() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    train, test = ((data.load("digits", s).x > 8).to(torch.uint8) for s in ("train", "test"))
    p = ((train.double().sum(0) + 1) / (len(train) + 2)).double()
    independent = torch.distributions.Bernoulli(p).log_prob(test.double()).sum((1, 2, 3)).mean()
    model = vae((1, 8, 8), 8, flow="planar", steps=2, patch=2, width=16, hidden=64, warm_up=100)
    fit(model, train, steps=500, batch_size=64, lr=4e-3, progress=False)
    score = evaluate(model, test, samples=20)
    assert score.nats > independent.item() + 3
    # Means of images that the model has encoded are nearer to them than the mean image.
    shown = model.decoder.mean(model.encode(test))
    assert (shown - test).square().mean() < 0.75 * (p.float() - test).square().mean()


def test_bfloat16_is_the_networks_alone() -> None:
    torch.set_default_dtype(torch.float32)
    model = a_vae("planar").float().eval()
    x = images()
    plain = with_seed(lambda: model.log_weights(x, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encoder(x).dtype == torch.bfloat16
        narrow = with_seed(lambda: model.log_weights(x, 3))
        z, log_q = model.posterior(x)
        drawn = model.sample(4)
        assert model.decoder.mean(z[0]).dtype == torch.float32
    assert {narrow.dtype, z.dtype, log_q.dtype, drawn.dtype} == {torch.float32}
    torch.testing.assert_close(narrow, plain, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_holds_a_step(kind: str) -> None:
    torch._dynamo.reset()
    model, x = a_vae(kind, warm_up=4, free_bits=0.1), images()
    expected = [with_seed(lambda: model(x)) for _ in range(3)]
    again = a_vae(kind, warm_up=4, free_bits=0.1)
    compiled = torch.compile(again, fullgraph=True, backend="eager")
    for want in expected:
        torch.testing.assert_close(with_seed(lambda: compiled(x)), want)
    assert again.steps_seen == 3
    again.eval()
    torch.testing.assert_close(with_seed(lambda: compiled(x)), with_seed(lambda: again(x)))


def test_copies_and_pickles_are_the_same_model() -> None:
    model, x = a_vae("sylvester", warm_up=4, prior_steps=1), images()
    model(x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert same(model, other)
        torch.testing.assert_close(with_seed(lambda o=other: o(x)), with_seed(lambda: model(x)))
        model.steps_seen.sub_(1)


def test_a_first_batch_sets_what_depends_on_data() -> None:
    torch.manual_seed(0)
    flow = Compose(ActNorm(3), Permutation(3)).double()
    prior = Flow(ActNorm(3), StandardNormal(3)).double()
    parts = a_vae()
    encoder = nn.Sequential(parts.encoder, nn.Linear(9, 6)).double()
    model = VAE(encoder, parts.decoder, flow, prior).double()
    with torch.no_grad():
        encoder[1].bias.copy_(torch.tensor([5.0, -3.0, 0.0, 1.0, 2.0, 3.0]))
    x = images(300)
    model.initialize(x)
    z, _ = model.posterior(x)
    # Standard behind the posterior's layer, so that the prior's has nothing to do.
    for rows in (z[0], prior.encode(z[0])):
        assert rows.mean(0).abs().max() < 0.25
        assert (rows.std(0) - 1).abs().max() < 0.2
    before = copy.deepcopy(model.state_dict())
    model.initialize(images(20))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_prior_is_initialized_from_what_it_will_see() -> None:
    prior = Flow(ActNorm(3), StandardNormal(3)).double()
    model = a_vae("planar")
    model = VAE(model.encoder, model.decoder, model.posterior_flow, prior).double()
    with torch.no_grad():
        model.encoder.layers[-1].bias[:3] = 4.0
    x = images(300)
    model.initialize(x)
    rows = prior.encode(model.posterior(x)[0][0])
    assert rows.mean(0).abs().max() < 0.25
    assert (rows.std(0) - 1).abs().max() < 0.2


def test_batch_norm_counts_in_training_only() -> None:
    model, x = a_vae("planar", batch_norm=True), images(40)
    layer = next(part for part in model.posterior_flow if isinstance(part, BatchNorm))
    before = copy.deepcopy(layer.state_dict())
    model.eval()(x)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    model.train()(x)
    assert any(not torch.equal(before[k], v) for k, v in layer.state_dict().items())


# Priors, samples, shapes


@pytest.mark.parametrize(
    "prior",
    [
        lambda: Flow(Dense(3), StandardNormal(3)),
        lambda: models.maf(3, 1, 64),
        lambda: Flow(models.iaf(3, 1, 64).bijection, StandardNormal(3)),
        lambda: VAE(nn.Linear(3, 4), models.maf(3, 1, 64, context_dim=2)),
    ],
)
def test_any_model_of_the_latents_is_a_prior(prior: Callable[[], Model], points: Tensor) -> None:
    parts, decoder = rough_vae()
    found = prior().double()
    randomize_parameters(found)
    model = VAE(parts.encoder, decoder, prior_flow=found).double()
    assert model.log_weights(points, 3).shape == (3, 4)
    assert model.sample(5).shape == (5, 4)
    torch.manual_seed(0)
    z, log_q = model.posterior(points)
    expected = decoder.log_prob(points, z[0]) + found.log_prob(z[0]) - log_q[0]
    if found.likelihood == "exact":
        torch.testing.assert_close(with_seed_zero(lambda: model.log_prob(points)), expected)


def with_seed_zero(call: Callable[[], Tensor]) -> Tensor:
    torch.manual_seed(0)
    return call()


def test_any_conditional_model_is_a_decoder() -> None:
    torch.manual_seed(0)
    flow = models.realnvp(4, 2, 8, context_dim=3).double()
    model = VAE(nn.Linear(4, 6), flow).double()
    x = torch.randn(5, 4)
    assert model.log_weights(x, 2).shape == (2, 5)
    assert model.sample((2, 3)).shape == (2, 3, 4)
    assert model.event_shape == (4,)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6))
    pixels = models.glow((1, 4, 4), 1, 1, 8, context_dim=3, grey_levels=4)
    model = VAE(net, pixels).double()
    whole = images(5, 4)
    assert model.log_prob(whole).dtype == torch.float64
    with pytest.raises(ValueError, match="values"):
        model.check_data(whole + 4)


def test_samples_follow_the_model() -> None:
    model, decoder = rough_vae()
    n = 40_000
    x = model.sample(n)
    exact = decoder.evidence()
    assert not x.requires_grad
    assert ((x.mean(0) - exact.mean).abs() < 4 * exact.stddev / n**0.5).all()
    assert (x.T.cov() - exact.covariance_matrix).abs().max() < 0.15
    decoder.s = 1e-6
    cold = model.sample(n, temperature=0.5)
    signal = decoder.weight @ decoder.weight.T
    assert (cold.T.cov() - signal / 4).abs().max() < 0.05


def test_a_generator_repeats_and_disturbs_nothing() -> None:
    for model in (rough_vae()[0], a_vae(prior_steps=1), a_vae()):
        state = torch.get_rng_state()
        one, other = (
            model.sample((2, 3), generator=torch.Generator().manual_seed(1)) for _ in range(2)
        )
        assert torch.equal(one, other)
        assert one.shape[:2] == (2, 3)
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(model.sample((2, 3)), model.sample((2, 3)))


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows(kind: str, rows: int) -> None:
    for options in ({}, {"warm_up": 3, "free_bits": 0.1}):
        model, x = a_vae(kind, prior_steps=1, **options), images()[:rows]
        assert model(x).shape == model.log_prob(x).shape == (rows,)
        assert model.log_weights(x, 3).shape == (3, rows)
        z, log_q = model.posterior(x, 2)
        assert (z.shape, log_q.shape) == ((2, rows, 3), (2, rows))
        assert model.encode(x).shape == (rows, 3)
        assert model.sample(rows).shape == (rows, 1, 4, 4)
        assert model(x).dtype == model.sample(1).dtype == torch.float64
        assert model.bound(x).kl.shape == (rows,)


def test_encode_moves_the_mean() -> None:
    model, x = a_vae("planar"), images()
    mean, _, context = model._embed(x)
    torch.testing.assert_close(model.encode(x), model.posterior_flow(mean, context)[0])
    assert torch.equal(model.encode(x), model.encode(x))


# Encoder and decoder


def all_images(shape: tuple[int, int, int], levels: int) -> Tensor:
    digits = [torch.arange(levels)] * math.prod(shape)
    return torch.cartesian_prod(*digits).view(-1, *shape)


@pytest.mark.parametrize(
    ("shape", "head"),
    [
        ((1, 2, 4), None),
        ((2, 2, 2), None),
        ((1, 2, 2), LogisticMixture(3, 1, 2)),
        ((2, 1, 2), Softmax(3, 2)),
    ],
)
def test_probabilities_of_all_images_sum_to_one(shape: Any, head: Any) -> None:
    torch.manual_seed(0)
    patch = 1 if shape[1] == 1 else 2
    decoder = ConvDecoder(shape, 3, patch, 4, 8, head).double()
    x = all_images(shape, decoder.head.levels)
    z = torch.randn(2, 3)
    p = torch.stack([decoder.log_prob(x, each).exp() for each in z])
    torch.testing.assert_close(p.sum(1), torch.ones(2))
    assert (p[0] - p[1]).abs().max() > 1e-5
    mean = torch.einsum("kn,n...->k...", p, x.double())
    if not isinstance(head, LogisticMixture):
        torch.testing.assert_close(decoder.mean(z), mean)
    drawn = decoder.sample((2000,), z)
    assert drawn.shape == (2000, 2, *shape)
    assert (drawn.mean(0) - mean).abs().max() < 5 * decoder.head.levels / 2 / 2000**0.5
    decoder.check_data(drawn)


def test_pixels_of_a_patch_are_seen_and_made_where_they_are() -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder((1, 8, 8), 5, patch=2, width=4, hidden=8).double()
    decoder = ConvDecoder((1, 8, 8), 3, patch=2, width=4, hidden=8).double()
    x = images(1)[:, :, :1, :1].expand(1, 1, 8, 8).double().requires_grad_()
    (gradient,) = torch.autograd.grad(encoder.layers[:2](x)[0, :, 0, 0].sum(), x)
    assert (gradient[0, 0, :4, :4] != 0).all()  # the first patch and the neighbours it has
    assert (gradient[0, 0, 4:] == 0).all()
    features = torch.randn(1, 4, 4, 4, requires_grad=True)
    pixels = decoder.layers[-2:](features)
    (gradient,) = torch.autograd.grad(pixels[0, 0, :2, 2:4].sum(), features)
    assert (gradient[0, :, :2, :3] != 0).all()
    assert (gradient[0, :, 2:] == 0).all()
    assert (gradient[0, :, :, 3] == 0).all()


def test_grey_levels_are_spread_over_minus_one_to_one() -> None:
    encoder = ConvEncoder((1, 4, 4), 5, patch=2, width=4, hidden=8, levels=17).double()
    x = images(3, 17)
    torch.testing.assert_close(encoder(x), encoder.layers(x.double() / 8 - 1))
    model = vae((3, 4, 4), 3, grey_levels=17, **SMALL)
    assert (model.encoder.levels, model.decoder.head.levels) == (17, 17)
    assert isinstance(model.decoder.head, LogisticMixture)
    assert model.decoder.head.components == 3
    assert repr(vae((3, 4, 4), 3, **SMALL).decoder.head) == "Bernoulli(channels=3)"
    with pytest.raises(ValueError, match="17"):
        model.check_data(torch.full((1, 3, 4, 4), 17))


# Fitting a density that is known up to its constant


def test_reverse_kl_to_itself_is_zero() -> None:
    torch.manual_seed(0)
    flow = models.realnvp(2, 2, 8).double()
    randomize_parameters(flow)
    value = reverse_kl(flow, copy.deepcopy(flow).log_prob, 500)
    assert abs(value.item()) < 1e-10
    shifted = reverse_kl(flow, lambda z: flow.log_prob(z) + 3.0)
    assert shifted.item() == pytest.approx(-3)


def test_reverse_kl_to_a_shifted_normal_and_its_gradient() -> None:
    flow, centre = Flow(Diagonal(2).double(), StandardNormal(2)).double(), torch.tensor([1.0, -2.0])
    with torch.no_grad():
        flow.bijection.bias.copy_(torch.tensor([0.5, 0.3]))
    mean = flow.decode(torch.zeros(1, 2))[0].detach()
    log_density = MultivariateNormal(centre, torch.eye(2)).log_prob
    torch.manual_seed(0)
    value = reverse_kl(flow, log_density, 1000)
    (gradient,) = torch.autograd.grad(value, [flow.bijection.bias])
    torch.manual_seed(0)
    noise = (flow.sample(1000) - mean).mean(0)
    away = mean - centre
    torch.testing.assert_close(value, away.square().sum() / 2 + away @ noise)
    # The flow's mean is minus its bias.
    torch.testing.assert_close(gradient, -(away + noise))
    assert away.square().sum() / 2 == pytest.approx(2.57, abs=1e-9)


def test_fit_brings_a_flow_to_a_density_without_data() -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    flow = Flow(Dense(2), StandardNormal(2))
    target = MultivariateNormal(torch.tensor([2.0, 0.0]), torch.tensor([[1.0, 0.6], [0.6, 1.0]]))

    def loss(q: Flow) -> Tensor:
        return reverse_kl(q, lambda z: target.log_prob(z) + 7.0, 128)

    fit(flow, None, loss=loss, steps=400, lr=3e-2, progress=False)
    assert reverse_kl(flow, target.log_prob, 20_000).item() == pytest.approx(0, abs=0.02)


# Wrong use


def of(**changes: Any) -> VAE:
    model = a_vae()
    parts = {"encoder": model.encoder, "decoder": model.decoder}
    return VAE(**parts | {"posterior_flow": model.posterior_flow} | changes)


WITHOUT = Linear()
WITHOUT.context_shape = None
OF_IMAGES = Linear()
OF_IMAGES.context_shape = (2, 3, 3)
OPEN = Linear()
OPEN.context_shape = (None,)
SEES_IMAGES = Dense(3)
SEES_IMAGES.context_shape = (2, 4, 4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of(decoder=nn.Linear(3, 4)), "VAE expects decoder to be a Model"),
        (lambda: of(encoder=3), "VAE expects encoder to be a Module, got 3"),
        (lambda: of(decoder=WITHOUT), "a decoder with a context, .* with a context of no shape"),
        (lambda: of(decoder=OF_IMAGES), r"a vector of latents, got .* of \(2, 3, 3\)"),
        (lambda: of(decoder=OPEN), r"a vector of latents, got .* of \(any,\)"),
        (
            lambda: of(posterior_flow=models.maf(3, 1, 64)),
            r"posterior_flow to be a bijection of .*\(of a Flow its \.bijection\).*object of Flow",
        ),
        (
            lambda: of(posterior_flow=Compose(UniformDequantization(4))),
            "VAE expects a bijection, got Compose: UniformDequantization is stochastic",
        ),
        (lambda: of(posterior_flow=Dense(4)), r"a posterior_flow over .* 3 latents, got .*\(4,\)"),
        (
            lambda: of(posterior_flow=ActNorm(4)),
            r"a posterior_flow over the decoder's 3 latents, got one over \(4, \.\.\.\)",
        ),
        (
            lambda: of(posterior_flow=SEES_IMAGES),
            r"a posterior_flow whose context is a vector, got \(2, 4, 4\)",
        ),
        (lambda: of(prior_flow=Dense(3)), r"prior_flow to be a model of the latents, .*of Dense"),
        (lambda: of(prior_flow=models.maf(4, 1, 64)), r"a prior_flow over .* 3 .* over \(4,\)"),
        (
            lambda: of(prior_flow=models.maf(3, 1, 64, context_dim=2)),
            r"VAE expects a prior_flow without a context, got one with a context of \(2,\)",
        ),
        (lambda: of(warm_up=-1), "VAE expects warm_up to be a whole number of at least 0, got -1"),
        (lambda: of(free_bits=-1.0), "VAE expects free_bits to be a number of at least 0, got -1"),
        (lambda: vae((1, 5, 4), 3), "vae .*a patch that divides both sides of 5 x 4, got 4"),
        (lambda: vae((1, 4, 4), 1, steps=1), "vae expects arguments that fit together"),
        (lambda: vae((1, 4, 4), 3, flow="maf"), "vae expects flow to be 'planar', 'radial'"),
        (lambda: posterior_flow("sylvester", 3, 1, rank=4), "posterior_flow expects .*rank"),
        (
            lambda: ConvDecoder((3, 4, 4), 3, head=Softmax(4, 2)),
            r"ConvDecoder expects a head of 3 channels, as shape has, got Softmax\(",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words) as error:
        make()
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: m([1.0]), r"VAE expects a tensor, got \[1\.0\]; torch\.as_tensor makes one"),
        (lambda m, x: m(x[0]), r"VAE expects shape \(batch, 1, 4, 4\), got \(1, 4, 4\)"),
        (lambda m, x: m(x[:, :, :3]), r"VAE expects shape \(batch, 1, 4, 4\), got \(5, 1, 3, 4\)"),
        (lambda m, x: m.bound(torch.zeros(())), r"VAE expects shape .*, got \(\)"),
        (lambda m, x: m(x.bool()), r"VAE expects numbers, whole or real, got torch\.bool"),
        (lambda m, x: m(x.to(torch.cfloat)), r"VAE expects numbers, .*, got torch\.complex64"),
        (lambda m, x: m(x.to("meta")), "VAE expects its input on its own device cpu, got meta"),
        (lambda m, x: m(x, torch.zeros(5, 2)), r"VAE expects no context, .* shape \(5, 2\)"),
        (lambda m, x: m.log_prob(x, torch.zeros(5, 2)), "VAE expects no context"),
        (lambda m, x: m.sample(3, torch.zeros(3, 2)), "VAE expects no context"),
        (lambda m, x: m.sample(-1), r"VAE\.sample expects a number of draws of at least 0"),
        (lambda m, x: m.log_weights(x, 0), r"VAE\.log_weights expects draws to .* least 1, got 0"),
        (lambda m, x: m.posterior(x, 2.5), r"VAE\.posterior expects draws to .*, got 2\.5"),
        (lambda m, x: m.bound(x, True), r"VAE\.bound expects draws to .*, got True"),
        (lambda m, x: m.check_data(x + 1), "x must hold whole numbers in 0..1"),
        (lambda m, x: m.encoder(x[:, :, :3]), r"ConvEncoder expects shape \(batch, 1, 4, 4\)"),
        (lambda m, x: m.decoder.log_prob(x), r"ConvDecoder expects a context of .*, got none"),
        (lambda m, x: m.decoder.log_prob(3, x), "ConvDecoder expects a tensor, got 3"),
        (lambda m, x: m.decoder.sample(2), "ConvDecoder expects a context"),
    ],
)
@pytest.mark.parametrize("warm_up", [0, 2])
def test_wrong_input_is_one_sentence(
    call: Callable[[VAE, Tensor], object], words: str, warm_up: int
) -> None:
    with pytest.raises(ValueError, match=words) as error:
        call(a_vae(warm_up=warm_up), images())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("encoder", "got"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 7)), r"got \(5, 7\)"),
        (nn.Linear(4, 9), r"got \(5, 1, 4, 9\)"),
        (nn.LSTM(4, 4), "VAE expects an encoder"),
    ],
)
def test_an_encoder_of_another_size_is_told(encoder: nn.Module, got: str) -> None:
    model = of(encoder=encoder).double()
    if isinstance(encoder, nn.LSTM):
        model.encoder.forward = lambda x: (x, x)  # what a recurrent network returns
    with pytest.raises(ShapeError, match=r"VAE expects an encoder that returns \(batch, 9\)") as e:
        model(images())
    assert str(e.value).endswith(".")
    assert got.split(" expects")[0].replace("\\", "") in str(e.value)


def test_integers_and_other_floats_reach_an_encoder_in_its_dtype() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 9))
    model, x = of(encoder=net).double(), images()
    expected = with_seed(lambda: model(x))
    for dtype in (torch.int64, torch.float32, torch.float64):
        torch.testing.assert_close(with_seed(lambda d=dtype: model(x.to(d))), expected)


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda z: z.sum(1, keepdim=True), r"a tensor of shape \(6, 1\)"),
        (lambda z: z.sum(), r"a tensor of shape \(\)"),
        (lambda z: 3.0, r"got 3\.0"),
    ],
)
def test_reverse_kl_asks_for_a_number_a_row(result: Callable[[Tensor], Any], got: str) -> None:
    flow = Flow(Dense(2), StandardNormal(2)).double()
    with pytest.raises(ShapeError, match=rf"^reverse_kl expects log_density .*\(6,\), .*{got}\.$"):
        reverse_kl(flow, result, 6)


def test_log_weights_are_asked_for_in_batches() -> None:
    model, x = a_vae(), images()
    torch.manual_seed(0)
    found = log_probs(model, x, batch_size=2, samples=4)
    torch.manual_seed(0)
    with torch.no_grad():
        parts = [model.log_weights(part, 4) for part in x.split(2)]
    torch.testing.assert_close(found, torch.cat(parts, 1).logsumexp(0) - math.log(4))
