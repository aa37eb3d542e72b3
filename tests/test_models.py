"""The papers' models: built in three lines, bijections, densities, trained and sampled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from nflib.checks import (
    check_bijection,
    check_compile,
    check_normalized,
    jacobian,
    randomize_parameters,
)
from nflib.core import Compose, Flow, ShapeError
from nflib.coupling import CheckerboardMask
from nflib.data import load
from nflib.dequantization import Logit, UniformDequantization, VariationalDequantization
from nflib.elementwise import Affine, RationalQuadraticSpline
from nflib.metrics import evaluate
from nflib.models import flowpp, glow, iaf, maf, naf, nice, realnvp, spline_flow
from nflib.nets import GatedConvNet
from nflib.normalization import ActNorm, BatchNorm
from nflib.train import fit

Build = Callable[..., Flow]

VECTOR: dict[str, Build] = {
    "nice": lambda d, **o: nice(d, 4, (16,), **o),
    "realnvp": lambda d, **o: realnvp(d, 4, (16,), **o),
    "spline_flow": lambda d, **o: spline_flow(d, 2, 4, (16,), **o),
    "naf": lambda d, **o: naf(d, 2, 3, (16,), **o),
    "maf": lambda d, **o: maf(d, 2, (64,), **o),
    "iaf": lambda d, **o: iaf(d, 2, (64,), **o),
}
IMAGE: dict[str, Build] = {
    "realnvp on images": lambda s, **o: realnvp(s, 2, (8,), **o),
    "realnvp with batchnorm": lambda s, **o: realnvp(s, 2, (8,), normalization="batchnorm", **o),
    "glow": lambda s, **o: glow(s, 2, 1, 8, **o),
    "flowpp": lambda s, **o: flowpp(
        s, 8, 1, components=3, couplings=(2, 1, 1), attention=2, dequantization="uniform", **o
    ),
    "flowpp, variational": lambda s, **o: flowpp(
        s, 8, 1, components=3, couplings=(2, 1, 1), attention=2, **o
    ),
}
MODELS = {**VECTOR, **IMAGE}
every = pytest.mark.parametrize("name", MODELS)


def shape_of(name: str) -> Any:
    """An odd number of dimensions; images that are not square."""
    return 5 if name in VECTOR else (1, 4, 8)


def build(name: str, **options: Any) -> Flow:
    return MODELS[name](shape_of(name), **options)


def draw(name: str, rows: int = 3) -> Tensor:
    return torch.randn(rows, 5) if name in VECTOR else torch.randn(rows, 1, 4, 8)


@every
@pytest.mark.parametrize("context_dim", [None, 2])
def test_every_model_is_a_bijection(name: str, context_dim: int | None) -> None:
    flow = build(name, context_dim=context_dim)
    assert flow.likelihood == "exact"
    context = None if context_dim is None else torch.randn(3, context_dim)
    check_bijection(flow.bijection, draw(name), context)


@pytest.mark.parametrize("name", ["nice", "realnvp on images"])
def test_behind_dequantization_stands_a_bijection_too(name: str) -> None:
    flow = build(name, grey_levels=17)
    assert isinstance(flow.bijection, Compose)
    assert isinstance(flow.bijection[0], UniformDequantization)
    assert isinstance(flow.bijection[1], Logit)
    check_bijection(flow.bijection[1:], torch.rand(draw(name).shape))


@every
def test_context_reaches_every_model_and_is_asked_for(name: str) -> None:
    flow, x, context = build(name, context_dim=2), draw(name), torch.randn(3, 2)
    randomize_parameters(flow, scale=0.2)
    assert (flow.log_prob(x, context) != flow.log_prob(x, context + 1)).all()
    assert flow.sample(4, context[:1]).shape == (4, *x.shape[1:])
    for wrong in (None, context[:, :1]):
        with pytest.raises(ShapeError, match=r"expects a context of shape .*, got .*\.$"):
            flow.log_prob(x, wrong)


@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.parametrize("context_dim", [None, 2])
def test_models_in_two_dimensions_integrate_to_one(name: str, context_dim: int | None) -> None:
    flow = VECTOR[name](2, context_dim=context_dim)
    randomize_parameters(flow, scale=0.2)
    context = None if context_dim is None else torch.randn(1, 2)
    # The logistic base of NICE has long tails, and a new monotone network widens the density.
    check_normalized(flow, context, limits=(-30, 30))


@every
@pytest.mark.parametrize("levels", [None, 17])
def test_batches_of_one_and_none_work(name: str, levels: int | None) -> None:
    flow = build(name, grey_levels=levels)
    x = draw(name) if levels is None else torch.randint(0, levels, draw(name).shape)
    flow.initialize(x)
    for one in (flow.train(), flow.eval()):
        for rows in (1, 0):
            log_prob = one.log_prob(x[:rows])
            assert log_prob.shape == (rows,)
            assert torch.isfinite(log_prob).all()
            assert one.sample(rows).shape == (rows, *x.shape[1:])
    if levels is None:
        torch.testing.assert_close(flow.log_prob(x)[:1], flow.log_prob(x[:1]))


def test_images_of_odd_sizes_work_in_one_scale() -> None:
    flow = realnvp((2, 3, 5), 2, (8,), levels=1)
    randomize_parameters(flow, scale=0.2)
    x = torch.randn(3, 2, 3, 5)
    assert flow.encode(x).shape == (3, 30)
    torch.testing.assert_close(flow.decode(flow.encode(x)), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        # One dimension has no other half; an autoregressive layer takes it.
        *(
            lambda build=build: build(1)
            for name, build in VECTOR.items()
            if name not in ("maf", "iaf")
        ),
        *(lambda build=build: build(0) for build in VECTOR.values()),
        *(lambda build=build: build((1, 3, 4)) for build in IMAGE.values()),
        *(lambda build=build: build((1, 4, 5)) for build in IMAGE.values()),
        lambda: glow((1, 6, 6), levels=2),
        lambda: glow((1, 4, 4), levels=0),
        lambda: glow(16),  # type: ignore[arg-type]
        lambda: realnvp((4, 4)),
        lambda: realnvp((1, 4, 4), levels=4),
        lambda: flowpp((1, 0, 4)),
        lambda: flowpp((1, 2, 2)),
        lambda: realnvp(4, normalization="layer"),
        lambda: flowpp((1, 4, 4), dequantization="none"),
        lambda: flowpp((1, 4, 4), hidden=6, attention=4),
        lambda: nice(4, grey_levels=1),
    ],
)
def test_sizes_and_options_that_do_not_fit_are_one_sentence(make: Callable[[], Flow]) -> None:
    with pytest.raises(ValueError, match=r"^\w+ (with \d levels )?expects .*, got .*\.$"):
        make()


@every
def test_a_wrong_event_is_one_sentence(name: str) -> None:
    flow = build(name)
    x = draw(name)
    for wrong in (torch.cat([x, x], 1), x[..., :-1], x[0]):
        with pytest.raises(ValueError, match=r"^[\w.]+ expects .*, got .*\.$"):
            flow.log_prob(wrong)


@every
def test_no_dimension_is_left_alone(name: str) -> None:
    flow, x = build(name).double().eval(), draw(name, 2).double()
    randomize_parameters(flow)
    links = jacobian(flow.encode, x).abs().amax(0) > 0
    # With one mask in all couplings, what it keeps would depend on itself only.
    assert (links.sum(1) > 1).all()


def test_the_models_are_made_of_the_parts_that_they_say() -> None:
    def parts(flow: Flow) -> list[str]:
        return [type(m).__name__ for m in flow.bijection.modules()]

    assert "Diagonal" in parts(nice(4))
    assert parts(realnvp(4)).count("Permutation") == 3
    assert parts(realnvp(4)).count("Coupling") == 8
    assert parts(realnvp((1, 4, 4), 4, levels=2)).count("Coupling") == 8
    assert any(isinstance(m, BatchNorm) for m in realnvp(4, normalization="batchnorm").modules())
    assert not any(isinstance(m, BatchNorm) for m in realnvp(4).modules())
    # A step in each of 3 levels, and 2 priors.
    assert parts(glow((1, 8, 8), 3, 1, 8)).count("Coupling") == 5
    assert parts(spline_flow(4, 3)).count("LU") == 3
    options = {"grey_levels": 4, "hidden": 8, "blocks": 1}
    variational = flowpp((1, 4, 4), attention=2, **options)
    assert "VariationalDequantization" in parts(variational)
    assert variational.likelihood == "lower bound"
    uniform = flowpp((1, 4, 4), attention=0, dequantization="uniform", **options)
    assert "VariationalDequantization" not in parts(uniform)
    assert "GatedAttention" in parts(variational)
    assert "GatedAttention" not in parts(uniform)
    assert isinstance(variational.bijection[0], VariationalDequantization)
    assert not any("Attention" in type(m).__name__ for m in variational.bijection[0].modules())
    assert any(isinstance(m, GatedConvNet) for m in variational.bijection[0].modules())
    boards = [m for m in variational.bijection[0].modules() if isinstance(m, CheckerboardMask)]
    assert [board.flip for board in boards] == [False, True]
    for make in (glow, flowpp):
        plain, other = make((1, 4, 4)), make((1, 4, 4), elementwise=RationalQuadraticSpline(4))
        assert other.bijection is not plain.bijection
        taus = {type(m.elementwise) for m in other.modules() if hasattr(m, "elementwise")}
        assert RationalQuadraticSpline in taus
        assert taus <= {RationalQuadraticSpline, Affine}


# Training. Digits are 8 x 8 with 17 grey levels; vector models see 64 numbers.


@cache
def digits() -> Tensor:
    return load("digits").x[:512]


def data_for(name: str) -> Tensor:
    return digits().flatten(1) if name in VECTOR else digits()


@cache
def trained(name: str) -> tuple[Flow, float, float]:
    """A model after 30 steps, and the nats of 128 rows before and after them."""
    torch.manual_seed(0)
    x = data_for(name)
    flow = MODELS[name](x[0].numel() if name in VECTOR else (1, 8, 8), grey_levels=17)
    flow.initialize(x[:128])
    before = evaluate(flow, x[:128]).nats
    fit(flow, x, steps=30, batch_size=64, lr=3e-3, progress=False)
    return flow.eval(), before, evaluate(flow, x[:128]).nats


def continuous(flow: Flow) -> Flow:
    """What follows the dequantization and the logit, whose noise would differ at each call."""
    assert isinstance(flow.bijection, Compose)
    return Flow(flow.bijection[2:], flow.base)


def test_three_lines_train_a_model_and_draw_from_it() -> None:
    flow = glow((1, 8, 8), levels=2, steps=1, hidden=8, grey_levels=17)
    fit(flow, digits(), steps=2, progress=False)
    images = flow.sample(4)
    assert images.shape == (4, 1, 8, 8)
    assert ((images >= 0) & (images <= 16) & (images == images.round())).all()


@every
def test_every_model_learns_from_digits(name: str) -> None:
    flow, before, after = trained(name)
    assert after > before + 2
    assert flow.likelihood == "lower bound"


@pytest.mark.parametrize("name", [n for n in MODELS if n != "flowpp"])  # its sibling takes as long
def test_ten_thousand_samples_of_a_trained_model_are_finite(name: str) -> None:
    with torch.no_grad():
        x, log_prob = continuous(trained(name)[0]).rsample_with_log_prob(10_000)
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(trained(name)[0].sample(100)).all()


@every
def test_samples_of_a_randomized_model_are_finite(name: str) -> None:
    flow = build(name).eval()
    randomize_parameters(flow, scale=0.2)
    with torch.no_grad():
        x, log_prob = flow.rsample_with_log_prob(2_000)
    assert torch.isfinite(x).all()
    assert torch.isfinite(log_prob).all()


@every
@pytest.mark.parametrize("state", ["randomized", "trained"])
def test_the_log_prob_of_own_samples_agrees_in_both_directions(name: str, state: str) -> None:
    if state == "trained":
        flow = continuous(trained(name)[0])
    else:
        flow = build(name).eval()
        randomize_parameters(flow, scale=0.2)
    with torch.no_grad():
        x, log_prob = flow.rsample_with_log_prob(500)
        gap = (flow.log_prob(x) - log_prob).abs().max().item()
    assert gap / x[0].numel() < 1e-3


@every
def test_no_parameter_of_a_model_is_idle(name: str) -> None:
    flow = build(name, grey_levels=17, dropout=0.1)
    randomize_parameters(flow, scale=0.2)
    flow.log_prob(torch.randint(0, 17, draw(name).shape)).sum().backward()
    for label, parameter in flow.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.any(), label
    assert any(isinstance(m, torch.nn.Dropout) for m in flow.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["realnvp on images", "glow"])
def test_whole_flows_compile(name: str) -> None:
    flow = build(name)
    randomize_parameters(flow, scale=0.2)
    check_compile(flow.bijection.double(), draw(name).double())


@torch.no_grad()
def test_log_prob_of_integers_compiles() -> None:
    flow, x = build("glow", grey_levels=17), torch.randint(0, 17, draw("glow").shape)
    randomize_parameters(flow, scale=0.2)
    torch.manual_seed(0)
    expected = flow(x)
    torch.manual_seed(0)
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected)


def test_actnorm_of_every_model_is_initialised_by_fit() -> None:
    for name in MODELS:
        norms = [m for m in trained(name)[0].modules() if isinstance(m, ActNorm)]
        assert all(norm.bias.any() for norm in norms)
        assert norms or "batchnorm" in name
