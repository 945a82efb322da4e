"""Operators, Grams and directional losses over data on several ranks are those of one rank; ranks that fail are named."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import shard_workers as workers
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.batches import parts_between
from funcscope.core.processes import STATE, bytes_per_product, share_of
from funcscope.curvature.agreement import check_cuts

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def alone():
    """A group of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield fs.processes()
    dist.destroy_process_group()


def check_everything(each):
    loss, text = workers.mlp_loss(), workers.lm_loss()
    one = {name: workers.directional(loss, name) for name in workers.DIRECTIONAL}
    for out in each:
        assert_close(out["mlp"], workers.products(loss), **EXACT)
        assert_close(out["lm"], workers.products(text), **EXACT)
        assert_close(out["gram"], workers.grams(loss), **EXACT)
        assert_close(out["text gram"], workers.grams(text), **EXACT)
        eigenvalues = fs.eigenpairs(fs.hessian(loss, loss.net.theta), loss.net.theta, key=workers.KEY, num=2).values
        assert_close(out["eigenvalues"], eigenvalues, **EXACT)
        for name, result in one.items():
            arrays = {k: x for k, x in result.arrays().items() if isinstance(x, torch.Tensor)}
            assert_close(
                {k: torch.as_tensor(out[name][k]) for k in arrays}, arrays, rtol=1e-12, atol=1e-10, equal_nan=True
            )
            assert out[name]["mean"] == pytest.approx(float(result.delta_mean.value), rel=1e-12)
            assert out[name]["error"] == pytest.approx(float(result.delta_mean.stderr), rel=1e-10)
            for field, rows in result.residuals._asdict().items():
                if isinstance(rows, torch.Tensor):
                    assert_close(out[f"{name} residuals"][field], rows, rtol=1e-12, atol=1e-10)
        for name in ("mlp", "lm"):  # every rank has the same bits, so that algorithms stay together
            assert all(torch.equal(out[name][k], each[0][name][k]) for k in workers.OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
def test_ragged_shards_are_one_rank(tmp_path, num):
    check_everything(workers.spread(tmp_path, "everything", num))


@pytest.mark.slow
def test_empty_shards_and_shards_without_a_scored_token(tmp_path):
    """Two sequences, the first of which is not scored, on three ranks."""
    loss = workers.mlp_loss((2,))
    for out in workers.spread(tmp_path, "few", 3):
        assert_close(out["mlp"], workers.products(loss), **EXACT)
        assert_close(out["gram"], workers.grams(loss), **EXACT)
        assert_close(out["losses"], workers.directional(loss, "difference").losses, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
def test_bytes_are_those_of_the_model(tmp_path, num):
    loss = workers.mlp_loss(dtype=torch.float32)
    for out in workers.spread(tmp_path, "traffic", num):
        assert out["reduced"] == 5 * (out["num"] * 4 + STATE)
        assert out["moved"] == pytest.approx(5 * bytes_per_product(out["num"], 4, num))
        assert_close(out["product"], fs.hessian(loss, loss.net.theta)(workers.vector(loss)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_ranks_that_differ_are_refused_on_all(tmp_path):
    for rank, said in enumerate(workers.spread(tmp_path, "wrong", 2)):
        assert "ValueError: theta of rank 1 differ" in said["theta"]
        assert "must be a flat vector of shape" in said["length"]
        assert "ValueError: the data or their order of rank 1" in said["order"]
        assert "ValueError: the settings of rank 1" in said["settings"]
        assert "ValueError: the settings of rank 1" in said["operator"]
        assert "ValueError: the data or their order of rank 1" in said["number"]
        assert "ValueError: the loss of one sequence near theta of rank 1" in said["criterion"]
        assert "ValueError: the loss of one sequence near theta of rank 1" in said["activation"]
        for name in ("vector", "unit vectors", "signs", "order of entries", *(f"key {i}" for i in range(20))):
            assert "ValueError: ranks have not done the same up to a product with `ggn`" in said[name], name
        assert ("must be a flat vector" if rank else "rank 1 failed in a product with `ggn`: ValueError") in said[
            "shape"
        ]
        assert ("ZeroDivisionError" if rank else "RuntimeError: rank 1 failed in a step: ZeroDivisionError") in said[
            "inside"
        ]
        assert ("mine" if rank else "rank 1 failed in the comparison of ranks: ValueError: mine") in said[
            "forward pass"
        ]
        assert said["right"] == "nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("job", "timeout"), [("killed", 60.0), ("stopped", 5.0)])
def test_a_rank_that_ends_or_hangs_is_an_error_on_all_others(tmp_path, job, timeout):
    start = time.monotonic()
    for out in workers.spread(tmp_path, job, 3, timeout, missing=1):
        assert out["step"] == 2
        assert "has lost another one in a product with `hessian`" in out["said"]
        assert "start all ranks again" in out["said"]
        assert out["seconds"] < 60
        assert "were lost before" in out["again"]
    assert time.monotonic() - start < 120


def test_one_rank_is_no_rank(alone):
    loss = workers.mlp_loss()
    assert_close(workers.products(loss, alone), workers.products(loss), **EXACT)
    assert_close(workers.grams(loss, alone), workers.grams(loss), **EXACT)
    for name in workers.DIRECTIONAL:
        assert_close(workers.directional(loss, name, alone).losses, workers.directional(loss, name).losses, **EXACT)


def test_doors(alone):
    loss = workers.mlp_loss()
    theta = loss.net.theta
    with pytest.raises(ValueError, match="`operator` must be one of hessian, ggn"):
        fs.sharded(fs.gram, loss, theta, alone)
    with pytest.raises(TypeError, match="ranks"):
        fs.sharded(fs.hessian, loss, theta, None)
    H = fs.sharded(fs.hessian, loss, theta, alone)
    with pytest.raises(ValueError, match="neither mapped nor differentiated"):
        H(theta.requires_grad_())
    with pytest.raises(ValueError, match="neither mapped nor differentiated"):
        torch.func.vmap(H)(torch.eye(len(theta), dtype=theta.dtype)[:2])
    with pytest.raises(ValueError, match="`timeout` must be a finite number above 0"):
        fs.processes(timeout=0)
    with pytest.raises(TypeError, match="has no option `two_side`"):
        fs.sharded_directional_losses(loss, theta, alone, key=workers.KEY, two_side=True)


def test_no_group_says_how_to_make_one():
    with pytest.raises(ValueError, match="init_process_group"):
        fs.processes()


def test_sequences_that_see_each_other_are_not_cut(alone):
    """A loss that takes the mean over the batch off: the cut is refused, where a rank's own check sees both parts."""
    loss = workers.mlp_loss((4,))
    coupled = fs.custom(lambda out, y: ((out - out.mean(0)) ** 2).sum(-1))
    loss = fs.objective(loss.net, [(loss.batches[0][0], torch.zeros(4))], coupled)
    with pytest.raises(ValueError, match="see each other"):
        check_cuts(loss, loss.net.theta, parts_between(loss.batches, 0, 2))
    single = replace(loss, criterion=fs.custom(lambda out, y: (out**2).sum(-1)))
    check_cuts(single, loss.net.theta, parts_between(loss.batches, 0, 2))


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), num=st.integers(1, 8))
def test_shares_are_all_sequences_once_in_order(sizes, num):
    rows = tuple((torch.arange(n) + 10 * i, torch.arange(n)) for i, n in enumerate(sizes))
    shares = [share_of(sum(sizes), r, num) for r in range(num)]
    assert shares[0][0] == 0
    assert shares[-1][1] == sum(sizes)
    assert all(a[1] == b[0] for a, b in pairwise(shares))
    assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
    parts = [part for share in shares for part, *_ in parts_between(rows, *share)]
    assert_close(torch.cat([x for x, _ in parts]), torch.cat([x for x, _ in rows]))


def test_a_batch_that_cannot_be_cut_is_whole_where_it_begins():
    rows = ((torch.arange(3), torch.arange(3)), (("text",), torch.arange(4)), (torch.arange(3), torch.arange(3)))
    held = [[x for x, *_ in parts_between(rows, *share_of(10, r, 3))] for r in range(3)]
    assert [sum(pair is rows[1] for pair in each) for each in held] == [0, 1, 0]
    assert [len(each) for each in held] == [1, 1, 1]


def test_bytes_of_one_rank_are_none(alone):
    loss = workers.mlp_loss()
    product = fs.sharded(fs.ggn, loss, loss.net.theta, alone)
    before = alone.reduced
    product(workers.vector(loss))
    assert alone.moved == bytes_per_product(loss.layout.num, 8, 1) == 0
    assert alone.reduced - before == loss.layout.num * 8 + STATE
