"""identity: a patch to first order is off by the second order, and by nothing where the model is linear

Claim: For a metric M of class C^3 of a site's value a, and the step d from one pass to the other, the exact change is
    M(a + h d) - M(a) = h d.grad M(a) + h^2 d'H d / 2 + O(h^3): the slope at a is off by h^2 d'H d / 2 + O(h^3), and by
    nothing if M is affine in a. The slope at the other end is off by -h^2 d'H d / 2 + O(h^3), so that the direction matters;
    that in the middle by O(h^3), and the mean slope on the way by nothing.
Function: funcscope.mechanistic.patching.attribution_patching, funcscope.mechanistic.edge_attribution.edge_attribution
Size: every polynomial M of degree 4 in two coordinates, all coefficients, values and steps symbols.
Assumptions: exact arithmetic; one site is changed, what lies behind it is a function of it.
Not covered: rounding; how large h is: differences of real inputs are not small.
"""

import pytest
import sympy as sp
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import funcscope as fs
from funcscope.mechanistic.edge_attribution import edge_attribution, edge_patching
from funcscope.mechanistic.patching import activation_patching, attribution_patching

h, t, x, y, dx, dy = sp.symbols("h t x y dx dy")


def polynomial(degree):
    return sum(sp.Symbol(f"c{i}{j}") * x**i * y**j for i in range(degree + 1) for j in range(degree + 1 - i))


def moved(M, by):
    return M.subs({x: x + by * dx, y: y + by * dy}, simultaneous=True)


def slope(M):
    return dx * sp.diff(M, x) + dy * sp.diff(M, y)


def orders(expression):
    """Coefficients of 1, h, h^2, ..."""
    return sp.Poly(sp.expand(expression), h).all_coeffs()[::-1]


def test_the_error_is_of_second_order_and_that_of_the_other_end_its_negative():
    M = polynomial(4)
    change = moved(M, h) - M
    error = orders(change - h * slope(M))
    second = sp.expand(slope(slope(M)) / 2)
    assert error[:2] == [0, 0]
    assert sp.expand(error[2] - second) == 0
    assert second != 0  # negative control
    other = orders(change - h * moved(slope(M), h))
    assert other[:2] == [0, 0]
    assert sp.expand(other[2] + second) == 0
    middle = orders(change - h * moved(slope(M), h / 2))
    assert middle[:3] == [0, 0, 0]
    assert middle[3] != 0
    mean = sp.integrate(sp.expand(moved(slope(M), t * h)), (t, 0, 1))
    assert sp.expand(change - h * mean) == 0


def test_of_an_affine_metric_there_is_no_error():
    M = polynomial(1)
    assert sp.expand(moved(M, h) - M - h * slope(M)) == 0
    assert sp.expand(moved(x * y, h) - x * y - h * slope(x * y)) != 0  # negative control


# Bridge: the shipped estimates against the shipped exact patches.


def network(*, linear):
    """A GPT-2; linear: norms that divide by a constant, uniform attention, no nonlinearity."""
    changes = {"activation_function": "linear", "layer_norm_epsilon": 1e16} if linear else {}
    config = GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=9, n_positions=8, bos_token_id=1, eos_token_id=1, **changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.mul_(20 if param.ndim == 2 and "h." in name else 1)
            if linear and ".ln_" in name and name.endswith("weight"):
                param.mul_(1e8)
            if linear and name.endswith("c_attn.weight"):
                param[:, :16] = 0
    return fs.functional(model)


CLEAN, CORRUPT = torch.tensor([[3, 1, 2, 4]]), torch.tensor([[3, 7, 2, 4]])


def metric(logits):
    return logits[:, -1, 5]


def errors(net, size):
    """Of heads and of the edge into a value, where the embeddings of the two tokens are `size` apart."""
    weight = net.params["transformer.wte.weight"].clone()
    weight[7] = weight[1] + size * torch.cos(torch.arange(8.0, dtype=weight.dtype))
    params = {**net.params, "transformer.wte.weight": weight}
    task = (net, params, CLEAN, CORRUPT, metric)
    exact, first = (f(*task).changes for f in (activation_patching, attribution_patching))
    found = edge_attribution(*task, num_nodes=0)
    edges = edge_patching(*task, found.names)
    return exact, exact - first, edges, edges - found.samples


def test_shipped_errors_fall_by_4_where_the_step_is_halved():
    net = network(linear=False)
    (exact, whole, _, edges), (_, half, _, edges_half) = (errors(net, size) for size in (2e-3, 1e-3))
    assert exact.abs().max() > 1e-6
    for one, two in ((whole, half), (edges, edges_half)):
        assert float(one.norm() / two.norm()) == pytest.approx(4, rel=0.05)


def test_shipped_estimates_of_a_linear_network_are_exact():
    exact, error, edges, edge_error = errors(network(linear=True), 1.0)
    assert error.abs().max() < 1e-7 * exact.abs().max()
    assert edge_error.abs().max() < 1e-7 * edges.abs().max()
    exact, error, *_ = errors(network(linear=False), 1.0)
    assert error.abs().max() > 1e-2 * exact.abs().max()  # negative control
