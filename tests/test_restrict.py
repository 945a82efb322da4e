"""phi: the loss on lines and planes, dense or lazy, under every transform."""

import pytest
import torch
from problems import CATALOGUE, IN_FLOAT32, QUICK, dense_hessian, loss_of
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

import funcscope as fs


def rate(phi):
    return lambda a: jvp(phi, (a,), (torch.ones_like(a),))[1]


@pytest.mark.parametrize(
    ("name", "part"),
    [("gpt2", None), ("cnn", None), ("cnn", 24), ("mlp", None)]
    + [pytest.param(name, None, marks=pytest.mark.slow) for name in CATALOGUE if name not in QUICK]
    + [pytest.param(name, 24, marks=pytest.mark.slow) for name in ("gpt2", "qwen2")],
)
def test_lazy_and_dense_agree_with_the_definition_under_every_transform(name, part, monkeypatch):
    if part is not None:  # leaves are made a row or two at a time
        monkeypatch.setattr("funcscope.core.directions.PART", part)
    loss = loss_of(name)
    theta = loss.net.theta
    dirs = fs.directions(loss.net, key=fs.key(1), num=2)
    rows = fs.stack(dirs)
    a = torch.tensor([0.3, -0.2], dtype=torch.float64)
    wanted = loss(theta + a @ rows)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name in IN_FLOAT32 else {"rtol": 1e-9, "atol": 1e-11}
    for phi in (
        fs.restrict(loss, theta, dirs, lazy=False),
        fs.restrict(loss, theta, dirs, lazy=True),
        fs.restrict(loss, loss.net.params, dirs, lazy=True),
        fs.restrict(loss, theta, rows),
    ):
        assert_close(phi(a), wanted, **tolerance)
        assert_close(grad(phi)(a), rows @ grad(loss)(theta + a @ rows), **tolerance)
        assert_close(vmap(phi)(torch.stack([a, 2 * a])), torch.stack([phi(a), phi(2 * a)]), **tolerance)
    hd = jvp(grad(loss), (theta,), (rows[0],))[1]
    zero = torch.zeros((), dtype=torch.float64)
    for lazy in (True, False):
        line = fs.restrict(loss, theta, dirs[0], lazy=lazy)
        assert_close(rate(line)(zero), rows[0] @ grad(loss)(theta), **tolerance)
        assert_close(rate(rate(line))(zero), rows[0] @ hd, rtol=1e-4, atol=1e-6)
        assert_close(line(0.3), line(zero + 0.3), **tolerance)


def test_third_derivatives_along_a_line_are_right():
    """Oracle: differences of the dense Hessian."""
    loss = loss_of("mlp")
    theta, d = loss.net.theta, fs.directions(loss.net, key=fs.key(1), num=1)[0]
    phi = fs.restrict(loss, theta, d)
    zero, step, row = torch.zeros((), dtype=torch.float64), 1e-4, d.dense()
    ends = [row @ dense_hessian(loss, theta + sign * step * row) @ row for sign in (1, -1)]
    assert_close(rate(rate(rate(phi)))(zero), (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_lazy_vmap_draws_each_leaf_once():
    loss = loss_of("gpt2", torch.float32)
    direction = fs.directions(loss.net, key=fs.key(1), num=1)[0]

    class Counting:
        asked = 0

        def parts(self, name):
            self.asked += 1
            return direction.parts(name)

    counting = Counting()
    vmap(fs.restrict(loss, loss.net.params, counting, lazy=True))(torch.linspace(-1, 1, 5))
    assert counting.asked == len(loss.batches) * len(loss.layout.names)


def test_lazy_by_size(monkeypatch):
    loss = loss_of("mlp")
    dirs = fs.directions(loss.net, key=fs.key(1), num=2)
    monkeypatch.setattr("funcscope.core.restrict.LAZY_ABOVE", 2 * loss.layout.num - 1)
    asked = []
    monkeypatch.setattr(type(loss), "at_leaves", lambda self, leaf: asked.append(1) or torch.zeros(()))
    fs.restrict(loss, loss.net.theta, dirs)(torch.zeros(2, dtype=torch.float64))
    assert asked
    fs.restrict(loss, loss.net.theta, dirs[:1])(torch.zeros(1, dtype=torch.float64))
    assert len(asked) == 1


def test_a_plane_by_vmap_over_the_grid():
    loss = loss_of("mlp")
    dirs = fs.directions(loss.net, key=fs.key(1), num=2)
    points = fs.grid(3, span=0.5, dtype=torch.float64)
    plane = vmap(fs.restrict(loss, loss.net.theta, dirs), chunk_size=4)(points).reshape(3, 3)
    rows = fs.stack(dirs)
    for i, a in enumerate((-0.5, 0.0, 0.5)):
        for j, b in enumerate((-0.5, 0.0, 0.5)):
            assert_close(plane[i, j], loss(loss.net.theta + a * rows[0] + b * rows[1]))


@pytest.mark.parametrize("lazy", [True, False])
def test_coefficients_may_be_numbers_of_any_kind(lazy):
    loss = loss_of("mlp", torch.float32)
    dirs = fs.directions(loss.net, key=fs.key(1), num=2)
    line, plane = (fs.restrict(loss, loss.net.theta, d, lazy=lazy) for d in (dirs[0], dirs))
    assert_close(line(1), line(torch.tensor(1.0, dtype=torch.float64)), rtol=1e-6, atol=0)
    wide = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert_close(plane(wide), plane(wide.float()), rtol=1e-6, atol=0)


def test_bad_requests_get_one_clear_line():
    loss = loss_of("mlp")
    theta = loss.net.theta
    with pytest.raises(ValueError, match="not a dense tensor"):
        fs.restrict(loss, theta, theta, lazy=True)
    with pytest.raises(ValueError, match=r"`dirs` must be a flat vector of shape \(51,\), got \(3,\)"):
        fs.restrict(loss, theta, torch.zeros(3))
    with pytest.raises(ValueError, match="`span` must be a finite number above 0, got -1"):
        fs.grid(3, span=-1.0)
    with pytest.raises(ValueError, match="`num` must be an integer of at least 2, got 1"):
        fs.grid(1, span=1.0)
