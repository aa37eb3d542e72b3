"""What `fit` takes as data: each kind gives what tensors give, anything else is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from test_train import Stop, make, points, same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import nflib.data
from nflib import checkpoints
from nflib.core import Compose, Flow, StandardNormal
from nflib.linear import LU
from nflib.models import realnvp
from nflib.normalization import ActNorm
from nflib.train import History, fit

OPTIONS = {"steps": 12, "batch_size": 64, "validate_every": 3}


class Items(Dataset):
    """A map-style data set that counts how it is read."""

    def __init__(self, *rows: Tensor) -> None:
        self.rows, self.read = rows, 0

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, i: int) -> Any:
        self.read += 1
        found = tuple(row[i] for row in self.rows)
        return found if len(found) > 1 else found[0]


class Numbers(IterableDataset):
    """Rows one after the other, of a length that nobody knows."""

    def __init__(self, x: Tensor, known: bool = False) -> None:
        self.x = x
        if known:
            self.__class__ = type("Sized", (Numbers,), {"__len__": lambda self: len(self.x)})

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x)


class Batches:
    """An iterable of batches that can start anew."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def trained(data: Any, valid: Any = None, **options: Any) -> tuple[Flow, History]:
    model = make()
    history = fit(model, data, valid, **OPTIONS | options)
    return model, history


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.double(),
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: numpy.asfortranarray(x.numpy())[::-1][::-1],
        lambda x: nflib.data.Dataset(x, None, None, "points", "train"),
        Items,
        lambda x: Items(x.double()),
    ],
)
def test_rows_of_any_kind_train_like_tensors(kind: Any) -> None:
    expected, records = trained(points(), points(seed=2))
    got, also = trained(kind(points()), kind(points(seed=2)))
    assert same(expected, got)
    assert [r["valid"] for r in also.records] == [r["valid"] for r in records.records]
    assert {p.dtype for p in got.parameters()} == {torch.float32}


@pytest.mark.parametrize("pair", [tuple, list, lambda rows: Items(*rows)])
def test_contexts_come_beside_the_rows(pair: Any) -> None:
    x, context = points(), points(seed=3)[:, :1]
    models = [realnvp(2, 2, 8, context_dim=1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fit(models[0], (x, context), (x, context), **OPTIONS)
    fit(models[1], pair((x.clone(), context.double())), pair((x, context)), **OPTIONS)
    assert same(*models)


def test_whole_numbers_stay_whole() -> None:
    x = numpy.random.default_rng(0).integers(0, 17, (64, 4)).astype(numpy.uint8)
    kinds = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        kinds.append(x.dtype)
        return -model(x).mean()

    fit(realnvp(4, 2, 8, grey_levels=17), x, steps=1, loss=loss)
    assert kinds == [torch.uint8]


def test_a_data_set_is_read_item_by_item() -> None:
    items = Items(points(10_000))
    trained(items, steps=2)
    assert items.read == 512 + 512 + 2 * 64  # checked, initialized from, trained on


def test_a_loader_batches_and_shuffles_for_itself() -> None:
    sizes = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return -model(x).mean()

    loader = DataLoader(TensorDataset(points(100)), batch_size=30, shuffle=True)
    history = fit(make(), loader, loader, epochs=2, loss=loss, seed=3)
    assert sizes == [30, 30, 30, 10] * 4  # two epochs, each with a validation
    assert [record["epoch"] for record in history.records] == [1.0, 2.0]


def seen_by(loader: DataLoader, **options: Any) -> list[list[float]]:
    seen = []

    def loss(model: Flow, x: Tensor) -> Tensor:
        seen.append(x[:, 0].tolist())
        return -model(x).mean()

    fit(make(), loader, epochs=2, loss=loss, **options)
    return seen


def test_a_loaders_order_is_that_of_seed_and_epoch() -> None:
    loader = DataLoader(points(100), batch_size=25, shuffle=True)
    one = seen_by(loader)
    torch.manual_seed(99)
    assert one == seen_by(loader)
    assert one != seen_by(loader, seed=1)
    assert one[:4] != one[4:]
    assert sorted(sum(one[:4], [])) == sorted(points(100)[:, 0].tolist())


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(points(100), batch_size=30, shuffle=True),
        Numbers(points(100)),
        Batches(points(40), points(30, 1), points(50, 2)),
    ],
)
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_stream_resumes_exactly(loader: Any, stop: int, tmp_path: Any) -> None:
    calls = 0

    def loss(model: Flow, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == stop + 1:
            raise Stop
        return -model(x + 0.1 * torch.rand_like(x)).mean()

    calls = -100
    whole, resumed = make(), make()
    fit(whole, loader, steps=10, loss=loss)
    calls = 0
    path = tmp_path / "run.safetensors"
    fit(make(), loader, steps=10, loss=loss, checkpoint=path)
    assert checkpoints.read(path)[1]["progress"]["step"] == stop
    calls = -100
    fit(resumed, loader, steps=10, loss=loss, checkpoint=path, resume=True)
    assert same(whole, resumed)


def test_a_stream_without_length_starts_anew_and_ends_by_steps() -> None:
    history = fit(make(), Numbers(points(100)), points(50), steps=7, batch_size=60)
    assert [record["step"] for record in history.records] == [7]
    assert numpy.isnan(history.column("epoch")).all()
    known = fit(make(), Numbers(points(100), known=True), epochs=2, batch_size=60)
    assert known.column("epoch") == [1.0, 2.0]


def test_no_data_for_a_loss_that_draws_for_itself() -> None:
    """Reverse KL: the flow learns a density it can only evaluate."""
    torch.manual_seed(0)
    flow = Flow(LU(2), StandardNormal(2))
    target = torch.distributions.MultivariateNormal(
        torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.8], [0.8, 1.0]])
    )

    def reverse_kl(model: Flow) -> Tensor:
        z = torch.randn(200, 2)
        x, log_det = model.bijection.inverse(z)
        return (StandardNormal(2).log_prob(z) - log_det - target.log_prob(x)).mean()

    history = fit(flow, None, loss=reverse_kl, steps=400, lr=3e-2)
    assert history.records[-1]["train"] < 0.3
    with torch.no_grad():
        assert reverse_kl(flow).item() < 0.05


class Counting(ActNorm):
    """Counts the rows of each initialization."""

    rows: list[int]

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        self.rows.append(len(x))
        super().initialize(x, context)


@pytest.mark.parametrize(
    ("data", "batch_size", "rows"),
    [
        (points(3000), 2, 512),
        (points(3000), 1000, 1000),
        (points(300), 7, 300),
        (Items(points(3000)), 2, 512),
        (Numbers(points(3000)), 10, 520),
        (DataLoader(points(300), batch_size=7), None, 300),
    ],
)
def test_statistics_come_from_enough_rows(data: Any, batch_size: Any, rows: int) -> None:
    layer = Counting(2)
    layer.rows = []
    flow = Flow(Compose(layer, LU(2)), StandardNormal(2))
    fit(flow, data, steps=2, batch_size=batch_size)
    fit(flow, points(3000), steps=2)
    assert layer.rows[0] == rows


def test_a_tiny_batch_starts_as_well_as_a_large_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 20)
    history = fit(realnvp(20, 4, 32), x, steps=20, batch_size=2, validate_every=1)
    assert max(history.column("train")) < 45  # the entropy is 28 nats


NAN = points()
NAN[3, 1] = torch.nan


@pytest.mark.parametrize(
    ("data", "valid", "message"),
    [
        (NAN, None, "data must be finite, but 1 of its 1024 values"),
        (NAN.numpy(), None, "data must be finite, but 1 of its 1024 values"),
        (Items(NAN[:9]), None, "data must be finite, but 1 of its 18 values"),
        (Batches(NAN[:9]), None, "data must be finite, but 1 of its 18 values"),
        (points(), NAN, "valid must be finite"),
        (points()[:0], None, "data with the same number of rows, at least one, got [0]."),
        (Items(points()[:0]), None, "fit expects data of at least one row, got none."),
        (Batches(), None, "fit expects data that gives batches, got none from it."),
        (
            (points(), torch.randn(3, 1)),
            None,
            "number of rows, at least one, got [512, 3]",
        ),
        (("a", "b"), None, "fit expects data as tensors or NumPy arrays of rows, got str."),
        (numpy.array(["a"]), None, "fit expects data as tensors or NumPy arrays of rows, got <U1"),
        (points(), torch.tensor(1.0), "fit expects valid as tensors or NumPy arrays of rows"),
        (Batches({"x": points()}), None, "as tensors or NumPy arrays of rows, got dict."),
        ({"x": points()}, None, "fit expects data as tensors, NumPy arrays, a tuple of them, a"),
        ("digits", None, "that can start anew, got str."),
        (iter([points()]), None, "that can start anew, got list_iterator."),
        (3, None, "that can start anew, got int."),
        (None, None, "fit expects a loss when it is called without data."),
    ],
)
def test_bad_data_is_one_sentence(data: Any, valid: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fit(make(), data, valid, steps=1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (
            DataLoader(points(), batch_size=64),
            {"steps": 1, "batch_size": 64},
            "fit expects no batch_size here (DataLoader has its own), got 64.",
        ),
        (
            None,
            {"steps": 1, "batch_size": 64, "loss": lambda model: model.bijection[0].bias.sum()},
            "fit expects no batch_size here (the loss draws its own), got 64.",
        ),
        (
            Numbers(points()),
            {"epochs": 1},
            "fit expects a budget of steps or seconds for data of unknown length, got epochs=1.",
        ),
    ],
)
def test_what_does_not_go_with_the_data_is_one_sentence(
    data: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        fit(make(), data, **options)
    assert str(caught.value) == message


def test_a_model_refuses_data_before_anything_runs() -> None:
    x = torch.rand(64, 4) * 20
    for data in (x, Items(x), DataLoader(x, batch_size=16)):
        with pytest.raises(ValueError, match="whole numbers"):
            fit(realnvp(4, 2, 8, grey_levels=17), data, steps=1)
