"""Kept derivatives of activation functions. Oracle: torch's own, differentiated one at a time."""

from functools import partial

import pytest
import torch
from problems import seeded
from torch import nn
from torch.func import grad, hessian, jvp, vmap
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.curvature import pointwise

KINDS = {"gelu": F.gelu, "tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
EXACT = {"rtol": 1e-11, "atol": 1e-13}


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.second(self.function(self.first(self.function(x))))


def loss_of(function, dtype=torch.float64):
    net = fs.functional(seeded(0, lambda: Layer(function)).to(dtype))
    x = seeded(1, lambda: 2 * torch.randn(5, 3, dtype=dtype))
    return fs.objective(net, [(x, torch.arange(5) % 2)], fs.classification)


def vectors(loss, num=3):
    return seeded(2, lambda: torch.randn(num, len(loss.net.theta), dtype=loss.net.theta.dtype))


@pytest.mark.parametrize("name", KINDS)
def test_both_derivatives_are_torchs(name):
    known = pointwise._KNOWN[F.silu if name == "silu" else F.gelu]
    at = known(**({"approximate": "tanh"} if name == "tanh" else {}))
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    slope = vmap(grad(KINDS[name]))
    first, second = at.derivatives(x)
    assert_close(first, slope(x), **EXACT)
    assert_close(second, jvp(slope, (x,), (torch.ones_like(x),))[1], **EXACT)
    assert_close(at.pull(x, x), x * first, **EXACT)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_dense_hessian_and_make_no_derivative_anew(name, grad_mode, monkeypatch):
    loss = loss_of(KINDS[name])
    dense = hessian(loss)(loss.net.theta)
    product = fs.hessian(loss, loss.net.theta)
    monkeypatch.setattr(pointwise._Slope, "apply", lambda *_: pytest.fail("a product made both derivatives again"))
    rows = vectors(loss)
    with torch.set_grad_enabled(grad_mode):
        assert_close(torch.stack([product(v) for v in rows]), rows @ dense, **EXACT)
        assert_close(vmap(product)(rows), rows @ dense, **EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_products_are_differentiated_in_their_vectors(name):
    loss = loss_of(KINDS[name])
    dense, product, (v, *_) = hessian(loss)(loss.net.theta), fs.hessian(loss, loss.net.theta), vectors(loss)
    assert_close(grad(lambda v: product(v) @ v)(v), 2 * dense @ v, **EXACT)
    leaf = v.clone().requires_grad_()
    (product(leaf) @ leaf).backward()
    assert_close(leaf.grad, 2 * dense @ v, **EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_taken(name):
    loss, wide = loss_of(KINDS[name], torch.bfloat16), loss_of(KINDS[name], torch.float32)
    (v, *_) = vectors(wide)
    ours = fs.hessian(loss, loss.net.theta)(v.bfloat16()).float()
    assert_close(ours, fs.hessian(wide, wide.net.theta)(v), rtol=0.1, atol=0.05)
