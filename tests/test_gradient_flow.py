"""Flow, relative updates and spread of gradients: closed forms, autograd by numpy, groups left out by hand, and doors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import loss_of, seeded
from torch import nn
from torch.func import grad
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.standard_errors import jackknife_stderr
from funcscope.gradients import dispersion_of, gradient_dispersion, gradient_flow, gradient_pathology
from funcscope.gradients.left_out import forward_blocks

linear_loss = fs.custom(lambda out, y: out[:, 0] * y[:, 0])


def drawn(seed, *shape):
    return fs.normal(fs.key(seed), torch.zeros(shape, dtype=torch.float64))


class Blocks(nn.Module):
    """A chain of scalars y = x w_0 w_1 ..., registered in another order than that in which they are used."""

    def __init__(self, num):
        super().__init__()
        self.norm = nn.Linear(1, 1, bias=False)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(1, 1, bias=False)) for _ in range(num))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def chain(weights, rows=4, seed=0):
    net = fs.functional(seeded(0, lambda: Blocks(len(weights)).double()))
    data = 1 + drawn(seed, rows, 1).square(), torch.ones(rows, 1, dtype=torch.float64)
    theta = torch.tensor([1.0, *weights], dtype=torch.float64)
    return fs.objective(net, [data], linear_loss), theta


def test_a_chain_has_the_closed_form_in_the_order_of_use():
    """Of x w_0 w_1 ... the gradient by w_l is the product of the others: log rms_l = c - log w_l."""
    weights = [math.exp(k) for k in (0.0, 0.5, 1.0, 1.5)]
    loss, theta = chain(weights)
    flow = gradient_flow(loss, theta)
    assert flow.blocks == ["layers.0", "layers.1", "layers.2", "layers.3", "norm"]
    product = math.prod(weights) * float(loss.batches[0][0].mean())
    assert_close(flow.norm, product / torch.tensor([*weights, 1.0], dtype=torch.float64))
    assert float(flow.slope.value) == pytest.approx(-0.5)
    assert float(flow.slope.stderr) == pytest.approx(0, abs=1e-12)  # one factor for all blocks
    assert_close(flow.log_ratio[:3], torch.full((3,), 0.5 / math.log(10), dtype=torch.float64))
    assert flow.log_ratio[-1].isnan()
    assert not flow.interrupted.any()
    named = flow.asdict()
    assert {"mean_gradient_norm", "gradient_variance", "flow_interruptions"} <= named.keys()
    assert_close(torch.as_tensor(named["mean_gradient_norm"]), flow.rms)  # all groups are of one size


def test_errors_are_those_of_sequences_left_out_and_groups_are_micro_batches():
    """Oracle: autograd on the data without each sequence, and on each alone."""
    net = fs.functional(seeded(0, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()))
    x, y = drawn(2, 5, 3), torch.tensor([0, 1, 0, 1, 1])
    loss = fs.objective(net, [(x, y)], fs.classification)
    theta, flow = net.theta, gradient_flow(loss, net.theta, num_groups=5)
    spread = gradient_dispersion(loss, theta, num_groups=5, top=(0.3,))
    path = gradient_pathology(loss, theta, num_groups=5, learning_rate=0.1)
    sizes, parts = torch.tensor([16.0, 10.0], dtype=torch.float64), [slice(0, 16), slice(16, 26)]

    def gradient(rows):
        return grad(fs.objective(net, [(x[rows], y[rows])], fs.classification))(theta)

    def norms(g):
        return torch.stack([g[part].norm() for part in parts])

    places = torch.arange(5)
    alone = torch.stack([norms(gradient(places == i)) / sizes.sqrt() for i in range(5)])
    rest = [gradient(places != i) for i in range(5)]
    without = torch.stack([norms(g) for g in rest], 1)
    assert_close(flow.norm, norms(gradient(places >= 0)))
    assert_close(flow.mean_rms, alone.mean(0))
    assert_close(flow.variance_rms, alone.var(0))
    assert_close(flow.mean_rms_stderr, alone.std(0) / 5**0.5)
    variances = torch.stack([alone[places != i].var(0) for i in range(5)], 1)
    assert_close(flow.variance_stderr, jackknife_stderr(variances))
    assert_close(flow.norm_stderr, jackknife_stderr(without))
    slopes = ((without / sizes.sqrt()[:, None]).log() * torch.tensor([[-1.0], [1.0]])).sum(0)
    assert_close(flow.slope.stderr, jackknife_stderr(slopes))
    assert_close(flow.log_ratio_stderr[0], jackknife_stderr(slopes) / math.log(10))
    lengths = norms(theta)
    assert_close(path.update, 0.1 * flow.norm / lengths)
    assert_close(path.update_stderr, 0.1 * flow.norm_stderr / lengths)
    ginis = torch.stack([torch.stack([dispersion_of(g[part])[0] for part in parts]) for g in rest], 1)
    assert_close(spread.gini_stderr, jackknife_stderr(ginis))
    assert_close(path.dispersion, spread.gini)
    assert_close(path.dispersion_stderr, spread.gini_stderr)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "bert", "t5"])
def test_blocks_of_models_come_in_the_order_of_the_forward_pass(name):
    blocks = [*forward_blocks(loss_of(name), "layer")]
    numbered = [i for i, each in enumerate(blocks) if each[-1].isdigit()]
    assert blocks[0] == "embedding"
    assert numbered == [*range(numbered[0], numbered[-1] + 1)] or name == "t5"  # its encoder's norm stands between
    assert [blocks[i][-1] for i in numbered] == ["0", "1"] * (len(numbered) // 2)
    assert "norm" in blocks[numbered[-1] + 1] or "ln_f" in blocks[numbered[-1] + 1] or name == "bert"
    assert sorted(n for names in forward_blocks(loss_of(name), "layer").values() for n in names) == sorted(
        loss_of(name).layout.names
    )


@pytest.mark.parametrize("name", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_of_language_models_it_is_the_gradient_of_the_token_weighted_mean(name):
    loss = loss_of(name)
    theta = loss.net.theta
    flow = gradient_flow(loss, theta, by="tensor", num_groups=2)
    leaves = loss.layout.unravel(grad(loss)(theta))
    assert_close(flow.norm, torch.stack([leaves[each].norm() for each in flow.blocks]).double(), rtol=1e-6, atol=1e-12)
    assert_close(flow.rms, flow.norm / torch.tensor([leaves[each].numel() for each in flow.blocks]).sqrt())


def test_what_interrupts_the_flow_is_named_and_not_refused():
    loss, theta = chain([1.0, 1e-4, 1.0])
    flow = gradient_flow(loss, theta)
    assert flow.interrupted.tolist() == [True, True, False, False]  # ratios 1e-4, 1e4, 1
    assert gradient_flow(loss, theta, limit=5.0).interrupted.tolist() == [False] * 4
    dead = gradient_flow(loss, torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64))
    assert dead.interrupted.all()
    assert dead.slope.value.isnan()
    assert any("no gradient in layers.0" in note for note in dead.notes)
    broken = torch.tensor([1.0, 1.0, math.inf, 1.0], dtype=torch.float64)
    flow = gradient_flow(loss, broken)
    assert flow.interrupted.tolist() == [True, False, True, True]  # the gradient by the infinite weight is finite
    assert flow.num_nonfinite.tolist() == [1, 0, 1, 1]
    assert "The gradient is not finite in norm.weight, layers.0.0.weight, layers.2.0.weight" in flow.notes[0]
    path = gradient_pathology(loss, broken)
    assert path.exploding.tolist() == [True, False, True, True]
    assert any("not finite" in note for note in path.notes)
    assert gradient_dispersion(loss, broken).gini.isnan().tolist() == [True, False, True, True]


def test_a_single_sequence_has_no_errors():
    loss, theta = chain([1.0, 2.0], rows=1)
    for result in (gradient_flow(loss, theta), gradient_pathology(loss, theta), gradient_dispersion(loss, theta)):
        assert any("no error over sequences" in note for note in result.notes)
        named = {name: value for name, value in vars(result).items() if name.endswith("_stderr")}
        assert named
        assert all(value.isnan().all() for value in named.values())
    assert gradient_flow(loss, theta).slope.stderr.isnan()


@pytest.mark.parametrize("function", [gradient_flow, gradient_pathology, gradient_dispersion])
def test_doors(function):
    loss, theta = chain([1.0, 2.0])
    with pytest.raises(ValueError, match="`by` must be one of"):
        function(loss, theta, by="filter")
    with pytest.raises(ValueError, match="`num_groups` must be an integer of at least 2"):
        function(loss, theta, num_groups=1)
    wrong = {"gradient_flow": {"limit": 0.0}, "gradient_pathology": {"learning_rate": -1.0}}
    with pytest.raises(ValueError, match="must be a finite number"):
        function(loss, theta, **wrong.get(function.__name__, {"top": (1.5,)}))
    with pytest.raises(ValueError, match="shape"):
        function(loss, theta[:-1])


@pytest.mark.parametrize("rate", [1e-3, 1.0])
def test_the_documented_threshold_has_the_wrong_direction(rate):
    """Documented: vanishing where the gradient's norm is below 1e-7 lr. A step is lr times the gradient."""
    loss, _ = chain([1.0])
    at = torch.tensor([1.0, 1e-9], dtype=torch.float64)  # the gradient by the first of them is some 1e-9
    path, norm = gradient_pathology(loss, at, learning_rate=rate), gradient_flow(loss, at, by="tensor").norm[1]
    assert path.parameters[1] == "norm.weight"
    step = rate * float(norm) / 1.0
    assert step < 1e-7
    assert path.vanishing[1]
    documented = float(norm) < 1e-7 * rate
    assert documented == (rate == 1.0)  # with the smaller step it does not see it, with the larger it does


def test_the_direction_of_the_threshold():
    """Raising the learning rate makes the step healthy here, and the documented criterion call it vanishing."""
    loss, theta = chain([1.0])
    at = theta.clone()
    at[1] = 3e-7
    small, large = (gradient_pathology(loss, at, learning_rate=rate) for rate in (1e-3, 10.0))
    norm = float(gradient_flow(loss, at, by="tensor").norm[1])
    assert [bool(x.vanishing[1]) for x in (small, large)] == [True, False]
    assert [norm < 1e-7 * rate for rate in (1e-3, 10.0)] == [False, True]  # as documented


def test_a_step_that_is_given_and_what_is_zero():
    loss, theta = chain([1.0, 2.0])
    step = {name: torch.full_like(x, 3.0) for name, x in loss.layout.unravel(theta).items()}
    path = gradient_pathology(loss, theta, step=step, learning_rate=0.1)
    assert_close(path.parameter_update, torch.tensor([0.3, 0.15, 0.3], dtype=torch.float64))  # over 1, 2, 1
    assert path.num_exploding == 3
    assert path.update_stderr.isnan().all()
    assert not path.dispersion_stderr.isnan().any()
    flat = gradient_pathology(loss, theta, step=loss.layout.ravel(step), learning_rate=0.1)
    assert flat == path
    assert_close(path.angular_rate, torch.tensor([0.1, 0.025, 0.1], dtype=torch.float64))
    zero = gradient_pathology(loss, torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    assert zero.parameter_update[0].isnan()
    assert not zero.vanishing[0]
    assert any("layers.0.0.weight" in note for note in zero.notes)
    with pytest.raises(ValueError, match="`step`"):
        gradient_pathology(loss, theta, step=theta[:-1])


def test_units_without_gradient_are_rows_that_no_sequence_reaches():
    """A ReLU layer of four units: one never fires, one is not read, one fires for the first sequence alone."""
    model = seeded(0, lambda: nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1, bias=False)).double())
    net = fs.functional(model)
    x = torch.tensor([[3.0], [1.0], [0.5], [0.25]], dtype=torch.float64)
    loss = fs.objective(net, [(x, torch.ones(4, 1, dtype=torch.float64))], linear_loss)
    params = {
        "0.weight": torch.tensor([[1.0], [1.0], [1.0], [1.0]]),
        "0.bias": torch.tensor([0.0, -9.0, 0.0, -2.0]),
        "2.weight": torch.tensor([[1.0, 1.0, 0.0, 1.0]]),
    }
    path = gradient_pathology(loss, {name: value.double() for name, value in params.items()})
    dead = dict(zip(path.parameters, path.dead.tolist(), strict=True))
    assert dead["0.weight"] == 0.5
    assert dead["2.weight"] == 0
    assert math.isnan(dead["0.bias"])
    left = torch.tensor([0.75, 0.5, 0.5, 0.5], dtype=torch.float64)  # without the first sequence a third unit is dead
    assert_close(path.dead_stderr[path.parameters.index("0.weight")], jackknife_stderr(left))
    broken = gradient_pathology(loss, {name: value.double() * math.nan for name, value in params.items()})
    assert broken.dead.isnan().all()  # nan is not 0, and says nothing of units
    assert broken.dead_stderr.isnan().all()
    tables = gradient_pathology(loss_of("gpt2"), loss_of("gpt2").net.theta, num_groups=2)
    assert tables.dead[tables.parameters.index("transformer.wte.weight")].isnan()
    assert tables.dead[tables.parameters.index("transformer.h.0.mlp.c_fc.weight")] == 0


def test_the_radial_part_of_a_weight_in_front_of_a_norm_is_zero():
    model = seeded(
        0, lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 2)).double()
    )
    loss = fs.objective(fs.functional(model), [(drawn(1, 6, 3), torch.tensor([0, 1] * 3))], fs.classification)
    path = gradient_pathology(loss, loss.net.theta)
    radial = dict(zip(path.parameters, path.radial.tolist(), strict=True))
    assert radial["0.weight"] == pytest.approx(0, abs=1e-12)
    assert abs(radial["2.weight"]) > 1e-3
    g = loss.layout.unravel(grad(loss)(loss.net.theta))["2.weight"]
    w = loss.net.params["2.weight"]
    assert radial["2.weight"] == pytest.approx(float((g * w).sum() / g.norm() / w.norm()))


def numpy_dispersion(x, top):
    """Another way: all pairs, Lorenz's curve, and sums."""
    x = np.abs(x)
    gini = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    p = x / x.sum()
    entropy = -(p[p > 0] * np.log(p[p > 0])).sum() / np.log(len(x))
    mass = [np.sort(x)[::-1][: math.ceil(share * len(x) - 1e-9)].sum() / x.sum() for share in top]
    return [gini, (x**2).sum() ** 2 / (len(x) * (x**4).sum()), entropy, *mass]


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30).filter(lambda x: max(map(abs, x)) > 1e-3))
def test_dispersion_is_that_of_all_pairs(values):
    x, top = torch.tensor(values, dtype=torch.float64), (0.1, 0.5, 1.0)
    made = dispersion_of(x, top)
    assert_close(made, torch.tensor(numpy_dispersion(x.numpy(), top), dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert_close(dispersion_of(-7 * x.flip(0), top), made)
    assert 0 <= made[0] <= 1 - 1 / len(x) + 1e-12
    assert 1 / len(x) - 1e-12 <= made[1] <= 1 + 1e-12
    assert -1e-12 <= made[2] <= 1 + 1e-12
    assert made[-1] == pytest.approx(1)


def test_a_normal_vector_has_the_values_that_are_said():
    x, top = drawn(1, 200_000), (0.01, 0.05, 0.1, 0.25)
    gini, ratio, _, *mass = dispersion_of(x, top).tolist()
    assert gini == pytest.approx(math.sqrt(2) - 1, abs=3e-3)
    assert ratio == pytest.approx(1 / 3, rel=1e-2)
    loss, theta = chain([1.0])
    normal = gradient_dispersion(loss, theta, top=top).top_mass_normal
    assert_close(torch.tensor(mass, dtype=torch.float64), normal, rtol=0.02, atol=0)
    assert dispersion_of(torch.ones(5))[:3].tolist() == pytest.approx([0, 1, 1])
    assert dispersion_of(torch.tensor([0.0, 3.0]))[:3].tolist() == pytest.approx([0.5, 0.5, 0.0])
    assert dispersion_of(torch.zeros(3)).isnan().all()
    huge = dispersion_of(1e30 * drawn(2, 100).float(), (0.5,))  # its fourth powers overflow float32
    assert_close(huge, dispersion_of(drawn(2, 100).float(), (0.5,)), rtol=1e-5, atol=0)


def test_the_documented_entropy_exceeds_one_and_this_one_does_not():
    """Documented: 1e-10 is added to every p, which then do not add up to 1; over the logarithm of how many exceed 1e-10."""
    x = torch.cat([torch.ones(4, dtype=torch.float64), torch.full((200_000,), 1e-13, dtype=torch.float64)])
    p = x / x.sum()
    documented = -((p + 1e-10) * (p + 1e-10).log()).sum() / math.log(int((p > 1e-10).sum()))
    assert documented > 1
    entropy = float(dispersion_of(x)[2])
    assert 0 < entropy < 0.2
    assert entropy == pytest.approx(math.log(4) / math.log(len(x)), rel=1e-4)


class Sides(nn.Module):
    """Two weights, each for its half of the inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.first(x[:, :2]) + self.second(x[:, 2:])


def test_a_number_without_an_error_says_why():
    """All of the second weight's gradient is of one sequence: without it there is none."""
    net = fs.functional(seeded(0, lambda: Sides().double()))
    x = torch.tensor([[1.0, 2.0, 3.0, 1.0], [2.0, -1.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    loss = fs.objective(net, [(x, torch.ones(3, 1, dtype=torch.float64))], linear_loss)
    without = {gradient_flow: "first", gradient_dispersion: "second", gradient_pathology: "second"}  # a ratio is of two
    for function, name in without.items():
        result = function(loss, net.theta, by="tensor")
        note = f"no error, as a group of sequences has all there is of a gradient: {name}.weight."
        assert note in result.notes, function


def test_long_vectors_are_summed_up_in_parts(monkeypatch):
    x = drawn(5, 50)
    whole = dispersion_of(x, (0.1, 0.5))
    monkeypatch.setattr("funcscope.gradients.dispersion._AT_ONCE", 7)
    assert_close(dispersion_of(x, (0.1, 0.5)), whole)
