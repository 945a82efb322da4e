"""Axes of planes: exact orthogonality and group norms, principal directions, projections."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CATALOGUE, loss_of, seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape import orthogonal
from funcscope.landscape.axes import Axes, eigenvector_axes, plane_directions, principal_directions, project

NORMALIZE = ("filter", "layer", "global")


def small() -> nn.Module:
    """26 parameters."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def groups(layout: fs.Layout, by) -> list[torch.Tensor]:
    """The coordinates of each block, from the layout's own views."""
    places = {leaf.name: torch.arange(leaf.offset, leaf.offset + leaf.numel).view(leaf.shape) for leaf in layout.leaves}
    cut = []
    for views in layout.blocks(by).values():
        pieces = [places[v.leaf].movedim(v.dim, 0)[v.slice] if places[v.leaf].ndim else places[v.leaf] for v in views]
        cut.append(torch.cat([piece.flatten() for piece in pieces]))
    return cut


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return abs(float(x.double() @ y.double() / (x.double().norm() * y.double().norm())))


def original(net: fs.Functional, key: fs.Key) -> torch.Tensor:
    """The documented way: a Gram-Schmidt over everything, then each group's norm."""
    one, two = fs.stack(fs.directions(net, key=key, num=2))
    two = two - (two @ one) / (one @ one) * one
    for group in groups(net.layout, "filter"):
        two[group] *= net.theta[group].norm() / two[group].norm()
    return torch.stack([one, two])


@pytest.mark.slow
def test_directions_are_orthogonal_with_exact_group_norms_over_1000_seeds_where_the_original_fails():
    net = fs.functional(seeded(0, small))
    assert net.layout.num == 26
    found = [plane_directions(net, key=fs.key(seed)) for seed in range(1000)]
    vectors = torch.stack([axes.vectors for axes in found]).double()
    eps = torch.finfo(torch.float32).eps
    one, two = vectors.unbind(1)
    assert ((one * two).sum(1).abs() / (one.norm(dim=1) * two.norm(dim=1))).max() < 2 * eps
    assert max(axes.cosine for axes in found) < 2 * eps
    for group in groups(net.layout, "filter"):
        assert (vectors[..., group].norm(dim=2) / net.theta[group].double().norm() - 1).abs().max() < 2 * eps
        assert (one[:, group] * two[:, group]).sum(1).abs().max() < 2 * eps * net.theta[group].norm() ** 2
    failed = sum(cosine(*original(net, fs.key(seed))) >= 0.05 for seed in range(40))
    assert 4 <= failed <= 36  # the original's own assertion


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_group_of_every_family_is_orthogonal_by_itself(name, normalize):
    net = loss_of(name, torch.float32).net
    num = 2 if name == "cnn" else 3  # with three, its bias of two coordinates would be joined by another group
    axes = plane_directions(net, key=fs.key(1), normalize=normalize, num=num)
    assert axes.cosine < 1e-7
    assert axes.vectors.dtype == torch.float32
    by = {"filter": "filter", "layer": "layer"}.get(normalize, lambda _: "all")
    theta, vectors, pooled = net.theta.double(), axes.vectors.double(), 0
    for group in groups(net.layout, by):
        size, part = 1.0 if normalize == "global" else float(theta[group].norm()), vectors[:, group]
        if len(group) < num:
            pooled += len(group) * (size > 0)
            continue
        off = part @ part.T / (size**2 or 1.0) - (size > 0) * torch.eye(num, dtype=torch.float64)
        assert off.abs().max() < 5e-7
    assert axes.settings["num_pooled"] == pooled
    norm = 1.0 if normalize == "global" else float(theta.norm())
    assert_close(axes.norms, torch.full((num,), norm, dtype=torch.float64), rtol=1e-6, atol=0)


def test_the_first_direction_is_that_of_directions():
    net = loss_of("gpt2").net
    for normalize in NORMALIZE:
        axes = plane_directions(net, key=fs.key(2), normalize=normalize)
        assert_close(axes.vectors[0], fs.directions(net, key=fs.key(2), num=1, normalize=normalize)[0].dense())
        again = plane_directions(net, key=fs.key(2), normalize=normalize)
        assert torch.equal(axes.vectors, again.vectors)


class Shapes(nn.Module):
    def __init__(self, *values):
        super().__init__()
        for i, value in enumerate(values):
            self.register_parameter(f"p{i}", nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))


def test_coordinates_alone_in_their_group_are_pooled_over_the_model():
    net = fs.functional(Shapes([[1.0], [-2.0], [0.0]], 3.0, [[1.0, 2.0, 2.0]]))
    axes = plane_directions(net, key=fs.key(0))
    assert axes.settings["num_pooled"] == 3  # the one that is 0 stands still
    assert not axes.vectors[:, 2].any()
    assert_close(axes.vectors[:, :4].norm(dim=1), torch.full((2,), 14.0, dtype=torch.float64).sqrt())
    assert_close(axes.vectors[:, 4:].norm(dim=1), torch.full((2,), 3.0, dtype=torch.float64))
    for part in (slice(0, 4), slice(4, 7)):
        assert abs(float(axes.vectors[0, part] @ axes.vectors[1, part])) < 1e-14


def test_a_pool_that_is_too_small_is_joined_by_the_smallest_group():
    net = fs.functional(Shapes(5.0, [[1.0, 2.0, 2.0, 0.0]], [[3.0, 4.0], [0.0, 0.0]]))
    axes = plane_directions(net, key=fs.key(0))
    assert axes.settings["num_pooled"] == 3
    pool = axes.vectors[:, [0, 5, 6]]
    assert_close(pool.norm(dim=1), torch.full((2,), 50.0, dtype=torch.float64).sqrt())
    assert abs(float(pool[0] @ pool[1])) < 1e-13
    assert_close(axes.vectors[:, 1:5].norm(dim=1), torch.full((2,), 3.0, dtype=torch.float64))
    assert not axes.vectors[:, 7:].any()
    assert axes.cosine < 1e-15


def test_fewer_coordinates_than_directions_is_an_error():
    for model in (Shapes(2.0), Shapes([[2.0], [0.0]])):
        with pytest.raises(ValueError, match="fewer than 2 coordinates may move"):
            plane_directions(fs.functional(model), key=fs.key(0))
    with pytest.raises(ValueError, match="fewer than 3 coordinates may move"):
        plane_directions(fs.functional(Shapes([2.0, 1.0])), key=fs.key(0), num=3, normalize="global")


@given(seed=st.integers(0, 999), normalize=st.sampled_from(NORMALIZE), columns=st.integers(1, 3))
def test_random_signs_in_small_groups_are_orthogonal_too(seed, normalize, columns):
    """Two draws of signs in a group of two are parallel half of the time."""
    net = fs.functional(seeded(seed, lambda: nn.Linear(columns, 5)))
    axes = plane_directions(net, key=fs.key(seed), normalize=normalize, distribution="rademacher")
    assert axes.cosine < 3e-7
    norm = 1.0 if normalize == "global" else float(net.theta.double().norm())
    assert_close(axes.norms.tolist(), [norm] * 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_blocks_change_nothing(normalize, monkeypatch):
    net = loss_of("cnn").net
    whole = plane_directions(net, key=fs.key(4), normalize=normalize)
    monkeypatch.setattr(orthogonal, "BLOCK", 7)
    assert_close(plane_directions(net, key=fs.key(4), normalize=normalize).vectors, whole.vectors)


def test_norms_are_those_of_the_given_base():
    net = loss_of("mlp").net
    doubled = {name: 2 * value for name, value in net.params.items()}
    one, two = (plane_directions(net, key=fs.key(0), base=base) for base in (None, doubled))
    assert_close(two.vectors, 2 * one.vectors)


def test_long_vectors_are_orthogonal_to_rounding():
    net = fs.functional(seeded(0, lambda: nn.Linear(1000, 3000, bias=False)))
    axes = plane_directions(net, key=fs.key(0), normalize="global")
    assert cosine(*axes.vectors) < 1e-9
    assert_close(axes.norms, torch.ones(2).double(), rtol=1e-7, atol=0)


def test_nearly_parallel_vectors_become_orthonormal_to_rounding():
    """One pass would leave the rounding of their products, magnified by 1 / sin^2 of the angle."""
    found = orthogonal.orthonormalise(torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1 + 1e-5]], dtype=torch.float64))
    assert (found @ found.T - torch.eye(2, dtype=torch.float64)).abs().max() < 1e-14


def trajectory(dtype=torch.float64, m=6, p=40, seed=0):
    steps = fs.normal(fs.key(seed), torch.zeros(m, p, dtype=torch.float64))
    return (steps * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)[:, None]).cumsum(0).to(dtype)


@pytest.mark.parametrize("center", ["last", "mean"])
def test_principal_directions_are_those_of_the_svd(center):
    thetas = trajectory()
    path = principal_directions(thetas, num=3, center=center)
    origin = thetas[-1] if center == "last" else thetas.mean(0)
    u, s, v = torch.linalg.svd(thetas - origin, full_matrices=False)
    assert_close(path.explained, s[:3] ** 2 / (s**2).sum())
    assert_close((path.axes.vectors @ v[:3].T).abs(), torch.eye(3, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert_close(path.coordinates.abs(), (u * s)[:, :3].abs(), rtol=1e-9, atol=1e-9)
    left = (thetas - origin) - path.coordinates @ path.axes.vectors
    assert_close(path.residuals, left.norm(dim=1))
    assert_close(path.origin, origin)
    assert path.axes.cosine < 1e-14
    assert (path.coordinates.gather(0, path.coordinates.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_path_in_a_plane_is_explained_by_it_and_has_no_third_axis():
    plane = fs.normal(fs.key(1), torch.zeros(2, 30, dtype=torch.float64))
    thetas = torch.tensor([[0.0, 1.0], [2.0, 1.0], [3.0, -1.0], [4.0, 4.0]], dtype=torch.float64) @ plane + 7.0
    path = principal_directions(thetas)
    assert_close(float(path.explained.sum()), 1.0)
    assert path.residuals.max() < 1e-12
    assert_close(path.origin + path.coordinates @ path.axes.vectors, thetas)
    with pytest.raises(ValueError, match="span 2 dimensions, fewer than `num` = 3"):
        principal_directions(thetas, num=3)


def test_blocks_of_coordinates_do_not_change_a_trajectory(monkeypatch):
    thetas = list(trajectory())
    whole = principal_directions(thetas)
    monkeypatch.setattr(orthogonal, "BLOCK", 7)
    cut = principal_directions(thetas)
    for field in ("coordinates", "explained", "residuals"):
        assert_close(getattr(cut, field), getattr(whole, field))
    assert_close(cut.axes.vectors, whole.axes.vectors)


def test_float32_checkpoints_far_from_0_keep_their_small_differences():
    """Differences are taken in float64: a Gram matrix of the points themselves would see nothing but their level."""
    thetas = (trajectory(seed=3) * 1e-3 + 100.0).float()
    path = principal_directions(thetas, num=2)
    s = torch.linalg.svdvals(thetas.double() - thetas[-1].double())
    assert_close(path.explained, s[:2] ** 2 / (s**2).sum(), rtol=1e-9, atol=0)
    assert path.axes.vectors.dtype == torch.float32
    assert path.axes.cosine < 1e-7


@given(seed=st.integers(0, 99), k=st.integers(1, 3))
def test_a_projection_is_the_closest_point_also_for_oblique_axes(seed, k):
    axes = fs.normal(fs.fold_in(fs.key(seed), 0), torch.zeros(k, 8, dtype=torch.float64)) * 3
    thetas = fs.normal(fs.fold_in(fs.key(seed), 1), torch.zeros(4, 8, dtype=torch.float64))
    origin = thetas[0] * 2
    coordinates, residuals = project(thetas, origin, axes)
    oracle = torch.linalg.lstsq(axes.T, (thetas - origin).T).solution.T
    assert_close(coordinates, oracle, rtol=1e-7, atol=1e-9)
    assert_close(residuals, (thetas - origin - oracle @ axes).norm(dim=1), rtol=1e-7, atol=1e-9)
    inside = origin + coordinates @ axes
    assert project(inside, origin, Axes(axes, ("x",) * k, "given"))[1].max() < 1e-12


def test_eigenvectors_become_axes():
    scale = torch.tensor([5.0, -4.0, 1.0, 0.5], dtype=torch.float64)
    pairs = fs.eigenpairs(lambda v: scale * v, scale, key=fs.key(0), num=2, vectors=True)
    axes = eigenvector_axes(pairs)
    assert axes.names == ("eigenvalue 5", "eigenvalue -4")
    assert axes.kind == "eigenvectors"
    assert_close(axes.vectors.abs(), torch.eye(4, dtype=torch.float64)[:2], atol=1e-6, rtol=0)
    assert eigenvector_axes(pairs, 1).names == ("eigenvalue -4",)
    with pytest.raises(ValueError, match="pass `vectors=True`"):
        eigenvector_axes(fs.eigenpairs(lambda v: scale * v, scale, key=fs.key(0), num=2))


def test_the_cosine_is_the_largest_of_all_pairs():
    vectors = torch.tensor([[1.0, 0, 0], [0, 2, 0], [3, 0, 4], [-6, 0, -8]], dtype=torch.float64)
    axes = Axes(vectors, ("a", "b", "c", "d"), "given")
    assert_close(axes.norms, torch.tensor([1.0, 2, 5, 10], dtype=torch.float64))
    assert axes.cosine == pytest.approx(1.0)
    assert axes.pick(0, 2).cosine == pytest.approx(0.6)
    assert axes.pick(0, 2).names == ("a", "c")
    assert axes.pick(3).cosine == 0.0


def test_bad_requests_get_one_clear_line():
    net = loss_of("mlp").net
    with pytest.raises(ValueError, match="`num` must be an integer of at least 1, got 0"):
        plane_directions(net, key=fs.key(0), num=0)
    with pytest.raises(ValueError, match="at least two flat vectors"):
        principal_directions(torch.zeros(1, 5))
    with pytest.raises(ValueError, match="flat vectors of one length"):
        principal_directions([torch.zeros(3), torch.zeros(4)])
    with pytest.raises(ValueError, match="span 0 dimensions"):
        principal_directions(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="not finite"):
        principal_directions(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="belong to one model"):
        inspect.unwrap(project)(torch.zeros(2, 5), torch.zeros(4), torch.eye(5)[:2])
    with pytest.raises(ValueError, match="linearly dependent"):
        project(torch.zeros(2, 5), torch.zeros(5), torch.ones(2, 5))


def test_diverged_checkpoints_are_named():
    thetas = [fs.normal(fs.fold_in(fs.key(0), i), torch.zeros(30)) for i in range(6)]
    for bad in (float("nan"), float("inf")):
        thetas[2][3] = bad
        with pytest.raises(ValueError, match=r"not finite in the points \[2\]: leave those checkpoints out"):
            fs.principal_directions(thetas)


def test_points_that_require_grad_and_points_that_are_no_vectors():
    thetas = [fs.normal(fs.fold_in(fs.key(0), i), torch.zeros(30)).requires_grad_() for i in range(4)]
    found = fs.principal_directions(thetas)
    assert not found.axes.vectors.requires_grad
    assert not fs.project(thetas, thetas[-1], found.axes)[0].requires_grad
    assert all(theta.requires_grad for theta in thetas)
    with pytest.raises(TypeError, match=r"parameter dicts become such with `net.layout.ravel"):
        inspect.unwrap(fs.principal_directions)([{"a": thetas[0]}, {"a": thetas[1]}])
    with pytest.raises(TypeError, match="must hold floating-point numbers"):
        inspect.unwrap(fs.principal_directions)(torch.ones(3, 4, dtype=torch.int64))


def test_eigenvalues_go_with_their_axes():
    scale = torch.tensor([3.0, 2.0, 1.0])
    pairs = fs.eigenpairs(lambda v: scale * v, scale, key=fs.key(0), num=3, vectors=True)
    for axes in (fs.eigenvector_axes(pairs, 2, 1), fs.eigenvector_axes(pairs).pick(2, 1)):
        assert axes.settings["eigenvalues"] == pytest.approx([1.0, 2.0])
        assert axes.names == ("eigenvalue 1", "eigenvalue 2")
