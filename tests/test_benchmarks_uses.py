"""benchmarks.regression and benchmarks.anomalies: their preparation and their scores."""

import pytest
import torch

from benchmarks import anomalies, colorization, regression
from nflib.metrics import crps


def test_targets_are_standardised_by_the_training_rows_and_noise_is_one_step() -> None:
    table = regression.prepared("diabetes")
    y, x = table.train
    assert y.shape == (len(x), 1)
    # 151.9 and 75.1 are mean and deviation of the training rows' y, a whole number.
    back = y.double() * table.unit + table.mean
    assert abs(back.mean() - table.mean) < 0.1
    assert abs(y.std() - 1) < 0.01
    assert len(back.unique()) == len(back)
    assert back.round().unique().numel() < 0.9 * len(back)


def test_twice_the_mean_pinball_loss_is_the_crps() -> None:
    y = torch.tensor([0.3, -1.0])
    normal = torch.distributions.Normal(0.0, 2.0)
    quantiles = normal.icdf(torch.tensor(regression.QUANTILES))[:, None].expand(-1, 2)
    torch.manual_seed(0)
    draws = normal.sample((40_000, 2))
    assert (regression.pinball(quantiles, y) - crps(draws, y)).abs().max() < 0.02


def test_quantiles_of_the_truth_cover_as_they_should() -> None:
    torch.manual_seed(0)
    y = torch.randn(40_000)
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(regression.QUANTILES))
    found = regression.scored(torch.ones(2), regression.ranks_of(quantiles[:, None], y))
    assert found["miscalibration"] < 0.01


def test_the_line_is_the_least_squares_fit() -> None:
    from sklearn.linear_model import LinearRegression

    y, x = regression.prepared("diabetes").train
    ours = regression.line_at("diabetes", x)[:, 0]
    theirs = LinearRegression().fit(x.double().numpy(), y[:, 0].double().numpy())
    assert abs(ours - torch.from_numpy(theirs.predict(x.double().numpy()))).max() < 1e-5


def test_odd_rows_are_what_they_are_called() -> None:
    x = anomalies.prepared("wine", 1)
    test, mixed = x["test"], x["shuffled"]
    torch.testing.assert_close(x["pulled in"], test / 2)
    torch.testing.assert_close(x["pushed out"], 1.5 * test)
    assert torch.equal(mixed.sort(0).values, test.sort(0).values)
    assert (mixed.T.cov() - test.T.cov()).abs().max() > 0.3
    # No row is in two of the splits.
    rows = torch.cat([x["train"], x["valid"], test, x["left out"]])
    assert len(rows.unique(dim=0)) == len(rows)


class Far:
    """log p falls with the distance from the origin."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return -x.square().sum(1)


def test_auc_is_one_for_rows_with_less_log_p_and_zero_for_rows_with_more() -> None:
    normal = torch.tensor([[3.0], [2.0], [2.5]])
    x = {"valid": normal, "test": normal, "left out": 9 * normal, "shuffled": normal}
    x |= {"pulled in": 0.1 * normal, "pushed out": 2 * normal}
    found = anomalies.judged(Far(), x)
    assert found["low"] == {"left out": 1, "shuffled": 0.5, "pulled in": 0, "pushed out": 1}
    assert found["far from the mean"]["pulled in"] == 1


def test_windows_of_one_photograph_are_in_the_same_half(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = []

    def record(one: torch.Tensor, other: torch.Tensor) -> float:
        halves.append((set(one[:, 0].tolist()), set(other[:, 0].tolist())))
        return 0.0

    monkeypatch.setattr(colorization, "energy_distance", record)
    photograph = torch.arange(6.0)[:, None, None].expand(6, 2, 3)
    assert colorization.floor(photograph, splits=5) == {"splits": 5, "mean": 0.0, "largest": 0.0}
    assert len(halves) == 5
    for one, other in halves:
        assert len(one) == len(other) == 3
        assert not one & other
