"""Three ranks of a matrix: closed forms, invariances, order."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.linalg.ranks import matrix_ranks


@pytest.mark.parametrize("num", [1, 3, 7])
def test_equal_singular_values_count_themselves(num):
    matrix = torch.zeros(8, 9, dtype=torch.float64)
    matrix[:num, :num] = 3 * torch.eye(num)
    assert_close(torch.tensor(matrix_ranks(matrix)), torch.full((3,), float(num)), rtol=1e-6, atol=0)


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 7), columns=st.integers(1, 7))
def test_formulas_order_and_invariances(seed, rows, columns):
    key = fs.key(seed)
    matrix = fs.normal(fs.fold_in(key, 0), torch.zeros(rows, columns, dtype=torch.float64))
    found = matrix_ranks(matrix)
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    squares = torch.linalg.eigvalsh(gram).clamp(min=0)
    assert found.participation_ratio == pytest.approx(float(gram.trace() ** 2 / gram.square().sum()))  # no SVD needed
    for value, weights in ((found.effective_rank, squares.sqrt()), (found.spectral_rank, squares)):
        p = (weights / weights.sum()).tolist()
        assert value == pytest.approx(math.exp(-sum(x * math.log(x) for x in p if x > 1e-300)), rel=1e-6)
    assert 1 - 1e-9 <= found.participation_ratio <= found.spectral_rank + 1e-9
    assert found.spectral_rank <= found.effective_rank + 1e-9 <= min(rows, columns) + 1e-6
    turn = torch.linalg.qr(fs.normal(fs.fold_in(key, 1), torch.zeros(rows, rows, dtype=torch.float64)))[0]
    for same in (matrix_ranks(turn @ matrix), matrix_ranks(1e-30 * matrix), matrix_ranks(matrix.T)):
        assert tuple(same) == pytest.approx(tuple(found), rel=1e-6)


def test_zeros_and_holes_are_undefined_and_vectors_refused():
    assert all(math.isnan(rank) for rank in matrix_ranks(torch.zeros(2, 2)))
    assert all(math.isnan(rank) for rank in matrix_ranks(torch.tensor([[1.0, float("inf")]])))
    for bad in (torch.ones(3), torch.ones(0, 3)):
        with pytest.raises(ValueError, match="must have two dimensions"):
            inspect.unwrap(matrix_ranks)(bad)
