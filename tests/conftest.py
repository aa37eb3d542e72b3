"""What all tests share: one thread (two cores are shared by the workers) and fixed seeds."""

from __future__ import annotations

import os

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings
from tape import recorded  # noqa: F401  (a fixture for all)

settings.register_profile("course", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("course")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
