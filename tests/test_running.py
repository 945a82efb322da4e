"""Running statistics that belong to their weights: on paths, planes and curves. Oracle: plain torch modules in float64."""

import copy
import inspect

import pytest
import torch
from problems import loss_of, seeded
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import funcscope as fs
from funcscope.landscape.states import States


def stacked():
    """Two batch norms in a row: the deeper one's statistics depend on what the first makes of its input."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def data(seed=0, n=24, *shape):
    return seeded(seed, lambda: (torch.randn(n, *(shape or (4,)), dtype=torch.float64), torch.randint(0, 3, (n,))))


BATCHES = [data(0), data(1)]


def trained(seed, steps=40):
    model = seeded(seed, stacked)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for step in range(steps):
        optimizer.zero_grad()
        x, y = BATCHES[step % 2]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def models():
    return trained(1), trained(2)


@pytest.fixture(scope="module")
def nets(models):
    return tuple(map(fs.functional, models))


@pytest.fixture(scope="module")
def loss(nets):
    return fs.objective(nets[0], BATCHES, fs.classification)


def value(model, batches=BATCHES):
    """The mean loss of a plain module in eval mode, over batches of one size."""
    model.eval()
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y)) for x, y in batches) / len(batches)


def between(models, t, statistics):
    """A plain module of interpolated weights: with interpolated buffers, or reset ones as SWA has them."""
    model = copy.deepcopy(models[0])
    with torch.no_grad():
        for own, a, b in zip(model.parameters(), *(m.parameters() for m in models), strict=True):
            own.copy_((1 - t) * a + t * b)
        for own, a, b in zip(model.buffers(), *(m.buffers() for m in models), strict=True):
            if own.is_floating_point():
                own.copy_((1 - t) * a + t * b)
    if statistics == "reestimate":
        update_bn(BATCHES, model)
    return model.eval()


def at(model, theta):
    """A copy of the module with these parameters."""
    model = copy.deepcopy(model)
    nn.utils.vector_to_parameters(theta, model.parameters())
    return model


# The statistics.


KINDS = {
    "1d": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "1d of sequences": (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(6, 3)), (2, 3)),
    "2d": (lambda: nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)), (1, 3, 3)),
    "3d": (
        lambda: nn.Sequential(nn.BatchNorm3d(2, affine=False), nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)),
        (2, 2, 2, 2),
    ),
    "some track nothing": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.BatchNorm1d(5)),
        (4,),
    ),
    "stacked": (stacked, (4,)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "keep"])
def test_statistics_are_those_that_update_bn_leaves(kind, attention):
    make, shape = KINDS[kind]
    model, batches = seeded(3, make).double(), [data(seed, 6, *shape) for seed in range(3)]
    net = fs.functional(model, attention=attention)
    loss, theta = fs.objective(net, batches, fs.classification), net.theta * 1.3
    before = {name: x.clone() for name, x in (*model.named_buffers(), *net.buffers.items())}
    found = fs.running_statistics(loss, theta)
    plain = at(model, theta)
    update_bn(batches, plain)
    expected = {name: x for name, x in plain.named_buffers() if x.is_floating_point()}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(found[name], x, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(x, before[name]) for name, x in (*model.named_buffers(), *net.buffers.items()))
    assert_close(float(loss.with_buffers(found)(theta)), value(plain, batches), rtol=1e-12, atol=1e-12)
    many = vmap(lambda row: fs.running_statistics(loss, row))(torch.stack([net.theta, theta]))
    for name, x in found.items():
        assert_close(many[name][1], x, rtol=1e-10, atol=1e-12)


def test_instance_norms_that_track_have_the_means_over_instances():
    model = nn.Sequential(nn.InstanceNorm2d(2, affine=True, track_running_stats=True, momentum=1.0)).double().eval()
    x, y = data(0, 4, 2, 3, 3)
    net = fs.functional(model, output=lambda out: out.flatten(1))
    found = fs.running_statistics(fs.objective(net, [(x, y)], fs.classification), net.theta)
    model.train()(x)
    assert_close(found, {"0.running_mean": model[0].running_mean, "0.running_var": model[0].running_var})


def test_batches_count_by_their_size():
    batches = [data(0, 3), data(1, 9)]
    loss = fs.objective(fs.functional(nn.BatchNorm1d(4).double()), batches, fs.classification)
    found = fs.running_statistics(loss, loss.net.theta)
    (x, _), (z, _) = batches
    assert_close(found["running_mean"], torch.cat([x, z]).mean(0))
    assert_close(found["running_var"], (3 * x.var(0) + 9 * z.var(0)) / 12)
    assert (found["running_var"] - (x.var(0) + z.var(0)) / 2).abs().min() > 1e-3  # negative control: batches alike


def test_statistics_that_cannot_be_estimated_are_named():
    loss = fs.objective(fs.functional(nn.BatchNorm1d(4).double()), [data(0, 1)], fs.classification)
    with pytest.raises(ValueError, match="larger batches"):
        fs.running_statistics(loss, loss.net.theta)

    class Own(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("running_mean", torch.ones(3))

        def forward(self, x):
            return super().forward(x) - self.running_mean

    loss = fs.objective(fs.functional(seeded(0, Own).double()), [data()], fs.classification)
    with pytest.raises(ValueError, match="interpolate"):
        fs.running_statistics(loss, loss.net.theta)


def test_a_net_with_other_buffers_is_that_net_by_every_road(models, nets):
    a, b = nets
    swapped = fs.objective(a.with_buffers(b.buffers), BATCHES, fs.classification)
    own = fs.objective(b, BATCHES, fs.classification)
    params = b.params
    assert float(swapped(params)) == float(own(params))
    assert abs(float(swapped.net.buffers["1.running_mean"][0] - a.buffers["1.running_mean"][0])) > 0
    assert float(swapped.at_leaves(lambda name, _: params[name])) == float(own(params))
    x = BATCHES[0][0]
    narrow = [fs.functional(copy.deepcopy(model).float()) for model in models]
    wide = [net.in_dtype(torch.float64) for net in (narrow[0].with_buffers(narrow[1].buffers), narrow[1])]
    assert torch.equal(*(net.apply(narrow[1].params, x) for net in wide))
    assert swapped.net.buffers["1.running_mean"].data_ptr() != b.buffers["1.running_mean"].data_ptr()
    with pytest.raises(ValueError, match="net"):
        a.with_buffers({"1.running_means": torch.zeros(8)})
    with pytest.raises(ValueError, match="shape"):
        a.with_buffers({"1.running_mean": torch.zeros(1)})


# Paths.


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("buffers", ["interpolate", "reestimate"])
def test_both_ends_are_their_own_nets_and_between_them_statistics_are_those_of_the_mode(
    models, nets, loss, buffers, chunk
):
    path = fs.linear_path(loss, *nets, num=5, buffers=buffers, chunk=chunk)
    expected = [value(models[0]), *(value(between(models, k / 4, buffers)) for k in (1, 2, 3)), value(models[1])]
    assert path.losses.tolist() == pytest.approx(expected, rel=1e-10)
    assert path.buffers == buffers == path.asdict()["buffers"]
    assert path.distance == pytest.approx(float((nets[0].theta - nets[1].theta).norm()), rel=1e-12)
    a = fs.linear_path(loss, nets[0].theta, nets[1], num=3, buffers=buffers, chunk=chunk)  # the loss's own theta
    if buffers == "interpolate":
        assert a.losses[-1] == path.losses[-1]
        assert a.losses[0] == path.losses[0]


def test_the_old_number_is_what_the_fixed_mode_gives_and_it_is_not_the_models(models, nets, loss):
    path = fs.linear_path(loss, nets[0].theta, nets[1].theta, num=3, buffers="fixed")
    other = at(models[0], nets[1].theta)
    assert path.losses[-1].item() == pytest.approx(value(other), rel=1e-12)
    assert path.losses[-1].item() > 2 * value(models[1])
    assert path.buffers == "fixed"
    given_nets = fs.linear_path(loss, *nets, num=3, buffers="fixed")
    assert torch.equal(given_nets.sums, path.sums)


def test_what_re_estimation_changes_at_the_ends_is_told_with_its_paired_error(models, nets, loss):
    path = fs.linear_path(loss, *nets, num=3, buffers="reestimate")
    reset = [between(models, t, "reestimate") for t in (0, 1)]
    for model, changed, own in zip(reset, (path.start_reestimation, path.end_reestimation), models, strict=True):
        with torch.no_grad():
            x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
            change = F.cross_entropy(model(x), y, reduction="none") - F.cross_entropy(own(x), y, reduction="none")
        assert float(changed.value) == pytest.approx(float(change.mean()), rel=1e-8)
        assert float(changed.stderr) == pytest.approx(float(change.std()) / len(y) ** 0.5, rel=1e-8)
    assert "start_reestimation" in path.asdict()
    bare = fs.linear_path(loss, nets[0].theta, nets[1].theta, num=3, buffers="reestimate")
    assert bare.losses[[0, -1]].tolist() == pytest.approx([value(model) for model in reset], rel=1e-10)
    assert bare.start_reestimation is None
    assert torch.equal(bare.sums[1], path.sums[1])
    assert (path.num_forwards, bare.num_forwards) == (3 + 2 + 3, 2 + 2 + 2)


@pytest.mark.parametrize("buffers", ["interpolate", "reestimate"])
@pytest.mark.parametrize("num", [4, 5])
def test_swapping_the_ends_mirrors_every_bit(nets, loss, buffers, num):
    there = fs.linear_path(loss, *nets, num=num, chunk=1, buffers=buffers)
    back = fs.linear_path(loss, *reversed(nets), num=num, chunk=1, buffers=buffers)
    other = fs.linear_path(fs.objective(nets[1], BATCHES, fs.classification), *nets, num=num, chunk=1, buffers=buffers)
    assert torch.equal(there.sums, back.sums.flip(0))
    assert torch.equal(there.sums, other.sums)  # whosever net carries the loss


def test_the_matrix_has_the_barriers_of_the_paths(models, nets, loss):
    third = fs.functional(trained(3))
    matrix = fs.barrier_matrix(loss, [*nets, third], num=5, buffers="reestimate")
    for i, j in ((0, 1), (0, 2), (1, 2)):
        ends = [(*nets, third)[k] for k in (i, j)]
        path = fs.linear_path(loss, *ends, num=5, buffers="reestimate")
        assert float(matrix.barrier_linear[i, j]) == float(path.barrier_linear.value)
    assert matrix.buffers == "reestimate" == matrix.asdict()["buffers"]
    assert matrix.num_forwards == 3 * 3 + 3 * 3 * 2
    assert fs.barrier_matrix(loss, nets, num=3).buffers == "interpolate"


def test_a_curve_is_measured_with_the_statistics_of_its_mode(models, nets, loss):
    m = (nets[0].theta + nets[1].theta) / 2 + 0.1 * fs.normal(fs.key(0), nets[0].theta)
    weights = [((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in (1 / 3, 2 / 3)]
    thetas = [a * nets[0].theta + c * m + b * nets[1].theta for a, c, b in weights]
    for buffers in ("interpolate", "reestimate"):
        path = fs.bezier_path(loss, nets[0], m, nets[1], num=4, buffers=buffers)
        expected = [value(models[0]), value(models[1])]
        for k, theta in enumerate(thetas):
            model = at(between(models, (k + 1) / 3, "interpolate"), theta)
            if buffers == "reestimate":
                update_bn(BATCHES, model)
            expected.insert(-1, value(model))
        assert path.losses.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("buffers", ["interpolate", "reestimate"])
def test_a_curve_is_trained_with_them_and_they_are_not_trained(models, nets, loss, buffers):
    """Oracle: value differences of plain modules; in train mode where statistics are re-estimated."""
    states = States.of(loss, buffers)
    ends = [states.end(net, "end") for net in nets]
    row, p = (ends[0].state + ends[1].state) / 2, len(nets[0].theta)
    middle = between(models, 0.5, "interpolate")

    def plain(theta):
        model = at(middle, theta)
        model.train(buffers == "reestimate")
        with torch.no_grad():
            return sum(float(F.cross_entropy(model(x), y)) for x, y in BATCHES) / 2

    slope = grad(states)(row)
    v, h = fs.rademacher(fs.key(1), row[:p]), 1e-6
    assert float(states(row)) == pytest.approx(plain(row[:p]), rel=1e-10)
    difference = (plain(row[:p] + h * v) - plain(row[:p] - h * v)) / (2 * h)
    assert float(slope[:p] @ v) == pytest.approx(difference, rel=1e-5)
    assert slope[p:].abs().sum() == 0
    found = fs.connect(loss, *nets, key=fs.key(0), steps=15, num=5, buffers=buffers)
    assert found.midpoint.shape == nets[0].theta.shape
    again = fs.bezier_path(loss, nets[0], found.midpoint, nets[1], num=5, buffers=buffers)
    assert_close(found.path.sums, again.sums, rtol=1e-9, atol=1e-9)
    assert found.path.losses[[0, -1]].tolist() == pytest.approx([value(model) for model in models], rel=1e-10)
    assert float(found.reduction.value) > 0


# What is refused.


def test_a_bare_theta_without_its_statistics_is_refused_with_the_remedy(nets, loss):
    other = loss.layout.unravel(nets[1].theta)
    for end in (nets[1].theta, other):
        with pytest.raises(ValueError, match=r"fs\.functional.*reestimate"):
            fs.linear_path(loss, nets[0], end)
        with pytest.raises(ValueError, match=r"fs\.functional"):
            fs.barrier_matrix(loss, [nets[0], end])
        with pytest.raises(ValueError, match=r"fs\.functional"):
            fs.connect(loss, end, nets[0], key=fs.key(0))
    assert fs.linear_path(loss, nets[0].params, nets[0].theta, num=3).is_connected
    with pytest.raises(ValueError, match="interpolate"):
        inspect.unwrap(States.of.__func__)(States, loss, "mean")


class Table(nn.Module):
    """A constant table and a counter beside the weights."""

    def __init__(self, scale):
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.register_buffer("table", scale * torch.ones(3, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, x):
        return self.linear(x) * self.table


def test_constants_must_be_the_same_at_both_ends_and_need_no_net():
    a, b, c = (fs.functional(seeded(i, lambda i=i: Table(1.0 + (i == 2)))) for i in range(3))
    loss = fs.objective(a, BATCHES, fs.classification)
    assert fs.linear_path(loss, a.theta, b.theta, num=3).buffers == "none"
    assert torch.equal(fs.linear_path(loss, a, b, num=3).sums, fs.linear_path(loss, a.theta, b.theta, num=3).sums)
    with pytest.raises(ValueError, match=r"`table`.*differs"):
        fs.linear_path(loss, a, c, num=3)
    with pytest.raises(ValueError, match="architecture"):
        fs.linear_path(loss, a, fs.functional(seeded(0, lambda: nn.Linear(4, 2))), num=3)
    with pytest.raises(ValueError, match="architecture"):
        fs.linear_path(loss, a, fs.functional(seeded(0, lambda: nn.Linear(4, 3).double())), num=3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bert"])
def test_transformers_keep_no_statistics_and_take_bare_thetas(name):
    loss = loss_of(name)
    path = fs.linear_path(loss, loss.net.theta, 1.01 * loss.net.theta, num=3)
    assert path.buffers == "none"
    assert torch.equal(fs.linear_path(loss, loss.net, loss.net, num=3).sums[0], path.sums[0])


def test_frozen_parameters_and_singular_vectors_belong_to_their_weights():
    heads = [fs.functional(seeded(i, stacked), trainable=lambda name: name.startswith("6")) for i in range(2)]
    with pytest.raises(ValueError, match=r'frozen.*trainable="all"'):
        fs.linear_path(fs.objective(heads[0], BATCHES, fs.classification), *heads)
    spectral = [seeded(i, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3).double())) for i in range(2)]
    a, b = map(fs.functional, spectral)
    loss = fs.objective(a, BATCHES, fs.classification)
    for end in (b, b.theta):
        with pytest.raises(ValueError, match="_u"):
            fs.linear_path(loss, a, end)


# Planes.


@pytest.mark.parametrize("chunk", [1, 3])
def test_planes_and_lines_re_estimate_at_every_point(models, nets, loss, chunk):
    theta, axes = nets[0].theta, torch.stack([nets[1].theta - nets[0].theta, fs.normal(fs.key(2), nets[0].theta)])
    plane = fs.loss_plane(loss, theta, axes, num=3, span=0.5, chunk=chunk, buffers="reestimate")
    lines = fs.loss_lines(loss, theta, axes, num=3, span=0.5, chunk=chunk, buffers="reestimate")
    for i, a in enumerate((-0.5, 0, 0.5)):
        for j, b in enumerate((-0.5, 0, 0.5)):
            model = at(models[0], theta + a * axes[0] + b * axes[1])
            update_bn(BATCHES, model)
            expected = pytest.approx(value(model), rel=1e-9)
            assert plane.grid_losses[i, j].item() == expected
            if b == 0:
                assert lines.losses[0, i].item() == expected
            if a == b == 0:
                assert plane.baseline_loss == lines.baseline_loss == expected
    assert plane.asdict()["buffers"] == lines.asdict()["buffers"] == "reestimate"
    assert plane.num_forwards == 2 * 11
    fixed = fs.loss_plane(loss, theta, axes, num=3, span=0.5, chunk=chunk)
    assert fixed.baseline_loss == pytest.approx(value(models[0]), rel=1e-10)
    assert fixed.buffers == "fixed"
    assert (fixed.grid_losses - plane.grid_losses).abs().max() > 0.1
    mlp = loss_of("mlp")
    plain = fs.loss_lines(mlp, mlp.net.theta, 0.1 * mlp.net.theta[None], num=2, buffers="reestimate")
    assert plain.buffers == "none"
    assert plain.num_forwards == 4
