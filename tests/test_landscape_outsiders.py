"""Other people's libraries as oracles of planes and paths: landscaper and loss-landscapes (bench/install_peers.sh).

bench/landscape_peers.py calls them and says where their points lie; what is wrong in their numbers is shown here, too.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import gpt2, seeded, tokens
from torch.nn.functional import cross_entropy

import funcscope as fs
from funcscope.landscape.axes import plane_directions
from funcscope.landscape.path import linear_path
from funcscope.landscape.planes import loss_plane

pytestmark = [pytest.mark.outsider, pytest.mark.filterwarnings("ignore")]

NUM, SPAN = 5, 0.3


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return pytest.importorskip("landscape_peers")


@pytest.fixture
def landscaper(peers):
    if "landscaper" not in peers.installed():
        pytest.skip("landscaper is not installed: `sh bench/install_peers.sh VENV`")
    return peers.landscaper()


@pytest.fixture
def loss_landscapes():
    return pytest.importorskip("loss_landscapes", reason="not installed: `sh bench/install_peers.sh VENV`")


class Problem:
    """A GPT-2 in float64 with its loss as both sides take it; biases as they come (0), or not."""

    def __init__(self, biases=True, seed=0):
        self.model = seeded(seed, gpt2).double().eval()
        if biases:
            with torch.no_grad():
                for i, param in enumerate(self.model.parameters()):
                    param.add_(0.1 * torch.sin(1 + i + torch.arange(param.numel())).view(param.shape))
        self.ids = tokens(3, 3, 6)["input_ids"]
        self.net = fs.functional(self.model)
        self.loss = fs.objective(self.net, {"input_ids": self.ids}, fs.causal_lm)

    def scalar(self, model):
        with torch.no_grad():
            logits = model(self.ids).logits[:, :-1].flatten(0, 1)
            return float(cross_entropy(logits, self.ids[:, 1:].flatten()))

    def ours(self, vectors, num, span, **options):
        return loss_plane(self.loss, self.net.params, vectors, num=num, span=span, **options).grid_losses

    def steps(self, peers, steps, num):
        """Our losses at -(num - 1) / 2, ..., (num - 1) / 2 of a peer's steps."""
        return self.ours(torch.stack([peers.flat(self.net, parts) for parts in steps]), num, (num - 1) / 2)

    def axes(self, peers):
        axes = plane_directions(self.net, key=fs.key(0))
        return axes, [peers.parts_of(self.net, row) for row in axes.vectors]


def off(found, wanted):
    return (torch.as_tensor(found) - torch.as_tensor(wanted)).abs()


def spread(losses):
    return float(losses.max() - losses.min())


def test_plane_is_that_of_a_loop_over_weights_written_in_place(peers):
    problem = Problem()
    axes, dirs = problem.axes(peers)
    points = fs.grid(NUM, span=SPAN, dtype=torch.float64)
    theirs = peers.plane_by_loop(problem.model, problem.scalar, dirs, points).view(NUM, NUM)
    for chunk in (None, 1, 7):
        assert float(off(problem.ours(axes, NUM, SPAN, chunk=chunk), theirs).max()) < 1e-12
    assert float(off(problem.ours(axes, NUM, SPAN).T, theirs).max()) > 1e-4  # negative control: the axes are told apart


def test_plane_is_that_of_landscaper_but_for_its_noise(peers, landscaper):
    problem = Problem()
    _, dirs = problem.axes(peers)
    before = copy.deepcopy(problem.model.state_dict())
    theirs = peers.plane_by_landscaper(problem.model, problem.scalar, dirs, NUM, SPAN)
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())
    steps = peers.steps_of_landscaper(problem.model, dirs, NUM, SPAN)
    ours = problem.steps(peers, steps, NUM)
    difference, largest = off(theirs, ours).flatten(), int(ours.argmax())
    others = torch.arange(NUM**2) != largest
    assert float(difference[others].max()) < 1e-10
    assert float(difference[largest]) > 1e-6 * spread(ours)  # it adds random noise to the largest loss


def test_landscaper_rescales_directions_and_steps(peers, landscaper):
    problem = Problem()
    axes, dirs = problem.axes(peers)
    steps = peers.steps_of_landscaper(problem.model, dirs, NUM, SPAN)
    # every tensor gets the root of its size as norm, whatever it was: a plane of eigenvectors is another one
    assert abs(peers.cosine(steps[0], dirs[0])) < 0.999
    reach = float(peers.flat(problem.net, steps[0]).norm()) * (NUM // 2) / float(problem.net.theta.norm())
    assert reach == pytest.approx(SPAN * (NUM // 2) / (NUM / 2), rel=1e-5)  # it returns coordinates up to SPAN
    assert abs(peers.cosine(*dirs)) < 1e-12
    with peers.seeded(0):
        own = landscaper.utils.generate_random_orthogonal_directions(problem.model, 2)
    assert abs(peers.cosine(*own)) > 0.9  # "orthogonal"
    assert axes.cosine < 1e-12


def test_landscaper_hides_what_is_not_finite(peers, landscaper):
    problem = Problem()
    axes, dirs = problem.axes(peers)
    highest = problem.scalar(problem.model)

    def overflowing(model):
        loss = problem.scalar(model)
        return loss if loss < highest else float("inf")

    assert np.isinf(peers.plane_by_loop(problem.model, overflowing, dirs, fs.grid(NUM, span=SPAN))).any()
    assert np.isfinite(peers.plane_by_landscaper(problem.model, overflowing, dirs, NUM, SPAN)).all()
    axes.vectors[0, 0] = 1e150
    found = loss_plane(problem.loss, problem.net.params, axes.vectors, num=3, span=1e200)
    assert found.n_nonfinite >= 6  # ours are kept and counted


@pytest.mark.parametrize("normalization", ["layer", "filter", "model"])
def test_plane_is_that_of_loss_landscapes(peers, loss_landscapes, normalization):
    problem = Problem()
    steps = peers.steps_of_loss_landscapes(problem.model, NUM, 1 / (2 * SPAN), normalization)
    theirs = peers.plane_by_loss_landscapes(problem.model, problem.scalar, NUM, 1 / (2 * SPAN), normalization)
    square = problem.steps(peers, steps, NUM + 1)
    assert float(off(theirs, peers.where_loss_landscapes(square)).max()) < 1e-10
    # odd rows are one step beside the even ones: as a regular grid its numbers are wrong
    assert float(off(theirs, peers.where_loss_landscapes(square, shifted=False)).max()) > 1e-3 * spread(square)
    assert all(bool((part >= 0).all()) for part in steps[0])  # drawn from [0, 1]: every weight grows
    lengths = [float(peers.flat(problem.net, parts).norm()) for parts in steps]
    wanted = 2 * SPAN * float(problem.net.theta.norm()) / NUM  # it divides by the distance that it is asked for
    assert lengths == pytest.approx([wanted, wanted], rel=1e-6)


def test_filter_normalisation_of_loss_landscapes_divides_by_zero_biases(peers, loss_landscapes):
    problem = Problem(biases=False)
    assert any(not bool(param.any()) for param in problem.model.parameters())
    with pytest.raises(ZeroDivisionError):
        peers.plane_by_loss_landscapes(problem.model, problem.scalar, NUM, 1.0, "filter")
    axes, _ = problem.axes(peers)
    assert bool(axes.vectors.isfinite().all())
    assert bool(problem.ours(axes, 3, SPAN).isfinite().all())


def test_linear_path_is_that_of_loss_landscapes(peers, loss_landscapes):
    problem, other, num = Problem(), Problem(seed=1), 10
    theirs = peers.line_by_loss_landscapes(problem.model, other.model, problem.scalar, num)
    ours = linear_path(problem.loss, problem.net.params, other.net.params, num=num + 1)
    assert float(off(theirs, ours.losses[1:]).max()) < 1e-10
    assert float(off(theirs, ours.losses[:-1]).max()) > 1e-3  # its first point is 1 / num, not the start
