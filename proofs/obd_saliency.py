"""identity: what setting a parameter to 0 adds to the loss at a minimum, and why its Fisher information alone does not say it

Claim: For a quadratic loss with gradient g and Hessian H at theta, setting theta_k = 0 changes it by -g_k theta_k + H_kk
    theta_k^2 / 2: at a minimum by H_kk theta_k^2 / 2, the saliency with F_kk for H_kk. Setting all k in S changes it by the
    sum of these and sum_{k < l in S} H_kl theta_k theta_l. In units c theta_k the diagonal is F_kk / c^2, and F_kk theta_k^2
    is what it was: the order by F alone can be made any other by a choice of units.
Function: funcscope.curvature.pruning_masks.obd_saliency
Size: P = 2, 3, 4 parameters, all symbols, every set S; an entry of H meets two parameters at most.
Assumptions: a quadratic loss (else to second order in theta_k, which is no small step); F for H.
Not covered: how far F is from H; parameters that are trained on after the others were set to 0 (Optimal brain surgeon).
"""

from itertools import combinations

import pytest
import sympy as sp
import torch

from funcscope.curvature.pruning_masks import obd_saliency

SIZES = pytest.mark.parametrize("P", [2, 3, 4])


def quadratic(P):
    """(theta, g, H, the change of the loss in a step)."""
    theta, g = (sp.Matrix(sp.symbols(f"{name}0:{P}", real=True)) for name in "tg")
    H = sp.Matrix(P, P, lambda i, j: sp.Symbol(f"h{min(i, j)}{max(i, j)}", real=True))
    return theta, g, H, lambda step: (g.T * step)[0] + (step.T * H * step)[0] / 2


def pruning(theta, chosen):
    return sp.Matrix([-x if k in chosen else 0 for k, x in enumerate(theta)])


@SIZES
def test_setting_parameters_to_zero_adds_saliencies_and_products_of_pairs(P):
    theta, g, H, change = quadratic(P)
    for size in range(1, P + 1):
        for chosen in combinations(range(P), size):
            alone = sum(H[k, k] * theta[k] ** 2 / 2 for k in chosen)
            slopes = sum(g[k] * theta[k] for k in chosen)
            crossed = sum(H[i, j] * theta[i] * theta[j] for i, j in combinations(chosen, 2))
            found = sp.expand(change(pruning(theta, chosen)))
            assert sp.expand(found - (alone - slopes + crossed)) == 0
            at_minimum = found.subs(dict.fromkeys(g, 0))
            assert (sp.expand(at_minimum - alone) == 0) == (size == 1)  # negative controls: pairs, and the factor
            assert sp.expand(at_minimum - 2 * alone) != 0


def test_units_change_the_diagonal_and_not_the_saliency():
    F, theta, c, moved = sp.symbols("F theta c moved", positive=True)
    loss = F * (moved / c - theta) ** 2 / 2  # a parameter c theta, whose minimum is at c theta
    rescaled = sp.diff(loss, moved, 2)
    assert sp.simplify(rescaled - F / c**2) == 0
    assert sp.simplify(rescaled * (c * theta) ** 2 - F * theta**2) == 0
    assert sp.simplify(rescaled - F) != 0  # negative control


# Bridge: the shipped saliency, beside the loss with each parameter set to 0.


def test_shipped_saliency_is_the_change_of_a_quadratic_loss():
    H = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.0, -1.0, 9.0]], dtype=torch.float64)
    minimum = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)
    changes = []
    for k in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[k] = -minimum[k]
        changes.append(step @ H @ step / 2)
    found = obd_saliency(H.diagonal(), minimum)
    torch.testing.assert_close(found, torch.stack(changes))
    assert found.argsort().tolist() != H.diagonal().argsort().tolist()  # negative control: F alone orders otherwise
