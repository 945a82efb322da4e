"""Random directions: their norms, their independence, and that they are the same however they are made."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import EVERY, loss_of, seeded
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

import funcscope as fs
from funcscope.core import directions as module
from funcscope.core.keys import BLOCK
from funcscope.core.leaf_rows import row_slices

NORMALIZE = st.sampled_from(["filter", "layer", "global"])
DISTRIBUTION = st.sampled_from(["normal", "rademacher"])


def blockwise(layout: fs.Layout, vector: torch.Tensor, by: str) -> torch.Tensor:
    """Oracle: the norm of every block, from the blocks themselves."""
    leaves = layout.unravel(vector)
    parts = layout.blocks(by).values()
    cut = [
        [(leaves[leaf].movedim(dim, 0)[part] if leaves[leaf].ndim else leaves[leaf]) for leaf, dim, part in p]
        for p in parts
    ]
    return torch.stack([torch.cat([piece.flatten() for piece in pieces]).norm() for pieces in cut])


class Anything(nn.Module):
    """Parameters of given shapes, some of them with rows of zeros."""

    def __init__(self, shapes, seed):
        super().__init__()
        for i, shape in enumerate(shapes):
            value = fs.normal(fs.fold_in(fs.key(seed), i), torch.zeros(shape, dtype=torch.float64))
            if i % 2 and value.ndim:
                value[0] = 0
            self.register_parameter(f"p{i}", nn.Parameter(value))


@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 999),
    distribution=DISTRIBUTION,
)
def test_group_norms_of_every_draw_are_those_of_theta(shapes, seed, distribution):
    net = fs.functional(seeded(0, lambda: Anything(shapes, seed)))
    theta = net.theta
    if not theta.any():
        return
    for normalize in ("filter", "layer"):
        dirs = fs.directions(net, key=fs.key(seed), num=2, normalize=normalize, distribution=distribution)
        for d in fs.stack(dirs):
            by = "filter" if normalize == "filter" else "layer"
            assert_close(blockwise(net.layout, d, by), blockwise(net.layout, theta, by))
            assert_close(d.norm(), theta.norm())
    for d in fs.directions(net, key=fs.key(seed), num=2, normalize="global", distribution=distribution):
        assert_close(d.dense().norm(), torch.ones((), dtype=torch.float64))
        assert d.norm == 1


class Long(nn.Module):
    """Leaves that are drawn in parts, whose borders are no multiples of anything; vectors and single rows among them."""

    def __init__(self):
        super().__init__()
        shapes = {
            "thin": (3, 200_001),
            "tall": (351, 2999),
            "row": (1, 40_001),
            "flat": (50_001,),
            "one": (),
            "odd": (7,),
        }
        for name, shape in shapes.items():
            value = fs.normal(fs.fold_in(fs.key(0), name), torch.zeros(shape))
            self.register_parameter(name, nn.Parameter(value))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
def test_long_leaves_have_the_same_bits_whole_in_parts_and_in_any_chunk(normalize, dtype):
    net = fs.functional(Long().to(dtype))
    dirs = fs.directions(net, key=fs.key(3), num=3, normalize=normalize)
    rows = fs.stack(dirs)
    assert any(len(row_slices(leaf)) > 1 for leaf in net.layout.leaves)
    for row, direction in zip(rows, dirs, strict=True):
        assert torch.equal(row, net.layout.ravel({leaf: direction.leaf(leaf) for leaf in net.layout.names}))
        assert torch.equal(row, fs.stack([direction])[0])


def backwards_where_it_begins_late(x, y):
    """A dot product whose order of summation depends on where its numbers lie, as that of BLAS does on some processors."""
    shift = (x.data_ptr() % 64 + y.data_ptr() % 64) // x.element_size()
    products = (x * y).roll(int(shift))
    return sum(products, products.new_zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_bit_depends_on_where_in_memory_the_numbers_lie(monkeypatch, dtype):
    values = fs.normal(fs.key(0), torch.zeros(301, dtype=dtype))
    memory = [torch.empty(400, dtype=dtype)[start : start + 301].copy_(values) for start in range(16)]
    monkeypatch.setattr(torch, "dot", backwards_where_it_begins_late)
    assert len({float(torch.dot(x, x)) for x in memory}) > 1  # the processor is one of those
    assert len({module.dot(x, y) for x in memory for y in memory[:3]}) == 1
    net = loss_of("cnn", dtype).net
    for normalize in ("layer", "global"):
        for direction in fs.directions(net, key=fs.key(3), num=2, normalize=normalize):
            leaves = {leaf: direction.leaf(leaf) for leaf in net.layout.names}
            assert torch.equal(fs.stack([direction])[0], net.layout.ravel(leaves))
        moved = torch.empty(net.layout.num + 3, dtype=dtype)[3:].copy_(net.theta)
        pair = (
            fs.directions(net, key=fs.key(3), num=1, normalize=normalize, base=net.layout.unravel(base))[0].dense()
            for base in (net.theta, moved)
        )
        assert torch.equal(*pair)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_a_direction_has_the_same_bits_whole_in_leaves_and_in_any_chunk(name, normalize, distribution):
    net = loss_of(name, torch.float32).net
    dirs = fs.directions(net, key=fs.key(3), num=3, normalize=normalize, distribution=distribution)
    rows = fs.stack(dirs)
    for row, direction in zip(rows, dirs, strict=True):
        leaves = {leaf: direction.leaf(leaf) for leaf in reversed(net.layout.names)}
        assert torch.equal(row, net.layout.ravel(leaves))
        assert torch.equal(row, fs.stack([direction])[0])
        assert torch.equal(row, direction.dense())
        assert_close(direction.norm, float(row.norm()), rtol=1e-5, atol=0)
    more = fs.directions(net, key=fs.key(3), num=5, normalize=normalize, distribution=distribution)
    assert torch.equal(fs.stack(more[1:3]), rows[1:])  # direction i does not depend on how many there are


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
def test_a_direction_in_float32_is_the_rounded_one_of_float64(name, normalize):
    wide, narrow = (loss_of(name, dtype).net for dtype in (torch.float64, torch.float32))
    make = {"key": fs.key(1), "num": 1, "normalize": normalize}
    wide_d, narrow_d = fs.directions(wide, **make)[0].dense(), fs.directions(narrow, **make)[0].dense()
    assert ((wide_d - narrow_d).abs() <= 4 * torch.finfo(torch.float32).eps * wide_d.abs()).all()


@given(normalize=NORMALIZE, distribution=DISTRIBUTION, seed=st.integers(0, 99))
def test_unit_norm_changes_one_scalar_only(normalize, distribution, seed):
    net = loss_of("mlp").net
    make = {"key": fs.key(seed), "num": 1, "normalize": normalize, "distribution": distribution}
    d, unit = (fs.directions(net, **make, unit_norm=u)[0] for u in (False, True))
    assert_close(unit.dense() * d.norm, d.dense())
    assert_close(float(unit.dense().norm()), 1.0)


@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
def test_vectors_may_stand_still(normalize):
    net = loss_of("mlp").net
    d = fs.directions(net, key=fs.key(0), num=1, normalize=normalize, zero_vectors=True)[0]
    assert not d.leaf("0.bias").any()
    assert not net.layout.unravel(d.dense())["2.bias"].any()
    moved = torch.cat([net.params[name].flatten() for name in ("0.weight", "2.weight")]).norm()
    assert_close(d.norm, 1.0 if normalize == "global" else float(moved))
    assert_close(float(d.dense().norm()), d.norm)


def test_the_norms_are_those_of_the_given_base():
    net = loss_of("mlp").net
    doubled = {name: 2 * value for name, value in net.params.items()}
    plain, twice = (fs.directions(net, key=fs.key(0), num=1, base=base)[0] for base in (None, doubled))
    assert_close(twice.dense(), 2 * plain.dense())


def documented_norms(model: nn.Module, span: float, num: int) -> list[float]:
    """The documented loop: norms are read from the weights as the last draw left them."""
    start = parameters_to_vector(model.parameters()).detach().clone()
    found = []
    with torch.no_grad():
        for _ in range(num):
            parts = []
            for p in model.parameters():
                z, rows = torch.randn_like(p), p.reshape(len(p), -1)
                scale = rows.norm(dim=1) / z.reshape(len(p), -1).norm(dim=1)
                parts.append((z.reshape(len(p), -1) * scale[:, None]).flatten())
            d = torch.cat(parts)
            found.append(float(d.norm() / start.norm()))
            vector_to_parameters(start + span * d, model.parameters())
    return found


def test_every_draw_is_independent_of_the_one_before_where_the_documented_loop_drifts():
    model = seeded(0, lambda: nn.Linear(30, 40, bias=False))
    net = fs.functional(model)
    ratio = [float(d.dense().norm() / net.theta.norm()) for d in fs.directions(net, key=fs.key(0), num=30)]
    assert max(abs(r - 1) for r in ratio) < 1e-5
    documented = seeded(1, lambda: documented_norms(model, 1.0, 30))
    assert documented[-1] > 3  # grows like sqrt(k) at span 1


@pytest.mark.slow
def test_directions_have_the_moments_of_independent_ones():
    net = loss_of("mlp").net
    rows = fs.stack(fs.directions(net, key=fs.key(5), num=4000, normalize="global"))
    second = rows.T @ rows / 4000 * net.layout.num
    off = second - torch.eye(net.layout.num, dtype=torch.float64)
    assert off.abs().max() < 6 / 4000**0.5  # E[d d'] = I / P
    assert abs(float((rows[::2] * rows[1::2]).sum(1).mean())) < 5 / (2000 * net.layout.num) ** 0.5


def test_bad_requests_get_one_clear_line():
    net = loss_of("mlp").net
    raw = inspect.unwrap(fs.directions)
    with pytest.raises(ValueError, match=r"`normalize` must be one of 'filter', 'layer', 'global', got 'row'"):
        raw(net, key=fs.key(0), num=1, normalize="row")
    with pytest.raises(ValueError, match=r"`distribution` must be one of 'normal', 'rademacher', got 'cauchy'"):
        raw(net, key=fs.key(0), num=1, distribution="cauchy")
    with pytest.raises(ValueError, match=r"`num` must be an integer of at least 1, got 0"):
        fs.directions(net, key=fs.key(0), num=0)
    zeros = {name: torch.zeros_like(value) for name, value in net.params.items()}
    with pytest.raises(ValueError, match=r"every parameter is 0.*use 'global'"):
        fs.directions(net, key=fs.key(0), num=1, base=zeros)


def test_a_draw_of_exactly_zero_still_has_a_direction():
    z = torch.tensor([[0.0], [2.0]])
    assert torch.equal(module._rescale(z, (1,), torch.tensor([[3.0], [4.0]])), torch.tensor([[3.0], [4.0]]))
    assert float(module._never_zero(torch.zeros(1))) == 1


def test_directions_of_different_kinds_may_be_stacked():
    net = loss_of("mlp").net
    mixed = [fs.directions(net, key=fs.key(i), num=1, normalize=kind)[0] for i, kind in enumerate(("filter", "global"))]
    assert_close(fs.stack(mixed), torch.stack([d.dense() for d in mixed]))
    assert_close(float(fs.stack(mixed)[1].norm()), 1.0)


def test_where_nothing_may_move_there_is_no_direction():
    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match="leaves nothing to move"):
        fs.directions(fs.functional(Vectors()), key=fs.key(0), num=1, normalize="global", zero_vectors=True)


@pytest.mark.parametrize("normalize", ["filter", "layer", "global"])
@pytest.mark.parametrize("part", [2**16, 100_000, 2**20])
def test_a_leaf_made_in_parts_is_the_leaf_made_whole(normalize, part, monkeypatch):
    """Rows of 96 end on a border of blocks every 2,048; rows of 1,001 never do before the leaf ends."""
    model = seeded(0, lambda: nn.Sequential(nn.Embedding(3000, 96), nn.Linear(1001, 300), nn.Linear(2, 1)))
    net = fs.functional(model)
    (whole,) = fs.directions(net, key=fs.key(1), num=1, normalize=normalize)
    wanted = {name: whole.leaf(name) for name in net.layout.names}
    monkeypatch.setattr("funcscope.core.directions.PART", part)
    (cut,) = fs.directions(net, key=fs.key(1), num=1, normalize=normalize)
    for name in net.layout.names:
        parts = list(cut.parts(name))
        assert [p.rows.start for p in parts] == [0, *(p.rows.stop for p in parts[:-1])]
        assert parts[-1].rows.stop == net.params[name].shape[0]
        assert len(parts) == 1 or part < 2**20
        assert_close(torch.cat([p.values for p in parts]), wanted[name], rtol=1e-6, atol=0)
    assert_close(cut.dense(), whole.dense(), rtol=1e-6, atol=0)


def test_parts_end_on_borders_of_blocks_where_they_can():
    net = fs.functional(seeded(0, lambda: nn.Embedding(30_000, 96)))
    slices = row_slices(net.layout.leaves[0])
    assert len(slices) > 1
    assert all(rows.stop * 96 % BLOCK == 0 for rows in slices[:-1])
    transposed = net.layout.leaves[0]._replace(filter_dim=1)
    assert row_slices(transposed) == [slice(0, 30_000)]  # a column needs all rows


def test_leaves_without_entries_are_no_obstacle():
    model = seeded(0, lambda: nn.Linear(3, 2))
    model.empty, model.none = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(0))
    loss = fs.objective(fs.functional(model), [(torch.ones(2, 3), torch.tensor([0, 1]))], fs.classification)
    dense, lazy = (
        fs.directional_losses(loss, loss.net.params, key=fs.key(0), n_samples=3, lazy=plan).losses
        for plan in (False, True)
    )
    assert_close(dense, lazy)
