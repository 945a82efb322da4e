"""Shared by all tests: one thread per worker, a quiet transformers, reproducible examples, an untouched generator."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores: threads of one operation would only wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from hypothesis import settings

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def _global_generator_is_untouched():
    """Every random number comes from a key; models are built under `fork_rng` (tests/problems.py)."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "the global random generator was used"


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch):
    """Parallel test workers set a width of their own."""
    monkeypatch.delenv("COLUMNS", raising=False)
