"""Benchmarks: each can be imported and says what it does, so that a renamed part is noticed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import digits_flows, peer_models

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_it_imports_and_says_what_it_does(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_the_models_of_the_comparison_are_built() -> None:
    for configuration in peer_models.CONFIGURATIONS.values():
        flow, _ = configuration.build["nflib"]()
        assert sum(p.numel() for p in flow.parameters()) > 0


def test_the_models_of_the_digits_are_built() -> None:
    for name, row in digits_flows.ROWS.items():
        flow = row.make()
        assert flow.likelihood == "lower bound", name
