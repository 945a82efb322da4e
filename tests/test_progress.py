"""Progress: counts against the costs that results state, the same numbers watched or not, one bar however many."""

import os
import subprocess
import sys

import pytest
import torch
from problems import loss_of
from torch.func import vmap

import funcscope as fs
from funcscope.core.progress import tick, watched


@pytest.fixture(scope="module")
def loss():
    return loss_of("cnn")  # one batch: a pass over all batches is one over a batch


@pytest.mark.parametrize("operator", [fs.hessian, fs.ggn])
@pytest.mark.parametrize("keep", [True, False])
def test_products_are_those_that_the_result_states(loss, operator, keep):
    theta = loss.net.theta
    matvec = operator(loss, theta, keep=keep)
    with fs.progress(quiet=True) as counts:
        pairs = fs.eigenpairs(matvec, theta, key=fs.key(0), num=1)
        trace = fs.hutchinson_trace(matvec, theta, key=fs.key(0), num=3)
    assert counts.products == pairs.num_matvecs + trace.num_matvecs
    again = fs.eigenpairs(matvec, theta, key=fs.key(0), num=1)
    assert torch.equal(again.values, pairs.values)  # the same bits without anybody watching
    assert counts.products == pairs.num_matvecs + 3  # which is over


def test_forwards_are_those_that_the_result_states(loss):
    theta = loss.net.theta
    with fs.progress(quiet=True) as counts:
        average = fs.average_sharpness(loss, theta, key=fs.key(0), num=3)
    assert (counts.forwards, counts.products) == (average.num_forwards, 0)
    with fs.progress(quiet=True) as counts:
        sam = fs.sam_sharpness(loss, theta, curvature=False)
    assert counts.forwards == sam.num_forwards + sam.num_gradients
    two = loss_of("mlp")
    with fs.progress(quiet=True) as counts:
        two(two.net.theta)
    assert counts.forwards == len(two.batches) == 2


def costs(call):
    with fs.progress(quiet=True) as counts:
        call()
    return counts.forwards, counts.products


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
@pytest.mark.parametrize("lazy", [False, True])
def test_every_point_of_a_plane_is_a_pass_over_every_batch(chunk, lazy):
    loss = loss_of("mlp")
    phi = fs.restrict(loss, loss.net.theta, fs.directions(loss.net, key=fs.key(0), num=2), lazy=lazy)
    points = fs.grid(3, span=0.1, dtype=torch.float64)
    assert costs(lambda: vmap(phi, chunk_size=chunk)(points)) == (9 * len(loss.batches), 0)
    assert costs(lambda: vmap(vmap(phi), chunk_size=chunk)(points.reshape(3, 3, 2))) == (9 * len(loss.batches), 0)

    def plane():
        return fs.loss_plane(loss, loss.net.theta, fs.plane_directions(loss.net, key=fs.key(0)), num=5, chunk=chunk)

    assert plane().num_forwards == 25 + 2  # theta, twice
    assert costs(plane) == (27 * len(loss.batches), 0)


def test_mapped_products_are_as_many_as_their_vectors(loss):
    H = fs.hessian(loss, loss.net.theta)
    assert costs(lambda: vmap(H, chunk_size=2)(torch.eye(len(loss.net.theta), dtype=torch.float64)[:5]))[1] == 5


@pytest.mark.parametrize("chunk", [1, 3, 99])
def test_sequences_of_a_batch_are_one_pass_however_many_at_a_time(chunk):
    """And one more, which says whether they are apart."""
    loss = loss_of("mlp")
    made = costs(lambda: fs.curvature.per_sample_gradients(loss, loss.net.theta, chunk_size=chunk))
    assert made == (2 * len(loss.batches), 0)


def test_watchers_end_with_their_context_and_may_end_the_work(loss):
    outer, inner = [], []
    with watched(lambda kind, num: outer.append(kind)):
        with pytest.raises(RuntimeError, match="stop"), watched(lambda kind, num: inner.append(kind)):
            tick("product")
            raise RuntimeError("stop")
        tick("forward")
    tick("forward")
    assert (outer, inner) == (["product", "forward"], ["product"])

    def enough(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(enough):
        loss(loss.net.theta)
    loss(loss.net.theta)


def test_there_is_one_bar_which_says_what_was_counted(loss, capsys):
    with fs.progress(total=4) as outer:
        loss(loss.net.theta)
        with fs.progress(total=9) as inner:
            fs.hessian(loss, loss.net.theta)(loss.net.theta)
    shown = capsys.readouterr().err
    assert (outer.products, inner.products, inner.forwards) == (1, 1, outer.forwards - 1)
    assert "/4" in shown
    assert "/9" not in shown
    assert "products=1" in shown
    with fs.progress(quiet=True):
        loss(loss.net.theta)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise():
    """What OpenMP is told must be told before torch is loaded: in a fresh process."""
    code = "import os, funcscope; print(os.environ['OMP_WAIT_POLICY'])"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "passive"
