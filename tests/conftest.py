"""Shared by all tests: a quiet transformers, reproducible examples, a global generator that nobody may touch."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from hypothesis import settings

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
settings.register_profile("house", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def global_generator_is_untouched():
    """Every random number of funcscope comes from a key."""
    before = torch.random.get_rng_state()
    yield
    if not _allowed_to_draw:
        assert torch.equal(before, torch.random.get_rng_state()), "the global generator was used"


_allowed_to_draw: list[str] = []
