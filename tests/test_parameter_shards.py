"""Operators of parameters that are spread over several ranks are those of one rank; ranks that differ or fail are named."""

from __future__ import annotations

import parameter_shard_workers as workers
import pytest
from shard_workers import spread
from torch.testing import assert_close

EXACT = {"rtol": 1e-12, "atol": 1e-12}
HERE = "parameter_shard_workers"


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
def test_shares_of_parameters_are_one_rank(tmp_path, num):
    expected = {name: workers.numbers(workers.alone(name), None, name) for name in workers.models()}
    for out in spread(tmp_path, "everything", num, module=HERE):
        for name, values in expected.items():
            for key, value in values.items():
                assert_close(out[name][key], value, **EXACT, msg=lambda said, at=(name, key): f"{at}: {said}")
