"""WaveNet: nothing sees the future, the cache changes nothing, probabilities are probabilities."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nflib import audio, checkpoints
from nflib.checks import (
    AutoregressiveError,
    LogDetError,
    check_autoregressive,
    check_bijection,
    check_gradients,
    check_log_det,
    check_normalized,
    jacobian,
    randomize_parameters,
)
from nflib.core import DataError, Flow, ShapeError, StandardLogistic
from nflib.discrete import Head, LogisticMixture, Softmax
from nflib.graphs import HostReads
from nflib.metrics import evaluate, log_probs
from nflib.train import fit
from nflib.train.distillation import distill
from nflib.wavenet import (
    PADDING,
    CachedSteps,
    CausalAffine,
    CausalStack,
    ParallelWaveNet,
    WaveNet,
    distillation_loss,
    mixture_log_density,
    pad,
    power_loss,
)
from nflib.wavenet.model import WaveNet as Model

HEADS = {"softmax": Softmax, "mixture": lambda levels: LogisticMixture(levels, components=3)}


def wavenet(
    levels: int = 8, head: str = "softmax", context: int | None = None, **options: object
) -> WaveNet:
    sizes = {"channels": 5, "skip": 7, "layers": 3, "blocks": 2} | options
    model = WaveNet(levels, context_dim=context, head=HEADS[head](levels), **sizes)
    randomize_parameters(model)
    return model.double().eval()


def student(context: int | None = None, **options: object) -> ParallelWaveNet:
    sizes = {"flows": 3, "channels": 4, "skip": 5, "layers": 2, "blocks": 2} | options
    model = ParallelWaveNet(context_dim=context, **sizes)
    randomize_parameters(model)
    return model.double().eval()


def recordings(n: int, length: int, levels: int = 8, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(levels, (n, length), generator=generator)


# The past and nothing but the past.


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("context", [None, 2])
def test_no_output_of_the_stack_sees_its_own_or_a_later_input(kernel: int, context: int) -> None:
    stack = CausalStack(1, 3, 4, 5, 3, 2, kernel, context).double()
    randomize_parameters(stack)
    c = None if context is None else torch.randn(2, context, dtype=torch.float64)

    def outputs(x: Tensor) -> Tensor:
        return stack(x.unsqueeze(1), c).transpose(1, 2)

    report = check_autoregressive(outputs, torch.randn(2, 12, dtype=torch.float64))
    assert "links in use" in str(report)


class Shifted(CausalStack):
    """The fault: the first layer is not delayed."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1))[..., 1:], context)


def test_a_stack_off_by_one_is_caught() -> None:
    stack = Shifted(1, 1, 4, 5, 2).double()
    randomize_parameters(stack)
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.raises(AutoregressiveError, match=r"Output (\d) depends on input \1,"):
        check_autoregressive(lambda a: stack(a.unsqueeze(1))[:, 0], x)
    layer = CausalAffine(4, 5, 2)
    layer.stack = Shifted(1, 2, 4, 5, 2)
    with pytest.raises(LogDetError):
        check_log_det(layer.double(), x)


@pytest.mark.parametrize("context", [None, 2])
def test_every_layer_of_the_student_is_causal_and_so_is_their_composition(context: int) -> None:
    model = student(context)
    c = None if context is None else torch.randn(2, context, dtype=torch.float64)
    z = torch.randn(2, 9, dtype=torch.float64)
    for part in (*model.bijection, model.bijection):
        for function in (part.inverse, part):
            check_autoregressive(lambda a, f=function: f(a, c)[0], z, strict=False)
    for number in (1, 2):
        check_autoregressive(lambda a, i=number: model.conditionals(a, c)[i], z)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("one_hot", [False, True])
def test_a_samples_probability_ignores_what_comes_later(head: str, one_hot: bool) -> None:
    model = wavenet(head=head, one_hot=one_hot)
    x = recordings(3, 20)
    before = model.log_prob_each(x)
    for t in (0, 7, 19):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 3) % 8
        after = model.log_prob_each(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert (before[:, t] != after[:, t]).all()
        if t < 19:
            assert (before[:, t + 1] != after[:, t + 1]).all()


@pytest.mark.parametrize(
    ("layers", "blocks", "kernel", "field"),
    [(1, 1, 2, 2), (3, 1, 2, 8), (3, 2, 2, 15), (2, 2, 3, 13)],
)
def test_the_receptive_field_is_what_back_propagation_finds(
    layers: int, blocks: int, kernel: int, field: int
) -> None:
    model = wavenet(layers=layers, blocks=blocks, kernel=kernel)
    assert model.receptive_field == field
    length = field + 5
    matrix = jacobian(
        lambda x: model.stack(x.unsqueeze(1)).sum(1), torch.randn(1, length, dtype=torch.float64)
    )
    seen = matrix[0, -1].nonzero()[:, 0]
    assert torch.equal(seen, torch.arange(length - 1 - field, length - 1))


def test_ten_layers_of_kernel_two_see_1024_samples() -> None:
    assert WaveNet(4, 2, 2, layers=10).receptive_field == 1024


# Probabilities.


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("one_hot", [False, True])
def test_the_probabilities_of_the_last_sample_sum_to_one(head: str, one_hot: bool) -> None:
    model = wavenet(head=head, one_hot=one_hot)
    x = recordings(1, 10).expand(8, 10).clone()
    x[:, -1] = torch.arange(8)
    total = (model.log_prob(x) - model.log_prob(x[:1, :-1])).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("context", [None, 2])
def test_all_recordings_of_three_samples_have_probability_one(head: str, context: int) -> None:
    model = wavenet(4, head, context)
    x = torch.cartesian_prod(*[torch.arange(4)] * 3)
    c = None if context is None else torch.randn(1, context).double().expand(64, context)
    total = model.log_prob(x, c).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))


def test_log_prob_is_the_sum_of_the_heads_terms() -> None:
    model = wavenet()
    x = recordings(2, 6)
    logits = model.predict(x)
    assert logits.shape == (2, 8, 6)
    expected = sum(
        logits[:, :, t].log_softmax(1).gather(1, x[:, t : t + 1])[:, 0] for t in range(6)
    )
    torch.testing.assert_close(model(x), expected)
    assert model.likelihood == "exact"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_levels_of_any_dtype(dtype: torch.dtype) -> None:
    model, x = wavenet(), recordings(2, 6)
    torch.testing.assert_close(model(x.to(dtype)), model(x))


def test_log_prob_is_at_least_float32() -> None:
    model, x = wavenet(), recordings(2, 6)
    assert model(x).dtype == torch.float64
    assert model.float()(x).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.float32


def test_padding_counts_nothing() -> None:
    model = wavenet()
    x, lengths = recordings(3, 12), torch.tensor([12, 5, 1])
    padded = pad(x, lengths)
    assert padded.dtype == torch.int16
    model.check_data(padded)
    each = model.log_prob_each(padded)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(model(padded)[row], model(x[row : row + 1, :length])[0])
        assert not each[row, length:].any()
    loss = -model(padded).mean()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, model.parameters()))
    with pytest.raises(ShapeError, match=r"^pad expects a length of at most 12 .*, got .*\.$"):
        pad(x, torch.tensor([12, 13, 1]))


def test_a_context_changes_every_sample_and_is_asked_for() -> None:
    model = wavenet(context=3)
    x, c = recordings(2, 6), torch.randn(2, 3, dtype=torch.float64)
    assert (model.log_prob_each(x, c) != model.log_prob_each(x, c + 1)).all()
    for call in (model, model.log_prob_each, model.predict):
        for wrong in (None, c[:, :2], torch.cat([c, c]), c.float(), c.long()):
            message = r"^WaveNet expects a context of .*, got .*\.$"
            with pytest.raises(ShapeError, match=message):
                call(x, wrong)
        assert torch.equal(call(x, c[0]), call(x, c[:1].expand(2, 3)))
        assert torch.equal(call(x, c[:1]), call(x, c[:1].expand(2, 3)))
    free = wavenet()
    for call in (free, lambda x, c: free.sample(2, 6, c)):
        with pytest.raises(ShapeError, match=r"^WaveNet expects no context, .*, got .*\.$"):
            call(x, c)
    u = torch.rand(2, 1, 30, dtype=torch.float64)
    assert not torch.equal(*(model.sample(2, 30, row, u=u) for row in c))


def test_bits_a_sample_count_the_samples_that_are_there() -> None:
    """A model of 256 equally probable levels has 8 bits a sample, however much is padding."""
    model = WaveNet(256, 4, 4, layers=2)
    nn.init.zeros_(model.stack.last[-1].weight)
    nn.init.zeros_(model.stack.last[-1].bias)
    x = pad(recordings(3, 40, 256), torch.tensor([40, 10, 1]))
    assert model.dims_of(x).tolist() == [40, 10, 1]
    bits = -model(x) / model.dims_of(x) / math.log(2)
    torch.testing.assert_close(bits, torch.full((3,), 8.0))
    assert evaluate(model, x).bits_per_dim() == pytest.approx(8, abs=1e-5)


def test_the_loudest_level_of_unsigned_bytes_is_no_padding() -> None:
    """-1 as a byte is 255, which is a level."""
    model = wavenet(256)
    x = torch.tensor([[255, 255, 3, 255, 255]]).expand(2, 5)
    torch.testing.assert_close(model(x.to(torch.uint8)), model(x))
    assert model.dims_of(x.to(torch.uint8)).tolist() == [5, 5]
    model.check_data(x.to(torch.uint8))
    padded = pad(x.to(torch.uint8), torch.tensor([5, 3]))
    assert padded.tolist() == [[255, 255, 3, 255, 255], [255, 255, 3, -1, -1]]


def test_padding_keeps_16_bits() -> None:
    x = torch.tensor([[65535, 32768, 0]])
    assert pad(x, torch.tensor([2])).tolist() == [[65535, 32768, -1]]


# Sampling.


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_sampling_is_naive_sampling(
    head: str, kernel: int, context: int | None, dtype: torch.dtype
) -> None:
    model = wavenet(head=head, context=context, kernel=kernel, one_hot=kernel == 3).to(dtype)
    c = None if context is None else torch.randn(3, context, dtype=dtype)
    # Longer than the receptive field, so that every ring has gone round.
    length = 2 * model.receptive_field + 7
    u = torch.rand(3, model.head.uniforms, length, dtype=dtype)
    cached = model.sample(3, length, c, u=u)
    assert torch.equal(cached, model.sample(3, length, c, u=u, cached=False))
    assert cached.dtype == torch.int64
    assert cached.unique().numel() > 3
    model.check_data(cached)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("one_hot", [True, False])
def test_a_sampler_draws_from_what_the_whole_pass_predicts(
    cached: bool, one_hot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, c = wavenet(context=2, one_hot=one_hot), torch.randn(2, 2, dtype=torch.float64)
    seen, draw = [], model.head.sample

    def watched(parameters: Tensor, u: Tensor) -> Tensor:
        seen.append(parameters.clone())
        return draw(parameters, u)

    monkeypatch.setattr(model.head, "sample", watched)
    x = model.sample(2, 40, c, cached=cached)
    torch.testing.assert_close(torch.stack(seen, 2), model.predict(x, c))


def test_the_network_sees_levels_on_minus_one_to_one_or_one_hot() -> None:
    x = torch.tensor([[0, 7]])
    assert wavenet().encode(x).tolist() == [[[-1.0, 1.0]]]
    hot = wavenet(one_hot=True).encode(x)
    assert hot.shape == (1, 8, 2)
    assert torch.equal(hot.argmax(1), x)
    assert torch.equal(hot.sum(1), torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("context", [None, 2])
def test_kept_activations_give_what_the_whole_pass_gives(context: int | None) -> None:
    stack = CausalStack(2, 3, 4, 5, 3, 2, 3, context).double()
    randomize_parameters(stack)
    c = None if context is None else torch.randn(4, context, dtype=torch.float64)
    x = torch.randn(4, 2, 60, dtype=torch.float64)
    steps = CachedSteps(stack, 4, c)
    before = torch.cat([torch.zeros(4, 2, 1, dtype=torch.float64), x[:, :, :-1]], 2)
    # Outside of the first sample, where there is no input, zero is what the delay shifts in.
    found = torch.stack([steps.step(column.T).T.clone() for column in before.unbind(2)], 2)
    torch.testing.assert_close(found, stack(x, c))


def test_samples_follow_the_models_probabilities() -> None:
    """Of 40,000 recordings of three samples, each comes as often as its probability says."""
    model = wavenet(3)
    n = 40_000
    made = model.sample(n, 3)
    counts = torch.bincount(made @ torch.tensor([9, 3, 1]), minlength=27).double()
    expected = n * model.log_prob(torch.cartesian_prod(*[torch.arange(3)] * 3)).exp()
    # 26 degrees of freedom: above 54 once in a thousand.
    assert ((counts - expected).square() / expected).sum() < 54


@pytest.mark.parametrize("cached", [True, False])
def test_a_start_is_kept_and_continued(cached: bool) -> None:
    model = wavenet()
    whole = model.sample(2, 30, u=(u := torch.rand(2, 1, 30).double()), cached=cached)
    again = model.sample(2, 30, start=whole[:, :11], u=u, cached=cached)
    assert torch.equal(whole, again)
    shared = model.sample(2, 30, start=whole[:1, :11], u=u, cached=cached)
    assert torch.equal(shared[:, :11], whole[:1, :11].expand(2, 11))


def test_one_seed_makes_the_same_recordings_and_nothing_is_kept_between_calls() -> None:
    model = wavenet()
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(model.sample(2, 40))
    assert torch.equal(*made)
    before = copy.deepcopy(model.state_dict())
    model.sample(1, 5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    randomize_parameters(model, seed=3)
    torch.manual_seed(5)
    assert not torch.equal(model.sample(2, 40), made[0])


def test_no_recordings_and_one_context_for_all() -> None:
    model = wavenet(context=2)
    c = torch.randn(1, 2, dtype=torch.float64)
    assert model.sample(0, 4, c).shape == (0, 4)
    assert model.sample(3, 4, c).shape == (3, 4)


def test_a_model_that_has_come_to_no_numbers_is_sampled_all_the_same() -> None:
    """What its head draws leads to no place outside of a table, where a GPU would stop for good."""
    for head in HEADS:
        model = wavenet(head=head)
        nn.init.constant_(model.stack.last[-1].bias, math.nan)
        assert model.sample(2, 6).shape == (2, 6)


# Steps that a GPU replays.


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("given", [0, 11])
def test_a_recording_samples_what_the_steps_themselves_sample(
    head: str,
    kernel: int,
    context: int | None,
    given: int,
    recorded: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = wavenet(head=head, context=context, kernel=kernel, one_hot=kernel == 3)
    c = None if context is None else torch.randn(3, context, dtype=torch.float64)
    # Every ring goes round within the replays.
    length = 2 * model.receptive_field + 7
    options = {
        "u": torch.rand(3, model.head.uniforms, length, dtype=torch.float64),
        "start": recordings(3, given),
        "temperature": 1.5,
    }
    replayed = model.sample(3, length, c, **options)
    assert len(recorded) == (2 if given else 1)  # one to read the start, one to draw
    monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)
    assert torch.equal(replayed, model.sample(3, length, c, **options))
    assert len(recorded) == (2 if given else 1)
    assert torch.equal(replayed, model.sample(3, length, c, **options, cached=False))


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("context", [None, 2])
def test_a_recording_steps_back_as_the_student_does(
    kernel: int,
    context: int | None,
    recorded: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = student(context, kernel=kernel)
    c = None if context is None else torch.randn(2, context, dtype=torch.float64)
    z = torch.randn(2, 60, dtype=torch.float64)
    with torch.no_grad():
        x, log_det = model.bijection.inverse(z, c)
        back, back_log_det = model.bijection(x, c)
        assert len(recorded) == 3  # one for each layer
        monkeypatch.setattr("nflib.graphs.recorder_for", lambda device: None)
        again, again_log_det = model.bijection(x, c)
    assert torch.equal(back, again)
    assert torch.equal(back_log_det, again_log_det)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(back_log_det, -log_det)
    assert torch.is_grad_enabled()
    model.bijection(x[:, :5], c)
    assert len(recorded) == 3  # gradients need whole passes


class Watched:
    """In place of `nflib.graphs.Replayed`: the function itself, and what it reads back."""

    found: list[str]
    calls: int

    def __init__(self, function: object, device: torch.device) -> None:
        self.function = function

    def __call__(self) -> None:
        with HostReads() as reads:
            self.function()
        Watched.found += reads.found
        Watched.calls += 1


@pytest.mark.parametrize("kind", [*HEADS, "one-hot", "student"])
def test_no_step_of_a_sampler_reads_a_value_back(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Watched, "found", [], raising=False)
    monkeypatch.setattr(Watched, "calls", 0, raising=False)
    for module in ("model", "parallel"):
        monkeypatch.setattr(f"nflib.wavenet.{module}.Replayed", Watched)
    if kind == "student":
        with torch.no_grad():
            student(2).log_prob(torch.randn(3, 9).double(), torch.randn(3, 2).double())
        assert Watched.calls == 3 * 9
    else:
        head = "softmax" if kind == "one-hot" else kind
        model = wavenet(head=head, context=2, one_hot=kind == "one-hot")
        c = torch.randn(3, 2).double()
        model.sample(3, 9, c, start=recordings(3, 4), temperature=0.5)
        assert Watched.calls == 9
    assert Watched.found == []


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and notes those that return new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.allocating: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if not func.is_view:
            self.count += 1
            if not func._schema.is_mutable:
                self.allocating.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_step_allocates_nothing_and_knows_its_position(kernel: int) -> None:
    steps = CachedSteps(CausalStack(2, 3, 4, 5, 3, 2, kernel), 4)
    for t in range(3):
        x = torch.zeros(2, 4)
        with Operations() as noted:
            outputs = steps.step(x)
        assert noted.allocating == []
        assert outputs.data_ptr() == steps.outputs.data_ptr()
        assert steps.t.tolist() == [t]


def test_a_step_asks_a_layer_for_four_operations() -> None:
    """On a GPU a step takes as long as there are operations in it."""

    def operations(layers: int) -> int:
        steps = CachedSteps(CausalStack(1, 3, 4, 5, layers), 2)
        x = torch.zeros(1, 2)
        with Operations() as noted:
            steps.step(x)
        return noted.count

    assert operations(3) - operations(2) == 4


# The package's contract.


@pytest.mark.parametrize("head", HEADS)
def test_a_gradient_reaches_every_parameter(head: str) -> None:
    model = wavenet(head=head, context=2)
    check_gradients(model, recordings(4, 40), torch.randn(4, 2, dtype=torch.float64))


@pytest.mark.parametrize("head", HEADS)
def test_log_prob_compiles_whole(head: str) -> None:
    model = wavenet(head=head, context=2, layers=2, blocks=1)
    x = pad(recordings(2, 20), torch.tensor([20, 9]))
    c = torch.randn(2, 2, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, c), model(x, c))


ONE_SENTENCE = r"^[\w.]+ expects .*, got .*\.$"


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(()),
        torch.zeros(3),
        torch.zeros(2, 1, 4),
        torch.zeros(2, 0),
        torch.zeros(2, 3).bool(),
        torch.zeros(2, 3).numpy(),
        torch.zeros(2, 3, device="meta"),
    ],
)
def test_what_is_no_batch_of_recordings_is_one_sentence(x: object) -> None:
    for model in (wavenet(), student()):
        for call in (model, model.predict if isinstance(model, WaveNet) else model.conditionals):
            with pytest.raises(ShapeError, match=rf"^{type(model).__name__} expects .*, got .*\.$"):
                call(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0, 8]]), r"in 0\.\.7, got values from 0 to 8\."),
        (torch.tensor([[-2, 0]]), "got values from -2 to 0"),
        (torch.tensor([[0.0, 0.5]]), "got values from 0 to 0.5 with fractions"),
        (torch.tensor([[0, -1, 3]]), "padding .* behind the end only, got some before"),
    ],
)
def test_what_are_no_levels_is_one_sentence(x: Tensor, message: str) -> None:
    model = wavenet().float()
    for judge in (
        lambda: model.check_data(x),
        lambda: fit(model, x, steps=1, progress=False),
        lambda: evaluate(model, x),
    ):
        with pytest.raises(DataError, match=f"^The data of WaveNet must .*{message}"):
            judge()


def test_wrong_requests_are_one_sentence() -> None:
    model, flow, start = wavenet(), student(), recordings(2, 5)
    for wrong, who in (
        (lambda: model.sample(2, 0), "WaveNet.sample"),
        (lambda: model.sample(-1, 5), "WaveNet.sample"),
        (lambda: model.sample(2.0, 5), "WaveNet.sample"),
        (lambda: model.sample((2, -1), 5), "WaveNet.sample"),
        (lambda: model.sample(2, 5, temperature=0), "WaveNet.sample"),
        (lambda: model.sample(2, 5, u=torch.rand(2, 5)), "WaveNet.sample"),
        (lambda: model.sample(2, 4, start=start), "WaveNet.sample"),
        (lambda: model.sample(3, 6, start=start), "WaveNet.sample"),
        (lambda: model.sample(2, 6, start=start[None]), "WaveNet.sample"),
        (lambda: flow.sample(-1, 5), "ParallelWaveNet.sample"),
        (lambda: flow.sample(2, 0), "ParallelWaveNet.sample"),
        (lambda: flow.rsample(2, "5"), "ParallelWaveNet.rsample"),
        (lambda: flow.sample(2, 5, temperature=-1), "ParallelWaveNet.sample"),
        (lambda: flow.flow(0), "ParallelWaveNet.flow"),
        (lambda: WaveNet(1), "WaveNet"),
        (lambda: WaveNet(8, head=Softmax(9)), "WaveNet"),
        (lambda: WaveNet(8, head=Softmax), "WaveNet"),
        (lambda: WaveNet(8, head=LogisticMixture(8, channels=3)), "WaveNet"),
        (lambda: WaveNet(8, kernel=1), "WaveNet"),
        (lambda: WaveNet(8, layers=0), "WaveNet"),
        (lambda: WaveNet(8, channels=(4, 4)), "WaveNet"),
        (lambda: WaveNet(8, context_dim=0), "WaveNet"),
        (lambda: CausalStack(0, 1), "CausalStack"),
        (lambda: CausalStack(2, 1, context_dim=(1, 8, 8)), "CausalStack"),
        (lambda: CausalStack(2, 1)(torch.zeros(1, 1, 4)), "CausalStack"),
        (lambda: CausalStack(2, 1, context_dim=2)(torch.zeros(1, 2, 4)), "CausalStack"),
        (lambda: CachedSteps(CausalStack(2, 1, context_dim=2), 1), "(CausalStack|CachedSteps)"),
        (lambda: CachedSteps(CausalStack, 1), "CachedSteps"),
        (lambda: CausalAffine(scale=1000.0), "CausalAffine"),
        (lambda: CausalAffine(bound=0), "CausalAffine"),
        (lambda: CausalAffine(layers=2)(torch.zeros(2, 0)), "CausalAffine"),
        (lambda: ParallelWaveNet(flows=0), "ParallelWaveNet"),
        (lambda: ParallelWaveNet(scale=-1.0), "ParallelWaveNet"),
        (lambda: ParallelWaveNet(scale=1e12), "ParallelWaveNet with 3 flows"),
        (lambda: pad(start, [5, 5]), "pad"),
        (lambda: pad(start, torch.tensor([5, -1])), "pad"),
        (lambda: distillation_loss(flow, model, start.double()), "distillation_loss"),
        (lambda: distill(flow, model, torch.zeros(2, 4), steps=1), "distill"),
        (lambda: distill(flow, wavenet(head="mixture", one_hot=True), start, steps=1), "distill"),
    ):
        with pytest.raises(ValueError, match=rf"^{who} expects .*, got .*\.$"):
            wrong()
    with pytest.raises(DataError, match=r"^The start of WaveNet\.sample must hold whole numbers"):
        model.sample(2, 6, start=start - 1 - start.min())


def test_sizes_from_numpy_serve() -> None:
    two = np.int64(2)
    model = WaveNet(np.int64(4), two, two, two, two, two, np.int64(3))
    assert model.event_shape == (None,)
    assert model.sample(two, two, torch.zeros(3)).shape == (2, 2)
    assert ParallelWaveNet(two, two, two, two).sample(two, two).shape == (2, 2)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("cached", [True, False])
def test_draws_for_each_of_some_contexts(head: str, cached: bool) -> None:
    model = wavenet(head=head, context=2)
    c = torch.randn(3, 2, dtype=torch.float64)
    u = torch.rand(2, 3, model.head.uniforms, 20, dtype=torch.float64)
    start = recordings(3, 4)
    drawn = model.sample((2,), 20, c, u=u, start=start, cached=cached)
    assert drawn.shape == (2, 3, 20)
    for k in range(2):
        for m in range(3):
            one = model.sample(1, 20, c[m], u=u[k, m], start=start[m], cached=cached)
            assert torch.equal(drawn[k, m], one[0])
    # The student, too; its log-densities have the shape of the draws.
    c = torch.randn(4, 2, dtype=torch.float64)
    flow = student(context=2)
    x, log_prob = flow.rsample_with_log_prob((3,), 7, c)
    assert x.shape == (3, 4, 7)
    expected = torch.stack([flow.log_prob(row, c) for row in x])
    torch.testing.assert_close(log_prob, expected)


def test_samples_are_ordinary_tensors_without_a_graph() -> None:
    for x in (wavenet().sample(2, 8), student().sample(2, 8)):
        assert (x.requires_grad, x.is_inference()) == (False, False)
        x.numpy()
        x.add_(1)
    flow = student()
    made = flow.rsample(2, 8)
    assert all(g.any() for g in torch.autograd.grad(made.square().sum(), flow.parameters()))


def test_a_generator_and_a_temperature() -> None:
    models = (wavenet(), wavenet(head="mixture"), student())
    before = torch.get_rng_state()
    for model in models:
        seeded = [
            model.sample(3, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
        ]
        assert torch.equal(seeded[0], seeded[1])
        assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(torch.get_rng_state(), before)
    for model in models[:2]:
        for cached in (True, False):
            cold = model.sample(10, 20, temperature=1e-3, cached=cached)
            assert torch.equal(cold, cold[:1].expand(10, 20))
    flow = student(flows=1)
    hot, cold = (
        flow.sample(4, 9, temperature=t, generator=torch.Generator().manual_seed(0))
        for t in (1.0, 0.5)
    )
    z, cool = (flow.bijection(x)[0] for x in (hot, cold))
    torch.testing.assert_close(cool, 0.5 * z)


@pytest.mark.parametrize("kind", ["softmax", "mixture", "one-hot", "student"])
@pytest.mark.parametrize("context", [None, 2])
def test_a_model_can_be_copied_pickled_and_converted(kind: str, context: int | None) -> None:
    def make() -> WaveNet | ParallelWaveNet:
        if kind == "student":
            return student(context).float()
        head = "softmax" if kind == "one-hot" else kind
        return wavenet(head=head, context=context, one_hot=kind == "one-hot").float()

    model, c = make(), None if context is None else torch.randn(2, context)
    x = model.sample(2, 9, c)
    expected = model.log_prob(x, c)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.log_prob(x, c), expected)
    double, wide = copy.deepcopy(model).double(), None if c is None else c.double()
    y = x.double() if kind == "student" else x
    found = double.log_prob(y, wide)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=1e-4)
    fresh = make()
    fresh.load_state_dict(double.state_dict(), assign=True)
    assert torch.equal(fresh.log_prob(y, wide), found)
    fresh.log_prob(y, wide).sum().backward()
    assert all(p.is_leaf and p.grad is not None for p in fresh.parameters())
    assert fresh.sample(2, 9, wide).dtype == (torch.float64 if kind == "student" else torch.int64)


def test_the_student_compiles_whole_and_follows_functions_of_torch_func() -> None:
    flow = student(flows=2, layers=1, blocks=1)
    x = flow.sample(3, 4)
    torch.compiler.reset()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), flow(x))
    with torch.no_grad():
        each = torch.func.vmap(lambda row: flow.bijection(row[None])[1][0])(x)
        torch.testing.assert_close(each, flow.bijection(x)[1])


def test_nothing_of_the_models_needs_a_picture_or_a_data_set() -> None:
    code = "import sys, nflib.wavenet, nflib.pixel; print([m for m in sys.modules if m in {names}])"
    names = ["matplotlib", "nflib.audio", "nflib.train", "nflib.data", "nflib.plot", "scipy"]
    command = [sys.executable, "-c", code.format(names=names)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_learns_a_tone_and_evaluate_counts_bits_a_sample() -> None:
    x, y = audio.tones(24, 128, seed=0)
    levels = audio.linear(x, 16)
    context = nn.functional.one_hot(y, 8).float()
    model = WaveNet(16, 8, 16, layers=4, context_dim=8, head=LogisticMixture(16))
    before = evaluate(model, levels, context)
    assert before.dims == 128
    fit(model, (levels, context), steps=60, batch_size=12, lr=1e-2, progress=False)
    after = evaluate(model, levels, context)
    assert after.bits_per_dim() < 0.75 * before.bits_per_dim()
    assert after.bits_per_dim() < 3
    total = -log_probs(model, levels, context).sum().item() / levels.numel() / math.log(2)
    assert after.bits_per_dim() == pytest.approx(total)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    data = (pad(recordings(20, 30), torch.arange(11, 31)), torch.randn(20, 2))
    settings = {"steps": 12, "batch_size": 5, "lr": 1e-2, "ema": 0.9, "progress": False}

    def make() -> WaveNet:
        torch.manual_seed(1)
        return WaveNet(8, 4, 4, layers=2, context_dim=2)

    whole = make()
    fit(whole, data, data, **settings)
    calls = 0

    def interrupted(model: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        nonlocal calls
        calls += model.training
        if calls > 7:
            raise KeyboardInterrupt
        return -model(x, c).mean()

    path = tmp_path / "run.safetensors"
    fit(make(), data, data, checkpoint=path, loss=interrupted, **settings)
    resumed = make()
    assert checkpoints.read(path)[1]["progress"]["step"] == 7
    fit(resumed, data, data, checkpoint=path, resume=True, **settings)
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Parallel WaveNet.


@pytest.mark.parametrize("context", [None, 2])
@pytest.mark.parametrize("kernel", [2, 3])
def test_a_layer_of_the_student_is_a_bijection(context: int | None, kernel: int) -> None:
    layer = CausalAffine(4, 5, 2, 2, kernel, context, scale=0.3)
    c = None if context is None else torch.randn(3, context)
    check_bijection(layer, torch.randn(3, 7), c, compile=kernel == 2 and context is not None)


def test_a_new_layer_only_scales() -> None:
    z = torch.randn(3, 50)
    x, log_det = CausalAffine(scale=0.2).inverse(z)
    torch.testing.assert_close(x, 0.2 * z)
    torch.testing.assert_close(log_det, torch.full((3,), 50 * math.log(0.2)))
    x = ParallelWaveNet(flows=4, scale=0.05).sample(10, 4000)
    assert x.std().item() == pytest.approx(0.05 * math.pi / 3**0.5, rel=0.03)


@pytest.mark.parametrize("context", [None, 2])
def test_stepping_back_is_exact_over_long_recordings(context: int | None) -> None:
    model = student(context)
    c = None if context is None else torch.randn(2, context, dtype=torch.float64)
    z = torch.randn(2, 300, dtype=torch.float64)
    with torch.no_grad():
        x, log_det = model.bijection.inverse(z, c)
        back, back_log_det = model.bijection(x, c)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(back_log_det, -log_det)


def test_the_student_is_a_density_over_waveforms_of_every_length() -> None:
    model = student(flows=2, layers=1, blocks=1, scale=1.0)
    assert model.likelihood == "exact"
    check_normalized(model, limits=(-40, 40), points=500)
    flow = model.flow(5)
    assert isinstance(flow, Flow)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), flow.log_prob(x))
    drawn, log_prob = flow.rsample_with_log_prob(4)
    torch.testing.assert_close(model(drawn), log_prob)


def test_conditionals_are_what_the_samples_were_drawn_from() -> None:
    model = student(2)
    c = torch.randn(3, 2, dtype=torch.float64)
    z = StandardLogistic(11).double().sample(3)
    x, mean, log_scale = model.conditionals(z, c)
    torch.testing.assert_close(x, z * log_scale.exp() + mean)
    torch.testing.assert_close(x, model.bijection.inverse(z, c)[0])
    # The product of the conditionals is the density.
    base = StandardLogistic(11).double()
    torch.testing.assert_close(base.log_prob(z) - log_scale.sum(1), model.log_prob(x, c))


@pytest.mark.parametrize("spread", [-6.5, -4.0, -1.0])
def test_the_teachers_density_is_its_probability_and_integrates_to_one(spread: float) -> None:
    head = LogisticMixture(16, components=3)
    parameters = torch.randn(1, 9, 1, dtype=torch.float64)
    parameters[:, 6:] += spread
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    density = mixture_log_density(head, x[None], parameters.expand(1, 9, len(x))).exp()
    assert density.sum().item() * 24 / 400_000 == pytest.approx(1, abs=2e-3)
    # Levels that are not at an end have the density times the width of a level.
    levels = torch.arange(1, 15)
    at = (2 * levels.double() / 15 - 1)[None]
    found = mixture_log_density(head, at, parameters.expand(1, 9, 14)) + math.log(2 / 15)
    expected = head.log_prob(levels[None, None], parameters.expand(1, 9, 14))
    torch.testing.assert_close(found, expected)


class Known(Model):
    """A teacher that ignores what came before: every sample has one mixture of one logistic."""

    def __init__(self, mean: float, log_scale: float, levels: int = 65536) -> None:
        super().__init__(levels, 2, 2, layers=1, head=LogisticMixture(levels, components=1))
        last = self.stack.last[-1]
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([0.0, mean, log_scale]))


def test_the_distillation_loss_is_the_divergence_of_two_logistics() -> None:
    """Against numerical integration, student and teacher with one logistic for every sample."""
    model = ParallelWaveNet(flows=2, channels=2, skip=2, layers=1, scale=0.2)
    teacher = Known(0.1, math.log(0.3))
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)

    def log_density(mean: float, scale: float) -> Tensor:
        a = (x - mean) / scale
        return -a.abs() - 2 * nn.functional.softplus(-a.abs()) - math.log(scale)

    mine, theirs = log_density(0.0, 0.2), log_density(0.1, 0.3)
    exact = ((mine.exp() * (mine - theirs)).sum() * 16 / 200_000).item()
    torch.manual_seed(0)
    z = StandardLogistic(2000).sample(50)
    found, made = distillation_loss(model, teacher, z, draws=4)
    assert found.item() == pytest.approx(exact, abs=0.01)
    torch.testing.assert_close(made, 0.2 * z)
    same, _ = distillation_loss(model, Known(0.0, math.log(0.2)), z, draws=4)
    assert same.item() == pytest.approx(0, abs=0.01)


def test_the_loss_reaches_the_student_through_the_teachers_past() -> None:
    torch.manual_seed(0)
    teacher = wavenet(64, "mixture")
    model = student(scale=0.3)
    z = StandardLogistic(20).double().sample(2)
    loss, _ = distillation_loss(model, teacher, z)
    assert all(bool(g.any()) for g in torch.autograd.grad(loss, model.parameters()))


def test_the_power_loss_compares_frequencies_not_phases() -> None:
    time = torch.arange(4000) / 8000
    tone = torch.sin(2 * math.pi * 440 * time)[None]
    shifted = torch.sin(2 * math.pi * 440 * time + 1)[None]
    other = torch.sin(2 * math.pi * 660 * time)[None]
    assert power_loss(tone, tone) == 0
    assert power_loss(shifted, tone) < 1e-3
    assert power_loss(torch.zeros_like(tone), tone).item() == pytest.approx(1)
    assert power_loss(other, tone) > 1


def test_distillation_finds_the_teachers_logistic_and_leaves_the_teacher_alone() -> None:
    teacher = Known(0.3, math.log(0.1))
    teacher.stack.first.requires_grad_(False)
    flags = [p.requires_grad for p in teacher.parameters()]
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(0)
    model = ParallelWaveNet(flows=2, channels=2, skip=2, layers=1, scale=0.3)
    data = torch.zeros(32, 64)
    history = distill(
        model, teacher, data, power=0.0, steps=150, batch_size=32, lr=2e-2, progress=False
    )
    assert history.records[-1]["train"] < 0.05
    assert history.records[-1]["train"] < 0.2 * history.records[0]["train"]
    x = model.sample(100, 64).detach()
    assert x.mean().item() == pytest.approx(0.3, abs=0.03)
    assert x.std().item() == pytest.approx(0.1 * math.pi / 3**0.5, rel=0.1)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert [p.requires_grad for p in teacher.parameters()] == flags


def test_distillation_takes_contexts_and_the_power_loss() -> None:
    x, y = audio.tones(8, 512, seed=0)
    context = nn.functional.one_hot(y, 8).float()
    teacher = WaveNet(256, 4, 4, layers=2, context_dim=8, head=LogisticMixture(256))
    model = ParallelWaveNet(2, 4, 4, 2, context_dim=8)
    history = distill(model, teacher, (x, context), steps=3, batch_size=4, progress=False)
    assert math.isfinite(history.records[-1]["train"])
    assert model.sample(3, 100, context[:1]).shape == (3, 100)


def test_any_head_with_one_channel_serves() -> None:
    class Coin(Head):
        """Level 0 or 1 with one logit."""

        count = uniforms = 1

        def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
            sign = 2 * x[:, 0].to(parameters.dtype) - 1
            return nn.functional.logsigmoid(sign * parameters[:, 0])

        def sample(self, parameters: Tensor, u: Tensor) -> Tensor:
            return (u < parameters.sigmoid()).long()

    model = WaveNet(2, 3, 3, layers=2, head=Coin(2)).double()
    x = torch.cartesian_prod(*[torch.arange(2)] * 4)
    assert model.log_prob(x).exp().sum().item() == pytest.approx(1)
    made = model.sample(5, 20)
    assert (made.min().item(), made.max().item()) == (0, 1)
    assert PADDING == -1
