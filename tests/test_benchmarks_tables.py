"""The benchmark of tables: what the models see, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import tables


def test_columns_that_have_no_density_or_no_news_are_left_out() -> None:
    x = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0)).double()
    x[:, 1] = x[:, 1].round()  # discrete
    x[:, 2] = x[:, 0] + 0.05 * x[:, 2]  # nearly the first
    x[:200, 3] = 1.5  # one value in a fifth of the rows
    x[7, 4] = 30.0  # far out
    kept, said = tables.columns(x)
    assert kept == [0, 5]
    words = ("values in 1000 rows", "correlated 0.99", "one value in 200 of", "30 standard")
    for line, word in zip(said, words, strict=True):
        assert word in line


def test_the_step_of_rounding_is_found() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).double()
    assert tables.step((100 * x).round() / 100).item() == pytest.approx(0.01)
    assert tables.step(x).item() == 0.0
    assert tables.common(torch.cat([torch.full((100,), 2.0), x[:99] * 0, x])).tolist() == [2.0]


@pytest.mark.parametrize("name", ["wine", "diabetes", "power_plant", "power_plant 100"])
def test_every_model_sees_the_same_standardised_rows(name: str) -> None:
    x, said = tables.prepared(name)
    tables.prepared.cache_clear()
    again, _ = tables.prepared(name)
    for split, rows in x.items():
        assert torch.equal(rows, again[split])
        assert (rows.dtype, rows.ndim) == (torch.float32, 2)
        if "100" not in name:
            # Noise has parted all values that were equal, up to the grid of float32.
            assert min(len(column.unique()) for column in rows.T) > 0.98 * len(rows)
    if "100" in name:
        whole, _ = tables.prepared("power_plant")
        assert torch.equal(x["train"], whole["train"][:100])
        assert torch.equal(x["test"], whole["test"])
        assert torch.equal(x["valid"], whole["valid"])
    else:
        torch.testing.assert_close(x["train"].std(0), torch.ones(x["train"].shape[1]))
    assert len(said) == {"wine": 0, "diabetes": 2}.get(name, 1)


def test_noise_is_of_one_step_of_the_published_values() -> None:
    from nflib import data

    d, (x, _) = data.load("power_plant"), tables.prepared("power_plant")
    published = d.x[:, 0].double() * d.std[0]
    noisy = x["train"][:, 0].double() * published.std()
    noise = noisy - published
    assert noise.abs().max() < 0.0052
    assert noise.std().item() == pytest.approx(0.01 / math.sqrt(12), rel=0.05)


@pytest.mark.parametrize("model", tables.FLOWS)
def test_the_models_are_built_and_exact(model: str) -> None:
    flow = tables.FLOWS[model](4)
    assert flow.likelihood == "exact"
    assert flow.eval().log_prob(torch.randn(3, 4)).shape == (3,)


def test_scikits_gaussian_is_torchs() -> None:
    x, _ = tables.prepared("power_plant 500")
    rows = x["train"].double()
    expected = torch.distributions.MultivariateNormal(rows.mean(0), rows.T.cov(correction=0))
    found = tables.baseline("power_plant 500")
    torch.testing.assert_close(found, expected.log_prob(x["test"].double()), atol=0.05, rtol=0.01)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FEW", tables.Budget(40, 20, 20, 0.9))
    out = tmp_path / "tables.json"
    trained, train = [], tables.train
    monkeypatch.setattr(tables, "train", lambda *given: trained.append(given) or train(*given))

    def run(seeds: int, *names: str) -> dict:
        chosen = ["--sets", "wine", "--models", "Gaussian", *names, "--seeds", str(seeds)]
        monkeypatch.setattr(sys, "argv", ["tables", *chosen, "--threads", "1", "--out", str(out)])
        tables.main()
        return json.loads(out.read_text())

    first = run(1)
    assert first["rows"]["wine"]["Gaussian"]["runs"][0]["gain"] == 0.0
    second = run(1, "MAF")
    searched = len(tables.RATES) + len(tables.DECAYS) - 1
    assert len(trained) == searched + 1
    assert second["rows"]["wine"]["Gaussian"] == first["rows"]["wine"]["Gaussian"]
    third = run(2, "MAF")
    assert len(trained) == searched + 2, "the search was made again, or a row"
    runs = third["rows"]["wine"]["MAF"]["runs"]
    assert runs[0] == second["rows"]["wine"]["MAF"]["runs"][0]
    assert [row["seed"] for row in runs] == [0, 1]
    assert runs[0]["test"] != runs[1]["test"]
    assert len(third["rows"]["wine"]["Gaussian"]["runs"]) == 1
    assert len(third["search"]["wine"]["MAF"]) == searched
    for row in runs:
        assert row["gain"] == pytest.approx(
            row["test"] - third["rows"]["wine"]["Gaussian"]["runs"][0]["test"]
        )
        assert row["updates"] == 40
        assert row["stopped_improving"] == (row["best_update"] < 40)
