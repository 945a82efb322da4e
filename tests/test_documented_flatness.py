"""`compute_landscape_flatness` as the document calls it: its keys, its `-> float` losses, and the model left alone."""

import inspect
import math

import numpy as np
import pytest
import torch
from problems import seeded
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import funcscope as fs
from funcscope.documented import compute_landscape_flatness
from funcscope.landscape.flatness import flatness

LABELS = torch.tensor([0, 1, 2, 0, 1])


def network(dtype=torch.float32):
    return seeded(
        0, lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).to(dtype)
    ).train()


def probe(dtype=torch.float32):
    return seeded(1, lambda: torch.randn(5, 4)).to(dtype)


def loss_fn(model, x):
    return F.cross_entropy(model(x).double(), LABELS)


def as_documented(model, x) -> float:
    """`Function(model, probe) -> scalar loss`, a number, as the document's own."""
    with torch.no_grad():
        return loss_fn(model, x).item()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_documents_signature_and_keys():
    parameters = inspect.signature(compute_landscape_flatness).parameters
    assert list(parameters) == ["model", "probe", "loss_fn", "n_directions", "epsilon", "seed"]
    assert [parameters[name].default for name in ("n_directions", "epsilon", "seed")] == [50, 0.1, None]
    found = compute_landscape_flatness(network(), probe(), as_documented)
    assert sorted(found) == ["baseline_loss", "delta_losses", "epsilon"]
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert [found[name].shape for name in sorted(found)] == [(), (50,), ()]
    assert found["epsilon"] == np.float32(0.1)


def test_it_is_flatness_of_the_model_in_eval_mode():
    """Oracles: the pure call, and weights moved by hand in a copy."""
    model, x = network(torch.float64), probe(torch.float64)
    found = compute_landscape_flatness(model, x, as_documented, n_directions=4, epsilon=0.5, seed=3)
    loss = fs.objective(fs.functional(model), [(x, LABELS)], fs.classification)
    pure = flatness(loss, loss.net.theta, key=fs.key(3), n_directions=4, epsilon=0.5)
    assert_close(torch.from_numpy(found["delta_losses"]).double(), pure.delta_losses, rtol=1e-6, atol=1e-7)
    other = network(torch.float64).eval()
    before = nn.utils.parameters_to_vector(other.parameters()).detach()
    base = as_documented(other, x)
    assert math.isclose(float(found["baseline_loss"]), base, rel_tol=1e-6)
    rows = fs.stack(fs.directions(loss.net, key=fs.key(3), num=4, normalize="global"))
    for row, delta in zip(rows, found["delta_losses"], strict=True):
        assert math.isclose(float(row.norm()), 1.0)
        nn.utils.vector_to_parameters(before + 0.5 * row, other.parameters())
        assert math.isclose(as_documented(other, x) - base, float(delta), rel_tol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [lambda out: out, lambda out: out.detach(), lambda out: out.item(), lambda out: out.detach().numpy(), np.float64],
)
def test_a_loss_may_be_a_tensor_or_a_number(kind):
    model, x = network(), probe()
    wanted = compute_landscape_flatness(model, x, as_documented, n_directions=3, seed=1)
    found = compute_landscape_flatness(model, x, lambda m, x: kind(loss_fn(m, x).detach()), n_directions=3, seed=1)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_one_evaluation_per_direction_as_documented():
    calls = []
    compute_landscape_flatness(network(), probe(), lambda m, x: calls.append(1) or as_documented(m, x), n_directions=7)
    assert len(calls) == 2 + 7  # the baseline twice: a loss that differs is refused


def overwrites(model, x):
    loss = as_documented(model, x)
    for parameter in model.parameters():
        parameter.data.zero_()
    return loss


@pytest.mark.parametrize("scored", [as_documented, loss_fn, overwrites])
def test_the_model_is_left_alone_whatever_happens(scored):
    model = network()
    before = state(model)
    try:
        compute_landscape_flatness(model, probe(), scored, n_directions=2, seed=1)
        assert scored in (as_documented, loss_fn)
    except ValueError:
        assert scored is overwrites
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_at_a_minimum_deltas_are_small_and_frozen_parameters_stay():
    model = seeded(0, lambda: nn.Linear(3, 1))
    with torch.no_grad():
        model.weight.zero_()
    model.bias.requires_grad_(False)

    def bowl(model, x):
        assert torch.equal(model.bias, bias)
        return model.weight.square().sum()

    bias = model.bias.clone()
    found = compute_landscape_flatness(model, probe(), bowl, seed=0)
    assert found["baseline_loss"] == 0
    np.testing.assert_allclose(found["delta_losses"], 0.01, rtol=1e-5)


def test_the_differences_are_taken_in_float64():
    model = seeded(0, lambda: nn.Linear(3, 1)).double()
    found = compute_landscape_flatness(model, probe(), lambda m, x: 1 + 1e-9 * m.weight.square().sum().item(), seed=0)
    assert 0 < np.abs(found["delta_losses"]).max() < 1e-9
    assert len(set(found["delta_losses"].tolist())) > 40  # the same in float32 before the difference: all are 0


def test_what_cannot_be_scored_is_said():
    model, x = network(), probe()
    for missing in ((model, x), (model, x, None)):
        with pytest.raises(ValueError, match="`loss_fn` is missing: pass `loss_fn"):
            compute_landscape_flatness(*missing)
    with pytest.raises(ValueError, match="of a model from outside"):
        compute_landscape_flatness(model, x, lambda _, x: loss_fn(model, x).item())
    for scored in (lambda m, x: None, lambda m, x: m(x), lambda m, x: True, lambda m, x: np.zeros(2)):
        with pytest.raises(TypeError, match="`loss_fn` must return a scalar tensor"):
            compute_landscape_flatness(model, x, scored)
    with pytest.raises(ValueError, match="the loss at theta is nan"):
        compute_landscape_flatness(model, x, lambda m, x: math.nan)
    for wrong, says in (({"epsilon": 0.0}, "`epsilon`"), ({"n_directions": 0}, "`n_directions`")):
        with pytest.raises(ValueError, match=says):
            compute_landscape_flatness(model, x, as_documented, **wrong)


def test_a_loss_that_does_not_move_warns():
    other = network().eval()
    with pytest.warns(UserWarning, match="does `loss_fn` use the model it is given"):
        compute_landscape_flatness(network(), probe(), lambda m, x: loss_fn(other, x).item(), n_directions=2)
