"""Few vectors in the place of a matrix, and Kronecker products: against the dense matrices, built with torch.kron."""

import pytest
import torch
from problems import relative

import funcscope as fs
from funcscope.linalg import Kronecker, SecondMoment, woodbury_power, woodbury_solve
from funcscope.linalg.low_rank import Scatter


def normal(name, *shape):
    return fs.normal(fs.fold_in(fs.key(0), name), torch.zeros(*shape, dtype=torch.float64))


def powered(matrix, p):
    """Oracle: by eigenvalues of the whole matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values**p @ vectors.T


@pytest.mark.parametrize("damping", [1e-4, 1.0])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_woodbury_solves_as_the_dense_inverse_does(rank, damping):
    root, y = normal("root", 7, rank), normal("y", 7, 2)
    inverse = torch.linalg.inv(root @ root.T + damping * torch.eye(7).double())
    assert relative(woodbury_solve(root, y, damping), inverse @ y) < 1e-9
    assert relative(woodbury_solve(root, y[:, 0], damping), inverse @ y[:, 0]) < 1e-9


@pytest.mark.parametrize("p", [-2.0, -1.0, -0.5, 0.25, 1.0, 3.0])
def test_woodbury_takes_any_power_where_the_document_returns_the_gradient(p):
    root, y = normal("root", 7, 3), normal("y", 7)
    dense = powered(root @ root.T + 0.3 * torch.eye(7).double(), p) @ y
    assert relative(woodbury_power(root, y, p, 0.3), dense) < 1e-10
    assert relative(y, dense) > 0.1  # E27: what the document has for powers other than 1 and -1


def test_woodbury_power_keeps_the_digits_of_small_eigenvalues():
    root, y = 1e-9 * normal("root", 5, 2), normal("y", 5)
    small = woodbury_power(root, y, 0.5, 1.0) - y
    assert relative(small, root @ (root.T @ y) / 2) < 1e-3 or float(small.norm()) < 1e-15


@pytest.mark.parametrize("call", [lambda d: woodbury_solve(torch.ones(2, 1), torch.ones(2), d),
                                  lambda d: woodbury_power(torch.ones(2, 1), torch.ones(2), 0.5, d)])  # fmt: skip
def test_woodbury_needs_a_damping(call):
    with pytest.raises(ValueError, match="`damping` must be"):
        call(0.0)


@pytest.mark.parametrize("num", [2, 5, 11])
def test_a_second_moment_is_the_same_from_rows_and_as_a_matrix_however_it_is_added_up(num):
    rows, x = normal("rows", num, 5), normal("x", 3, 5)
    dense = rows.T @ rows / 20
    whole, parts = SecondMoment.of(rows, 20), Scatter(5)
    for each in rows.split(2):
        parts.add(each)
    assert whole.is_dense == (num >= 5)
    for moment in (whole, parts.mean(20, rows.dtype)):
        torch.testing.assert_close(moment.dense(), dense)
        torch.testing.assert_close(moment.trace, dense.trace())
        torch.testing.assert_close(moment.diagonal(), dense.diagonal())
        torch.testing.assert_close(moment.times(x), x @ dense)
        damped = 2 * dense + 0.1 * torch.eye(5).double()
        torch.testing.assert_close(moment.power(x, -0.5, 0.1, scale=2.0), x @ powered(damped, -0.5))
        assert moment.logdet(0.1, scale=2.0) == pytest.approx(float(torch.logdet(damped)))


def product(rows_a, rows_g):
    return Kronecker(SecondMoment.of(normal("a", rows_a, 4), 3), SecondMoment.of(normal("g", rows_g, 3), 7), scale=1.7)


@pytest.mark.parametrize(("rows_a", "rows_g"), [(9, 9), (2, 9), (9, 2), (2, 1)])
def test_kronecker_products_are_those_of_torch_in_the_order_of_flatten(rows_a, rows_g):
    one, v = product(rows_a, rows_g), normal("v", 3, 4)
    dense = 1.7 * torch.kron(one.g.dense(), one.a.dense())
    other = 1.7 * torch.kron(one.a.dense(), one.g.dense())
    damped = dense + 0.2 * torch.eye(12).double()
    torch.testing.assert_close(one.times(v).flatten(), dense @ v.flatten())
    assert relative(one.times(v).flatten(), other @ v.flatten()) > 0.1  # negative control: A (x) G is for columns
    torch.testing.assert_close(one.trace, dense.trace())
    torch.testing.assert_close(one.diagonal().flatten(), dense.diagonal())
    for p in (-1.0, 0.5, 2.0):
        torch.testing.assert_close(one.power(v, p, 0.2).flatten(), powered(damped, p) @ v.flatten())
        torch.testing.assert_close(one.quadratic(v, p, 0.2), v.flatten() @ powered(damped, p) @ v.flatten())
    assert one.logdet(0.2) == pytest.approx(float(torch.logdet(damped)))
    top = torch.linalg.eigvalsh(dense)
    assert float(one.eigenvalues.max()) == pytest.approx(float(top[-1]))
    assert one.is_singular == (float(top[0]) < 1e-12)


@pytest.mark.parametrize(("rows_a", "rows_g"), [(9, 9), (2, 9), (2, 1)])
def test_pi_damping_is_that_of_the_factors(rows_a, rows_g):
    one, v, damping = product(rows_a, rows_g), normal("v", 3, 4), 0.2
    a, g = one.a.dense(), 1.7 * one.g.dense()
    pi = ((a.trace() / 4) / (g.trace() / 3)).sqrt()
    damped_a = a + pi * damping**0.5 * torch.eye(4).double()
    damped_g = g + damping**0.5 / pi * torch.eye(3).double()
    dense = torch.kron(damped_g, damped_a)
    torch.testing.assert_close(one.pi_power(v, -1.0, damping).flatten(), torch.linalg.solve(dense, v.flatten()))
    assert one.pi_logdet(damping) == pytest.approx(float(torch.logdet(dense)))
    assert relative(one.pi_power(v, -1.0, damping), one.power(v, -1.0, damping)) > 1e-3  # cross terms: another matrix
    # both factors have the same share of their mean eigenvalue: without pi they do not
    to_a, to_g = one.pi_shifts(damping)
    assert to_a / float(a.trace() / 4) == pytest.approx(to_g / float(g.trace() / 3))
    assert to_a * to_g == pytest.approx(damping)
