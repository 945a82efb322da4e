"""Operators of parameters that are spread over several ranks are those of one rank; ranks that differ or fail are named."""

from __future__ import annotations

import parameter_shard_workers as workers
import pytest
import shard_workers
import torch
import torch.distributed as dist
from problems import seeded
from torch import nn
from torch.testing import assert_close

import funcscope as fs
from funcscope.core.keys import BLOCK, draw, draw_spans
from funcscope.core.shares import Rows
from funcscope.curvature.parameter_shards import bytes_per_product

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def spread(folder, job, num, *more, **settings):
    return shard_workers.spread(folder, job, num, *more, module="parameter_shard_workers", **settings)


@pytest.fixture
def alone():
    """A group of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield fs.processes()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 3])
def test_shares_of_parameters_are_one_rank(tmp_path, num):
    expected = {name: workers.numbers(workers.alone(name), None, name) for name in workers.models()}
    for out in spread(tmp_path, "everything", num):
        for name, values in expected.items():
            for key, value in values.items():
                assert_close(out[name][key], value, **EXACT, msg=lambda said, at=(name, key): f"{at}: {said}")


def test_one_rank_is_no_rank(alone):
    for name in ("mlp", "odd"):
        out = workers.numbers(workers.together(name, alone), alone, name)
        assert_close(out, workers.numbers(workers.alone(name), None, name), **EXACT)


@pytest.mark.slow
def test_bytes_are_those_of_the_model(tmp_path):
    for out in spread(tmp_path, "traffic", 2):
        expected = {
            name: bytes_per_product(out["num"], out["uses"], 8, 2, passes, out["batches"])
            for name, passes in PASSES.items()
        }
        assert out["ggn"] == expected["ggn"]
        assert out["rebuilt"] == expected["rebuilt"]
        assert 5 / 6 * expected["hessian"] <= out["hessian"] <= expected["hessian"]


PASSES = {"ggn": 5, "hessian": 6, "rebuilt": 9}


@pytest.mark.slow
def test_ranks_that_differ_are_refused_on_all(tmp_path):
    for rank, said in enumerate(spread(tmp_path, "wrong", 2)):
        assert "ValueError: 0.bias of rank 1 differ" in said["weights"]
        assert "ValueError: the settings of rank 1 differ" in said["settings"]
        assert ("ValueError: `0.weight` is on the meta" if rank else "rank 1 failed in making the functional") in said[
            "meta"
        ]
        assert "ValueError: the data or their order of rank 1" in said["data"]
        assert "ValueError: the settings of rank 1 differ" in said["operator"]
        assert "must be a flat vector of shape" in said["theta"]
        assert ("must be a flat vector" if rank else "rank 1 failed in a product") in said["vector"]
        for name in ("key", "whole vector", "without a product"):
            assert "ValueError: ranks have not done the same up to" in said[name], name
        assert "ValueError: the data or their order of rank 1" in said["number"]
        assert "ValueError: the loss of one sequence near theta of rank 1" in said["criterion"]
        assert "ValueError: the loss of one sequence near theta of rank 1" in said["activation"]
        assert ("mine" if rank else "rank 1 failed in checking the loss: ValueError: mine") in said["forward pass"]
        for name in ("theta for shares", "scaled"):
            assert "`like` must be `net.shares` of the functional that the matvec was made with" in said[name]
        assert said["right"] == "nothing"


@pytest.mark.slow
def test_ranks_of_unequal_numbers_of_batches_fill_missing_targets(tmp_path):
    batches, criterion = workers.with_missing()
    loss = fs.objective(fs.functional(workers.models()["mlp"][0]), batches, criterion)
    expected = fs.hessian(loss, loss.net.theta)(fs.normal(workers.KEY, loss.net.theta))
    for out in spread(tmp_path, "missing", 2):
        assert_close(out, expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "timeout"), [("killed", 60.0), ("stopped", 5.0)])
def test_a_rank_that_ends_or_hangs_in_a_product_is_an_error_on_all_others(tmp_path, job, timeout):
    for out in spread(tmp_path, job, 3, timeout, missing=1):
        assert out["step"] == 2
        assert (
            "has lost another one in gathering `" in out["said"] or "has lost another one in summing `" in out["said"]
        )
        assert "start all ranks again" in out["said"]
        assert out["seconds"] < 60
        assert "were lost before" in out["again"]


@pytest.mark.slow
def test_parameters_that_fsdp_has_spread_are_taken_as_they_are(tmp_path):
    loss = workers.alone("mlp")
    expected = fs.ggn(loss, loss.net.theta)(fs.normal(workers.KEY, loss.net.theta))
    for out in spread(tmp_path, "fully_sharded", 2):
        assert out["gathered"] == 0
        assert_close(out["product"], expected, **EXACT)
        assert "is a DTensor" in out["functional"]
        assert "sharded_functional(meta_model" in out["itself"]
        assert "it must be `Shard(0)` on the 2 ranks" in out["replicated"]
        assert "`state` has no ['0.bias', '2.weight', '2.bias']" in out["missing"]


@pytest.mark.slow
def test_sequences_that_see_each_other_are_not_cut(tmp_path):
    for out in spread(tmp_path, "coupled", 2):
        assert "see each other" in out["said"]


@pytest.mark.slow
def test_memory_of_a_rank_falls_with_their_number(tmp_path):
    """What grows with P is divided by n; some matrices are whole for a moment."""
    peaks = {}
    for num in (1, 3):
        (tmp_path / str(num)).mkdir()
        outs = spread(tmp_path / str(num), "memory", num)
        peaks[num] = max(out["MiB"] for out in outs)
        assert outs[0]["form"] == pytest.approx(peaks.setdefault("form", outs[0]["form"]), rel=1e-4)
    matrix = workers.WIDTH**2 * 4 / 2**20
    assert peaks[3] <= peaks[1] / 3 + 5 * matrix, peaks


def test_doors(alone):
    model = seeded(0, lambda: nn.Linear(2, 2))
    net = fs.sharded_functional(model, alone)
    data = [(torch.ones(2, 2), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="sharded_objective"):
        fs.objective(net, data, fs.classification)
    with pytest.raises(ValueError, match="must be what `sharded_functional` returns"):
        fs.sharded_objective(fs.functional(model), data, fs.classification)
    loss = fs.sharded_objective(net, data, fs.classification)
    for metric in (fs.hessian, fs.ggn, fs.empirical_fisher):
        with pytest.raises(ValueError, match="parameters on several ranks, which only its operators take"):
            metric(loss, net.theta)
    with pytest.raises(ValueError, match="`ranks` must be those"):
        fs.sharded(fs.hessian, loss, net.theta, fs.processes())
    with pytest.raises(ValueError, match="`check=True` compares"):
        fs.sharded(fs.hessian, loss, net.theta, alone, check=True)
    with pytest.raises(ValueError, match="`head_chunk` needs the whole weight"):
        fs.sharded(fs.ggn, loss, net.theta, alone, head_chunk=4)
    H = fs.sharded(fs.ggn, loss, net.theta, alone)
    with pytest.raises(ValueError, match="neither mapped nor differentiated"):
        H(net.theta.requires_grad_())
    with pytest.raises((ValueError, TypeError), match=r"takes whole vectors|like"):
        fs.xtrace(H, net.shares, key=workers.KEY, num=2)
    with pytest.raises(TypeError, match="ranks"):
        fs.sharded_functional(model, None)
    with pytest.raises(ValueError, match="must be a tensor of shape"):
        fs.sharded_functional(model, alone, state={"weight": torch.ones(2, 3), "bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"`bias` must have the dtype of the model, torch.float32, got torch.float64"):
        fs.sharded_functional(model, alone, state={"weight": torch.ones(2, 2), "bias": torch.ones(2).double()})
    norm = nn.BatchNorm1d(2).eval()
    state = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    for odd, said in ((torch.ones(3), "a tensor of shape"), (torch.ones(2).double(), "the dtype of the model")):
        with pytest.raises(ValueError, match=rf"the value of `running_mean` must (be|have) {said}"):
            fs.sharded_functional(norm, alone, state={**state, "running_mean": odd})


def test_rows_are_those_of_chunk(alone):
    alone.num = 3
    for rows in range(1, 9):
        cut = Rows("w", (rows, 2), alone)
        sizes = [stop - start for start, stop in map(cut.span, range(3))]
        assert [size for size in sizes if size] == [len(part) for part in torch.arange(rows).chunk(3)]


def test_parts_of_a_draw_are_parts_of_the_whole():
    num = 3 * BLOCK + 5
    whole = draw(workers.KEY, num, "normal")
    spans = [(0, 3), (3, 3), (7, BLOCK - 1), (BLOCK - 1, BLOCK + 2), (3 * BLOCK + 1, num)]
    expected = torch.cat([whole[start:stop] for start, stop in spans])
    assert torch.equal(draw_spans(workers.KEY, num, "normal", spans), expected)
