"""Inner products, norms and steps of long vectors. Oracle: sums in float64."""

import pytest
import torch
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.vectors import PART, dot, inner, moved, norm


def test_long_vectors_have_their_norm():
    """torch's float32 norm of 17 million entries is off by 6e-4."""
    x = fs.normal(fs.key(0), torch.empty(17_000_000))
    exact = float(x.double().square().sum())
    assert abs(dot(x, x) / exact - 1) < 1e-7
    assert norm(x) == pytest.approx(exact**0.5, rel=1e-7)
    assert abs(dot(x[:10], x[:10]) / float(x[:10].double().square().sum()) - 1) < 1e-6


def test_the_norm_of_all_parameters_is_exact_in_half_precision():
    params = {"a": torch.full((3_000_000,), 1.0078125, dtype=torch.bfloat16), "b": torch.ones(5)}
    assert norm(params) == pytest.approx((3_000_000 * 1.0078125**2 + 5) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inner_products_and_steps_of_leaves_are_those_of_the_flat_vectors(dtype):
    shapes = {"long": (PART // 3 + 1, 4), "scalar": (), "empty": (0, 3), "turned": (5, 7)}
    a = {k: fs.normal(fs.fold_in(fs.key(1), k), torch.zeros(n, dtype=dtype)) for k, n in shapes.items()}
    b = {k: fs.normal(fs.fold_in(fs.key(2), k), torch.zeros(n, dtype=torch.float64)) for k, n in shapes.items()}
    a["turned"] = a["turned"].T.contiguous().T
    wide = torch.promote_types(dtype, torch.float32)
    products = [(a[k].double() * b[k].to(wide).double()).sum() for k in shapes]
    assert inner(a, b) == pytest.approx(float(sum(products)), rel=1e-5 if wide == torch.float32 else 1e-12)
    at = moved(a, b, -0.25)
    for k, x in at.items():
        assert x.dtype == dtype
        assert_close(x, (a[k].double() - 0.25 * b[k].to(dtype).double()).to(dtype))
