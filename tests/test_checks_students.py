"""Whatever a student writes: a right layer passes as it is, a mistake is named in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from students import (
    AFloat,
    AList,
    BoxCox,
    Causal,
    Column,
    Couple,
    Detached,
    DetachedLogDet,
    ForgetsInput,
    GlobalTensor,
    Infinite,
    InPlace,
    InPlaceBack,
    ListOfModules,
    MadeAtConstruction,
    Mean,
    Move,
    Narrow,
    NoContext,
    NoInverse,
    Noise,
    NoLogarithm,
    NoLogDet,
    NoLogDetEither,
    NoReturn,
    NoSelf,
    NotOfOneRow,
    OtherArguments,
    OverBatch,
    OverDims,
    PlainModule,
    PlainTensor,
    RaisesForward,
    RaisesInverse,
    Random,
    Refuses,
    SameSign,
    Saturated,
    Scalar,
    Scale,
    Shift,
    Sinh,
    Standardise,
    SummedOverBatch,
    ThreeThings,
    Unused,
    View,
    WholeBatch,
    WrongInverse,
    WrongSign,
    ZeroAtTheEnd,
)
from torch import Tensor, nn

from nflib.arguments import show
from nflib.checks import (
    AutoregressiveError,
    BatchError,
    CheckError,
    GradientError,
    InverseError,
    LayerError,
    LogDetError,
    OntoError,
    PrecisionError,
    StateError,
    VmapError,
    check_autoregressive,
    check_bijection,
    check_gradients,
    check_onto,
    check_state,
    check_vmap,
)
from nflib.core import Bijection, Compose, Flow, Inverse, StandardNormal

Pair = tuple[Tensor, Tensor]

RIGHT = [Scale, Shift, Sinh, Couple, Standardise]


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_layer_passes_as_it_is(kind: Callable[[], Bijection]) -> None:
    layer, x = kind(), torch.randn(3, 4).T  # not contiguous
    check_bijection(layer, x)
    check_vmap(layer.double(), x.double())
    check_onto(layer, x)


def test_a_right_layer_with_context_passes_as_it_is() -> None:
    layer, x, context = Move(), torch.randn(4, 3), torch.randn(4, 2)
    check_bijection(layer, x, context)
    check_vmap(layer, x, context)
    check_onto(layer, 3, context)
    check_bijection(Compose(Scale(), layer, Inverse(Couple())), x, context)


def test_the_random_state_is_left_alone() -> None:
    x, state = torch.randn(4, 3), torch.get_rng_state()
    check_bijection(Scale(), x)
    check_onto(Scale(), x)
    check_autoregressive(nn.Sequential(Causal()), x)
    assert torch.equal(torch.get_rng_state(), state)


MISTAKES: list[tuple[Any, type[CheckError], str]] = [
    (NoLogDet(), LogDetError, "expects to return a tuple .*, got one tensor: log_det is missing"),
    (NoReturn(), LogDetError, r"got None \(is a return missing"),
    (AList(), LogDetError, r"expects to return a tuple \(output, log_det\), got a list"),
    (ThreeThings(), LogDetError, "got 3 things"),
    (AFloat(), LogDetError, "expects to return log_det as a tensor, got float"),
    (WrongSign(), LogDetError, "autograd finds .*: the sign is wrong"),
    (SameSign(), LogDetError, "inverse: .*: it is the log_det of forward, that of inverse has the"),
    (
        Scalar(),
        LogDetError,
        r"of shape \(\), expected \(4,\): one number a row, not one for the wh",
    ),
    (OverDims(), LogDetError, r"of shape \(4, 3\), expected \(4,\): .* so sum over the event"),
    (Column(), LogDetError, r"of shape \(4, 1\), expected \(4,\): one number a row \(.flatten\(\)"),
    (OverBatch(), LogDetError, r"of shape \(3,\), .* sum over the event and not over the batch"),
    (SummedOverBatch(), BatchError, "log_det of a row changes .*: it is summed over the batch"),
    (Mean(), LogDetError, "it is the mean over the event's 3 numbers, not their sum"),
    (NoLogarithm(), LogDetError, r"it is \|det J\| and not its logarithm"),
    (InPlace(), LayerError, r"forward changes its input in place \(with \+="),
    (InPlaceBack(), LayerError, "inverse changes its input in place"),
    (PlainTensor(), StateError, r"\.s is a tensor but neither .* self.register_buffer\(\"s\""),
    (NoLogDetEither(), LogDetError, "got one tensor: log_det is missing"),
    (MadeAtConstruction(), StateError, r"\.factor is computed from parameters when the layer is"),
    (ListOfModules(), StateError, r"\.nets is a Python list of modules, .* nn.ModuleList"),
    (GlobalTensor(), LogDetError, "so small a difference comes of float32"),
    (
        NoContext(),
        LayerError,
        r"written as forward\(self, x, context=None\), got forward\(self, x\)",
    ),
    (OtherArguments(), LayerError, r"expects to be written as forward\(self, x, context=None\), g"),
    (NoSelf(), LayerError, r"forward\(self, x, context=None\), got forward\(x, context\)"),
    (NoInverse(), LayerError, r"expects a method inverse\(self, z, context=None\), got none"),
    (RaisesForward(), LayerError, "forward raises RuntimeError: "),
    (RaisesInverse(), LayerError, "inverse raises AttributeError: .*'t'"),
    (Infinite(), LogDetError, r"not finite for finite input: nan in row 0, where the input is \("),
    (Detached(), GradientError, "forward returns an output without a graph"),
    (DetachedLogDet(), GradientError, "forward: the gradient of log_det is not its slope"),
    (Unused(), GradientError, "spare gets no gradient"),
    (Random(), LayerError, "called again with the same input: it draws random numbers"),
    (Narrow(), PrecisionError, "forward turns torch.float64 into torch.float32"),
    (WholeBatch(), BatchError, "the output of a row changes"),
    (NotOfOneRow(), BatchError, "forward runs on a batch but not on one row: raises RuntimeError"),
    (View(), BatchError, "fails for a batch that is not contiguous: .*reshape in place of view"),
    (ForgetsInput(), LogDetError, r"singular Jacobian .*\(no output depends on input 2\)"),
    (WrongInverse(), InverseError, "differs from x by"),
    (Flow(Scale(), StandardNormal(3)), LayerError, "Flow, which is a whole model: .*flow.bijectio"),
    (nn.Linear(3, 3), LayerError, "got Linear, which is a plain nn.Module"),
    (StandardNormal(3), LayerError, "got StandardNormal, which is a model of its own"),
    (Scale, LayerError, r"got the class Scale itself: make an object of it with Scale\(\.\.\.\)"),
    (PlainModule(), LayerError, r"which is a plain nn.Module: write class PlainModule\(Bijection"),
    (torch.exp, LayerError, "expects a layer, got an? "),
    (Noise(), LayerError, "got Noise, which is stochastic: it draws noise"),
    (Compose(Noise(), Scale()), LayerError, "Compose, which is stochastic because of the Noise in"),
]


@pytest.mark.parametrize(
    ("layer", "error", "words"), MISTAKES, ids=[show(layer) for layer, _, _ in MISTAKES]
)
def test_a_mistake_is_named(layer: Any, error: type[CheckError], words: str) -> None:
    with pytest.raises(CheckError) as found:
        check_bijection(layer, torch.randn(4, 3))
    assert type(found.value) is error, found.value
    message = str(found.value)
    assert re.search(words, message), message
    name = layer.__name__ if isinstance(layer, type) else type(layer).__name__
    assert name in message
    # One sentence, on one line.
    assert "\n" not in message
    assert message.endswith(".")
    assert ". " not in message


def test_the_error_of_a_student_is_chained() -> None:
    with pytest.raises(LayerError) as found:
        check_bijection(RaisesForward(), torch.randn(4, 3))
    assert isinstance(found.value.__cause__, RuntimeError)


def test_numbers_that_print_alike_get_more_digits() -> None:
    with pytest.raises(LogDetError) as found:
        check_bijection(GlobalTensor(), torch.randn(4, 3))
    said = re.search(r"log_det is (\S+) where autograd finds (\S+) \(", str(found.value))
    assert said is not None
    assert said[1] != said[2]


@pytest.mark.parametrize(
    ("x", "context", "words"),
    [
        ([[1.0, 2.0, 3.0]] * 2, None, "expects x to be a tensor, got list; torch.as_tensor"),
        (torch.randn(4, 3).numpy(), None, "expects x to be a tensor, got ndarray"),
        (torch.randn(1, 3), None, r"expects at least two rows in x, got shape \(1, 3\)"),
        (torch.randn(3), None, "expects at least two rows in x"),
        (torch.ones(4, 3, dtype=torch.int64), None, "expects floating-point numbers in x, got t"),
        (torch.full((4, 3), torch.nan), None, "expects finite numbers in x"),
        (torch.randn(4, 3), [1.0], "expects context to be a tensor, got list"),
        (torch.randn(4, 3), torch.randn(3, 2), "a row of context for each of the 4 rows of x"),
        (torch.randn(4, 3), None, r"Move expects a context of shape \(batch, 2\), got none"),
    ],
)
def test_input_that_cannot_be_tried_is_refused(x: Any, context: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_bijection(Move(), x, context)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (BoxCox(), r"BoxCox is not onto: inverse finds no finite x for z = \(-"),
        (Saturated(), r"Saturated is not onto, .*: forward\(inverse\(z\)\) is \(.* for z = \(-"),
        (Refuses(), "Refuses.inverse fails for noise .* up to 10: raises ValueError: z is out of"),
    ],
)
def test_a_map_that_is_not_onto_is_found(layer: Bijection, words: str) -> None:
    check_bijection(layer, torch.rand(4, 1) + 0.5)
    with pytest.raises(OntoError, match=words):
        check_onto(layer, torch.rand(4, 1) + 0.5)
    if type(layer) is BoxCox:
        with pytest.raises(OntoError):
            check_onto(layer, 1)


def test_onto_says_what_was_tried_and_refuses_what_it_cannot_try() -> None:
    report = repr(check_onto(Scale(), (3,), radius=5, draws=7))
    assert "7 z with coordinates up to 5, error < 0.0001" in report
    # It is a test: a radius within reach shows nothing.
    check_onto(BoxCox(), 1, radius=0.4)
    for wrong in ({"radius": 0.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="^check_onto expects (radius|draws) to be a"):
            check_onto(Scale(), 3, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="check_onto expects x to be a tensor, got str"):
        check_onto(Scale(), "three")  # type: ignore[arg-type]
    with pytest.raises(LayerError, match="got the class Scale itself"):
        check_onto(Scale, 3)  # type: ignore[arg-type]


def test_a_network_that_starts_at_zero_does_not_pass_as_autoregressive() -> None:
    network, x = ZeroAtTheEnd(), torch.randn(8, 5)
    with pytest.raises(AutoregressiveError, match="which is not before it"):
        check_autoregressive(network, x)
    assert not network[2].weight.any()  # type: ignore[operator]
    with pytest.raises(AutoregressiveError, match="cannot judge: 0 of 10 links in use"):
        check_autoregressive(network, x, randomize=False)
    with pytest.raises(AutoregressiveError, match="cannot judge: 0 of 10 links in use"):
        check_autoregressive(lambda a: network(a), x)
    with pytest.raises(AutoregressiveError, match="cannot judge"):
        check_autoregressive(lambda a: torch.ones_like(a), x)
    assert "3 of 3 links in use" in repr(check_autoregressive(Causal(), torch.randn(2, 3)))
    # One dimension has no link to show.
    check_autoregressive(lambda a: torch.zeros_like(a), torch.randn(2, 1))


def test_dimensions_may_share_a_position() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    report = check_autoregressive(lambda a: a @ weight.T, torch.randn(2, 3), [0, 0, 1])
    assert "2 of 2 links in use" in repr(report)
    with pytest.raises(AutoregressiveError, match="Output 2 depends on input 1"):
        check_autoregressive(lambda a: a @ weight.T, torch.randn(2, 3), [0, 1, 1])


def test_an_autoregressive_check_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"expects x of shape \(batch, D\)"):
        check_autoregressive(Causal(), torch.randn(2, 3, 1))
    with pytest.raises(ValueError, match="expects order to hold 3 positions, one for each dim"):
        check_autoregressive(Causal(), torch.randn(2, 3), [1, 2])
    with pytest.raises(ValueError, match=r"expects a function to \(batch, D\) or"):
        check_autoregressive(lambda a: a.sum(1), torch.randn(2, 3))


def test_gradients_of_a_composition_and_of_a_model() -> None:
    # A composition is a layer, but of no class `Bijection`.
    whole = Compose(Scale(), Couple()).double()
    check_gradients(whole, torch.randn(4, 3).double())
    check_gradients(Flow(whole, StandardNormal(3).double()), torch.randn(4, 3).double())
    with pytest.raises(GradientError, match="spare gets no gradient"):
        check_gradients(Compose(Unused()), torch.randn(4, 3))


class FixedDtype(Scale):
    """Remembers the dtype it was made with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        moved.dtype = self.s.dtype
        return moved

    def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
        z, log_det = super().forward(x)
        return z.to(getattr(self, "dtype", z.dtype)).to(z.dtype), log_det


def test_a_state_that_is_assigned_in_another_dtype() -> None:
    check_state(Scale().double(), torch.randn(4, 3).double())
    layer = FixedDtype()
    nn.init.normal_(layer.s)
    with pytest.raises(StateError, match="with assign=True into torch.float32"):
        check_state(layer.double(), torch.randn(4, 3).double())


def test_a_branch_on_values_fails_under_vmap() -> None:
    class Branch(Scale):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            return super().forward(x) if bool((x < 99).all()) else (x, torch.zeros(len(x)))

    with pytest.raises(VmapError, match="Branch.forward fails under torch.func.vmap"):
        check_vmap(Branch(), torch.randn(4, 3))
