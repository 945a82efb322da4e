"""identity: eigenvalues that are measured in a basis are the best ones there, so that EKFAC is never further than KFAC

Claim: Let F be symmetric and U orthogonal with columns u_i. For every d, ||F - U diag(d) U'||^2 =
    sum_{i != j} (u_i'F u_j)^2 + sum_i (u_i'F u_i - d_i)^2: d_i = u_i'F u_i is the nearest matrix with these eigenvectors,
    and any other is further by exactly the squares of what its eigenvalues are off. With U = U_G (x) U_A of
    Kronecker factors, KFAC has d = c gamma (x) alpha and EKFAC the nearest d: ||F - KFAC||^2 = ||F - EKFAC||^2 + |c gamma (x)
    alpha - d|^2. For F a mean of g g', g the gradient of an (out, in) weight flattened row by row, d_jk is the mean of
    (u_j' (grad W) a_k)^2; flattened column by column it would be the basis U_A (x) U_G.
Function: funcscope.curvature.kfac_factors.ekfac_factors, funcscope.curvature.kfac_factors.kfac_factors
Size: F and d all symbols; U every rotation of the plane (all but the half turn, by tan of half the angle) and Kronecker
    products of two, so 2 x 2 weights; in the basis of U, where the sum is over entries, n = 2, 3, 4.
Assumptions: exact arithmetic; both have the same factors, and F is the second moment of the gradients that these come from.
Not covered: the distance to the Fisher information where labels are drawn; distances of inverses, which may be the other
    way round; cross terms of layers, which both leave out.
"""

import pytest
import sympy as sp
import torch
from torch import nn

from funcscope.core.criterion import classification
from funcscope.core.model import functional
from funcscope.core.objective import objective
from funcscope.curvature.kfac_factors import ekfac_factors, kfac_factors
from funcscope.curvature.rows import per_sample_gradients


def symmetric(n):
    return sp.Matrix(n, n, lambda i, j: sp.Symbol(f"f{min(i, j)}{max(i, j)}", real=True))


def rotation(name):
    """Of the plane, by twice the arc tangent of a symbol."""
    t = sp.Symbol(name, real=True)
    return sp.Matrix([[1 - t**2, -2 * t], [2 * t, 1 - t**2]]) / (1 + t**2)


def squares(A):
    return sum(x**2 for x in A)


def is_zero(x):
    return sp.expand(sp.numer(sp.together(x))) == 0


@pytest.mark.parametrize("n", [2, 3, 4])
def test_in_the_basis_the_distance_is_that_off_the_diagonal_and_that_of_the_eigenvalues(n):
    F, d = symmetric(n), sp.symbols(f"d0:{n}", real=True)
    diagonal = sp.diag(*F.diagonal())
    gap = squares(F - sp.diag(*d)) - squares(F - diagonal)
    assert sp.expand(gap - sum((F[i, i] - d[i]) ** 2 for i in range(n))) == 0
    assert sp.expand(squares(F - sp.diag(*d)) - sum((F[i, i] - d[i]) ** 2 for i in range(n))) != 0  # negative control


def test_a_rotation_changes_no_distance():
    F, U, d = symmetric(2), rotation("t"), sp.symbols("d0:2", real=True)
    assert (U.T * U).applyfunc(sp.cancel) == sp.eye(2)
    turned = U.T * F * U - sp.diag(*d)
    assert is_zero(squares(F - U * sp.diag(*d) * U.T) - squares(turned))
    assert not is_zero(squares(F - U.T * sp.diag(*d) * U) - squares(turned))  # negative control: the other way round


def test_kronecker_products_of_rotations_are_rotations_and_kfac_has_them_for_eigenvectors():
    U = sp.kronecker_product(rotation("s"), rotation("t"))
    assert (U.T * U).applyfunc(sp.cancel) == sp.eye(4)
    U_G, U_A = (sp.Matrix(2, 2, sp.symbols(f"{name}0:4")) for name in "uv")  # whatever they are
    gamma, alpha = sp.symbols("gamma0:2"), sp.symbols("alpha0:2")
    G, A = U_G * sp.diag(*gamma) * U_G.T, U_A * sp.diag(*alpha) * U_A.T
    basis, products = sp.kronecker_product(U_G, U_A), sp.diag(*(g * a for g in gamma for a in alpha))
    assert (sp.kronecker_product(G, A) - basis * products * basis.T).expand() == sp.zeros(4)
    assert (sp.kronecker_product(A, G) - basis * products * basis.T).expand() != sp.zeros(4)  # negative control


def test_measured_eigenvalues_are_mean_squares_of_turned_gradients_for_rows_that_are_flattened():
    U, A = rotation("s"), rotation("t")
    W = sp.Matrix(2, 2, sp.symbols("w0:4", real=True))
    flat = sp.Matrix(list(W))  # row by row
    basis, turned = sp.kronecker_product(U, A), U.T * W * A
    found = [(basis[:, i].T * flat * flat.T * basis[:, i])[0] for i in range(4)]
    assert all(is_zero(x - y**2) for x, y in zip(found, turned, strict=True))
    swapped = sp.kronecker_product(A, U)  # negative control: the basis for columns
    other = [(swapped[:, i].T * flat)[0] ** 2 for i in range(4)]
    assert not all(is_zero(x - y**2) for x, y in zip(other, turned, strict=True))


# Bridge: the shipped blocks in float64, beside the second moment of gradients that are multiplied out.


@pytest.mark.parametrize("num", [1, 6])
def test_shipped_ekfac_is_nearer_by_exactly_what_the_eigenvalues_of_kfac_are_off(num):
    model = nn.Linear(3, 2, bias=False, device="meta").to_empty(device="cpu").double()
    x = torch.cos(torch.arange(3.0 * num, dtype=torch.float64) ** 2).view(num, 3)
    loss = objective(functional(model), [(x, torch.arange(num) % 2)], classification)
    theta = torch.sin(torch.arange(6.0, dtype=torch.float64))
    rows = per_sample_gradients(loss, theta)
    exact, off, values = rows.T @ rows / num, [], []
    for make in (kfac_factors, ekfac_factors):
        made = make(loss, theta, labels="data")
        (product,) = (block.product for block in made.blocks.values())
        basis = torch.kron(product.g.eigen.vectors, product.a.eigen.vectors)
        values.append(product.eigenvalues)
        off.append(exact - torch.stack([made.matvec(column) for column in torch.eye(6).double()], 1))
        torch.testing.assert_close(exact - off[-1], basis * values[-1].flatten() @ basis.T)
    gap = off[0].square().sum() - off[1].square().sum()
    torch.testing.assert_close(gap, (values[0] - values[1]).square().sum(), rtol=1e-9, atol=1e-14)
    assert (float(gap) > 1e-4) == (num > 1)  # negative control: of one datum, KFAC is exact
