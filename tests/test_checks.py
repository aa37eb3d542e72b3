"""The instrument itself: each check accepts what is right and refuses each planted fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layers import LAYERS
from torch import Tensor

from nflib.cache import is_traced
from nflib.checks import (
    AutoregressiveError,
    BatchError,
    CheckError,
    CompileError,
    GradientError,
    InverseError,
    LogDetError,
    NormalizationError,
    PrecisionError,
    StateError,
    VmapError,
    check_autoregressive,
    check_bijection,
    check_inverse,
    check_normalized,
    check_vmap,
    randomize_parameters,
)
from nflib.core import Bijection, Flow, StandardNormal
from nflib.linear import Diagonal

Pair = tuple[Tensor, Tensor]


def mutated(
    forward: Callable[[Pair], Pair] = lambda pair: pair,
    inverse: Callable[[Pair], Pair] = lambda pair: pair,
) -> Bijection:
    """A diagonal flow whose results are tampered with on the way out."""

    class Mutant(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            return forward(super().forward(x, context))

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
            return inverse(super().inverse(z, context))

    return Mutant(3)


def negate(pair: Pair) -> Pair:
    return pair[0], -pair[1]


def drop(pair: Pair) -> Pair:
    return pair[0], torch.zeros_like(pair[1])


def scalar(pair: Pair) -> Pair:
    return pair[0], pair[1].mean()


def keep_shape(pair: Pair) -> Pair:
    return pair[0], pair[1].unsqueeze(1)


def narrow(pair: Pair) -> Pair:
    return pair[0], pair[1].float()


def shift(pair: Pair) -> Pair:
    return pair[0] + 1e-3, pair[1]


def centre(pair: Pair) -> Pair:
    return pair[0] - pair[0].mean(0), pair[1]


def detach(pair: Pair) -> Pair:
    return pair[0], pair[1].detach() * 1.0


def spoil(pair: Pair) -> Pair:
    return pair[0], pair[1] * torch.nan


MUTANTS: dict[str, tuple[Bijection, type[CheckError]]] = {
    "forward sign flipped": (mutated(forward=negate), LogDetError),
    "inverse sign flipped": (mutated(inverse=negate), LogDetError),
    "both signs flipped": (mutated(negate, negate), LogDetError),
    "forward log_det dropped": (mutated(forward=drop), LogDetError),
    "inverse log_det dropped": (mutated(inverse=drop), LogDetError),
    "both log_dets dropped": (mutated(drop, drop), LogDetError),
    "scalar log_det": (mutated(forward=scalar), LogDetError),
    "column of log_dets": (mutated(keep_shape, keep_shape), LogDetError),
    "float32 log_det": (mutated(narrow, narrow), LogDetError),
    "inverse off by 0.001": (mutated(inverse=shift), InverseError),
    "log_det NaN": (mutated(forward=spoil), LogDetError),
    "rows mixed": (mutated(forward=centre), BatchError),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(name: str) -> None:
    mutant, error = MUTANTS[name]
    with pytest.raises(error):
        check_bijection(mutant, torch.randn(4, 3))


def test_the_untampered_layer_passes() -> None:
    check_bijection(mutated(), torch.randn(4, 3))


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("identity",)])
@pytest.mark.parametrize("mutate", [negate, drop], ids=["flipped", "dropped"])
def test_a_wrong_log_det_of_any_layer_is_found(
    name: str, mutate: Callable[[Pair], Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = LAYERS[name]
    layer = case.make()
    if any(word in name for word in ("permutation", "householder", "additive", "squeeze")):
        pytest.skip("its log_det is zero")
    kind, honest = type(layer), type(layer).forward
    monkeypatch.setattr(kind, "forward", lambda self, x, c=None: mutate(honest(self, x, c)))
    with pytest.raises(LogDetError, match="autograd finds"):
        check_bijection(layer, *case.inputs())


def test_a_log_det_without_gradient_is_found() -> None:
    class Frozen(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x, context)
            return z.detach() + 0 * self.bias.sum(), log_det  # type: ignore[union-attr]

    with pytest.raises((GradientError, LogDetError)):
        check_bijection(Frozen(3), torch.randn(4, 3))

    class Unused(Diagonal):
        def __init__(self) -> None:
            super().__init__(3)
            self.spare = torch.nn.Parameter(torch.ones(1))

    with pytest.raises(GradientError, match="spare gets no gradient"):
        check_bijection(Unused(), torch.randn(4, 3))


def test_a_state_that_is_not_saved_is_found() -> None:
    class Forgetful(Diagonal):
        def __init__(self) -> None:
            super().__init__(3)
            self.shift = torch.nn.Parameter(torch.zeros(3))

        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
            full = super().state_dict(*args, **kwargs)  # type: ignore[arg-type]
            return {k: v + 1 if k == "bias" else v for k, v in full.items()}

        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x, context)
            return z + self.shift, log_det

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
            return super().inverse(z - self.shift, context)

    with pytest.raises(StateError):
        check_bijection(Forgetful(), torch.randn(4, 3))


def test_a_lost_precision_is_found() -> None:
    class Half(Diagonal):
        def apply_weight(self, x: Tensor) -> Tensor:
            return (x.bfloat16() * self.log_scale.exp().bfloat16()).to(x.dtype)

    with pytest.raises(CheckError):
        check_bijection(Half(3), torch.randn(4, 3))

    class Product(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            return x @ torch.diag(self.log_scale.exp()), self.log_scale.sum().expand(len(x))

    with pytest.raises(PrecisionError, match="under autocast"):
        check_bijection(Product(3, bias=False), torch.randn(4, 3))


def test_a_graph_break_is_found() -> None:
    class Breaks(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x, context)
            return (z, log_det) if x.sum().item() < 1e9 else (x, log_det)

    check_bijection(Breaks(3), torch.randn(4, 3))
    with pytest.raises(CompileError, match="does not compile whole"):
        check_bijection(Breaks(3), torch.randn(4, 3), compile=True)


def test_no_bijection_at_all_is_found() -> None:
    class Square(Bijection):
        event_shape = (3,)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            return x.square(), (2 * x).abs().log().sum(1)

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
            return z.sqrt(), -(2 * z.sqrt()).log().sum(1)

    with pytest.raises(InverseError, match="differs from x"):
        check_bijection(Square(), torch.randn(4, 3))


def test_the_layer_is_left_as_it_is() -> None:
    layer = Diagonal(3)
    check_bijection(layer, torch.randn(4, 3))
    assert not layer.log_scale.any()
    assert layer.training


def test_the_identity_initialisation_would_hide_a_fault() -> None:
    # What randomisation is for: at log_scale = 0 a dropped log_det is right by accident.
    check_bijection(mutated(drop, drop), torch.randn(4, 3), randomize=False)


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        check_bijection(Diagonal(3), torch.randn(1, 3))


def test_the_report_is_the_same_on_every_run() -> None:
    first, second = (repr(check_bijection(Diagonal(3), torch.randn(4, 3))) for _ in range(2))
    assert first == second
    assert "log_det of inverse" in first


def test_autoregressive() -> None:
    lower = torch.randn(4, 4).tril(-1)
    check_autoregressive(lambda x: x @ lower.T, torch.randn(3, 4))
    check_autoregressive(lambda x: x @ lower, torch.randn(3, 4), order=[3, 2, 1, 0])
    two = torch.stack([lower, 2 * lower])
    check_autoregressive(lambda x: torch.einsum("pij,nj->nip", two, x), torch.randn(3, 4))
    with_diagonal = lower + torch.eye(4)
    check_autoregressive(lambda x: x @ with_diagonal.T, torch.randn(3, 4), strict=False)
    with pytest.raises(AutoregressiveError, match="Output 0 depends on input 0"):
        check_autoregressive(lambda x: x @ with_diagonal.T, torch.randn(3, 4))
    off_by_one = torch.randn(4, 4).tril(1)
    with pytest.raises(AutoregressiveError):
        check_autoregressive(lambda x: x @ off_by_one.T, torch.randn(3, 4), strict=False)


def test_normalized() -> None:
    flow = Flow(Diagonal(2), StandardNormal(2))
    randomize_parameters(flow)
    check_normalized(flow)
    with pytest.raises(NormalizationError, match="integrates to"):
        check_normalized(lambda x: flow.log_prob(x) + 0.05)
    with pytest.raises(ValueError, match="dim to be 1 or 2"):
        check_normalized(flow, dim=3)


def test_what_only_float32_shows_is_found() -> None:
    class Rounded(Diagonal):
        """Right in float64; in float32 a million leaves no more than six hundredths of x."""

        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x)
            return z + 1e6, log_det

        def inverse(self, z: Tensor, context: Tensor | None = None) -> Pair:
            return super().inverse(z - 1e6)

    with pytest.raises(InverseError, match="differs from x by .*, allowed is 0.001"):
        check_bijection(Rounded(3), torch.randn(4, 3))


def test_a_row_out_of_an_empty_batch_is_found() -> None:
    class Padded(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x)
            return (z if len(z) else z.new_zeros(1, 3)), log_det

    with pytest.raises(BatchError, match="Padded.forward does not return an empty batch for one"):
        check_bijection(Padded(3), torch.randn(4, 3))


def test_a_load_that_takes_nothing_over_is_found() -> None:
    class Deaf(Diagonal):
        def _load_from_state_dict(self, *args: object) -> None:
            pass

    with pytest.raises(StateError, match="changes by .* when its state_dict is loaded"):
        check_bijection(Deaf(3), torch.randn(4, 3))


def test_another_result_under_vmap_is_found() -> None:
    class Other(Diagonal):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Pair:
            z, log_det = super().forward(x)
            return z + is_traced(), log_det

    check_vmap(Diagonal(3), torch.randn(4, 3))
    with pytest.raises(VmapError, match="Other.forward under vmap differs from the batch by"):
        check_vmap(Other(3), torch.randn(4, 3))


def test_an_inverse_of_nan_is_found() -> None:
    lost = mutated(inverse=lambda pair: (pair[0] * torch.nan, pair[1]))
    with pytest.raises(InverseError, match="differs from x by inf"):
        check_inverse(lost, torch.randn(4, 3))
