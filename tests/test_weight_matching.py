"""Units that change places. Oracles: the network itself, all orders one by one, a network's own permuted copy."""

from itertools import permutations

import pytest
import torch
from problems import bert, gpt2, gpt_neox, llama, qwen2, seeded, tokens
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import funcscope as fs
from funcscope.core.keys import uniform
from funcscope.weights import (
    Axis,
    PermutationGroup,
    function_distance,
    permutation_groups,
    permutation_index,
    weight_distance,
    weight_matching,
)

KEY = fs.key(0)


def grouped_llama():
    """Four heads of queries, two of keys and values."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40, max_position_embeddings=16, bos_token_id=1, eos_token_id=1, attention_bias=True, mlp_bias=True,
        )
    )  # fmt: skip


def mlp():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(),
        nn.Sequential(nn.Conv2d(5, 6, 2), nn.MaxPool2d(2)), nn.Flatten(), nn.Linear(24, 7), nn.BatchNorm1d(7), nn.GELU(),
        nn.Linear(7, 3),
    )  # fmt: skip


def settled(model):
    """With norms, statistics and biases that differ from unit to unit."""
    with torch.no_grad():
        for i, (name, x) in enumerate([*model.named_parameters(), *model.named_buffers()]):
            if x.is_floating_point() and x.ndim == 1 and "inv_freq" not in name:
                x.copy_(1 + 0.3 * fs.normal(fs.fold_in(KEY, i), x).clamp(-2, 2))
            elif x.is_floating_point() and x.ndim == 2 and float(x.std()) < 0.05:
                x.mul_(10)  # attention is as good as uniform where Hugging Face's weights begin
    return model


LANGUAGE = {"gpt2": gpt2, "llama": llama, "grouped": grouped_llama, "gpt_neox": gpt_neox, "qwen2": qwen2, "bert": bert}


def steps():
    """A linear layer at every step of a sequence, whose units are the last dimension where it is flattened."""
    act = nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), act, nn.Flatten(), nn.Linear(18, 5), act, nn.Linear(5, 2))


CHAINS = {"mlp": (mlp, (6, 3)), "cnn": (cnn, (6, 1, 7, 7)), "steps": (steps, (6, 3, 4))}


def case(name):
    """The net, the groups, and inputs."""
    make, shape = CHAINS.get(name, (LANGUAGE.get(name), None))
    model = settled(seeded(0, make).double().eval())
    inputs = tokens(1, 2, 7) if shape is None else fs.normal(fs.key(3), torch.zeros(shape, dtype=torch.float64))
    return fs.functional(model), permutation_groups(model), inputs


def shuffled(groups, key=KEY):
    return {g.name: uniform(fs.fold_in(key, g.name), torch.empty(g.num)).argsort() for g in groups}


def buffers_in(net, groups, orders):
    places = {axis.leaf: orders[g.name] for g in groups for axis in g.axes}
    return {name: x[places[name]] if name in places else x for name, x in net.buffers.items()}


@pytest.mark.parametrize("name", [*LANGUAGE, *CHAINS])
def test_a_permuted_network_is_the_same_function_and_is_matched_to_itself(name):
    net, groups, inputs = case(name)
    theta, orders = net.theta, shuffled(groups)
    index = permutation_index(net.layout, groups, orders)
    assert torch.equal(index.sort().values, torch.arange(net.layout.num))
    permuted, moved = theta[index], net.with_buffers(buffers_in(net, groups, orders))
    out = net.apply(net.params, inputs)
    assert_close(moved.apply(net.layout.unravel(permuted), inputs), out, rtol=1e-9, atol=1e-10)
    assert (permuted - theta).norm() > 0.1 * theta.norm()

    found = weight_matching(theta, permuted, net.layout, groups, key=KEY)
    assert torch.equal(found.permuted(permuted), theta)
    assert (found.distance, found.converged) == (0, True)
    assert found.distance_before > 0
    back = found.permuted_buffers(moved.buffers)
    assert all(torch.equal(back[each], x) for each, x in net.buffers.items())


@pytest.mark.parametrize("name", ["gpt2", "grouped", "cnn"])
def test_one_axis_alone_changes_the_function(name):
    net, groups, inputs = case(name)
    out = net.apply(net.params, inputs)
    for group in groups:
        one = [group._replace(axes=group.axes[:1])]
        index = permutation_index(net.layout, one, {group.name: torch.arange(group.num).roll(1)})
        assert not torch.allclose(net.apply(net.layout.unravel(net.theta[index]), inputs), out)


def test_groups_are_hidden_units_and_heads():
    names = {
        name: [(g.name.split(".")[-1] if g.name[-1].isalpha() else "queries", g.num) for g in case(name)[1]]
        for name in LANGUAGE
    }
    assert names["gpt2"] == 2 * [("mlp", 48)] + 2 * [("heads", 2)]
    assert names["llama"] == 2 * [("mlp", 20)] + 2 * [("queries", 2)]  # one head of keys, which stays
    assert names["grouped"] == 2 * [("mlp", 20)] + 2 * [("heads", 2), ("queries", 2), ("queries", 2)]
    gate, up, down = (axis for axis in case("llama")[1][0].axes)
    assert [axis.leaf.split(".")[-2] for axis in (gate, up, down)] == ["gate_proj", "up_proj", "down_proj"]
    assert [g.num for g in case("cnn")[1]] == [5, 6, 7]


def test_one_hidden_layer_is_matched_as_well_as_by_all_orders():
    model = seeded(0, lambda: nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))).double()
    layout, groups = fs.Layout.of(model), permutation_groups(model)
    for seed in range(5):
        one, other = (fs.normal(fs.fold_in(fs.key(seed), k), torch.zeros(layout.num).double()) for k in range(2))
        found = weight_matching(one, other, layout, groups, key=KEY)
        images = [
            other[permutation_index(layout, groups, {groups[0].name: torch.tensor(p)})] for p in permutations(range(5))
        ]
        assert_close(found.distance, float(min((one - x).norm() for x in images)))
        assert_close(found.cosine, float(max(one @ x for x in images) / one.norm() / other.norm()))
        assert found.distance <= found.distance_before


def test_the_line_to_a_permuted_copy_has_a_barrier_that_matching_takes_away():
    model = seeded(
        0, lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    ).double()
    net, groups = fs.functional(model), permutation_groups(model)
    x = fs.normal(fs.key(5), torch.zeros(40, 3).double())
    loss = fs.objective(net, [(x, (x[:, 0] * x[:, 1] > 0).long())], fs.classification)
    theta = net.theta
    for _ in range(150):
        theta = theta - 1.0 * torch.func.grad(loss)(theta)
    permuted = theta[permutation_index(net.layout, groups, shuffled(groups))]
    assert_close(loss(permuted), loss(theta))
    assert weight_distance(theta, permuted, net.layout).total_relative > 0.5
    assert function_distance(loss, theta, permuted).js < 1e-12
    before = float(loss((theta + permuted) / 2) - loss(theta))
    assert before > 0.05
    found = weight_matching(theta, permuted, net.layout, groups, key=KEY)
    line = fs.linear_path(loss, theta, found.permuted(permuted), num=5)
    assert_close(line.losses, torch.full_like(line.losses, float(loss(theta))), rtol=1e-12, atol=0)


def test_distances_never_grow_and_the_key_decides():
    net, groups, _ = case("grouped")
    other = fs.normal(fs.key(9), net.theta)
    found = weight_matching(net.theta, other, net.layout, groups, key=KEY)
    assert found.distance < found.distance_before
    assert_close(found.distance, float((net.theta - found.permuted(other)).norm()))
    again = weight_matching(net.theta, other, net.layout, groups, key=KEY)
    assert torch.equal(found.index, again.index)
    assert not weight_matching(net.theta, other, net.layout, groups, key=KEY, sweeps=1).converged


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Reversed(nn.Linear):
    def forward(self, x):
        return super().forward(x.flip(-1))


def tied(*layers):
    layers[-1].weight = layers[0].weight
    return layers


def broken(*layers):
    return seeded(0, lambda: permutation_groups(nn.Sequential(*layers[0]())))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: broken(lambda: [nn.Linear(2, 2), nn.GLU(), nn.Linear(1, 1)]), "GLU"),
        (lambda: broken(lambda: [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1, groups=2)]), "in groups"),
        (lambda: broken(lambda: [nn.Conv2d(2, 2, 1), nn.Flatten(), nn.Linear(7, 2)]), "takes 7 inputs"),
        (lambda: broken(lambda: [nn.Linear(3, 3), nn.Linear(2, 2)]), "Flatten"),
        (lambda: broken(lambda: [nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Linear(8, 2)]), "another dimension"),
        (lambda: broken(lambda: [nn.Linear(4, 8), nn.ReLU(), nn.Conv1d(8, 2, 1)]), "another dimension"),
        (lambda: broken(lambda: [nn.Linear(4, 8), nn.MaxPool1d(3, 1, 1), nn.Linear(8, 2)]), "another dimension"),
        (lambda: broken(lambda: [nn.Conv1d(4, 8, 1), nn.LayerNorm(8), nn.Linear(8, 2)]), "another dimension"),
        (lambda: broken(lambda: [nn.Conv1d(4, 2, 1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2)]), "one place"),
        (lambda: broken(lambda: [nn.Conv2d(1, 4, 1), nn.Flatten(1, 2), nn.Linear(8, 2)]), "Flatten"),
        (
            lambda: broken(lambda: [layer := nn.Linear(4, 4), nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2)]),
            "used twice",
        ),
        (lambda: broken(lambda: [nn.Linear(4, 4), norm := nn.BatchNorm1d(4), nn.Linear(4, 4), norm]), "used twice"),
        (lambda: broken(lambda: [each := nn.Sequential(nn.Linear(4, 4), nn.ReLU()), each]), "used twice"),
        (lambda: broken(lambda: tied(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))), "used twice"),
        (lambda: broken(lambda: [nn.Linear(4, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 2)]), "of its own"),
        (lambda: broken(lambda: [nn.Linear(4, 4), Reversed(4, 4), nn.Linear(4, 2)]), "Reversed"),
        (lambda: seeded(0, lambda: permutation_groups(nn.Linear(2, 2))), "not known"),
    ],
)
def test_units_that_are_not_known_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_groups_that_do_not_fit_are_refused():
    layout = seeded(0, lambda: fs.Layout.of(nn.Linear(2, 2, bias=False)))
    theta = torch.ones(4)
    for axes, says in (
        ((Axis("no", 0, torch.arange(2)[:, None]),), "no parameter"),
        ((Axis("weight", 0, torch.arange(2)[:, None]), Axis("weight", 1, torch.arange(2)[:, None])), "twice"),
        ((Axis("weight", 0, torch.arange(3)[:, None]),), "do not fit"),
    ):
        with pytest.raises(ValueError, match=says):
            weight_matching(theta, theta, layout, [PermutationGroup("g", axes)], key=KEY)
